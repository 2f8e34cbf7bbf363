"""The labeling page in a real browser: people judge rounds by key, swipe and button, and nothing they say is lost.

Screenshots go to $KTO_RAY_SCREENSHOTS, if that is set.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Route

from kto_ray.config.people import Gold, Human
from kto_ray.people.terms import NewItem
from kto_ray.shapes.world import Scene
from tests.browser import (
    CONTRAST,
    PHONE,
    TOO_FAST_MS,
    LabelingSite,
    OpenContext,
    Visitor,
    is_good,
    labeling_site,
    pictures,
    png_of,
)

IMAGES_LOADED = "performance.getEntriesByType('resource').filter((e) => e.name.endsWith('.png')).length"

Shoot = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LabelingSite]:
    """Settings come as the fixture's parameter."""
    with labeling_site(tmp_path, Human.model_validate(getattr(request, "param", {}))) as site:
        yield site


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    folder = Path(os.environ.get("KTO_RAY_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(visitor: Visitor, name: str, full_page: bool = False) -> None:
        visitor.page.screenshot(path=folder / f"{name}.png", full_page=full_page)

    return shoot


def right_key(site: LabelingSite, item: str) -> str:
    return "ArrowRight" if is_good(site.sample_of(item)) else "ArrowLeft"


def judge_rightly(site: LabelingSite, visitor: Visitor) -> str | None:
    """Answer the image on screen; gives its item, or None when there is none."""
    item = visitor.item
    if item is not None:
        visitor.press(right_key(site, item))
    return item


# -- a round


def test_two_people_judge_a_round_by_keyboard(site: LabelingSite, new_context: OpenContext, shoot: Shoot) -> None:
    new = pictures("round-00003", 16)
    site.add_round(3, new)
    anna, ben = Visitor(new_context(), site.link("anna")), Visitor(new_context(), site.link("ben"))
    assert anna.page.url == f"{site.base_url}/"
    shown: dict[Visitor, list[str]] = {anna: [], ben: []}

    first = anna.wait_for_image()
    anna.press("ArrowLeft" if right_key(site, first) == "ArrowRight" else "ArrowRight")
    anna.page.keyboard.press("Backspace")
    anna.until(lambda: anna.item == first)

    skipped = []
    for number in range(len(new)):
        for visitor in (anna, ben):
            if visitor is anna and number == 3:
                skipped.append(visitor.wait_for_image())
                visitor.press(" ")
            elif (item := judge_rightly(site, visitor)) is not None:
                shown[visitor].append(item)
        if number == 5:
            shoot(anna, "labeling_page")

    anna.until(lambda: len(site.answers()) == len(new) + 1)
    while judge_rightly(site, ben):
        pass
    said = [row for row in site.answers() if row["answer"] != "skip"]
    assert sorted(row["sample_id"] for row in said) == sorted(item.sample_id for item in new)
    assert all(row["answer"] == ("desirable" if is_good(row["sample_id"]) else "undesirable") for row in said)
    assert set(shown[anna]) & set(shown[ben]) == set()
    assert skipped[0] in shown[ben]
    assert all(0.1 < row["seconds"] < 60 for row in said)
    for visitor in (anna, ben):
        visitor.expect("Nothing left for you in this round")
        visitor.expect("Round 3: 16 of 16 judged")
    site.desk.intake.seal("round-00003")
    for visitor in (anna, ben):
        visitor.come_back()
        visitor.expect("Round 3 is complete")
        assert visitor.complaints == []
    shoot(anna, "labeling_waiting")


def test_undo_goes_back_over_a_reload(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 4))
    anna = Visitor(new_context(), site.link("anna"))
    judged = [judge_rightly(site, anna) for _ in range(3)]
    anna.until(lambda: len(site.answers()) == 3)
    anna.page.reload()
    last = anna.wait_for_image()
    for item in reversed(judged):
        anna.page.locator("#undo").click()
        anna.until(lambda item=item: anna.item == item)
    anna.until(lambda: site.answers() == [])
    assert anna.page.locator("#undo").get_attribute("aria-disabled") == "true"
    for item in [*judged, last]:
        assert anna.item == item
        judge_rightly(site, anna)
    anna.until(lambda: len(site.answers()) == 4)
    assert anna.complaints == []


# -- a bad connection


def test_answers_are_kept_while_the_connection_is_lost(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 12))
    context = new_context()
    anna = Visitor(context, site.link("anna"))
    judge_rightly(site, anna)
    anna.until(lambda: len(site.answers()) == 1)
    anna.until(lambda: anna.page.evaluate(IMAGES_LOADED) >= 7)
    context.set_offline(True)
    for _ in range(3):
        assert judge_rightly(site, anna)
    anna.expect("Connection lost: 3 answers are kept and will be sent")
    latest = anna.item
    judge_rightly(site, anna)
    anna.page.keyboard.press("Backspace")
    anna.until(lambda: anna.item == latest)
    anna.expect("Connection lost: 3 answers are kept and will be sent")
    assert len(site.answers()) == 1
    context.set_offline(False)
    anna.until(lambda: len(site.answers()) == 4)
    anna.page.wait_for_selector("#connection", state="hidden")
    while judge_rightly(site, anna):
        pass
    anna.until(lambda: len(site.answers()) == 12)
    assert all(row["answer"] == ("desirable" if is_good(row["sample_id"]) else "undesirable") for row in site.answers())
    assert anna.complaints == []


