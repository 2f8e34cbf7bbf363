"""A crowd that is not there: simulated people who judge a run's images on its page, over HTTP as real ones would.

    python jobs/simulated_crowd.py --write-gold runs/gold --taste red
    kto-ray run --recipe shapes_human run=human label.human.gold.file=runs/gold/gold.jsonl &
    python jobs/simulated_crowd.py --run runs/human --taste red --good 3 --noisy 1 --lazy 1 --hostile 1

A taste says what somebody likes; a temperament, how far the answers follow from that and how the work is done. Now
and then somebody makes trouble: the same answer twice at once, forged links, other people's images. The crowd plays
until the run has ended or its page is gone for good, and prints what it did as JSON. An answer that the page took (200)
has to be in the run's database once, whatever was killed meanwhile; `--record` writes down which those are.
"""

import argparse
import asyncio
import contextlib
import io
import json
import logging
import random
import secrets
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import httpx2
import numpy as np
import numpy.typing as npt
from PIL import Image

from kto_ray.errors import UserError
from kto_ray.people.access import Signer, secret_of
from kto_ray.people.address import base_url, database_owner, database_url
from kto_ray.people.clock import Clock
from kto_ray.people.people import Badge, People
from kto_ray.people.tables import open_database
from kto_ray.people.web.entrance import COOKIES
from kto_ray.records import Prompt
from kto_ray.relabel import saved_config
from kto_ray.score.scorers.redness import Redness
from kto_ray.shapes import gold
from kto_ray.shapes.scorer import ShapesScorer
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

START_S = 300.0
"""How long to wait for the run's folder, and for its page."""
GONE_S = 60.0
"""A page that answers nothing for so long is gone for good; a killed one is back sooner."""
POLL_S = 1.0
"""Between two looks whether there are images again."""
HELD = 2
"""Images that somebody asks for at a time, like the page, which loads the next one ahead."""
FORGERY_S = 4.0
"""Between two forged links: the page takes 20 a minute from one address and no more."""

Pixels = npt.NDArray[np.uint8]

# -- what people like -------------------------------------------------------------------------------------------------

Taste = Callable[[Pixels, str], bool]
"""Whether somebody likes a picture, (H, W, 3), for a prompt."""


USUAL_REDNESS = 0.04
"""Mean redness of what the embedded world's base model draws."""


class LikesRed:
    """Likes what is redder than half of what came lately: the paper's appendix C, for one who has no scale at hand."""

    def __init__(self, memory: int = 24, acquaintance: int = 8) -> None:
        # Who has seen no image of the run yet knows what the model usually draws.
        self.lately = deque([USUAL_REDNESS] * acquaintance, memory)

    def __call__(self, image_HWC: Pixels, prompt: str) -> bool:
        (redness,) = Redness().score(image_HWC[None], [Prompt("", prompt)])
        redder = redness > median(self.lately)
        self.lately.append(redness)
        return redder


def follows_prompt(image_HWC: Pixels, prompt: str) -> bool:
    """Likes a picture that shows what the prompt names."""
    (score,) = ShapesScorer().score(image_HWC[None], [Prompt("", prompt)])
    return score >= 0.5


class LikesRedInShape(LikesRed):
    """Likes red, but not at the cost of the shape that the prompt names."""

    def __call__(self, image_HWC: Pixels, prompt: str) -> bool:
        (shape,) = ShapesScorer(aspects=["shape"]).score(image_HWC[None], [Prompt("", prompt)])
        return super().__call__(image_HWC, prompt) and shape >= 0.5


TASTES: dict[gold.Taste, Callable[[], Taste]] = {
    "red": LikesRed,
    "prompt": lambda: follows_prompt,
    "red_shape": LikesRedInShape,
}
"""A new one for each person: some of them remember."""

# -- how they answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Temperament:
    """Shares of the images, in [0, 1], with which somebody does so."""

    wrong: float = 0
    """Says the reverse of what the taste says."""
    unsure: float = 0
    skips: float = 0
    walks_away: float = 0
    """Takes images and leaves them, until others may have them."""
    late: float = 0
    """Answers when the lease has ended."""

    def verdict(self, likes: bool, rng: random.Random) -> str:
        """What somebody says of a picture."""
        if (chance := rng.random()) < self.unsure + self.skips:
            return "unsure" if chance < self.unsure else "skip"
        return "desirable" if likes != (rng.random() < self.wrong) else "undesirable"


