"""Prompts that are set apart to evaluate on, and never trained on.

A prompt is known by its words, whatever their case and the spaces between (`prompts.words_of`). Whether it belongs to
the share that is set apart follows from these alone, by a hash: it stays on its side when the data grow.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.errors import UserError
from kto_ray.prompts import trained_on, words_of
from kto_ray.records import Prompt


class Apart:
    """Which prompts are held out.

    Args:
        texts: these are, ...
        share: ... and so is this share of all others.
    """

    def __init__(self, texts: Iterable[str] = (), share: float = 0) -> None:
        self._words, self._share = {words_of(text) for text in texts}, share

    def __contains__(self, prompt: object) -> bool:
        words = words_of(str(prompt))
        return words in self._words or _uniform(words) < self._share

    def of(self, prompts: pa.Array) -> pa.BooleanArray:
        """Which of a column of prompts are held out, each prompt looked at once."""
        encoded = prompts.dictionary_encode()
        return pa.array([text in self for text in encoded.dictionary.to_pylist()], pa.bool_()).take(encoded.indices)

    def split(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Rows of `LABELLED` to train on, and those whose prompts are held out."""
        held_out = self.of(table["prompt"].combine_chunks())
        return table.filter(pc.invert(held_out)), table.filter(held_out)


def held_out_prompts(prompts: Iterable[str], share: float) -> list[Prompt]:
    """Those of the prompts that a share sets apart, each once, in the order in which they come.

    Raises:
        UserError: there are none.
    """
    apart, seen, found = Apart(share=share), set[str](), list[Prompt]()
    for text in prompts:
        words = words_of(text)
        if words not in seen and text in apart:
            seen.add(words)
            found.append(Prompt(hashlib.sha256(words.encode()).hexdigest()[:16], text))
    if not found:
        raise UserError(
            f"data.held_out_share ({share:g}) sets no prompt apart: give a larger share, or held-out prompts of their "
            "own as prompts.held_out"
        )
    return found


def require_apart(trained: Collection[str] | Iterator[str], held_out: Sequence[Prompt]) -> None:
    """Raises UserError when a held-out prompt is trained on; names the first ones."""
    if shared := trained_on(held_out, trained):
        some = ", ".join(map(repr, shared[:3]))
        raise UserError(f"data: {len(shared)} of {len(held_out)} held-out prompts are trained on, for instance {some}")


def _uniform(words: str) -> float:
    """A number in [0, 1) that follows from the words alone."""
    return int.from_bytes(hashlib.sha256(f"held out: {words}".encode()).digest()[:8], "big") / 2**64