def test_a_reload_loses_nothing_and_doubles_nothing(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 8))
    anna = Visitor(new_context(), site.link("anna"))
    anna.wait_for_image()

    def taken_but_not_confirmed(route: Route) -> None:
        route.fetch()
        route.fulfill(status=503, body="the connection broke")

    anna.page.route("**/api/answer", taken_but_not_confirmed)
    for _ in range(3):
        judge_rightly(site, anna)
    anna.expect("3 answers are kept")
    anna.until(lambda: len(site.answers()) == 1)  # the others wait for the first
    current = anna.item
    anna.page.unroute("**/api/answer")
    anna.page.reload()
    assert anna.wait_for_image() == current  # it stays this labeler's
    anna.until(lambda: len(site.answers()) == 3)
    while judge_rightly(site, anna):
        pass
    anna.until(lambda: len(site.answers()) == 8)
    assert len({row["sample_id"] for row in site.answers()}) == 8
    assert all(row["answer"] == ("desirable" if is_good(row["sample_id"]) else "undesirable") for row in site.answers())


def test_answers_of_one_person_are_not_sent_as_another(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 8))
    context = new_context()
    anna = Visitor(context, site.link("anna"))
    anna.wait_for_image()
    anna.page.route("**/api/answer", lambda route: route.abort())
    judge_rightly(site, anna)
    anna.expect("1 answer is kept")
    anna.page.close()
    ben = Visitor(context, site.link("ben"))
    judge_rightly(site, ben)
    ben.until(lambda: len(site.answers()) == 1)
    again = Visitor(context, site.link("anna"))
    again.wait_for_image()
    again.until(lambda: sorted(row["labeler"] for row in site.answers()) == ["anna", "ben"])
    judge_rightly(site, ben)  # in a tab that is still open
    ben.expect("Another link was opened in this browser")
    ben.expect("1 answer could not be sent")
    assert len(site.answers()) == 2


# -- what the page says


def test_the_page_says_what_it_waits_for(site: LabelingSite, new_context: OpenContext) -> None:
    anna, ben = Visitor(new_context(), site.link("anna")), Visitor(new_context(), site.link("ben"))
    anna.expect("Images are being drawn")
    site.add_round(0, pictures("round-00000", 1), finished=False)
    (holder, other) = (anna, ben)
    anna.until(lambda: anna.item is not None or ben.item is not None)
    if anna.item is None:
        (holder, other) = (ben, anna)
    other.expect("Images are being drawn")
    other.expect("Round 0: 0 of 1 so far judged")
    site.desk.intake.finish("round-00000", 0)
    other.come_back()
    other.expect("Nothing left for you in this round")
    judge_rightly(site, holder)
    anna.until(lambda: len(site.answers()) == 1)
    site.desk.intake.seal("round-00000")
    for visitor in (anna, ben):
        visitor.come_back()
        visitor.expect("Round 0 is complete")
        visitor.expect("The model now learns from it")
    site.add_round(1, pictures("round-00001", 1, version=1))
    anna.until(lambda: anna.item is not None or ben.item is not None)
    judge_rightly(site, anna if anna.item else ben)
    anna.until(lambda: len(site.answers()) == 2)
    site.desk.intake.seal("round-00001")
    site.desk.intake.end()
    for visitor in (anna, ben):
        visitor.come_back()
        visitor.expect("The run has ended")
        assert visitor.complaints == []


