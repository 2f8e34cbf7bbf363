"""LoRAs to start from: the base model with one fused is what diffusers draws with it; what does not fit is refused.

In double precision, in which fusing changes next to nothing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kto_ray.config import Adapter, Model, RunConfig, require_same
from kto_ray.diffusion import source
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.errors import UserError
from tests.tiny_models import write_model

CPU = torch.device("cpu")
NAMES = ("sd1", "sdxl", "flux")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sd1"), "sd1")


def family_of(folder: Path, model: Model | None = None) -> Family:
    return load_family(folder, model or Model(), CPU, torch.float64)


def write_lora(folder: Path, out: Path, seed: int = 0, text_encoder: bool = False) -> Path:
    """A LoRA of a model's denoiser, as diffusers' trainers save one; gives its folder."""
    family = family_of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        family.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))  # type: ignore[operator]
        layers = {f"{family.part}_lora_layers": get_peft_model_state_dict(family.denoiser)}
        if text_encoder:
            encoder = family.pipeline.text_encoder
            encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder)
    family.pipeline.save_lora_weights(out, **layers)
    return out


def write_policy(folder: Path, out: Path) -> Path:
    """A LoRA policy as a run publishes it; gives its file."""
    policy = make_policy(family_of(folder), Adapter(rank=2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.1)
    out.mkdir()
    save_file(policy.tensors(), out / "policy.safetensors", policy.metadata())
    return out / "policy.safetensors"


def prediction(family: Family, denoiser: Any = None) -> Tensor:
    side = 16 // family.geometry.shrink
    noise = torch.randn(2, family.geometry.channels, side, side, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([100.0, 900.0], dtype=torch.float64) / (1 if family.part == "unet" else 1000)
    with torch.no_grad():
        text = family.encode_prompts(["a red circle", "blue"])
        return family.predict(denoiser or family.denoiser, noise, levels, text)


def with_adapter(folder: Path, adapter: Path, scale: float) -> Tensor:
    """What diffusers makes of the adapter, not fused."""
    family = family_of(folder)
    family.pipeline.load_lora_weights(str(adapter), adapter_name="start")
    family.pipeline.set_adapters(["start"], [scale])
    return prediction(family)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("write", [write_lora, write_policy])
def test_a_fused_adapter_predicts_what_the_loaded_one_does(
    folder: Path, tmp_path: Path, write: Callable[[Path, Path], Path], scale: float
) -> None:
    adapter = write(folder, tmp_path / "lora")
    model = Model.model_validate({"adapters": [{"name": str(adapter), "scale": scale}]})
    fused, plain = prediction(family_of(folder, model)), prediction(family_of(folder))
    assert relative(fused, with_adapter(folder, adapter, scale)) < 1e-6
    assert relative(fused, plain) > 1e-3


def test_an_adapter_of_the_text_encoder_is_fused_too(sd1: Path, tmp_path: Path) -> None:
    adapter = write_lora(sd1, tmp_path / "lora", text_encoder=True)
    family = family_of(sd1, Model.model_validate({"adapters": [str(adapter)]}))
    assert relative(prediction(family), with_adapter(sd1, adapter, 1.0)) < 1e-6
    texts = [one.encode_prompts(["a red circle"]).tensors["text"] for one in (family, family_of(sd1))]
    assert relative(*texts) > 1e-3


def test_names_of_other_trainers_are_read(sd1: Path, tmp_path: Path) -> None:
    """Kohya's, in which most LoRAs on model sites come: lora_unet_..._to_q.lora_down.weight."""
    lora = write_lora(sd1, tmp_path / "lora")
    renamed = {}
    for name, weight in load_file(lora / WEIGHTS).items():
        layer, side = name.removeprefix("unet.").removesuffix(".weight").rsplit(".lora_", 1)
        stem = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = weight
        renamed[f"{stem}.alpha"] = torch.tensor(3.0)  # over the rank, 2, is the scale
    file = saved(tmp_path / "kohya.safetensors", renamed)
    family = family_of(sd1, Model.model_validate({"adapters": [str(file)]}))
    assert relative(prediction(family), with_adapter(sd1, lora, 3 / 2)) < 1e-6


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_add_up(sd1: Path, tmp_path: Path) -> None:
    paths = [str(write_lora(sd1, tmp_path / str(seed), seed)) for seed in (1, 2)]
    model = Model.model_validate({"adapters": [paths[0], {"name": paths[1], "scale": -0.5}]})
    family = family_of(sd1)
    for path, name in zip(paths, ("a", "b"), strict=True):
        family.pipeline.load_lora_weights(path, adapter_name=name)
    family.pipeline.set_adapters(["a", "b"], [1.0, -0.5])
    assert relative(prediction(family_of(sd1, model)), prediction(family)) < 1e-6


