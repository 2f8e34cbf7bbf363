"""A source at a glance: figures of a sample of its images, and a sheet that shows both classes.

`kto-ray dataset show` prints these beside the preview. The sample is spread over the source, the same each time; where
images travel in rows only a few parts are read for it.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from kto_ray.data.files import TROUBLE, read_bytes
from kto_ray.data.protocol import Source
from kto_ray.data.sources import Several
from kto_ray.pictures import figures_of, look
from kto_ray.records import derive_seed

PARTS = 16
"""Of a source whose images travel in the rows, so many are looked into."""
SIDE, COLUMNS, GAP, HEAD = 128, 8, 6, 22
"""Pixels of a thumbnail, thumbnails in a row, pixels between them, and of a heading."""
COLORS = {"desirable": (46, 139, 87), "undesirable": (178, 34, 34), "none": (128, 128, 128)}

Row = dict[str, Any]
"""Of `LABELLED`."""


@dataclass
class Look:
    """What a sample of images comes to."""

    prompt_words: list[int] = field(default_factory=list)
    """Of each row that was passed, not only of those in the sample."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Width and height."""
    formats: Counter[str] = field(default_factory=Counter)
    """By class, for instance "desirable PNG"."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Id to reason."""
    thumbnails: dict[str, list[Image.Image]] = field(default_factory=dict)
    """By class."""
    pictures: dict[str, dict[str, float]] = field(default_factory=dict)
    """By class; see `pictures.picture_figures`, over thumbnails."""


def class_of(desirable: bool | None) -> str:
    return "none" if desirable is None else "desirable" if desirable else "undesirable"


def look_at(source: Source, each: int = 32) -> Look:
    """Read so many images of each class.

    Raises:
        UserError: the source cannot be read. An image that cannot be read is in `Look.unreadable`.
    """
    found, looks = Look(), dict[str, list[bytes]]()
    for kind, rows in _sampled(source, each, found).items():
        for row in rows:
            try:
                image = _opened(row)
            except UnidentifiedImageError:
                found.unreadable[row["id"]] = f"{row['uri'] or 'bytes in the row'}: no image of a known format"
                continue
            except (*TROUBLE, ValueError, SyntaxError, Image.DecompressionBombWarning) as error:
                found.unreadable[row["id"]] = f"{row['uri'] or 'bytes in the row'}: {error}"
                continue
            found.sizes[image.size] += 1
            found.formats[f"{kind} {image.format}"] += 1
            thumbnail = ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (SIDE, SIDE))
            found.thumbnails.setdefault(kind, []).append(thumbnail)
            if seen := look(np.asarray(thumbnail)):
                looks.setdefault(kind, []).append(seen)
    found.pictures = {kind: figures_of(seen) for kind, seen in looks.items()}
    return found


def _opened(row: Row) -> Image.Image:
    data = row["image"] if row["uri"] is None else read_bytes(row["uri"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
    return image


def _sampled(source: Source, each: int, found: Look) -> dict[str, list[Row]]:
    """Rows by class: each row that is passed has the same chance."""
    kept: dict[str, list[Row]] = {}
    passed, random = Counter[str](), np.random.default_rng(derive_seed("dataset show"))
    for table in _tables(source):
        found.prompt_words += [len(text.split()) for text in table["prompt"].to_pylist()]
        for number, desirable in enumerate(table["desirable"].to_pylist()):
            kind = class_of(desirable)
            rows, passed[kind] = kept.setdefault(kind, []), passed[kind] + 1
            place = len(rows) if len(rows) < each else int(random.integers(passed[kind]))
            if place < each:
                row = table.slice(number, 1).to_pylist()[0]
                rows[place : place + 1] = [row]
    return kept


def _tables(source: Source) -> Iterator[pa.Table]:
    if isinstance(source, Several):
        yield from (table for each in source.sources for table in _tables(each))
        return
    parts = source.parts()
    first = next((table for part in parts for table in islice(source.read(part), 1)), None)
    if first is None:
        return
    if first["uri"].null_count == 0:  # nothing but references: they are all passed
        yield from (table for part in parts for table in source.read(part))
        return
    chosen = sorted({round(place) for place in np.linspace(0, len(parts) - 1, min(PARTS, len(parts)))})
    for place in chosen:
        yield from islice(source.read(parts[place]), max(1, PARTS // len(chosen)))


def contact_sheet(found: Look, each: int = 32) -> Image.Image:
    """Thumbnails of desirable images above those of undesirable ones, framed in green and red; RGB."""
    blocks = [(kind, found.thumbnails[kind][:each]) for kind in COLORS if found.thumbnails.get(kind)]
    cell = SIDE + GAP
    height = sum(HEAD + -(-len(images) // COLUMNS) * cell for _, images in blocks) + GAP
    sheet = Image.new("RGB", (COLUMNS * cell + GAP, max(height, HEAD)), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for kind, images in blocks:
        draw.text((GAP, top), f"{'no verdict' if kind == 'none' else kind}: {len(images)} of the sample", COLORS[kind])
        top += HEAD - GAP
        for number, image in enumerate(images):
            left, here = GAP + number % COLUMNS * cell, top + number // COLUMNS * cell
            draw.rectangle((left - 2, here - 2, left + SIDE + 1, here + SIDE + 1), outline=COLORS[kind], width=2)
            sheet.paste(image, (left + (SIDE - image.width) // 2, here + (SIDE - image.height) // 2))
        top += -(-len(images) // COLUMNS) * cell + GAP
    return sheet


def quantiles(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Smallest, median, 95 of 100, largest; of at least one."""
    low, middle, high, top = np.quantile(values, (0, 0.5, 0.95, 1), method="nearest")
    return int(low), int(middle), int(high), int(top)
