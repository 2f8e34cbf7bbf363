"""One driver a run: the lease on a run's folder, whoever sees the folder and wherever it lies.

    <run>/lease/00007-3f9c2a51.json     the seventh driver's claim: host, process, user, job, since when, renewals

A driver looks at the claims that are there; when those with the highest number hold no more, it puts one of its own
with the next number and looks again: it holds the folder when no claim has come meanwhile. Of several that come at
once, the one that looks last sees the others' claims, so that never two hold; the first of them by name looks again
until the others have taken their claims back, so that one does. This asks of the storage only that a listing shows
every file that was whole before it began: object stores promise it (S3, GCS), a local disk does it, and over NFS a
client lists a folder anew that it has just changed. No conditional write is needed, which neither pyarrow nor every
S3-compatible server has.

The holder renews its claim every `renew_s`. A claim that is not released is taken over when its process is gone, as far
as that can be seen (same machine), or when it was not renewed for `stale_s` while the newcomer looked on: no clocks are
compared. The newcomer reads the old claim once more after its own was there, and gives up if it was renewed.

Every write of the driver, of its replicas and train workers goes through a `Storage` that asks the lease first
(`require`). The driver knows that nobody can have taken over in the half of `stale_s` after a renewal, and asks the
storage later than that; a train worker asks the storage every time. What remains: a single write that begins before and
ends after a takeover, by a process that was stopped for longer than half of `stale_s` between the two.
"""

import asyncio
import contextlib
import dataclasses
import getpass
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from kto_ray.errors import UserError
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 8  # to take a lease that others reach for at the same moment
SILENT_S = 3.0  # of a wait
YIELDS_S = 30.0  # in which drivers that come at the same moment take their claims back, on a slow storage too


