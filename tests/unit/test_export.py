"""Exports: what other programs load is the policy, to the last bit where nothing is rounded; and the card is true.

Every format that a family has is written from a policy with alpha != rank, loaded as its card says, and asked for the
same prediction as the policy in the run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from kto_ray import prompts
from kto_ray.cli import main
from kto_ray.cli_export import export as command
from kto_ray.config import Model, RunConfig, to_yaml, yaml12
from kto_ray.diffusion import source
from kto_ray.diffusion.family import Family, index_of
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.errors import UserError
from kto_ray.evaluate.charts import percent
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.export import pushing
from kto_ray.export.card import PICTURE, Card
from kto_ray.export.exporting import folder_for, prepare, write
from kto_ray.export.formats import FORMATS, IN_COMFYUI
from kto_ray.policies import PolicyStore
from kto_ray.records import Prompt, SampleRecord
from kto_ray.storage import Storage
from tests.hub import Hub, hub_server
from tests.in_process import InProcess
from tests.tiny_models import NAMES, side_of, write_model

CPU = torch.device("cpu")
UNETS = ("sd1", "sd2", "sdxl")
ROUNDED = 1e-5
"""How far a prediction may be off, as a share of its largest value, where weights were added up or multiplied."""
HELD_OUT = [Prompt(f"p{place}", f"a {color} circle") for place, color in enumerate(("red", "green", "blue"))]


def predict(name: str, family: Family) -> Tensor:
    """Of the same noisy latent and prompt each time."""
    side = side_of(name) // family.geometry.shrink
    noisy_BCHW = torch.randn(1, family.geometry.channels, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text_B = family.encode_prompts(["a red circle"])
        return family.predict(family.denoiser, noisy_BCHW, family.noise.timesteps(torch.tensor([0.6])), text_B).float()


@dataclass(frozen=True)
class Case:
    """A run with one policy, and what base and policy predict."""

    name: str
    run: Storage
    model: Model
    folder: Path
    base: Tensor
    policy: Tensor

    def load(self, folder: Path | None = None, model: Model | None = None) -> Family:
        return load_family(folder or self.folder, model or self.model, CPU, torch.float32)

    def off(self, family: Family) -> float:
        """How far its prediction is from the policy's."""
        return self.difference(predict(self.name, family))

    def difference(self, prediction: Tensor) -> float:
        """From the policy's, as a share of its largest value."""
        return float((prediction - self.policy).abs().max() / self.policy.abs().max())

    def export(self, to: str, out: Path, **more: Any) -> Path:
        write(prepare(self.run, to, **more), out)
        return out

    def adapted(self, out: Path) -> Family:
        """The base model with the adapter that lies in a folder."""
        family = self.load()
        family.pipeline.load_lora_weights(str(out))
        return family


