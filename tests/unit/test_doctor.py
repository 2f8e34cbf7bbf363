"""`kto-ray doctor`: each flaw is made for real, found, and told with what mends it."""

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from kto_ray import doctor
from kto_ray.cli import main
from kto_ray.doctor import Diagnosis


def test_this_machine_is_looked_at_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTO_RAY_ENVS", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    said = CliRunner().invoke(main, ["doctor", "--json", "--runs-folder", str(tmp_path / "runs")])
    found = {row["part"]: row for row in json.loads(said.stdout)}
    assert {"python", "packages", "torch", "ray", "ray cluster", "temporary disk", "port 8265"} <= found.keys()
    assert found["python"]["state"] == found["torch"]["state"] == found["storage"]["state"] == "fine"
    assert found["environment hpsv2"]["remedy"] == "kto-ray env build hpsv2"
    assert said.exit_code == any(row["state"] == "wrong" for row in found.values())
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_wrong_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is none, a cluster that is not there, and a token that nobody made."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no_token"))
    said = CliRunner().invoke(main, ["doctor", "--runs-folder", str(tmp_path / "file" / "runs")])
    assert said.exit_code == 1
    lines = said.stdout.splitlines()
    assert any(line.startswith("wrong ray cluster: RAY_ADDRESS is '127.0.0.1:") for line in lines)
    assert any(
        line.startswith(f"wrong ray token: RAY_AUTH_MODE is token, and there is no {tmp_path}") for line in lines
    )
    assert any(line.startswith("wrong storage: runs_folder: cannot write ") for line in lines)
    assert any(
        line.strip() == "-> ray get-auth-token --generate, or copy the file of the cluster's head" for line in lines
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_somebody_has_is_a_note() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert doctor.listening("a page", port).state == "note"
    assert doctor.listening("a page", port).state == "fine"


def test_a_full_disk_is_wrong(tmp_path: Path) -> None:
    assert doctor.roomy("disk", tmp_path, 0, "make room").state == "fine"
    full = doctor.roomy("disk", tmp_path, 1e18, "make room")
    assert (full.state, full.remedy) == ("wrong", "make room")
    assert doctor.roomy("disk", tmp_path / "none", 0, "").state == "wrong"


@pytest.mark.parametrize(
    ("requirement", "flaw"),
    [("click>=8", None), ("click>=800", "click is "), ("no-such-package", "no-such-package is not installed")],
)
def test_a_package_is_held_to_its_bounds(requirement: str, flaw: str | None) -> None:
    found = doctor.unmet(Requirement(requirement))
    assert found is None if flaw is None else str(found).startswith(flaw)


def test_a_cluster_that_answers_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        found = [diagnosis for diagnosis in doctor._ray() if diagnosis.part == "ray cluster"]
    assert [diagnosis.state for diagnosis in found] == ["fine"]
    assert isinstance(found[0], Diagnosis)
