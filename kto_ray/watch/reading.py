"""One run as it is now: its figures, what it is at, and its albums, read from its folder as often as they may change.

Whoever asks gets what was read `FRESH_S` ago at most; several who ask at once wait for one reading. What will not
change any more, which is all but the last round or two, is read once. Of all the albums `ALBUMS` are kept.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.evaluate.albums import FOLDERS, Album, ImageStory, Key, Kind, read_evaluation, read_round
from kto_ray.lease import Claim, newest_claim
from kto_ray.outbox import Row
from kto_ray.run_folder import RunFolder
from kto_ray.storage import Storage
from kto_ray.watch.finding import Finder

FRESH_S = 1.5
"""Less than pages wait before they ask again."""
ALBUMS = 2000
"""A run of more rounds is read again where somebody goes back that far."""
TRIES = 5


@dataclass(frozen=True)
class Now:
    """What a run's folder said when it was last read.

    Args:
        rows: of `metrics.jsonl`, by kind, in the order of their steps.
        keys: of all albums that there are, in order, by kind.
        claim: of the driver that holds the run, or was the last to; None: there was none.
        summary: of a run that has ended.
    """

    rows: Mapping[str, Sequence[Row]]
    keys: Mapping[Kind, Sequence[Key]]
    claim: Claim | None
    summary: Mapping[str, Any] | None
    read_at: float = field(compare=False)


class WatchedRun:
    """Reads one run; to be called from any thread, all of it may take as long as its storage does.

    Args:
        uri: of its folder.
        name: that it is shown by; None: its own.

    Raises:
        UserError: there is no run, or one of a version that this one cannot read.
    """

    def __init__(self, uri: str, name: str | None = None) -> None:
        self.folder = RunFolder(uri)
        self.name = name or self.folder.name
        self.finder = Finder()
        self._now: Now | None = None
        self._text: bytes | None = None
        self._rows: dict[str, list[Row]] = {}
        self._albums: OrderedDict[Key, tuple[float, Album]] = OrderedDict()
        self._reading = threading.Lock()
        self._lock = threading.RLock()

    @property
    def config(self) -> RunConfig:
        return self.folder.config

    @property
    def storage(self) -> Storage:
        return self.folder.storage

    def now(self) -> Now:
        """See the class."""
        with self._reading:
            if self._now is None or time.monotonic() - self._now.read_at > FRESH_S:
                self._now = Now(
                    rows=self._read_rows(),
                    keys={kind: self._keys(kind) for kind in FOLDERS},
                    claim=newest_claim(self.storage),
                    summary=self.folder.summary,
                    read_at=time.monotonic(),
                )
            return self._now

    def _read_rows(self) -> dict[str, list[Row]]:
        text = self.storage.read("metrics.jsonl") if self.storage.exists("metrics.jsonl") else b""
        if text != self._text:
            rows = sorted(map(json.loads, text.decode().splitlines()), key=lambda row: int(row["step"]))
            self._rows = {kind: [row for row in rows if row["kind"] == kind] for kind in FOLDERS}
            self._text = text
        return self._rows

    def _keys(self, kind: Kind) -> list[Key]:
        return [Key(kind, int(name)) for name in self.storage.names(FOLDERS[kind]) if name.isdigit()]

    # -- albums -----------------------------------------------------------------------------------------------------

    def album(self, key: Key) -> Album:
        """Raises UserError where there is none."""
        keys = self.now().keys[key.kind]
        with self._lock:  # so that an album is read once, however many images of it are asked for at the same time
            if key in self._albums:
                read_at, album = self._albums[key]
                if album.settled or time.monotonic() - read_at <= FRESH_S:
                    self._albums.move_to_end(key)
                    return album
            if key not in keys:
                raise UserError(f"{self.name} has no {key.title.lower()}")
            album = self._read(key, keys)
            self._albums[key] = time.monotonic(), album
            while len(self._albums) > ALBUMS:
                self._albums.popitem(last=False)
            return album

    def _read(self, key: Key, keys: Sequence[Key]) -> Album:
        base = None if key.kind == "round" or not key.number else self.album(Key(key.kind, 0))
        for left in reversed(range(TRIES)):
            try:
                if key.kind == "round":
                    return read_round(self.storage, self.config, key, keys[-1].number)
                return read_evaluation(self.storage, self.config, key, base)
            except FileNotFoundError:  # it was sealed, and tidied up, between two looks
                if not left:
                    raise
        raise AssertionError

    def rounds(self) -> list[Album]:
        """Those of all rounds, the newest first."""
        return [self.album(key) for key in reversed(self.now().keys["round"])]

    def image(self, key: Key, sample_id: str) -> ImageStory:
        """Raises UserError where there is none."""
        image = self.album(key).by_id.get(sample_id)
        if image is None:
            raise UserError(f"{self.name} has no image {sample_id} in {key.title.lower()}")
        return image

    def same_seed(self, image: ImageStory) -> list[ImageStory]:
        """What each policy drew from this prompt and seed, the base's first: evaluations draw from the same ones."""
        if image.key.kind == "round":
            return [image]
        albums = [self.album(key) for key in self.now().keys[image.key.kind]]
        return [album.by_id[image.record.id] for album in albums if image.record.id in album.by_id]

    def same_prompt(self, image: ImageStory) -> list[ImageStory]:
        """What was drawn for this prompt in all rounds, the earliest first; each from a seed of its own."""
        prompt = image.record.prompt.id
        return [one for album in reversed(self.rounds()) for one in album.by_prompt.get(prompt, ())]
