"""Single checkpoints: the folder made of one is the model it was made of; what is none is refused by its header."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from kto_ray.config import Generate, Model
from kto_ray.diffusion import single_file, source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.sampling import draw
from kto_ray.diffusion.texts import Texts
from kto_ray.errors import UserError
from tests.single_files import FILES, read_narrow_flux, write_single_file, write_source

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def original(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp(name), name.removesuffix("_transformer"))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(autouse=True)
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    read_narrow_flux(monkeypatch)


def require_same_images(one: Path, other: Path) -> None:
    """Images come of all components; latents are compared to the bit, in pixels the autoencoder takes part."""
    settings = Generate(steps=2, height=16, width=16, guidance_scale=1.0)
    families = [load_family(folder, Model(), CPU, torch.float32) for folder in (one, other)]
    drawn = [
        draw(family, Texts(lambda family=family: family), ["a red circle", "blue"], [1, 2], settings)
        for family in families
    ]
    for ours, theirs in zip(*drawn, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def message(model: Model) -> str:
    with pytest.raises(UserError) as caught:
        source.local_folder(model)
    return str(caught.value)


def test_the_folder_of_a_file_draws_what_the_model_drew(tmp_path: Path, original: Path, name: str) -> None:
    file = write_single_file(tmp_path / "model.safetensors", original, name)
    folder = source.resolve(Model(name=str(file), config=str(original)))
    require_same_images(folder, original)


def test_a_folder_has_the_precision_of_the_file(tmp_path: Path, sd1: Path) -> None:
    """Each component its own: many files have an autoencoder in full precision beside a network in half."""
    whole = load_file(write_single_file(tmp_path / "model.safetensors", sd1, "sd1"))
    file = tmp_path / "half.safetensors"
    save_file(
        {name: w if name.startswith("first_") or not w.is_floating_point() else w.half() for name, w in whole.items()},
        file,
    )
    folder = source.resolve(Model(name=str(file), config=str(sd1)))
    kept = {component: load_file(next((folder / component).glob("*.safetensors"))) for component in ("unet", "vae")}
    before = {component: load_file(next((sd1 / component).glob("*.safetensors"))) for component in ("unet", "vae")}
    assert all(torch.equal(kept["unet"][name], weight.half()) for name, weight in before["unet"].items())
    assert all(torch.equal(kept["vae"][name], weight) for name, weight in before["vae"].items())


def test_weights_of_eight_bits_are_widened(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "small.safetensors", sd1, "sd1", torch.float8_e4m3fn)
    folder = source.resolve(Model(name=str(file), config=str(sd1)))
    (weights,) = (folder / "unet").glob("*.safetensors")
    assert {weight.dtype for weight in load_file(weights).values()} == {torch.bfloat16}


def test_what_a_file_lacks_comes_from_the_other_folder(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "unet.safetensors", sd1, "sd1", without=["cond_stage_model", "first_stage"])
    other = write_source(tmp_path / "other", "sd1", seed=1)
    stray = other / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    stray.write_bytes(b"not loaded, not copied")
    folder = source.resolve(Model(name=str(file), config=str(other)))
    assert not (folder / "vae" / stray.name).exists()
    ours, theirs = (source.component_digests(f, Model()) for f in (folder, other))
    assert [name for name in ours if ours[name] != theirs[name]] == ["unet"]


@pytest.fixture
def _hub(tmp_path: Path, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache in which the configs of Stable Diffusion 1.5 lie, without weights."""
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(sd1, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("_hub")
def test_configs_come_from_the_hubs_cache(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1")
    require_same_images(source.resolve(Model(name=str(file))), sd1)


def test_without_configs_it_is_said_what_to_give(tmp_path: Path, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    model = Model(name=str(write_single_file(tmp_path / "model.safetensors", sd1, "sd1")))
    assert source.local_folder(model) is None
    with pytest.raises(UserError, match=r"^model.config: .*give model.config, a diffusers folder of the same kind"):
        source.resolve(model)


def test_a_size_that_is_not_known_needs_configs(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "sd3", "sd3")
    text = message(Model(name=str(write_single_file(tmp_path / "model.safetensors", folder, "sd3"))))
    assert text.startswith("model.config: ")
    assert "give a diffusers folder of a StableDiffusion3Pipeline" in text


def test_a_dry_run_makes_no_folder_and_finds_one(tmp_path: Path, sd1: Path, cache: Path) -> None:
    model = Model(name=str(write_single_file(tmp_path / "model.safetensors", sd1, "sd1")), config=str(sd1))
    assert source.local_folder(model) is None
    assert not cache.exists()
    folder = source.resolve(model)
    assert source.local_folder(model) == folder


def test_a_folder_is_made_once(tmp_path: Path, sd1: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1")
    model = Model(name=str(file), config=str(sd1))
    with ThreadPoolExecutor() as pool:
        folders = set(pool.map(source.resolve, [model] * 3))
    (folder,) = folders
    assert sorted(path.suffix for path in (cache / "models").iterdir()) == ["", ".lock"]
    monkeypatch.setattr(single_file, "_make", lambda *_: pytest.fail("is made again"))
    assert source.resolve(model) == folder


def test_who_comes_second_takes_the_folder_of_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(name)
    single_file._put(tmp_path / "second", tmp_path / "first")
    assert (tmp_path / "first" / "model_index.json").read_text() == "first"


def test_another_file_of_the_same_name_is_made_anew(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1")
    model = Model(name=str(file), config=str(sd1))
    first = source.resolve(model)
    write_single_file(file, write_source(tmp_path / "other", "sd1", seed=1), "sd1")
    os.utime(file, (1, 1))
    second = source.resolve(model)
    assert source.reference_digest(first, Model()) != source.reference_digest(second, Model())


def test_digests_are_the_same_wherever_a_folder_is_made(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1")
    elsewhere = shutil.copy(file, tmp_path / "elsewhere.safetensors"), shutil.copytree(sd1, tmp_path / "configs")
    here, there = (source.resolve(Model(name=str(f), config=str(c))) for f, c in ((file, sd1), elsewhere))
    assert here != there
    assert source.component_digests(here, Model()) == source.component_digests(there, Model())


def test_no_file_is_no_hub_name() -> None:
    assert message(Model(name="/nonexistent/file.safetensors")).startswith("model.name: no file '/nonexistent/file")
    assert message(Model(name="dreams/file.safetensors")).startswith("model.name: no file 'dreams/file")
    assert message(Model(name="/nonexistent/folder")).startswith("model.name: no folder '/nonexistent/folder'")


@pytest.mark.parametrize(("suffix", "said"), [("ckpt", "pickled"), ("pt", "pickled"), ("gguf", "only .safetensors")])
def test_other_formats_are_refused(tmp_path: Path, suffix: str, said: str) -> None:
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(b"weights")
    text = message(Model(name=str(file)))
    assert said in text
    assert "give the model's .safetensors file" in text


NET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (2, 4)}, "an adapter (LoRA), not a model"),
        ({"lora_unet_mid_block_attentions_0_to_q.lora_down.weight": (2, 4)}, "and this as model.adapters"),
        ({"encoder.conv_in.weight": (4, 3), "decoder.conv_in.weight": (4, 4)}, "an autoencoder (VAE) alone"),
        ({"shared.weight": (4, 4)}, "not a checkpoint of StableDiffusionXL, StableDiffusion, StableDiffusion3, Flux"),
        ({f"{NET}input_blocks.0.0.weight": (8, 9, 3, 3)}, "inpainting or editing"),
        ({f"{NET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "inpainting or editing"),
        ({"vector_in.in_layer.weight": (4, 4), "img_in.weight": (4, 384)}, "inpainting or editing"),
        ({"conditioner.embedders.0.model.text_projection": (4, 4)}, "a refiner of Stable Diffusion XL"),
        ({"edm_vpred.sigma_max": (1,), f"{NET}input_blocks.0.0.weight": (8, 4, 3, 3)}, "a CosXL model"),
        ({"edm_mean": (4,), f"{NET}input_blocks.0.0.weight": (8, 4, 3, 3)}, "a Playground model"),
        (
            {f"{NET}input_blocks.0.0.weight": (8, 4, 3, 3), "cond_stage_model.transformer.x": (1,)},
            "a text_encoder in a layout that diffusers does not read",
        ),
        (
            {f"{NET}input_blocks.0.0.weight": (8, 4, 3, 3), f"{NET}out.2.scale_weight": (1,)},
            "quantized",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused_by_its_header(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    file = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    text = message(Model(name=str(file)))
    assert text.startswith(f"model.name: {file} ")
    assert said in text


def test_a_truncated_file_is_named(tmp_path: Path, sd1: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1")
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is truncated" in message(Model(name=str(file)))


def test_settings_that_do_not_go_together(tmp_path: Path, sd1: Path) -> None:
    file = str(write_single_file(tmp_path / "model.safetensors", sd1, "sd1"))
    assert message(Model(name=file, variant="fp16")).startswith("model.variant: 'fp16', but ")
    assert message(Model(name=str(sd1), config=str(sd1))).startswith("model.config: ")
    assert "is no diffusers folder" in message(Model(name=file, config=str(tmp_path)))


def test_configs_of_another_kind_or_size_are_refused(tmp_path: Path, sd1: Path) -> None:
    sdxl = write_source(tmp_path / "sdxl", "sdxl")
    file = write_single_file(tmp_path / "model.safetensors", sdxl, "sdxl")
    text = message(Model(name=str(file), config=str(sd1)))
    assert text.startswith(f"model.config: {sd1} holds a StableDiffusionPipeline, but {file} is a StableDiffusionXL")
    config = json.loads((sdxl / "unet" / "config.json").read_text()) | {"block_out_channels": [4, 16]}
    (sdxl / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"could not be read with the configs of .*give as model.config"):
        source.resolve(Model(name=str(file), config=str(sdxl)))


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path, sd1: Path) -> None:
    lost = f"{NET}middle_block.1.proj_in.weight"
    file = write_single_file(tmp_path / "model.safetensors", sd1, "sd1", without=[lost])
    with pytest.raises(UserError, match=r"lacks weights of a model of the size of .*download it again"):
        source.resolve(Model(name=str(file), config=str(sd1)))


def test_a_file_without_encoders_needs_a_folder_that_has_them(tmp_path: Path) -> None:
    flux = write_source(tmp_path / "flux", "flux")
    file = write_single_file(tmp_path / "flux1-dev.safetensors", flux, "flux_transformer")
    (flux / "text_encoder_2" / "model.safetensors").unlink()
    text = message(Model(name=str(file), config=str(flux)))
    assert text.startswith(f"model.config: {file} has no text_encoder_2, and neither has {flux}")


def test_a_file_that_was_trained_otherwise_needs_a_scheduler_that_says_so(tmp_path: Path) -> None:
    sdxl = write_source(tmp_path / "sdxl", "sdxl")
    file = write_single_file(tmp_path / "model.safetensors", sdxl, "sdxl")
    save_file(load_file(file) | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, file)
    model, scheduler = Model(name=str(file), config=str(sdxl)), sdxl / "scheduler" / "scheduler_config.json"
    for field, value in (("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", True)):
        assert f"was trained with {field} {value}, but the scheduler of {sdxl} has " in message(model)
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {field: value}))
    assert source.local_folder(model) is None
