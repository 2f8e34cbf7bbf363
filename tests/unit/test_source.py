"""Model folders: a whole one is accepted, everything else is named with its file and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.numpy import save_file

from kto_ray.config import Model
from kto_ray.diffusion import source
from kto_ray.diffusion.families.stable_diffusion import StableDiffusion
from kto_ray.diffusion.weights import weight_files
from kto_ray.errors import UserError
from kto_ray.shapes import MODEL_FOLDER
from tests.factories import write_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


MODELS = ("text_encoder", "unet", "vae")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


def message(folder: Path, variant: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        source.check(folder, Model(variant=variant))
    text = str(caught.value)
    assert text.startswith("model.name: ")
    assert str(folder) in text
    return text


def test_the_embedded_world_is_whole() -> None:
    assert source.resolve(Model()) == MODEL_FOLDER
    assert source.check(MODEL_FOLDER, Model()) is StableDiffusion


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert source.resolve(Model(name=str(folder))) == folder
    assert source.check(folder, Model()) is StableDiffusion


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
@pytest.mark.parametrize("component", MODELS)
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


@pytest.mark.parametrize("family", ["StableDiffusionInpaintPipeline", "WanPipeline"])
def test_an_unsupported_family_lists_the_supported(folder: Path, family: str) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family}))
    text = message(folder)
    assert family in text
    assert "supported: StableDiffusionPipeline" in text


def test_a_folder_that_lists_no_denoiser(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "lists no transformer, as a Flux has" in message(folder)


def give_variant(folder: Path) -> None:
    for component in MODELS:
        (file,) = (folder / component).glob("*.safetensors")
        save_file({"weight": np.ones(8, np.float16)}, file.with_suffix(".fp16.safetensors"))


def test_a_variant_is_told_from_the_plain_weights(folder: Path) -> None:
    give_variant(folder)
    assert [f.name for f in weight_files(folder / "unet", None)] == ["diffusion_pytorch_model.safetensors"]
    assert [f.name for f in weight_files(folder / "unet", "fp16")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert source.check(folder, Model(variant="fp16"))


def test_a_missing_variant_says_what_is_there(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        source.check(folder, Model(variant="fp16"))
    text = str(caught.value)
    assert text.startswith(f"model.variant: 'fp16', but {folder} has no weights *.fp16.safetensors")
    assert "it has diffusion_pytorch_model.safetensors" in text


TERMS = "Access to model org/name is restricted. You must have access to it and be authenticated to access it."


def gated(*_arguments: object, **_settings: object) -> None:
    raise GatedRepoError(TERMS, response=Mock(headers={}))


def gated_within(*arguments: object, **settings: object) -> None:
    """As diffusers tells of it where it goes on to look into the cache."""
    try:
        gated(*arguments, **settings)
    except GatedRepoError as error:
        raise OSError("Cannot load model org/name: model is not cached locally") from error


@pytest.mark.parametrize("download", [gated, gated_within])
def test_a_gated_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(UserError) as caught:
        source.resolve(Model(name="org/name"))
    text = str(caught.value)
    assert text.startswith("model.name: 'org/name' is gated: accept its terms on its page of the model hub, and give ")
    assert "as HF_TOKEN" in text
    assert "hf_secret" not in text


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("no variant")])
def test_a_failed_download_says_what_to_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"^model.name: 'org/name' could not be had .*check the name.*: no \w+$"):
        source.resolve(Model(name="org/name"))


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
    assert (source.reference_digest(copy, Model()) == source.reference_digest(folder, Model())) is same


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
    before = source.component_digests(folder, Model())
    assert before.keys() == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert source.component_digests(copy, Model()) == before
    change(copy)
    after = source.component_digests(copy, Model())
    assert [name for name in before if before[name] != after[name]] == ([component] if component else [])
