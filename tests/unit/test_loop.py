"""What the loop decides by itself, without a cluster."""

import pytest

from kto_ray.config import Label
from kto_ray.errors import UserError
from kto_ray.loop import worth_training
from kto_ray.records import Verdict

YES, NO = Verdict("a", "desirable", "x", "y"), Verdict("b", "undesirable", "x", "y")


def test_a_round_of_both_classes_is_trained_on() -> None:
    assert worth_training(Label(), 0, [YES, NO])


@pytest.mark.parametrize("verdicts", [[YES], [NO], []])
def test_a_threshold_that_leaves_one_class_empty_stops_the_run(verdicts: list[Verdict]) -> None:
    with pytest.raises(UserError, match=r"round 3 .* one class only .* label\.threshold than 2 .*on_one_class=skip"):
        worth_training(Label(threshold=2), 3, verdicts)


def test_or_does_what_the_configuration_says() -> None:
    assert worth_training(Label(on_one_class="train"), 0, [YES])
    assert not worth_training(Label(on_one_class="skip"), 0, [YES])
