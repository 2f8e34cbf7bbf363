"""Make a release: `make release VERSION=0.2.0`. Everything is checked first, and nothing leaves this machine.

1. The working tree is clean, the version is new and larger, CHANGELOG.md says under "Unreleased" what is in it.
2. `.ci/run`: lint, types, every test.
3. Version and changelog are written, committed and tagged; the wheel is built into dist/.

What is left is to look at it, and to push commit and tag.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION_FILE, CHANGELOG = "kto_ray/__init__.py", "CHANGELOG.md"
VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
UNRELEASED = "## Unreleased\n"


def prepare(root: Path, version: str) -> None:
    """Write the version where it stands. Raises SystemExit, in words, before anything is written."""
    source, changes = (root / VERSION_FILE).read_text(), (root / CHANGELOG).read_text()
    found = VERSION_LINE.search(source)
    if found is None:
        raise SystemExit(f"{VERSION_FILE} has no __version__")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SystemExit(f"VERSION={version} is no version; give three numbers, for instance 0.2.0")
    if _numbers(version) <= _numbers(found[1]):
        raise SystemExit(f"VERSION={version} must be larger than {found[1]}, which is there")
    _, heading, rest = changes.partition(UNRELEASED)
    if not heading or not rest.partition("\n## ")[0].strip():
        raise SystemExit(f'{CHANGELOG} says nothing under "{UNRELEASED.strip()}"; write what is new')
    (root / VERSION_FILE).write_text(source.replace(found[0], f'__version__ = "{version}"'))
    (root / CHANGELOG).write_text(changes.replace(UNRELEASED, f"{UNRELEASED}\n## {version}\n"))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    version = parser.parse_args().version

    def run(*command: str) -> None:
        subprocess.run(command, cwd=ROOT, check=True)

    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        raise SystemExit(f"the working tree is not clean; commit or set aside:\n{changed}")
    run(".ci/run")
    prepare(ROOT, version)
    run("git", "commit", "--all", "--message", f"Release {version}")
    run("git", "tag", "--annotate", f"v{version}", "--message", f"kto-ray {version}")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".")
    print(f"dist/kto_ray-{version}-py3-none-any.whl and tag v{version} are made; to publish: git push --follow-tags")


if __name__ == "__main__":
    main()
