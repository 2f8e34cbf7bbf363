"""What `kto-ray check` finds out, and what it shows to a plug-in; `scorer_trial.py` and `labeler_trial.py` use both."""

import contextlib
import math
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.errors import UserError
from kto_ray.shapes.world import IMAGE_SIZE, Scene, draw

Images = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width."""

PICTURES = (  # a caption, and what is drawn; the third is not what it says
    ("a red circle on black", "a red circle on black"),
    ("a blue square on white", "a blue square on white"),
    ("a green cross on gray", "a yellow ring on brown"),
    ("a pink triangle on brown", "a pink triangle on brown"),
)


class Broken(Exception):  # noqa: N818  it says what happened to a promise
    """A promise of the protocol is broken; the message says how, and what would be right."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check. `words` say what failed, or what is allowed but worth knowing."""

    name: str
    passed: bool
    words: str = ""
    last: bool = False
    """Nothing could be tried after it."""


def find(name: str, check: Callable[[], str], essential: bool = False) -> Finding:
    """Do one check, which returns a remark or raises; the failure of an essential one is the last finding."""
    try:
        return Finding(name, True, check())
    except (Broken, UserError) as error:
        return Finding(name, False, str(error), essential)
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything; that is what is to be found
        return Finding(name, False, f"raised {words_of(error)}", essential)


def words_of(error: Exception) -> str:
    """Type, message and place of an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {shorten(error)} ({Path(frame.filename).name} line {frame.lineno})"


def shorten(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def number(what: str, value: Any) -> float:
    """Any finite number as a float. Raises Broken for all else, also for a string or an array that holds one."""
    result = None
    if not isinstance(value, str | bytes) and getattr(value, "shape", ()) == ():
        with contextlib.suppress(TypeError):
            result = float(value)
    if result is None:
        raise Broken(f"{what} is {value!r} ({type(value).__name__}); give a float")
    if not math.isfinite(result):
        raise Broken(f"{what} is {result}; raise ValueError for what has no finite value")
    return result


def picture(caption: str, size: Size) -> Images:
    """The embedded world's picture of a caption, uint8 (H, W, 3), at any size."""
    rows, columns = (np.arange(length) * IMAGE_SIZE // length for length in size)
    return draw(Scene.parse(caption))[rows][:, columns]