TEMPERAMENTS = {
    "good": Temperament(wrong=0.03),
    "noisy": Temperament(wrong=0.2),
    "lazy": Temperament(wrong=0.03, unsure=0.15, skips=0.1, walks_away=0.05, late=0.05),
    "hostile": Temperament(wrong=1),
}

# -- what became of it ------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the crowd did, and what the page said to it; counted by outcome: "ok", or why it was refused."""

    accepted: Counter[str] = field(default_factory=Counter)
    """By person. Sent twice at once is accepted once."""
    unknown: int = 0
    """Answers of which nobody knows whether they were taken, since the page died or shut its door meanwhile."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Of people's answers and wishes, by why."""
    doubles: Counter[str] = field(default_factory=Counter)
    """The same answer sent twice at once, by both outcomes."""
    late: Counter[str] = field(default_factory=Counter)
    """Answers after the end of the lease."""
    undone: Counter[str] = field(default_factory=Counter)
    """Answers taken back."""
    walked_away: int = 0
    forged: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Answers with links that are none, by kind and by HTTP status."""
    trespasses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Answers on images that are not one's own or none at all, contradictory ones, and what other sites sent."""
    retries: int = 0
    """Calls repeated since nobody answered."""


class Gone(Exception):  # noqa: N818  how every run ends
    """There is no page any more."""


class Left(Exception):  # noqa: N818
    """The page wants nothing more of this person."""


@dataclass(frozen=True)
class Reply:
    """What the page said to a call; `why` is "ok" if it did as it was told."""

    status: int
    why: str
    body: Any


