"""What a scorer is tried with; `contract.py` has it tried in an actor.

A check is a method that returns a remark (mostly "") and raises when a promise of `Scorer` is broken: `Broken`, in
words that say what would be right, or whatever the scorer itself raised.

Shape suffixes: B images; H, W pixels; C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.check.finding import PICTURES, Broken, Images, Size, find, number, picture, shorten, words_of
from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.protocol import Scorer
from kto_ray.score.scorers import load_scorer

SIZES: tuple[Size, ...] = ((64, 64), (512, 512), (64, 96), (96, 64))
TEXTS = {
    "an empty prompt": "",
    "a prompt of 10,000 words": "circle " * 10_000,
    "a prompt of emoji": "🔴⚫ 👩‍👩‍👧 \u202e",
    "a prompt of markup": "<script>alert('circle')</script>",
}


class ScorerTrial:
    """A scorer and what it is tried with. Lives in the actor, to and from which only plain values travel."""

    def __init__(self, path: str, arguments: Mapping[str, Any], size: Size = (64, 64), tolerance: float = 1e-4) -> None:
        self.path, self.arguments, self.size, self.tolerance = path, arguments, size, tolerance
        self.images_BHWC = np.stack([picture(shown, size) for _, shown in PICTURES])
        self.texts = [caption for caption, _ in PICTURES]
        self.scorer: Scorer
        self.first: list[float]

    def check(self, name: str) -> tuple[str, bool, str, bool]:
        """The `Finding` of one of `SCORER_CHECKS`, as a tuple."""
        found = find(name, lambda: SCORER_CHECKS[name](self), essential=name in SCORER_ESSENTIAL)
        return found.name, found.passed, found.words, found.last

    def build(self) -> str:
        self.scorer = load_scorer(self.path)(**self.arguments)
        return ""

    def named(self) -> str:
        for attribute in ("name", "version"):
            value = getattr(self.scorer, attribute, None)
            if not isinstance(value, str) or not value:
                raise Broken(f'its {attribute} is {value!r}; write {attribute} = "..." in the class')
        return f"{self.scorer.name}@{self.scorer.version}"

    def scores(self) -> str:
        try:
            self.first = self.ask(self.images_BHWC, self.texts)
        except ValueError as error:
            if "read-only" in str(error):
                raise Broken(f"it writes to its input, which others share: work on a copy ({error})") from error
            height, width = self.size
            raise Broken(
                f"it refuses images of {height}x{width}: {shorten(error)} (if it takes another size, say so: --size)"
            ) from error
        return ", ".join(f"{score:g}" for score in self.first)

    def order(self) -> str:
        if len(set(self.first)) == 1:
            return f"all images score {self.first[0]:g}, so that nothing can be said about their order"
        reverse = self.ask(self.images_BHWC[::-1], self.texts[::-1])
        self.require_same(reverse[::-1], "in a batch that is turned round")
        return ""

    def deterministic(self) -> str:
        self.require_same(self.ask(self.images_BHWC, self.texts), "when asked again")
        return ""

    def single(self) -> str:
        singles = [
            self.ask(self.images_BHWC[i : i + 1], self.texts[i : i + 1])[0] for i in range(len(self.images_BHWC))
        ]
        self.require_same(singles, "alone")
        return ""

    def empty(self) -> str:
        self.ask(self.images_BHWC[:0], [])
        return ""

    def leaves_its_input(self) -> str:
        for writeable in (True, False):
            images_BHWC = self.images_BHWC.copy()
            images_BHWC.flags.writeable = writeable
            self.scorer.score(images_BHWC, prompts_of(self.texts))
            if not np.array_equal(images_BHWC, self.images_BHWC):
                raise Broken("it writes to its input, which others share: work on a copy")
        return ""

    def odd_images(self) -> str:
        shape = (*self.size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        images = {
            "a black image": np.zeros(shape, np.uint8),
            "a white image": np.full(shape, 255, np.uint8),
            "an image of one colour": np.full(shape, (215, 35, 40), np.uint8),
            "noise": noise,
        }
        return "\n".join(self.refusals({what: (image, self.texts[0]) for what, image in images.items()}).values())

    def odd_texts(self) -> str:
        return "\n".join(self.refusals({what: (self.images_BHWC[0], text) for what, text in TEXTS.items()}).values())

    def sizes(self) -> str:
        images = {f"{h}x{w}": picture(PICTURES[0][1], (h, w)) for h, w in SIZES if (h, w) != self.size}
        refusals = self.refusals({size: (image, self.texts[0]) for size, image in images.items()})
        for refusal in refusals.values():
            if not any(character.isdigit() for character in refusal.partition(": ")[2]):
                raise Broken(f"{refusal!r} does not say which size it takes")
        return "\n".join(refusals.values())

    def no_batch(self) -> str:
        """The loop never hands such to a scorer, so that this is a remark; other code that uses the scorer might."""
        images_BHWC, texts = self.images_BHWC[:2], self.texts[:2]
        wrong: dict[str, tuple[npt.NDArray[Any], list[str]]] = {
            "floats": (images_BHWC.astype(np.float32) / 255, texts),
            "channels first": (images_BHWC.transpose(0, 3, 1, 2), texts),
            "four channels": (np.concatenate([images_BHWC, images_BHWC[..., :1]], axis=-1), texts),
            "no channels": (images_BHWC[..., 0], texts),
            "fewer prompts than images": (images_BHWC, texts[:1]),
        }
        accepted = []
        for what, (array, some) in wrong.items():
            try:
                self.ask(array, some)
            except Exception:  # noqa: BLE001  any refusal is right
                continue
            accepted.append(what)
        if accepted:
            return f"scores {', '.join(accepted)}; kto_ray.label.protocol.check_batch would refuse them"
        return ""

    def ask(self, images_BHWC: npt.NDArray[Any], texts: Sequence[str]) -> list[float]:
        """Scores of a read-only, contiguous batch. Raises Broken unless they are one finite number an image."""
        images_BHWC = np.array(images_BHWC, order="C")
        images_BHWC.flags.writeable = False
        answer = list(self.scorer.score(images_BHWC, prompts_of(texts)))
        if len(answer) != len(images_BHWC):
            raise Broken(f"it gives {len(answer)} scores for {len(images_BHWC)} images; give one an image, in order")
        return [number("a score", value) for value in answer]

    def require_same(self, scores: Sequence[float], how: str) -> None:
        """Raises Broken when scores are not those of the first time."""
        slack = self.tolerance * max(map(abs, self.first))
        for i, (score, first) in enumerate(zip(scores, self.first, strict=True), start=1):
            if abs(score - first) > slack:
                raise Broken(f"image {i} of {len(scores)} scores {score:g} {how}, and {first:g} at first")

    def refusals(self, cases: Mapping[str, tuple[Images, str]]) -> dict[str, str]:
        """Score odd cases one by one: a number is fine, and so is a ValueError; the scorer must outlive them unharmed.

        Returns:
            Words for every case that is refused.
        """
        refused = {}
        for what, (image_HWC, text) in cases.items():
            try:
                self.ask(image_HWC[None], [text])
            except (ValueError, UserError) as error:
                refused[what] = f"{what} is refused: {shorten(error)}"
            except Broken as error:
                raise Broken(f"{what}: {error}") from error
            except Exception as error:
                raise Broken(
                    f"{what}: raised {words_of(error)}; give a number, or a ValueError that says why not"
                ) from error
        self.require_same(self.ask(self.images_BHWC, self.texts), f"after {', '.join(cases)}")
        return refused


SCORER_CHECKS: dict[str, Callable[[ScorerTrial], str]] = {
    "is built in a process of its own": ScorerTrial.build,
    "has a name and a version": ScorerTrial.named,
    "scores a batch": ScorerTrial.scores,
    "scores follow their images": ScorerTrial.order,
    "scores the same again": ScorerTrial.deterministic,
    "scores the same alone": ScorerTrial.single,
    "takes an empty batch": ScorerTrial.empty,
    "leaves its input alone": ScorerTrial.leaves_its_input,
    "survives odd images": ScorerTrial.odd_images,
    "survives odd prompts": ScorerTrial.odd_texts,
    "takes other sizes, or says why not": ScorerTrial.sizes,
    "sees what is no batch": ScorerTrial.no_batch,
}
SCORER_ESSENTIAL = ("is built in a process of its own", "scores a batch")


def prompts_of(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"check-{i}", text) for i, text in enumerate(texts)]
