"""What each setting is worth: the loop without Ray, run for several settings, held-out pass rate by round.

    python benchmarks/ablation.py                                   # all built-in settings
    python benchmarks/ablation.py recipe beta_x3 --rounds 4         # some of them
    python benchmarks/ablation.py recipe 'long:train.epochs=4,rounds=20' 'other_seed:seed=1'

A setting is `name:override,override` on top of the recipe, or the name of a built-in one. Settings run one after the
other, with equal seeds; `ablation.json` and `ablation.md` are rewritten after every evaluation, so that a run that is
cut short leaves what it has. One seed says little about small differences: the last column is a 95 % interval over the
held-out prompts of that one run.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measuring import Table, become_like_a_worker, machine, threads
from rich.console import Console

from kto_ray.bake_off.plain_loop import PlainEvaluation, PlainLoop, PlainRound
from kto_ray.config import RunConfig, load
from kto_ray.errors import UserError


@dataclass(frozen=True)
class Setting:
    """A named variation of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read `name:override,override`; the comma in `train.noise_range=[0.2, 1]` separates nothing."""
        name, _, overrides = text.partition(":")
        return cls(name, tuple(re.split(r",(?=[\w.]+=)", overrides)) if overrides else ())


@dataclass
class Outcome:
    """What a setting came to, so far. `ended` says why it did not run all of its rounds."""

    setting: Setting
    evaluations: list[PlainEvaluation] = field(default_factory=list)
    rounds: list[PlainRound] = field(default_factory=list)
    ended: str | None = None
    seconds: float = 0.0


PAPERS = "train.objective={kind: diffusion_kto, beta: 75}"
OPTIONS = [
    Setting("paper", (PAPERS,)),
    Setting("round", (PAPERS, "train.objective.reference=round")),
    Setting("noise_mean", (PAPERS, "train.objective.reference_point=noise_mean")),
    *(
        Setting(name, overrides)
        for name, overrides in {
            "unmirrored": ("train.objective.mirror=false",),
            "scale": ("train.objective.scale_by_noise=true",),
            "margin": ("train.objective.target_margin=1",),
            "linear": ("train.objective.utility=linear", "train.objective.safeguard=true"),
            "stratified": ("train.noise_draw=stratified",),
            "own_noise": ("train.own_noise=0.5",),
            "average": ("train.sampling_policy={kind: ema, decay: 0.9}",),
            "ema": ("train.objective.reference=ema",),
        }.items()
    ),
    Setting("sft", ("train.objective=sft",)),
    Setting("nft", ("train.objective=nft",)),
]
"""The paper's objective in place of the recipe's, each of the two things that tell them apart alone, then each further
option on top of the recipe, and other objectives."""


def built_in(recipe: RunConfig) -> list[Setting]:
    """The neighbourhood of a recipe, and `OPTIONS`."""
    rate, beta = recipe.train.learning_rate, recipe.train.objective.beta
    full_rate = load("shapes_full").train.learning_rate  # all weights take far smaller steps than adapters
    return [
        Setting("recipe"),
        Setting("rate_x0.3", (f"train.learning_rate={0.3 * rate:g}",)),
        Setting("rate_x3", (f"train.learning_rate={3 * rate:g}",)),
        Setting("beta_x0.3", (f"train.objective.beta={0.3 * beta:g}",)),
        Setting("beta_x3", (f"train.objective.beta={3 * beta:g}",)),
        Setting("gamma_0.5", ("train.gamma=0.5",)),
        Setting("full", ("train.adapter.kind=full", f"train.learning_rate={full_rate:g}")),
        Setting("guidance_1", ("generate.guidance_scale=1",)),
        *OPTIONS,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="name[:override,override]", help="default: all built-in ones")
    parser.add_argument("--recipe", default="shapes_demo")
    parser.add_argument("--rounds", type=int, help="default: the recipe's")
    parser.add_argument("--every", type=int, default=1, help="rounds between evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of ablation.json, ablation.md")
    args = parser.parse_args()
    common = [f"rounds={args.rounds}"] if args.rounds else []

    known = {setting.name: setting for setting in built_in(load(args.recipe))}
    settings = [known.get(text) or Setting.parse(text) for text in args.settings] or list(known.values())
    if unknown := [setting.name for setting in settings if not setting.overrides and setting.name not in known]:
        parser.error(f"{unknown[0]!r} is no built-in setting ({', '.join(known)}) and has no overrides")
    configs = [load(args.recipe, [*common, *setting.overrides]) for setting in settings]  # all checked before any runs

    become_like_a_worker()
    console = Console(soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for setting, config in zip(settings, configs, strict=True):
        outcomes.append(Outcome(setting))
        run(config, args.every, outcomes, args.out, console)
    console.print(as_table(outcomes).rich())
    console.print(f"wrote {args.out}/ablation.json and {args.out}/ablation.md", highlight=False)


def run(config: RunConfig, every: int, outcomes: Sequence[Outcome], folder: Path, console: Console) -> None:
    """Run the last of the outcomes to its end, saving all of them as it goes."""
    outcome = outcomes[-1]
    began = time.monotonic()

    def evaluate(version: int) -> None:
        evaluation = loop.evaluate(version)
        outcome.evaluations.append(evaluation)
        outcome.seconds = time.monotonic() - began
        console.print(f"{outcome.setting.name}, policy {version}: {evaluation.pass_rate.value:.1%} of held-out pass")
        save(outcomes, folder)

    loop = PlainLoop(config, threads())
    evaluate(0)
    for index in range(config.rounds):
        try:
            round_ = loop.run_round(index)
        except UserError as error:
            outcome.ended = str(error)
            console.print(f"{outcome.setting.name} ended: {error}", markup=False)
            save(outcomes, folder)
            return
        outcome.rounds.append(round_)
        figures = round_.figures
        health = "".join(
            f", {what} {figures[name]:.2f}"
            for name, what in {"margin": "|beta (g - z)|", "saturated": "saturated", "accuracy": "accuracy"}.items()
            if name in figures
        )
        console.print(
            f"{outcome.setting.name}, round {index}: {round_.pass_rate:.1%} pass, drawn in {round_.generate_s:.0f} s, "
            f"trained in {round_.train_s:.0f} s{health}"
        )
        if (index + 1) % every == 0 or index + 1 == config.rounds:
            evaluate(index + 1)


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """Held-out pass rate of every setting at every policy version that any of them was evaluated at."""
    versions = sorted({evaluation.policy_version for outcome in outcomes for evaluation in outcome.evaluations})

    def row(outcome: Outcome) -> list[str]:
        rates = {evaluation.policy_version: evaluation.pass_rate for evaluation in outcome.evaluations}
        last = outcome.evaluations[-1].pass_rate if outcome.evaluations else None
        return [
            outcome.setting.name,
            *(f"{rates[version].value:.1%}" if version in rates else "-" for version in versions),
            f"{last.low:.1%} - {last.high:.1%}" if last else "-",
        ]

    ended = [f"{outcome.setting.name} ended: {outcome.ended}." for outcome in outcomes if outcome.ended]
    return Table(
        title="Held-out images that pass",
        columns=("setting", *("base" if not version else f"{version}" for version in versions), "last, 95 %"),
        rows=[row(outcome) for outcome in outcomes],
        note=" ".join([f"By rounds trained. {machine()}.", *ended]),
    )


def save(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Rewrite `ablation.json` and `ablation.md`."""
    overrides = "".join(
        f"- {outcome.setting.name}: {', '.join(f'`{each}`' for each in outcome.setting.overrides) or 'as it is'}\n"
        for outcome in outcomes
    )
    (folder / "ablation.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    (folder / "ablation.md").write_text(f"{as_table(outcomes).markdown()}\n{overrides}")


if __name__ == "__main__":
    main()
