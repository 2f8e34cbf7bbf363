"""What differs between model families, behind one class: how to draw from a base model and how to train its denoiser.

`families/` has one short file a family and the table of them. `generate/replica.py` and `train/worker.py` load a family
through `loading.load_family`; `policy.py` puts adapters on its denoiser, `batches.py` and `learner.py` train it, and
`sampling.py` draws from it. Nobody else knows a component's name, how latents are packed, or the sign of a prediction.
docs/families.md shows how to add one.

Shape suffixes: P prompts; B samples; C, H, W latent channels, height, width (of images: 3 channels, pixels); T, D
tokens and width of a text embedding; E width of a pooled one.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor, nn

from kto_ray.config import Generate
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.geometry import Geometry, image_size
from kto_ray.diffusion.noise import NoiseProcess, RectifiedFlow


class Family(ABC):
    """A loaded base model. What stands here fits most flow transformers; a family says what is otherwise.

    Args:
        pipeline: the diffusers pipeline, frozen, on its device.
        noise: the noise process that its denoiser was trained with.
        geometry: its sizes.
        guidance_scale: of the images that are trained on (`generate.guidance_scale`), which some denoisers are told.
    """

    part: ClassVar[str] = "transformer"
    """The component that is trained, which is also what diffusers puts before the names of its adapters' weights."""
    process: ClassVar[type[NoiseProcess]] = RectifiedFlow
    left_out: ClassVar[Mapping[str, Any]] = {}
    """Components and settings of the pipeline that are loaded as this, whatever the folder says."""
    reads: ClassVar[Mapping[str, int | None]] = {"tokenizer": None}
    """Tokenizers, that which reads furthest first, and after how many tokens the pipeline cuts; None: as the tokenizer
    says. The first that the folder has is asked what the model reads of a prompt."""
    takes_adapters: ClassVar[bool] = True
    leaves_unused: ClassVar[bool] = False
    """Whether some of the denoiser's weights have no part in what it predicts."""
    noise_dtype: ClassVar[torch.dtype | None] = None
    """Of the noise that the pipeline begins with; None: what it was loaded in."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """More arguments of the pipeline's call, by which it draws what it was asked for."""
    embeddings: ClassVar[Mapping[str, str]] = {"text": "prompt_embeds"}
    """What the pipeline's call names each tensor of an encoded prompt; with "negative_" before it, what guidance
    contrasts with."""
    aligned: ClassVar[str | None] = None
    """What diffusers calls the timesteps that "Align Your Steps" found for such models; None: it has none."""
    contrasts: ClassVar[bool] = True
    """Whether guidance contrasts two predictions; otherwise the denoiser is told it, or there is none."""

    def __init__(self, pipeline: Any, noise: NoiseProcess, geometry: Geometry, guidance_scale: float) -> None:
        self.pipeline, self.noise, self.geometry, self.guidance_scale = pipeline, noise, geometry, guidance_scale
        self.scheduler = pipeline.scheduler
        """The pipeline's own, by which those that draw in its place are made."""

    @classmethod  # noqa: B027 - most have nothing to say
    def check(cls, folder: Path) -> None:
        """Raises UserError: a model of this family, but one that cannot be trained here."""

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        """From the folder's configurations alone."""
        denoiser, shrink = config_of(folder, cls.part), shrink_of(folder)
        size: int | list[int] | None = denoiser.get("sample_size")
        sides = [size, size] if isinstance(size, int) else size
        return Geometry(
            channels=denoiser["in_channels"],
            shrink=shrink,
            pixels=None if sides is None else (sides[0] * shrink, sides[1] * shrink),
            patch=denoiser.get("patch_size", 1),
        )

    @classmethod
    def takes_guidance(cls, folder: Path) -> bool:
        """Whether `generate.guidance_scale` may be other than 1."""
        return True

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained."""
        module: nn.Module = getattr(self.pipeline, self.part)
        return module

    @property
    def device(self) -> torch.device:
        """On which the pipeline computes, wherever its components wait."""
        device: torch.device = self.pipeline._execution_device
        return device

    @classmethod
    def target_modules(cls, denoiser: Mapping[str, Any]) -> tuple[str, ...]:
        """Where adapters go, unless `train.adapter.target_modules` says otherwise: what diffusers' script for this
        family trains.

        Args:
            denoiser: its configuration.
        """
        return "to_q", "to_k", "to_v", "to_out.0"

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """What the frozen text encoders make of each text, as the pipeline itself does; on the model's device."""

    def nothing(self) -> Conditioning:
        """One row: what guidance contrasts a prompt with. Takes the place of a dropped prompt."""
        return self.encode_prompts([""])

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        """The denoiser's prediction of `noise.target`, (B, C, H, W).

        Args:
            denoiser: the policy, the reference, or a wrapper of one.
            timesteps_B: as `noise.timesteps` gives them.
        """

    def guided(self, scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for `generate.guidance_scale`; 1 is none."""
        return {"guidance_scale": scale}

    def sample(
        self, text_B: Conditioning, nothing_1: Conditioning, generators: Sequence[torch.Generator], settings: Generate
    ) -> Tensor:
        """Clean latents, (B, C, H, W), in the space in which the denoiser is trained.

        Args:
            text_B: prompts, as `encode_prompts` gives them.
            nothing_1: see `nothing`.
            generators: of the noise of each image.
        """
        height, width = image_size(settings, self.geometry)
        prompted = self.prompted(text_B)
        if self.contrasts and settings.guidance_scale > 1:
            rows_B = torch.zeros(len(text_B), dtype=torch.int64)
            contrast = self.prompted(nothing_1[rows_B])
            prompted |= {f"negative_{name}": value for name, value in contrast.items()}
        spaced = {"timesteps": self.aligned_timesteps()} if settings.timesteps else {}
        made: Tensor = self.pipeline(
            **prompted,
            **spaced,
            num_inference_steps=settings.steps,
            height=height,
            width=width,
            generator=list(generators),
            output_type="latent",
            **self.guided(settings.guidance_scale),
            **self.arguments,
        ).images
        return self.latents_of(made, height // self.geometry.shrink, width // self.geometry.shrink)

    @classmethod
    def aligned_timesteps(cls) -> list[int]:
        """Those of "Align Your Steps", where there are any."""
        assert cls.aligned is not None, "checks.py refuses it"
        return [int(timestep) for timestep in AysSchedules[cls.aligned]]

    def prompted(self, text_B: Conditioning) -> dict[str, Any]:
        """Arguments of the pipeline's call for prompts that are encoded."""
        return {name: text_B.tensors[tensor] for tensor, name in self.embeddings.items()}

    def latents_of(self, made: Tensor, height: int, width: int) -> Tensor:
        """(B, C, H, W) of what the pipeline gives as latents.

        Args:
            height: of the latents.
            width: of the latents.
        """
        return made

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1]."""
        vae = self.pipeline.vae
        raw_BCHW = latents_BCHW / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
        decoded_BCHW: Tensor = vae.decode(raw_BCHW.to(vae.dtype), return_dict=False)[0]
        return decoded_BCHW

    def encode(self, images_B3HW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Clean latents (B, C, h, w), in the space in which the denoiser is trained: the inverse of `decode`.

        Args:
            images_B3HW: in [-1, 1], on the autoencoder's device.
            generators: on the CPU, of each image: latents are drawn from the autoencoder's posterior with its noise;
                None: they are the posterior's mean.
        """
        vae = self.pipeline.vae
        raw_BCHW = encode_upcast(vae, images_B3HW, generators)
        shift = getattr(vae.config, "shift_factor", None) or 0
        latents_BCHW: Tensor = (raw_BCHW - shift) * vae.config.scaling_factor
        return latents_BCHW


