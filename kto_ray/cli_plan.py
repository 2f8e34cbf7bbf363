"""`kto-ray plan`: nodes, hours and what will idle. `cli.py` puts it in its place."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_ray.errors import UserError

if TYPE_CHECKING:
    from kto_ray.config import RunConfig
    from kto_ray.planning.plan import Kind, RunPlan
    from kto_ray.planning.speeds import Speeds

SPEED = click.FloatRange(min=0, min_open=True)


@click.command("plan")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option(
    "--cluster", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Ray's cluster file, or KubeRay's."
)
@click.option("--nodes", multiple=True, metavar="2x32CPU,4GPU", help="Instead: nodes that are there; may be repeated.")
@click.option("--speeds", "run", metavar="RUN", help="Folder or URI of a run on such GPUs: what it measured.")
@click.option("--images-per-s", type=SPEED, help="That a replica draws.")
@click.option("--samples-per-s", type=SPEED, help="Training samples that a train worker gets through.")
@click.option("--scores-per-s", multiple=True, metavar="SCORER=NUMBER", help="That an actor of a scorer scores.")
@click.option("--label-s", type=click.FloatRange(min=0), help="What labeling takes beyond a round's last image.")
@click.option("--gpu", type=SPEED, metavar="GB", help="Memory of each GPU: short for cluster.gpu_gb=GB.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: Path | None,
    nodes: tuple[str, ...],
    run: str | None,
    images_per_s: float | None,
    samples_per_s: float | None,
    scores_per_s: tuple[str, ...],
    label_s: float | None,
    gpu: float | None,
) -> None:
    """Say what a run of RECIPE takes of a cluster: nodes, hours, and what will idle.

    Speeds are stated, or taken from a finished run; where both are given, those that are stated count.
    """
    from kto_ray.config import load
    from kto_ray.planning.node_types import read_cluster, read_nodes
    from kto_ray.planning.plan import make_plan
    from kto_ray.prompts import load_prompts

    if (cluster is None) == (not nodes):
        raise click.UsageError("give either --cluster FILE or --nodes")
    config = load(recipe, [*overrides, *([f"cluster.gpu_gb={gpu:g}"] if gpu is not None else [])])
    fleet = read_cluster(cluster) if cluster is not None else read_nodes(nodes)
    speeds = _speeds(config, run, images_per_s, samples_per_s, scores_per_s, label_s)
    held_out = len(load_prompts("prompts.held_out", config.prompts.held_out))
    made = make_plan(config, fleet, speeds, held_out, _kind(config))
    memory = _memory(config)
    console = Console(soft_wrap=True)
    console.print(_table(made))
    for line in (*_lines(config, made), *memory):
        console.print(line, markup=False, highlight=False)


def _kind(config: "RunConfig") -> "Kind":
    """As the recipe has it; generators that come and go are planned like such that stay."""
    return "colocated" if config.cluster.placement == "colocated" else "separate"


def _speeds(
    config: "RunConfig",
    run: str | None,
    images_per_s: float | None,
    samples_per_s: float | None,
    scores_per_s: tuple[str, ...],
    label_s: float | None,
) -> "Speeds":
    from kto_ray.planning.speeds import Speeds, measured
    from kto_ray.storage import Storage

    known = measured(Storage(run)) if run is not None else None
    images = images_per_s or (known.images_per_s if known else None)
    samples = samples_per_s or (known.samples_per_s if known else None)
    if images is None or samples is None:
        raise click.UsageError("give --speeds RUN, or both --images-per-s and --samples-per-s")
    scores = {}
    for text in scores_per_s:
        name, _, number = text.partition("=")
        if name not in config.label.scorers:
            raise UserError(f"--scores-per-s {text}: label.scorers has {', '.join(config.label.scorers)}")
        try:
            scores[name] = float(number)
        except ValueError:
            scores[name] = 0.0
        if not scores[name] > 0:
            raise UserError(f"--scores-per-s {text}: write a positive number of images a second, as {name}=8")
    if label_s is None and known is not None and not scores:
        label_s = known.label_s
    return Speeds(images, samples, scores, label_s, known.other_s if known is not None else 0.0)


def _memory(config: "RunConfig") -> list[str]:
    """What a replica and a train worker hold. Raises UserError: they cannot fit on the cards, where these are known."""
    from kto_ray.diffusion import memory, source

    try:
        configs = source.configs(config.model)
    except UserError as error:  # the hub is away: a plan goes without
        return [f"memory: unknown: {error}"]
    if configs is None:
        return ["memory: unknown until a folder is made of the file"]
    needs = memory.needs_of(config, configs)
    if config.cluster.gpu_gb is not None:
        memory.require_fit(needs, config.cluster.gpu_gb)
    return [f"a {need.role} holds: {need}" for need in needs]


def _table(made: "RunPlan") -> Table:
    table = Table("role", "actors", "each", "on nodes", "idle")
    for busy in made.roles:
        wanted = f" of {busy.role.most}" if busy.most < busy.role.most else ""
        actors = f"{busy.least} to {busy.most}" if busy.least < busy.most else f"{busy.most}"
        idle = busy.idle(made.total_s)
        cells = (busy.role.name, actors + wanted, busy.role.each, ", ".join(busy.places))
        table.add_row(*map(Text, cells), Text("?" if idle is None else f"{idle:.0%}"))
    return table


def _lines(config: "RunConfig", made: "RunPlan") -> list[str]:
    nodes = ", ".join(
        f"{made.least.get(name, 0)} to {count} x {name}" if made.least.get(name, 0) < count else f"{count} x {name}"
        for name, count in made.most.items()
    )
    overlap = ", the next one is made while one is trained on" if config.rounds_ahead else ""
    lines = [
        f"nodes: {nodes}",
        f"a round: {config.generate.images_per_round} images drawn in {made.draw_s:.0f} s, labeled "
        f"{made.label_s:.0f} s later, trained on in {made.train_s:.0f} s, {made.other_s:.0f} s for the rest{overlap}",
        f"the run: {config.rounds} rounds and {made.evaluations} evaluations of {made.evaluate_s:.0f} s: "
        f"{made.total_s / 3600:.1f} hours",
    ]
    if made.gpu_hours:
        share = max(0.0, 1 - made.working_gpu_hours / made.gpu_hours)
        lines.append(f"GPU hours: {made.gpu_hours:.1f} booked, of which {share:.0%} idle or not known to work")
    if made.kind == "colocated":
        lines.append("colocated: a role that has no turn sleeps; its share of idle time is another's work")
    if made.unknown:
        lines.append(f"taken to keep up with drawing, since no speed is given: {', '.join(made.unknown)}")
    return lines