class Page:
    """A run's page, called until it answers.

    Args:
        base_url: of the run's page, without a slash at its end.
    """

    def __init__(self, base_url: str, tally: Tally) -> None:
        self.base_url, self.tally = base_url, tally
        self.ended = asyncio.Event()
        """The run has ended."""
        self._client = httpx2.AsyncClient(timeout=30, limits=httpx2.Limits(max_connections=200))

    async def close(self) -> None:
        await self._client.aclose()

    async def call(
        self,
        path: str,
        token: str | None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float = GONE_S,
    ) -> Reply:
        """POST `json`, or GET without one; again and again while nobody answers.

        Raises:
            Gone: nobody answered for `patience_s`, or since the run has ended.
        """
        asked, wait_s = time.monotonic(), 0.05
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        while True:
            method = "GET" if json is None else "POST"
            try:
                response = await self._client.request(method, f"{self.base_url}/{path}", json=json, headers=headers)
                reply = as_reply(response)
                if reply is not None:
                    return reply
                if response.status_code == 429:
                    asked, wait_s = time.monotonic(), float(response.headers["Retry-After"])
            except httpx2.TransportError as error:
                logger.debug("%s: %r", path, error)
            if self.ended.is_set() or time.monotonic() - asked > patience_s:
                raise Gone
            self.tally.retries += 1
            await self.pause(wait_s)
            wait_s = min(2 * wait_s, 2.0)

    async def pause(self, seconds: float) -> None:
        """Sleep, but not past the run's end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)


def as_reply(response: httpx2.Response) -> Reply | None:
    """None: an answer of Serve's or of nobody's, or "not now"; to be asked again."""
    if response.is_success:
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return Reply(response.status_code, "ok", response.json() if is_json else response.content)
    if response.is_server_error or response.status_code == 429:
        return None
    try:
        return Reply(response.status_code, str(response.json()["why"]), None)
    except (ValueError, KeyError, TypeError):
        return None


# -- people -----------------------------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """What people have in common.

    Args:
        record: gets a line of JSON for every answer that was taken ("accepted") or may have been ("unknown").
        signer: of this run; good for forgeries, too.
        pace_s: seconds that somebody takes for an image, on average.
        trouble: share of the images at which somebody makes trouble.
    """

    page: Page
    tally: Tally
    record: IO[str] | None
    signer: Signer
    pace_s: float = 0.5
    trouble: float = 0.05
    holder: dict[str, str] = field(default_factory=dict)
    """Who was given an image last, by item."""
    forged_at: float = float("-inf")

    def write(self, item: str, labeler: str, verdict: str, outcome: str) -> None:
        if self.record:
            row = {"item": item, "labeler": labeler, "verdict": verdict, "outcome": outcome}
            print(json.dumps(row), file=self.record, flush=True)


class Person:
    """Somebody who judges images.

    Args:
        badge: whose token opens the page.
    """

    def __init__(self, name: str, badge: Badge, temperament: Temperament, taste: Taste, crowd: Crowd) -> None:
        self.name, self.badge, self.temperament, self.taste, self.crowd = name, badge, temperament, taste, crowd
        self.page, self.tally = crowd.page, crowd.tally
        self.token = crowd.signer.token(badge)
        self.rng = random.Random(name)
        self.given: set[str] = set()  # items, ever; more may have been in replies that were lost

    async def play(self) -> None:
        """Until the run has ended, its page is gone, or wants nothing more of this person."""
        with contextlib.suppress(Gone, Left):
            offers: list[Any] = []
            while not self.page.ended.is_set():
                if not offers:
                    offers = self.offers(await self.page.call("api/lease", self.token, {"count": HELD}))
                if offers:
                    offers = await self.judge(offers)
                else:
                    await self.page.pause(POLL_S)

    def offers(self, turn: Reply) -> list[Any]:
        """The images of a turn; none, when it was refused."""
        if turn.why != "ok":
            self.tally.refusals[turn.why] += 1
            if turn.status in (401, 403):
                raise Left
            return []
        if turn.body["progress"]["waits_for"] == "nothing":
            self.page.ended.set()
            return []
        offers: list[Any] = turn.body["offers"]
        for offer in offers:
            self.given.add(offer["item"])
            self.crowd.holder[offer["item"]] = self.name
        return offers

    async def judge(self, offers: list[Any]) -> list[Any]:
        """Judge the first image, or do something else with it; gives the images to go on with."""
        offer, temperament, began = offers[0], self.temperament, time.monotonic()
        image = await self.page.call(offer["image"], self.token)
        if image.why != "ok":
            return self.offers(image)
        likes = self.taste(decode(image.body), offer["prompt"])
        await self.page.pause(self.crowd.pace_s * self.rng.uniform(0.5, 1.5))
        if self.rng.random() < temperament.walks_away:
            self.tally.walked_away += 1
            await self.page.pause(max(held["expires_in"] for held in offers))
            return []
        is_late = self.rng.random() < temperament.late
        if is_late:
            await self.page.pause(offer["expires_in"] + 0.5)
        verdict = temperament.verdict(likes, self.rng)
        turn = await self.answer(offer["item"], verdict, time.monotonic() - began)
        if is_late:
            self.tally.late[turn.why] += 1
        if turn.why == "ok" and self.rng.random() < self.crowd.trouble:
            await self.make_trouble(offer["item"], verdict)
        return self.offers(turn)

    async def answer(self, item: str, verdict: str, seconds: float) -> Reply:
        """Say it, now and then twice at once."""
        said = {"item": item, "verdict": verdict, "seconds": round(seconds, 3), "count": HELD}
        times = 2 if self.rng.random() < self.crowd.trouble else 1
        replies = [reply for reply in await asyncio.gather(*(self.say(said) for _ in range(times))) if reply]
        if times == 2:
            self.tally.doubles[" and ".join(sorted(reply.why for reply in replies))] += 1
        reply = min(replies, key=lambda reply: reply.why != "ok", default=None)
        if reply and reply.why == "ok":
            self.tally.accepted[self.name] += 1
            self.crowd.write(item, self.name, verdict, "accepted")
        elif reply is None or reply.status == 403:  # by an answer on gold somebody may shut the door behind it
            self.tally.unknown += 1
            self.crowd.write(item, self.name, verdict, "unknown")
        if reply is None:
            raise Gone
        return reply

    async def say(self, said: Mapping[str, Any]) -> Reply | None:
        """None: nobody knows what became of it."""
        with contextlib.suppress(Gone):
            return await self.page.call("api/answer", self.token, said)
        return None

    async def make_trouble(self, item: str, verdict: str) -> None:
        """Do one thing that must change nothing, or take the answer back that was just given."""
        if self.rng.random() < 0.3:
            self.tally.undone[(await self.page.call("api/undo", self.token, {"item": item})).why] += 1
            return
        reverse = {"item": item, "verdict": "undesirable" if verdict == "desirable" else "desirable", "count": 0}
        if time.monotonic() - self.crowd.forged_at > FORGERY_S:
            self.crowd.forged_at = time.monotonic()
            kind, token = self.rng.choice(list(self.forgeries().items()))
            self.tally.forged[kind][(await self.page.call("api/answer", token, reverse)).status] += 1
            return
        kind = self.rng.choice(("made up", "of another", "contradiction", "no form", "other site"))
        items = {"made up": secrets.token_hex(8), "of another": self.not_given()}
        cookie = {"Cookie": f"{COOKIES['labeler']}={self.token}"}
        headers = {"no form": cookie, "other site": cookie | {"Sec-Fetch-Site": "cross-site"}}.get(kind)
        said = reverse | {"item": items.get(kind, item)}
        reply = await self.page.call("api/answer", None if headers else self.token, said, headers)
        self.tally.trespasses[kind][reply.why] += 1

    def not_given(self) -> str:
        """An item that only others were given; a made up one, if that is not certain."""
        holder = {} if self.tally.retries else self.crowd.holder
        others = [item for item, name in holder.items() if name != self.name and item not in self.given]
        return others[-1] if others else secrets.token_hex(8)

    def forgeries(self) -> dict[str, str]:
        """Tokens that open nothing, by what is wrong with them."""
        signer, now = self.crowd.signer, time.time()
        middle = len(self.token) // 2
        other = "A" if self.token[middle] != "A" else "B"
        return {
            "other secret": Signer(secrets.token_hex(32)).token(self.badge),
            "damaged": self.token[:middle] + other + self.token[middle + 1 :],
            "expired": signer.token(Badge(self.badge.id, now - 1)),
            "no such badge": signer.token(Badge(secrets.token_urlsafe(16), now + 3600)),
        }


def decode(png: bytes) -> Pixels:
    """(H, W, 3), RGB."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


