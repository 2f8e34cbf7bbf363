"""The scorer behind a url: images and prompts go out as JSON, numbers come back (docs/http_scorer.md).

`vlm_judge.py` shares two parts: `Endpoint`, the way to a server (retries, deadlines, limits), and `RemoteScorer`, which
lets single images fail. The rule of both: an answer that is no good costs one score, no answer costs the batch.
"""

import asyncio
import base64
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt

from kto_ray.concurrency import together
from kto_ray.errors import UserError
from kto_ray.identity import Free, Noted
from kto_ray.images import to_png
from kto_ray.records import Prompt
from kto_ray.score.protocol import BatchFailed
from kto_ray.secrets import fill

FIRST_WAIT_S = 0.5  # before the first retry; doubles with every further one
PASSING = (408, 425, 429)  # statuses beside 5xx by which a server says "not now" rather than "no"
LONGEST_WAIT_S = 30.0  # whatever a server's Retry-After asks for: the actor that waits has a time-out itself
EXCERPT = 100  # characters that a message quotes of either end of a server's answer


class BadReply(ValueError):  # noqa: N818  it says what came
    """The server answered, but not with what was asked for; asking again would not help."""


class Endpoint:
    """A url that takes JSON by POST and answers with JSON.

    Connection errors, time-outs and the statuses 408, 425, 429 and 5xx are tried again, after a wait that doubles or as
    long as Retry-After says, at most `LONGEST_WAIT_S`. Redirects are not followed: images and keys go nowhere else.

    Args:
        url: http or https, without user and password in it.
        headers: sent with every request. "$NAME" or "${NAME}" in a value stands for an environment variable of the
            process that scores, so that secrets stay out of the configuration; "$$" is a dollar sign.
        timeout_s: how long one try may take, from connecting to the last byte.
        max_retries: tries after the first.
        max_reply_bytes: reading stops there.

    Raises:
        UserError: an argument that is no good, or an environment variable that is not set.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
        max_retries: int = 3,
        max_reply_bytes: int = 1_000_000,
    ) -> None:
        require(is_number(timeout_s) and timeout_s > 0, "timeout_s", timeout_s, "a number of seconds above 0")
        require(type(max_retries) is int and max_retries >= 0, "max_retries", max_retries, "a whole number, 0 or more")
        require(type(max_reply_bytes) is int and max_reply_bytes > 0, "max_reply_bytes", max_reply_bytes, "1 or more")
        self._url = parse_url(url)
        self.url = str(self._url.copy_with(query=None, fragment=None))  # for messages: a query may hold a key
        self.timeout_s, self.max_retries, self.max_reply_bytes = timeout_s, max_retries, max_reply_bytes
        self._headers = httpx2.Headers({name: fill_header(name, value) for name, value in (headers or {}).items()})
        # Replies are read as they come over the wire, where their size is known: they must not be compressed.
        self._headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})

    def post(self, bodies: Sequence[Mapping[str, Any]], concurrency: int = 1) -> list[Any]:
        """Post several bodies, `concurrency` of them at a time.

        Returns:
            For each body, in order, the JSON that came back (numbers as floats), or the `BadReply`.

        Raises:
            BatchFailed: one of them got no answer, however often it was tried; the others are given up.
        """
        with ThreadPoolExecutor(1) as thread:  # the caller's own may have an event loop
            return thread.submit(asyncio.run, self._post_all(bodies, concurrency)).result()

    async def _post_all(self, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> list[Any]:
        turns = asyncio.Semaphore(concurrency)

        async def post(body: Mapping[str, Any]) -> Any:
            async with turns:
                try:
                    return await self._post(client, json.dumps(body).encode())
                except BadReply as error:
                    return error

        async with httpx2.AsyncClient(headers=self._headers, timeout=None) as client, together() as group:
            posts = [group.create_task(post(body)) for body in bodies]
        return [post.result() for post in posts]

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> Any:
        failure = ""
        for retry in range(1 + self.max_retries):
            wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(retry, 16)) * random.uniform(0.5, 1)
            try:
                # Around all of it: a time-out of the client's would start anew with every byte that drips in.
                async with asyncio.timeout(self.timeout_s):
                    response, reply = await self._try(client, body)
            except TimeoutError:
                failure = f"no whole answer within {self.timeout_s:g} s"
            except httpx2.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return self._parse(reply, response.headers.get("content-encoding", "identity"))
                failure = f"status {response.status_code} {response.reason_phrase}, {excerpt(reply)}"
                if response.has_redirect_location:
                    failure += f", to {response.headers['location']!r}: redirects are not followed, give that as url"
                if response.status_code not in PASSING and not response.is_server_error:
                    raise BadReply(f"{self.url} gave {failure}")
                wait = max(wait, min(LONGEST_WAIT_S, retry_after(response.headers.get("retry-after"))))
            if retry < self.max_retries:
                await asyncio.sleep(wait)
        times = "once" if self.max_retries == 0 else f"{1 + self.max_retries} times"
        raise BatchFailed(f"{self.url} was tried {times} without success; the last time: {failure}")

    async def _try(self, client: httpx2.AsyncClient, body: bytes) -> tuple[httpx2.Response, bytes]:
        """The response and its body, of which nothing is read past the limit."""
        reply = bytearray()
        async with client.stream("POST", self._url, content=body) as response, aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                reply += chunk
                if len(reply) > self.max_reply_bytes:
                    break
        return response, bytes(reply)

    def _parse(self, reply: bytes, encoding: str) -> Any:
        if len(reply) > self.max_reply_bytes:
            raise BadReply(f"{self.url} gave more than {self.max_reply_bytes} bytes (max_reply_bytes)")
        if encoding.lower() != "identity":
            raise BadReply(
                f"{self.url} gave a reply with Content-Encoding {encoding!r}, though none was asked for "
                "(Accept-Encoding: identity); let it, or the proxy before it, answer uncompressed"
            )
        try:
            return json.loads(reply, parse_int=float)
        except (ValueError, RecursionError) as error:
            raise BadReply(f"{self.url} gave no JSON ({error}): {excerpt(reply)}") from error


class RemoteScorer:
    """Lets a server fail single images, each for its own reason, where a `Scorer` gives floats or raises.

    A batch with such an image raises, whereupon the actor tries its images one by one. Those are answered from memory,
    each once: no server is asked, or paid, twice.
    """

    def __init__(self) -> None:
        self._remembered: dict[tuple[bytes, str], float | BadReply] = {}

    def ask(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float | BadReply]:
        """The score of each image, in order, or what the server gave instead. Raises BatchFailed."""
        raise NotImplementedError

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """Score images; see `Scorer`.

        Raises:
            BadReply: an image got no score; for a single image, says why.
            BatchFailed: no image got one.
        """
        if not len(prompts):
            return []
        keys = [
            (hashlib.sha256(image_HWC.tobytes()).digest(), prompt.id)
            for image_HWC, prompt in zip(images_BHWC, prompts, strict=True)
        ]
        if len(keys) == 1 and keys[0] in self._remembered:
            answers = [self._remembered.pop(keys[0])]
        else:
            self._remembered = {}
            answers = self.ask(images_BHWC, prompts)
        scores = [answer for answer in answers if isinstance(answer, float)]
        if len(scores) == len(answers):
            return scores
        if len(keys) > 1:
            self._remembered = dict(zip(keys, answers, strict=True))
        raise next(answer for answer in answers if isinstance(answer, BadReply))


class Http(RemoteScorer):
    """Scores of a server of one's own: one request a batch, in the format of docs/http_scorer.md.

    Value range and natural threshold are the server's. Nothing is loaded, nothing is licensed.

    Args:
        name, version: stored with the scores; give a new version when the server's model changes.
        url, headers, timeout_s, max_retries, max_reply_bytes: see `Endpoint`.

    Raises:
        UserError: see `Endpoint`.
    """

    def __init__(
        self,
        url: Noted[str],
        timeout_s: Free[float] = 30,
        max_retries: Free[int] = 3,
        max_reply_bytes: Free[int] = 1_000_000,
        headers: Free[Mapping[str, str] | None] = None,
        name: str = "http",
        version: str = "1",
    ) -> None:
        super().__init__()
        self.name, self.version = name, version
        self.endpoint = Endpoint(url, headers, timeout_s, max_retries, max_reply_bytes)

    def ask(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float | BadReply]:
        """See `RemoteScorer`. An answer that does not fit the batch as a whole fails it as a whole."""
        body = {
            "images": [base64_png(image_HWC) for image_HWC in images_BHWC],
            "prompts": [{"id": p.id, "text": p.text, "metadata": dict(p.metadata)} for p in prompts],
        }
        (reply,) = self.endpoint.post([body])
        if isinstance(reply, BadReply):
            raise BatchFailed(str(reply)) from reply
        try:
            return read_scores(reply, len(prompts))
        except BadReply as error:
            raise BatchFailed(f"{self.endpoint.url} gave {error}") from error


def read_scores(reply: Any, count: int) -> list[float | BadReply]:
    """What a reply says of each of `count` images.

    Raises:
        BadReply: not {"scores": [number or null, ...]} with or without "errors": [text or null, ...], of that length.
    """
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list):
        raise BadReply(f'no {{"scores": [...]}}: {excerpt(json.dumps(reply))}')
    errors = reply.get("errors") or [None] * count
    for what, values in (("scores", scores), ("errors", errors)):
        if not isinstance(values, list) or len(values) != count:
            found = f"{len(values)} {what}" if isinstance(values, list) else f"no list of {what}"
            raise BadReply(f"{found} for {count} images")
    answers: list[float | BadReply] = []
    for place, (score, error) in enumerate(zip(scores, errors, strict=True)):
        if error is not None:
            answers.append(
                BadReply(f"the server says {excerpt(error if isinstance(error, str) else json.dumps(error))}")
            )
        elif score is None:
            answers.append(BadReply("the server gave no score"))
        elif not isinstance(score, float):
            raise BadReply(f"a {type(score).__name__} as score {place}, not a number: {excerpt(json.dumps(score))}")
        else:
            answers.append(score if math.isfinite(score) else BadReply(f"the server's score is {score}"))
    return answers


def base64_png(image_HWC: npt.NDArray[np.uint8]) -> str:
    """A uint8 (H, W, 3) image as PNG, which is lossless, in base64."""
    return base64.b64encode(to_png(image_HWC[None])[0]).decode()


def excerpt(text: str | bytes) -> str:
    """What a server said, quoted; of a long answer both ends."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} ... {text[-EXCERPT:]}")


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header (a number of them, or a date) asks to wait; 0 if it asks for nothing clear."""
    if value is None:
        return 0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0


def parse_url(url: str) -> httpx2.URL:
    """Raises UserError for anything but http://host... or https://host..."""
    right = "like 'http://localhost:8000/score'"
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise UserError(f"url {url!r} is not a url {right}: {error}") from error
    require(parsed.scheme in ("http", "https") and bool(parsed.host), "url", url, f"an http or https url {right}")
    require(parsed.port is None or 0 < parsed.port < 65536, "url", url, f"a url with a port below 65536 {right}")
    if parsed.userinfo:
        raise UserError(f"url of host {parsed.host!r} holds a user or password; send it as a header instead")
    return parsed


def fill_header(name: str, value: str) -> str:
    """A header's value with its environment variables. Raises UserError, without the value, which may be secret."""
    require(isinstance(name, str) and bool(re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.A)), "headers", name, "a name")
    if not isinstance(value, str):
        raise UserError(f"headers: the value of {name} must be text, not a {type(value).__name__}")
    filled = fill(value, f"headers: {name}")
    if not (filled.isascii() and filled.isprintable()):
        raise UserError(f"headers: {name} is, once filled in, not one line of printable ASCII")
    return filled


def is_number(value: object) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require(condition: bool, field: str, value: object, right: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(f"{field} must be {right}, not {value!r}")
