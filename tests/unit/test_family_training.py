"""Every family in the loop, without Ray: drawn from, judged, trained on. Their recipes, on tiny models; the guide."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
import transformers

from kto_ray.bake_off.plain_loop import PlainLoop
from kto_ray.config import Model, RunConfig, from_tree, load
from kto_ray.diffusion.checks import read_by
from kto_ray.diffusion.families import FAMILIES
from kto_ray.diffusion.loading import load_family
from kto_ray.errors import UserError
from kto_ray.export.formats import FORMATS
from kto_ray.preflight import Preflight
from kto_ray.storage import Storage
from kto_ray.train.worker import build_learner
from tests.factories import write_prompts
from tests.tiny_models import FLUX_VAE, NAMES, side_of, t5, t5_tokenizer, vae, write_model

GUIDE = Path(__file__).parents[2] / "docs" / "families.md"
WITHOUT_GUIDANCE = ("flux_schnell",)
RECIPES = {
    "sd15_lora": "sd1",
    "sd15_full_fsdp": "sd1",
    "paper": "sd1",
    "sdxl_lora": "sdxl",
    "sd35_medium_lora": "sd3",
    "flux1_dev_lora": "flux",
    "qwen_image_lora": "qwen_image",
    "zimage_lora": "z_image",
}
"""Recipes of models that are downloaded, and the tiny model that stands in."""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by the family's name; not to be written to."""
    root = tmp_path_factory.mktemp("tiny_models")
    return {name: write_model(root / name, name) for name in NAMES}


def small(tmp_path: Path, folder: Path, name: str) -> dict[str, Any]:
    """What makes a run of a second, on any tiny model."""
    return {
        "runs_folder": str(tmp_path / "runs"),
        "rounds": 2,
        "model": str(folder),
        "prompts": {
            "train": str(write_prompts(tmp_path / "train.jsonl", ["a red circle", "a blue square on black"])),
            "held_out": str(write_prompts(tmp_path / "held_out.jsonl", ["a green circle"])),
        },
        "generate": {
            "images_per_round": 8,
            "batch_size": 4,
            "steps": 3,
            "height": side_of(name),
            "width": side_of(name),
        },
        "label": {"scorers": "tests.plugins:CoinScorer", "threshold": 0.5},
        "evaluate": {"images_per_prompt": 2},
    }


def run(config: RunConfig) -> tuple[PlainLoop, list[dict[str, float]]]:
    """Checked as a run on Ray is; then two rounds in this process."""
    Preflight.check(config)
    loop = PlainLoop(config, threads=1)
    rounds = [loop.run_round(index) for index in range(2)]
    assert np.isfinite(loop.evaluate(2).mean_score.value)
    return loop, [made.figures for made in rounds]