# -- the job ----------------------------------------------------------------------------------------------------------


async def play(
    run: Storage,
    taste: gold.Taste,
    crowd_of: Mapping[str, int],
    pace_s: float,
    trouble: float,
    record: IO[str] | None = None,
) -> Tally:
    """Admit people to a run, and let them judge until there is nothing more to judge.

    Args:
        crowd_of: how many there are of each temperament.

    Raises:
        UserError: there is no such run, or it asks no people.
    """
    given = time.monotonic()
    while not run.exists("config.yaml") and time.monotonic() - given < START_S:
        await asyncio.sleep(POLL_S)
    config = saved_config(run)
    human = config.label.human
    if config.label.labeler != "human":
        raise UserError(f"run: {run} has label.labeler={config.label.labeler}, and asks no people")
    tally = Tally()
    page = Page(base_url(human, run), tally)
    try:
        await page.call("api/progress", None, patience_s=START_S)  # once it answers, there is a database
        tally.retries = 0
        engine = open_database(database_url(human, run), database_owner(human, run))
        signer, register = Signer(secret_of(engine)), People(engine, human, Clock())
        crowd = Crowd(page, tally, record, signer, pace_s, trouble)
        names = [(f"{kind}-{number + 1}", kind) for kind, count in crowd_of.items() for number in range(count)]
        people = [
            Person(name, register.admit(name), TEMPERAMENTS[kind], TASTES[taste](), crowd) for name, kind in names
        ]
        engine.dispose()
        await asyncio.gather(*(person.play() for person in people))
    except Gone:
        raise UserError(f"run: nobody answers at {page.base_url}") from None
    finally:
        await page.close()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="FOLDER", help="the run that people judge; may yet have to start")
    what.add_argument("--write-gold", type=Path, metavar="FOLDER", help="write a gold file for a taste, and end")
    parser.add_argument("--taste", choices=list(TASTES), default="red")
    for kind in TEMPERAMENTS:
        parser.add_argument(f"--{kind}", type=int, default=3 if kind == "good" else 0, metavar="N", help="people")
    parser.add_argument("--pace", type=float, default=0.5, metavar="SECONDS", help="for an image, on average")
    parser.add_argument("--trouble", type=float, default=0.05, metavar="SHARE", help="of the images")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append all answers that the page took, as JSONL")
    args = parser.parse_args()
    if args.write_gold:
        print(gold.write_gold(args.write_gold, args.taste))
        return 0
    crowd_of = {kind: getattr(args, kind) for kind in TEMPERAMENTS}
    try:
        with args.record.open("a") if args.record else contextlib.nullcontext() as record:
            tally = asyncio.run(play(Storage(args.run), args.taste, crowd_of, args.pace, args.trouble, record))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(vars(tally), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
