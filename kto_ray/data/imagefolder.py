"""Images in folders, and metadata files that name them, as Hugging Face's imagefolder has them.

    train/metadata.csv       file_name,text,label          also metadata.jsonl and metadata.parquet, in any folder
    train/0001.png           0001.png,a cat,1
    train/more/0002.png      more/0002.png,a dog,0

`file_name` is relative to the folder of the metadata file it stands in. In other respects a table as any other.
"""

from functools import cached_property

from kto_ray.config.data import ImageFolderData
from kto_ray.data.files import File, absolute, find
from kto_ray.data.rows import FileRows
from kto_ray.data.table import TableSource
from kto_ray.errors import UserError

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class ImageFolderSource(TableSource):
    """See the module."""

    def __init__(self, settings: ImageFolderData) -> None:
        field = "data.sources (imagefolder)"
        base = absolute(settings.images) if settings.images else None
        given = settings if settings.image else settings.model_copy(update={"image": "file_name"})
        super().__init__(given, _MetadataRows(settings.path, field, base), "imagefolder")


class _MetadataRows(FileRows):
    @cached_property
    def files(self) -> list[File]:
        found = [file for file in find(self.where, NAMES, self.what) if file.name.rpartition("/")[2] in NAMES]
        endings = {file.name.rpartition(".")[2]: file.name for file in found}
        if len(endings) > 1:
            raise UserError(f"{self.what}: {self.where} has metadata in several formats: {', '.join(endings.values())}")
        if not found:
            raise UserError(f"{self.what}: {self.where} has none of {', '.join(NAMES)} in it")
        return found
