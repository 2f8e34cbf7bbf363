"""`kto-ray plan` against figures that were worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kto_ray.cli import main
from kto_ray.config import RunConfig, load, to_yaml
from kto_ray.errors import UserError
from kto_ray.planning.node_types import Fleet, NodeType, read_cluster, read_nodes
from kto_ray.planning.packing import Node, Role, pack, roles_of
from kto_ray.planning.plan import RunPlan, make_plan
from kto_ray.planning.speeds import Speeds, measured
from kto_ray.storage import Storage

ROOT = Path(__file__).parents[2]
KITS = [
    ROOT / "cluster.yaml",
    *(ROOT / "deploy" / f"{name}.yaml" for name in ("gcp", "kuberay_cluster", "kuberay_job")),
]

HEAD = NodeType("head", 0, 0, 1, 1)
GPU = NodeType("gpu", 8, 1, 0, 8)
CPU = NodeType("cpu", 8, 0, 0, 4)
FLEET = Fleet([HEAD, GPU, CPU], 13)


def config(*overrides: str) -> RunConfig:
    """100 images a round in batches of 10, 0.75 + 0.25 of a card to draw and score, a card to train."""
    return load(
        None,
        [
            *("rounds=10", "generate.images_per_round=100", "generate.batch_size=10", "generate.max_replicas=4"),
            "generate.resources={num_cpus: 1, num_gpus: 0.75}",
            "label.scorers={taste: {scorer: redness, max_actors: 1, resources: {num_cpus: 1, num_gpus: 0.25}}}",
            *("train.resources={num_cpus: 2, num_gpus: 1}", "train.global_batch=50", "train.micro_batch=50"),
            *("train.epochs=2", "evaluate.every=5", "evaluate.images_per_prompt=5"),
            *overrides,
        ],
    )


def planned(*overrides: str, fleet: Fleet = FLEET, speeds: Speeds | None = None, **more: Any) -> RunPlan:
    return make_plan(config(*overrides), fleet, speeds or Speeds(2, 5, {"taste": 4}), 8, **more)


# -- time and idleness ------------------------------------------------------------------------------------------------


def test_a_round_and_a_run_take_what_they_do_on_paper() -> None:
    plan = planned()
    assert plan.draw_s == 15  # ten batches by four replicas: three turns of ten images at 2 a second
    assert plan.label_s == 10  # 100 images at 4 a second are 25 s, of which 15 are hidden
    assert plan.train_s == 40  # two epochs of 100 images are 4 steps of 50, at 5 a second
    assert plan.evaluate_s == 5  # 40 images are four batches, one for each replica
    assert plan.evaluations == 3  # the base, policy 5 and policy 10
    assert plan.total_s == 10 * (15 + 10 + 40) + 3 * 5


def test_idle_is_what_is_left_of_the_run() -> None:
    plan = planned()
    idle = {busy.role.name: busy.idle(plan.total_s) for busy in plan.roles}
    assert idle == pytest.approx(
        {
            "generator": 1 - (10 * 15 + 3 * 5) / 665,
            "scorer taste": 1 - (10 * 100 + 3 * 40) / 4 / 665,
            "train worker": 1 - 400 / 665,
        }
    )
    assert plan.gpu_hours == pytest.approx((4 * 0.75 + 0.25 + 1) * 665 / 3600)
    assert plan.working_gpu_hours == pytest.approx((3 * 165 + 0.25 * 280 + 400) / 3600)


def test_rounds_overlap_where_policies_may_lag() -> None:
    plan = planned("max_policy_lag=1")
    assert plan.total_s == 25 + 9 * max(25, 40) + 40 + 3 * 5


def test_a_scorer_that_keeps_up_costs_its_last_batch() -> None:
    assert planned(speeds=Speeds(2, 5, {"taste": 20})).label_s == 10 / 20


def test_a_scorer_of_no_known_speed_is_taken_to_keep_up() -> None:
    plan = planned(speeds=Speeds(2, 5))
    assert (plan.label_s, plan.unknown) == (0, ["taste"])
    assert next(busy for busy in plan.roles if busy.role.name == "scorer taste").idle(plan.total_s) is None


def test_held_out_images_cost_their_own_steps_and_fresh_seeds_count() -> None:
    plan = planned("generate.steps=20", "evaluate.generate.steps=40", "evaluate.stop_at_pass_rate=0.9")
    assert plan.evaluate_s == 10
    assert plan.evaluations == 5


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_nodes_from_the_least_to_the_most() -> None:
    plan = planned()
    assert plan.least == {"head": 1, "gpu": 2}  # generator and scorer share a card, the train worker has one
    assert plan.most == {"head": 1, "gpu": 5}
    assert {busy.role.name: (busy.least, busy.most) for busy in plan.roles} == {
        "generator": (1, 4),
        "scorer taste": (1, 1),
        "train worker": (1, 1),
    }


def test_replicas_are_as_many_as_find_a_place() -> None:
    plan = planned(fleet=Fleet([HEAD, GPU], 4))
    assert plan.most == {"head": 1, "gpu": 3}
    assert plan.roles[0].most == 2
    assert plan.draw_s == 25  # ten batches by two


def test_what_needs_no_card_goes_where_there_are_none() -> None:
    roles = [Role("scorer", "label.scorers.one", config().label.scorers["taste"].resources, 1, 1)]
    without = roles[0].resources.model_copy(update={"num_gpus": 0, "num_cpus": 8})
    _, most = pack(FLEET, [Role("scorer", "label.scorers.one", without, 1, 2)])
    assert most.counts() == {"head": 1, "cpu": 2}
    _, most = pack(FLEET, roles)
    assert most.counts() == {"head": 1, "gpu": 1}


def test_parts_of_a_card_are_parts_of_one_card() -> None:
    (generator, _), _ = roles_of(config())
    node = Node(NodeType("two", 64, 2, 0, 1))
    assert [node.take(generator) for _ in range(3)] == [True, True, False]  # though half a card is free in all


def test_ten_tenths_of_a_card_are_a_card() -> None:
    share = config().generate.resources.model_copy(update={"num_gpus": 0.1})
    node = Node(NodeType("one", 64, 1, 0, 1))
    assert [node.take(Role("generator", "generate", share, 1, 1)) for _ in range(11)] == [True] * 10 + [False]


def test_what_no_node_has_is_refused() -> None:
    expected = (
        r"train\.resources: a train worker asks for 2 CPU and 2 GPU, and no kind of node has that: "
        r"head \(0 CPU; at most 1\); gpu \(8 CPU, 1 GPU; at most 8\); cpu \(8 CPU; at most 4\); ask for less"
    )
    with pytest.raises(UserError, match=expected):
        planned("train.resources.num_gpus=2")


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    expected = (
        r"at least 1 x generator of 1 CPU and 0\.75 GPU, 1 x scorer taste of 1 CPU and 0\.25 GPU, 4 x train worker of "
        r"2 CPU and 1 GPU are there at the same time, and only 3 of 4 x train worker find a place on "
        r"gpu \(8 CPU, 1 GPU; at most 3\), 3 nodes in all"
    )
    with pytest.raises(UserError, match=expected):
        planned("train.workers=4", "train.global_batch=200", fleet=Fleet([NodeType("gpu", 8, 1, 0, 3)], 3))


def test_one_card_is_enough_by_turns() -> None:
    one = read_nodes(["1x8CPU,1GPU"])
    with pytest.raises(UserError, match=r"by turns \(cluster\.placement=colocated\) the roles fit"):
        planned(fleet=one)
    plan = planned(fleet=one, kind="colocated")
    assert plan.least == plan.most == {"1x8CPU,1GPU": 1}
    assert plan.roles[0].most == 1
    assert plan.draw_s == 50
    assert plan.gpu_hours == pytest.approx(plan.total_s / 3600)


def test_roles_that_take_turns_cannot_overlap() -> None:
    with pytest.raises(UserError, match="max_policy_lag"):
        planned("max_policy_lag=1", kind="colocated")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KITS, ids=lambda path: path.name)
def test_kits_are_read(path: Path) -> None:
    fleet = read_cluster(path)
    head, gpu, cpu = fleet.types
    assert (head.cpus, head.gpus, head.least, head.most) == (0, 0, 1, 1)
    assert (gpu, cpu) == (GPU, CPU)
    assert fleet.most == 13


def test_machines_of_ones_own_are_read() -> None:
    assert read_cluster(ROOT / "deploy" / "on_prem.yaml") == Fleet([NodeType("worker", 32, 4, 2, 2)], 2)


def test_nodes_are_read() -> None:
    fleet = read_nodes(["2x32CPU,4GPU", "1x16CPU"])
    assert fleet.types == [NodeType("2x32CPU,4GPU", 32, 4, 2, 2), NodeType("1x16CPU", 16, 0, 1, 1)]
    with pytest.raises(UserError, match="2x32CPU,4GPU"):
        read_nodes(["32 CPUs"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "Pod"}, "neither a cluster file of Ray"),
        ({"provider": {"type": "aws"}}, "available_node_types says"),
        ({"provider": {"type": "local", "worker_ips": ["10.0.0.1"]}}, "worker_resources"),
        ({"kind": "RayCluster", "spec": {}}, "'headGroupSpec' is missing"),
        (
            {"provider": {"type": "aws"}, "head_node_type": "a", "available_node_types": {"a": {"resources": {}}}},
            r"available_node_types\.a\.resources is empty",
        ),
        (
            {"provider": {}, "max_workers": 1, "available_node_types": {"a": {"resources": {"CPU": "8"}}}},
            "CPU and GPU are whole numbers",
        ),
    ],
)
def test_a_file_that_does_not_say_it_is_refused(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        read_cluster(path)


# -- speeds -----------------------------------------------------------------------------------------------------------


def finished(folder: Path, *overrides: str) -> Storage:
    """A run of three rounds, the first of which was slow."""
    run = Storage(str(folder / "old"))
    run.write("config.yaml", to_yaml(config("train.workers=2", "train.micro_batch=25", *overrides)).encode())
    verdicts = {"kind": "round", "desirable": 40, "undesirable": 35}
    seconds = {"seconds/generate": 20.0, "busy/generate": 50.0, "seconds/label": 4.0, "seconds/train": 30.0}
    seconds |= {"seconds/load": 1.0, "seconds/round": 57.0}
    slow = {name: 10 * value for name, value in seconds.items()}
    rows = [{"kind": "evaluation", "step": 0}, verdicts | slow, verdicts | seconds, verdicts | seconds]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return run


def test_speeds_are_those_of_the_warm_rounds(tmp_path: Path) -> None:
    speeds = measured(finished(tmp_path))
    assert speeds.images_per_s == 2  # 100 images in 50 s of a replica
    assert speeds.samples_per_s == 2.5  # 75 verdicts twice are 3 steps of 50, by two workers in 30 s
    assert speeds.label_s == 4
    assert speeds.other_s == 3  # of 57 s 20 to draw, 4 to label, 30 to train


def test_where_rounds_overlapped_the_rest_is_what_loading_took(tmp_path: Path) -> None:
    assert measured(finished(tmp_path, "max_policy_lag=1")).other_s == 1


def test_a_run_that_has_not_trained_has_no_speeds(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"--speeds: .* is not a run folder"):
        measured(run)
    run.write("config.yaml", to_yaml(config()).encode())
    with pytest.raises(UserError, match="no round that it drew and trained on"):
        measured(run)


# -- the command ------------------------------------------------------------------------------------------------------


def said(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments], terminal_width=200)
    assert result.exit_code == status, result.output
    return result.output


def test_the_command_says_nodes_hours_and_what_idles(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(config()))
    stated = ["--images-per-s", "2", "--samples-per-s", "5", "--scores-per-s", "taste=4"]
    output = said(
        str(recipe), "evaluate.max_prompts=8", "--cluster", str(ROOT / "cluster.yaml"), *stated, "--gpu", "24"
    )
    assert "nodes: 1 x head, 2 to 5 x gpu" in output
    assert "100 images drawn in 15 s, labeled 10 s later, trained on in 40 s" in output
    assert "10 rounds and 3 evaluations of 5 s: 0.2 hours" in output
    assert "75%" in output  # of a generator
    assert "a train worker holds" in output


def test_a_run_gives_speeds_and_what_is_stated_counts_more(tmp_path: Path) -> None:
    run = str(finished(tmp_path))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(config()))
    nodes = ["--nodes", "5x8CPU,1GPU"]
    assert "drawn in 15 s, labeled 4 s later, trained on in 80 s, 3 s for the rest" in said(
        str(recipe), *nodes, "--speeds", run
    )
    assert "drawn in 30 s" in said(str(recipe), *nodes, "--speeds", run, "--images-per-s", "1")


def test_a_card_that_is_too_small_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(config()))
    stated = ["--images-per-s", "2", "--samples-per-s", "5"]
    output = said(str(recipe), "--nodes", "5x8CPU,1GPU", *stated, "--gpu", "0.01", status=2)
    assert "error: generate.resources: a replica holds" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["shapes_demo", "--images-per-s", "2", "--samples-per-s", "5"],
        ["shapes_demo", "--nodes", "1x8CPU"],
        ["shapes_demo", "--nodes", "1x8CPU", "--images-per-s", "0", "--samples-per-s", "5"],
        ["shapes_demo", "--nodes", "1x8CPU", "--images-per-s", "2", "--samples-per-s", "5", "--scores-per-s", "it=1"],
    ],
)
def test_what_is_missing_is_said(arguments: list[str]) -> None:
    said(*arguments, status=2)
