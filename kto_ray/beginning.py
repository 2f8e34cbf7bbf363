"""A recipe to begin with: what model, who judges, which hardware -> a YAML file with a comment on each section.

`kto-ray init` asks and writes it. The numbers are those of the built-in recipe of the nearest model; what a person
decides (model, judge, prompts, cards) takes its place in it.
"""

from dataclasses import dataclass
from importlib import resources
from typing import Any

from kto_ray.config import from_tree, yaml12
from kto_ray.config.run import require_name
from kto_ray.errors import UserError

NEAREST = {
    "shapes": "shapes_demo",
    "flux": "flux1_dev_lora",
    "qwen": "qwen_image_lora",
    "z-image": "zimage_lora",
    "zimage": "zimage_lora",
    "diffusion-3": "sd35_medium_lora",
    "sd3": "sd35_medium_lora",
    "xl": "sdxl_lora",
}
"""A part of a model's name, and the recipe whose numbers it begins with; others are taken for Stable Diffusion 1.5."""
OTHERWISE = "sd15_lora"
JUDGES = {
    "shapes": "the embedded world's own rules: whether the picture is what its prompt says",
    "people": "you, and whom you invite, on a page",
    "pickscore": "PickScore, a model of what people prefer",
    "image_reward": "ImageReward, another such model, in an environment of its own",
    "hpsv2": "HPS v2, another such model, in an environment of its own",
    "aesthetic": "the LAION aesthetic predictor",
    "clip_score": "CLIPScore: whether the picture fits its prompt",
    "jpeg_size": "how well the picture compresses: a toy, that needs no model",
}
OWN_ENVIRONMENT = ("image_reward", "hpsv2")
NEEDS_NO_CARD = ("shapes", "jpeg_size", "people")
HALF = {"kind": "round_quantile", "quantile": 0.5}

COMMENTS = {
    "run": "The folder of the run in runs_folder. The same name continues the run, whatever ended it.",
    "runs_folder": "A local path, or s3://bucket/runs.",
    "rounds": "Images are drawn, judged and trained on so many times.",
    "model": "A diffusers folder, a single .safetensors file, or a name on the model hub.",
    "prompts": "Text with a prompt a line, or CSV, TSV, JSON lines; held_out must have none of train's.",
    "generate": "How images are drawn: replicas of Ray Serve. batch_size is what a card has room for.",
    "label": "Who says yes and no. Several scorers may vote; with held_out: true one only watches.",
    "train": "How verdicts are trained on; docs/objectives.md explains the objective.",
    "evaluate": "Held-out prompts with fixed seeds, every so many rounds: policy against base.",
    "cluster": "With gpu_gb, a model that does not fit is refused before it is downloaded.",
}


@dataclass(frozen=True)
class Answers:
    """What `kto-ray init` was told.

    Args:
        judge: one of `JUDGES`, or a scorer of one's own, "my_module:Name".
        gpus: in the whole cluster; 0: none.
        gpu_gb: memory of each in GB; None: unknown.
        prompts: files for training and held out; None: the embedded world's, or such that are still to be named.
    """

    model: str
    judge: str
    gpus: int
    gpu_gb: float | None = None
    run: str = "mine"
    prompts: tuple[str, str] | None = None


def recipe_for(model: str) -> str:
    """The built-in recipe whose numbers a model begins with."""
    name = model.lower()
    return next((recipe for part, recipe in NEAREST.items() if part in name), OTHERWISE)


def write_recipe(answers: Answers) -> str:
    """The YAML text; it can be read again and is a whole configuration.

    Raises:
        UserError: an answer that does not go with the others.
    """
    _check(answers)
    near = recipe_for(answers.model)
    tree: dict[str, Any] = yaml12.load((resources.files("kto_ray.recipes") / f"{near}.yaml").read_text("utf-8"))
    own = tree["model"]["name"] if isinstance(tree["model"], dict) else tree["model"]
    tree |= {"run": answers.run, "runs_folder": "runs"} | ({} if answers.model == own else {"model": answers.model})
    if answers.prompts:
        tree["prompts"] = dict(zip(("train", "held_out"), answers.prompts, strict=True))
    _judged(tree, answers)
    _placed(tree, answers)
    from_tree(tree)  # nothing is written that cannot be read
    return _commented(tree, near)


