"""A hook of the site's: pages link to files of the repository, and the site has a page of each such file.

`../kto_ray/loop.py` in a page leads to the file where the repository is browsed, and to `source/kto_ray/loop.py.html`
on the site, which needs nobody's server. A Markdown file becomes a page like others, a folder one with all its modules.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS, SOURCE = "docs/", "source/"
ALWAYS = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "README.md")
LINK = re.compile(r"(?P<before>\]\(|src=\"|href=\")(?P<target>[^)\s\"#:]+)(?P<anchor>#[^)\s\"]*)?(?=[)\"])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, config: Any) -> Files:
    texts = {DOCS + file.src_uri: file.content_string for file in files.documentation_pages()}
    wanted = [*ALWAYS, *(target for path, text in texts.items() for target in _outside(path, text))]
    while wanted:
        target = wanted.pop()
        uri = _uri(target)
        if files.get_file_from_path(uri) is not None or not (ROOT / target).exists():
            continue  # a link to nowhere stays as it is, and the build says so
        content = _content(target)
        files.append(File.generated(config, uri, content=content))
        if target.endswith(".md"):
            wanted += _outside(target, content)
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    uri = page.file.src_uri
    path = uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else DOCS + uri
    if uri.startswith(SOURCE) and not (ROOT / path).exists():
        return markdown  # code, whose page has an ending more

    def led(found: re.Match[str]) -> str:
        target = _resolved(path, found["target"])
        there = target.removeprefix(DOCS) if target.startswith(DOCS) else _uri(target)
        if files.get_file_from_path(there) is None:
            return found[0]
        return found["before"] + posixpath.relpath(there, posixpath.dirname(uri) or ".") + (found["anchor"] or "")

    return LINK.sub(led, markdown)


def _outside(path: str, text: str) -> list[str]:
    """Files of the repository that a page leads to and that are no pages."""
    targets = [_resolved(path, found["target"]) for found in LINK.finditer(text)]
    return [target for target in targets if not target.startswith((DOCS, ".."))]


def _resolved(path: str, target: str) -> str:
    """From the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _uri(target: str) -> str:
    return SOURCE + (target if target.endswith(".md") else f"{target}.md")


def _content(target: str) -> str:
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text()
    modules = sorted(path.glob("*.py")) if path.is_dir() else [path]
    parts = [f"# {target}"]
    for module in modules:
        parts += [f"## {module.name}"] if path.is_dir() else []
        fence = "`" * 6
        parts.append(f"{fence}{LANGUAGES.get(module.suffix, 'text')}\n{module.read_text().rstrip()}\n{fence}")
    return "\n\n".join(parts) + "\n"
