"""Which diffusers scheduler draws: the pipeline's own, or another one that can sample the same model.

diffusers lists as compatible whatever takes the same configuration. Of those, some would draw noise or washed-out
images of a given model without a word; they are refused here, and so are arguments that a scheduler does not know, or
that say what the model was trained with. `sampling.py` draws with what comes out, `checks.py` asks before a run.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers

from kto_ray.diffusion.noise import is_flow
from kto_ray.errors import UserError

TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "use_flow_sigmas"),
)
"""Of a scheduler's configuration, what is the model's; the rest is the sampler's to choose."""


def scheduler_for(own: Any, name: str | None, args: Mapping[str, Any] | None = None, section: str = "generate") -> Any:
    """A scheduler over the same noise schedule as a pipeline's own.

    Args:
        own: the pipeline's.
        name: a class of diffusers; None: the pipeline's own.
        args: laid over the pipeline's configuration.
        section: of the run's configuration, that asks for it.

    Raises:
        UserError: it cannot sample this model, or does not take the arguments; names those that can, or that it does,
            the nearest first.
    """
    kind, more = _kind_of(own, name, section), dict(args or {})
    _require_known(kind, more, section)
    if kind.__name__ != type(own).__name__:
        # Without the key a scheduler that knows it would cut latents to [-1, 1], which only pixels may be.
        more = {"clip_sample": own.config.get("clip_sample", False)} | more
    try:
        return kind.from_config(own.config, **more)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if not args:
            raise
        raise UserError(
            f"{section}.scheduler_args: {kind.__name__} cannot be made with {dict(args)} ({type(error).__name__}: "
            f"{error}); give it other values"
        ) from error


def _require_known(kind: Any, args: Mapping[str, Any], section: str) -> None:
    """Raises UserError: arguments that a scheduler does not know, or that are not for a run to choose."""
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", *TRAINED_WITH)]
    for name in args:
        if name in TRAINED_WITH:
            raise UserError(
                f"{section}.scheduler_args: {name} is what the model was trained with, not how it is sampled; leave it "
                f"out. To choose from: {', '.join(known)}"
            )
        if name not in known:
            raise UserError(
                f"{section}.scheduler_args: {kind.__name__} knows no {name!r}{_nearest(name, known)}; known: "
                f"{', '.join(known)}"
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def takes_timesteps(kind: Any) -> bool:
    """Whether a scheduler can be told its timesteps one by one."""
    return "timesteps" in inspect.signature(kind.set_timesteps).parameters


def fitting_schedulers(own: Any) -> dict[str, Any]:
    """By name, the classes that can sample the model of a pipeline's own scheduler, its own among them."""
    return {candidate.__name__: candidate for candidate in own.compatibles if why_not(candidate, own) is None}


def _kind_of(own: Any, name: str | None, section: str) -> Any:
    """The class of a name. Raises UserError, see `scheduler_for`."""
    if name is None or name == type(own).__name__:
        return type(own)
    fitting = fitting_schedulers(own)
    if name not in fitting:
        candidates = {candidate.__name__: candidate for candidate in own.compatibles}
        unknown = "not compatible with this pipeline" if hasattr(diffusers, name) else "unknown to diffusers"
        why = why_not(candidates[name], own) if name in candidates else unknown
        raise UserError(
            f"{section}.scheduler: {name!r} is {why}{_nearest(name, fitting)}; fitting: {', '.join(sorted(fitting))}"
        )
    return fitting[name]


def why_not(candidate: Any, own: Any) -> str | None:
    """Why a scheduler that takes a pipeline's configuration cannot sample its model; None: it can."""
    known = inspect.signature(candidate.__init__).parameters
    if candidate.__name__ == type(own).__name__:
        return None
    if libraries := vars(candidate).get("_backends"):  # what diffusers puts in the place of what it cannot import
        return f"in need of what is not installed ({', '.join(libraries)})"
    if candidate.__name__.startswith("EDM"):
        return "for models that were trained with EDM's own noise levels"
    if is_flow({"_class_name": type(own).__name__, **own.config}) and "use_flow_sigmas" not in known:
        return "not for flow models"
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        return "without zero terminal SNR, which this model was trained with"
    return None
