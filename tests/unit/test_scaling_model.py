"""`benchmarks/scaling_model.py`: its ceilings are those on paper, and it stands where something was measured."""

import pytest

from benchmarks import scaling_model
from benchmarks.scaling_model import Costs, Measured

DOCUMENT = """
### Storage of a round

| images, storage | MB that must move | bytes | replicas, s | driver, s |
| --- | ---: | ---: | ---: | ---: |
| 512 of 64 x 64, local | 7 | 1.14x, 1.38x | 0.59 | 0.07 |
| 512 of 64 x 64, s3 | 7 | 1.14x, 1.38x | 1.54 | 0.96 |
| 512 of 512 x 512, local | 470 | 0.69x, 0.71x | 1.82 | 0.06 |

### Through one driver

| replicas x pixels | images/s | driver CPU, ms an image | longest stall, ms |
| --- | ---: | ---: | ---: |
| 1 x 64 | 1564 | 0.46 | 0 |
| 8 x 64 | 1583 | 0.45 | 0 |
| 64 x 64 | 562 | 0.65 | 0 |
| 1 x 512 | 270 | 0.74 | 0 |
| 8 x 512 | 353 | 0.72 | 0 |

### People answering over HTTP

| labelers | answers/s | lowest - highest |
| --- | ---: | ---: |
| 8, closed loop, SQLite | 67 | 64 - 71 |
| 8, closed loop, PostgreSQL | 56 | 52 - 58 |
| 32, human pace, SQLite | 29 | 29 - 29 |
"""


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.read(DOCUMENT)


def test_what_was_measured_is_read_from_the_tables(measured: Measured) -> None:
    assert measured.images_per_s[8, 512] == 353
    assert measured.driver_ms[1, 64] == 0.46
    assert measured.stored_ms == {64: pytest.approx(1.152, abs=1e-3), 512: pytest.approx(3.555, abs=1e-3)}
    assert measured.answers_per_s == {(8, False): 67, (32, True): 29}
    with pytest.raises(ValueError, match="Through one driver"):
        Measured.read("### Another table\n")


def test_the_benchmarks_document_has_the_tables() -> None:
    costs = Costs.of(Measured.read((scaling_model.DOCS / "benchmarks.md").read_text()))
    assert min(costs.batch_ms, costs.image_ms, costs.idle_core) > 0


def test_costs_are_those_on_paper(measured: Measured) -> None:
    costs = Costs.of(measured)
    assert costs.batch_ms == pytest.approx((0.72 - 0.45) / (1 / 16 - 1 / 32))  # 8.64
    assert costs.image_ms == pytest.approx(0.45 - costs.batch_ms / 32)
    assert (2 - 64 * costs.idle_core) / (2 - costs.idle_core) == pytest.approx(562 / 1564)
    assert 1000 * costs.driver_s(8) == pytest.approx(8.64 + 8 * 0.18)


def test_replicas_draw_what_they_can_while_the_driver_has_time() -> None:
    found = scaling_model.draw(20, 8, draw_s=4.0, driver_s=0.01, seconds=120)
    assert found.images_per_s == pytest.approx(40, rel=0.05)
    assert found.driver == pytest.approx(0.05, rel=0.05)
    assert found.idle == pytest.approx(0, abs=0.05)


def test_a_driver_that_is_full_is_the_ceiling() -> None:
    found = scaling_model.draw(400, 8, draw_s=4.0, driver_s=0.02, seconds=60)  # 800 images/s asked of 400
    assert found.images_per_s == pytest.approx(400, rel=0.02)
    assert found.driver == pytest.approx(1, rel=0.02)
    assert found.idle == pytest.approx(0.5, abs=0.02)


def test_two_drivers_lift_it() -> None:
    found = scaling_model.draw(400, 8, draw_s=4.0, driver_s=0.02, drivers=2, seconds=60)
    assert found.images_per_s == pytest.approx(800, rel=0.05)


def test_one_queue_actor_answers_as_often_as_its_time_allows() -> None:
    found = scaling_model.answer(300, 1.0, pages=4, seconds=20)
    assert found.answers_per_s == pytest.approx(1000 / scaling_model.ANSWER_MS["queue"], rel=0.03)
    assert found.slow_ms > 10 * scaling_model.answer(30, 1.0, pages=4, seconds=20).slow_ms


def test_it_stands_where_something_was_measured(measured: Measured) -> None:
    costs = Costs.of(measured)
    assert scaling_model.on_two_cores(measured, costs, 1, 512) == pytest.approx(270, rel=1 / 3)
    for (labelers, human), was in measured.answers_per_s.items():
        found = scaling_model.answer(labelers, 1.0 if human else 0.0, cores=scaling_model.CORES, seconds=20)
        assert found.answers_per_s == pytest.approx(was, rel=1 / 3)
