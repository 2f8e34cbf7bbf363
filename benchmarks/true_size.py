"""A round at true size: what each role really holds, beside what the dry run said.

    python benchmarks/true_size.py [--quick]

Models of the published configurations with random weights, in bfloat16, which need no download: Stable Diffusion 1.5
and SDXL, with adapters. One whole round by the job itself, of small images, so that it ends on a CPU: 4 images of 128
pixels, 2 optimizer steps. Measured is the resident memory of the replica's and the train worker's process at its
peak, less that of the same processes in the same round of the embedded world, whose model is small; on a GPU it would
be the card's. Then the KTO step at true width against its bound and a step as the released script takes it
(`kto_step.py`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import psutil
import torch
import transformers
from kto_step import ReleasedLike, bound, make_round
from measuring import Table, arguments, interleaved, machine, median_and_range, ratios
from rich.console import Console
from torch import nn

from kto_ray.config import load
from kto_ray.diffusion.memory import GIB, needs_of
from kto_ray.shapes import MODEL_FOLDER
from kto_ray.train.worker import build_learner

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MODELS = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
ROLES = {"replica": "ray::ServeReplica", "train worker": "ray::RayTrainWorker"}
"""How Ray names their processes."""
SIDE = 128
"""Of pictures, in pixels."""
ROUND = [
    "rounds=1",
    "generate.images_per_round=4",
    "generate.batch_size=2",
    "generate.steps=2",
    f"generate.height={SIDE}",
    f"generate.width={SIDE}",
    "generate.guidance_scale=5",
    "generate.dtype=bfloat16",
    "label.scorers=redness",
    "label.threshold={kind: round_quantile, quantile: 0.5}",
    "train.dtype=bfloat16",
    "train.gradient_checkpointing=true",
    "train.global_batch=2",
    "train.micro_batch=1",
    "train.epochs=1",
    "train.objective.noise_parts=1",
    "evaluate.max_prompts=1",
    "evaluate.images_per_prompt=1",
    "tracking.tensorboard=false",
]
SMALL = ["generate.height=64", "generate.width=64"]
"""Of the embedded world, whose images are as large as that."""
STEPS, STEP_BATCH = 2, 4
STEP = [
    f"train.global_batch={STEP_BATCH}",
    f"train.micro_batch={STEP_BATCH}",
    f"generate.images_per_round={STEPS * STEP_BATCH}",
    f"generate.height={SIDE}",
    f"generate.width={SIDE}",
    "train.epochs=1",
    "train.objective.noise_parts=2",
    "train.learning_rate=1e-6",
]


def filled(module: nn.Module) -> nn.Module:
    """A module of the meta device with random weights, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02, generator=generator)
        elif name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    return module


def write_model(folder: Path, name: str) -> Path:
    """A pipeline folder of a published configuration; the tokenizer is the embedded world's, at CLIP's length."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", model_max_length=77)
    clip, clip_g = transformers.CLIPTextConfig(**CLIP_L), transformers.CLIPTextConfig(**CLIP_G)
    for config in (clip, clip_g):
        config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler.from_config(SCHEDULE),
    }
    with torch.device("meta"):
        vae, text = diffusers.AutoencoderKL(**VAE), transformers.CLIPTextModel(clip)
        unet = diffusers.UNet2DConditionModel(**(SD15_UNET if name == "sd15" else SDXL_UNET))
        second = transformers.CLIPTextModelWithProjection(clip_g) if name == "sdxl" else None
    common |= {"vae": filled(vae), "text_encoder": filled(text), "unet": filled(unet)}
    if second is None:
        pipeline = diffusers.StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        pipeline = diffusers.StableDiffusionXLPipeline(
            **common, text_encoder_2=filled(second), tokenizer_2=tokenizer, force_zeros_for_empty_prompt=True
        )
    pipeline.save_pretrained(folder)
    return folder


def resident(process: psutil.Process) -> int:
    """Bytes of a process in memory, also of the files that its weights are mapped from."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def measured(arguments: list[str]) -> dict[str, int]:
    """Peak of each role's process during a run of the job."""
    job = Path(__file__).parent.parent / "jobs" / "online_kto.py"
    peaks, done = dict.fromkeys(ROLES, 0), threading.Event()

    def watch(root: psutil.Process) -> None:
        while not done.wait(0.2):
            for child in root.children(recursive=True):
                try:
                    title = " ".join(child.cmdline())
                except psutil.Error:
                    continue
                for role, name in ROLES.items():
                    if title.startswith(name):
                        peaks[role] = max(peaks[role], resident(child))

    with subprocess.Popen([sys.executable, str(job), *arguments]) as process:
        watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid),))
        watcher.start()
        process.wait()
        done.set()
        watcher.join()
    if process.returncode:
        raise RuntimeError(f"the job ended with {process.returncode}")
    return peaks


