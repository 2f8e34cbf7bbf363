"""Which charts a report has, section by section: titles, notes, columns and colours. `charts.py` draws them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

INK, MUTED, GRID = "#24292f", "#68707a", "#e2e5e9"
GREEN, ORANGE, BLUE, PURPLE = "#1b7f62", "#d0731f", "#1f6fb2", "#7a52b3"
RED, GRAY, PALE = "#b42318", "#98a1ab", "#ccd3da"


@dataclass(frozen=True)
class Plot:
    """A chart of some columns of `rounds`, each (key, label, colour); `note` says how to read it.

    `held_out` names the interval of the evaluations to lay over them; the y axis runs from 0 to `at_least` or higher.
    """

    title: str
    note: str
    columns: tuple[tuple[str, str, str], ...]
    x: Literal["round", "policy_version"] = "round"
    stacked: bool = False
    share: bool = False
    held_out: Literal["pass_rate", "mean_score"] | None = None
    at_least: float | None = None
    inches: tuple[float, float] = (4.0, 2.4)


SMALL = (3.2, 2.1)
PLOTS: dict[str, tuple[Plot, ...]] = {
    "progress": (
        Plot(
            "Share that passes",
            "By the policy that drew the images; the band is the 95 % interval.",
            (("pass_rate", "trained prompts", ORANGE),),
            x="policy_version",
            share=True,
            held_out="pass_rate",
        ),
        Plot(
            "Mean score",
            "The same images, before the threshold.",
            (("score_mean", "trained prompts", ORANGE),),
            x="policy_version",
            held_out="mean_score",
        ),
    ),
    "feedback": (
        Plot(
            "Verdicts",
            "The images of each round, by what became of them.",
            (
                ("desirable", "desirable", GREEN),
                ("undesirable", "undesirable", ORANGE),
                ("abstained", "abstained", GRAY),
                ("failed", "failed", RED),
                ("pending", "pending", PALE),
            ),
            stacked=True,
        ),
        Plot(
            "Policy lag",
            "Version trained minus version that drew the images, mean; 0 is strictly on-policy.",
            (("policy_lag_mean", "policy lag", BLUE),),
            at_least=1,
        ),
    ),
    "people": (
        Plot(
            "Verdicts of people",
            "Images judged in each round; late ones were drawn for an earlier one.",
            (("people/judged", "judged", BLUE), ("people/late", "of these late", ORANGE)),
            inches=SMALL,
        ),
        Plot(
            "Agreement",
            "Of people on the same images: share, and Krippendorff's alpha, which is 0 for what chance gives.",
            (("people/agreement", "agree", GREEN), ("people/alpha", "alpha", PURPLE)),
            inches=SMALL,
        ),
        Plot("Seconds an answer", "Median.", (("people/seconds", "seconds", BLUE),), inches=SMALL),
    ),
    "objective": (
        Plot(
            "Implicit reward g",
            "Above 0, the policy explains an image better than the reference does. Both classes far below 0: collapse.",
            (
                ("objective/g_desirable", "desirable", GREEN),
                ("objective/g_undesirable", "undesirable", ORANGE),
                ("objective/z", "z", MUTED),
            ),
            inches=SMALL,
        ),
        Plot(
            "g by noise level",
            "By quarters of the noise range.",
            (
                ("objective/g_noise_0", "cleanest", BLUE),
                ("objective/g_noise_1", "2", GREEN),
                ("objective/g_noise_2", "3", ORANGE),
                ("objective/g_noise_3", "noisiest", RED),
            ),
            inches=SMALL,
        ),
        Plot(
            "What sets the classes apart, by noise level",
            "g of desirable minus g of undesirable images, by quarters of the noise range.",
            tuple(
                (f"objective/gap_noise_{part}", label, color)
                for part, (label, color) in enumerate(
                    (("cleanest", BLUE), ("2", GREEN), ("3", ORANGE), ("noisiest", RED))
                )
            ),
            inches=SMALL,
        ),
        Plot(
            "Agreement and saturation",
            "Samples whose g - z has the sign of their verdict; samples with |β (g - z)| > 4, which are mute.",
            (("objective/accuracy", "agree", GREEN), ("objective/saturated", "saturated", RED)),
            share=True,
            inches=SMALL,
        ),
        Plot("Margin", "Mean |β (g - z)|; 0.5 to 2 is healthy.", (("objective/margin", "margin", BLUE),), inches=SMALL),
        Plot("Loss", "Mean over the samples.", (("objective/loss", "loss", BLUE),), inches=SMALL),
        Plot("Gradient norm", "Mean over the steps.", (("objective/gradient_norm", "norm", BLUE),), inches=SMALL),
    ),
    "seconds": (
        Plot(
            "Seconds of each round",
            "Idle is what the roles leave of the round's wall clock; roles that overlap reach beyond it.",
            (
                ("seconds/generate", "generate", BLUE),
                ("seconds/label", "label", ORANGE),
                ("seconds/seal", "seal", RED),
                ("seconds/train", "train", GREEN),
                ("seconds/publish", "publish", PURPLE),
                ("seconds/evaluate", "evaluate", GRAY),
                ("seconds/idle", "idle", PALE),
            ),
            stacked=True,
        ),
    ),
}


def opinion_plots(scorers: Mapping[str, bool]) -> tuple[Plot, ...]:
    """Second opinions: every scorer on one scale (name -> held out), and figures of the pictures themselves."""
    colors = (ORANGE, BLUE, GREEN, PURPLE, RED, INK)
    voting_first = sorted(scorers, key=lambda name: scorers[name])
    return (
        Plot(
            "Proxy and held-out scores",
            "Mean score of each round, as change since the first in its standard deviations. "
            "Up for those that vote and down for those held out: reward hacking.",
            tuple(
                (f"opinion/{name}", f"{name} (held out)" if scorers[name] else name, color)
                for name, color in zip(voting_first, itertools.cycle(colors), strict=False)
            ),
            inches=(4.0, 2.8),
        ),
        Plot(
            "Diversity",
            "Mean distance between any two images of a round, as 8x8 thumbnails; it falls when all look alike.",
            (("pictures/diversity", "diversity", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Brightness and saturation",
            "Means over the pixels.",
            (("pictures/brightness", "brightness", ORANGE), ("pictures/saturation", "saturation", BLUE)),
            share=True,
            inches=SMALL,
        ),
        Plot(
            "Edges",
            "Share of pixels on an edge.",
            (("pictures/edge_density", "edge density", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Colour entropy",
            "Bits, of the colours of an image.",
            (("pictures/color_entropy", "colour entropy", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Flipped verdicts",
            "Share that the last round's threshold would have judged otherwise.",
            (("flip_rate", "flipped", BLUE),),
            share=True,
            inches=SMALL,
        ),
    )