def train(**more: Any) -> dict[str, Any]:
    """A beta at which not every sample of these models saturates."""
    settings = {"global_batch": 4, "micro_batch": 2, "epochs": 1, "learning_rate": 1e-3, "gamma": None}
    return settings | {"objective": {"kind": "diffusion_kto", "beta": 1}} | more


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pixart_sigma"])
def test_adapters_of_every_family_are_trained(tiny_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    tree = small(tmp_path, tiny_models[name], name)
    tree["generate"]["guidance_scale"] = 1 if name in WITHOUT_GUIDANCE else 3
    loop, figures = run(from_tree(tree | {"train": train(adapter={"rank": 2}, prompt_dropout=0.3, own_noise=0.5)}))
    assert all(figure["gradient_norm"] > 0 for figure in figures)
    published = loop.learner.policy.tensors()
    untrained = [key for key, value in published.items() if "lora_B" in key and not value.any()]
    # The text's queries of the last block lead nowhere.
    last = [key for key in published if name == "sd3" and "blocks.1.attn.add_q_proj.lora_B" in key]
    assert untrained == last


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_can_be_trained(tiny_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    tree = small(tmp_path, tiny_models[name], name) | {"train": train(adapter={"kind": "full"})}
    tree["generate"]["guidance_scale"] = 1 if name in WITHOUT_GUIDANCE else 3
    base = load_family(tiny_models[name], Model(), torch.device("cpu"), torch.float32).denoiser.state_dict()
    loop, figures = run(from_tree(tree))
    assert all(figure["gradient_norm"] > 0 for figure in figures)
    changed = [key for key, value in loop.learner.policy.tensors().items() if not torch.equal(value, base[key])]
    assert len(changed) > 0.6 * len(base)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of norms, under autocast
@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image", "sana"])
def test_memory_is_saved_by_checkpointing_and_half_precision_without_losing_gradients(
    tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    tree = small(tmp_path, tiny_models[name], name)
    tree["generate"]["guidance_scale"] = 1
    more = train(adapter={"rank": 2}, gradient_checkpointing=True, dtype="bfloat16")
    loop, _ = run(from_tree(tree | {"train": more}))
    policy, denoiser = loop.learner.policy, loop.learner.family.denoiser
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    frozen = [parameter for key, parameter in denoiser.named_parameters() if ".policy." not in key]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert all(value.abs().max() > 0 for key, value in loop.learner.policy.tensors().items() if "lora_B" in key)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of norms, under autocast
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_on_a_tiny_model_of_its_family(
    tiny_models: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    name = RECIPES[recipe]
    tree = small(tmp_path, tiny_models[name], name)
    overrides = [
        f"runs_folder={tree['runs_folder']}",
        f"model={tree['model']}",
        "model.variant=null",
        *(f"prompts.{key}={value}" for key, value in tree["prompts"].items()),
        *(f"generate.{key}={value}" for key, value in tree["generate"].items() if key != "batch_size"),
        "generate.dtype=float32",
        "generate.resources.num_gpus=0",
        "label.scorers=tests.plugins:CoinScorer",
        "label.threshold=0.5",
        "train.global_batch=8",
        "train.micro_batch=2",
        "train.resources.num_gpus=0",
        "train.workers=1",
        "evaluate.images_per_prompt=2",
        "rounds=2",
    ]
    _, figures = run(load(recipe, overrides))
    assert all(figure["gradient_norm"] > 0 for figure in figures)


def test_every_recipe_of_a_model_that_is_downloaded_says_what_gpus_it_needs() -> None:
    recipes = Path(__file__).parents[2] / "kto_ray" / "recipes"
    named = {path.stem for path in recipes.glob("*.yaml") if not path.stem.startswith("shapes")}
    assert named == set(RECIPES)
    for name in named:
        assert re.match(r"# (A|\d) GPUs? of \d+ GB", (recipes / f"{name}.yaml").read_text()), name


# -- what a model cannot do, said before anything is loaded -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("pixart_sigma", {}, "train.adapter.kind: PixArtSigma takes no adapters in diffusers; give full"),
        ("flux_schnell", {"generate": {"guidance_scale": 3}}, "generate.guidance_scale: 3, but "),
        ("flux", {"generate": {"height": 24, "width": 26}}, "generate.width: 26 is no multiple of 8"),
        ("sana", {"generate": {"height": 64, "width": 48}}, "generate.width: 48 is no multiple of 32, as this"),
        ("sd3", {"generate": {"scheduler": "DDIMScheduler"}}, "generate.scheduler: 'DDIMScheduler' is not compatible"),
        ("sana", {"generate": {"scheduler": "PNDMScheduler"}}, "generate.scheduler: 'PNDMScheduler' is not for flow"),
        (
            "z_image",
            {"train": {"adapter": {"target_modules": ["attn1"]}}},
            "train.adapter.target_modules: ['attn1'] names no layer of the transformer",
        ),
    ],
)
def test_what_a_model_cannot_do_is_said(
    tiny_models: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    tree = small(tmp_path, tiny_models[name], name)
    tree["generate"] |= {"guidance_scale": 1} | changes.get("generate", {})
    with pytest.raises(UserError) as caught:
        Preflight.check(from_tree(tree | {"train": train(**changes.get("train", {}))}))
    assert str(caught.value).startswith(said)


def test_a_distilled_model_that_is_told_the_guidance_step_by_step_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models["sd1"], tmp_path / "lcm")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"time_cond_proj_dim": 8}))
    with pytest.raises(UserError, match="was distilled to draw in a few steps"):
        Preflight.check(from_tree(small(tmp_path, folder, "sd1")))


def test_a_model_of_edms_noise_levels_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = d.StableDiffusionXLPipeline.from_pretrained(tiny_models["sdxl"])
    pipeline.scheduler = d.EDMDPMSolverMultistepScheduler()
    pipeline.save_pretrained(tmp_path / "playground")
    with pytest.raises(UserError, match="was trained with EDM's own noise levels"):
        Preflight.check(from_tree(small(tmp_path, tmp_path / "playground", "sdxl")))


