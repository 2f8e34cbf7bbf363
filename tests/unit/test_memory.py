"""What each role holds on its device: counted from configurations, against what is really there."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from kto_ray.config import Model, RunConfig, load
from kto_ray.diffusion.checks import adapted
from kto_ray.diffusion.components import components
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.memory import needs_of, require_fit
from kto_ray.diffusion.policy import make_policy
from kto_ray.diffusion.sizes import parameters_of
from kto_ray.errors import UserError
from kto_ray.preflight import Preflight, describe
from kto_ray.train.worker import build_learner
from tests.tiny_models import NAMES, write_model

CPU = torch.device("cpu")
SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


def config_of(folder: Path, **more: Any) -> RunConfig:
    kind = "full" if "pixart" in str(folder) else "lora"
    tree = {"train": {"adapter": {"kind": kind, "rank": 2}}} | more
    return RunConfig.model_validate({"model": str(folder), "label": {"scorers": "shapes"}, **tree})


def held(module: Any) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def test_a_replica_holds_what_is_counted(folder: Path) -> None:
    config = config_of(folder, generate={"dtype": "bfloat16"})
    family = load_family(folder, Model(), CPU, torch.bfloat16)
    models = components(folder, type(family))
    before = {name: held(getattr(family.pipeline, name)) for name, kind in models.items() if kind == "model"}
    replica, _ = needs_of(config, folder)
    # Counters of batch norms stay integers.
    assert all(replica.parts[name] == pytest.approx(size, abs=16) for name, size in before.items())
    if config.train.adapter.kind == "lora":
        policy = make_policy(family, config.train.adapter)
        assert replica.parts["adapters"] == sum(parameter.nbytes for parameter in policy.parameters())
    else:
        assert replica.parts["base, beside the policy"] == before[family.part]


def test_a_train_worker_holds_what_is_counted(folder: Path) -> None:
    _, worker = needs_of(config_of(folder), folder)
    learner = build_learner(config_of(folder))
    parameters = learner.policy.parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    states = [value for state in learner.optimizer.state.values() for value in state.values() if value.dim()]
    trained = sum(tensor.nbytes for tensor in (*parameters, *(p.grad for p in parameters), *states))
    part = learner.family.part
    if learner.config.adapter.kind == "full":
        assert worker.parts[f"{part} and its optimizer"] == pytest.approx(trained, rel=0.02)
    else:
        assert worker.parts["adapters and their optimizer"] == trained
        frozen = held(learner.policy.module) - sum(parameter.nbytes for parameter in parameters)
        assert worker.parts[part] == frozen


def test_a_base_of_half_precision_is_half_of_it(tiny_sd1_folder: Path) -> None:
    full, half = (needs_of(config_of(tiny_sd1_folder, train={"dtype": d}), tiny_sd1_folder)[1] for d in DTYPES)
    assert half.parts["unet"] == full.parts["unet"] / 2
    assert half.parts["adapters and their optimizer"] == full.parts["adapters and their optimizer"]
    assert (full.less, half.less) == ("train.dtype=bfloat16 halves it", "")


DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_what_an_optimizer_holds_is_counted(tiny_sd1_folder: Path, optimizer: str) -> None:
    config = config_of(tiny_sd1_folder, train={"adapter": {"kind": "full"}, "optimizer": optimizer})
    _, worker = needs_of(config, tiny_sd1_folder)
    learner = build_learner(config)
    for parameter in learner.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    states = [value for state in learner.optimizer.state.values() for value in state.values() if value.dim()]
    weights = sum(parameter.nbytes for parameter in learner.policy.parameters())
    counted = worker.parts["unet and its optimizer"] - 2 * weights
    # Adafactor's rows and columns of layers as small as these are no longer next to nothing.
    assert sum(state.nbytes for state in states) == pytest.approx(counted, abs=0.6 * weights)
    assert (counted == 0) is (optimizer == "adafactor")


def test_what_is_sharded_is_shared_among_the_workers(tiny_sd1_folder: Path) -> None:
    train = {"adapter": {"kind": "full"}, "workers": 4, "global_batch": 4, "micro_batch": 1}
    alone, shared = (
        needs_of(config_of(tiny_sd1_folder, train=train | {"strategy": strategy}), tiny_sd1_folder)[1].parts
        for strategy in ("ddp", "fsdp")
    )
    for part in ("unet and its optimizer", "base"):
        assert shared[part] == pytest.approx(alone[part] / 4, rel=1e-4)
    denoiser = load_family(tiny_sd1_folder, Model(), CPU, torch.float32).denoiser
    names = [name for name, module in denoiser.named_modules() if type(module).__name__ in denoiser._no_split_modules]
    held_by = Counter[str]()
    for name, weight in denoiser.named_parameters():  # the innermost block that it is in; "": none
        held_by[max((block for block in names if name.startswith(f"{block}.")), key=len, default="")] += weight.numel()
    assert shared["gathered blocks"] == 2 * 4 * max(held_by.values())


def test_the_layers_of_adapters_are_those_that_peft_finds(folder: Path) -> None:
    config = config_of(folder)
    if config.train.adapter.kind == "full":
        return
    family = load_family(folder, Model(), CPU, torch.float32)
    names = {name.partition(".lora_")[0] for name in make_policy(family, config.train.adapter).tensors()}
    assert {f"{family.part}.{name}" for name in adapted(folder, Model(), config.train.adapter)} == names


# -- what does not fit ------------------------------------------------------------------------------------------------


def small(tmp_path: Path, folder: Path, *more: str) -> RunConfig:
    gpus = ["train.resources.num_gpus=1", "generate.resources.num_gpus=0.5"]
    return load("shapes_demo", [f"runs_folder={tmp_path}", f"model={folder}", *gpus, *more])


def test_a_card_too_small_is_said_with_what_would_help(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    replica, worker = needs_of(small(tmp_path, tiny_sd1_folder), tiny_sd1_folder)
    fits = 1.0001 * max(worker.total, 2 * replica.total) / 0.8 / 10**9
    require_fit((replica, worker), fits)
    with pytest.raises(UserError) as caught:
        Preflight.check(small(tmp_path, tiny_sd1_folder, f"cluster.gpu_gb={worker.total / 10**9 * 0.9}"))
    text = str(caught.value)
    assert text.startswith(("generate.resources: a replica holds ", "train.resources: a train worker holds "))
    assert "(cluster.gpu_gb) leaves" in text
    assert text.endswith("dtype=bfloat16 halves it")


def test_a_folder_that_is_not_whole_is_said_before_what_it_needs(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd1_folder, tmp_path / "model")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing; the folder is not whole"):
        Preflight.check(small(tmp_path, folder, "cluster.gpu_gb=24"))


def test_on_the_cpu_no_card_is_too_small(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    config = load("shapes_demo", [f"runs_folder={tmp_path}", f"model={tiny_sd1_folder}", "cluster.gpu_gb=1e-9"])
    Preflight.check(config)


def test_it_is_said_before_anything_is_downloaded(
    tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kto_ray.diffusion.source.configs_of", lambda *_: tiny_sd1_folder)
    monkeypatch.setattr("kto_ray.diffusion.source.resolve", lambda model: pytest.fail("downloaded"))
    with pytest.raises(UserError, match=r"leaves 0\.0 MiB beside activations"):
        Preflight.check(small(tmp_path, Path("some/model"), "cluster.gpu_gb=1e-9"))
    assert "a train worker holds: " in describe(small(tmp_path, Path("some/model")))


def test_the_dry_run_says_what_each_role_holds(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    text = describe(small(tmp_path, tiny_sd1_folder))
    assert "a replica holds: 0.3 MiB, and activations (text_encoder " in text
    assert "a train worker holds: " in text
    assert describe(small(tmp_path, Path("nobody/nothing"))).splitlines()[-1].startswith("memory: unknown: model.name")


def test_nothing_is_read_of_weights(tiny_sd1_folder: Path) -> None:
    family = family_of(tiny_sd1_folder, Model())
    unet = load_family(tiny_sd1_folder, Model(), CPU, torch.float32).denoiser
    assert parameters_of(tiny_sd1_folder, family.part) == sum(p.numel() for p in unet.parameters())


# -- at true size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "billions"),
    [
        ("UNet2DConditionModel", SD15, 0.860),
        ("UNet2DConditionModel", SDXL, 2.567),
        ("FluxTransformer2DModel", {"guidance_embeds": True}, 11.90),
    ],
)
def test_true_sizes_are_those_that_are_known(
    tmp_path: Path, kind: str, config: dict[str, Any], billions: float
) -> None:
    """From the configurations of the published models, by what is published of their sizes."""
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"denoiser": ["diffusers", kind]}))
    assert parameters_of(tmp_path, "denoiser") / 1e9 == pytest.approx(billions, abs=0.005)
