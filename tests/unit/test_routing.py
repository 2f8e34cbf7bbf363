"""Which images people are asked about: shares, the fence, disputes, and how many people an image needs."""

import math
from collections import Counter

import pytest

from kto_ray import config
from kto_ray.config import Labeling
from kto_ray.config.people import Human, Overlap, RouteDisagreement, RouteNearThreshold, RouteRandom
from kto_ray.errors import UserError
from kto_ray.label.judging import RoundVerdicts, judge_round
from kto_ray.people.routing import goes_to_people, needed, undecided
from kto_ray.records import Score

IDS = [f"round-00000-{place:03}" for place in range(400)]


def judged(label: Labeling, **values: list[float | None]) -> RoundVerdicts:
    scores = {
        sample_id: {
            name: Score(sample_id, name, "1", v[place], None if v[place] is not None else "no")
            for name, v in values.items()
        }
        for place, sample_id in enumerate(IDS[: len(next(iter(values.values())))])
    }
    return judge_round(label, scores, dict.fromkeys(scores, "p"), None)


def test_all_images_go_to_people_unless_told_otherwise() -> None:
    assert all(goes_to_people(Human(), sample_id) for sample_id in IDS)


def test_a_random_share_goes_to_people_and_a_restart_changes_nothing() -> None:
    human = Human(route=RouteRandom(share=0.25))
    chosen = [sample_id for sample_id in IDS if goes_to_people(human, sample_id)]
    assert len(chosen) == pytest.approx(100, abs=35)
    assert chosen == [sample_id for sample_id in IDS if goes_to_people(human, sample_id)]
    assert set(chosen) <= {s for s in IDS if goes_to_people(Human(route=RouteRandom(share=0.5)), s)}


def test_those_nearest_to_the_threshold_go_to_people() -> None:
    human = Human(route=RouteNearThreshold(share=0.25))
    assert goes_to_people(human, IDS[0]) is None
    label = Labeling(labeler="human", human=human, threshold=0.5)
    round_ = judged(label, shapes=[0.0, 0.45, 0.9, 0.56, None, 1.0, 0.2, 0.52])
    assert undecided(human, round_) == {IDS[1], IDS[7]}
    assert math.isnan(round_.margins[IDS[4]])
    assert round_.margins[IDS[1]] == pytest.approx(0.05)


def test_the_fence_of_a_dead_band_is_its_middle() -> None:
    label = Labeling.model_validate({"threshold": {"kind": "absolute", "value": 0.5, "dead_band": 0.2}})
    margins = judged(label, shapes=[0.5, 0.6, 0.9]).margins
    assert [margins[sample_id] for sample_id in IDS[:3]] == pytest.approx([0, 0.1, 0.4])


def test_what_scorers_dispute_goes_to_people_up_to_a_share() -> None:
    scorers = {"shapes": {"threshold": 0.5}, "redness": {"threshold": 10}}
    label = Labeling.model_validate({"scorers": scorers, "combine": "agreement"})
    round_ = judged(label, shapes=[1, 1, 0, 0, None], redness=[20, 0, 20, 0, 20])
    assert undecided(Human(route=RouteDisagreement()), round_) == {IDS[1], IDS[2]}
    assert len(undecided(Human(route=RouteDisagreement(share=0.2)), round_)) == 1
    # As votes go, that is all there is to say.
    assert undecided(Human(), round_) == set()


def test_a_share_of_the_images_needs_several_people() -> None:
    assert {needed(Human(), sample_id) for sample_id in IDS} == {1}
    assert {needed(Human(overlap=Overlap(labels=3)), sample_id) for sample_id in IDS} == {3}
    counts = Counter(needed(Human(overlap=Overlap(labels=2, share=0.3)), sample_id) for sample_id in IDS)
    assert counts[2] == pytest.approx(120, abs=40)
    assert counts.total() == counts[1] + counts[2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["label.human.route=near_treshold"],
            "label.human.route: unknown kind 'near_treshold', did you mean 'near_threshold'",
        ),
        (["label.human.route={kind: random, share: 1.5}"], "label.human.route.share: .* less than 1"),
        (["label.human.route={kind: random, part: 0.5}"], "unknown field 'label.human.route.part'"),
        (["label.human.gold.share=0"], "label.human.gold.share: .* greater than 0"),
        (["label.human.lease_s=0"], "label.human.lease_s: .* greater than 0"),
        (["label.human.port=0"], "label.human.port: "),
        (["label.human.labelers=[ann, ann]"], "must differ from each other"),
        (["label.human.labelers=[operator]"], "'operator' is the name of whoever runs this"),
        (["label.human.on_deadline=scorers"], "label.human.on_deadline: .*'train', 'scorer' or 'wait'"),
        (["label.human.min_label=3"], "unknown field 'label.human.min_label', did you mean 'min_labels'"),
        (["label.labeler=human", "label.human.route=disagreement"], "disagreement needs scorers that vote"),
        (
            ["label.labeler=human", "label.scorers.shapes.held_out=true", "label.human.on_deadline=scorer"],
            "on_deadline: scorer needs a scorer that is not held_out",
        ),
        (
            ["label.labeler=human", "label.scorers.shapes.held_out=true", "label.human.route=random"],
            "random leaves the rest to scorers",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.load("shapes_demo", overrides)
