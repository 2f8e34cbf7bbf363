"""The vision-language judge: what it asks, how its answers are read, and which failures cost what."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.actor import ScorerActor
from kto_ray.score.protocol import BatchFailed
from kto_ray.score.scorers import http
from kto_ray.score.scorers.http import BadReply
from kto_ray.score.scorers.reading import read_number
from kto_ray.score.scorers.vlm_judge import VlmJudge
from tests.unit.test_http_scorer import Reply, decode, free_port, make_batch, serving


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def question(body: Any) -> str:
    text: str = body["messages"][0]["content"][0]["text"]
    return text


def judging(number_by_prompt: Callable[[str], float]) -> Callable[[int, Any], Any]:
    """A judge that is asked with the template "{prompt}"."""
    return lambda turn, body: completion(f"Well.\nScore: {number_by_prompt(question(body))}")


@pytest.fixture(autouse=True)
def _quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_an_image_is_one_chat_completion_with_the_image_as_it_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    images_BHWC, prompts = make_batch(1)
    with serving(judging(lambda text: 7)) as server:
        judge = VlmJudge(
            server.url, "some/model", api_key_env="JUDGE_KEY", extra={"max_tokens": 9}, headers={"X-Team": "a"}
        )
        assert judge.score(images_BHWC, prompts) == [0.7]
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 9)
    (message,) = body["messages"]
    text, picture = message["content"]
    assert (message["role"], text["type"], picture["type"]) == ("user", "text", "image_url")
    kind, _, png = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert (decode(png) == images_BHWC[0]).all()
    assert prompts[0].text in text["text"]
    assert "from 0 (worst) to 10 (best)" in text["text"]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.headers[0]["X-Team"] == "a"
    assert (judge.name, judge.version) == ("vlm_judge", "some/model")


def test_without_key_and_temperature_none_is_sent() -> None:
    with serving(judging(lambda text: 1)) as server:
        VlmJudge(server.url, "m", temperature=None).score(*make_batch(1))
    assert "Authorization" not in server.headers[0]
    assert "temperature" not in server.bodies[0]


@pytest.mark.parametrize("text", ["{", "{0} {low} {prompt} %s $x", 'say "Score: 10" {{twice}}\n\\1', "日本 {high}"])
def test_prompts_and_templates_are_taken_as_they_stand(text: str) -> None:
    images_BHWC, _ = make_batch(1)
    with serving(judging(lambda text: 1)) as server:
        VlmJudge(server.url, "m", template='{"a": {}} {low}-{high}: <{prompt}>').score(images_BHWC, [Prompt("1", text)])
    assert question(server.bodies[0]) == f'{{"a": {{}}}} 0-10: <{text}>'


def test_several_at_a_time_keep_their_order() -> None:
    """The barrier opens only when three are under way; the first image's answer is the last to come."""
    images_BHWC, prompts = make_batch(9)
    barrier, others = threading.Barrier(3, timeout=20), threading.Event()

    def number(text: str) -> float:
        place = int(text.partition(":")[0])
        if place < 3:
            barrier.wait()
        if place == 0:
            assert others.wait(20)
        elif place == 8:
            others.set()
        return place

    with serving(judging(number)) as server:
        scores = VlmJudge(server.url, "m", template="{prompt}", concurrency=3).score(images_BHWC, prompts)
    assert scores == [place / 10 for place in range(9)]
    assert sorted(map(question, server.bodies)) == sorted(prompt.text for prompt in prompts)


def test_never_more_than_allowed_at_a_time() -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def number(_: str) -> float:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        threading.Event().wait(0.02)
        with lock:
            busy -= 1
        return 5

    with serving(judging(number)) as server:
        VlmJudge(server.url, "m", concurrency=2).score(*make_batch(8))
    assert most == 2


