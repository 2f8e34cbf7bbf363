"""What runs have on a cluster, whoever started them, and ending what is left of those that have no driver any more.

`kto-ray runs` shows and ends it. A run's Serve applications carry the id of its driver's job in their names; its
caretaker (`caretaker.py`), if it is still there, knows where the run's folder is.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from kto_ray.caretaker import Charge, caretakers, living_jobs
from kto_ray.errors import UserError
from kto_ray.naming import Application
from kto_ray.serving import deployed, end_applications

ANSWER_S = 10.0

Driver = Literal["alive", "gone", "unknown"]


@dataclass
class Holding:
    """What one driver of a run has, or left, on the cluster.

    Args:
        run: its unique name; of what an earlier version deployed the application's.
        job: id of the driver's job; "" when that is unknown.
        uri: of its folder, if its caretaker is there to say it.
        since: seconds since the epoch.
        applications: on Serve, each with its state.
        resources: what the replicas of those hold, by kind.
    """

    run: str
    job: str
    driver: Driver
    uri: str | None = None
    since: float | None = None
    applications: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    caretaker: Any = None


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Be on a cluster for a moment.

    Args:
        address: of its head; None: what RAY_ADDRESS says, or else the one that runs on this machine.

    Raises:
        UserError: there is none.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        ray.init(address=address or "auto", logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(
            f"--address: no cluster answers at {address or 'RAY_ADDRESS or on this machine'}; give the address of its "
            "head, HOST:PORT, on one of its machines"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def holdings() -> list[Holding]:
    """Of all runs on the cluster that is joined, oldest first."""
    alive, found = living_jobs(), dict[tuple[str, str], Holding]()
    for actor in caretakers().values():
        with contextlib.suppress(RayError):  # it has just ended, and so has what it looked after; or it hangs
            charge: Charge = ray.get(actor.charge.remote(), timeout=ANSWER_S)
            driver: Driver = "alive" if charge.job in alive else "gone"
            found[charge.run, charge.job] = Holding(
                charge.run, charge.job, driver, charge.uri, charge.since, caretaker=actor
            )
    for name, application in deployed().items():
        if not name.startswith("kto-ray-"):
            continue
        owner = Application.parse(name)
        run, job = (owner.run, owner.job) if owner else (name, "")
        driver = "unknown" if not owner else "alive" if job in alive else "gone"
        holding = found.setdefault((run, job), Holding(run, job, driver, since=application.last_deployed_time_s))
        holding.applications[name] = application.status.value
        for deployment in application.deployments.values():
            for kind, amount in deployment.required_resources.items():
                if kind in ("CPU", "GPU"):
                    holding.resources[kind] += amount * len(deployment.replicas)
    return sorted(found.values(), key=lambda holding: holding.since or 0)


def clean(names: Sequence[str], living: bool) -> list[Holding]:
    """End what runs have on the cluster that is joined; gives those that it did end.

    Args:
        names: of the runs; none: all that have no driver.
        living: also those that have a driver, which then fails, or perhaps have one. They must be named.

    Raises:
        UserError: nothing of such a name is there, or it may have a driver.
    """
    found = holdings()
    if strangers := set(names) - {holding.run for holding in found}:
        raise UserError(f"{sorted(strangers)[0]}: nothing of this name is on the cluster; see: kto-ray runs list")
    chosen = [holding for holding in found if (holding.run in names if names else holding.driver == "gone")]
    for holding in chosen:
        if holding.driver != "gone" and not living:
            raise UserError(
                f"{holding.run}: its driver is {holding.driver}; stop it first (ray job stop), or end what it has on "
                "the cluster nevertheless, with --living"
            )
    for holding in chosen:
        end_applications(sorted(holding.applications, key=_dearest_first))
        if holding.caretaker is not None:
            ray.kill(holding.caretaker)
    return chosen


def _dearest_first(name: str) -> int:
    application = Application.parse(name)
    return application.rank() if application else 0