def test_stable_diffusion_3_without_t5(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = d.StableDiffusion3Pipeline.from_pretrained(tiny_models["sd3"], text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "without")
    tree = small(tmp_path, tmp_path / "without", "sd3") | {"train": train(adapter={"rank": 2})}
    tree["generate"]["guidance_scale"] = 3
    run(from_tree(tree))
    texts = build_learner(from_tree(tree), Storage(str(tmp_path / "runs"))).texts
    whole = load_family(tmp_path / "without", Model(), torch.device("cpu"), torch.float32)
    assert torch.equal(
        texts.encode(["a red circle"]).tensors["text"], whole.encode_prompts(["a red circle"]).tensors["text"]
    )


def test_a_folder_without_its_tokenizer_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["flux"], tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer_2": [None, None]}))
    with pytest.raises(UserError, match="lists no tokenizer_2, as a Flux has"):
        Preflight.check(from_tree(small(tmp_path, folder, "flux")))


def test_a_processor_reads_texts_by_its_tokenizer(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of FLUX.2 gives tensors, which texts of several lengths do not fit."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models["flux2"] / "tokenizer")
    processor = SimpleNamespace(tokenizer=tokenizer)
    monkeypatch.setattr("kto_ray.diffusion.checks._component", lambda *_: processor)
    read, limit = read_by(tiny_models["flux2"], Model(), ["a", "a red circle"])
    assert [len(text.tokens) for text in read] == [1, 12]
    assert limit == 472


def test_the_guide_names_the_exports_that_there_are() -> None:
    rows = re.findall(r"^\| .*? \| `(\w+)` \| (\w+) \| .* \| (.*?) \|$", GUIDE.read_text(), re.MULTILINE)
    assert {pipeline for pipeline, *_ in rows} == set(FAMILIES)
    for pipeline, lora, exports in rows:
        part = "unet" if pipeline.startswith(("StableDiffusionPipeline", "StableDiffusionXL")) else "transformer"
        published: Any = SimpleNamespace(pipeline=pipeline, is_lora=lora == "yes", part=part)
        possible = {name for name, how in FORMATS.items() if how.refuses(published) is None}
        assert {name.lower() for name in exports.split(", ")} == possible


def test_a_flow_scheduler_in_a_folder_of_the_other_kind_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = d.StableDiffusionXLPipeline.from_pretrained(tiny_models["sdxl"])
    pipeline.scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipeline.save_pretrained(tmp_path / "flow")
    with pytest.raises(UserError, match="is that of a flow model, which other models of this family are not"):
        Preflight.check(from_tree(small(tmp_path, tmp_path / "flow", "sdxl")))


# -- the guide --------------------------------------------------------------------------------------------------------


def write_chroma(folder: Path) -> Path:
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = d.ChromaTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        pipeline = d.ChromaPipeline(
            scheduler=d.FlowMatchEulerDiscreteScheduler(),
            vae=vae(16, **FLUX_VAE),
            text_encoder=t5(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # of diffusers' own making
def test_the_guide_to_a_new_family_is_followed_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_chroma(tmp_path / "model")
    tree = small(tmp_path, folder, "chroma") | {"train": train(adapter={"rank": 2})}
    tree["generate"]["guidance_scale"] = 3
    with pytest.raises(UserError, match=r"holds a ChromaPipeline, which is not supported.*docs/families.md"):
        Preflight.check(from_tree(tree))

    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    (tmp_path / "chroma.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = {"name": str(folder), "family": "chroma:Chroma"}

    family = load_family(folder, Model(**model), torch.device("cpu"), torch.float32)
    given = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    step = d.FlowMatchEulerDiscreteScheduler.step

    def spy(self: Any, output: torch.Tensor, time: Any, state: torch.Tensor, **more: Any) -> Any:
        given.append((output, time, state))
        return step(self, output, time, state, **more)

    monkeypatch.setattr(d.FlowMatchEulerDiscreteScheduler, "step", spy)
    settings = from_tree(tree | {"model": model}).generate.model_copy(update={"guidance_scale": 1.0})
    with torch.no_grad():
        text = family.encode_prompts(["a red circle"])
        family.sample(text, family.nothing(), [torch.Generator().manual_seed(1)], settings)
        for output, time, state in given:
            ours = family.predict(family.denoiser, family.latents_of(state, 8, 8), time[None] / 1000, text)
            torch.testing.assert_close(ours, family.latents_of(output, 8, 8))

    run(from_tree(tree | {"model": model}))
