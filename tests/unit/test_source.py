"""Model folders: a whole one is accepted, everything else is named with its file and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kto_ray.config import Model
from kto_ray.diffusion import source
from kto_ray.diffusion.layouts import LAYOUTS
from kto_ray.errors import UserError
from kto_ray.shapes import MODEL_FOLDER
from tests.factories import write_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


LAYOUT = LAYOUTS["StableDiffusionPipeline"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


def message(folder: Path, variant: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        source.check(folder, variant)
    text = str(caught.value)
    assert text.startswith("model.name: ")
    assert str(folder) in text
    return text


def test_the_embedded_world_is_whole() -> None:
    assert source.resolve(Model()) == MODEL_FOLDER
    assert source.check(MODEL_FOLDER) == "StableDiffusionPipeline"


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert source.resolve(Model(name=str(folder))) == folder
    assert source.check(folder) == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no-such-model", "a/b/c"])
def test_a_name_that_can_be_no_model_lists_what_can(name: str) -> None:
    with pytest.raises(UserError) as caught:
        source.resolve(Model(name=name))
    assert f"model.name: no folder {name!r}" in str(caught.value)
    assert "hub name" in str(caught.value)
    assert "'shapes'" in str(caught.value)


def test_a_hub_name_needs_a_download_to_be_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source.local_folder(Model(name="org/name")) is None


@pytest.mark.parametrize("content", [b"", b"1234", None])
@pytest.mark.parametrize("component", LAYOUT.weights)
def test_truncated_weights_are_named(folder: Path, component: str, content: bytes | None) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    text = message(folder)
    assert str(file) in text
    assert "truncated" in text
    assert "download it again" in text


@pytest.mark.parametrize(
    "missing",
    [
        "vae",
        "unet/config.json",
        UNET,
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer",
    ],
)
def test_a_missing_part_is_named(folder: Path, missing: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = message(folder)
    assert missing.partition("/")[0] in text
    assert "missing" in text or "no weights" in text
    assert "download it again" in text


def test_a_link_into_nowhere_is_named(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(folder / "blob-that-was-never-downloaded")
    assert str(folder / UNET) in message(folder)


def test_a_folder_without_index_is_no_pipeline(tmp_path: Path) -> None:
    text = message(tmp_path)
    assert "model_index.json" in text
    assert "give the folder" in text


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    text = message(folder)
    assert str(folder / file) in text
    assert "JSON" in text


@pytest.mark.parametrize("family", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_an_unsupported_family_lists_the_supported(folder: Path, family: str) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family}))
    text = message(folder)
    assert family in text
    assert "supported: StableDiffusionPipeline" in text


def give_variant(folder: Path) -> None:
    for component in LAYOUT.weights:
        (file,) = (folder / component).glob("*.safetensors")
        save_file({"weight": np.ones(8, np.float16)}, file.with_suffix(".fp16.safetensors"))


def test_a_variant_is_told_from_the_plain_weights(folder: Path) -> None:
    give_variant(folder)
    assert [f.name for f in source.weight_files(folder / "unet", None)] == ["diffusion_pytorch_model.safetensors"]
    assert [f.name for f in source.weight_files(folder / "unet", "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert source.check(folder, "fp16")


def test_a_missing_variant_says_what_is_there(folder: Path) -> None:
    text = message(folder, "fp16")
    assert "*.fp16.safetensors" in text
    assert "it has" in text


def test_shards_of_a_variant_as_diffusers_writes_them(folder: Path) -> None:
    (folder / UNET).unlink()
    for name in ("diffusion_pytorch_model.fp16-00001-of-00002", "diffusion_pytorch_model-00002-of-00002.fp16"):
        save_file({"weight": np.zeros(8, np.float16)}, folder / "unet" / f"{name}.safetensors")
    assert len(source.weight_files(folder / "unet", "fp16")) == 2
    assert "has no weights *.fp1.safetensors" in message_of(folder, "fp1")


def message_of(folder: Path, variant: str) -> str:
    with pytest.raises(UserError) as caught:
        source.weight_files(folder / "unet", variant)
    return str(caught.value)


@pytest.mark.parametrize("there", [True, False])
def test_a_single_file_is_to_be_converted(tmp_path: Path, there: bool) -> None:
    file = tmp_path / "dream.safetensors"
    if there:
        file.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"is a single file.*from_single_file\(.*\)\.save_pretrained"):
        source.resolve(Model(name=str(file)))


def change_unet(folder: Path) -> None:
    data = bytearray((folder / UNET).read_bytes())
    data[-1] ^= 1
    (folder / UNET).write_bytes(bytes(data))


def change_vae(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")


def nothing(folder: Path) -> None:
    assert folder.is_dir()


@pytest.mark.parametrize(("change", "same"), [(nothing, True), (change_vae, True), (change_unet, False)])
def test_the_digest_is_the_denoisers(tmp_path: Path, folder: Path, change: Callable[[Path], None], same: bool) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    assert (source.reference_digest(copy) == source.reference_digest(folder)) is same


def change_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")


def change_scheduler(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + "\n")


def change_text_encoder_config(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "component"),
    [
        (nothing, None),
        (change_unet, "unet"),
        (change_vae, "vae"),
        (change_tokenizer, "tokenizer"),
        (change_scheduler, "scheduler"),
        (change_text_encoder_config, "text_encoder"),
    ],
)
def test_each_component_has_a_digest(
    tmp_path: Path, folder: Path, change: Callable[[Path], None], component: str | None
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("not a part of the model")
    before = source.component_digests(folder)
    assert before.keys() == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert source.component_digests(copy) == before
    change(copy)
    after = source.component_digests(copy)
    assert [name for name in before if before[name] != after[name]] == ([component] if component else [])
