"""`kto-ray doctor`: whether this machine can run. `cli.py` puts it in its place; `doctor.py` looks."""

import json
import sys

import click
from rich.console import Console
from rich.text import Text

SIGNS = {"fine": Text("fine ", "green"), "note": Text("note ", "yellow"), "wrong": Text("wrong", "bold red")}


@click.command("doctor")
@click.option("--runs-folder", metavar="URI", help="Also try whether runs can be kept there.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of {part, state, found, remedy}.")
def doctor(runs_folder: str | None, as_json: bool) -> None:
    """Look at Python, packages, torch, GPUs, Ray, disks, scorers' environments and ports of this machine.

    \b
    kto-ray doctor
    kto-ray doctor --runs-folder s3://bucket/runs
    kto-ray doctor --json | jq '.[] | select(.state == "wrong")'

    What is wrong is told with the command that mends it, and ends with exit code 1. A note is what only some runs need.
    """
    from kto_ray.doctor import as_rows, examine

    diagnoses = []
    console = Console(soft_wrap=True)
    for diagnosis in examine(runs_folder):
        diagnoses.append(diagnosis)
        if not as_json:
            console.print(SIGNS[diagnosis.state], Text(f"{diagnosis.part}: {diagnosis.found}"))
            if diagnosis.remedy:
                console.print(Text(f"      -> {diagnosis.remedy}"))
    if as_json:
        click.echo(json.dumps(as_rows(diagnoses), indent=1))
    sys.exit(1 if any(diagnosis.state == "wrong" for diagnosis in diagnoses) else 0)
