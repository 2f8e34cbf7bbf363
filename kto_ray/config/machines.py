"""On what the parts of a run work: devices, precision, and what they ask of the cluster."""

from typing import Annotated, Literal

from pydantic import Field

from kto_ray.identity import Free, Noted
from kto_ray.section import NonNegative, Positive, Section

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Resources(Section):
    """What one actor of a role asks of the cluster."""

    num_cpus: Free[NonNegative] = 1
    num_gpus: Free[NonNegative] = 0
    """Fractions share one GPU."""
    threads: Noted[Annotated[int, Field(ge=0)]] = 0
    """Torch threads of an actor; 0: all cores of its machine when it has no GPU, of a scorer's as many as its CPUs."""


class Cluster(Section):
    """How long and how loudly to wait for the cluster."""

    address: Free[str] = "auto"
    """"auto": the cluster this job runs on, or else one of its own on this machine; "local": always its own."""
    wait_s: Free[Positive] = 30
    """After so long without the resources asked for, say what is missing; then every minute."""
    health_check_s: Free[Positive] = 0.2
    """Poll interval of Ray Train's controller; it bounds the overhead of a warm round."""