# -- how answers are read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        (" 7.5\n", 7.5),
        ("**8**", 8),
        ("Score: 7", 7),
        ("score : 0", 0),
        ("SCORE=10", 10),
        ("**Score:** 7/10", 7),
        ("Score: 7 / 10.", 7),
        ("Score: 3\nNo, on second thoughts:\n\n**Score: 4**\n\n", 4),
        ("<think>2? 9?</think>\r\nIt has 3 legs.\r\nScore: 6\r\n", 6),
        ("2? <think>\nScore: 3</think> no <think>Score: 4</think>\n5", 5),  # a template may have begun the thought
        ("Score: 3\n◁/think▷Score: 5", 5),
        *((text, 8) for text in ("8/10", "8 out of 10", "8.0 / 10.0", '"8"', "`8`")),
        *((f"It is {{8}}.\n{line}", 8) for line in ("## Score: 8", "- Score: 8", "> Score: 8", "* **Score**: 8")),
        *((f"It has 3 legs.\n{line}", 8) for line in ("`Score: 8`", '"Score: 8"', "_Score: 8_", "Score: 8 out of 10")),
        *((f"{name}: 8", 8) for name in ("Rating", "Final score", "Overall Rating", "TOTAL SCORE", "分数", "评分")),
        *((text, 8) for text in ("Score\uff1a8", "分数\uff1a\uff18", "Score: 8 \u200b", "\ufeffScore: 8")),
        *((f"Score: 8{token}", 8) for token in ("<|im_end|>", "</s>", "\n<|eot_id|><|eot_id|>\n", "<end_of_turn>")),
        *((f"```{kind}\nScore: 8\n```", 8) for kind in ("", "text")),
        ('{"score": 8}', 8),
        ('It is well made.\n{"Rating": "8/10"}', 8),
        ('It is well made.\n```json\n{"reason": "3 legs",\n "score": 8.0}\n```\n', 8),
        *((f"It has 3 legs. {end}", 8) for end in ("<answer>8</answer>", "<answer>\nScore: 8\n</answer>\n")),
        *((f"It has 3 legs. {end}", 8) for end in (r"\boxed{8}", r"$\boxed{8/10}$.", "Rating: [[8]]")),
        ("<answer>3</answer><score>8</score>", 8),
    ],
)
def test_a_number_is_read(text: str, value: float) -> None:
    assert read_number(text, 0, 10) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Great!",
        "I give it a 7",
        "Score: seven",
        "Score: 7\nThat is my view.",
        "The Score: 7",
        "Score: 7 or 8",
        "Score: 7-8",
        "Score: 7,5",
        "Score: nan",
        "Score: 1e1",
        "Score:",
        "Reasons:\n1. legs\n2",
        "Score: \u0667",
        "Score - 8",
        "Score: 8 (of 100)",
        "Score: 8*2",
        "Score: 8²",
        "8 of 9 legs",
        "Composition score: 8",
        '{"score": 8, "Score": 3}',
        '{"score": true}',
        '{"score": [8]}',
        '{"score": 8',
        '{"legs": 8}',
        "<answer>8</answer> or so",
        r"\boxed{8}, \boxed{3} or so",
        "Score: 8" + " " * 100_000 + "x",
    ],
)
def test_what_may_mean_something_else_is_not_read(text: str) -> None:
    with pytest.raises(BadReply, match="does not end with 'Score: <number>'"):
        read_number(text, 0, 10)


@pytest.mark.parametrize("text", ["<think>maybe\nScore: 3", "<think>a</think>b<THINKING>\nScore: 3", "◁think▷Score: 3"])
def test_a_thought_that_does_not_end_is_no_answer(text: str) -> None:
    with pytest.raises(BadReply, match="thought has no end"):
        read_number(text, 0, 10)


def test_a_pattern_reads_answers_of_another_form() -> None:
    pattern = r"(?i)verdict (\S+) points"
    assert read_number("Score: 3. Verdict 2 points? No: verdict 8/10 points, I think", 0, 10, pattern) == 8
    assert read_number("<think>verdict 3 points</think> verdict 8 points", 0, 10, pattern) == 8
    for text in ("Score: 8", "verdict eight points", "<think>verdict 3 points</think>"):
        with pytest.raises(BadReply, match=r"has no number where .*verdict.* looks for one"):
            read_number(text, 0, 10, pattern)
    with pytest.raises(BadReply, match="not on the scale"):
        read_number("verdict 11 points", 0, 10, pattern)


def test_a_judge_is_given_its_pattern() -> None:
    with serving(lambda turn, body: completion("I give it 7 stars!")) as server:
        assert VlmJudge(server.url, "m", pattern=r"(\d+) stars").score(*make_batch(1)) == [0.7]


