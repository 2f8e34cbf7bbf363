"""Environments of scorers: what is refused and in which words, repairs on small trees, a build from toy packages."""

import fcntl
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import kto_ray
from kto_ray.cli import main
from kto_ray.errors import UserError
from kto_ray.score.environments import building, contents
from kto_ray.score.environments.contents import BASE, ENVIRONMENTS, Environment, requirements, specification
from kto_ray.score.environments.finding import MARKER, find_flaw, interpreter, require
from kto_ray.score.environments.repairs import Rewrite, Supply
from kto_ray.score.scorers import SCORERS, load_scorer

HPSV2 = ENVIRONMENTS["hpsv2"]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of environments without any."""
    monkeypatch.setenv("KTO_RAY_ENVS", str(tmp_path))
    return tmp_path


def pretend(environment: Environment, **changes: object) -> None:
    """What a finished build leaves, without packages; `changes` are to what it says that it was built from."""
    environment.site_packages.mkdir(parents=True)
    environment.python.parent.mkdir()
    environment.python.touch()
    (environment.folder / MARKER).write_text(json.dumps({**specification(environment), "size": 1, **changes}))
    if environment is not BASE:
        (environment.site_packages / "kto_ray").symlink_to(Path(kto_ray.__file__).parent)


# -- interpreter ------------------------------------------------------------------------------------------------------


def test_the_python_of_a_built_environment(root: Path) -> None:
    pretend(BASE)
    pretend(HPSV2)
    assert interpreter("hpsv2") == root / "hpsv2" / "bin" / "python"


@pytest.mark.usefixtures("root")
def test_a_python_that_is_gone_or_a_damaged_marker_is_said() -> None:
    pretend(BASE)
    pretend(HPSV2)
    HPSV2.python.unlink()
    with pytest.raises(UserError, match=r"'hpsv2' has no .*python any more; build it with: kto-ray env build hpsv2"):
        interpreter("hpsv2")
    (HPSV2.folder / MARKER).write_text("{")
    with pytest.raises(UserError, match=r"was built for Python unknown, this is .*kto-ray env build hpsv2"):
        interpreter("hpsv2")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown environment 'hpsv', did you mean 'hpsv2'\?.*hpsv2, image_reward"):
        interpreter("hpsv")


def test_what_is_not_built_says_how_to_build_it(root: Path) -> None:
    words = "environment 'hpsv2' is not built; build it with: kto-ray env build hpsv2"
    with pytest.raises(UserError, match=f"^{re.escape(words)} .*{re.escape(str(root))}; KTO_RAY_ENVS"):
        interpreter("hpsv2")


@pytest.mark.usefixtures("root")
def test_what_has_no_marker_is_not_finished() -> None:
    pretend(BASE)
    pretend(HPSV2)
    (HPSV2.folder / MARKER).unlink()
    with pytest.raises(UserError, match="is built only in part; build it with: kto-ray env build hpsv2"):
        interpreter("hpsv2")


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Ray": "2.9.0"}, f"was built for Ray 2.9.0, this is Ray {metadata.version('ray')}"),
        ({"Python": "3.10"}, "was built for Python 3.10, this is Python 3"),
        ({"packages": [*BASE.packages, *HPSV2.packages[1:]]}, "was built with other packages than hpsv2=="),
        ({"repairs": []}, "was built with other repairs than Rewrite(name='no-turtle'"),
    ],
)
def test_what_was_built_for_something_else_is_refused(changes: dict[str, object], words: str) -> None:
    pretend(BASE)
    pretend(HPSV2, **changes)
    with pytest.raises(UserError, match=re.escape(f"environment 'hpsv2' {words}")):
        interpreter("hpsv2")


@pytest.mark.usefixtures("root")
def test_an_environment_is_no_better_than_its_base() -> None:
    pretend(HPSV2)
    assert find_flaw(HPSV2) == "rests on a base that is not built"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("other", ["another version", "none"])
def test_another_kto_ray_is_refused(other: str) -> None:
    pretend(BASE)
    pretend(HPSV2)
    link = HPSV2.site_packages / "kto_ray"
    link.unlink()
    if other != "none":
        link.mkdir()
        (link / "__init__.py").write_text('__version__ = "0.0.1"\n')
    with pytest.raises(UserError, match=f"linked to another version of kto_ray than {kto_ray.__version__}"):
        interpreter("hpsv2")


def test_ones_own_python_is_taken_by_its_path(tmp_path: Path) -> None:
    assert interpreter(sys.executable) == Path(sys.executable)
    (tmp_path / "python").touch()
    for path in (tmp_path / "python", tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=f"environment {path} is no program"):
            interpreter(str(path))


def test_without_a_setting_environments_are_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTO_RAY_ENVS", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert contents.root() == Path("/home/somebody/.cache/kto-ray/envs")


# -- what is in them --------------------------------------------------------------------------------------------------


def test_every_environment_is_a_scorers() -> None:
    assert set(ENVIRONMENTS) <= set(SCORERS)
    assert all(name == environment.name for name, environment in ENVIRONMENTS.items())


@pytest.mark.parametrize("environment", [BASE, *ENVIRONMENTS.values()], ids=lambda environment: environment.name)
def test_every_package_is_pinned_once_and_documented(environment: Environment) -> None:
    names = [re.fullmatch(r"([\w-]+)==[\w.]+", package)[1] for package in requirements(environment)]  # type: ignore[index]
    assert len(set(names)) == len(names)
    documented = DOCUMENTATION.read_text()
    assert [package for package in environment.packages if f"`{package}`" not in documented] == []
    assert [repair.name for repair in environment.repairs if f"`{repair.name}`" not in documented] == []


@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_outside_of_its_environment_a_scorer_says_where_it_runs(name: str) -> None:
    with pytest.raises(UserError, match=f"set env: {name} in its settings.*kto-ray env build {name}"):
        load_scorer(name)()


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        require("half_there", "hpsv2")


# -- repairs ----------------------------------------------------------------------------------------------------------


def rewrite(becomes: str | None) -> Rewrite:
    return Rewrite("mend", "it is broken", "package/file.py", "import broken", becomes)


@pytest.mark.parametrize(
    ("becomes", "after"), [(None, "a = 1\nb = 2\n"), ("import whole", "a = 1\nimport whole\nb = 2\n")]
)
def test_a_rewrite_changes_one_line(becomes: str | None, after: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "file.py"
    file.write_text("a = 1\nimport broken\nb = 2")
    rewrite(becomes).apply(tmp_path)
    assert file.read_text() == after


@pytest.mark.parametrize("content", [None, "import broken_too\n", "import broken\nimport broken\n"])
def test_a_rewrite_that_finds_another_file_raises_and_leaves_it(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "file.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"repair 'mend' does not find the line 'import broken' once in .*file\.py"):
        rewrite("import whole").apply(tmp_path)
    assert content is None or file.read_text() == content


def supply(content: bytes) -> Supply:
    return Supply("fill", "it is missing", "to/words.gz", "from/words.gz", hashlib.sha256(content).hexdigest())


@pytest.fixture
def two_packages(tmp_path: Path) -> Path:
    (tmp_path / "to").mkdir()
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "words.gz").write_bytes(b"words")
    return tmp_path


def test_a_missing_file_is_supplied_from_another_package(two_packages: Path) -> None:
    supply(b"words").apply(two_packages)
    assert (two_packages / "to" / "words.gz").read_bytes() == b"words"


def test_a_file_that_is_there_after_all_is_left_alone(two_packages: Path) -> None:
    (two_packages / "to" / "words.gz").write_bytes(b"new words")
    with pytest.raises(UserError, match=r"repair 'fill' does not find a folder .*to without words\.gz"):
        supply(b"words").apply(two_packages)
    assert (two_packages / "to" / "words.gz").read_bytes() == b"new words"


def test_only_the_very_file_is_supplied(two_packages: Path) -> None:
    for content in (b"other words", None):
        if content is None:
            (two_packages / "from" / "words.gz").unlink()
        with pytest.raises(UserError, match=r"repair 'fill' does not find .*from/words\.gz with SHA-256"):
            supply(b"other words").apply(two_packages)
    assert not (two_packages / "to" / "words.gz").exists()


# -- building ---------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, **files: str) -> None:
    """The smallest wheel that pip installs, of a package of these modules."""
    information = f"{name}-{version}.dist-info"
    contents = {
        **{f"{name}/{file}.py": content for file, content in files.items()},
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in contents.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{information}/RECORD", "".join(f"{path},,\n" for path in [*contents, f"{information}/RECORD"]))


@pytest.fixture(scope="module")
def toy_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheels of toys, and the root of the environments that are built from them."""
    wheels = tmp_path_factory.mktemp("wheels")
    write_wheel(wheels, "ray", metadata.version("ray"), __init__="")
    write_wheel(wheels, "nowhere", "1.0", __init__="")
    write_wheel(wheels, "toy", "1.0", __init__="version = 1")
    write_wheel(wheels, "toy", "2.0", __init__="version = 2\nimport broken")
    return wheels, tmp_path_factory.mktemp("envs")


