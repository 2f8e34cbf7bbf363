"""What of a run may change when it is continued: each field of the configuration says so where it is declared.

    beta: Fixed[Positive] = 5000        another value would be another experiment: it is refused
    name: ByContent[str] = "shapes"     may change as long as what it names is the same to the byte
    batch_size: Noted[Count] = 8        may change; what comes is not what would have come, be it by rounding only, so
                                        that the change is said and written down
    max_replicas: Free[Count] = 1       may change, and changes nothing of what comes

`config/resuming.py` goes by it. A plug-in marks its arguments in the same way, `device: Noted[str] = "auto"`; those
without a mark are fixed. Scorers' own environments import this module, too: it needs the standard library only.
"""

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, TypeVar, get_type_hints


class OnResume(Enum):
    """What happens when a run is continued with another value."""

    FIXED = "fixed"
    BY_CONTENT = "by content"
    NOTED = "noted"
    FREE = "free"


T = TypeVar("T")
Fixed = Annotated[T, OnResume.FIXED]
ByContent = Annotated[T, OnResume.BY_CONTENT]
Noted = Annotated[T, OnResume.NOTED]
Free = Annotated[T, OnResume.FREE]


def marks_of(plugin: Callable[..., Any]) -> dict[str, OnResume]:
    """The marks of the arguments of a class, or a function, by name; without those that have none."""
    build = plugin.__init__ if inspect.isclass(plugin) else plugin
    try:
        hints = get_type_hints(build, include_extras=True)
    except (NameError, AttributeError, TypeError):  # written for a type checker's eyes only, or a callable without any
        return {}
    return {
        name: mark
        for name, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, OnResume)
    }