def test_a_policy_starts_at_the_fused_model(folder: Path, tmp_path: Path) -> None:
    model = Model.model_validate({"adapters": [str(write_lora(folder, tmp_path / "lora"))]})
    fused = prediction(family_of(folder, model))
    family = family_of(folder, model)
    policy = make_policy(family, Adapter(rank=2))
    assert torch.equal(prediction(family, policy.module), fused)
    with policy.reference() as reference:
        assert torch.equal(prediction(family, reference), fused)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    with policy.reference() as reference:
        assert torch.equal(prediction(family, reference), fused)
    assert relative(prediction(family, policy.module), fused) > 1e-3


def digests(folder: Path, model: Model) -> tuple[str, dict[str, str]]:
    return source.reference_digest(folder, model), source.component_digests(folder, model)


def test_adapters_are_a_part_of_the_digests(sd1: Path, tmp_path: Path) -> None:
    lora = write_lora(sd1, tmp_path / "lora")
    copy = shutil.copytree(lora, tmp_path / "copy")
    other = write_lora(sd1, tmp_path / "other", seed=1)
    plain = digests(sd1, Model())
    first = digests(sd1, Model.model_validate({"adapters": [str(lora)]}))
    assert first[0] != plain[0]
    assert first[1] == plain[1] | {"adapters": first[1]["adapters"]}
    assert digests(sd1, Model.model_validate({"adapters": [str(copy / WEIGHTS)]})) == first
    for adapters in (
        [str(other)],
        [{"name": str(lora), "scale": 0.5}],
        [str(lora), str(other)],
        [str(other), str(lora)],
    ):
        changed = digests(sd1, Model.model_validate({"adapters": adapters}))
        assert changed[0] != first[0]
        assert changed[1]["adapters"] != first[1]["adapters"]


def message(folder: Path, adapter: Path | str) -> str:
    model = Model.model_validate({"adapters": [str(adapter)]})
    with pytest.raises(UserError) as caught:
        source.check(folder, model)
    return str(caught.value)


def saved(file: Path, tensors: dict[str, Tensor]) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file


def test_what_is_no_adapter_is_named_by_the_check(sd1: Path, tmp_path: Path) -> None:
    lora = write_lora(sd1, tmp_path / "lora") / WEIGHTS
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(b"pickle")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora.read_bytes()[:-1])
    for adapter, said in (
        ("/nonexistent/lora.safetensors", "no file or folder '/nonexistent/lora.safetensors'"),
        (pickled, "is no .safetensors file"),
        (cut, "truncated"),
        (sd1 / "unet" / "diffusion_pytorch_model.safetensors", "is no LoRA"),
        (sd1, "has no *.safetensors"),
    ):
        text = message(sd1, adapter)
        assert text.startswith("model.adapters: ")
        assert said in text


