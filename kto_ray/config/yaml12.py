"""YAML 1.2 by its core schema, over PyYAML, which reads 1.1: recipes, overrides, `--args` and a run's config.yaml.

`1e-4` is a number and `off` is a word, everywhere in the tree, also where no field says what it wants. A key that
stands twice in a mapping is an error that shows both places. Merge keys and anchors are read.
"""

import re
from typing import Any

import yaml
from yaml import YAMLError
from yaml.composer import ComposerError

__all__ = ["YAMLError", "dump", "load", "load_whole"]

PREFIX = "tag:yaml.org,2002:"
CORE = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}
"""What a plain word is, by how it is written (the first that fits), and the letters that it may begin with."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own name; those of 1.1 are not inherited

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                earlier = first.setdefault((key.tag, key.value), key)
                if earlier is not key:
                    raise ComposerError(
                        f"the key {key.value!r} stands here", earlier.start_mark, "and again here", key.start_mark
                    )
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version would take for something else than text."""


for _tag, (_pattern, _letters) in CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), _letters)
_Loader.add_constructor(f"{PREFIX}int", _Loader.construct_yaml_int)


def load(text: str | bytes, name: str = "text") -> Any:
    """The value of one YAML document, which errors call by its name. Raises YAMLError."""
    return _load(text, name)


def load_whole(text: str) -> Any:
    """As `load`, but nothing after a value is a comment: all of "2024 #1" is text. Raises YAMLError."""
    return _load(text, "text", whole=True)


def dump(tree: Any) -> str:
    """As text that `load`, and whoever reads YAML 1.1, takes for an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _load(text: str | bytes, name: str, whole: bool = False) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if whole and len(text.rstrip()) > (node.end_mark.index if node else 0):
            return text
        return loader.construct_document(node) if node else None
    except (ValueError, RecursionError) as error:  # "!!int many", and a thousand brackets
        raise YAMLError(str(error)) from error
    finally:
        loader.dispose()