def shrink_of(folder: Path, levels: str = "block_out_channels") -> int:
    """Pixels of an image to one of a latent, in height and in width.

    Args:
        levels: what the autoencoder's configuration calls the channels of its levels.
    """
    return int(2 ** (len(config_of(folder, "vae")[levels]) - 1))


def decode_upcast(vae: Any, raw_BCHW: Tensor) -> Tensor:
    """Images of what an autoencoder takes, in float32 where it would overflow in float16."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(dtype=torch.float32)
    decoded_BCHW: Tensor = vae.decode(raw_BCHW.to(vae.dtype), return_dict=False)[0]
    if upcast:
        vae.to(dtype=torch.float16)
    return decoded_BCHW


def encode_upcast(vae: Any, images_B3HW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """What an autoencoder makes of images, in float32 where it would overflow in float16; see `Family.encode`."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(dtype=torch.float32)
    made: Any = vae.encode(images_B3HW.to(vae.dtype))
    if upcast:
        vae.to(dtype=torch.float16)
    if not hasattr(made, "latent_dist"):  # an autoencoder that is not variational
        latent_BCHW: Tensor = made.latent
        return latent_BCHW.float()
    mean: Tensor = made.latent_dist.mean.float()
    if generators is None:
        return mean
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    spread: Tensor = made.latent_dist.std.float()
    return mean + spread * noise.to(mean.device)


def mean_and_spread(vae: Any, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Of the latents of each channel, as an autoencoder's configuration has them: (1, C, 1, 1) each."""
    mean_1C11, std_1C11 = (
        like_BCHW.new_tensor(values)[None, :, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean_1C11, std_1C11


def index_of(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of itself: its class, and [library, class] of each component."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def config_of(folder: Path, component: str) -> dict[str, Any]:
    """The config.json of a component. Raises OSError or ValueError in a folder that `source.check` has not passed."""
    config: dict[str, Any] = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    return config
