"""A run's folder that is written as a run writes it, image by image and round by round, for tests of the watch page.

Pictures are of the shapes world. Every other one shows what its prompt says, and as policies get older some more do.
Nothing is drawn by a model, and no Ray is started; what writes is the run's own code.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.config import RunConfig, to_yaml
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.summary import evaluation_row
from kto_ray.generate.drawn import failed_verdicts
from kto_ray.learning import NOT_FIGURES
from kto_ray.making import round_figures
from kto_ray.prompts import round_requests
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest, Score, Verdict
from kto_ray.rounds import Round, RoundStore
from kto_ray.shapes.world import Scene, all_scenes, draw_somewhere
from kto_ray.stopwatch import as_figures
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics
from tests.factories import ruined

RULE = "absolute@1(value=0.5, dead_band=0): shapes >= 0.5"


@cache
def picture(scene: Scene) -> npt.NDArray[np.uint8]:
    return draw_somewhere(scene, np.random.default_rng(0))


def policy(version: int) -> PolicyRef:
    return PolicyRef(version, f"{version:064x}")


def is_good(request: SampleRequest, version: int) -> bool:
    """Whether the policy shows what the prompt says."""
    return request.seed % 20 < 10 + version


class WatchedFolder:
    """A run's folder, and hands that write to it.

    Args:
        settings: of the configuration, beside two scorers, of which one is held out.
    """

    def __init__(self, folder: Path, rounds: int = 3, images: int = 24, **settings: Any) -> None:
        label = {"scorers": {"shapes": {}, "redness": {"held_out": True}}, **settings.pop("label", {})}
        tree = {"run": folder.name, "runs_folder": str(folder.parent), "rounds": rounds, "label": label}
        tree |= {"generate": {"images_per_round": images, "images_per_prompt": 2}, "tracking": {"tensorboard": False}}
        self.config = RunConfig.model_validate(tree | settings)
        self.storage = Storage(str(folder))
        self.storage.write("config.yaml", to_yaml(self.config).encode())
        self.prompts = [Prompt(scene.caption.replace(" ", "-"), scene.caption) for scene in all_scenes()]
        self.rounds, self.metrics = RoundStore(self.storage), Metrics(self.config, self.storage)
        self.evaluation = Evaluation(self.config, self.storage, self.prompts[:4])

    @property
    def uri(self) -> str:
        return self.storage.uri

    def requests(self, number: int) -> list[SampleRequest]:
        generate = self.config.generate
        stage, images = self.rounds.stage(number), generate.images_per_round
        return round_requests(self.prompts, self.config.seed, stage, number, images, generate.images_per_prompt)

    # -- one thing after the other ------------------------------------------------------------------------------------

    def draw(self, round_: Round, requests: Sequence[SampleRequest], version: int, broken: int = 0) -> list[Sample]:
        """The first `broken` of them are no images."""
        samples = []
        for place, request in enumerate(requests):
            scene = Scene.parse(request.prompt.text)
            others = all_scenes()
            shown = scene if is_good(request, version) else others[(others.index(scene) + 25) % len(others)]
            pixels_HWC = np.roll(picture(shown), request.seed % 7 - 3, axis=1)  # hardly two are the same
            latents_CHW = np.full((4, 8, 8), request.seed % 100, np.float32)
            parts = (request.id, request.stage, request.prompt, request.index, request.seed, policy(version))
            sample = Sample(*parts, latents_CHW=latents_CHW, pixels_HWC=pixels_HWC)
            samples.append(ruined(sample) if place < broken else sample)
        for start in range(0, len(samples), 64):
            round_.add_samples(samples[start : start + 64])
        round_.add_verdicts(failed_verdicts([sample for sample in samples if sample.error]))
        return samples

    def score(self, round_: Round, samples: Sequence[Sample], version: int, failing: int = 0) -> None:
        """The last `failing` of them get no score of `shapes`."""
        scores = []
        for place, sample in enumerate(samples):
            request = SampleRequest(sample.id, sample.stage, sample.prompt, sample.index, sample.seed)
            shapes = 0.6 + sample.seed % 37 / 100 if is_good(request, version) else sample.seed % 31 / 100
            redness = float(sample.pixels_HWC[..., 0].mean() - sample.pixels_HWC.mean()) / 255
            if place >= len(samples) - failing:
                scores.append(Score(sample.id, "shapes", "1", None, "RuntimeError: it ran out of memory"))
            else:
                scores.append(Score(sample.id, "shapes", "1", shapes))
            scores.append(Score(sample.id, "redness", "1", redness))
        round_.add_scores(scores)

    def judge(self, round_: Round) -> None:
        """By the scores that are there."""
        verdicts = []
        for score in round_.scores():
            if score.scorer == "shapes":
                label = "failed" if score.value is None else "desirable" if score.value >= 0.5 else "undesirable"
                verdicts.append(Verdict(score.sample_id, label, "threshold", RULE))  # type: ignore[arg-type]
        round_.add_verdicts(verdicts)

    def seal(self, number: int, round_: Round) -> None:
        figures = as_figures("generators", {"1": {"work": 5, "wait": 9}, "2": {"work": 3, "wait": 11}}, {})
        figures |= as_figures("scorers", {"shapes 1": {"work": 1, "wait": 27}}, {})
        seconds = {"seconds/generate": 8.0, "seconds/label": 1.0, "busy/generate": 7.0, "busy/label": 1.0}
        round_.seal(**round_figures(number, round_), **seconds, **figures, labeler={})

    def train(self, number: int, round_: Round) -> None:
        """Twice on each image that has a verdict."""
        draws = {v.sample_id: 2 for v in round_.verdicts() if v.label in ("desirable", "undesirable")}
        objective = {"loss": 0.5 - number / 100, "accuracy": 0.55, "saturated": 0.02, "margin": 0.6, "z": 0.002}
        objective |= {"g_desirable": 0.01 * number, "g_undesirable": 0.002 * number, "gradient_norm": 0.4}
        figures: dict[str, Any] = {f"objective/{name}": value for name, value in objective.items()}
        figures |= {"seconds/load": 0.5, "seconds/train": 15.0, "seconds/publish": 1.0}
        figures |= as_figures("train_workers", {"0": {"work": 15.0, "wait": 8.5, "load": 1.5}}, {})
        round_.record_training(draws, {"policy_version": number + 1, "figures": figures})
        facts = {k: v for k, v in round_.manifest.items() if k not in NOT_FIGURES}
        facts["seconds/seal"] = 0.5
        rate = self.evaluation.pass_rate(round_.prompt_ids(), round_.scores())
        self.metrics.log("round", number, facts | figures | {"pass_rate": rate, "seconds/round": 25.0})

    def evaluate(self, version: int) -> None:
        round_ = self.evaluation.round(version)
        self.score(round_, self.draw(round_, self.evaluation.requests, version), version)
        round_.seal(policy_version=version)
        self.metrics.log("evaluation", version, evaluation_row(self.evaluation.summary(version)))

    # -- all of it ----------------------------------------------------------------------------------------------------

    def make_round(self, number: int, broken: int = 0, failing: int = 0) -> Round:
        round_ = self.rounds.round(number)
        samples = self.draw(round_, self.requests(number), number, broken)
        self.score(round_, samples[broken:], number, failing)
        self.judge(round_)
        self.seal(number, round_)
        return round_

    def make(self) -> "WatchedFolder":
        """All rounds, with an evaluation after each; in the first, some failed."""
        self.evaluate(0)
        for number in range(self.config.rounds):
            self.train(number, self.make_round(number, broken=1 - min(number, 1), failing=2 * (number == 0)))
            self.evaluate(number + 1)
        return self

    def end(self) -> None:
        self.storage.write_json("summary.json", {"run": self.config.run, "rounds": self.config.rounds})
