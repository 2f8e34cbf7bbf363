"""Data sets of the Hugging Face hub, by name, and those that the package `datasets` has saved to disk.

    OWNER/NAME                            the hub's own conversion to Parquet, refs/convert/parquet, of every public
                                          data set: CONFIG/SPLIT/0000.parquet
    folder/state.json, data-*.arrow       `Dataset.save_to_disk`
    folder/dataset_dict.json, train/...   `DatasetDict.save_to_disk`

Read directly, a row group or file at a time, over the network through huggingface_hub's file system: nothing is
downloaded as a whole, and `datasets` itself is not needed. Classes are known by their names. Parquet files of a
repository itself are a path for any kind of source: `hf://datasets/OWNER/NAME/data/*.parquet`.
"""

from functools import cached_property
from pathlib import Path

from kto_ray.config.data import HuggingFaceData
from kto_ray.data.files import File, absolute, find, listed
from kto_ray.data.rows import FileRows
from kto_ray.data.table import TableSource
from kto_ray.errors import UserError

CONVERTED = "refs%2Fconvert%2Fparquet"


class HuggingFaceSource(TableSource):
    """See the module."""

    def __init__(self, settings: HuggingFaceData) -> None:
        base = absolute(settings.images) if settings.images else None
        super().__init__(settings, _Saved(settings, "data.sources (hugging_face)", base), "hugging_face")


class _Saved(FileRows):
    def __init__(self, settings: HuggingFaceData, what: str, base: str | None) -> None:
        super().__init__(settings.name, what, base)
        self.settings = settings

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "settings": self.settings}

    @cached_property
    def files(self) -> list[File]:
        if Path(self.where).expanduser().exists() or self.where.count("/") != 1:
            return self._on_disk()
        name, split, revision = self.settings.name, self.settings.split, self.settings.revision or CONVERTED
        where = f"hf://datasets/{name}@{revision}/{self.settings.config}"
        if not (splits := listed(where, self.what)):
            raise UserError(
                f"{self.what}: name: there is no folder {name}, and the hub has no data set {name!r} with a conversion "
                f"to Parquet of its config {self.settings.config!r}; name its Parquet files as a path, "
                f"hf://datasets/{name}/..., or save it with `datasets` and save_to_disk"
            )
        self._require(split, splits)
        return find(f"{where}/{split}", [".parquet"], self.what)

    def _on_disk(self) -> list[File]:
        there = listed(self.where, self.what)
        if "dataset_dict.json" in there:
            self._require(self.settings.split, [name for name in there if not name.endswith(".json")])
            return find(f"{self.where}/{self.settings.split}", [".arrow"], self.what)
        if "state.json" not in there:
            raise UserError(
                f"{self.what}: name: {self.where} is no folder that save_to_disk has made: it has neither state.json "
                "nor dataset_dict.json"
            )
        return find(self.where, [".arrow"], self.what)

    def _require(self, split: str, splits: list[str]) -> None:
        if split not in splits:
            raise UserError(f"{self.what}: split: {self.where} has no {split!r}; it has: {', '.join(splits)}")
