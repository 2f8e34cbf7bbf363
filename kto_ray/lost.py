"""What Ray loses when a process or a node goes, and is to be asked for again.

    RayActorError            the actor's process is gone, or cannot be reached for the moment
    ObjectLostError          the answer was given, but its node, or whoever owns it, went before it was fetched; also
                             OwnerDiedError, ObjectFetchTimedOutError, ReferenceCountingAssertionError, ...
    NodeDiedError, LocalRayletDiedError, WorkerCrashedError, OutOfMemoryError
                             the node went, or the process on it, also when Ray ended it for want of memory

None of them is a subclass of another. Not among them: RaySystemError (an answer that cannot be read here, or the
driver's own node: asking again does not help), full disks and object stores, environments that cannot be set up, and
RayTaskError, which is what the code over there raised. Generators and scorers ask `is_lost`; what the coordinator of
training is asked, Ray asks again by itself.
"""

import re

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

SENTENCE = re.compile(r"^kto_ray(\.\w+)+: ")
"""What Python puts before the sentence of an error of this package, a UserError for instance."""
LOST = (RayActorError, ObjectLostError, NodeDiedError, LocalRayletDiedError, WorkerCrashedError, OutOfMemoryError)


def is_lost(error: BaseException) -> bool:
    """Whether Ray lost what was asked for, so that it can be asked for again."""
    # An error that was raised over there is a RayTaskError and an instance of its own class, too.
    return isinstance(error, LOST) and not isinstance(error, RayTaskError)


def taken_away(error: BaseException) -> bool:
    """Whether it was lost with a node of which Ray had been told that it goes (`draining.py`): nobody's failure."""
    return isinstance(error, RayActorError) and error.preempted


def pixels_lost(error: BaseException) -> bool:
    """Whether what an actor was given is gone, and the actor is not."""
    return isinstance(error, ObjectLostError)


def last_words(error: BaseException | str) -> str:
    """What an error, or a report of one, says at the end, below pages of traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return SENTENCE.sub("", lines[-1])