def rows_of(name: str, folder: Path, without: dict[str, int]) -> list[tuple[str, ...]]:
    """Of one model.

    Args:
        without: what the roles' processes hold at their peak with next to no model.
    """
    model = write_model(folder / "model", name)
    overrides = [*ROUND, f"model={model}", f"runs_folder={folder / 'runs'}", "run=true_size"]
    needs = needs_of(load("shapes_demo", overrides), model)
    peaks = measured(["--recipe", "shapes_demo", *overrides])
    run = folder / "runs" / "true_size"
    texts = len(list((run / "texts").rglob("*.safetensors")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(row for row in rows if row["kind"] == "round")
    found = []
    for need in needs:
        peak = peaks[need.role] - without[need.role]
        found.append(
            (
                f"{MODELS[name]}, {need.role}",
                f"{need.total / GIB:.2f}",
                f"{peak / GIB:.2f}",
                f"{peak / need.total:.2f}",
                f"{trained['seconds/train' if need.role == 'train worker' else 'seconds/generate']:.0f}",
                str(texts),
            )
        )
    return found


def steps_of(name: str, model: Path, repeats: int) -> list[tuple[str, ...]]:
    """A step of `Learner` beside its bound and a step as the released script takes it, all on the same weights."""
    learner = build_learner(load("shapes_demo", [*STEP, f"model={model}"]))
    pixels_NHWC, data = make_round(learner.family, STEPS * learner.config.global_batch, SIDE)
    released = ReleasedLike(learner, pixels_NHWC, data)
    seconds = interleaved(
        {
            "ours": lambda: learner.train_round(data),
            "bound": bound(learner, data, STEPS),
            "released-like": lambda: released.train_round(STEPS),
        },
        repeats,
    )
    return [
        (
            f"{MODELS[name]}: {above} / {below}",
            *median_and_range(ratios(seconds[above], seconds[below])),
            " / ".join(f"{median(seconds[which]) / STEPS:.1f}" for which in (above, below)),
        )
        for above, below in (("ours", "bound"), ("released-like", "ours"))
    ]


def measure(quick: bool) -> list[Table]:
    """A round and a step of each model; of the smaller one alone when it must be quick."""
    held, steps, repeats = [], [], 2 if quick else 3
    with tempfile.TemporaryDirectory() as scratch:
        without = measured(["--recipe", "shapes_demo", *ROUND, *SMALL, f"runs_folder={scratch}/runs", "run=small"])
        for name in ("sd15",) if quick else MODELS:
            folder = Path(scratch) / name
            held += rows_of(name, folder, without)
            steps += steps_of(name, folder / "model", repeats)
            shutil.rmtree(folder)
    return [
        Table(
            "A round at true size",
            ("model, role", "planned, GiB", "peak, GiB", "peak / planned", "round, s", "texts encoded"),
            held,
            "Random weights in bfloat16 from the published configurations, adapters of rank 16 in float32; 4 images of "
            f"{SIDE} pixels, 2 optimizer steps, gradient checkpointing. Planned is what the dry run counts: weights, "
            "gradients and the optimizer's state; the peak, less that of the same round of the embedded world, has "
            "activations, too, and what loading takes for a moment.",
        ),
        Table(
            f"KTO optimizer step at true width, batch {STEP_BATCH}",
            ("step", "ratio", "lowest - highest", "seconds a step"),
            steps,
            f"The same models in float32, which this CPU is faster at, with adapters, on pictures of {SIDE} pixels. "
            f"Median of {repeats} repeats of {STEPS} steps each.",
        ),
    ]


if __name__ == "__main__":
    settings = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    console = Console()
    console.print(machine(), highlight=False)
    for table in measure(settings.quick):
        console.print(table.rich())
