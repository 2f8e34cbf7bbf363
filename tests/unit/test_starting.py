"""Runs that begin with a policy of another run: their base model is what that policy was, to the bit that it draws."""

from pathlib import Path

import pytest
import torch

from kto_ray.config import RunConfig, load, to_yaml
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.starting import kept, started
from kto_ray.storage import Storage

CPU = torch.device("cpu")


def settings(tmp_path: Path, model: Path, run: str, *more: str) -> RunConfig:
    return load("shapes_demo", [f"run={run}", f"runs_folder={tmp_path}", f"model={model}", *more])


def trained(tmp_path: Path, model: Path, run: str = "first", versions: int = 2, *more: str) -> Storage:
    """A run that has published some policies, made of random adapters with a scale of their own."""
    config = kept_config(settings(tmp_path, model, run, "train.adapter={rank: 2, alpha: 6}", *more))
    folder = Storage(str(tmp_path / run))
    folder.write("config.yaml", to_yaml(config).encode())
    base = source.resolve(config.model)
    digests = source.reference_digest(base, config.model), source.component_digests(base, config.model)
    PolicyStore(folder).publish_base(*digests)
    for version in range(1, versions + 1):
        policy = make_policy(load_family(base, config.model, CPU, torch.float32), config.train.adapter)
        torch.manual_seed(version)
        tensors = {name: torch.randn_like(tensor) * 0.1 for name, tensor in policy.tensors().items()}
        PolicyStore(folder).publish(version, tensors, policy.metadata())
    return folder


def kept_config(config: RunConfig) -> RunConfig:
    return kept(config, Storage(config.runs_folder) / config.run)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Of the base model's denoiser."""
    family = load_family(source.resolve(config.model), config.model, CPU, torch.float64)
    return dict(family.denoiser.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("named", ["@1", ""])
def test_the_policy_is_in_the_base_models_weights(tmp_path: Path, tiny_sd1_folder: Path, named: str) -> None:
    origin = trained(tmp_path, tiny_sd1_folder)
    given = settings(tmp_path, tiny_sd1_folder, "second", f"start_from={origin}{named}")
    found, store = weights(started(given)), PolicyStore(origin)
    tensors = store.load(store.resolve(int(named[1:] or 2)))
    assert tensors is not None
    base = weights(settings(tmp_path, tiny_sd1_folder, "first"))
    changed = 0
    for name, weight in base.items():
        module = f"unet.{name.removesuffix('.weight')}"
        expected = weight
        if f"{module}.lora_A.weight" in tensors:
            changed += 1
            down, up = (tensors[f"{module}.lora_{half}.weight"].double() for half in "AB")
            expected = weight + 6 / 2 * up @ down
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
    assert changed == len(tensors) // 2 > 0


def test_a_run_keeps_what_it_began_with_whatever_becomes_of_the_other(tmp_path: Path, tiny_sd1_folder: Path) -> None:
    origin = trained(tmp_path, tiny_sd1_folder)
    given = settings(tmp_path, tiny_sd1_folder, "second", f"start_from={origin}")
    before = started(given)
    config = kept_config(given)
    digests = [source.component_digests(tiny_sd1_folder, one.model) for one in (before, config)]
    assert digests[0] == digests[1] != source.component_digests(tiny_sd1_folder, given.model)
    assert str(tmp_path / "second") in config.model.adapters[-1].name

    policy = make_policy(load_family(tiny_sd1_folder, given.model, CPU, torch.float32), given.train.adapter)
    PolicyStore(origin).publish(3, policy.tensors(), policy.metadata())
    assert started(given) == kept_config(given) == config
    origin.delete("config.yaml")
    assert started(given) == config


def test_what_is_written_down_is_what_was_copied(
    tmp_path: Path, tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the earlier run publishes in the moment in which its newest policy is asked for."""
    origin = trained(tmp_path, tiny_sd1_folder)
    given = settings(tmp_path, tiny_sd1_folder, "second", f"start_from={origin}")
    versions = iter((1, 2, 2, 2))
    monkeypatch.setattr(PolicyStore, "newest", lambda _: next(versions))
    (file,) = (adapter.name for adapter in kept_config(given).model.adapters)
    began = Storage(str(tmp_path / "second")).read_json("start.json")
    assert began["policy"] == 1
    assert began["digest"] == PolicyStore(origin).resolve(1).digest
    assert began["digest"] in file


def test_what_began_with_a_policy_can_be_begun_with_in_turn(tmp_path: Path, tiny_sd1_folder: Path) -> None:
    first = trained(tmp_path, tiny_sd1_folder)
    second = trained(tmp_path, tiny_sd1_folder, "second", 1, f"start_from={first}@1")
    third = kept_config(settings(tmp_path, tiny_sd1_folder, "third", f"start_from={second}"))
    assert len(third.model.adapters) == 2
    assert all(str(tmp_path / "third") in adapter.name for adapter in third.model.adapters)
    sources = [(first, 1), (second, 1)]
    for adapter, (run, version) in zip(third.model.adapters, sources, strict=True):
        assert PolicyStore(run).resolve(version).digest in adapter.name


def test_on_storage_it_is_fetched(tmp_path: Path, tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTO_RAY_CACHE", str(tmp_path / "cache"))
    origin = trained(tmp_path, tiny_sd1_folder)
    given = settings(tmp_path, tiny_sd1_folder, "second", f"start_from={origin}")
    remote = given.model_copy(update={"runs_folder": "memory://starting"})
    config = kept_config(remote)
    assert config.model.adapters[-1].name.startswith("memory://starting/second/start/")
    digests = [source.component_digests(tiny_sd1_folder, one.model) for one in (started(given), config)]
    assert digests[0] == digests[1]
    missing = config.model.adapters[-1].model_copy(update={"name": "memory://starting/none.safetensors"})
    with pytest.raises(UserError, match="there is no file memory://starting/none"):
        source.component_digests(tiny_sd1_folder, config.model.model_copy(update={"adapters": (missing,)}))


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path, tiny_sd1_folder: Path, tiny_sd2_folder: Path) -> None:
    origin = trained(tmp_path, tiny_sd1_folder)

    def refusal(model: Path, start_from: object) -> str:
        with pytest.raises(UserError) as told:
            started(settings(tmp_path, model, "second", f"start_from={start_from}"))
        return str(told.value)

    assert "is not a run folder" in refusal(tiny_sd1_folder, tmp_path / "none")
    assert "has no policy 7; its newest is 2" in refusal(tiny_sd1_folder, f"{origin}@7")
    assert "policy 0 of" in refusal(tiny_sd1_folder, f"{origin}@0")
    assert "adapters of another model" in refusal(tiny_sd2_folder, origin)
    file = tmp_path / "first/policies/00001/policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "policy 1 of" in refusal(tiny_sd1_folder, f"{origin}@1")
    origin.delete("policies/00001/policy.safetensors")
    assert "has no weights any more" in refusal(tiny_sd1_folder, f"{origin}@1")
    whole = settings(tmp_path, tiny_sd1_folder, "first", "train.adapter.kind=full")
    origin.write("config.yaml", to_yaml(whole).encode())
    assert "--to merged" in refusal(tiny_sd1_folder, origin)
