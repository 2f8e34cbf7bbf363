"""The documentation is right where a program can tell: its commands, recipes, code, fields and links.

Commands are parsed, not run: options and fields must be there, and values must be valid. A block that cannot be checked
says so in a comment before it: `<!-- not checked: WHY -->`.
"""

import ast
import csv
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import pytest

from kto_ray import config
from kto_ray.cli import main
from kto_ray.config import RunConfig, yaml12
from kto_ray.section import Section

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted({*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCED = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)(?:(?:    .*)?\n)*")
EXCUSED = re.compile(r"<!-- not checked: \S.* -->\n+\Z")
SHELL, OTHERS = ("sh", "bash"), ("nginx", "dockerfile", "text")
"""Languages; of the others nothing is asked."""
PROGRAMS = ("ray", "curl", "ssh", "python3", "tee", "git", ".")
"""Of others."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}: {self.code.strip().splitlines()[0][:60]}"


def blocks() -> Iterator[Block]:
    for name in NAMES:
        text = (ROOT / name).read_text()
        fenced = list(FENCED.finditer(text))
        inside = [range(found.start(), found.end()) for found in fenced]
        indented = [found for found in INDENTED.finditer(text) if not any(found.start() in span for span in inside)]
        for found in itertools.chain(fenced, indented):
            if not EXCUSED.search(text[: found.start()]):
                groups = found.groupdict()
                code = groups["code"] if groups else "\n".join(line[4:] for line in found[0].splitlines())
                if groups or not is_in_list(text[: found.start()]):
                    yield Block(name, groups.get("language", "") if groups else "", code)


def is_in_list(before: str) -> bool:
    """Whether what is indented here only goes on with an item of a list."""
    lines = [line for line in before.splitlines() if line.strip() and not line.startswith(" ")]
    return bool(lines) and bool(re.match(r"[-*] |\d+\. ", lines[-1]))


BLOCKS = list(blocks())


def language_of(block: Block) -> str:
    """Of blocks that say none, what they look like."""
    if block.language:
        return block.language
    first = block.code.strip().splitlines()[0]
    if re.match(r"(python|kto-ray|make|pip|ray) ", first) or is_override(first.split()[0]):
        return "sh"
    return "yaml" if first.partition(":")[0] in RunConfig.model_fields else "text"


def test_there_are_blocks_of_each_kind() -> None:
    languages = [language_of(block) for block in BLOCKS]
    assert {language: languages.count(language) > 4 for language in ("sh", "yaml", "python", "json")} == {
        "sh": True,
        "yaml": True,
        "python": True,
        "json": True,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_right(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "secret")
    language = language_of(block)
    if language in SHELL:
        for words in commands(block.code):
            check_command(words)
    elif language == "yaml" and block.code.startswith("{"):
        for line in block.code.splitlines():
            check_source(line)
    elif language == "yaml":
        tree = yaml12.load(block.code)
        assert tree.keys() <= RunConfig.model_fields.keys(), "no recipe; say why it is not checked"
        config.from_tree(tree)
    elif language == "python":
        compile(block.code, block.page, "exec")
    elif language == "json":
        check_json(block.code)
    elif language == "csv":
        header, *rows = csv.reader(block.code.splitlines())
        assert rows
        assert all(len(row) == len(header) for row in rows)
    else:
        assert language in OTHERS, f"nobody checks {language!r}"


def check_json(code: str) -> None:
    try:
        json.loads(code)
    except json.JSONDecodeError:
        for line in code.splitlines():
            json.loads(line)


def check_source(line: str) -> None:
    """Of labelled images, as `data` takes it."""
    source = yaml12.load(line)
    assert "kind" in source
    config.from_tree({"data": source})


def test_sources_that_prose_names_are_right() -> None:
    prose = FENCED.sub("", (DOCS / "offline_data.md").read_text())
    sources = re.findall(r"`(\{kind: .*?\})`", prose)
    assert sources
    for source in sources:
        check_source(source)


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(code: str) -> Iterator[list[str]]:
    """The words of each, without variables that are set before it, and without what it writes to."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|&;"):
                words.append(word)
                continue
            words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, itertools.takewhile(">".__ne__, words)))
            if words:
                yield words
            words = []


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "kto-ray":
        check_kto_ray(rest)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[0].startswith("jobs/"):
        check_job(*rest)
    elif program == "python":
        assert rest[:1] == ["-m"], f"unknown: {words}"
    elif program == "ray" and "--" in rest:
        check_command(rest[rest.index("--") + 1 :])
    elif program == "eval":
        for code in re.findall(r"\$\((.*?)\)", " ".join(rest)):
            for inner in commands(code):
                check_command(inner)
    elif is_override(program):
        config.load(None, words)
    else:
        assert program in PROGRAMS, f"unknown: {words}"