class LeaseLostError(UserError):
    """Another driver has taken the run over; nothing may be written any more."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a claim's file says. `machine` and `started` tell a process from another one of the same number."""

    host: str
    pid: int
    user: str
    job: str
    machine: str
    started: str
    since: str
    stale_s: float
    renewed: str
    renewals: int = 0
    released: bool = False

    @classmethod
    def mine(cls, stale_s: float) -> "Claim":
        pid, now = os.getpid(), _now()
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container whose user has no name
            user = str(os.getuid())
        return cls(socket.gethostname(), pid, user, _job(), _machine(), _started(pid), now, stale_s, now)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.user} on {self.host} (process {self.pid}{job}) since {self.since}"

    @property
    def here(self) -> bool:
        """Whether its process is, or was, one of this machine."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def process_gone(self) -> bool:
        return self.here and _started(self.pid) != self.started

    @property
    def silent_s(self) -> float:
        """Seconds since it was renewed, by the clock of its machine and of this one."""
        renewed = datetime.strptime(self.renewed, _TIME).replace(tzinfo=UTC)
        return max(0.0, (datetime.now(UTC) - renewed).total_seconds())


_TIME = "%Y-%m-%d %H:%M:%S UTC"


def _now() -> str:
    return datetime.now(UTC).strftime(_TIME)


def _clock() -> float:
    """Seconds; goes on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """This boot of this machine, and in it the container, as far as process numbers go; "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _job() -> str:
    """The name under which Ray or Slurm knows this process, if one of them started it."""
    ray = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    name = (ray.get("metadata") or {}).get("job_submission_id") or os.environ.get("SLURM_JOB_ID")
    return str(name or "")


class Lease:
    """A claim that holds. Pickles; elsewhere than in the process that took it, every question goes to the storage."""

    def __init__(self, folder: Storage, name: str, claim: Claim) -> None:
        self.folder, self.name, self.claim = folder, name, claim
        self._sure_until = 0.0
        self._lost: LeaseLostError | None = None
        self._keeps = False  # whether this is the object that renews the claim
        self._renewing = threading.Lock()

    def __reduce__(self) -> tuple[type["Lease"], tuple[Storage, str, Claim]]:
        return Lease, (self.folder, self.name, self.claim)

    def require(self) -> None:
        """Raises LeaseLostError when another driver may have taken the run over."""
        if self._lost:
            raise self._lost
        if _clock() >= self._sure_until:
            if self._keeps:
                self.renew()
            else:
                self._look()

    def require_seen(self) -> None:
        """Raises UserError when the folder, as it is seen from here, is not the one that the driver sees."""
        if not self.folder.names(suffix=".json"):
            raise UserError(
                f"runs_folder: {socket.gethostname()} does not see what {self.claim.host} writes to "
                f"{self.folder.uri.removesuffix('/lease')}; give a folder that all machines of the cluster share, for "
                "instance s3://bucket/runs"
            )
        self._look()

    def renew(self) -> None:
        """Raises LeaseLostError."""
        with self._renewing:
            began = _clock()
            self.claim = dataclasses.replace(self.claim, renewed=_now(), renewals=self.claim.renewals + 1)
            self._write()
            try:
                self._look()
            except LeaseLostError as lost:
                self._lost = lost
                self.folder.delete(self.name)
                raise
            self._keeps, self._sure_until = True, began + self.claim.stale_s / 2

    def release(self) -> None:
        with self._renewing:
            if self._lost is None:
                self._look()
                self.claim = dataclasses.replace(self.claim, released=True)
                self._write()

    async def while_held(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives; it is cancelled when the lease is lost. Raises LeaseLostError."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and self._lost is None:
                await asyncio.wait({task}, timeout=1)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._lost and (task.cancelled() or task.exception()):
            raise self._lost
        return task.result()

    def _write(self) -> None:
        self.folder.write_json(self.name, dataclasses.asdict(self.claim))

    def _look(self) -> None:
        names = self.folder.names(suffix=".json")
        if others := [name for name in names if _number(name) > _number(self.name)]:
            taker = _claims(self.folder).get(others[-1], "another driver")
            raise LeaseLostError(
                f"run: {self.folder.uri.removesuffix('/lease')} was taken over by {taker}; this one ends"
            )
        if self.name not in names:
            raise LeaseLostError(
                f"run: {self.folder}/{self.name}, the claim of this driver, was removed; this one ends"
            )


@contextlib.contextmanager
def held(run: Storage, renew_s: float, stale_s: float) -> Iterator[tuple[Lease, Storage]]:
    """Hold the lease of a run's folder; gives it, and the folder that asks it before every write.

    Args:
        renew_s: between renewals.
        stale_s: after so long without a renewal another driver may take over. At least three times `renew_s`.

    Raises:
        UserError: another driver holds the folder.
    """
    lease = _take(Storage(run.uri) / "lease", renew_s, stale_s)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(renew_s):
            try:
                lease.renew()
            except LeaseLostError as lost:
                logger.error("%s", lost)
                return
            except UserError as error:  # the storage may come back before the lease is stale
                logger.warning("the run's lease could not be renewed: %s", error)

    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease, Storage(run.uri, lease)
    finally:
        ended.set()
        keeper.join()
        try:
            with contextlib.suppress(LeaseLostError):  # whoever has it now gives it back
                lease.release()
        except UserError as error:
            logger.warning("the run's lease could not be released: %s", error)


def _take(folder: Storage, renew_s: float, stale_s: float) -> Lease:
    for _ in range(TRIES):
        before = _claims(folder)
        number = max(map(_number, before), default=0)
        # Claims with lower numbers were taken over from, by whoever made the higher ones.
        overdue = [
            name for name in before if _number(name) == number and not _ended(folder, name, before[name], renew_s)
        ]
        lease = Lease(folder, f"{number + 1:05}-{uuid.uuid4().hex[:8]}.json", Claim.mine(stale_s))
        with contextlib.ExitStack() as otherwise:
            otherwise.callback(folder.delete, lease.name)
            lease._write()
            began, said = _clock(), False
            while _yielding(lease.name, before, after := _claims(folder)) and _clock() - began < YIELDS_S:
                if not said and _clock() - began > SILENT_S:
                    logger.warning("%s: waiting for drivers that came at the same moment to give way", folder)
                    said = True
                time.sleep(0.1)
            alone = after.keys() - before.keys() == {lease.name}
            if alone and all(after.get(name) == before[name] for name in overdue):
                lease.renew()
                otherwise.pop_all()
                for name in before:
                    folder.delete(name)
                for name in overdue:
                    logger.warning("%s is taken over from %s", folder.uri.removesuffix("/lease"), before[name])
                return lease
        time.sleep(random.uniform(0.1, 1))
    raise UserError(f"run: several drivers began to work on {folder} at the same moment; start one of them again")


def _ended(folder: Storage, name: str, claim: Claim, renew_s: float) -> bool:
    """Whether a claim was given back; False: it was not, and yet holds no more. Raises UserError when it holds."""
    run = folder.uri.removesuffix("/lease")
    refusal = UserError(
        f"run: {run} is in use by {claim}; two drivers would write over each other. "
        "End that one first, or give another `run` name to begin a new one."
    )
    if claim.released or claim.process_gone:
        return claim.released
    if claim.here:
        raise refusal
    logger.warning("%s is held by %s; waiting up to %.0f s for a sign of life of it", run, claim, claim.stale_s)
    began = _clock()
    while _clock() - began < claim.stale_s:
        time.sleep(min(renew_s, claim.stale_s) / 4)
        now = _claims(folder).get(name)
        if now is None or now.released:
            return True
        if now != claim:
            raise refusal
    return False


def newest_claim(run: Storage) -> Claim | None:
    """Of whoever holds a run's folder, or was the last to hold it."""
    claims = _claims(run / "lease")
    return claims[max(claims, key=lambda name: (_number(name), name))] if claims else None


def _claims(folder: Storage) -> dict[str, Claim]:
    """All that are there, by the names of their files."""
    claims = {}
    for name in folder.names(suffix=".json"):
        try:
            with contextlib.suppress(FileNotFoundError):  # it was taken back since
                claims[name] = Claim(**folder.read_json(name))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"run: {folder}/{name} is not a driver's claim ({error}); remove it if no driver works on this run"
            ) from error
    return claims


def _yielding(name: str, before: dict[str, Claim], after: dict[str, Claim]) -> bool:
    """Whether others came at the same moment and take their claims back, since `name` is the first.

    A higher number goes first: a lower one was written by a driver that had not seen it. A claim that was renewed is
    held already.
    """
    others = after.keys() - before.keys() - {name}
    first = min({name, *others}, key=lambda claim: (-_number(claim), claim))
    return bool(others) and first == name and not any(after[other].renewals for other in others)


def _number(name: str) -> int:
    return int(name.partition("-")[0])
