"""Encoded prompts: each once in a run, for drawing and for training, in equal rows whoever encoded them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kto_ray.config import Model, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.texts import Texts, texts_of
from kto_ray.storage import Storage
from kto_ray.train.worker import build_learner
from tests.tiny_models import write_model

CPU = torch.device("cpu")
PROMPTS = ["a red circle on black", "green", "a blue square"]


@pytest.fixture(scope="module", params=["sdxl", "qwen_image", "z_image", "lumina2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = write_model(tmp_path_factory.mktemp(request.param), request.param)
    return load_family(folder, Model(), CPU, torch.float32)


def same(one: Conditioning, other: Conditioning) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


def refuse() -> Family:
    raise AssertionError("nobody should have to encode")


def test_rows_are_the_familys_whatever_they_are_encoded_with(family: Family) -> None:
    texts = Texts(lambda: family)
    together = texts.encode(PROMPTS)
    assert len(together) == 3
    for index, prompt in enumerate(PROMPTS):
        alone = Texts(lambda: family).encode([prompt])
        assert same(alone, family.encode_prompts([prompt]))
        for name, tensor in alone.tensors.items():
            row = together.tensors[name][index : index + 1]
            assert torch.equal(row[:, : tensor.shape[1]] if tensor.dim() > 1 else row, tensor)
    assert same(texts.nothing(), family.nothing())


def test_a_damaged_file_is_encoded_and_kept_again(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Storage(str(tmp_path))
    sound = Texts(lambda: family, store).encode([PROMPTS[1]])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert same(Texts(lambda: family, store).encode([PROMPTS[1]]), sound)
    assert f"{file} is damaged" in caplog.text
    assert same(Texts(refuse, store).encode([PROMPTS[1]]), sound)


def test_a_text_is_encoded_once(family: Family) -> None:
    texts = Texts(lambda: family)
    first = texts.encode([*PROMPTS, PROMPTS[0]])
    assert texts.encoded == 3
    again = texts.encode([PROMPTS[2], PROMPTS[0]])
    texts.nothing()
    texts.nothing()
    assert texts.encoded == 4
    assert same(first[torch.tensor([2, 0])], again)


def test_what_one_process_encoded_others_read(family: Family, tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    made = Texts(lambda: family, store)
    expected, nothing = made.encode(PROMPTS), made.nothing()
    others = Texts(refuse, store)
    assert same(others.encode(PROMPTS), expected)
    assert same(others.nothing(), nothing)
    assert others.encoded == 0


def test_beyond_the_room_each_encodes_for_itself(family: Family, tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    Texts(lambda: family, store, room=0).encode(PROMPTS)
    assert not list(tmp_path.rglob("*.safetensors"))
    row = Texts(lambda: family).encode([PROMPTS[0]])
    Texts(lambda: family, store, room=1.5 * row.nbytes + 1000).encode(PROMPTS[:1] * 2 + PROMPTS[1:])
    assert len(list(tmp_path.rglob("*.safetensors"))) < 3


def test_memory_keeps_those_used_last(family: Family) -> None:
    texts = Texts(lambda: family, memory=1)
    texts.encode([PROMPTS[0]])
    texts.encode([PROMPTS[0]])
    assert texts.encoded == 1
    texts.encode([PROMPTS[1]])
    texts.encode([PROMPTS[0]])
    assert texts.encoded == 3


# -- in a run ---------------------------------------------------------------------------------------------------------


def config_of(folder: Path, **more: Any) -> RunConfig:
    return RunConfig.model_validate({"model": str(folder), "label": {"scorers": "shapes"}, **more})


def test_with_other_encoders_texts_are_others(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    components = source.component_digests(tiny_sd1_folder, Model())
    config = config_of(tiny_sd1_folder)

    def folders(config: RunConfig, components: dict[str, str]) -> set[Path]:
        family = load_family(tiny_sd1_folder, Model(), CPU, torch.float32)
        texts_of(config, Storage(str(tmp_path)), components, lambda: family).nothing()
        return set((tmp_path / "texts").iterdir())

    assert len(folders(config, components)) == 1
    assert len(folders(config, components | {"unet": "another"})) == 1
    assert len(folders(config, components | {"text_encoder": "another"})) == 2
    assert len(folders(config, components | {"tokenizer": "another"})) == 3
    assert len(folders(config_of(tiny_sd1_folder, generate={"dtype": "bfloat16"}), components)) == 4


def test_a_train_worker_holds_neither_encoders_nor_autoencoder(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    run, config = Storage(str(tmp_path)), config_of(tiny_sd1_folder)
    learner = build_learner(config, run)
    pipeline: Any = learner.family.pipeline
    assert (pipeline.vae, pipeline.text_encoder) == (None, None)
    # Nobody has drawn yet: it encodes for itself, and lets the encoders go.
    met = learner.texts.encode(PROMPTS)
    assert learner.texts.encoded == 3
    assert pipeline.text_encoder is None
    whole = load_family(tiny_sd1_folder, Model(), CPU, torch.float32)
    assert same(met, Texts(lambda: whole).encode(PROMPTS))

    again = build_learner(config, run)
    again.texts.encode(PROMPTS)
    assert again.texts.encoded == 0


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "flux2_klein", "qwen_image", "z_image", "sana", "lumina2"])
def test_every_family_loads_in_parts(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / name, name)
    encoders = load_family(folder, Model(), CPU, torch.float32, parts="encoders")
    lean = load_family(folder, Model(), CPU, torch.float32, 3.5, parts="denoiser")
    whole = load_family(folder, Model(), CPU, torch.float32, 3.5)
    text = encoders.encode_prompts([PROMPTS[0]])
    assert same(text, whole.encode_prompts([PROMPTS[0]]))
    assert same(encoders.nothing(), whole.nothing())
    side = 2 if name == "sana" else 8
    noisy = torch.randn(1, whole.geometry.channels, side, side, generator=torch.Generator().manual_seed(0))
    timesteps = whole.noise.timesteps(torch.tensor([0.5]))
    assert torch.equal(
        lean.predict(lean.denoiser, noisy, timesteps, text), whole.predict(whole.denoiser, noisy, timesteps, text)
    )
