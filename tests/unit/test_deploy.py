"""The deploy kits are what the tools that read them accept, and fit each other and this version of the project."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLUSTERS = [ROOT / "cluster.yaml", DEPLOY / "gcp.yaml", DEPLOY / "on_prem.yaml"]
MANIFESTS = [DEPLOY / "kuberay_cluster.yaml", DEPLOY / "kuberay_job.yaml"]
SCRIPTS = [DEPLOY / "slurm.sh", DEPLOY / "tls.sh"]
PROGRAMS = Path(sys.executable).parent


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    return tree


def name_of(path: Path) -> str:
    return path.name


# -- ray up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CLUSTERS, ids=name_of)
def test_ray_accepts_the_cluster_with_its_defaults(path: Path) -> None:
    config = prepare_config(read(path))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("path", CLUSTERS, ids=name_of)
def test_all_nodes_authenticate_each_other(path: Path) -> None:
    config = read(path)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("path", CLUSTERS[:2], ids=name_of)
def test_the_head_takes_no_work_and_workers_tell_of_their_end(path: Path) -> None:
    config = read(path)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert config["max_workers"] == sum(node_type["max_workers"] for node_type in types.values())
    assert any("/home/ray/kto-ray/deploy/preemption.py" in command for command in config["worker_start_ray_commands"])


def test_ec2_accepts_the_nodes_and_they_may_use_the_bucket() -> None:
    parameters = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in read(ROOT / "cluster.yaml")["available_node_types"].values():
        node = node_type["node_config"]
        asked = {**node, "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(asked, parameters)
        assert not report.has_errors(), report.generate_report()
        assert node["IamInstanceProfile"] == {"Name": "kto-ray"}
        assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 200


# -- KubeRay ----------------------------------------------------------------------------------------------------------

OBJECT: dict[str, Any] = {"type": "object"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXT: dict[str, Any] = {"type": "string"}
FLAG: dict[str, Any] = {"type": "boolean"}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """A schema of a mapping with these keys and no others."""
    return {**OBJECT, "properties": properties, "required": required.split(), "additionalProperties": False}


GROUP = {"rayStartParams": {**OBJECT, "additionalProperties": TEXT}, "template": OBJECT}
WORKERS = {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
RAY_CLUSTER = closed(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    suspend=FLAG,
    authOptions=closed("mode secretName", mode={"enum": ["token"]}, secretName=TEXT),
    tlsOptions=closed("enabled", enabled=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed("version", version={"enum": ["v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=closed("rayStartParams template", **GROUP),
    workerGroupSpecs={"type": "array", "items": closed(" ".join([*WORKERS, *GROUP]), **WORKERS, **GROUP)},
)
RAY_JOB = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    suspend=FLAG,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    rayClusterSpec=RAY_CLUSTER,
)
"""What the manifests use of KubeRay's v1 API, by hand from its reference; the API itself has much more."""


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_use_kuberays_fields(path: Path) -> None:
    manifest = read(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.validate(manifest["spec"], {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}[manifest["kind"]])


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kubernetes_accepts_the_pods(path: Path) -> None:
    spec = cluster_of(read(path))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_rays_autoscaler_reads_the_manifest(path: Path) -> None:
    manifest = read(path)
    cluster = {"metadata": manifest["metadata"], "spec": cluster_of(manifest)}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == types["headgroup"]["resources"]["GPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["max_workers"] == 8


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_pods_end_after_they_have_handed_over(path: Path) -> None:
    for group in cluster_of(read(path))["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        *command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "/home/ray/kto-ray/deploy/preemption.py", "kubernetes", "--seconds"]
        assert float(seconds) < pod["terminationGracePeriodSeconds"]


def test_job_and_cluster_are_the_same_cluster() -> None:
    one, other = (cluster_of(read(path)) for path in MANIFESTS)
    assert one == other


# -- images and scripts -----------------------------------------------------------------------------------------------


def test_everything_names_the_ray_of_the_constraints() -> None:
    version = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={version[1]}\n" in dockerfile
    assert f"rayproject/ray:{version[1]}-py311-gpu" in (ROOT / "cluster.yaml").read_text()
    assert {cluster_of(read(path))["rayVersion"] for path in MANIFESTS} == {version[1]}


def test_hadolint_has_nothing_to_say_of_the_image() -> None:
    subprocess.run([PROGRAMS / "hadolint", "--no-color", DEPLOY / "Dockerfile"], check=True)


def test_the_image_copies_what_is_there() -> None:
    copies = re.findall(r"^COPY --chown=ray (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copies).split():
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([PROGRAMS / "shellcheck", "--color=never", script], check=True)
    assert os.access(script, os.X_OK)


def test_every_node_has_a_certificate_of_the_one_authority(tmp_path: Path) -> None:
    authority, here = tmp_path / "authority", tmp_path / "here"
    for arguments in (["authority", authority], ["node", authority, here]):
        subprocess.run([DEPLOY / "tls.sh", *arguments], check=True)
    check = ["openssl", "verify", "-CAfile", here / "ca.crt", "-verify_ip", "127.0.0.1", here / "node.crt"]
    subprocess.run(check, check=True)
    assert not (here / "node.key").stat().st_mode & 0o077
    again = subprocess.run([DEPLOY / "tls.sh", "authority", authority], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "not overwritten" in again.stderr


def slurm(folder: Path, ray: str) -> int:
    """Status of `slurm.sh rounds=3` on two nodes that are this machine, where `srun` runs what it is given."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo first; echo second",
        "hostname": "echo 10.1.2.3 10.9.9.9",
        "python": f'printf "%s\\n" "$@" > {folder}/run; echo "$RAY_AUTH_MODE" > {folder}/mode',
        "ray": ray,
    }
    for name, script in programs.items():
        program = folder / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{script}\n")
        program.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "SLURM_SUBMIT_DIR": str(folder)}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4"}
    return subprocess.run([DEPLOY / "slurm.sh", "rounds=3"], env=environment, check=False).returncode


def test_slurm_starts_ray_on_every_node_and_the_run_on_the_first(tmp_path: Path) -> None:
    ray = f'printf "%s\\n" "$@" > {tmp_path}/ray; while [ "$1" != -- ]; do shift; done; shift; "$@"'
    assert slurm(tmp_path, ray) == 0
    called = (tmp_path / "ray").read_text().splitlines()
    assert called[: called.index("--")] == [
        *("symmetric-run", "--address", "10.1.2.3:6379", "--min-nodes", "2"),
        *("--num-cpus", "32", "--num-gpus", "4", "--disable-usage-stats"),
    ]
    assert (tmp_path / "run").read_text().splitlines() == [
        *("jobs/online_kto.py", "--recipe", "sd15_lora", "run=sd15", f"runs_folder={tmp_path}/runs"),
        *("cluster.address=10.1.2.3:6379", "rounds=3"),
    ]
    assert (tmp_path / "mode").read_text() == "token\n"
    assert not list(tmp_path.glob(".kto-ray-*"))


def test_slurm_fails_where_ray_was_not_started(tmp_path: Path) -> None:
    assert slurm(tmp_path, "echo 'Failed to start Ray' >&2") == 1