def test_of_several_files_in_a_folder_one_is_to_be_given(sd1: Path, tmp_path: Path) -> None:
    lora = write_lora(sd1, tmp_path / "lora")
    shutil.copy(lora / WEIGHTS, lora / "other.safetensors")
    assert source.check(sd1, Model.model_validate({"adapters": [str(lora)]}))
    (lora / WEIGHTS).rename(lora / "another.safetensors")
    assert "has several, another.safetensors, other.safetensors; give one of a LoRA" in message(sd1, lora)
    named = {"name": str(lora), "file": "other.safetensors"}
    assert source.check(sd1, Model.model_validate({"adapters": [named]}))
    with pytest.raises(UserError, match=r"has no lora.safetensors \(it has another.safetensors, other.safetensors\)"):
        source.check(sd1, Model.model_validate({"adapters": [named | {"file": "lora.safetensors"}]}))


def test_an_adapter_of_another_model_is_told_by_its_shapes(sd1: Path, tmp_path: Path) -> None:
    """Names of Stable Diffusion 1.5 and XL are the same in part; diffusers would fail in the middle of loading."""
    sdxl = write_model(tmp_path / "sdxl", "sdxl")
    lora = load_file(write_lora(sdxl, tmp_path / "lora") / WEIGHTS)
    for name in ("wide", "elsewhere"):
        changed = {
            (key if name == "wide" else key.replace("unet.", "unet.other.")): weight.repeat(1, 5)
            for key, weight in lora.items()
            if key.endswith("lora_A.weight")
        }
        text = message(sd1, saved(tmp_path / f"{name}.safetensors", changed))
        assert "is a LoRA of another model" in text


def test_what_headers_do_not_tell_fails_when_it_is_loaded(sd1: Path, tmp_path: Path) -> None:
    flux = write_lora(write_model(tmp_path / "flux", "flux"), tmp_path / "lora") / WEIGHTS
    model = Model.model_validate({"adapters": [str(flux)]})
    source.check(sd1, model)
    with pytest.raises(UserError, match=rf"^model.adapters: {flux} is a LoRA of another model"):
        family_of(sd1, model)


def test_a_family_without_adapters_takes_none(sd1: Path, tmp_path: Path) -> None:
    lora = write_lora(sd1, tmp_path / "lora")
    text = message(write_model(tmp_path / "pixart", "pixart_sigma"), lora)
    assert text == "model.adapters: a PixArtSigma takes none; leave them out"


def write_cache(hub: Path, lora: Path) -> None:
    repository = hub / "models--people--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    shutil.copytree(lora, repository / "snapshots" / ("1" * 40))


def test_a_hub_name_is_taken_from_the_cache(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Model.model_validate({"name": str(sd1), "adapters": ["people/lora"]})
    assert source.local_folder(model) is None  # a dry run downloads nothing
    with pytest.raises(UserError, match=r"^model.adapters: 'people/lora' could not be had from the model hub"):
        source.resolve(model)
    lora = write_lora(sd1, tmp_path / "lora")
    write_cache(tmp_path / "hub", lora)
    assert source.local_folder(model) == source.resolve(model) == sd1
    assert digests(sd1, model) == digests(sd1, Model.model_validate({"adapters": [str(lora)]}))


def test_an_adapter_is_a_name_with_or_without_a_scale() -> None:
    model = Model.model_validate({"adapters": ["a.safetensors", {"name": "b", "scale": 0.5}]})
    assert [(adapter.name, adapter.scale) for adapter in model.adapters] == [("a.safetensors", 1.0), ("b", 0.5)]
    assert Model.model_validate({"adapters": "a"}) == Model.model_validate({"adapters": ["a"]})
    assert Model.model_validate({"adapters": {"name": "a"}}) == Model.model_validate({"adapters": ["a"]})
    with pytest.raises(ValidationError):
        Model.model_validate({"adapters": [{"scale": 0.5}]})


def test_adapters_may_move_where_their_content_is_the_same() -> None:
    before, after = (RunConfig.model_validate({"model": {"adapters": [path]}}) for path in ("a", "b"))
    assert [change.field for change in require_same(after, before, same_content=["model"])] == ["model.adapters"]
    with pytest.raises(UserError, match=r"model.adapters"):
        require_same(after, before)
