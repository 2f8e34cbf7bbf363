"""A folder of liked and one of disliked images, each image with its prompt in a text file beside it.

    liked/0001.png        liked/0001.txt         a red circle on black
    disliked/0007.jpg     disliked/0007.txt      a blue square

The text file has the image's name, with .txt or .caption for its ending. `prompt` stands for those without one.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa

from kto_ray.config.data import FoldersData
from kto_ray.data.files import File, absolute, find, join, listed, read_bytes
from kto_ray.data.labelling import Images, labelled
from kto_ray.data.notes import NO_PROMPT, Notes
from kto_ray.data.protocol import Part, Preview, Source
from kto_ray.data.table import first_rows
from kto_ray.errors import UserError
from kto_ray.prompt_files import blank

LIKED = ("liked", "like", "likes", "good", "yes", "up", "positive", "desirable", "win", "chosen", "1")
DISLIKED = ("disliked", "dislike", "dislikes", "bad", "no", "down", "negative", "undesirable", "lose", "rejected", "0")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
TEXTS = (".txt", ".caption")
AT_ONCE = 1_000
"""Images in a table, and in a part."""


class FoldersSource(Source):
    """See the module."""

    kind = "folders"
    field = "data.sources (folders)"

    def __init__(self, settings: FoldersData) -> None:
        self.settings = settings

    def __getstate__(self) -> dict[str, FoldersData]:
        return {"settings": self.settings}

    @cached_property
    def _folders(self) -> dict[bool, str]:
        """Their names, by whether what is in them is liked."""
        there = listed(self.settings.path, self.field)
        named = {True: (self.settings.liked, "liked", LIKED), False: (self.settings.disliked, "disliked", DISLIKED)}
        found: dict[bool, str] = {}
        for liked, (name, setting, usual) in named.items():
            fitting = [entry for entry in there if entry == name or (name is None and entry.lower() in usual)]
            if len(fitting) != 1:
                said = f"both {' and '.join(fitting)}" if fitting else f"no folder {name or ', '.join(usual[:4])}"
                raise UserError(
                    f"{self.field}: {setting}: {self.settings.path} has {said}; it has: "
                    f"{', '.join(there) or 'nothing'}; name one: {{{setting}: FOLDER}}"
                )
            found[liked] = fitting[0]
        return found

    def _files(self, liked: bool) -> tuple[list[File], dict[str, File]]:
        """Images, and texts by the name of their image without its ending."""
        folder = self._folders[liked]
        files = find(join(absolute(self.settings.path), folder), (*IMAGES, *TEXTS), self.field)
        images = [file for file in files if file.name.lower().endswith(IMAGES)]
        return images, {posixpath.splitext(file.name)[0]: file for file in files if file.name.lower().endswith(TEXTS)}

    def parts(self) -> Sequence[Part]:
        return [
            Part(
                f"{self._folders[liked]}#{first}",
                {
                    "liked": liked,
                    "images": [(image.name, image.uri) for image in images[first : first + AT_ONCE]],
                    "texts": [
                        texts[name].uri if (name := posixpath.splitext(image.name)[0]) in texts else None
                        for image in images[first : first + AT_ONCE]
                    ],
                },
                None,
            )
            for liked in (True, False)
            for images, texts in [self._files(liked)]
            for first in range(0, len(images), AT_ONCE)
        ]

    def read(self, part: Part) -> Iterator[pa.Table]:
        table = self._table(part)
        if table.num_rows:
            yield table

    def _table(self, part: Part, notes: Notes | None = None) -> pa.Table:
        names = [name for name, _ in part.of["images"]]
        prompts = [self._prompt(text) for text in part.of["texts"]]
        if notes:
            without = [uri for (_, uri), prompt in zip(part.of["images"], prompts, strict=True) if prompt is None]
            notes.add(NO_PROMPT, len(without), without)
        liked, folder = part.of["liked"], self._folders[part.of["liked"]]
        uris = pa.array([uri for _, uri in part.of["images"]], pa.string())
        return labelled(
            [f"{self.kind}:{folder}/{name}" for name in names],
            Images.of(uris, pa.nulls(len(names), pa.binary())),
            prompts,
            pa.repeat(liked, len(names)),
        )

    def _prompt(self, uri: str | None) -> str | None:
        if uri is None:
            return self.settings.prompt
        try:
            text = read_bytes(uri).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.field}: {uri} is not UTF-8 text: {error}; save it as UTF-8") from error
        except OSError as error:
            raise UserError(f"{self.field}: {uri} cannot be read: {error}") from error
        return self.settings.prompt if blank(text) else text

    def preview(self) -> Preview:
        notes, counts = Notes(), Counter[str]({"desirable": 0, "undesirable": 0, "none": 0})
        for part in self.parts():
            counts["desirable" if part.of["liked"] else "undesirable"] += self._table(part, notes).num_rows
        columns = {"liked": self._folders[True], "disliked": self._folders[False]}
        return Preview(
            self.kind,
            self.settings.path,
            columns,
            counts.total(),
            counts,
            first_rows(self),
            notes.counts,
            notes.examples,
        )