def test_the_page_says_when_an_answer_came_too_late(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 3))
    anna = Visitor(new_context(), site.link("anna"))
    anna.wait_for_image()
    site.desk.intake.seal("round-00000", withdraw=True)
    judge_rightly(site, anna)
    anna.expect("Not counted: this image's round is sealed")
    assert site.answers() == []


@pytest.mark.parametrize("how", ["revoked", "excluded"])
def test_the_page_says_when_its_link_opens_it_no_more(site: LabelingSite, new_context: OpenContext, how: str) -> None:
    site.add_round(0, pictures("round-00000", 3))
    anna = Visitor(new_context(), site.link("anna"))
    anna.wait_for_image()
    if how == "revoked":
        site.desk.people.revoke("anna")
    else:
        site.desk.people.exclude("anna", "by the operator")
    judge_rightly(site, anna)
    anna.expect({"revoked": "This link no longer works", "excluded": "no longer asked for"}[how])
    if how == "revoked":
        anna.expect("1 answer could not be sent")
        (badge,) = [site.desk.people.admit("anna")]
        again = Visitor(anna.context, f"{site.base_url}/enter/{site.signer.token(badge)}")
        again.wait_for_image()
        anna.until(lambda: len(site.answers()) == 1)
    else:
        assert site.answers() == []


@pytest.mark.parametrize("site", [{"lease_s": 1}], indirect=True)
def test_images_on_screen_stay_ones_own_and_the_others_are_given_back(
    site: LabelingSite, new_context: OpenContext
) -> None:
    site.add_round(0, pictures("round-00000", 8))
    anna = Visitor(new_context(), site.link("anna"))
    anna.wait_for_image()
    ben = site.signer.badge(site.link("ben").rsplit("/", 1)[-1]).id
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        held = site.desk.queue.lease(ben, 10)
        assert len(held) == 2  # of 8, six are on anna's page
        anna.page.wait_for_timeout(300)
    anna.page.goto("about:blank")
    anna.until(lambda: len(site.desk.queue.lease(ben, 10)) >= 7)  # but for the one that was on screen


def test_prompts_are_text_whatever_they_look_like(site: LabelingSite, new_context: OpenContext) -> None:
    prompt = '<img src=x onerror="window.ran = 1"><script>window.ran = 2</script> & \'a\' "b"'
    png = png_of(Scene("red", "circle", "black"))
    site.add_round(0, [NewItem("s-0", "p0", prompt, png), NewItem("s-1", "p1", "word " * 200, png)])
    anna = Visitor(new_context(), site.link("anna"))
    for _ in range(2):
        anna.wait_for_image()
        if anna.page.locator("#prompt").inner_text() == prompt:
            assert anna.page.locator("#prompt *").count() == 0
        else:
            box = anna.page.locator("#stage img").bounding_box()
            assert box
            assert box["height"] > 200  # a long prompt leaves room for the image
        anna.press("u")
    assert anna.page.evaluate("window.ran") is None
    assert anna.complaints == []


# -- keys, fingers, eyes


PRESS = """([code, key]) => document.body.dispatchEvent(
    new KeyboardEvent("keydown", { code, key, bubbles: true, cancelable: true })
)"""
"""As from a keyboard with another layout, which Playwright has none of."""
OTHER_KEYBOARDS = [
    *[("KeyL", "д", "desirable"), ("KeyD", "в", "undesirable"), ("KeyU", "Г", "unsure")],  # Cyrillic
    *[("KeyL", "λ", "desirable"), ("KeyD", "δ", "undesirable"), ("KeyU", "θ", "unsure")],  # Greek
    *[("KeyL", "ך", "desirable"), ("KeyD", "ג", "undesirable"), ("KeyU", "ו", "unsure")],  # noqa: RUF001  Hebrew
    *[("KeyL", "Process", "desirable"), ("Space", "\u3000", "skip")],  # while Japanese is written
    *[("KeyP", "l", "desirable"), ("KeyH", "d", "undesirable"), ("KeyF", "u", "unsure")],  # Dvorak
]


