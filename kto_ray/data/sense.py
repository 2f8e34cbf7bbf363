"""Whether labelled images are what an objective can learn from; asked before machine time is spent."""

from kto_ray.data.protocol import Preview
from kto_ray.errors import UserError
from kto_ray.objectives import AnyObjective


def require_classes(preview: Preview, objective: AnyObjective, to_be_scored: bool = False) -> None:
    """Raises UserError when there are no images, or not the verdicts that the objective needs; says what it needs.

    Args:
        to_be_scored: images without a verdict will get one.
    """
    wrong = "; ".join(f"{number:,} {what}" for what, number in preview.wrong.items())
    found = f"{preview.where} ({preview.kind})"
    if preview.rows == 0:
        raise UserError(f"data: {found} gives no labelled image{f': {wrong}' if wrong else ''}")
    if preview.verdicts is None or (to_be_scored and preview.verdicts["none"]):
        return
    counts = preview.verdicts
    needed = ("desirable", "undesirable") if objective.needs.undesirable else ("desirable",)
    if missing := [name for name in needed if not counts[name]]:
        raise UserError(
            f"data: {found} has {counts['desirable']:,} desirable and {counts['undesirable']:,} undesirable images, "
            f"and {counts['none']:,} without verdict; {objective.kind} needs {' and '.join(needed)} ones: there is no "
            f"{missing[0]} one" + (". sft learns from desirable ones alone" if missing == ["undesirable"] else "")
        )