def make_case(tmp: Path, name: str, model: dict[str, Any] | None = None, **adapter: Any) -> Case:
    folder = write_model(tmp / "model", name)
    if model and "variant" in model:  # saved again, as that
        family = load_family(folder, Model(), CPU, torch.float16)
        shutil.rmtree(folder)
        family.pipeline.save_pretrained(folder, variant=model["variant"], max_shard_size="30KB")
    tree = {
        "run": name,
        "model": {"name": str(folder), **(model or {})},
        "label": {"scorers": "shapes"},
        "train": {"adapter": {"rank": 2, "alpha": 6, **adapter}},
        "evaluate": {"images_per_prompt": 2},
        "tracking": {"tensorboard": False},
    }
    config, run = RunConfig.model_validate(tree), Storage(str(tmp / "run"))
    run.write("config.yaml", to_yaml(config).encode())
    prompts.keep(run, "prompts.held_out", HELD_OUT)
    family = load_family(folder, config.model, CPU, torch.float32)
    base = predict(name, family)
    policy = make_policy(family, config.train.adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            start = 0 if config.train.adapter.kind == "lora" else parameter  # adapters begin by chance
            parameter.copy_(start + 0.3 * torch.randn(parameter.shape, generator=generator))
    store = PolicyStore(run)
    store.publish_base(source.reference_digest(folder, config.model), source.component_digests(folder, config.model))
    store.publish(1, policy.tensors(), policy.metadata())
    return Case(name, run, config.model, folder, base, predict(name, family))


@pytest.fixture(scope="module", params=[name for name in NAMES if name != "pixart_sigma"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of every family that takes adapters."""
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Not to be changed."""
    return make_case(tmp_path_factory.mktemp("sd2"), "sd2")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run that trained all of a U-Net. Not to be changed."""
    return make_case(tmp_path_factory.mktemp("full"), "sd2", kind="full")


@pytest.fixture
def own(tmp_path: Path) -> Case:
    """One that a test may change."""
    return make_case(tmp_path / "own", "sd2")


# -- every format of every family -------------------------------------------------------------------------------------


def test_the_policy_is_told_from_its_base(case: Case) -> None:
    assert case.difference(case.base) > 10 * ROUNDED


def test_diffusers_loads_exactly_the_policy_from_the_published_file(case: Case, tmp_path: Path) -> None:
    out = case.export("diffusers", tmp_path / "out")
    assert case.off(case.adapted(out)) == 0
    data = (out / "pytorch_lora_weights.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == PolicyStore(case.run).resolve(1).digest


def test_kohya_names_give_exactly_the_policy_or_are_refused(case: Case, tmp_path: Path) -> None:
    if case.name not in UNETS:
        with pytest.raises(UserError, match=r"^--to: kohya is a format of U-Nets, .* give .*diffusers or merged"):
            case.export("kohya", tmp_path / "out")
        return
    out = case.export("kohya", tmp_path / "out")
    tensors = load_file(out / f"{case.name}-policy-1.safetensors")
    assert case.off(case.adapted(out)) == 0
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {6}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert {name.partition(".")[2] for name in tensors} == set(parts)
    assert all(name.startswith("lora_unet_") for name in tensors)


def test_what_comfyui_reads_gives_the_policy_in_diffusers_too_or_is_refused(case: Case, tmp_path: Path) -> None:
    if case.name not in UNETS and index_of(case.folder)["_class_name"] not in IN_COMFYUI:
        with pytest.raises(UserError, match=r"^--to: comfyui is for U-Nets and .* give diffusers or merged"):
            case.export("comfyui", tmp_path / "out")
        return
    out = case.export("comfyui", tmp_path / "out")
    (file,) = out.glob("*.safetensors")
    if case.name in UNETS:
        assert file.read_bytes() == next(case.export("kohya", tmp_path / "kohya").glob("*.safetensors")).read_bytes()
        return
    assert case.off(case.adapted(out)) <= ROUNDED
    names = list(load_file(file))
    assert all(name.startswith("transformer.") and ".lora_" in name for name in names), "an alpha would scale it again"


def test_a_merged_pipeline_is_the_policy_and_otherwise_the_base(case: Case, tmp_path: Path) -> None:
    out = case.export("merged", tmp_path / "out")
    family = case.load(out, Model(name=str(out)))
    assert case.off(family) <= ROUNDED
    before, after = (source.component_digests(folder, Model()) for folder in (case.folder, out))
    assert {name for name in before if before[name] != after[name]} == {family.part}
    assert {path.name for path in out.iterdir()} - {"README.md"} == {path.name for path in case.folder.iterdir()}


def test_without_its_alpha_an_adapter_is_another_policy(sd2: Case, tmp_path: Path) -> None:
    """The control of the tests above."""
    out = sd2.export("diffusers", tmp_path / "out")
    file = out / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    assert sd2.off(sd2.adapted(out)) > 0.1


# -- other policies and models ----------------------------------------------------------------------------------------


def test_all_of_a_denoiser_becomes_its_component(full: Case, tmp_path: Path) -> None:
    from diffusers import AutoModel

    out = full.export("diffusers", tmp_path / "out")
    family = full.load()
    family.pipeline.unet = AutoModel.from_pretrained(str(out), subfolder="unet")
    assert full.off(family) == 0
    assert full.off(full.load(full.export("merged", tmp_path / "merged"))) == 0


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_all_of_a_denoiser_is_no_lora(full: Case, to: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--to: {to} is a format of LoRA adapters, .* give merged or diffusers"):
        full.export(to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_convolutions_that_were_adapted_are_exported_too(name: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, name, target_modules=["to_q", "conv1", "proj_in"])
    for to in ("diffusers", "kohya"):
        assert case.off(case.adapted(case.export(to, tmp_path / to))) == 0
    assert case.off(case.load(case.export("merged", tmp_path / "merged"))) <= ROUNDED


def test_shards_of_a_variant_stay_shards_of_that_variant_and_precision(tmp_path: Path) -> None:
    case = make_case(tmp_path, "sdxl", {"variant": "fp16"})
    shutil.copy(case.folder / "vae/config.json", case.folder / "vae/other.bin")
    out = case.export("merged", tmp_path / "out")
    files = {path.relative_to(case.folder) for path in case.folder.rglob("*.safetensors")}
    assert len([file for file in files if file.parts[0] == "unet"]) > 1
    assert {path.relative_to(out) for path in out.rglob("*.safetensors")} == files
    assert not (out / "vae/other.bin").exists()
    dtypes = {tensor.dtype for file in (out / "unet").glob("*.safetensors") for tensor in load_file(file).values()}
    assert dtypes == {torch.float16}
    assert case.off(case.load(out)) < 0.1 * case.difference(case.base)  # as half precision rounds
    assert 'from_pretrained("out", variant="fp16")' in (out / "README.md").read_text()


def test_a_merged_denoiser_is_rounded_once_to_the_dtype_that_is_asked_for(sd2: Case, tmp_path: Path) -> None:
    file = "unet/diffusion_pytorch_model.safetensors"
    exact = load_file(sd2.export("merged", tmp_path / "float32") / file)
    rounded = load_file(sd2.export("merged", tmp_path / "bfloat16", dtype="bfloat16") / file)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)


def test_a_dtype_is_for_merging(sd2: Case) -> None:
    with pytest.raises(UserError, match=r"^--dtype: bfloat16 is for --to merged"):
        prepare(sd2.run, "diffusers", dtype="bfloat16")


# -- which policy, and of which model ---------------------------------------------------------------------------------


def test_the_newest_policy_is_taken_unless_another_is_named(own: Case) -> None:
    store = PolicyStore(own.run)
    tensors = store.load(store.resolve(1))
    assert tensors is not None
    second = store.publish(2, {name: 2 * tensor for name, tensor in tensors.items()}, {"format": "pt"})
    assert prepare(own.run, "merged").published.policy == second
    assert prepare(own.run, "merged", 1).published.policy == store.resolve(1)


@pytest.mark.parametrize(
    ("version", "message"),
    [(0, "--policy: 0 is the base model itself"), (7, r"--policy: .* has no policy 7; it has those from 1 to 1")],
)
def test_a_policy_that_is_none_is_refused(sd2: Case, version: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(sd2.run, "diffusers", version)


def test_a_run_without_policies_has_nothing_to_export(own: Case) -> None:
    own.run.delete("policies/00001/policy.json")
    with pytest.raises(UserError, match=r"^run: .* nothing to export"):
        prepare(own.run, "diffusers")


def test_weights_that_are_gone_are_said_to_be_gone(own: Case) -> None:
    PolicyStore(own.run).drop_before(2)
    with pytest.raises(UserError, match=r"policy 1 of .* has no weights any more: keep_policies"):
        prepare(own.run, "diffusers")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        prepare(Storage(str(tmp_path)), "diffusers")


@pytest.mark.parametrize("to", FORMATS)
def test_weights_or_a_model_that_are_not_what_they_were_are_not_exported(own: Case, to: str) -> None:
    data = own.run.read("policies/00001/policy.safetensors")
    own.run.write("policies/00001/policy.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"policy 1 of .* has digest .* nothing was exported"):
        prepare(own.run, to)
    own.run.write("policies/00001/policy.safetensors", data)
    shutil.rmtree(own.folder)
    write_model(own.folder, "sd2", seed=1)
    with pytest.raises(UserError, match=r"the base model has changed since the run began: .* --model"):
        prepare(own.run, to)


def test_a_model_that_has_moved_can_be_given(own: Case, tmp_path: Path) -> None:
    moved = own.folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"^model.name: no folder .* can be given as --model"):
        prepare(own.run, "merged")
    out = own.export("merged", tmp_path / "out", model=str(moved))
    assert own.off(own.load(out)) <= ROUNDED
    with pytest.raises(UserError, match="the base model has changed"):
        prepare(own.run, "merged", model=str(write_model(tmp_path / "other", "sd2", seed=1)))


# -- the folder -------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(sd2: Case, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    export = prepare(sd2.run, "diffusers")
    assert folder_for(export, str(tmp_path / "taken")) == tmp_path / "taken"
    write(export, tmp_path / "taken")
    with pytest.raises(UserError, match=r"^--out: .* is there already and not empty"):
        folder_for(export, str(tmp_path / "taken"))
    assert folder_for(export, None) == Path("sd2-policy-1-diffusers")


def test_what_cannot_be_written_whole_is_not_written(own: Case, tmp_path: Path) -> None:
    store = PolicyStore(own.run)
    tensors = store.load(store.resolve(1))
    assert tensors is not None
    for version, (old, new) in enumerate({".to_q.": ".to_x.", "lora_B.weight": "lora_C.weight"}.items(), start=2):
        store.publish(version, {name.replace(old, new): tensor for name, tensor in tensors.items()}, {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"^--policy: the base model has no weight '.*to_x.weight'"):
        own.export("merged", tmp_path / "out" / "a", version=2)
    with pytest.raises(UserError, match=r"^--policy: 3 has weights that are no LoRA pairs, such as .*lora_C"):
        own.export("kohya", tmp_path / "out" / "b", version=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out: cannot write"):
        own.export("diffusers", tmp_path / "file" / "c", version=1)
    assert list((tmp_path / "out").iterdir()) == []


# -- the model card ---------------------------------------------------------------------------------------------------


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml12.load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize("to", FORMATS)
def test_the_lines_of_the_card_load_the_policy(
    sd2: Case, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = sd2.export(to, Path("out"))
    assert runs_to(sd2, (out / "README.md").read_text()) <= (ROUNDED if to == "merged" else 0)


@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_the_lines_of_the_card_load_a_whole_denoiser(
    full: Case, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = full.export(to, Path("out"))
    assert runs_to(full, (out / "README.md").read_text()) == 0


def runs_to(case: Case, card: str) -> float:
    """How far the pipeline is from the policy that the card's lines load."""
    names: dict[str, Any] = {}
    exec(code_of(card), names)
    family = case.load()
    family.pipeline = names["pipeline"]
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)  # torch multiplies by trainable weights in another order
    return case.off(family)


async def evaluate(case: Case) -> Evaluation:
    """Base and policy as the loop does it; the policy's images score higher."""
    config = prepare(case.run, "diffusers").published.config
    evaluation = Evaluation(config, case.run, HELD_OUT)

    def value(sample: SampleRecord) -> float:
        return 0.4 * sample.policy.version + 0.2 + 0.3 * sample.index

    workers = cast(Any, InProcess({"shapes": value}))
    for version in (0, 1):
        await evaluation.run_for(PolicyStore(case.run).resolve(version), workers, workers)
    return evaluation


async def test_the_card_has_figures_and_pictures_of_the_run_and_digests(own: Case, tmp_path: Path) -> None:
    evaluation = await evaluate(own)
    out = own.export("diffusers", tmp_path / "out")
    card = (out / "README.md").read_text()
    base, policy = evaluation.summary(0), evaluation.summary(1)
    assert base.pass_rate.value < policy.pass_rate.value
    row = next(line for line in card.splitlines() if line.startswith("| images that pass |"))
    assert f"| {percent(base.pass_rate.value)} (" in row
    assert f"| {percent(policy.pass_rate.value)} (" in row
    assert "| prompts won against the base |  | 100" in card
    assert "| score, shapes | 0.35 (" in card
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"]({PICTURE})" in card
    for prompt in HELD_OUT:
        assert f"    {prompt.text}\n" in card
    for digest in (PolicyStore(own.run).resolve(number).digest for number in (0, 1)):
        assert f"`sha256:{digest}`" in card
    assert hashlib.sha256(own.run.read("config.yaml")).hexdigest() in card
    assert "LoRA of rank 2 and alpha 6" in card
    assert "The base model's licence holds." in card
    assert front_matter(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "diffusion-kto", "kto-ray"],
    }


async def test_where_pixels_were_dropped_there_are_no_pictures(own: Case, tmp_path: Path) -> None:
    evaluation = await evaluate(own)
    for version in (0, 1):
        evaluation.round(version).drop_pixels()
    out = own.export("merged", tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "| images that pass |" in card
    assert "![" not in card
    assert not (out / PICTURE).exists()
    assert "lora" not in front_matter(card)["tags"]


def test_a_policy_that_was_not_evaluated_has_no_figures(sd2: Case, tmp_path: Path) -> None:
    card = (sd2.export("diffusers", tmp_path / "out") / "README.md").read_text()
    assert "Figures" not in card
    assert "|" not in card
    assert "![" not in card


def test_a_model_of_a_hub_is_named_as_the_hub_reads_it(sd2: Case) -> None:
    published = prepare(sd2.run, "diffusers").published
    hub = replace(published, model=Model(name="owner/base", revision="abc", variant="fp16"))
    export = replace(prepare(sd2.run, "diffusers"), published=hub)
    card = Card("demo", hub, False, FORMATS["diffusers"].loading(export, "me/demo"), None, []).text()
    assert front_matter(card)["base_model"] == "owner/base"
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert 'from_pretrained("owner/base", revision="abc", variant="fp16")' in code_of(card)
    assert 'load_lora_weights("me/demo", weight_name="pytorch_lora_weights.safetensors")' in code_of(card)


# -- the command ------------------------------------------------------------------------------------------------------


def called(*words: str) -> Result:
    return CliRunner().invoke(main, ["export", *words], env={"COLUMNS": "400"})


def test_the_command_knows_all_formats() -> None:
    (choices,) = (cast(Any, option.type).choices for option in command.params if option.name == "to")
    assert set(choices) == set(FORMATS)


def test_the_command_says_what_it_wrote(sd2: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = called(str(sd2.run), "--to", "kohya", "--policy", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert str(out / "sd2-policy-1.safetensors") in result.output
    assert str(out / "README.md") in result.output
    again = called(str(sd2.run), "--to", "kohya", "--out", str(out))
    assert again.exit_code == 2
    assert "error: --out: " in again.output


# -- a hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def run_python(code: str, hub: Hub, tmp: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment once."""
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp / "hf"), **more}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_export_arrives_on_a_hub_to_the_last_byte(sd2: Case, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(prepare(sd2.run, "diffusers"), out, "me/demo")
    call = f"open_repository('me/demo'); print(push(Path({str(out)!r}), 'me/demo', 'a policy'))"
    done = run_python(PUSH.format(call=call), hub, tmp_path)
    assert done.stdout.startswith(f"{hub.address}/me/demo/commit/"), done.stdout + done.stderr
    assert hub.repositories["me/demo"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.messages == ["a policy"]
    assert 'load_lora_weights("me/demo"' in hub.repositories["me/demo"]["README.md"].decode()
    again = run_python(PUSH.format(call=call), hub, tmp_path)
    assert again.stdout.startswith(hub.address), "a repository that is there is filled"


def test_the_command_opens_the_repository_before_it_writes_and_pushes_then(
    sd2: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", list[object]()

    def open_repository(name: str) -> None:
        calls.append((name, out.exists()))

    def push(*words: object) -> str:
        calls.append(words)
        return "there"

    monkeypatch.setattr(pushing, "open_repository", open_repository)
    monkeypatch.setattr(pushing, "push", push)
    result = called(str(sd2.run), "--to", "diffusers", "--out", str(out), "--push", "me/demo")
    assert result.exit_code == 0, result.output
    assert calls == [("me/demo", False), (out, "me/demo", "Policy 1 of sd2")]
    assert result.output.endswith("pushed: there\n")
    assert 'load_lora_weights("me/demo"' in (out / "README.md").read_text()


PUSH = """
from pathlib import Path
from kto_ray.errors import UserError
from kto_ray.export.pushing import open_repository, push
try:
    {call}
except UserError as error:
    print(f"UserError: {{error}}")
"""


@pytest.mark.parametrize(
    ("call", "environment", "message"),
    [
        ('open_repository("me/demo")', {"HF_TOKEN": ""}, "401"),
        ('open_repository("closed/demo")', {}, "403"),
        ('open_repository("a/b/c")', {}, "Repo id must be"),
        ('open_repository("me/demo")', {"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
        ('open_repository("me/demo")', {"HF_HUB_OFFLINE": "1"}, "offline mode"),
        ('push(Path("{folder}"), "nobody/demo", "text")', {"HF_TOKEN": "wrong"}, "hf upload nobody/demo {folder}"),
    ],
)
def test_what_a_hub_does_not_take_is_a_clear_error(
    hub: Hub, call: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    hub.closed_to.add("closed/demo")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n")
    done = run_python(PUSH.format(call=call.format(folder=folder)), hub, tmp_path, **environment)
    assert done.stdout.startswith("UserError: --push: "), done.stdout + done.stderr
    assert message.format(folder=folder) in done.stdout


# -- on a base model with adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_adapters_of_the_base_model_are_merged_too_and_told_in_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where the card's code finds what it loads
    first = make_case(tmp_path / "first", "sdxl")
    file = first.export("diffusers", tmp_path / "adapter") / "pytorch_lora_weights.safetensors"
    case = make_case(tmp_path / "second", "sdxl", {"adapters": [{"name": str(file), "scale": 0.5}]}, kind=kind)
    assert case.difference(case.base) > 10 * ROUNDED

    merged = case.export("merged", tmp_path / "merged")
    assert case.off(case.load(merged, Model())) <= ROUNDED
    assert f"with `{file}` (x 0.5) in its weights" in (merged / "README.md").read_text()
    if kind == "lora":
        out = case.export("diffusers", tmp_path / "out")
        assert case.off(case.adapted(out)) == 0
        assert runs_to(case, (out / "README.md").read_text()) <= ROUNDED
