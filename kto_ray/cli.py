"""The command `kto-ray`: a group for each thing it works on. Commands import what they need only when they run."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_ray.cli_compare import compare
from kto_ray.cli_completion import completion
from kto_ray.cli_dataset import dataset
from kto_ray.cli_doctor import doctor
from kto_ray.cli_export import export
from kto_ray.cli_init import init
from kto_ray.cli_plan import plan
from kto_ray.cli_report import report
from kto_ray.cli_run import run
from kto_ray.cli_runs import runs
from kto_ray.cli_sample import sample
from kto_ray.cli_submit import submit
from kto_ray.cli_watch import watch
from kto_ray.errors import UserError

if TYPE_CHECKING:
    from kto_ray.people.people import People

VERDICTS = ("desirable", "undesirable", "abstain", "failed")


class Commands(click.Group):
    """A group that prints a UserError in red, without traceback, and ends with status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            Console(stderr=True, soft_wrap=True).print(Text(f"error: {error}", "bold red"))
            ctx.exit(2)


@click.group("kto-ray", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kto-ray")
def main() -> None:
    """Online Diffusion-KTO on Ray."""


main.add_command(run)
main.add_command(submit)
main.add_command(init)
main.add_command(doctor)
main.add_command(report)
main.add_command(compare)
main.add_command(sample)
main.add_command(dataset)
main.add_command(export)
main.add_command(plan)
main.add_command(runs)
main.add_command(watch)
main.add_command(completion)


# -- kto-ray env ------------------------------------------------------------------------------------------------------


@main.group("env")
def env() -> None:
    """Python environments of scorers whose packages cannot live beside the loop's."""


@env.command("build")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Build all of them.")
def env_build(names: tuple[str, ...], everything: bool) -> None:
    """Build environments NAMES, and the base that they share; what is built already stays."""
    from kto_ray.score.environments import building, contents, finding

    if bool(names) == everything:
        raise click.UsageError(f"name environments ({', '.join(contents.ENVIRONMENTS)}), or give --all")
    for name in names:
        finding.named(name)
    console = Console(soft_wrap=True)
    for name in contents.ENVIRONMENTS if everything else names:
        python = building.build(name, console)
        console.print(f"{name}: {python}; try it with: kto-ray env check {name}", markup=False, highlight=False)


@env.command("check")
@click.argument("names", nargs=-1)
def env_check(names: tuple[str, ...]) -> None:
    """Build a scorer in each of NAMES, by default in all that are built, and score one picture.

    Weights are random: what is checked is the environment.
    """
    from kto_ray.score.environments import contents, finding, trying

    built = [state.environment.name for state in finding.states() if state.flaw is None]
    names = names or tuple(name for name in built if name in contents.ENVIRONMENTS)
    if not names:
        raise UserError(f"no environment is built in {contents.root()}; build them with: kto-ray env build --all")
    console = Console(soft_wrap=True)
    for name in names:
        found = trying.check(name)
        versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        console.print(
            f"{name}: its scorer works, with random weights ({found['seconds']:.0f} s; {versions})", highlight=False
        )


@env.command("list")
def env_list() -> None:
    """Show all environments: whether they can be used, where they are, and what is in them."""
    from kto_ray.score.environments import contents, finding

    table = Table("name", "state", "path", "size", "versions")
    for state in finding.states():
        environment = state.environment
        table.add_row(
            environment.name,
            Text("ready", "green") if state.flaw is None else Text(state.flaw, "red"),
            str(environment.folder),
            f"{state.size / 1e6:,.0f} MB" if state.size else "",
            ", ".join(contents.requirements(environment)),
        )
    Console().print(table)


# -- kto-ray check ----------------------------------------------------------------------------------------------------


@main.group("check")
def check() -> None:
    """Try a scorer, a labeler or prompts of one's own against their protocol, before a run does."""
    # Unlike `python`, a command does not look for modules where it is called.
    sys.path.insert(0, str(Path.cwd()))


def _yaml_mapping(_context: click.Context, _option: click.Parameter, text: str) -> dict[str, Any]:
    from kto_ray.config import yaml12

    try:
        value = yaml12.load(text)
    except yaml12.YAMLError as error:
        raise click.BadParameter(f"{text!r} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is not a mapping; write for instance '{{threshold: 3}}'")
    return value


ARGUMENTS = click.option(
    "--args", "arguments", default="{}", callback=_yaml_mapping, help="Keyword arguments it is built with, as YAML."
)
SIZE = click.option(
    "--size", nargs=2, type=int, default=(64, 64), show_default=True, help="Height and width of images."
)


@check.command("scorer")
@click.argument("path")
@ARGUMENTS
@SIZE
@click.option("--tolerance", default=1e-4, show_default=True, help="How far scores of one image may lie apart.")
@click.option("--wait", "wait_s", default=600.0, show_default=True, help="Seconds after which a check has hung.")
@click.option("--gpus", "num_gpus", default=0.0, show_default=True, help="What its actor asks for.")
@click.option("--env", "environment", default=None, help="Environment that it runs in.")
def check_scorer(
    path: str,
    arguments: dict[str, Any],
    size: tuple[int, int],
    tolerance: float,
    wait_s: float,
    num_gpus: float,
    environment: str | None,
) -> None:
    """Try the scorer PATH: a built-in name, or package.module:Name of a class or function."""
    from kto_ray.check import contract

    console = Console(soft_wrap=True)
    with console.status(f"trying {path} in an actor"):
        findings = contract.check_scorer(
            path, arguments, size=size, tolerance=tolerance, wait_s=wait_s, num_gpus=num_gpus, env=environment
        )
    sys.exit(0 if contract.show(findings, console) else 1)


@check.command("labeler")
@click.argument("path")
@ARGUMENTS
@SIZE
@click.option("--wait", "wait_s", default=30.0, show_default=True, help="Seconds to wait for answers.")
@click.option("--scorer", "scorers", multiple=True, default=("check",), help="Name of scores that come with samples.")
def check_labeler(
    path: str, arguments: dict[str, Any], size: tuple[int, int], wait_s: float, scorers: tuple[str, ...]
) -> None:
    """Try the labeler PATH: package.module:Name."""
    from kto_ray.check import contract

    console = Console(soft_wrap=True)
    with console.status(f"trying {path}"):
        findings = contract.check_labeler(path, arguments, scorers=scorers, wait_s=wait_s, size=size)
    sys.exit(0 if contract.show(findings, console) else 1)


@check.command("prompts")
@click.argument("source")
@ARGUMENTS
@click.option("--wait", "wait_s", default=600.0, show_default=True, help="Seconds after which a check has hung.")
@click.argument("settings", nargs=-1, metavar="[FIELD=VALUE]...")
def check_prompts(source: str, arguments: dict[str, Any], wait_s: float, settings: tuple[str, ...]) -> None:
    """Read the prompts of SOURCE: a file, a folder, a URI, or package.module:Name of a source of one's own.

    FIELD is one of `prompts.train`, for instance text=Prompt or split=train.
    """
    from kto_ray import config
    from kto_ray.check import contract

    given = [f"prompts.train.{setting}" for setting in settings]
    named = config.from_tree({"prompts": {"train": {"source": source, "args": arguments}}})
    of = config.override(named, given).prompts.train
    console = Console(soft_wrap=True)
    with console.status(f"reading {source}"):
        findings = contract.check_prompts(of, wait_s=wait_s)
    sys.exit(0 if contract.show(findings, console) else 1)


# -- kto-ray relabel --------------------------------------------------------------------------------------------------


@main.command("relabel")
@click.argument("run")
@click.option("--name", required=True, help="Name of the label set.")
@click.option("--threshold", required=True, help="A number, or {kind: ..., ...}; see docs/labeling.md.")
@click.argument("overrides", nargs=-1, metavar="[label.FIELD=VALUE]...")
def relabel(run: str, name: str, threshold: str, overrides: tuple[str, ...]) -> None:
    """Judge the sealed rounds of RUN (its folder or URI) anew from their stored scores; its own verdicts stay."""
    from kto_ray.relabel import relabel
    from kto_ray.storage import Storage

    rounds = relabel(Storage(run), name, [*overrides, f"label.threshold={threshold}"])
    table = Table("round", *VERDICTS, "changed")
    for round_ in rounds:
        counts = (str(round_.labels[label]) for label in VERDICTS)
        table.add_row(str(round_.round), *counts, f"{round_.changed:.0%}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"train on it with: kto-ray run ... replay.run={run} replay.labels={name}",
        markup=False,
        highlight=False,
    )


# -- kto-ray rewind ---------------------------------------------------------------------------------------------------


@main.command("rewind")
@click.argument("run")
@click.option("--to", required=True, type=click.IntRange(min=0), help="Policy version that the run goes on from.")
@click.argument("overrides", nargs=-1, metavar="[train.FIELD=VALUE]...")
def rewind(run: str, to: int, overrides: tuple[str, ...]) -> None:
    """Set aside what came after a policy of RUN (its folder or URI), and let the same command go on from there.

    The run must have ended. Policies, rounds, checkpoints and results are moved to set-aside/TIME in its folder. Given
    settings of training hold from there on.
    """
    from kto_ray.rewind import rewind
    from kto_ray.storage import Storage

    done = rewind(Storage(run), to, overrides)

    def listed(rounds: list[int]) -> str:
        return ", ".join(map(str, rounds)) or "none"

    _say(f"set aside in {run}/{done.folder}: everything after policy {to}, with the rounds {listed(done.rounds)}")
    _say(f"rounds that stay and are trained again: {listed(done.again)}")
    if not done.optimizer and to:
        _say(
            f"the optimizer's state after policy {to} is not kept (train.keep_checkpoints): its moments and the "
            "learning rate's schedule begin anew, from the published weights"
        )
    settings = f", with {' '.join(done.settings)}" if done.settings else ""
    _say(f"the same command goes on from policy {to}{settings}")


# -- kto-ray labelers -------------------------------------------------------------------------------------------------


@main.group("labelers")
def labelers() -> None:
    """People who judge the images of a run: their links, and whose answers count. The run may go on meanwhile."""


RUN = click.option("--run", required=True, help="The run's folder or URI.")


@contextlib.contextmanager
def _people(run: str, on_page: bool = False) -> Iterator[tuple["People", str]]:
    """Those of a run, and what their links begin with. `on_page`: it must be one in which people judge on a page."""
    from kto_ray.people.address import base_url, database_owner, database_url
    from kto_ray.people.clock import Clock
    from kto_ray.people.people import People
    from kto_ray.people.tables import open_database
    from kto_ray.relabel import saved_config
    from kto_ray.storage import Storage

    folder = Storage(run)
    config = saved_config(folder)
    human = config.label.people
    if human is None:
        raise UserError(
            f"run: no people judge {folder}: its label.labeler is {config.label.labeler!r}, not 'human' or 'feedback'"
        )
    if on_page and config.label.labeler == "feedback":
        raise UserError(f"run: {folder} has no page to judge on: its users vote in an application (docs/feedback.md)")
    engine = open_database(database_url(human, folder), database_owner(human, folder))
    try:
        yield People(engine, human, Clock()), base_url(human, folder)
    finally:
        engine.dispose()


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


@labelers.command("add")
@click.argument("name")
@RUN
@click.option(
    "--days", type=click.IntRange(1, 36500), help="For so long the link works; by default label.human.link_days."
)
def labelers_add(name: str, run: str, days: int | None) -> None:
    """Let NAME label, who need not be new, and print a personal link."""
    from kto_ray.people.access import Signer, link, secret_of

    with _people(run, on_page=True) as (people, base):
        badge = people.admit(name, days=days)
        _say(link(base, Signer(secret_of(people.engine)).token(badge)))


@labelers.command("list")
@RUN
def labelers_list(run: str) -> None:
    """Show who labels: how many links of theirs work, and how many answers they gave."""
    table = Table("name", "role", "working links", "answers", "excluded")
    with _people(run) as (people, _):
        for person in people.everybody():
            facts = (person.name, person.role, str(person.links), str(person.answers), person.excluded_why or "")
            table.add_row(*map(Text, facts))
    Console().print(table)


@labelers.command("revoke")
@click.argument("name")
@RUN
def labelers_revoke(name: str, run: str) -> None:
    """Make all links of NAME useless; the answers stay."""
    with _people(run) as (people, _):
        _say(f"{name}: links that no longer work: {people.revoke(name)}")


@labelers.command("exclude")
@click.argument("name")
@RUN
def labelers_exclude(name: str, run: str) -> None:
    """Ask NAME no more, and take the answers out of all rounds that are not sealed."""
    with _people(run) as (people, _):
        people.exclude(name, "by the operator")
        _say(f"{name} is asked no more; the answers have left all rounds that are not sealed")


@labelers.command("include")
@click.argument("name")
@RUN
def labelers_include(name: str, run: str) -> None:
    """Ask NAME again; answers that were taken out stay out."""
    with _people(run) as (people, _):
        people.include(name)
        _say(f"{name} is asked again")
