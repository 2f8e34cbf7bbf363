"""Weights of scorers: read whole or refused, with a message that names the file."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kto_ray.errors import UserError
from kto_ray.score.scorers.weights import find_file, load_weights, pick_device, pick_dtype, read_weights

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -0.5])}
Save = Callable[[Any, Path], None]


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS: dict[str, Save] = {".safetensors": save_file, ".pth": torch.save, ".pt": save_legacy}


@pytest.fixture(params=SAVERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with `WEIGHTS`, in each format."""
    path = tmp_path / f"weights{request.param}"
    SAVERS[request.param](WEIGHTS, path)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(written: Path) -> None:
    assert same(read_weights(written), WEIGHTS)


def test_a_state_dict_is_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path)
    assert same(read_weights(path), WEIGHTS)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file_is_named(written: Path, share: float) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"checkpoint {written} cannot be read; it is truncated"):
        read_weights(written)


@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\n<!DOCTYPE html><html>", "is a web page.*download the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (b"\x80" * 20, "cannot be read; it is truncated or not a file of weights"),
    ],
)
def test_another_file_under_that_name_is_named(tmp_path: Path, suffix: str, content: bytes, problem: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"checkpoint {path} {problem}"):
        read_weights(path)


@pytest.mark.parametrize(("save", "suffix"), [(save_file, ".pth"), (torch.save, ".safetensors")])
def test_an_ending_of_another_format_does_not_matter(tmp_path: Path, save: Save, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save(WEIGHTS, path)
    assert same(read_weights(path), WEIGHTS)


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (nn.Sequential(nn.Linear(3, 2)), r"torch\.nn\.modules\.container\.Sequential"),
        ({"state_dict": WEIGHTS, "hyper_parameters": Namespace(lr=1)}, r"argparse\.Namespace"),
        ({"state_dict": WEIGHTS, "best": np.float64(0.5)}, r"numpy\.\S+"),
    ],
)
def test_what_is_more_than_weights_is_named_with_what_to_do(
    tmp_path: Path, save: Save, content: Any, what: str
) -> None:
    path = tmp_path / "more.pth"
    save(content, path)
    with pytest.raises(
        UserError, match=rf"checkpoint {path} holds more than weights \({what}\).*model\.state_dict\(\)"
    ) as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value)
    assert "truncated" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        (torch.zeros(2), "holds a Tensor, not tensors by name"),
        ({"weight": torch.zeros(2), "epoch": 3}, "holds a dict, not tensors by name"),
        ({0: torch.zeros(2)}, "holds a dict, not tensors by name"),
        ({"model": WEIGHTS, "epoch": 3}, "holds a dict, not tensors by name; they are under 'model': save that alone"),
    ],
)
def test_what_holds_no_tensors_by_name_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"checkpoint {path} {problem}"):
        read_weights(path)


class Payload:
    """What a pickle from the wire could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def save_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_a_pickle_is_not_executed(tmp_path: Path, save: Save) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    save({"weight": torch.zeros(2), "x": Payload(trace)}, path)
    with pytest.raises(UserError, match=f"checkpoint {path} (cannot be read|holds more than weights)"):
        read_weights(path)
    assert not trace.exists()


# -- where they come from ---------------------------------------------------------------------------------------------


def test_a_local_file_is_itself(written: Path) -> None:
    assert find_file(str(written), "nobody/nothing", "weights.pt") == written


def test_a_missing_file_is_named_with_the_way_to_the_hub(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pt"
    with pytest.raises(UserError, match=rf"{missing} does not exist.*weights\.pt of nobody/nothing from the hub"):
        find_file(str(missing), "nobody/nothing", "weights.pt")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"checkpoint {tmp_path} is a folder"):
        find_file(str(tmp_path), "nobody/nothing", "weights.pt")


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_round() -> None:
    with pytest.raises(UserError, match=r"cannot load weights\.pt of nobody/nothing from the hub.*`checkpoint`"):
        find_file(None, "nobody/nothing", "weights.pt")


# -- into a module ----------------------------------------------------------------------------------------------------


def test_weights_get_into_the_module_and_others_are_ignored() -> None:
    module = nn.Linear(3, 2)
    load_weights(module, Path("x.pt"), {**WEIGHTS, "optimizer.step": torch.zeros(1)})
    assert same(module.state_dict(), WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"weight": WEIGHTS["weight"]}, r"x\.pt has no 'bias': it is not a checkpoint of this model"),
        ({"a.weight": WEIGHTS["weight"]}, r"x\.pt has no 'weight': it is not a checkpoint of this model"),
        *(
            (
                {f"{prefix}{name}": value for name, value in WEIGHTS.items()} | {"step": torch.zeros(1)},
                rf"x\.pt has no 'weight': its weights are named '{prefix}weight'.*without '{prefix}'",
            )
            for prefix in ("module.", "model.", "_orig_mod.module.")
        ),
        ({**WEIGHTS, "weight": torch.zeros(2, 4)}, r"x\.pt: 'weight' has shape \(2, 4\), this model wants \(2, 3\)"),
    ],
)
def test_weights_that_do_not_fit_leave_the_module_alone(weights: dict[str, Tensor], problem: str) -> None:
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match=problem):
        load_weights(module, Path("x.pt"), weights)
    assert same(module.state_dict(), before)


# -- device and dtype -------------------------------------------------------------------------------------------------


def test_dtypes_have_torchs_names() -> None:
    assert {pick_dtype(name) for name in ("float32", "bfloat16", "float16")} == {
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }
    with pytest.raises(UserError, match="'bf16' is not one of float32, bfloat16, float16"):
        pick_dtype("bf16")


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_the_gpu_if_there_is_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert pick_device("auto").type == ("cuda" if gpu else "cpu")
    assert pick_device("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"'cuda:0': this process has no GPU.*num_gpus"):
        pick_device("cuda:0")
    with pytest.raises(UserError, match="'gpu' is not auto, cpu or cuda"):
        pick_device("gpu")
