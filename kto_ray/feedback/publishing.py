"""Images of a run for an application to show: files named by id, and a manifest of each round that says what they are.

    images/round-00003-04fdfde59f261263-5f0c9a1e.png
    manifest/00003.jsonl    {"id": "round-00003-04fdfde59f261263-5f0c9a1e", "prompt": "a red circle", "round": 3,
                             "policy": 2, "file": "images/...png", "uri": "s3://...png", "width": 512, "height": 512}

An id is the sample's and the beginning of a digest of its image: a run that was rewound draws samples anew under the
same names, and votes on the old images must not count for the new ones. Files are written whole, and an image is there
before its line.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from PIL import Image

from kto_ray.people.terms import NewItem
from kto_ray.rounds import round_number
from kto_ray.storage import Storage, to_json

FIELD = "label.feedback.folder"
QUALITY = 95
"""Of JPEG."""
AT_ONCE = 8
"""Files that are written side by side."""


def publishing_folder(folder: str | None, run: Storage) -> Storage:
    """Where images go: what the configuration names, or a folder of the run's."""
    return Storage(folder, run.fence, FIELD) if folder else run / "feedback"


def name_of(item: NewItem) -> str:
    """The id under which an image is published."""
    return f"{item.sample_id}-{hashlib.sha256(item.png).hexdigest()[:8]}"


class Publisher:
    """See the module.

    Args:
        folder: of `publishing_folder`.
    """

    def __init__(self, folder: Storage, kind: Literal["png", "jpeg"]) -> None:
        self.folder, self.kind = folder, kind

    def publish(self, stage: str, new: Sequence[NewItem], names: Mapping[str, str]) -> None:
        """Write images of a round, then their lines; done again, it writes the same.

        Args:
            names: their ids, by sample id.

        Raises:
            UserError: the folder cannot be written.
        """
        manifest = f"manifest/{round_number(stage):05}.jsonl"
        lines: dict[str, dict[str, Any]] = {}
        if self.folder.exists(manifest):
            lines = {(row := json.loads(line))["id"]: row for line in self.folder.read(manifest).splitlines()}
        with ThreadPoolExecutor(AT_ONCE) as pool:  # a bucket takes its time over each
            written = pool.map(lambda item: self._write(item, names[item.sample_id]), new)
            lines |= {row["id"]: {**row, "round": round_number(stage)} for row in written}
        self.folder.write(manifest, "".join(to_json(row) + "\n" for row in lines.values()).encode())

    def _write(self, item: NewItem, name: str) -> dict[str, Any]:
        """Write an image; gives its line."""
        file = f"images/{name}.{'png' if self.kind == 'png' else 'jpg'}"
        with Image.open(io.BytesIO(item.png)) as image:
            width, height = image.size
            self.folder.write(file, item.png if self.kind == "png" else _jpeg(image))
        return {
            "id": name,
            "prompt": item.prompt,
            "file": file,
            "uri": f"{self.folder.uri}/{file}",
            "policy": item.policy_version,
            "width": width,
            "height": height,
        }


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "jpeg", quality=QUALITY)
    return file.getvalue()
