"""What the neural scorers share: where weights come from, how they are read, and on what they run.

A checkpoint is a local path when one is given and a hub name otherwise. Pickles are read with `weights_only=True`.
Whatever is wrong with a file is a `UserError` that names it, before the first image is scored. This module is imported
in scorers' own environments, too: it needs torch and nothing newer.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*<(?:!doctype|html|head|body)", re.IGNORECASE)
PICKLES = (b"PK\x03\x04", b"\x80")
FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed|Unsupported (?:global|class):? (?:GLOBAL )?(\S+)")
CAUSE = re.compile(r"WeightsUnpickler error: (.*)")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU if this process was given one, else the CPU.

    Raises:
        UserError: torch knows no such device, or it is a GPU and this process has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not auto, cpu or cuda: {error}") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {device!r}: this process has no GPU; give the scorer a share of one with resources: "
            "{num_gpus: 0.25}, or take device auto or cpu"
        )
    return picked


def pick_dtype(dtype: str) -> torch.dtype:
    """Raises UserError for a name that is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def find_file(checkpoint: str | None, repository: str, filename: str, argument: str = "checkpoint") -> Path:
    """The local file that `checkpoint` names, or else `filename` of a hub repository (cached after the first time).

    Args:
        argument: what the scorer calls it.

    Raises:
        UserError: there is no such local file, or the hub cannot be asked.
    """
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            problem = "is a folder" if Path(checkpoint).is_dir() else "does not exist"
            raise UserError(
                f"{argument} {checkpoint} {problem}; give the path of a file, or leave it out to load "
                f"{filename} of {repository} from the hub"
            )
        return Path(checkpoint)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {filename} of {repository} from the hub ({type(error).__name__}: {error}); "
            f"give the path of a local copy as `{argument}`"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch pickle, whatever its ending, by name; "state_dict" is unwrapped.

    Raises:
        UserError: the file is truncated, or another thing than weights, or holds anything but tensors by name.
    """
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(LFS_POINTER):
            raise UserError(f"checkpoint {path} is a Git LFS pointer, not the file it stands for; run: git lfs pull")
        if WEB_PAGE.match(head):
            raise UserError(f"checkpoint {path} is a web page, a login or an error perhaps; download the file again")
        try:
            content: Any
            if head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith(PICKLES)):
                from safetensors.torch import load_file

                content = load_file(path)
            else:
                file.seek(0)  # by its path, torch would look at the ending
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # half a pickle raises nearly anything
            raise UserError(f"checkpoint {path} {_why(error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not _are_tensors_by_name(content):
        parts = [key for key, value in content.items() if _are_tensors_by_name(value)] if type(content) is dict else []
        where = f"; they are under {', '.join(map(repr, parts))}: save that alone" if parts else ""
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not tensors by name{where}")
    return dict(content)


def _are_tensors_by_name(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _why(error: Exception) -> str:
    """What torch or safetensors say, without torch's advice to run whatever is in the file."""
    text = str(error)
    if forbidden := FORBIDDEN.search(text):
        return (
            f"holds more than weights ({forbidden[1] or forbidden[2]}), and reading that could run code. Where it was "
            "made, save the weights alone: torch.save(model.state_dict(), path), or with safetensors"
        )
    cause = CAUSE.search(text)
    said = cause[1] if cause else text.partition("\n")[0]
    return f"cannot be read; it is truncated or not a file of weights: {type(error).__name__}: {said}"


def load_weights(module: nn.Module, path: Path, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module; those the module does not know are ignored, those it misses are not.

    Raises:
        UserError: names the first weight that is missing, or has another shape than the module's.
    """
    own = module.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise UserError(f"checkpoint {path} has no {name!r}: {_why_not(own, weights)}")
        if weights[name].shape != value.shape:
            raise UserError(
                f"checkpoint {path}: {name!r} has shape {tuple(weights[name].shape)}, "
                f"this model wants {tuple(value.shape)}"
            )
    module.load_state_dict({name: weights[name] for name in own})


def _why_not(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    first = next(iter(own))
    for prefix in (name.removesuffix(first) for name in weights if name.endswith(f".{first}")):
        if all(prefix + name in weights for name in own):
            return (
                f"its weights are named {prefix + first!r} and so on, as a wrapper of the model saves them; save them "
                f"without {prefix!r}: {{name.removeprefix({prefix!r}): value for name, value in weights.items()}}"
            )
    return "it is not a checkpoint of this model"
