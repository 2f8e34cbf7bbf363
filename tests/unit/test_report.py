"""The report: complete with full data, calm with next to none, self-contained, and safe with hostile prompts."""

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kto_ray.evaluate.charts import draw, duration, number, percent, percents
from kto_ray.evaluate.people import PeopleSummary, people_summary
from kto_ray.evaluate.plots import PLOTS, Plot, opinion_plots
from kto_ray.evaluate.report import Pair, Picture, ReportData, picture_uri, render_report, save_png_grid
from kto_ray.evaluate.statistics import EvaluationSummary, Interval
from kto_ray.shapes.world import Scene, draw_somewhere

CONFIG = "run: demo\nlabel:\n  threshold: 0.5\ntracking:\n  mlflow_uri: null\n"
SCORERS = {"shapes": False, "redness": True}
LEDGER = {"generated": 1536, "labeled": 1500, "abstained": 20, "failed": 12, "pending": 4, "trained": 1500}


def pictures(count: int, edge: int = 64) -> list[Picture]:
    rng = np.random.default_rng(0)
    drawn = [draw_somewhere(Scene("red", "circle", "black"), rng) for _ in range(count)]
    return [np.asarray(Image.fromarray(picture).resize((edge, edge))) for picture in drawn]


def a_round(number: int) -> dict[str, Any]:
    return {
        **{"round": number, "policy_version": number, "policy_lag_mean": 0.0},
        **{"score_mean": 0.5 + 0.1 * number, "pass_rate": 0.5 + 0.1 * number},
        **{"desirable": 300, "undesirable": 200, "abstained": 8, "failed": 4, "pending": 0},
        **{f"objective/{key}": 0.01 * number for key in ("g_desirable", "g_undesirable", "z", "saturated", "accuracy")},
        **{
            f"objective/{key}": 0.5
            for key in (
                "margin",
                "loss",
                "gradient_norm",
                *(f"{each}_noise_{k}" for each in ("g", "gap") for k in range(4)),
            )
        },
        **{"seconds/generate": 20.0, "seconds/label": 1.0, "seconds/train": 9.0, "seconds/publish": 0.5},
        **{"seconds/evaluate": 0.0, "seconds/round": 33.0},
        **{"score/shapes": 0.5 + 0.1 * number, "score_std/shapes": 0.5},
        **{"score/redness": 40.0 - 2 * number, "score_std/redness": 4.0, "flip_rate": 0.05},
        **{f"pictures/{key}": 0.3 for key in ("diversity", "brightness", "saturation")},
        **{f"pictures/{key}": 0.1 for key in ("edge_density", "color_entropy")},
        **{"people/judged": 40, "people/late": 3, "people/agreement": 0.9, "people/alpha": 0.7, "people/seconds": 1.5},
    }


def an_older_round(number: int) -> dict[str, Any]:
    """As it was logged before there were several scorers, and figures of pictures."""
    new = ("score/", "score_std/", "pictures/", "people/", "flip_rate")
    return {key: value for key, value in a_round(number).items() if not key.startswith(new)}


def evaluated(
    version: int, passing: float, win_rate: Interval | None = None, scores: Mapping[str, float] | None = None
) -> EvaluationSummary:
    def about(value: float) -> Interval:
        return Interval(value, value - 0.05, value + 0.05, 240)

    opinions = {name: about(value) for name, value in (scores or {}).items()}
    return EvaluationSummary(version, about(passing), about(passing), win_rate, 240, 0, opinions)


def full_data() -> ReportData:
    return ReportData(
        run="demo",
        model="shapes",
        config_yaml=CONFIG,
        finished=True,
        # The second round was skipped: next to nothing is known of it.
        rounds=[a_round(0), {"round": 1, "policy_version": None}, {}, a_round(3)],
        evaluations=[
            evaluated(3, 0.86, Interval(0.93, 0.88, 0.96, 48), {"shapes": 0.81, "redness": 33.5}),
            evaluated(0, 0.51, scores={"shapes": 0.52, "redness": 41.5}),
        ],
        pairs=[a_pair("a red circle on black")],
        ledger=LEDGER | {"trained_twice": 0},
        seconds={"total": 120.0, "generate": 70.0, "train": 30.0, "idle": 20.0},
        images=1536,
        scorers=SCORERS,
        people=PeopleSummary(answers=90, judged=80, late=6, labels_per_point={"shapes": 3.1, "redness": None}),
    )


