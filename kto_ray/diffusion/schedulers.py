"""Which diffusers scheduler draws: the pipeline's own, or another one that can sample the same model.

diffusers lists as compatible whatever takes the same configuration. Of those, some would draw noise or washed-out
images of a given model without a word; they are refused here. `sampling.py` draws with what comes out, `checks.py` asks
before a run.
"""

import difflib
import inspect
from typing import Any

import diffusers

from kto_ray.diffusion.noise import is_flow
from kto_ray.errors import UserError


def scheduler_for(own: Any, name: str | None) -> Any:
    """A scheduler over the same noise schedule as a pipeline's own.

    Args:
        own: the pipeline's.
        name: a class of diffusers; None: the pipeline's own.

    Raises:
        UserError: it cannot sample this model; names those that can, the nearest first.
    """
    if name is None or name == type(own).__name__:
        return type(own).from_config(own.config)
    fitting = {candidate.__name__: candidate for candidate in own.compatibles if why_not(candidate, own) is None}
    if name not in fitting:
        close = difflib.get_close_matches(name, fitting, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        candidates = {candidate.__name__: candidate for candidate in own.compatibles}
        unknown = "not compatible with this pipeline" if hasattr(diffusers, name) else "unknown to diffusers"
        why = why_not(candidates[name], own) if name in candidates else unknown
        raise UserError(f"generate.scheduler: {name!r} is {why}{suggestion}; fitting: {', '.join(sorted(fitting))}")
    # Without the key a scheduler that knows it would cut latents to [-1, 1], which only pixels may be.
    clip = {"clip_sample": own.config.get("clip_sample", False)}
    return fitting[name].from_config(own.config, **clip)


def why_not(candidate: Any, own: Any) -> str | None:
    """Why a scheduler that takes a pipeline's configuration cannot sample its model; None: it can."""
    known = inspect.signature(candidate.__init__).parameters
    if candidate.__name__ == type(own).__name__:
        return None
    if candidate.__name__.startswith("EDM"):
        return "for models that were trained with EDM's own noise levels"
    if is_flow({"_class_name": type(own).__name__, **own.config}) and "use_flow_sigmas" not in known:
        return "not for flow models"
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        return "without zero terminal SNR, which this model was trained with"
    return None
