"""Placements, chosen by what a run asks for and what a cluster has, or can have."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kto_ray import placement
from kto_ray.config import Resources, RunConfig, from_tree
from kto_ray.errors import UserError
from kto_ray.placement import Machines, Room, choose, require_one_a_card

GPU = {"num_cpus": 1, "num_gpus": 1}
UNKNOWN = Room(float("inf"), float("inf"))


def make(placement: str | None = None, generate: Any = None, train: Any = None, scorer: Any = None) -> RunConfig:
    return from_tree(
        {
            "cluster": {"placement": placement},
            "generate": {"resources": GPU, **(generate or {})},
            "train": {"resources": GPU, **(train or {})},
            "label": {"scorers": {"shapes": {"resources": {"num_cpus": 0.5}, **(scorer or {})}}},
        }
    )


def own(cpus: float, gpus: float) -> Machines:
    """Of a cluster that has so much, and will never have more."""
    room = Room(cpus, gpus)
    return Machines(room, room, room)


def test_each_role_has_its_own_where_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    config = make()
    chosen = choose(config, own(4, 2))
    assert (chosen.kind, chosen.by_turns, chosen.replicas) == ("separate", False, (1, 1))
    assert (chosen.generator, chosen.train_worker) == (config.generate.resources, config.train.resources)
    assert not caplog.text


def test_where_gpus_are_scarce_roles_share_them_by_turns_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose(make(), own(4, 1))
    assert chosen.by_turns
    assert "all roles at once would take 2.5 CPU and 2 GPU, and the cluster can have at most 4 CPU and 1 GPU" in (
        caplog.text
    )


def test_a_word_of_the_configuration_wins() -> None:
    assert choose(make("colocated"), own(8, 4)).by_turns
    assert choose(make("elastic"), own(8, 4)).kind == "elastic"
    with pytest.raises(UserError, match=r"by turns .* they need 1.5 CPU and 1 GPU, which fits"):
        choose(make("separate"), own(4, 1))


@pytest.mark.parametrize("kind", [None, "separate", "colocated", "elastic"])
def test_what_can_never_fit_is_refused_with_the_numbers(kind: str | None) -> None:
    with pytest.raises(
        UserError, match=r"takes at least .* GPU .*at most 4 CPU and 1 GPU: [23] GPU of 1 are asked for"
    ):
        choose(make(kind, train={"workers": 2}), own(4, 1))


def test_an_actor_that_is_too_large_for_every_node_is_refused() -> None:
    machines = Machines(Room(8, 8), Room(8, 8), Room(2, 1))
    with pytest.raises(UserError, match=r"train.resources: a train worker asks for 4 CPU of 2 that the largest node"):
        choose(make(train={"resources": {"num_cpus": 4, "num_gpus": 1}}), machines)


def test_what_may_still_come_is_waited_for_and_said(caplog: pytest.LogCaptureFixture) -> None:
    machines = Machines(Room(4, 0), Room(16, 4), Room(4, 1))
    assert choose(make(), machines).kind == "separate"
    assert "the cluster has 4 CPU and 0 GPU, and the run takes at least 2.5 CPU and 2 GPU: it waits" in caplog.text


def test_nodes_may_join_a_cluster_that_nobody_scales() -> None:
    machines = Machines(Room(1, 0), UNKNOWN, UNKNOWN)
    assert choose(make(), machines).kind == "separate"
    scarce = Machines(Room(4, 1), UNKNOWN, UNKNOWN)
    assert choose(make(), scarce).by_turns


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_shares_leave_room_on_every_card_for_one_train_worker_and_no_second(gpus: int) -> None:
    generate = {"max_replicas": 20, "resources": {"num_cpus": 1, "num_gpus": 0.75}}
    scorer = {"resources": {"num_cpus": 0.5, "num_gpus": 0.25}, "min_actors": gpus, "max_actors": 2 * gpus}
    chosen = choose(make("colocated", generate, {"workers": gpus}, scorer), own(64, gpus))
    assert chosen.replicas == (gpus, gpus)  # of the 20, those that have room in a turn
    assert chosen.most_actors == {"shapes": gpus}
    worker = chosen.train_worker.num_gpus
    others = gpus * (chosen.generator.num_gpus + chosen.scorers["shapes"].num_gpus)
    assert 2 * worker > 1
    assert worker + others <= 1  # also if all of them came to lie on one card
    for share in (worker, chosen.generator.num_gpus, chosen.scorers["shapes"].num_gpus):
        assert share == round(share, 4) > 0


@pytest.mark.parametrize(("cards", "share", "replicas"), [(1, 1, 1), (8, 1, 8), (8, 0.75, 8), (4, 0.5, 8), (0, 1, 1)])
def test_no_node_gets_more_replicas_than_its_cards_take(cards: int, share: float, replicas: int) -> None:
    machines = Machines(Room(64, 8), UNKNOWN, UNKNOWN, cards)
    generate = {"max_replicas": 16, "resources": {"num_gpus": share}}
    assert choose(make("colocated", generate), machines).per_node == replicas
    assert choose(make("separate", generate), machines).per_node is None


def test_cpus_are_shared_too_where_they_are_scarce() -> None:
    chosen = choose(make("colocated"), own(2, 1))
    booked = chosen.generator.num_cpus + chosen.scorers["shapes"].num_cpus + chosen.train_worker.num_cpus
    assert 1.4 < booked <= 1.5
    generous = choose(make("colocated"), own(4, 1))
    assert (generous.generator.num_cpus, generous.train_worker.num_cpus) == (1, 1)


def test_who_shares_a_card_by_turns_has_one_at_most() -> None:
    with pytest.raises(UserError, match=r"generate.resources.num_gpus: 2, but where roles share cards by turns"):
        choose(make("colocated", {"resources": {"num_gpus": 2}}), own(8, 4))


@pytest.mark.parametrize(
    ("workers", "gpus", "device", "refused"),
    [
        *[(2, 0.5, "auto", True), (4, 0.25, "cuda", True), (1, 0.5, "auto", False), (2, 0.6, "auto", False)],
        *[(2, 1, "auto", False), (2, 0, "auto", False), (2, 0.5, "cpu", False)],
    ],
)
def test_two_train_workers_never_share_a_card(workers: int, gpus: float, device: str, refused: bool) -> None:
    train = {"workers": workers, "device": device, "resources": {"num_gpus": gpus}}
    if refused:
        with pytest.raises(UserError, match="two workers could get the same card"):
            require_one_a_card(make(train=train))
    else:
        require_one_a_card(make(train=train))


def test_no_replicas_at_all_are_for_a_loop_that_brings_them_back() -> None:
    assert choose(make("elastic", {"min_replicas": 0}), own(4, 2)).replicas == (0, 1)
    with pytest.raises(UserError, match=r"generate.min_replicas \(0\) is for cluster.placement: elastic"):
        make("separate", {"min_replicas": 0})


def test_the_most_that_an_autoscaler_may_start() -> None:
    sizes, counts = [8.0, 1.0, 0.0], [2, 5, 100]
    assert placement._most(sizes, counts, 100) == 21
    assert placement._most(sizes, counts, 3) == 17
    assert placement._most(sizes, counts, float("inf")) == 21


def test_the_autoscaler_is_found_by_what_it_was_started_with(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(json.dumps({"available_node_types": {"gpu": {"max_workers": 2}}}))
    words = [f"--autoscaling-config={config}", "--gcs-address=10.0.0.1:61234"]
    wait = [sys.executable, "-c", "input()", *words]
    with subprocess.Popen(wait, stdin=subprocess.PIPE) as process:
        found = placement._read_autoscaling("head.of.cluster:61234")
        assert placement._read_autoscaling("head.of.cluster:6123") is None
        process.communicate(b"\n")
    assert found == {"available_node_types": {"gpu": {"max_workers": 2}}, "max_workers": float("inf")}
    assert placement._read_autoscaling("head.of.cluster:61234") is None


def test_resources_say_what_they_are() -> None:
    demand = placement.Demand("generator", "generate", Resources(num_cpus=0.5, num_gpus=1), 2)
    assert str(demand) == "2 x generator (0.5 CPU and 1 GPU)"