def test_keys_of_other_keyboards_judge_by_their_letter_or_place(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", len(OTHER_KEYBOARDS) + 1))
    anna = Visitor(new_context(), site.link("anna"))
    anna.wait_for_image()
    for code, key, _ in OTHER_KEYBOARDS:
        before = anna.item
        anna.page.wait_for_timeout(TOO_FAST_MS)
        for other in ("n", "e", "g"):  # a Latin letter that is none of ours, wherever it lies
            anna.page.evaluate(PRESS, ["KeyL", other])
        assert anna.item == before
        anna.page.evaluate(PRESS, [code, key])
        anna.until(lambda before=before: anna.item != before)  # type: ignore[misc]
    expected = [answer for _, _, answer in OTHER_KEYBOARDS]
    anna.until(lambda: [row["answer"] for row in site.answers()] == expected)
    assert anna.complaints == []


HEBREW = 'חתול (שחור) קורא את "Moby Dick" בלילה!'


def test_prompts_run_in_the_direction_of_their_language(
    site: LabelingSite, new_context: OpenContext, shoot: Shoot
) -> None:
    png = png_of(Scene("red", "circle", "black"))
    site.add_round(0, [NewItem("s-0", "p0", HEBREW, png), NewItem("s-1", "p1", "a black cat", png)])
    anna = Visitor(new_context(), site.link("anna"))
    seen = {}
    for _ in range(2):
        anna.wait_for_image()
        prompt = anna.page.locator("#prompt")
        seen[prompt.inner_text()] = prompt.evaluate("(element) => getComputedStyle(element).direction")
        if prompt.inner_text() == HEBREW:
            shoot(anna, "right_to_left")
        anna.press("u")
    assert seen == {HEBREW: "rtl", "a black cat": "ltr"}
    assert anna.complaints == []


def test_keys_do_only_what_they_should(site: LabelingSite, new_context: OpenContext) -> None:
    site.add_round(0, pictures("round-00000", 10))
    anna = Visitor(new_context(), site.link("anna"))
    page, item = anna.page, anna.wait_for_image()
    page.wait_for_timeout(200)
    for key in ("Control+ArrowRight", "Alt+ArrowLeft", "Meta+l", "Control+d", "x", "Enter"):
        page.keyboard.press(key)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    for key in ("ArrowRight", "d", "u", "Backspace"):
        page.keyboard.press(key)
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    assert (anna.item, site.answers()) == (item, [])

    page.locator("#unsure").focus()
    anna.press(" ")  # the button, not the skip
    anna.until(lambda: [row["answer"] for row in site.answers()] == ["unsure"])
    page.evaluate("document.activeElement.blur()")
    expected = ["unsure"]
    keys = {"l": "desirable", "d": "undesirable", "L": "desirable", " ": "skip", "u": "unsure", "ArrowDown": "unsure"}
    for key, verdict in keys.items():
        anna.press(key)
        expected.append(verdict)
    anna.until(lambda: [row["answer"] for row in site.answers()] == expected)

    before = anna.item
    page.wait_for_timeout(200)
    page.locator("#desirable").dblclick()
    anna.until(lambda: len(site.answers()) == len(expected) + 1)
    page.wait_for_timeout(200)
    assert anna.item != before
    assert len(site.answers()) == len(expected) + 1  # not the image that nobody had seen yet
    page.keyboard.down("ArrowRight")
    for _ in range(3):
        page.wait_for_timeout(200)
        page.keyboard.down("ArrowRight")  # as a key repeats that is held
    page.keyboard.up("ArrowRight")
    anna.until(lambda: len(site.answers()) == len(expected) + 2)
    assert anna.complaints == []


def test_a_swipe_judges_on_a_phone(site: LabelingSite, new_context: OpenContext, shoot: Shoot) -> None:
    site.add_round(0, pictures("round-00000", 5))
    anna = Visitor(new_context(**PHONE), site.link("anna"))
    page, first = anna.page, anna.wait_for_image()
    page.wait_for_timeout(300)
    shoot(anna, "labeling_phone")
    for id_ in ("undo", "undesirable", "skip", "unsure", "desirable", "open-help"):
        box = page.locator(f"#{id_}").bounding_box()
        assert box
        assert box["width"] >= 48, id_
        assert box["height"] >= 48, id_
        assert box["y"] + box["height"] <= 780, id_
    anna.swipe(40)
    page.wait_for_timeout(250)
    assert anna.item == first

    def feedback() -> None:
        assert "matrix" in page.evaluate("getComputedStyle(document.querySelector('#stage img')).transform")
        assert float(page.evaluate("getComputedStyle(document.querySelector('.stamp.like')).opacity")) > 0.9
        shoot(anna, "labeling_swipe")

    anna.swipe(180, feedback)
    anna.until(lambda: anna.item != first)
    second = anna.item
    page.wait_for_timeout(200)
    anna.swipe(-180)
    anna.until(lambda: anna.item != second)
    anna.until(lambda: [row["answer"] for row in site.answers()] == ["desirable", "undesirable"])
    page.locator("#undo").tap()
    anna.until(lambda: anna.item == second)
    assert page.evaluate("document.querySelector('#stage img').style.transform") == ""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert anna.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_reached(
    site: LabelingSite, new_context: OpenContext, shoot: Shoot, scheme: str
) -> None:
    site.add_round(0, pictures("round-00000", 4))
    anna = Visitor(new_context(color_scheme=scheme), site.link("anna"))
    anna.wait_for_image()
    judge_rightly(site, anna)
    page = anna.page
    shoot(anna, f"labeling_page_{scheme}")
    read = ["#prompt", "#round", "#mine", ".run", "#open-help", "#undo", "#skip", "#desirable", "#undesirable"]
    read += ["#undo kbd", "#desirable kbd", "#undesirable kbd", "#skip kbd", "#notice", "#connection"]
    read += ["#pause-title", "#pause-text", "#help p", "#help thead th", "#help kbd", ".stamp.like", ".stamp.dislike"]
    for selector in read:
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert is_dark == (scheme == "dark")

    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["open-help", "undo", "undesirable", "skip", "unsure", "desirable"]
    for name in ("Help", "Undo", "Dislike", "Skip", "Unsure", "Like"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    assert page.get_by_role("progressbar", name="Round 0: 1 of 4 judged").count() == 1
    assert page.get_by_role("img", name="The image to judge").count() == 1
    assert page.locator("#prompt").get_attribute("aria-live") == "polite"
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="How to judge").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Close"
    shoot(anna, f"labeling_help_{scheme}")
    page.keyboard.press("Enter")
    assert page.locator("#help").is_hidden()
    assert anna.complaints == []


def test_nothing_moves_for_those_who_do_not_want_it(site: LabelingSite, new_context: OpenContext) -> None:
    anna = Visitor(new_context(reduced_motion="reduce"), site.link("anna"))
    anna.expect("Images are being drawn")
    assert anna.page.evaluate("getComputedStyle(document.querySelector('.dots i')).animationName") == "none"


# -- the operator


def work_a_while(site: LabelingSite) -> None:
    """Four rounds of work by three people, one of whom answers at random."""
    clock = [time.time() - 420]
    site.desk.clock = site.desk.queue.clock = site.desk.people.clock = lambda: clock[0]
    site.desk.intake.add_gold(
        [
            NewItem(f"gold-{i:03}", f"g{i}", new.prompt, new.png, expected="desirable" if i % 2 == 0 else "undesirable")
            for i, new in enumerate(pictures("gold", 24, version=5))
        ]
    )
    badges = {name: site.desk.people.admit(name).id for name in ("anna", "ben", "cleo")}
    queue, given = site.desk.queue, 0
    for number in range(4):
        stage = f"round-{number:05}"
        new = pictures(stage, 28, version=number)
        site.add_round(number, [*new[:20], *(replace(item, needed=2) for item in new[20:])])
        for _ in range(8 if number == 3 else 20):
            for name, badge in badges.items():
                for offer in queue.lease(badge, 1):
                    given += 1
                    good = is_good(site.sample_of(offer.item))
                    verdict = "desirable" if good != (name == "cleo" and given % 2 == 0) else "undesirable"
                    clock[0] += 1.2 + given % 5 / 4
                    queue.answer(badge, offer.item, "unsure" if given % 17 == 0 else verdict, 1.1 + given % 7 / 5)
        if number < 3:
            site.desk.intake.seal(stage)
    site.desk.clock = site.desk.queue.clock = site.desk.people.clock = time.time


@pytest.mark.parametrize("site", [{"gold": Gold(file="gold.jsonl", share=0.25)}], indirect=True)
def test_the_operator_watches_and_excludes(site: LabelingSite, new_context: OpenContext, shoot: Shoot) -> None:
    work_a_while(site)
    cleo = Visitor(new_context(), site.link("cleo"))
    cleo.wait_for_image()
    operator = Visitor(new_context(), site.link("operator", "operator"))
    page = operator.page
    assert page.url == f"{site.base_url}/overview"
    row = page.locator("tr", has=page.locator("th", has_text="cleo"))
    assert "doubtful" in row.inner_text()
    operator.until(lambda: page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth === 64)"))
    assert page.locator(".rounds li").count() == 4
    shoot(operator, "labeling_overview", full_page=True)

    page.evaluate("window.kept = document.querySelector('.thumbnails img')")
    anna = site.signer.badge(site.link("anna").rsplit("/", 1)[-1]).id
    said = page.locator("tr", has=page.locator("th", has_text="anna")).locator("td").first
    before = said.inner_text()
    for offer in site.desk.queue.lease(anna, 1):
        site.desk.queue.answer(anna, offer.item, "desirable", 1.0)
    operator.until(lambda: said.inner_text() == str(int(before) + 1))
    assert page.evaluate("window.kept.isConnected")  # images that were there are the same elements: nothing flickers

    row.get_by_role("button", name="Exclude cleo").click()
    page.get_by_role("dialog", name="Exclude cleo?").get_by_role("button", name="Cancel").click()
    assert "excluded" not in row.inner_text()
    row.get_by_role("button", name="Exclude cleo").click()
    page.get_by_role("dialog").get_by_role("button", name="Exclude").click()
    operator.expect("excluded: by the operator")
    judge_rightly(site, cleo)
    cleo.expect("no longer asked for")
    row.get_by_role("button", name="Include cleo").click()
    page.get_by_role("dialog").get_by_role("button", name="Include").click()
    operator.until(lambda: "excluded" not in row.inner_text())

    for name in ("answers.jsonl", "answers.parquet"):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert download.value.suggested_filename == name
        assert Path(download.value.path()).stat().st_size > 1000
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        read = ["h1", "h1 b", "dt", "dd", "thead th", "tbody th", "tbody td", ".doubt", ".people button", ".status"]
        read += ["h3.desirable", "h3.undesirable", "h3.abstain", ".links a", ".counts", ".counts .undesirable"]
        for selector in [*read, ".legend span", "h2 + p", "#connection", "#confirm p"]:
            assert page.evaluate(CONTRAST, selector) >= 4.5, (scheme, selector)
    shoot(operator, "labeling_overview_dark", full_page=True)
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(operator, "labeling_overview_phone", full_page=True)
    site.desk.people.revoke("operator")
    operator.come_back()
    operator.expect("This link no longer works")
    assert [said for said in operator.complaints if "401" not in said] == []


def test_the_operators_page_says_when_nothing_is_there(site: LabelingSite, new_context: OpenContext) -> None:
    operator = Visitor(new_context(), site.link("operator", "operator"))
    operator.expect("No images to judge yet")
    operator.expect("Nobody yet")
    site.desk.people.admit("zoe")
    site.add_round(0, pictures("round-00000", 2))
    operator.expect("0 of 2")
    operator.expect("zoe")
    assert operator.complaints == []
