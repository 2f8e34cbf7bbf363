"""Prompt sets: read files, ask a source of one's own, or take the embedded world's; templates, names and weights.

`prompt_files.py` reads rows, `prompt_templates.py` fills slots in, `config/prompts.py` says from what. The loop cycles
through the training set, round after round; the held-out set is only ever evaluated on.
"""

import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from kto_ray.config import PromptSet
from kto_ray.errors import UserError
from kto_ray.plugins import load_plugin
from kto_ray.prompt_files import READERS, Columns, Row, made_row, read_rows
from kto_ray.prompt_templates import MAX_PROMPTS, fill_in
from kto_ray.records import Prompt, SampleRequest
from kto_ray.shapes import HELD_OUT_PROMPTS, TRAIN_PROMPTS
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

BUILT_IN = {"shapes:train": TRAIN_PROMPTS, "shapes:held_out": HELD_OUT_PROMPTS}
DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class PromptSource(Protocol):
    """A prompt set of one's own, named by dotted path: a class, or a function, built with `args`.

    `kto-ray check prompts my_module:MyPrompts` tries one.
    """

    def __iter__(self) -> Iterator[Prompt | str | Mapping[str, Any]]:
        """The prompts, in an order that is the same whenever it is built with the same arguments.

        Each is a `Prompt`, a text, or a mapping with columns as a file has them; a million at most.
        """
        ...


def load_prompts(field: str, of: PromptSet | str, numbered: bool = False) -> list[Prompt]:
    """One pass through a prompt set: a prompt with a weight is there so often, spread over it.

    Args:
        field: name of the configuration field, for messages.
        of: the set, or only its source.
        numbered: name a prompt that has no id by its place in the file, as versions did that kept no prompts.

    Raises:
        UserError: names file and place: no such file, no prompts, an id that was there before, or see `read_rows` and
            `fill_in`.
    """
    settings = of if isinstance(of, PromptSet) else PromptSet(source=of)
    what = f"{field}: {settings.source}"
    if settings.weight is not None and field == "prompts.held_out":
        raise UserError(f"{field}.weight: {settings.weight!r}: held-out prompts have no weights; leave it out")
    rows = list(_rows(settings, what))
    if not rows:
        raise UserError(f"{what} is empty; it needs at least one prompt")
    if settings.slots:
        rows = list(fill_in(rows, settings.slots, what))
    _say_repeated(rows, what)
    prompts = list(zip(_named(rows, numbered, what), (row.weight for row in rows), strict=True))
    if settings.slots or settings.mix:
        prompts.sort(key=lambda prompt: digest(prompt[0].text))
    return _spread(prompts)


def _rows(settings: PromptSet, what: str) -> Iterator[Row]:
    columns, source = Columns(settings.text, settings.id, settings.weight), settings.source
    if source in BUILT_IN:
        return read_rows(str(BUILT_IN[source]), what, None, columns)
    if not is_own(source):
        if settings.args:
            raise UserError(f"{what}: args are for a source of one's own, package.module:Name; leave them out")
        if "://" not in source and not Path(source).expanduser().exists():
            raise UserError(
                f"{what}: there is no such file or folder; give a file ({', '.join(READERS)}), a folder, a URI, "
                f"one of {', '.join(BUILT_IN)}, or a source of your own as package.module:Name"
            )
        return read_rows(source, what, settings.split, columns)
    if settings.split is not None:
        raise UserError(f"{what}: split={settings.split!r} chooses among files of a folder; leave it out, or use args")
    return _made(load_source(what.partition(":")[0], source)(**settings.args), what, columns)


def is_own(source: str) -> bool:
    """Whether it is the dotted path of a `PromptSource`."""
    return source not in BUILT_IN and bool(DOTTED.fullmatch(source)) and not Path(source).exists()


def load_source(field: str, source: str) -> Callable[..., PromptSource]:
    """What makes a `PromptSource` of one's own, from keyword arguments. Raises UserError, see `load_plugin`."""
    build: Callable[..., PromptSource] = load_plugin(field, source, {}, functions=True)
    return build


def _made(source: PromptSource, what: str, columns: Columns) -> Iterator[Row]:
    if not isinstance(source, Iterable) or isinstance(source, str | Mapping):
        raise UserError(f"{what} gives a {type(source).__name__}; give prompts one after the other, as a list does")
    for number, made in enumerate(itertools.islice(source, MAX_PROMPTS + 1), start=1):
        if number > MAX_PROMPTS:
            raise UserError(f"{what} gives more than {MAX_PROMPTS:,} prompts; does it ever end?")
        if isinstance(made, Prompt):
            made = {**made.metadata, (columns.text or "text"): made.text, (columns.id or "id"): made.id}
        yield made_row(made, number, what, columns)