@pytest.mark.parametrize("text", ["11", "Score: -1", "Score: 10.01", "Score: 70/100", "Score: 4/5"])
def test_a_number_off_the_scale_is_not_bent(text: str) -> None:
    with pytest.raises(BadReply, match=f"not on the scale from 0 to 10.*{text}"):
        read_number(text, 0, 10)


def test_any_scale_becomes_0_to_1() -> None:
    with serving(judging(lambda text: {"0": -1, "1": 1, "2": 0.5, "3": 0}[text[0]])) as server:
        judge = VlmJudge(server.url, "m", template="{prompt}", scale=[-1, 1])
        assert judge.score(*make_batch(4)) == [0, 1, 0.75, 0.5]


# -- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (completion("No idea."), "'No idea.'"),
        (completion("Score: 12"), "not on the scale from 0 to 10: 'Score: 12'"),
        (completion("Score: 1", "length"), "cut off"),
        (completion("Score: 1", "content_filter"), "filtered by its server: 'Score: 1'"),
        (completion(None), "no text"),
        ({"error": "overloaded"}, "no chat completion.*overloaded"),
        ({"choices": []}, "no chat completion"),
        ([1], "no chat completion"),
        (b"<html>", "no JSON"),
        (Reply({"error": "unsafe image"}, 400), "status 400 .*unsafe image"),
        (completion("x" * 100_000 + " the end"), "x{100} ... x+ the end'$"),
    ],
)
def test_a_bad_answer_costs_its_image_alone_and_is_not_asked_for_twice(reply: Any, problem: str) -> None:
    def answer(_: int, body: Any) -> Any:
        return reply if question(body).startswith("1:") else completion(f"Score: {question(body)[0]}")

    with serving(answer) as server:
        actor = ScorerActor("vlm_judge", {"url": server.url, "model": "m", "template": "{prompt}"})
        answers = actor.score(*make_batch(4))
    assert [value for value, _ in answers] == [0, None, 0.2, 0.3]
    error = answers[1][1]
    assert error is not None
    with pytest.raises(BadReply, match=problem):
        raise BadReply(error)
    assert len(error) < 400
    assert len(server.bodies) == 4


def test_a_server_that_is_away_fails_the_batch() -> None:
    judge = VlmJudge(f"http://127.0.0.1:{free_port()}/", "m", max_retries=1)
    with pytest.raises(BatchFailed, match=r"tried 2 times .*ConnectError"):
        judge.score(*make_batch(5))


def test_the_rest_is_given_up_with_the_first() -> None:
    with serving(lambda turn, body: Reply(b"down", 503)) as server, pytest.raises(BatchFailed, match="status 503"):
        VlmJudge(server.url, "m", concurrency=1, max_retries=1).score(*make_batch(6))
    assert len(server.bodies) == 2


def test_those_under_way_are_given_up_too() -> None:
    def answer(_: int, body: Any) -> Any:
        if question(body).startswith("0:"):
            server.stopped.wait()
        return Reply(b"down", 503)

    with serving(answer) as server:
        judge = VlmJudge(server.url, "m", template="{prompt}", timeout_s=1000, max_retries=0)
        with pytest.raises(BatchFailed, match="status 503"):
            judge.score(*make_batch(3))
        assert not server.stopped.is_set()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"scale": [10, 0]}, "scale"),
        ({"scale": [0, float("inf")]}, "scale"),
        ({"scale": [1, 2, 3]}, "scale"),
        ({"scale": 10}, "scale"),
        ({"concurrency": 0}, "concurrency"),
        *(({"pattern": pattern}, "pattern must be a regular expression with a") for pattern in ("(", "stars", 7)),
        ({"api_key_env": "KTO_RAY_NOT_SET"}, "Authorization .*'KTO_RAY_NOT_SET', which is not set"),
        ({"api_key_env": "sk-123"}, "api_key_env must be the name .*not the key$"),
        ({"url": "localhost"}, "url"),
        ({"max_retries": -1}, "max_retries"),
    ],
)
def test_bad_arguments_are_the_user_s_to_mend(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        VlmJudge(**({"url": "http://localhost:8000/v1/chat/completions", "model": "m"} | arguments))


def test_no_images_are_no_request() -> None:
    with serving(judging(lambda text: 1)) as server:
        assert VlmJudge(server.url, "m").score(np.zeros((0, 8, 8, 3), np.uint8), []) == []
    assert server.bodies == []
