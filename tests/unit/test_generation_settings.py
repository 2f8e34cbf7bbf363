"""How lean images are drawn, and held-out ones otherwise: what the configuration takes, and what comes of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kto_ray import preflight
from kto_ray.bake_off.plain_loop import PlainLoop
from kto_ray.config import Generate, Model, Otherwise, RunConfig, load, require_same
from kto_ray.diffusion.checks import check
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.memory import needs_of
from kto_ray.diffusion.sampling import draw, drawing_digest
from kto_ray.diffusion.texts import Texts
from kto_ray.errors import UserError
from kto_ray.generate.fitting import largest_batch
from tests.tiny_models import write_model

CPU = torch.device("cpu")
BASE = {"unet": "a", "vae": "b"}
LIKE_STABLE_DIFFUSION = ["generate.scheduler=null", "generate.steps=4", "generate.height=16", "generate.width=16"]


def config_of(*overrides: str) -> RunConfig:
    return load("shapes_demo", overrides)


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(config_of(f"model={folder}", *LIKE_STABLE_DIFFUSION, *overrides), folder)
    return str(caught.value)


# -- held-out images, drawn otherwise ----------------------------------------------------------------------------------


def test_held_out_images_are_drawn_as_those_of_rounds_unless_something_is_said() -> None:
    config = config_of("evaluate.generate.steps=33")
    for stage in ("evaluation", "fresh_evaluation"):
        assert config.drawn(stage) == config.generate.model_copy(update={"steps": 33})
    assert config.drawn("round-00000") == config.generate
    assert config_of().held_out == config_of().generate


def test_all_that_may_be_otherwise_is_a_field_of_generate_with_the_same_mark() -> None:
    for name, field in Otherwise.model_fields.items():
        marks = [mark for mark in field.metadata if type(mark).__name__ == "OnResume"]
        assert marks == [m for m in Generate.model_fields[name].metadata if type(m).__name__ == "OnResume"]


def test_the_digest_of_a_run_that_says_nothing_is_as_it_was() -> None:
    """Taken before held-out images could be drawn otherwise: replicas of old runs are still believed."""
    assert drawing_digest(RunConfig(), BASE) == "b043d7de7ed8ec1865829a9b2d39ad91e8f83ef80ebec8c7d4a5bf98aa3a13b4"
    assert drawing_digest(config_of("evaluate.generate.steps=33"), BASE) != drawing_digest(config_of(), BASE)
    same = config_of(f"evaluate.generate.steps={config_of().generate.steps}")
    assert drawing_digest(same, BASE) == drawing_digest(config_of(), BASE)


def test_only_what_differs_is_told_of_an_evaluation() -> None:
    config = config_of("generate.steps=8", "evaluate.generate.steps=33", "evaluate.generate.guidance_scale=2")
    assert config.generate.guidance_scale != 2
    assert config.held_out_otherwise == {"steps": 33, "guidance_scale": 2.0}


def test_what_cannot_be_drawn_is_refused_by_the_name_of_the_field(tiny_sd1_folder: Path) -> None:
    check(config_of(f"model={tiny_sd1_folder}", *LIKE_STABLE_DIFFUSION), tiny_sd1_folder)
    assert refusal(tiny_sd1_folder, "generate.steps=1001").startswith("generate.steps: 1001 is more than the 1000")
    for override, message in (
        ("steps=1001", "evaluate.generate.steps: 1001 is more than the 1000"),
        ("scheduler=DDIMSheduler", "evaluate.generate.scheduler: 'DDIMSheduler' is unknown to diffusers"),
    ):
        assert refusal(tiny_sd1_folder, f"evaluate.generate.{override}").startswith(message)


def test_a_run_goes_on_with_the_same_held_out_images_only() -> None:
    with pytest.raises(UserError, match=r"  evaluate\.generate\.steps: the run has None, this command says 33"):
        require_same(config_of("evaluate.generate.steps=33"), config_of())


@pytest.mark.parametrize(
    ("own", "now", "same"),
    [
        ("null", "PNDMScheduler", True),  # the pipeline's own
        ("DDIMScheduler", "DDIMScheduler", True),
        ("DDIMScheduler", "PNDMScheduler", False),
    ],
)
def test_a_scheduler_of_held_out_images_may_be_named_that_drew_them_all_along(own: str, now: str, same: bool) -> None:
    saved = config_of(f"generate.scheduler={own}")
    config = config_of(f"generate.scheduler={own}", f"evaluate.generate.scheduler={now}")
    named = preflight._named(config, saved, {"generate.scheduler": "PNDMScheduler"})
    assert ("evaluate.generate.scheduler" in named) == same
    if same:
        require_same(config, saved, same_content=named)


# -- the scheduler's arguments and timesteps ---------------------------------------------------------------------------


def test_what_the_scheduler_is_told_is_in_the_digest_when_something_is() -> None:
    for override in ("generate.scheduler_args={timestep_spacing: trailing}", "evaluate.generate.scheduler_args={a: 1}"):
        assert drawing_digest(config_of(override), BASE) != drawing_digest(config_of(), BASE)
    assert drawing_digest(config_of("generate.scheduler_args={}"), BASE) == drawing_digest(config_of(), BASE)
    ten = config_of("generate.steps=10")
    aligned = config_of("generate.steps=10", "generate.timesteps=align_your_steps")
    assert drawing_digest(aligned, BASE) != drawing_digest(ten, BASE)


def test_held_out_images_can_do_without_what_rounds_are_drawn_with() -> None:
    config = config_of(
        *("generate.steps=10", "generate.timesteps=align_your_steps", "generate.scheduler_args={a: 1}"),
        *("evaluate.generate.steps=50", "evaluate.generate.timesteps=own", "evaluate.generate.scheduler_args={}"),
    )
    assert (config.held_out.timesteps, config.held_out.scheduler_args) == (None, {})
    assert config.held_out_otherwise == {"steps": 50, "timesteps": None, "scheduler_args": {}}


@pytest.mark.parametrize("section", ["generate", "evaluate.generate"])
def test_scheduler_arguments_and_timesteps_are_checked(tiny_sd1_folder: Path, section: str) -> None:
    def refused(*fields: str) -> str:
        return refusal(tiny_sd1_folder, *(f"{section}.{field}" for field in fields))

    assert refused("scheduler_args={steps_ofset: 1}").startswith(
        f"{section}.scheduler_args: PNDMScheduler knows no 'steps_ofset', did you mean 'steps_offset'?"
    )
    assert "cannot draw in 4 steps" in refused("scheduler_args={timestep_spacing: sideways}")
    text = refused("steps=10", "timesteps=align_your_steps")  # PNDM has a spacing of its own
    assert text.startswith(
        f"{section}.timesteps: PNDMScheduler cannot be told its timesteps; give a {section}.scheduler"
    )
    assert "EulerDiscreteScheduler" in text
    assert "DDIMScheduler" not in text
    aligned = [f"{section}.steps=10", f"{section}.timesteps=align_your_steps"]
    can = [f"{section}.scheduler=DPMSolverMultistepScheduler"]
    check(config_of(f"model={tiny_sd1_folder}", *LIKE_STABLE_DIFFUSION, *aligned, *can), tiny_sd1_folder)


def test_aligned_steps_are_ten() -> None:
    with pytest.raises(UserError, match=r"generate\.timesteps: .* a schedule of 10 steps, and generate\.steps is 50"):
        config_of("generate.steps=50", "generate.timesteps=align_your_steps")
    with pytest.raises(UserError, match=r"evaluate\.generate\.steps is 50: give 10, .*timesteps=own"):
        config_of("generate.steps=10", "generate.timesteps=align_your_steps", "evaluate.generate.steps=50")


def test_other_families_have_no_aligned_steps(tmp_path: Path) -> None:
    text = refusal(write_model(tmp_path, "flux"), "generate.steps=10", "generate.timesteps=align_your_steps")
    assert text.startswith("generate.timesteps: align_your_steps was found for Stable Diffusion 1, 2 and XL")


@pytest.mark.parametrize(("name", "second"), [("sd1", 850), ("sdxl", 845)])
def test_a_model_is_drawn_at_the_aligned_timesteps_that_were_found_for_it(
    tmp_path: Path, name: str, second: int
) -> None:
    family = load_family(write_model(tmp_path, name), Model(), torch.device("cpu"), torch.float32)
    settings = Generate(scheduler="DPMSolverMultistepScheduler", steps=10, timesteps="align_your_steps")
    seen: list[int] = []
    with family.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1]))):
        draw(family, Texts(lambda: family), ["a red circle"], [1], settings)
    assert len(seen) == 10
    assert seen[:2] == [999, second]


# -- what needs a card -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["batch_size=auto", "offload=model", "offload=group"])
def test_what_makes_something_of_a_card_is_refused_without_one(field: str) -> None:
    name, value = field.split("=")
    for where in ([], ["generate.device=cpu", "generate.resources.num_gpus=1"]):
        with pytest.raises(UserError, match=rf"{name}: {value}.* replicas have none \(device: (auto|cpu), .*; give "):
            config_of(f"generate.{field}", *where)
    for where in ("generate.device=cuda", "generate.resources.num_gpus=0.5"):
        config_of(f"generate.{field}", where)


def test_layers_that_move_are_not_compiled() -> None:
    on_a_card = ["generate.resources.num_gpus=1", "generate.compile=true"]
    config_of(*on_a_card, "generate.offload=model")
    with pytest.raises(UserError, match=r"compile: true, but with offload: group"):
        config_of(*on_a_card, "generate.offload=group")


def test_a_batch_size_to_be_found_is_a_number_all_the_same() -> None:
    """So that whoever plans with it need not care; what a run saved is read again as it was."""
    config = config_of("generate.batch_size=auto", "generate.resources.num_gpus=1")
    assert (config.generate.batch_size, config.generate.find_batch_size) == (64, True)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert config_of("generate.batch_size=5").generate.find_batch_size is False


@pytest.mark.parametrize(
    ("room", "most", "found", "tried"),
    [
        (100, 64, 64, [1, 2, 4, 8, 16, 32, 64]),
        (100, 36, 32, [1, 2, 4, 8, 16, 32]),
        (7, 64, 4, [1, 2, 4, 8]),
        (1, 64, 1, [1, 2]),
    ],
)
def test_the_largest_batch_is_the_last_that_fits(room: int, most: int, found: int, tried: list[int]) -> None:
    asked: list[int] = []

    def draw_so_many(count: int) -> float:
        asked.append(count)
        if count > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5

    assert (largest_batch(draw_so_many, most), asked) == (found, tried)


def test_a_card_that_is_nearly_full_is_full() -> None:
    assert largest_batch(lambda count: 0.3 * count, 64) == 2
    assert largest_batch(lambda count: 0.225 * count, 64) == 4  # 90 % is not more than 90 %
    assert largest_batch(lambda _: 0.95, 64) == 1  # it was drawn


def test_a_card_without_room_for_one_image_is_told_of_and_other_errors_are_not_taken_for_it() -> None:
    def fails(error: Exception) -> Callable[[int], float]:
        def draw_so_many(_: int) -> float:
            raise error

        return draw_so_many

    with pytest.raises(UserError, match=r"generate\.batch_size: .* no room to draw a single image; give "):
        largest_batch(fails(torch.OutOfMemoryError("CUDA out of memory")), 64)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        largest_batch(fails(RuntimeError("an illegal memory access")), 64)


def test_a_replica_that_offloads_need_not_have_room_for_all_of_the_model(tiny_sd1_folder: Path) -> None:
    def held(*overrides: str) -> dict[str, int]:
        on_a_card = [f"model={tiny_sd1_folder}", "generate.resources.num_gpus=1", *overrides]
        return dict(needs_of(config_of(*on_a_card), tiny_sd1_folder)[0].parts)

    whole = held()
    assert whole.keys() == {"text_encoder", "unet", "vae", "adapters"}
    largest = max(whole, key=lambda name: whole[name])
    assert held("generate.offload=model") == {name: whole[name] for name in (largest, "adapters")}
    assert held("generate.offload=group") == {"vae": whole["vae"]}


# -- the loop without Ray ----------------------------------------------------------------------------------------------


def test_the_plain_loop_evaluates_with_the_settings_of_held_out_images() -> None:
    few = ["generate.images_per_round=12", "generate.steps=2", "evaluate.generate.steps=3", "evaluate.max_prompts=2"]
    loop = PlainLoop(config_of(*few, "generate.guidance_scale=1", "generate.batch_size=12"), threads=1)
    calls: list[int] = []
    with loop.learner.family.denoiser.register_forward_hook(lambda *_: calls.append(1)):
        loop.evaluate(0)
    assert len(calls) == 3
    with pytest.raises(UserError, match=r"generate\.batch_size: auto is found by a replica"):
        PlainLoop(config_of("generate.batch_size=auto", "generate.resources.num_gpus=1"))
