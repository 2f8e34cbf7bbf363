"""Weights as people's folders have them: shards, variants, links, fused adapters; and what is said of those that fail.

Each folder is written by diffusers from a tiny random pipeline and loaded through `load_family`. Before that, every
safetensors file that `weight_files` does not name is filled with rubbish: what is loaded is exactly what it names.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from kto_ray.config import Model
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.weights import weight_files
from kto_ray.errors import UserError
from tests.tiny_models import write_model

FAMILIES = ("sd1", "sd3")  # with a UNet and with a transformer; both with text encoders of transformers
COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sd1"), "sd1")


def pipeline_of(folder: Path, **more: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, **more)


def saved(folder: Path, target: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A pipeline folder, written again by diffusers."""
    pipeline_of(folder, dtype=dtype).save_pretrained(target, **more)
    return target


def weights_of(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """What the family loads of a folder, by component and name."""
    pipeline = load_family(folder, Model(variant=variant), torch.device("cpu"), torch.float32).pipeline
    return {
        f"{name}/{key}": tensor
        for name in COMPONENTS
        if (component := getattr(pipeline, name, None)) is not None
        for key, tensor in component.state_dict().items()
    }


def named(folder: Path, variant: str | None = None) -> dict[str, list[str]]:
    return {
        component.name: [file.name for file in weight_files(component, variant)]
        for component in sorted(folder.iterdir())
        if component.name in COMPONENTS
    }


def require_loaded(folder: Path, expected: dict[str, Tensor], variant: str | None = None) -> None:
    """The weights are the expected ones, also when all files but those of `weight_files` are rubbish."""
    used = {file for component in named(folder, variant) for file in weight_files(folder / component, variant)}
    for file in folder.glob("*/*.safetensors"):
        if file not in used:
            file.write_bytes(b"rubbish")
    loaded = weights_of(folder, variant)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def halved(weights: dict[str, Tensor], components: tuple[str, ...] = COMPONENTS) -> dict[str, Tensor]:
    """What is left of weights that were saved in half precision; T5's `wo` are kept out of it by transformers."""
    return {
        name: tensor.half().float() if name.split("/")[0] in components and ".wo." not in name else tensor
        for name, tensor in weights.items()
    }


def test_shards_are_loaded_and_named(plain: Path, tmp_path: Path) -> None:
    folder = saved(plain, tmp_path / "shards", max_shard_size="5KB")
    assert all(len(files) > 1 for files in named(folder).values())
    require_loaded(folder, weights_of(plain))


@pytest.mark.parametrize("component", ["denoiser", "text_encoder"])
def test_a_missing_shard_is_named_before_anything_is_loaded(plain: Path, tmp_path: Path, component: str) -> None:
    folder = saved(plain, tmp_path / "shards", max_shard_size="5KB")
    part = next(name for name in ("unet", "transformer") if (folder / name).is_dir())
    lost = weight_files(folder / (part if component == "denoiser" else component), None)[-1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"model.name: .* lacks 1 of \d+ shards .*{lost.name}.*download it again"):
        source.check(folder, Model())


def test_a_shard_that_is_cut_off_is_named(sd1: Path, tmp_path: Path) -> None:
    folder = saved(sd1, tmp_path / "shards", max_shard_size="5KB")
    cut = weight_files(folder / "unet", None)[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{cut.name} is truncated"):
        source.check(folder, Model())


def test_a_variant_is_loaded_where_a_component_has_it(plain: Path, tmp_path: Path) -> None:
    folder = saved(plain, tmp_path / "mixed")
    half = saved(plain, tmp_path / "half", torch.float16, variant="fp16")
    part = next(name for name in ("unet", "transformer") if (folder / name).is_dir())
    shutil.rmtree(folder / part)
    shutil.copytree(half / part, folder / part)
    require_loaded(folder, halved(weights_of(plain), (part,)), "fp16")


@pytest.mark.parametrize("size", ["1GB", "5KB"])
def test_a_variant_is_told_from_plain_weights_beside_it(plain: Path, tmp_path: Path, size: str) -> None:
    """Shards of variants have "fp16-00001-of-00002" in their names."""
    folder = saved(plain, tmp_path / "both", max_shard_size="5KB")
    half = saved(plain, tmp_path / "half", torch.float16, variant="fp16", max_shard_size=size)
    for file in half.glob("*/*fp16*"):
        shutil.copy(file, folder / file.relative_to(half))
    files = [file for files in named(folder, "fp16").values() for file in files]
    assert all(".fp16" in file for file in files)
    assert any(".fp16-00001-of-" in file for file in files) is (size == "5KB")
    require_loaded(folder, halved(weights_of(plain)), "fp16")


def give_old_names(component: Path) -> None:
    """Shards of a variant as diffusers named them before 0.31: model-00001-of-00002.fp16.safetensors."""
    index = component / "diffusion_pytorch_model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    renamed = {name: name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors") for name in old(content)}
    content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
    for name, new in renamed.items():
        (component / name).rename(component / new)
    index.unlink()
    (component / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(content))