def _check(answers: Answers) -> None:
    require_name(answers.run)
    shapes, own = answers.model == "shapes", ":" in answers.judge
    if answers.judge not in JUDGES and not own:
        raise UserError(f"--judge: {answers.judge!r} is none of {', '.join(JUDGES)}; one's own is my_module:MyScorer")
    if answers.judge == "shapes" and not shapes:
        raise UserError("--judge: shapes judges the images of the model shapes alone")
    if not shapes and not answers.gpus:
        raise UserError("--gpus: 0 is enough for the model shapes alone; every other one needs at least 1")
    if not answers.gpus and answers.judge not in NEEDS_NO_CARD and not own:
        raise UserError(f"--judge: {answers.judge} needs a GPU (--gpus); without one: {', '.join(NEEDS_NO_CARD)}")
    if not shapes and answers.prompts is None:
        raise UserError("--prompts: a file of prompts to train on, and --held-out, one of others, are needed")


def _judged(tree: dict[str, Any], answers: Answers) -> None:
    small = {"resources": {"num_cpus": 0.2, "threads": 1}, "max_actors": 1}
    on_card = {"max_actors": 1, "resources": {"num_cpus": 1, "num_gpus": 0.25}}
    watching: dict[str, Any] = {"clip_score": {"held_out": True, "resources": {"num_cpus": 1}}}
    if answers.model == "shapes":
        watching = {"shapes": {"held_out": True, **small}}
    if answers.judge == "shapes":
        tree["label"] = {"scorers": {"shapes": small}, "threshold": 0.5}
    elif answers.judge == "people":
        tree["label"] = {"labeler": "human", "scorers": watching, "on_one_class": "skip"}
        tree["generate"]["images_per_round"] = 60
        tree["max_policy_lag"] = 2
        if answers.model == "shapes":  # a few dozen verdicts a round
            tree["generate"]["batch_size"] = 10
            tree["train"] |= {"global_batch": 30, "micro_batch": 30}
    else:
        name = answers.judge.rpartition(":")[2].lower() if ":" in answers.judge else answers.judge
        settings: dict[str, Any] = {"scorer": answers.judge} if ":" in answers.judge else {}
        settings |= {"env": answers.judge} if answers.judge in OWN_ENVIRONMENT else {}
        settings |= on_card if answers.gpus and answers.judge not in NEEDS_NO_CARD else small
        watching.pop(name, None)
        tree["label"] = {"scorers": {name: settings, **watching}, "threshold": HALF}


def _placed(tree: dict[str, Any], answers: Answers) -> None:
    """Who gets which part of the cards."""
    if answers.gpu_gb is not None:
        tree["cluster"] = {"gpu_gb": answers.gpu_gb}
    if not answers.gpus or answers.model == "shapes":
        return
    voter = 0.25 if any("num_gpus" in s.get("resources", {}) for s in tree["label"]["scorers"].values()) else 0
    if answers.gpus == 1:  # all of them share it
        parts, workers, replicas = (0.5, 0.5 - voter), 1, 1
    else:
        workers = max(1, answers.gpus // 2)
        parts, replicas = (1, 1 - voter), answers.gpus - workers
    tree["train"] |= {"workers": workers}
    tree["train"]["resources"] = {"num_cpus": 2, "num_gpus": parts[0]}
    tree["generate"] |= {"min_replicas": 1, "max_replicas": replicas}
    tree["generate"]["resources"] = {"num_cpus": 1, "num_gpus": parts[1]}


def _commented(tree: dict[str, Any], near: str) -> str:
    order = [*(name for name in COMMENTS if name in tree), *(name for name in tree if name not in COMMENTS)]
    lines = [f"# Made by kto-ray init; the numbers are those of the built-in recipe {near}. Check it with:"]
    lines += ["#     kto-ray run --recipe THIS_FILE --dry-run"]
    for name in order:
        if name in COMMENTS:
            lines += ["", f"# {COMMENTS[name]}"]
        lines += yaml12.dump({name: tree[name]}).rstrip().splitlines()
    return "\n".join(lines) + "\n"
