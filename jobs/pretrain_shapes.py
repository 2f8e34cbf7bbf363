"""Pretrain the embedded world's base model: `python jobs/pretrain_shapes.py` (19 to 58 minutes on 2 cores).

Writes an ordinary diffusers folder (AutoencoderKL, CLIP text encoder, word-level CLIP tokenizer, v-prediction
U-Net, DDIM scheduler) and its two prompt files to `kto_ray/shapes/`, and prints how well the model draws: the picture
error of the autoencoder and, per guidance scale, the share of pictures that pass the scorer.

Two stages, as for the model it is a miniature of: the autoencoder learns pictures; then U-Net and text encoder learn
the latents with captions that are wrong more than half of the time (see `world.mistaken_caption`). Captions of
held-out scenes are never shown.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kto_ray.config import Model
from kto_ray.diffusion.loading import load_family
from kto_ray.records import Prompt
from kto_ray.shapes import HELD_OUT_PROMPTS, MODEL_FOLDER, TRAIN_PROMPTS
from kto_ray.shapes.scorer import ShapesScorer
from kto_ray.shapes.world import Scene, all_scenes, draw_somewhere, is_held_out, mistaken_caption

SHARE_RIGHT = 0.45  # of the pretraining captions; about half of the pictures then pass at a guidance of 1.1
CAPTION_DROPOUT = 0.1  # share of empty captions, which classifier-free guidance needs
TOKENS = 8  # start + "a red circle on black" + end = 7


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make every word of the world one token."""
    captions = [scene.caption for scene in all_scenes()]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe.train_from_iterator(captions, trainers.BpeTrainer(special_tokens=[start, end], end_of_word_suffix="</w>"))
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def build_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The untrained pipeline: 3.6 M parameters, 64x64 pictures, 4x8x8 latents."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw_pictures(scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Float pictures (B, 3, 64, 64) in [-1, 1]."""
    pictures_BHWC = np.stack([draw_somewhere(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    scenes = all_scenes()
    return [scenes[i] for i in rng.integers(len(scenes), size=count)]


def learning_rates(peak: float, steps: int) -> Iterator[float]:
    """Linear warm-up over 5 % of the steps, then a cosine to 2 % of the peak."""
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        yield peak * warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def train_autoencoder(vae: AutoencoderKL, steps: int, batch: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=1e-4)
    for rate in track(list(learning_rates(3e-3, steps)), description="autoencoder"):
        pictures_BCHW = draw_pictures(random_scenes(batch, rng), rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pictures_BCHW).latent_dist
            decoded_BCHW = vae.decode(posterior.sample()).sample
        error_BCHW = decoded_BCHW.float() - pictures_BCHW
        kl = posterior.kl().mean() / (4 * 8 * 8)
        loss = error_BCHW.abs().mean() + error_BCHW.square().mean() + 3e-4 * kl
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def encode_world(vae: AutoencoderKL, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Scene]]:
    """Latents (N, 4, 8, 8) of unit variance and their scenes; sets the autoencoder's scaling factor."""
    scenes = random_scenes(count, rng)
    chunks = [
        vae.encode(draw_pictures(scenes[start : start + 256], rng)).latent_dist.mean
        for start in track(range(0, count, 256), description="latents")
    ]
    latents_NCHW = torch.cat(chunks)
    scaling_factor = float(1 / latents_NCHW.std())
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents_NCHW * scaling_factor, scenes


def train_denoiser(
    pipeline: StableDiffusionPipeline,
    latents_NCHW: torch.Tensor,
    scenes: list[Scene],
    steps: int,
    batch: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    captions = ["", *(scene.caption for scene in all_scenes())]
    tokens = pipeline.tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    tokens_of = dict(zip(captions, tokens, strict=True))
    held_out = {scene.caption for scene in all_scenes() if is_held_out(scene)}

    def caption_of(scene: Scene) -> str:
        if rng.random() < CAPTION_DROPOUT:
            return ""
        while (caption := mistaken_caption(scene, rng, SHARE_RIGHT)) in held_out:
            if is_held_out(scene) and caption == scene.caption:
                return ""
        return caption

    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-3)
    ema = EMAModel(parameters, decay=0.998)
    order = rng.permutation(len(scenes))
    running = None
    progress = track(list(enumerate(learning_rates(1.2e-3, steps))), description="U-Net and text encoder")
    for step, rate in progress:
        picks = np.take(order, range(step * batch, (step + 1) * batch), mode="wrap")
        clean_BCHW = latents_NCHW[picks]
        text_BTD = pipeline.text_encoder(torch.stack([tokens_of[caption_of(scenes[i])] for i in picks]))[0]
        noise_BCHW = torch.randn_like(clean_BCHW)
        timesteps_B = torch.randint(0, 1000, (batch,))
        noisy_BCHW = pipeline.scheduler.add_noise(clean_BCHW, noise_BCHW, timesteps_B)
        target_BCHW = pipeline.scheduler.get_velocity(clean_BCHW, noise_BCHW, timesteps_B)
        loss = F.mse_loss(pipeline.unet(noisy_BCHW, timesteps_B, text_BTD).sample, target_BCHW)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 99:
            print(f"  step {step + 1}: denoising error {running:.4f}", flush=True)
    ema.copy_to(parameters)


@torch.no_grad()
def print_figures(pipeline: StableDiffusionPipeline, prompts: dict[str, list[Prompt]], guidances: list[float]) -> None:
    rng = np.random.default_rng(1)
    scenes = random_scenes(256, rng)
    pictures_BCHW = draw_pictures(scenes, rng)
    decoded = pipeline.vae.decode(pipeline.vae.encode(pictures_BCHW).latent_dist.mean).sample
    images = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    score = np.mean(ShapesScorer().score(images, [Prompt(id="", text=scene.caption) for scene in scenes]))
    print(f"autoencoder: mean absolute error {(decoded - pictures_BCHW).abs().mean():.4f}, score {score:.3f}")
    for guidance in guidances:
        for split, chosen in prompts.items():
            chosen = (chosen * 2)[:144]
            images = pipeline(
                [prompt.text for prompt in chosen],
                guidance_scale=guidance,
                num_inference_steps=12,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
            scores = np.array(ShapesScorer().score((images * 255).round().astype(np.uint8), chosen))
            print(
                f"guidance {guidance}: {split} prompts, mean score {scores.mean():.3f}, "
                f"pass rate {(scores >= 0.5).mean():.3f} of {len(scores)} pictures",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=2200)
    parser.add_argument("--vae-from", type=Path, help="reuse the autoencoder of this pipeline folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pipeline = build_pipeline(build_tokenizer())
    for name in ("vae", "text_encoder", "unet"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()) / 1e6:.2f} M parameters")
    if args.vae_from:
        pipeline.vae = AutoencoderKL.from_pretrained(args.vae_from / "vae")
    else:
        train_autoencoder(pipeline.vae, args.vae_steps, 32, rng)
    latents_NCHW, scenes = encode_world(pipeline.vae, 20_000, rng)
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)
    pipeline.to(dtype=torch.float32)
    print(f"autoencoder done after {time.monotonic() - started:.0f} s")
    train_denoiser(pipeline, latents_NCHW, scenes, args.unet_steps, 128, args.seed)
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)  # half precision halves the package, loads as float32

    prompts: dict[str, list[Prompt]] = {"training": [], "held-out": []}
    for scene in all_scenes():
        prompts["held-out" if is_held_out(scene) else "training"].append(
            Prompt(id=scene.caption.replace(" ", "-"), text=scene.caption)
        )
    # Rounds take prompts in the order of the file, and small ones should see all colors.
    np.random.default_rng(0).shuffle(prompts["training"])
    for split, path in {"training": TRAIN_PROMPTS, "held-out": HELD_OUT_PROMPTS}.items():
        path.write_text("".join(json.dumps({"id": p.id, "text": p.text}) + "\n" for p in prompts[split]))
    family = load_family(args.out, Model(), torch.device("cpu"), torch.float32)
    print_figures(family.pipeline, prompts, [1.0, 1.25, 1.5, 2.0, 3.0])
    print(f"done after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