def old(index: dict[str, Any]) -> set[str]:
    return set(index["weight_map"].values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shards_of_a_variant_under_their_old_names(plain: Path, tmp_path: Path) -> None:
    folder = saved(plain, tmp_path / "old", torch.float16, variant="fp16", max_shard_size="5KB")
    part = next(name for name in ("unet", "transformer") if (folder / name).is_dir())
    give_old_names(folder / part)
    assert all(name.endswith(".fp16.safetensors") for name in named(folder, "fp16")[part])
    require_loaded(folder, halved(weights_of(plain)), "fp16")


def test_old_names_that_diffusers_does_not_find_are_to_be_renamed(sd1: Path, tmp_path: Path) -> None:
    folder = saved(sd1, tmp_path / "v1.5", torch.float16, variant="fp16", max_shard_size="5KB")
    give_old_names(folder / "unet")
    with pytest.raises(UserError, match=r"rename it to diffusion_pytorch_model.safetensors.index.fp16.json"):
        source.check(folder, Model(variant="fp16"))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.fp16.index.json"
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    require_loaded(folder, halved(weights_of(sd1)), "fp16")


def test_of_a_single_file_and_shards_each_library_takes_its_own(sd1: Path, tmp_path: Path) -> None:
    folder = saved(sd1, tmp_path / "both", max_shard_size="5KB")
    shutil.copytree(sd1, folder, dirs_exist_ok=True)
    assert len(named(folder)["unet"]) > 1
    assert named(folder)["text_encoder"] == ["model.safetensors"]
    require_loaded(folder, weights_of(sd1))


def test_stray_files_are_left_alone(sd1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1, tmp_path / "model")
    before = source.component_digests(folder, Model())
    for stray in (
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "v1-5-pruned-emaonly.safetensors",
    ):
        (folder / stray).write_bytes(b"rubbish")
    require_loaded(folder, weights_of(sd1))
    assert source.component_digests(folder, Model()) == before


def test_links_are_followed(sd1: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where every file is a link, and where people link the folder itself."""
    blobs, folder = tmp_path / "blobs", shutil.copytree(sd1, tmp_path / "snapshot")
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert source.component_digests(link, Model()) == source.component_digests(sd1, Model())
    require_loaded(link, weights_of(sd1))


def half_only(sd1: Path, target: Path) -> None:
    saved(sd1, target, torch.float16, variant="fp16")


def half_shards_only(sd1: Path, target: Path) -> None:
    saved(sd1, target, torch.float16, variant="fp16", max_shard_size="5KB")


def pickled(sd1: Path, target: Path) -> None:
    shutil.copytree(sd1, target)
    (target / "unet" / "diffusion_pytorch_model.safetensors").rename(target / "unet" / "diffusion_pytorch_model.bin")


def with_adapter(sd1: Path, target: Path) -> None:
    pipeline = pipeline_of(sd1)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_pretrained(target)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (half_only, "those of a variant; give model.variant=fp16"),
        (half_shards_only, "those of a variant; give model.variant=fp16"),
        (pickled, r"pickled ones.*use_safetensors=False\) and save_pretrained"),
        (with_adapter, r"adapter in it.*save the folder again after pipeline.fuse_lora\(\)"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(
    sd1: Path, tmp_path: Path, write: Callable[[Path, Path], None], said: str
) -> None:
    write(sd1, tmp_path / "model")
    with pytest.raises(UserError, match=f"^model.name: .*{said}"):
        source.check(tmp_path / "model", Model())


def test_a_variant_that_is_only_there_pickled_is_not_passed_over(sd1: Path, tmp_path: Path) -> None:
    """diffusers would look for its safetensors, and not take the plain ones."""
    folder = saved(sd1, tmp_path / "half", torch.float16, variant="fp16")
    file = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    file.rename(file.with_suffix(".bin"))
    shutil.copy(sd1 / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae")
    with pytest.raises(UserError, match="pickled"):
        source.check(folder, Model(variant="fp16"))


def test_a_fused_adapter_is_a_part_of_the_model(sd1: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(sd1)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    expected = weights_of(sd1) | {f"unet/{name}": tensor for name, tensor in pipeline.unet.state_dict().items()}
    require_loaded(tmp_path / "fused", expected)
    assert source.reference_digest(tmp_path / "fused", Model()) != source.reference_digest(sd1, Model())


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_editing_pipelines_are_refused(sd1: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(sd1, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": kind}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"holds a {kind}, which is not supported"):
        source.check(folder, Model())
