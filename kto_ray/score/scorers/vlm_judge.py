"""A vision-language model as judge: shows it an image, asks for a number, and reads it (`reading.py`).

Any server with OpenAI's chat completions will do, on a machine of one's own (vLLM, llama.cpp) or rented. The way there
is `http.py`'s, and so is the rule: an answer that is no good costs one score, no answer costs the batch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.errors import UserError
from kto_ray.identity import Free, Noted
from kto_ray.records import Prompt
from kto_ray.score.scorers.http import BadReply, Endpoint, RemoteScorer, base64_png, excerpt, is_number, require
from kto_ray.score.scorers.reading import read_number

TEMPLATE = """This image was made for the following text:

{prompt}

Judge how well the image shows what the text asks for, and how well it is made. Answer in one or two sentences, then \
end with a line that holds nothing but

Score: N

where N is a number from {low} (worst) to {high} (best)."""


class VlmJudge(RemoteScorer):
    """What a vision-language model says of an image: 0 (worst) to 1 (best); 0.5 is the natural threshold.

    The answer must be a bare number or end with a line "Score: 7" or its like (see `read_number`). The licence is the
    model's.

    Args:
        url: of the endpoint, for instance "http://localhost:8000/v1/chat/completions".
        model: as the server calls it.
        template: the question. {prompt} stands for the prompt's text, {low} and {high} for the ends of the scale; all
            else is taken as it stands, other braces too.
        api_key_env: environment variable, where the scorer runs, with the key that is sent as "Authorization: Bearer".
        scale: the numbers that become 0 and 1.
        pattern: regular expression for answers of another form; the first group of its last match is the number.
        temperature: None leaves it to the server.
        extra: further fields of the request, for instance {"max_tokens": 200}.
        concurrency: how many images are asked about at a time.
        name, version: stored with the scores; None: the model's name. Give a new version with a new template.
        timeout_s, max_retries, max_reply_bytes, headers: see `Endpoint`, for each image.

    Raises:
        UserError: an argument that is no good, or an environment variable that is not set.
    """

    def __init__(
        self,
        url: Noted[str],
        model: str,
        template: str = TEMPLATE,
        api_key_env: Free[str | None] = None,
        scale: Sequence[float] = (0, 10),
        pattern: str | None = None,
        temperature: float | None = 0,
        extra: Mapping[str, Any] | None = None,
        concurrency: Free[int] = 4,
        timeout_s: Free[float] = 60,
        max_retries: Free[int] = 3,
        max_reply_bytes: Free[int] = 1_000_000,
        headers: Free[Mapping[str, str] | None] = None,
        name: str = "vlm_judge",
        version: str | None = None,
    ) -> None:
        super().__init__()
        two_numbers = isinstance(scale, list | tuple) and len(scale) == 2 and all(map(is_number, scale))
        require(two_numbers and scale[0] < scale[1], "scale", scale, "two numbers, the lower first")
        require(type(concurrency) is int and concurrency > 0, "concurrency", concurrency, "a whole number, 1 or more")
        require(
            pattern is None or _has_a_group(pattern), "pattern", pattern, "a regular expression with a (group) in it"
        )
        if api_key_env is not None and not api_key_env.isidentifier():
            raise UserError("api_key_env must be the name of an environment variable with the key in it, not the key")
        self.name, self.version = name, model if version is None else version
        self.low, self.high, self.concurrency = float(scale[0]), float(scale[1]), concurrency
        self.pattern = pattern
        self.template = template.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        self.fields = (
            {"model": model} | ({} if temperature is None else {"temperature": temperature}) | dict(extra or {})
        )
        key = {"Authorization": f"Bearer ${{{api_key_env}}}"} if api_key_env is not None else {}
        self.endpoint = Endpoint(url, {**(headers or {}), **key}, timeout_s, max_retries, max_reply_bytes)

    def ask(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float | BadReply]:
        """See `RemoteScorer`."""
        bodies = [self._body(image_HWC, prompt) for image_HWC, prompt in zip(images_BHWC, prompts, strict=True)]
        return [self._judge(reply) for reply in self.endpoint.post(bodies, self.concurrency)]

    def _body(self, image_HWC: npt.NDArray[np.uint8], prompt: Prompt) -> dict[str, Any]:
        content = [
            {"type": "text", "text": self.template.replace("{prompt}", prompt.text)},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_png(image_HWC)}"}},
        ]
        return {**self.fields, "messages": [{"role": "user", "content": content}]}

    def _judge(self, reply: Any) -> float | BadReply:
        if isinstance(reply, BadReply):
            return reply
        try:
            number = read_number(read_answer(reply), self.low, self.high, self.pattern)
            return (number - self.low) / (self.high - self.low)
        except BadReply as error:
            return error


def read_answer(reply: Any) -> str:
    """The text of a chat completion. Raises BadReply when there is none, or one that was cut off or filtered."""
    try:
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadReply(f"the judge's reply is no chat completion: {excerpt(str(reply))}") from error
    if not isinstance(text, str):
        raise BadReply(f"the judge gave no text: {excerpt(str(choice))}")
    if reason == "length":  # "Score: 1" may have been about to become "Score: 10"
        raise BadReply(f"the judge's answer was cut off at its longest: {excerpt(text)}")
    if reason == "content_filter":
        raise BadReply(f"the judge's answer was filtered by its server: {excerpt(text)}")
    return text


def _has_a_group(pattern: object) -> bool:
    try:
        return isinstance(pattern, str) and re.compile(pattern).groups > 0
    except re.error:
        return False
