"""On what the parts of a run work: devices, precision, and what they ask of the cluster."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kto_ray.identity import Free, Noted
from kto_ray.section import NonNegative, Positive, Section

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Resources(Section):
    """What one actor of a role asks of the cluster."""

    num_cpus: Free[NonNegative] = 1
    """Fractions share one core."""
    num_gpus: Free[NonNegative] = 0
    """Fractions share one GPU."""
    threads: Noted[Annotated[int, Field(ge=0)]] = 0
    """Torch threads of an actor; 0: all cores of its machine when it has no GPU, of a scorer's as many as its CPUs."""


class Cluster(Section):
    """How long and how loudly to wait for the cluster."""

    address: Free[str] = "auto"
    """"auto": the cluster this job runs on, or else one of its own on this machine; "local": always its own."""
    placement: Free[Literal["separate", "colocated", "elastic"] | None] = None
    """Who has the machines when. separate: every role has its own, all the time. colocated: generators, scorers and
    train workers share GPUs by turns; who has no turn sleeps in main memory. elastic: each has its own, and the loop
    lets generators go while nobody draws. None: separate; or colocated, if that does not fit and by turns does."""
    gpu_gb: Free[Positive | None] = None
    """Memory of each GPU in GB. Where it is given, a model that does not fit is refused before it is downloaded."""
    wait_s: Free[Positive] = 30
    """After so long without the resources asked for, say what is missing; then every minute."""
    health_check_s: Free[Positive] = 0.2
    """Poll interval of Ray Train's controller; it bounds the overhead of a warm round."""
    lease_renew_s: Free[Positive] = 10
    """A driver says so often that it still works on the run's folder."""
    lease_stale_s: Free[Positive] = 60
    """A driver on another machine that was silent for so long is taken over from; at least three times
    `lease_renew_s`."""

    @model_validator(mode="after")
    def _a_missed_renewal_is_no_death(self) -> "Cluster":
        if self.lease_stale_s < 3 * self.lease_renew_s:
            raise ValueError(
                f"cluster.lease_stale_s ({self.lease_stale_s:g}) must be at least three times "
                f"cluster.lease_renew_s ({self.lease_renew_s:g})"
            )
        return self
