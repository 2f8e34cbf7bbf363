"""The model card: what an exported policy is, how good the run found it, and how to load it.

`exporting.py` writes it as README.md, with front matter as model hubs read it. What the run does not know is left out.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import kto_ray
from kto_ray.config import yaml12
from kto_ray.evaluate.charts import number, numbers, percent, percents
from kto_ray.evaluate.statistics import Interval
from kto_ray.export.evaluated import Evaluated
from kto_ray.export.published import Published
from kto_ray.records import Prompt

PICTURE = "base_and_policy.png"
SHOWN_PROMPTS = 8
OBJECTIVES = {
    "diffusion_kto": "Diffusion-KTO",
    "dpo": "Diffusion-DPO",
    "nft": "DiffusionNFT",
    "sft": "fine-tuning on desirable images",
    "csft": "conditional fine-tuning",
}


@dataclass(frozen=True)
class Card:
    """What stands in it."""

    title: str
    published: Published
    is_whole: bool
    """Whether the base model is in it."""
    loading: Sequence[str]
    evaluated: Evaluated | None
    prompts: Sequence[Prompt]
    """Held out."""

    def text(self) -> str:
        """The card as Markdown."""
        front = f"---\n{yaml12.dump(self._front_matter())}---"
        parts = [front, f"# {self.title}", self._what(), *self._figures(), *self._pictures(), *self._prompts()]
        parts += ["## How to load it", "```python\n" + "\n".join(self._code()) + "\n```"]
        parts += ["## How it was made", self._method(), "## Digests", self._digests()]
        return "\n\n".join([*parts, "## Licence", "The base model's licence holds."]) + "\n"

    def _front_matter(self) -> dict[str, object]:
        published = self.published
        lora = published.is_lora and not self.is_whole
        base = {} if published.hub_name is None else {"base_model": published.hub_name}
        relation = {"base_model_relation": "adapter" if lora else "finetune"} if base else {}
        method = published.config.train.objective.kind.replace("_", "-")
        return {
            **base,
            **relation,
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": [*(["lora"] if lora else []), "text-to-image", method, "kto-ray"],
        }

    def _what(self) -> str:
        published, adapter = self.published, self.published.config.train.adapter
        base = published.hub_name or published.config.model.name
        revision = f" (revision {published.model.revision})" if published.model.revision else ""
        how = f"LoRA of rank {adapter.rank} and alpha {published.alpha:g}" if published.is_lora else "full fine-tuning"
        kind = "Base model and policy in one pipeline" if self.is_whole else "A policy, to be put on its base model"
        return (
            f"{kind}. Base model: `{base}`{revision}, a pipeline of the class {published.pipeline}{self._adapters()}. "
            f"Trained: its {published.part}, by {how}."
        )

    def _adapters(self) -> str:
        adapters = [f"`{adapter.name}` (x {adapter.scale:g})" for adapter in self.published.model.adapters]
        return f", with {' and '.join(adapters)} in its weights" if adapters else ""

    def _figures(self) -> Iterator[str]:
        if self.evaluated is None:
            return
        base, policy = self.evaluated.base, self.evaluated.policy
        rows = [
            ["images that pass", _share(base.pass_rate), _share(policy.pass_rate)],
            ["mean score", _mean(base.mean_score), _mean(policy.mean_score)],
            *([f"score, {name}", _mean(base.scores.get(name)), _mean(policy.scores[name])] for name in policy.scores),
            ["prompts won against the base", "", _share(policy.win_rate)],
        ]
        known = [row for row in rows if any(row[1:])]
        if not known:
            return
        yield "## Figures"
        header = [["", "base", f"policy {policy.policy_version}"], ["---"] * 3]
        yield "\n".join(f"| {' | '.join(row)} |" for row in [*header, *known])
        yield (
            f"The run's own evaluation on held-out prompts, with the same seeds for both: {base.images} and "
            f"{policy.images} images, {base.failed} and {policy.failed} of them failed. In parentheses 95 % intervals "
            "over prompts."
        )

    def _pictures(self) -> Iterator[str]:
        if self.evaluated and self.evaluated.pairs:
            yield f"![The same held-out prompts and seeds: base and policy]({PICTURE})"

    def _prompts(self) -> Iterator[str]:
        if self.prompts:
            yield "## Held-out prompts"
            yield f"{min(SHOWN_PROMPTS, len(self.prompts))} of {len(self.prompts)} that the run evaluates with:"
            yield "\n".join("    " + " ".join(prompt.text.split()) for prompt in self.prompts[:SHOWN_PROMPTS])

    def _code(self) -> list[str]:
        names = [name for name in ("AutoModel", "DiffusionPipeline") if any(name in line for line in self.loading)]
        return [f"from diffusers import {', '.join(names)}", *self.loading]

    def _method(self) -> str:
        config = self.published.config
        kind = config.train.objective.kind
        judges = ", ".join(f"`{name}`" for name in config.label.voting) if config.label.labeler == "threshold" else ""
        if config.data is None or not config.offline:
            how, share = "online", f"one a round, of {config.generate.images_per_round} images"
            verdicts = f"labeler `{config.label.labeler}`" + (f", from the scores of {judges}" if judges else "")
        else:
            steps, batch = config.data.stream.steps, config.train.global_batch
            how, share = "offline", f"one every {steps} optimizer steps of {batch} labelled images"
            verdicts = "those that the images came with"
        if config.data is not None and config.data.mix is not None:
            share += f", with labelled images for {config.data.mix.share:.0%} of each optimizer step"
        lines = [
            f"{how} {OBJECTIVES.get(kind, kind)} (`{kind}`), by kto-ray; exported by version {kto_ray.__version__}",
            f"run `{config.run}`, policy {self.published.policy.version}: {share}",
            f"verdicts: {verdicts}",
            f"learning rate {config.train.learning_rate:g}",
        ]
        return "\n".join(f"- {line}" for line in lines)

    def _digests(self) -> str:
        published = self.published
        rows = {
            f"policy {published.policy.version}, as it was published": published.policy.digest,
            f"base model's {published.part}": published.base_digest,
            "the run's config.yaml": hashlib.sha256(published.run.read("config.yaml")).hexdigest(),
        }
        return "\n".join(f"- {what}: `sha256:{digest}`" for what, digest in rows.items())


def _share(interval: Interval | None) -> str:
    """Of images or prompts, with its bounds; "": it is not known."""
    return f"{percent(interval.value)} ({percents(interval)})" if _known(interval) else ""


def _mean(interval: Interval | None) -> str:
    return f"{number(interval.value)} ({numbers(interval)})" if _known(interval) else ""


def _known(interval: Interval | None) -> TypeGuard[Interval]:
    return interval is not None and not math.isnan(interval.value)
