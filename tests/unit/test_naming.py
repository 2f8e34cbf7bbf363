"""Names that runs go by where other runs of the same name are."""

import re
from pathlib import Path

import pytest

from kto_ray.naming import ROLES, Application, unique_name
from kto_ray.storage import Storage


def test_two_runs_of_one_name_are_called_differently_and_readably(tmp_path: Path) -> None:
    one, other = (unique_name(Storage(str(tmp_path / folder / "demo"))) for folder in ("a", "b"))
    assert one != other
    assert re.fullmatch(r"demo-[0-9a-f]{8}", one)


@pytest.mark.parametrize(
    "name", ["sd15 night", "köpfe/..", "赤い丸", "-._", "a" * 300, "x#y?z%20", "../up", "two\nlines"]
)
def test_any_name_becomes_one_that_fits_into_a_path(tmp_path: Path, name: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,39}-)?[0-9a-f]{8}", unique_name(Storage(f"{tmp_path}/{name}")))


def test_a_folder_has_one_name_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    written = (
        "runs/demo",
        "./runs/demo/",
        "link/demo",
        f"{tmp_path}/runs/../runs/demo",
        f"file://{tmp_path}/runs/demo",
    )
    assert len({unique_name(Storage(path)) for path in written}) == 1
    remote = ("s3://bucket/runs/demo", "s3://bucket/runs/demo/", "s3://bucket//runs/demo")
    assert len({unique_name(Storage(path)) for path in remote}) == 1
    assert unique_name(Storage("s3://bucket/runs/demo")) != unique_name(Storage("gs://bucket/runs/demo"))


def test_an_application_says_whose_it_is() -> None:
    for run in ("demo-0123abcd", "a-generators-b-0123abcd", "x-page-00000001-0123abcd"):
        for role in ROLES:
            application = Application(run, role, "02000000")
            assert Application.parse(str(application)) == application
    assert Application.parse("kto-ray-demo") is None
    assert Application.parse("somebody-elses") is None
