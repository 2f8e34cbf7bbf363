"""What a continued run may change: `require_same` guards its folder against another experiment's configuration."""

from typing import Any

from kto_ray.config.explaining import leads_to
from kto_ray.config.run import RunConfig
from kto_ray.errors import UserError

MAY_CHANGE_ON_RESUME = (
    *("rounds", "runs_folder", "evaluate.every", "evaluate.stop_at_pass_rate", "tracking", "cluster"),
    *("generate.resources", "generate.min_replicas", "generate.max_replicas"),
    *("generate.max_ongoing_requests", "generate.max_queued_requests"),
    *("label.scorers.*.resources", "label.scorers.*.min_actors", "label.scorers.*.max_actors"),
    *("label.scorers.*.max_retries", "label.scorers.*.timeout_s", "label.scorers.*.env"),
    *("label.max_failed_fraction", "label.deadline_s", "label.on_one_class", "label.min_verdicts", "label.watch"),
    *("label.human.labelers", "label.human.min_labels", "label.human.on_deadline", "label.human.lease_s"),
    *("label.human.host", "label.human.port", "label.human.public_url", "label.human.link_days"),
    *("label.human.requests_per_minute", "label.human.gold"),
    *("train.resources", "train.workers", "train.micro_batch", "train.max_failures", "train.keep_checkpoints"),
)
"""Fields in which a continued run may differ: how long, how watched, on what machines, and what to do in trouble.
Whatever else differs would make it another experiment."""


def require_same(config: RunConfig, saved: RunConfig) -> None:
    """Raises UserError when a run folder was begun with a configuration that differs where it must not."""
    differences = []

    def compare(new: Any, old: Any, *keys: str) -> None:
        if any(leads_to(keys, field) for field in MAY_CHANGE_ON_RESUME):
            return
        if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
            for key in new:
                compare(new[key], old[key], *keys, key)
        elif new != old:
            differences.append(f"  {'.'.join(keys)}: the run has {old!r}, this command says {new!r}")

    compare(config.model_dump(mode="json"), saved.model_dump(mode="json"))
    if differences:
        raise UserError(
            f"run {config.run!r} was begun with another configuration:\n" + "\n".join(differences) + "\n"
            "Give the same values to continue it, or another `run` name to begin a new one."
        )
