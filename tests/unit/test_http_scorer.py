"""The scorer behind a url, against servers on loopback that do what servers do: answer, fail, dawdle, talk nonsense."""

import base64
import gzip
import io
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.actor import ScorerActor
from kto_ray.score.protocol import BatchFailed
from kto_ray.score.scorers import http, load_scorer
from kto_ray.score.scorers.http import BadReply, Http

DOCUMENT = (Path(__file__).parents[2] / "docs" / "http_scorer.md").read_text()


@dataclass
class Reply:
    """An answer: bytes or JSON with its length, or chunks without; `raw` chunks are all that goes over the wire."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False


class Server(ThreadingHTTPServer):
    """Answers the n-th request with `answer(n, body)`, and keeps what it was asked."""

    def __init__(self, answer: Callable[[int, Any], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.lock, self.stopped = answer, threading.Lock(), threading.Event()
        self.bodies: list[Any] = []
        self.headers: list[Mapping[str, str]] = []
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def drip(self, *first: bytes) -> Iterator[bytes]:
        """Some bytes, and then one after the other for as long as the test lasts."""
        yield from first
        while not self.stopped.wait(0.02):
            yield b" "

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on slow servers; that is their right."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            turn = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append(self.headers)
            self.server.times.append(time.monotonic())
        reply = self.server.answer(turn, body)
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        if reply.raw:
            self.close_connection = True
        else:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
        if isinstance(reply.body, Iterator):
            if not reply.raw:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
            for chunk in itertools.chain(reply.body, [] if reply.raw else [b""]):
                self.wfile.write(chunk if reply.raw else b"%x\r\n%b\r\n" % (len(chunk), chunk))
        else:
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serving(answer: Callable[[int, Any], Any]) -> Iterator[Server]:
    """A server on loopback that answers the n-th request, of this body, with `answer(n, body)`."""
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def make_batch(count: int) -> tuple[npt.NDArray[np.uint8], list[Prompt]]:
    """Noise, which survives no lossy compression, and prompts with what JSON must escape."""
    images_BHWC = np.random.default_rng(0).integers(0, 256, (count, 9, 13, 3), np.uint8)
    return images_BHWC, [Prompt(f"p{i}", f'{i}: a "café" {{on}} \\ 日本', {"style": f"s{i}"}) for i in range(count)]


def decode(png: str) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(base64.b64decode(png, validate=True)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def brightness(_: int, body: Any) -> Any:
    return {"scores": [decode(png).mean() for png in body["images"]]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(autouse=True)
def _quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# -- what goes out and comes back -------------------------------------------------------------------------------------


def test_a_batch_is_one_request_with_every_image_as_it_was_drawn() -> None:
    images_BHWC, prompts = make_batch(5)
    with serving(brightness) as server:
        scores = Http(server.url).score(images_BHWC, prompts)
    assert scores == pytest.approx([image.mean() for image in images_BHWC])
    assert all(type(score) is float for score in scores)
    (body,) = server.bodies
    assert set(body) == {"images", "prompts"}
    assert (np.stack([decode(png) for png in body["images"]]) == images_BHWC).all()
    assert body["prompts"] == [{"id": p.id, "text": p.text, "metadata": p.metadata} for p in prompts]


def test_scores_keep_the_order_of_the_images_and_whole_numbers_are_numbers() -> None:
    with serving(lambda turn, body: {"scores": [3, -1.5, 0, 1e3]}) as server:
        assert Http(server.url).score(*make_batch(4)) == [3.0, -1.5, 0.0, 1000.0]


def test_no_images_are_no_request() -> None:
    with serving(brightness) as server:
        assert Http(server.url).score(*make_batch(0)) == []
    assert server.bodies == []


def test_it_is_a_built_in_scorer_of_any_name() -> None:
    with serving(brightness) as server:
        actor = ScorerActor("http", {"url": server.url, "name": "mine", "version": "7"})
        images_BHWC, prompts = make_batch(2)
        assert actor.describe() == ("mine", "7")
        assert actor.score(images_BHWC, prompts) == [(pytest.approx(image.mean()), None) for image in images_BHWC]


async def test_it_can_be_called_inside_an_event_loop() -> None:
    with serving(brightness) as server:
        assert len(Http(server.url).score(*make_batch(1))) == 1


# -- images that fail alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b'{"scores": [1, null, 3]}', "the server gave no score"),
        (b'{"scores": [1, null, 3], "errors": [null, "no face", null]}', "the server says 'no face'"),
        (b'{"scores": [1, 2, 3], "errors": [null, "no face", null]}', "the server says 'no face'"),
        (b'{"scores": [1, null, 3], "errors": [null, {"code": 7}, null]}', "the server says '{\"code\": 7.0}'"),
        (b'{"scores": [1, NaN, 3]}', "the server's score is nan"),
        (b'{"scores": [1, -Infinity, 3]}', "the server's score is -inf"),
        (b'{"scores": [1, 1e999, 3]}', "the server's score is inf"),
        (b'{"scores": [1, ' + b"9" * 400 + b", 3]}", "the server's score is inf"),
    ],
)
def test_an_image_without_score_fails_alone_with_the_reason(reply: bytes, error: str) -> None:
    with serving(lambda turn, body: reply) as server:
        answers = ScorerActor("http", {"url": server.url}).score(*make_batch(3))
    assert answers == [(1.0, None), (None, f"BadReply: {error}"), (3.0, None)]
    assert len(server.bodies) == 1  # the actor tries images one by one, the server is not asked again


def test_the_same_images_later_are_asked_about_anew() -> None:
    replies = [{"scores": [1, None]}, {"scores": [5, 6]}, {"scores": [7]}]
    with serving(lambda turn, body: replies[turn]) as server:
        actor = ScorerActor("http", {"url": server.url})
        images_BHWC, prompts = make_batch(2)
        assert [value for value, _ in actor.score(images_BHWC, prompts)] == [1, None]
        assert [value for value, _ in actor.score(images_BHWC, prompts)] == [5, 6]
        assert [value for value, _ in actor.score(images_BHWC[:1], prompts[:1])] == [7]


def test_what_was_not_asked_for_one_by_one_is_forgotten_with_the_next_batch() -> None:
    replies = [{"scores": [1, None]}, {"scores": [5, 6]}, {"scores": [7]}]
    with serving(lambda turn, body: replies[turn]) as server:
        scorer, (images_BHWC, prompts) = Http(server.url), make_batch(2)
        with pytest.raises(BadReply, match="gave no score"):
            scorer.score(images_BHWC, prompts)
        assert scorer.score(images_BHWC, prompts) == [5, 6]
        assert scorer.score(images_BHWC[:1], prompts[:1]) == [7]


# -- answers that are no good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (b"<html>welcome</html>", "no JSON.*<html>welcome"),
        (b"", "no JSON"),
        (b'{"scores": [1, 2', "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", "no {.scores"),
        (b'{"score": [1, 2]}', "no {.scores.*'{.score.: "),
        (b'{"scores": 1}', "no {.scores"),
        (b'{"scores": [1]}', "1 scores for 2 images"),
        (b'{"scores": [1, 2, 3]}', "3 scores for 2 images"),
        (b'{"scores": []}', "0 scores for 2 images"),
        (b'{"scores": [1, true]}', "a bool as score 1"),
        (b'{"scores": ["1", 2]}', "a str as score 0"),
        (b'{"scores": [1, [2]]}', "a list as score 1"),
        (b'{"scores": [1, 2], "errors": ["x"]}', "1 errors for 2 images"),
        (b'{"scores": [1, 2], "errors": "x"}', "no list of errors"),
    ],
)
def test_an_answer_that_does_not_fit_the_batch_fails_it_at_once(reply: bytes, problem: str) -> None:
    with serving(lambda turn, body: reply) as server:
        with pytest.raises(BatchFailed, match=problem) as caught:
            Http(server.url).score(*make_batch(2))
        assert server.url in str(caught.value)
    assert len(server.bodies) == 1


def test_the_actor_does_not_split_a_batch_that_failed_as_one() -> None:
    with serving(lambda turn, body: {"scores": []}) as server:
        answers = ScorerActor("http", {"url": server.url}).score(*make_batch(3))
    assert [value for value, _ in answers] == [None] * 3
    assert all("0 scores for 3 images" in str(error) for _, error in answers)
    assert len(server.bodies) == 1


def endless(server: Server) -> Iterator[bytes]:
    while not server.stopped.is_set():
        yield b"1" * 1000


def test_a_reply_that_is_too_large_is_not_read_to_its_end() -> None:
    too_large = pytest.raises(BatchFailed, match="more than 5000 bytes")
    with serving(lambda turn, body: Reply(endless(server))) as server, too_large:
        Http(server.url, max_reply_bytes=5000).score(*make_batch(1))
    with serving(lambda turn, body: b" " * 5001) as server, too_large:
        Http(server.url, max_reply_bytes=5000).score(*make_batch(1))
    assert len(server.bodies) == 1
    with serving(lambda turn, body: b'{"scores": [1]}'.ljust(5000)) as server:
        assert Http(server.url, max_reply_bytes=5000).score(*make_batch(1)) == [1]


def test_compressed_replies_are_neither_asked_for_nor_unfolded() -> None:
    """A megabyte could become a gigabyte."""
    zipped = Reply(gzip.compress(b'{"scores": [1]}'), headers={"Content-Encoding": "gzip"})
    with serving(lambda turn, body: zipped) as server, pytest.raises(BatchFailed, match="Content-Encoding 'gzip'"):
        Http(server.url, headers={"accept-encoding": "gzip"}).score(*make_batch(1))
    assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
def test_a_refusal_is_final_and_quoted(status: int) -> None:
    refused = pytest.raises(BatchFailed, match=rf"/score gave status {status} .*not like this")
    with serving(lambda turn, body: Reply({"detail": "not like this"}, status)) as server, refused:
        Http(server.url).score(*make_batch(2))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    refused = pytest.raises(BatchFailed, match=rf"status {status} .*/score': redirects are not followed")
    with (
        serving(brightness) as other,
        serving(lambda turn, body: Reply(b"", status, {"Location": other.url})) as server,
        refused,
    ):
        Http(server.url, headers={"Authorization": "Bearer 1"}).score(*make_batch(1))
    assert len(server.bodies) == 1
    assert other.bodies == []


# -- no answer, and trying again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(status: int) -> None:
    images_BHWC, prompts = make_batch(2)
    with serving(lambda turn, body: Reply(b"busy", status) if turn < 2 else brightness(turn, body)) as server:
        scores = Http(server.url, max_retries=2).score(images_BHWC, prompts)
    assert scores == pytest.approx([image.mean() for image in images_BHWC])
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]


def test_it_is_given_up_in_the_end() -> None:
    with serving(lambda turn, body: Reply(b"out of memory", 500)) as server:
        with pytest.raises(BatchFailed, match=r"tried 4 times .*status 500 .*out of memory") as caught:
            Http(server.url).score(*make_batch(1))
        assert server.url in str(caught.value)
        with pytest.raises(BatchFailed, match="tried once "):
            Http(server.url, max_retries=0).score(*make_batch(1))
    assert len(server.bodies) == 5


def test_waits_grow() -> None:
    with serving(lambda turn, body: Reply(b"", 500)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "FIRST_WAIT_S", 0.1)
        with pytest.raises(BatchFailed):
            Http(server.url, max_retries=2).score(*make_batch(1))
    first, second = np.diff(server.times)
    assert first >= 0.05
    assert second >= 0.1


@pytest.mark.parametrize("dated", [False, True])
def test_the_server_may_ask_for_patience(dated: bool) -> None:
    def answer(turn: int, body: Any) -> Any:
        # A date has whole seconds: two from now are at least one.
        wait = formatdate(time.time() + 2, usegmt=True) if dated else "1"
        return brightness(turn, body) if turn else Reply(b"", 429, {"Retry-After": wait})

    with serving(answer) as server:
        Http(server.url).score(*make_batch(1))
    assert server.times[1] - server.times[0] >= 0.95


@pytest.mark.parametrize("wait", ["86400", "9" * 400, "Fri, 31 Dec 2199 23:59:59 GMT", "soon", "-5", "", "nan"])
def test_but_not_for_ever_nor_in_riddles(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LONGEST_WAIT_S", 0.02)
    with serving(
        lambda turn, body: brightness(turn, body) if turn else Reply(b"", 503, {"Retry-After": wait})
    ) as server:
        assert len(Http(server.url).score(*make_batch(1))) == 1
    assert len(server.bodies) == 2


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(BatchFailed, match=f"{re.escape(url)} was tried 3 times .*ConnectError"):
        Http(url, max_retries=2).score(*make_batch(1))


def test_a_server_that_hangs_up_is_tried_again() -> None:
    with serving(
        lambda turn, body: brightness(turn, body) if turn else Reply(iter([b"HTTP/1.1 2"]), raw=True)
    ) as server:
        assert len(Http(server.url).score(*make_batch(1))) == 1
    assert len(server.bodies) == 2


def silent(server: Server) -> Reply:
    server.stopped.wait()
    return Reply({"scores": [1]})


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        lambda server: Reply(server.drip(b'{"scores": [1]')),
        lambda server: Reply(server.drip(b"HTTP/1.1 200 OK\r\nX-Slow:"), raw=True),
    ],
    ids=["silent", "drips its body", "drips its headers"],
)
def test_a_slow_server_holds_nobody_up(answer: Callable[[Server], Reply]) -> None:
    with serving(lambda turn, body: answer(server)) as server:
        with pytest.raises(BatchFailed, match=r"tried 2 times .*no whole answer within 0\.3 s"):
            Http(server.url, timeout_s=0.3, max_retries=1).score(*make_batch(1))
        assert not server.stopped.is_set()
    assert len(server.bodies) == 2


# -- arguments --------------------------------------------------------------------------------------------------------


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    headers = {"Authorization": "Bearer $REWARD_TOKEN", "X-Both": "${REWARD_TOKEN}x$$5", "X-Plain": "as it is"}
    with serving(brightness) as server:
        Http(server.url, headers=headers).score(*make_batch(1))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.headers[0]["X-Both"] == "s3cretx$5"
    assert server.headers[0]["X-Plain"] == "as it is"
    assert server.headers[0]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"url": "localhost:8000"}, "url must be an http or https url .*'localhost:8000'"),
        ({"url": ""}, "url must be"),
        ({"url": "ftp://host/score"}, "url must be"),
        ({"url": "http:///score"}, "url must be"),
        ({"url": "http://host:99999/"}, "port"),
        ({"url": "http://host:many/"}, "'http://host:many/'"),
        ({"url": None}, "url None"),
        ({"timeout_s": 0}, "timeout_s must be .*not 0"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "30"}, "timeout_s"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"max_reply_bytes": 0}, "max_reply_bytes"),
        ({"headers": {"X-Key": "$KTO_RAY_NOT_SET"}}, "X-Key .*'KTO_RAY_NOT_SET', which is not set"),
        ({"headers": {"X-Key": "5 $"}}, r"X-Key .*'\$\$'"),
        ({"headers": {"X-Key": 5}}, "X-Key must be text, not a int"),
        ({"headers": {"X Key": "5"}}, "'X Key'"),
        ({"headers": {"X-Key": "$KTO_RAY_TWO_LINES"}}, "X-Key .*one line"),
    ],
)
def test_bad_arguments_are_the_user_s_to_mend(
    arguments: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTO_RAY_TWO_LINES", "s3cret\n")
    with pytest.raises(UserError, match=problem) as caught:
        Http(**({"url": "http://localhost:8000/score"} | arguments))
    assert "s3cret" not in str(caught.value)


def test_messages_hold_no_secret_of_the_url() -> None:
    with pytest.raises(UserError, match="'host'") as refused:
        Http("http://me:s3cret@host/score")
    with pytest.raises(BatchFailed) as failed:
        Http(f"http://127.0.0.1:{free_port()}/score?key=s3cret", max_retries=0).score(*make_batch(1))
    assert "s3cret" not in str(refused.value) + str(failed.value)


# -- documentation ----------------------------------------------------------------------------------------------------


def test_the_documented_server_works() -> None:
    import uvicorn

    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "server"}
    exec(compile(code, "docs/http_scorer.md", "exec"), namespace)
    server = uvicorn.Server(uvicorn.Config(namespace["app"], port=0, ws="none", lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        images_BHWC, prompts = make_batch(3)
        scores = Http(f"http://127.0.0.1:{port}/score").score(images_BHWC, prompts)
    finally:
        server.should_exit = True
        thread.join()
    assert scores == pytest.approx([image[..., 0].mean() / 255 for image in images_BHWC])


def test_the_documented_configuration_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    from kto_ray.config import Labeling

    monkeypatch.setenv("REWARD_TOKEN", "1")
    monkeypatch.setenv("JUDGE_KEY", "2")
    sections = [yaml.safe_load(text)["label"] for text in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)]
    label = Labeling.model_validate({"scorers": sections[0]["scorers"] | sections[1]["scorers"]})
    assert label.held_out == ["judge"]
    for settings in label.scorers.values():
        load_scorer(str(settings.scorer))(**settings.args)


@pytest.mark.parametrize("scorer", ["http", "vlm_judge"])
def test_every_argument_is_documented(scorer: str) -> None:
    import inspect

    for argument in inspect.signature(load_scorer(scorer)).parameters:
        assert f"`{argument}`" in DOCUMENT or f" {argument}: " in DOCUMENT, argument