def a_pair(prompt: str, before: Picture | None = None, after: Picture | None = None) -> Pair:
    """The first image of each side has a score; so has the second of the policy, which abstained in it."""
    one, two = pictures(2)
    base = [one if before is None else before, two]
    final = [one if after is None else after, two]
    return Pair(prompt, base, final, [0.1, None], [0.9, 0.7], [False, None], [True, False])


def without_charts() -> ReportData:
    return replace(full_data(), rounds=[], evaluations=[])


class Page(HTMLParser):
    """The text, tags and attributes of a page; fails on a tag that is closed but was not opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "link", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(full_data())


def test_the_headline_says_what_happened(html: str) -> None:
    text = Page(html).text
    assert "Held-out images that pass: 51 % → 86 %" in text
    assert "The base model passes on 51 % (46\N{EN DASH}56 %), policy 3 on 86 % (81\N{EN DASH}91 %)" in text
    assert "93 % of the held-out prompts" in text
    assert "it is better than the base" in text


def test_the_difference_to_the_base_is_said_with_its_interval(html: str) -> None:
    assert "policy minus base" not in Page(html).text  # nothing is known of it
    differences = {"pass_rate": Interval(0.35, 0.281, 0.42, 240), "score/redness": Interval(-8.0, -9.5, -6.5, 240)}
    base, last = evaluated(0, 0.51, scores={"redness": 41.5}), evaluated(3, 0.86, scores={"redness": 33.5})
    last = replace(last, differences=differences)
    text = Page(render_report(replace(full_data(), evaluations=[base, last]))).text
    assert "policy minus base is +35.0 (+28.1 to +42.0) percentage points" in text
    assert "+35.0 (+28.1 to +42.0)" in text.split("Held-out evaluations in figures")[1]
    assert "-8-9.5 to -6.5" in text.split("Second opinions")[1]


def test_fresh_seeds_are_what_is_reported() -> None:
    fresh = [evaluated(0, 0.49), evaluated(3, 0.8)]
    text = Page(render_report(replace(full_data(), fresh=fresh))).text
    assert "Held-out images that pass: 49 % → 80 %" in text
    assert "These images have other seeds than those by whose pass rate the run was ended." in text
    table = text.split("Held-out evaluations in figures")[1]
    assert "86 %" in table  # what decided is there, too
    assert "3fresh seeds" in table
    assert "other seeds" not in Page(render_report(full_data())).text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.3, 0.45, "it is worse than the base"), (0.4, 0.6, "the two cannot be told apart")],
)
def test_the_headline_claims_no_more_than_the_win_rate(low: float, high: float, words: str) -> None:
    evaluations = [evaluated(0, 0.51), evaluated(3, 0.52, Interval((low + high) / 2, low, high, 48))]
    assert words in Page(render_report(replace(full_data(), evaluations=evaluations, rounds=[]))).text


def test_what_people_said_and_what_it_cost(html: str) -> None:
    text = Page(html).text
    assert "90 answers of people gave 80 images a verdict, 6 of them late." in text
    assert "On held-out prompts the mean score of shapes rose, by 0.01 for every 3.1 answers." in text
    assert "The mean score of redness did not rise." in text
    assert "People" not in Page(render_report(replace(full_data(), people=None))).text


def test_where_no_scorer_votes_the_headline_says_what_people_did() -> None:
    def unjudged(evaluation: EvaluationSummary) -> EvaluationSummary:
        unknown = Interval(math.nan, math.nan, math.nan)
        return replace(evaluation, pass_rate=unknown, mean_score=unknown, win_rate=None)

    unscored = {"base_scores": [None] * 2, "final_scores": [None] * 2, "base_passes": [None] * 2}
    pair = replace(full_data().pairs[0], **unscored, final_passes=[None] * 2)
    evaluations = [unjudged(evaluation) for evaluation in full_data().evaluations]
    data = replace(full_data(), evaluations=evaluations, pairs=[pair])
    assert "its score" not in Page(render_report(data)).text
    text = Page(render_report(data)).text
    assert "People judged 80 images in 4 rounds" in text
    assert "the mean score of shapes went from 0.52 to 0.81, the mean score of redness went from 41.5 to 33.5." in text


def test_labels_per_point_are_answers_by_hundredths_gained() -> None:
    rounds = [{"people/answers": 60, "people/judged": 50, "people/late": 0}, {"step": 1}, {"people/answers": 40}]
    evaluations = [{"score/shapes": 0.5, "score/redness": 9.0}, {"score/shapes": 0.75, "score/redness": 8.0}]
    found = people_summary(rounds, evaluations)
    assert found == PeopleSummary(100, 50, 0, {"shapes": pytest.approx(4.0), "redness": None})
    assert people_summary([{"desirable": 3}], evaluations) is None


def test_every_part_is_on_the_page(html: str) -> None:
    page = Page(html)
    for plots in (*PLOTS.values(), opinion_plots(SCORERS)):
        for plot in plots:
            assert plot.title in page.text
    assert "1,536 generated = 1,500 labeled + 20 abstained + 12 failed + 4 pending: ✓ it balances" in page.text
    assert "2 min 00 s" in page.text
    assert "threshold: 0.5" in page.text
    assert "✓ 0.90" in page.text
    assert "✗ 0.10" in page.text
    assert "✗ 0.70" in page.text


def test_every_image_says_what_it_shows(html: str) -> None:
    alts = [image["alt"] for image in Page(html).all("img")]
    assert all(alts)
    assert "Base, image 1 for “a red circle on black”: score 0.10, does not pass" in alts
    assert "Base, image 2 for “a red circle on black”: not scored" in alts
    assert "Policy 3, image 1 for “a red circle on black”: score 0.90, passes" in alts
    assert "Policy 3, image 2 for “a red circle on black”: score 0.70, does not pass" in alts
    assert any("held-out prompts 51\N{NARROW NO-BREAK SPACE}% to 86" in alt for alt in alts)


def test_the_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert not re.search(r"https?://", html)
    assert not page.all("script")
    for tag, attribute in (("img", "src"), ("source", "srcset"), ("link", "href")):
        for attributes in page.all(tag):
            assert attributes[attribute].startswith("data:")


def test_small_pictures_stay_crisp_and_large_ones_are_scaled_down() -> None:
    pair = a_pair("p", after=pictures(1, edge=512)[0])
    shown = Page(render_report(replace(without_charts(), pairs=[pair]))).all("img")
    (small,) = (image for image in shown if image["alt"].startswith("Base, image 1"))
    (large,) = (image for image in shown if image["alt"].startswith("Final policy, image 1"))
    assert (small["class"], large["class"]) == ("small", "")
    sizes = [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))).size for i in (small, large)]
    assert sizes == [(64, 64), (256, 256)]


def test_pictures_travel_unchanged() -> None:
    (picture,) = pictures(1)
    sent = Image.open(io.BytesIO(base64.b64decode(picture_uri(picture).removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(sent), picture)


def test_a_prompt_runs_in_the_direction_of_its_language() -> None:
    page = render_report(replace(without_charts(), pairs=[a_pair("חתול שחור!"), a_pair("a black cat")]))
    assert [f'<h3 dir="auto">{prompt}</h3>' in page for prompt in ("חתול שחור!", "a black cat")] == [True, True]


def test_text_from_the_run_is_escaped() -> None:
    attack = '<script>alert("1")</script>" onerror="x'
    evaluations = [evaluated(0, 0.5, scores={attack: 0.5})]
    data = replace(without_charts(), run=attack, model=attack, config_yaml=f"run: '{attack}'", doubts=[attack])
    page = Page(render_report(replace(data, pairs=[a_pair(attack)], evaluations=evaluations, scorers={attack: True})))
    assert not page.all("script")
    # Title, run, model, doubt, prompt, scorer, configuration.
    assert page.text.count('alert("1")') == 7
    assert not any("onerror" in attributes for _, attributes in page.tags)


@pytest.mark.parametrize("rounds", [[], [{"round": 0}], [{}], [{"round": 0, "seconds/round": 3.0, "pass_rate": None}]])
@pytest.mark.parametrize("evaluations", [[], [evaluated(0, 0.51)], [evaluated(4, 0.8)]])
def test_a_run_that_has_just_begun(rounds: list[dict[str, Any]], evaluations: list[EvaluationSummary]) -> None:
    data = ReportData("first", "some/model", "", False, rounds, evaluations, [], {}, {}, 0)
    text = Page(render_report(data)).text
    assert "still running" in text
    assert "not evaluated yet" in text if not evaluations else "of held-out images" in text
    assert "Ledger" not in text
    assert "Health of the objective" not in text


def test_one_held_out_prompt_has_no_interval() -> None:
    lone = Interval(0.5, math.nan, math.nan, 5)
    data = replace(without_charts(), evaluations=[EvaluationSummary(0, lone, lone, None, 5, 0)])
    assert "no interval" in Page(render_report(data)).text


def test_where_nothing_was_judged_nothing_passes_or_fails() -> None:
    unknown = Interval(math.nan, math.nan, math.nan)
    pair = replace(a_pair("p"), base_passes=[None, None], final_passes=[None, None])
    evaluations = [EvaluationSummary(version, unknown, unknown, None, 240, 0) for version in (0, 3)]
    text = Page(render_report(replace(full_data(), rounds=[a_round(0)], evaluations=evaluations, pairs=[pair]))).text
    assert "✗" not in text
    assert "0.90" in text
    assert "neither pass nor fail" in text
    assert "nan" not in text.lower()


# -- second opinions --------------------------------------------------------------------------------------------------


def opinions_plot(scorers: dict[str, bool]) -> Plot:
    return opinion_plots(scorers)[0]


def test_every_scorer_s_opinion_of_the_held_out_prompts_is_there(html: str) -> None:
    text = Page(html).text
    assert "Held-out prompts, mean scoreBasePolicy 3" in text
    assert "shapes 0.520.47 to 0.57 0.810.76 to 0.86" in text
    assert "rednessheld out 41.541.5 to 41.5 33.533.5 to 33.5" in text


@pytest.mark.parametrize(("version", "column"), [(0, "Base"), (4, "Policy 4")])
def test_a_single_evaluation_has_a_single_column(version: int, column: str) -> None:
    data = replace(without_charts(), evaluations=[evaluated(version, 0.5, scores={"shapes": 0.5})])
    assert f"Held-out prompts, mean score{column} shapes 0.5" in Page(render_report(data)).text


def test_a_scorer_that_failed_throughout_one_evaluation_is_missing_there() -> None:
    evaluations = [evaluated(0, 0.5), evaluated(1, 0.5, scores={"late": 0.5})]
    data = replace(without_charts(), evaluations=evaluations)
    assert "BasePolicy 1 late \N{EN DASH} 0.5" in Page(render_report(data)).text


def test_scorers_are_drawn_on_one_scale(html: str) -> None:
    (chart,) = (image["alt"] for image in Page(html).all("img") if "Proxy and held-out" in image["alt"])
    # 0.5 to 0.8 with a standard deviation of 0.5; 40 to 34 with one of 4.
    assert "shapes 0 to 0.6; redness (held out) 0 to -1.5" in chart


def test_many_scorers_are_all_drawn() -> None:
    many = {f"scorer{place}": place % 2 == 0 for place in range(14)}
    chart = draw(opinions_plot(many), [{"round": 0} | {f"opinion/{name}": 0.0 for name in many}], [])
    assert chart is not None
    assert chart.alt.count("scorer") == 14
    assert chart.alt.startswith("scorer1 0")


@pytest.mark.parametrize("doubts", [[], ["after round 4: reward hacking", "after round 5: collapse"]])
def test_doubts_are_said_at_the_top(doubts: list[str]) -> None:
    page = Page(render_report(replace(full_data(), doubts=doubts)))
    notes = [attributes for _, attributes in page.tags if attributes.get("role") == "note"]
    assert len(notes) == len(doubts)
    for doubt in doubts:
        assert f"A{doubt[1:]}." in page.text.split("Before and after")[0]


def test_an_older_run_without_these_columns_has_its_report() -> None:
    evaluations = [evaluated(0, 0.51), evaluated(3, 0.86)]
    rounds = [an_older_round(number) for number in range(3)]
    data = replace(full_data(), rounds=rounds, evaluations=evaluations, scorers={})
    for page in (Page(render_report(data)), Page(render_report(replace(data, scorers=SCORERS)))):
        assert "Second opinions" not in page.text
        assert "Health of the objective" in page.text
        assert "it balances" in page.text


# -- charts and pictures ----------------------------------------------------------------------------------------------


def test_a_ledger_that_does_not_balance_says_so() -> None:
    text = Page(render_report(replace(without_charts(), ledger=LEDGER | {"labeled": 1490, "trained_twice": 2}))).text
    assert "✗ off by 10" in text
    assert "✗ 2" in text


def test_a_chart_leaves_a_gap_where_figures_are_missing() -> None:
    rounds = [{"round": r} if r == 2 else {"round": r, "policy_lag_mean": 0.0} for r in range(5)]
    (lag,) = (plot for plot in PLOTS["feedback"] if plot.title == "Policy lag")
    chart = draw(lag, rounds, [])
    assert chart is not None
    svg = base64.b64decode(chart.light.split(",")[1]).decode()
    (line,) = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: #1f6fb2', svg)
    assert line.count("M") == 2


def test_charts_have_other_colours_in_the_dark_and_are_reproducible() -> None:
    plot = PLOTS["progress"][0]
    rounds, evaluations = full_data().rounds, full_data().evaluations
    chart = draw(plot, rounds, evaluations)
    assert chart is not None
    assert chart.light != chart.dark
    assert "#1f6fb2" not in base64.b64decode(chart.dark.split(",")[1]).decode()
    assert draw(plot, rounds, evaluations) == chart


def test_figures_in_words() -> None:
    unit = "\N{NARROW NO-BREAK SPACE}%"
    assert [percent(share) for share in (0, 0.004, 0.514, 0.996, 1)] == [
        text + unit for text in ("0", "0.4", "51", "99.6", "100")
    ]
    assert percents(Interval(0.5, 0.4, 0.6)) == f"40\N{EN DASH}60{unit}"
    assert [number(value) for value in (0.12345, 7, None, math.nan)] == ["0.123", "7", "\N{EN DASH}", "\N{EN DASH}"]
    assert [duration(s) for s in (0.26, 59.0, 61, 3599.7, 3725)] == [
        "0.3 s",
        "59.0 s",
        "1 min 01 s",
        "1 h 00 min",
        "1 h 02 min",
    ]


def test_png_grid_shows_base_left_and_final_right(tmp_path: Path) -> None:
    def plain(value: int) -> Picture:
        return np.full((64, 64, 3), value, np.uint8)

    pairs = [
        Pair("a prompt " * 40, [plain(10), plain(20)], [plain(30)], [None, 0.1], [0.9], [None, False], [True]),
        Pair("ещё", [], [plain(40)], [], [1], [], [True]),
    ]
    save_png_grid(pairs, tmp_path / "grid.png", cell=32)
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    columns = {value: np.nonzero((sheet == value).sum(0) >= 32)[0].mean() for value in (10, 20, 30, 40)}
    assert columns[10] < columns[20] < columns[30] == columns[40]
    assert all((sheet == value).sum() >= 32 * 32 for value in (10, 20, 30, 40))


def test_png_grid_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        save_png_grid([], io.BytesIO())
