"""The CSV of the Diffusion-KTO authors' training script, in both spellings that it has.

    file_name,caption,split                 what its code reads
    images/7.jpg,a cat,exclusive_win

    file_path,caption,label                 what its README says
    images/7.jpg,a cat,exclusive_win

`exclusive_win`: the image won each of its comparisons; `exclusive_lose`: none; `intersections`: some, which count as
desirable in the paper's best setting (its ablation: win + intermediate beats win only). Plain yes and no (1 and 0, true
and false) are read, too.

Source: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", NeurIPS 2024, arXiv 2404.04465.
"""

from functools import cached_property

from kto_ray.config.data import PaperData, TableData
from kto_ray.data.columns import FoundColumns
from kto_ray.data.protocol import Preview
from kto_ray.data.table import TablePlan, TableSource
from kto_ray.errors import UserError

SPELLINGS = (("file_name", "caption", "split"), ("file_path", "caption", "label"))
WIN, BOTH, LOSE = "exclusive_win", "intersections", "exclusive_lose"


class PaperSource(TableSource):
    """See the module."""

    def __init__(self, settings: PaperData) -> None:
        wins = (WIN, "1", "true")
        table = TableData(
            path=settings.path,
            images=settings.images,
            desirable=(*wins, BOTH) if settings.choice == "win_and_intersections" else wins,
            undesirable=(LOSE, "0", "false"),
        )
        super().__init__(table, kind="paper")

    @cached_property
    def plan(self) -> TablePlan:
        there = self.rows.schema()
        for image, prompt, verdict in SPELLINGS:
            if {image, prompt, verdict} <= set(there.names):
                return TablePlan(
                    there, FoundColumns({"image": image, "prompt": prompt, "verdict": verdict}), None, None, ()
                )
        raise UserError(
            f"{self.field}: {self.rows.where} has neither the columns {', '.join(SPELLINGS[0])} nor "
            f"{', '.join(SPELLINGS[1])}, but {', '.join(there.names)}"
        )

    def preview(self) -> Preview:
        preview = super().preview()
        if preview.rows and preview.verdicts and not preview.verdicts["desirable"] + preview.verdicts["undesirable"]:
            raise UserError(
                f"{self.field}: {self.rows.where}: column {self.plan.columns['verdict']!r} has none of the values "
                f"{WIN}, {BOTH}, {LOSE}; read it as kind: table, with desirable and undesirable"
            )
        return preview
