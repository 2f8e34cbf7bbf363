"""Fields that stand elsewhere now: refused by name in what a user writes, found in what an old run saved."""

import pytest
import yaml

from kto_ray.config import RunConfig, load, to_yaml
from kto_ray.config.moved import MOVED
from kto_ray.errors import UserError
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(UserError, match=f"{old}: is now {new}"):
        load("shapes_demo", [f"{old}=1"])


@pytest.mark.parametrize("new", MOVED.values())
def test_new_names_lead_to_a_field(new: str) -> None:
    value: object = RunConfig()
    for key in new.split("."):
        value = getattr(value, key)


def test_a_run_that_was_saved_before_the_move_still_opens(tmp_path: object) -> None:
    run = Storage(str(tmp_path))
    papers = "train.objective={kind: diffusion_kto, beta: 75}"
    tree = load("shapes_demo", [papers]).model_dump(mode="json")
    objective = tree["train"].pop("objective")
    for name in ("beta", "utility", "reference_point", "desirable_weight", "undesirable_weight"):
        tree["train"][name] = objective[name]
    tree["train"]["beta"] = 7.0
    run.write("config.yaml", yaml.safe_dump(tree).encode())
    assert saved_config(run) == load("shapes_demo", [papers, "train.objective.beta=7"])
    assert "beta: 7.0" in to_yaml(saved_config(run))
