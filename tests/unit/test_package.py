"""The shape of the package: cheap to import, imports point one way, plug-in points are where the design says."""

import ast
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import kto_ray

ROOT = Path(kto_ray.__file__).parent
MODULES = {
    ".".join(("kto_ray", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
HEAVY = ("torch", "ray", "diffusers", "transformers", "matplotlib")
CHEAP = (
    "kto_ray",
    "kto_ray.config",
    "kto_ray.records",
    "kto_ray.prompts",
    "kto_ray.rounds",
    "kto_ray.policies",
    "kto_ray.cli",
    "kto_ray.data.sources",
)


def imports_of(path: Path) -> set[str]:
    """The modules of kto_ray that a file names in any import, also inside of functions."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= named & MODULES.keys() or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "kto_ray"}


def test_importing_is_cheap() -> None:
    script = (
        f"import sys, importlib\nfor name in {CHEAP}:\n"
        f"    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY} if heavy in sys.modules]\n"
        f"    assert not loaded, (name, loaded)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_what_the_controller_of_ray_train_imports_is_light() -> None:
    script = "import sys, kto_ray.train.watching; assert not {'torch', 'diffusers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "identity", "images", "pictures", "records", "sleeping", "stage", "stopwatch", "telemetry"),
    ("concurrency", "draining", "lost", "plugins", "secrets", "shapes", "stalls", "storage", "text"),
    ("prompt_files", "section"),
    ("objectives",),
    ("console", "lease", "naming", "outbox", "parts", "prompt_templates", "sharing", "verdicts"),
    ("config",),
    ("cluster", "serving", "policies", "prepared", "rounds", "ruling", "samples", "prompts", "tracking", "diffusion"),
    ("caretaker", "placement"),
    ("generate", "score", "train", "turns"),
    ("holdings", "label"),
    ("people", "evaluate", "relabel"),
    ("data", "starting"),
    ("feedback",),
    ("labelers", "making", "retention", "run_folder", "telling"),
    ("learning",),
    ("bake_off", "beginning", "check", "doctor", "export", "planning", "preflight", "rewind", "submitting", "watch"),
    ("offline",),
    ("cli_compare", "cli_completion", "cli_doctor", "cli_export", "cli_init", "cli_report", "cli_runs", "cli_sample"),
    ("cli_dataset", "cli_plan", "cli_watch", "loop"),
    ("cli_run",),
    ("cli_submit",),
    ("cli",),
    ("__main__",),
)
"""The rooms of the house, ground floor first: who stands higher may know who stands lower, and nobody else."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_is_on_a_floor() -> None:
    assert sorted(name for floor in FLOORS for name in floor) == sorted(
        {room(name) for name in MODULES} - {"", "recipes"}
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nobody_knows_who_lives_above(module: str) -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    here = room(module)
    if here in ("", "recipes"):
        return
    known = {room(name) for name in imports_of(MODULES[module])} - {"", here}
    assert not {name for name in known if floor_of[name] >= floor_of[here]}


def test_no_room_is_a_quarter_of_the_house() -> None:
    lines: Counter[str] = Counter()
    for name, path in MODULES.items():
        lines[room(name)] += len(path.read_text().splitlines())
    largest, size = lines.most_common(1)[0]
    assert size < lines.total() / 4, f"{largest} has {size} of {lines.total()} lines"


def test_the_loop_can_be_read_in_one_sitting() -> None:
    assert len(MODULES["kto_ray.loop"].read_text().splitlines()) < 300


def test_one_name_is_one_class() -> None:
    where: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if room(name) == "objectives"])
def test_objectives_know_neither_ray_nor_diffusers(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"ray", "diffusers", "transformers", "peft"}


def test_nobody_knows_the_loop_but_the_command_that_runs_it() -> None:
    assert [name for name, path in MODULES.items() if "kto_ray.loop" in imports_of(path)] == ["kto_ray.cli_run"]


def test_imports_point_one_way() -> None:
    graph = {name: imports_of(path) & MODULES.keys() - {name, "kto_ray"} for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert graph.keys() - done == set(), "these modules import each other in a circle"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module: str) -> None:
    source = MODULES[module].read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_built_in_plug_ins_exist() -> None:
    from kto_ray.score.scorers import SCORERS

    for path in SCORERS.values():
        module, _, name = path.partition(":")
        assert hasattr(importlib.import_module(module), name)


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").is_file()