def check_kto_ray(words: list[str]) -> None:
    """Raises click's errors for options that there are not, and what a run would say of settings."""
    context, command = click.Context(main), main
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"kto-ray has no {name!r}"
        context, command = click.Context(found, parent=context), found  # type: ignore[assignment]
    parsed = command.make_context(command.name, words)
    given: tuple[str, ...] = parsed.params.get("overrides", ())
    recipe: str | None = parsed.params.get("recipe")
    config.load(
        None if recipe is None or recipe.endswith(".yaml") else recipe,
        [override for override in given if "=" in override],
    )


def check_job(job: str, *words: str) -> None:
    assert (ROOT / job).is_file()
    if job in ("jobs/online_kto.py", "jobs/offline_kto.py"):  # the same command
        check_kto_ray(["run", *words])
        return
    source = (ROOT / job).read_text()
    assert [word for word in words if word.startswith("--") and word.removeprefix("--") not in source] == []


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name = word.partition("=")[0]
        assert re.search(rf"^{re.escape(name)} ?\??[:=]|\$\({re.escape(name)}\)", makefile, re.MULTILINE), (
            f"make: {word}"
        )


def check_pip(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"kto-ray\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= extras.keys()


# -- fields -----------------------------------------------------------------------------------------------------------


def is_override(word: str) -> bool:
    return "=" in word and word.split(".")[0].partition("=")[0] in RunConfig.model_fields


def has_field(annotation: Any, keys: list[str]) -> bool:
    """Whether dotted keys lead to something in the configuration."""
    if not keys:
        return True
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(keys[0])
        return field is not None and has_field(field.annotation, keys[1:])
    if get_origin(annotation) is tuple:
        return keys[0] == "*" and has_field(get_args(annotation)[0], keys[1:])
    if get_origin(annotation) is dict:
        return get_args(annotation)[1] is Any or has_field(get_args(annotation)[1], keys[1:])
    return any(has_field(part, keys) for part in get_args(annotation))


FIELD = re.compile(r"`([a-z_]+(?:\.[a-zA-Z_*]+)+)(?:=[^`]*|: [^`]*)?`")


@pytest.mark.parametrize("name", NAMES)
def test_fields_that_prose_names_are_there(name: str) -> None:
    text = FENCED.sub("", (ROOT / name).read_text())
    named = {field for field in FIELD.findall(text) if field.split(".")[0] in RunConfig.model_fields}
    endings = (".py", ".json", ".jsonl", ".yaml", ".sqlite", ".txt")  # of files
    assert [f for f in sorted(named) if not f.endswith(endings) and not has_field(RunConfig, f.split("."))] == []


# -- the site ---------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert [n for page in DOCS.rglob("*.md") if f": {(n := str(page.relative_to(DOCS)))}\n" not in settings] == []


def test_concepts_show_the_diagram_of_the_loop() -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "kto_ray" / "loop.py").read_text()), clean=False) or ""
    diagram = docstring.partition("\n\n")[2].partition("\n\nTwo tasks")[0]
    assert diagram.strip() in (DOCS / "concepts.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with warnings, such as of a link to nowhere, as errors."""
    folder = tmp_path_factory.mktemp("site")
    outcome = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return folder


def test_the_site_needs_nobodys_server(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'>\s]+""")
    found = {match for page in site.rglob("*.html") for match in loads.findall(page.read_text())}
    assert found == set()


def test_code_that_pages_link_to_is_on_the_site(site: Path) -> None:
    assert "make_rounds" in (site / "source/kto_ray/loop.py.html").read_text()
    assert 'href="source/kto_ray/loop.py.html"' in (site / "index.html").read_text()
    assert "Promises" in (site / "source/CONTRIBUTING.html").read_text()