@pytest.fixture
def toys(toy_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of environments that pip builds from toys, instead of packages of gigabytes."""
    wheels, folder = toy_folders
    repair = Rewrite("mend", "broken is not there", "toy/__init__.py", "import broken")
    monkeypatch.setenv("KTO_RAY_ENVS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(contents, "BASE", Environment("base", ("toy==1.0",)))
    monkeypatch.setattr(contents, "ENVIRONMENTS", {"toy": Environment("toy", ("toy==2.0",), (repair,))})
    return folder


def build() -> str:
    """What a build of the toy says; pip's own words go where the tests' do."""
    console = Console(file=io.StringIO(), width=1000)
    building.build("toy", console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def ask(python: Path, expression: str) -> str:
    program = f"import kto_ray, toy, sys; print({expression})"
    return subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_build_is_a_layer_on_a_base(toys: Path) -> None:
    (toys / "toy").mkdir()
    (toys / "toy" / "rubbish").write_text("left by a build that was killed")
    said = build()
    for step in ("base is not built", "toy is built only in part", "removing", "repair mend: broken is not there"):
        assert step in said
    assert not (toys / "toy" / "rubbish").exists()
    python = interpreter("toy")
    assert ask(python, "toy.version") == "2"  # the layer's, not the base's; and mended
    assert ask(python, "kto_ray.__version__") == kto_ray.__version__
    assert ask(python, "__import__('nowhere').__name__") == "nowhere"  # the base has what its packages require
    assert [path.name for path in (toys / "toy").rglob("nowhere*")] == []  # the layer has what is named, and no more


def test_a_second_build_does_nothing(toys: Path) -> None:
    build()
    before = {path: path.lstat().st_mtime_ns for path in toys.rglob("*") if path.name != "lock"}
    assert build() == "base is built\ntoy is built\n"
    assert {path: path.lstat().st_mtime_ns for path in toys.rglob("*") if path.name != "lock"} == before


@pytest.mark.usefixtures("toys")
def test_a_failed_build_is_no_build_and_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    good = contents.ENVIRONMENTS["toy"]
    misfit = Rewrite("misfit", "it was written for another version", "toy/__init__.py", "import nothing")
    monkeypatch.setitem(contents.ENVIRONMENTS, "toy", Environment("toy", good.packages, (misfit,)))
    with pytest.raises(UserError, match="repair 'misfit' does not find"):
        build()
    assert find_flaw(contents.ENVIRONMENTS["toy"]) == "is built only in part"
    monkeypatch.setitem(contents.ENVIRONMENTS, "toy", Environment("toy", ("toy==3.0",)))
    with pytest.raises(UserError, match=r"failed with status 1 of: .* install .*toy==3\.0"):
        build()
    monkeypatch.setitem(contents.ENVIRONMENTS, "toy", good)
    said = build()
    assert "base is built\ntoy is built only in part" in said
    assert ask(interpreter("toy"), "toy.version") == "2"


def test_a_second_builder_waits_for_the_first(toys: Path) -> None:
    build()
    console = Console(file=io.StringIO(), width=1000)
    with open(toys / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=building.build, args=("toy", console))
        second.start()
        while "waiting" not in (said := console.file.getvalue()):  # type: ignore[attr-defined]
            time.sleep(0.01)
        assert said == f"waiting for another `kto-ray env build` to end in {toys}\n"
    second.join()
    assert console.file.getvalue().endswith("base is built\ntoy is built\n")  # type: ignore[attr-defined]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KTO_RAY_ENVS", str(tmp_path / "file" / "envs"))
    with pytest.raises(UserError, match=r"environments cannot be kept in .*file/envs: .*; set KTO_RAY_ENVS"):
        building.build("hpsv2", Console(file=io.StringIO()))


# -- command ----------------------------------------------------------------------------------------------------------


def test_the_list_shows_what_can_be_used(root: Path) -> None:
    pretend(BASE, size=6_022_000_000)
    pretend(HPSV2)
    ran = CliRunner().invoke(main, ["env", "list"], env={"COLUMNS": "400"})
    assert ran.exit_code == 0, ran.output
    rows = {line.split()[1]: line for line in ran.stdout.splitlines() if line.startswith("│")}
    assert "ready" in rows["base"]
    assert "6,022 MB" in rows["base"]
    assert f"ray=={metadata.version('ray')}" in rows["base"]
    assert str(root / "hpsv2") in rows["hpsv2"]
    assert "ready" in rows["hpsv2"]
    assert "is not built" in rows["image_reward"]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "hpsv2", "hpsv3"], "error: unknown environment 'hpsv3', did you mean 'hpsv2'?"),
        (["build"], "name environments (image_reward, hpsv2), or give --all"),
        (["build", "hpsv2", "--all"], "or give --all"),
        (["check"], "build them with: kto-ray env build --all"),
        (["check", "hpsv2"], "environment 'hpsv2' is not built"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments: list[str], words: str) -> None:
    ran = CliRunner().invoke(main, ["env", *arguments])
    assert ran.exit_code == 2
    assert words in ran.stderr
    assert "Traceback" not in ran.output
    assert isinstance(ran.exception, SystemExit)