def _named(rows: Sequence[Row], numbered: bool, what: str) -> Iterator[Prompt]:
    """Prompts with the names that rows give themselves, or else one that follows from the text."""
    place_of: dict[str, str] = {}
    repeated: Counter[str] = Counter()
    for row in rows:
        name = row.id
        if name is None and numbered:
            name = row.number
        elif name is None:
            made = digest(row.text)
            repeated[made] += 1
            name = made if repeated[made] == 1 else f"{made}-{repeated[made]}"
        if name in place_of:
            raise UserError(
                f"{what} {row.place}: prompt id {name!r} was used in {place_of[name]} already; ids must be unique"
            )
        place_of[name] = row.place
        yield Prompt(name, row.text, row.metadata)


def digest(text: str) -> str:
    """16 hexadecimal digits that follow from a text: the name of a prompt that has none."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _say_repeated(rows: Sequence[Row], what: str) -> None:
    first: dict[str, Row] = {}
    repeated = [(first[words], row) for row in rows if first.setdefault(words := words_of(row.text), row) is not row]
    if repeated:
        before, row = repeated[0]
        logger.warning(
            "%s: %d of %d prompts have the text of an earlier one, but for case and spaces, and count as often as they "
            "stand there; for instance %s has that of %s, %r",
            *(what, len(repeated), len(rows), row.place, before.place, row.text),
        )


def _spread(weighted: Sequence[tuple[Prompt, int]]) -> list[Prompt]:
    """Each prompt as often as its weight says, at even distances; without weights, the order that they have."""
    turns = [
        ((2 * turn + 1) / (2 * weight), place) for place, (_, weight) in enumerate(weighted) for turn in range(weight)
    ]
    return [weighted[place][0] for _, place in sorted(turns)]


def trained_on(held_out: Sequence[Prompt], trained: Iterable[str]) -> list[str]:
    """Those held-out texts that are trained on, too, but for case and spaces, which no tokenizer here sees."""
    known = {words_of(text) for text in trained}
    return [prompt.text for prompt in held_out if words_of(prompt.text) in known]


def words_of(text: str) -> str:
    """What makes two prompts the same: their words, whatever their case and the spaces between."""
    return " ".join(text.casefold().split())


FILES = {"prompts.train": "prompts/train.jsonl", "prompts.held_out": "prompts/held_out.jsonl"}
"""Where a run keeps the prompts it began with."""


def prompts_of(run: Storage, field: str, of: PromptSet) -> list[Prompt]:
    """The set as a run takes it: with the names that it began with, which seeds go by, where only names differ.

    Raises:
        UserError: see `load_prompts`.
    """
    if not run.exists(FILES[field]):
        return load_prompts(field, of, numbered=run.exists("config.yaml"))
    prompts, began = load_prompts(field, of), kept(run, field)
    same = [(one.text, one.metadata) for one in prompts] == [(one.text, one.metadata) for one in began]
    return began if same else prompts


def keep(run: Storage, field: str, prompts: Sequence[Prompt]) -> None:
    """Write a prompt set down in the folder of a run that begins."""
    if not run.exists(FILES[field]):
        run.write(FILES[field], "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts).encode())


def kept(run: Storage, field: str) -> list[Prompt]:
    """The prompt set that a run began with; none where it has kept none."""
    if not run.exists(FILES[field]):
        return []
    return [Prompt(**json.loads(line)) for line in run.read(FILES[field]).decode().splitlines()]


def require_kept(run: Storage, field: str, prompts: Sequence[Prompt]) -> bool:
    """Whether the run has kept the set, which is this one then; False: it is new, or of a version that kept none.

    Raises:
        UserError: it began with other prompts; names the first one that differs.
    """
    if not run.exists(FILES[field]):
        return False
    for number, (old, new) in enumerate(zip_longest(kept(run, field), prompts), start=1):
        if old != new:
            raise UserError(
                f"{field}: the run began with other prompts: number {number} was {_said(old)} and is {_said(new)} now; "
                "give the same prompts to continue it, or another `run` name to begin a new one"
            )
    return True


def _said(prompt: Prompt | None) -> str:
    return f"{prompt.text!r} (id {prompt.id!r})" if prompt else "not there"


def round_requests(
    prompts: Sequence[Prompt], run_seed: int, stage: str, round_index: int, images: int, images_per_prompt: int = 1
) -> list[SampleRequest]:
    """The images of one round: the prompt set in a circle, going on where the last round ended.

    Deterministic in its arguments; several images of one prompt differ by index and so by seed.
    """
    turns = images // images_per_prompt
    weights = Counter(prompt.id for prompt in prompts)
    counts = {name: itertools.count() for name in weights}
    before = [next(counts[prompt.id]) for prompt in prompts]

    def index(turn: int) -> int:
        """How many turns the prompt has had."""
        passes, place = divmod(turn, len(prompts))
        return passes * weights[prompts[place].id] + before[place]

    return [
        SampleRequest.make(run_seed, stage, prompts[turn % len(prompts)], index(turn) * images_per_prompt + number)
        for turn in range(round_index * turns, (round_index + 1) * turns)
        for number in range(images_per_prompt)
    ]
