"""`kto-ray submit`: a run as a job of a cluster. `cli.py` puts it in its place; `submitting.py` works it out."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from kto_ray.cli_run import GPU, INTERRUPTED, OVERRIDES, RECIPE, card

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


@click.command("submit")
@RECIPE
@click.option(
    "--address", metavar="URL", help="Of the head's dashboard. [default: RAY_API_SERVER_ADDRESS, or loopback]"
)
@click.option("--dry-run", is_flag=True, help="Have everything checked there, and end.")
@click.option("--follow", is_flag=True, help="Show what it prints until it ends, and end with its exit code.")
@click.option("--id", "id_", help="Of the job; by default the run's name and the time.")
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder to upload, for plug-ins; by default the checkout, if it is called in one, or else only the recipe.",
)
@click.option("--env", "variables", multiple=True, metavar="NAME[=VALUE]", help="A variable of the job's environment.")
@GPU
@OVERRIDES
def submit(
    recipe: str,
    address: str | None,
    dry_run: bool,
    follow: bool,
    id_: str | None,
    working_dir: Path | None,
    variables: tuple[str, ...],
    gpu: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Submit a run to a Ray cluster, on which kto-ray is installed. Submitted again, the same run goes on.

    \b
    kto-ray submit --recipe shapes_demo run=demo runs_folder=/shared/runs --follow
    kto-ray submit --address http://head:8265 --recipe mine.yaml runs_folder=s3://bucket/runs
    kto-ray submit --working-dir . label.scorers=my_taste:Sharpness label.threshold=100

    The token is that of ~/.ray/auth_token, if it is there. Exit codes: as those of `kto-ray run`, with --follow.
    """
    from kto_ray.submitting import Submission, connect, send

    console = Console(soft_wrap=True)
    submission = Submission.of(recipe, [*overrides, *card(gpu)], id_, working_dir, variables, dry_run)
    client, where = connect(address)
    send(submission, client)
    console.print(f"{submission.id}: {submission.command}", markup=False, highlight=False)
    if not follow:
        for what, words in {"follow": "logs --follow", "stop": "stop"}.items():
            console.print(f"{what}: ray job {words} --address {where} {submission.id}", markup=False, highlight=False)
        return
    try:
        asyncio.run(_shown(client, submission.id))
    except KeyboardInterrupt:
        console.print(f"it goes on; stop it with: ray job stop --address {where} {submission.id}", highlight=False)
        sys.exit(INTERRUPTED)
    from kto_ray.submitting import outcome

    state, code = outcome(client, submission.id)
    console.print(f"{submission.id}: {state.lower()}", markup=False, highlight=False)
    sys.exit(code)


async def _shown(client: "JobSubmissionClient", id_: str) -> None:
    async for text in client.tail_job_logs(id_):
        sys.stdout.write(text)
        sys.stdout.flush()
