"""The caretaker: an actor that outlives its run's driver, and frees what that leaves on the cluster.

    loop.py --Caretaker.start--> actor, detached, on the head --job table--> is the driver's job dead?
                                   |
                                   +--> serving.end_applications, dearest first; then it ends itself

Serve's applications outlive whoever deployed them, whether that was killed, stopped by `ray job stop` or lost with its
node. All else that a run starts belongs to its job, and Ray ends it with the job. `holdings.py` asks the caretakers of
all runs what they look after.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from kto_ray.naming import ROLES, Application, unique_name
from kto_ray.serving import deployed, end_applications
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

NAMESPACE = "kto-ray"
POLL_S = 1.0


@dataclass(frozen=True)
class Charge:
    """Whom a caretaker looks after.

    Args:
        run: its unique name.
        uri: of its folder.
        job: id of its driver's job.
        since: when the driver began, in seconds since the epoch.
    """

    run: str
    uri: str
    job: str
    since: float

    @property
    def applications(self) -> list[str]:
        """On Serve, in the order in which they are ended."""
        return [str(Application(self.run, role, self.job)) for role in ROLES]


class CaretakerActor:
    """See the module. It watches in a thread, so that it does so again when Ray has to start the actor again."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._myself = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, daemon=True).start()

    def charge(self) -> Charge:
        return self._charge

    def _watch(self) -> None:
        while True:
            try:
                if self._charge.job not in living_jobs():
                    end_applications(self._charge.applications)
                    break
            except (RayError, RayServeException, TimeoutError):
                logger.exception("%s: tried again in a moment", self._charge.uri)
            time.sleep(POLL_S)
        ray.kill(self._myself)


class Caretaker:
    """The driver's side: starts the actor before anything is deployed, and lets it go once all else is closed."""

    def __init__(self, run: Storage) -> None:
        self.charge = Charge(unique_name(run), run.uri, ray.get_runtime_context().get_job_id(), time.time())
        self._actor: Any = None

    def start(self) -> bool:
        """Begin, and end what an earlier driver of the same run may have left; gives whether no other run is there."""
        actor: Any = ray.remote(CaretakerActor)
        self._actor = actor.options(
            name=f"{self.charge.run}@{self.charge.job}",
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},  # there it keeps no other node from being given back
        ).remote(self.charge)
        known = [application for name in deployed() if (application := Application.parse(name))]
        left = [application for application in known if application.run == self.charge.run]
        end_applications([str(application) for application in sorted(left, key=Application.rank)])
        ray.get(self._actor.charge.remote())
        return caretakers().keys() == {f"{self.charge.run}@{self.charge.job}"}

    def close(self) -> None:
        """Let it go, unless something is still there that it has to end."""
        if self._actor is not None and not deployed().keys() & set(self.charge.applications):
            ray.kill(self._actor)


def caretakers() -> dict[str, Any]:
    """Handles of those of all runs on the cluster, by their names: "RUN@JOB"."""
    named = ray.util.list_named_actors(all_namespaces=True)
    found = {}
    for name in [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]:
        try:
            found[name] = ray.get_actor(name, NAMESPACE)
        except ValueError:
            continue  # gone meanwhile
    return found


def living_jobs() -> set[str]:
    """Ids of the jobs whose driver is there."""
    from ray._private.state import state

    table: Any = state.job_table
    return {job["JobID"] for job in table() if not job["IsDead"]}
