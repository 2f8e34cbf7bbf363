"""What a pipeline folder's model_index.json lists of components: those that a family loads, and of which kind they are.

`source.py` checks and digests them, `single_file.py` puts a folder together of them.
"""

from pathlib import Path

from kto_ray.diffusion.family import Family, index_of

CONFIGS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "processor": ("preprocessor_config.json", "processor_config.json"),
}
"""One of these files is needed to load a component of this kind; all others have a config.json, and weights."""


def config_file(component: Path, kind: str) -> Path:
    """The file without which a component cannot be loaded, be it there or not."""
    files = [component / name for name in CONFIGS.get(kind, ("config.json",))]
    return next((file for file in files if file.is_file()), files[0])


def components(folder: Path, family: type[Family]) -> dict[str, str]:
    """What a pipeline folder's model_index.json lists and the family loads: by name, a kind of `CONFIGS` or "model"."""
    listed = {
        name: value
        for name, value in index_of(folder).items()
        if name not in family.left_out and isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    return {
        name: next((kind for kind in CONFIGS if kind in class_name.lower()), "model")
        for name, (_, class_name) in sorted(listed.items())
    }
