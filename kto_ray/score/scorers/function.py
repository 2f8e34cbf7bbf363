"""A plain Python function as scorer; what a dotted path to a function becomes (`load_scorer`)."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.errors import UserError
from kto_ray.plugins import load_plugin
from kto_ray.records import Prompt
from kto_ray.score.protocol import check_batch


class Function:
    """Scores with `function(images_BHWC, prompts, **arguments)`, which gives one float an image.

    Images are uint8 of shape (B, H, W, 3), not to be written to; prompts are `Prompt`s. Range, threshold and licence
    are the function's. The scorer has its name, and its attribute `version` if it has one, else version "1".

    Args:
        path: "package.module:function", any callable but a class.
        arguments: keyword arguments of the function.

    Raises:
        UserError: there is no such function, or it does not take these arguments.
    """

    def __init__(self, path: str, **arguments: Any) -> None:
        self.function = load_plugin("function", path, {}, functions=True)
        if inspect.isclass(self.function):
            raise UserError(f"function {path!r} is a class; name it as the scorer itself")
        try:
            inspect.signature(self.function).bind(None, None, **arguments)
        except TypeError as error:
            given = ", ".join(["images_BHWC", "prompts", *arguments])
            raise UserError(f"function {path!r} cannot be called with {given}: {error}") from error
        self.arguments = arguments
        self.name = str(getattr(self.function, "__name__", path.partition(":")[2]))
        self.version = str(getattr(self.function, "version", "1"))

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images, and whatever the function raises."""
        check_batch(images_BHWC, prompts)
        if not prompts:
            return []
        return [float(value) for value in self.function(images_BHWC, prompts, **self.arguments)]
