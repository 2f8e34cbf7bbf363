"""What the configuration says of training: `train`. `train/` and `diffusion/policy.py` go by it.

Its objective is a section that says for itself what it is and does: `objectives/`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_ray.config.machines import Device, Resources
from kto_ray.config.watching import CollapseWatch, as_watch
from kto_ray.identity import ByContent, Fixed, Free, Noted
from kto_ray.objectives import DiffusionKTO, Objective
from kto_ray.section import Count, InnerShare, NonNegative, Positive, Section, Share


class Adapter(Section):
    """What is trained: low-rank adapters of the denoiser's attention, or all of it."""

    kind: Fixed[Literal["lora", "full"]] = "lora"
    """Low-rank adapters, or full fine-tuning."""
    rank: Fixed[Count] = 16
    """Of the low-rank adapters."""
    alpha: Fixed[Positive | None] = None
    """None: equal to the rank, which scales the adapter by 1."""
    target_modules: ByContent[tuple[str, ...] | None] = None
    """Ends of the names of the modules that are adapted; None: those of the model's family."""


class SamplingPolicy(Section):
    """Whose weights are published, to draw the next round and to be evaluated; see `train/averaging.py`."""

    kind: Fixed[Literal["copy", "ema"]] = "copy"
    """The trained weights, or a running average of them."""
    decay: Fixed[InnerShare] = 0.95
    """For "ema": share of the average that stays."""
    every: Fixed[Literal["step", "round"]] = "step"
    """For "ema": after which the average takes in the trained weights; "round" is DiffusionNFT's soft update."""


def as_sampling_policy(value: Any) -> Any:
    """A word is a kind."""
    return {"kind": value} if isinstance(value, str) else value


class Train(Section):
    """How rounds are trained on. Defaults are the paper's where it names one."""

    objective: Fixed[Objective] = DiffusionKTO()
    """What is learned from verdicts, and how."""
    gamma: Fixed[InnerShare | None] = 0.8
    """Probability that a drawn training sample is desirable; None: every sample of a round is drawn equally often,
    whatever its verdict. Pairs, and objectives without undesirable samples, have their own share of each."""
    prompt_dropout: Fixed[Share] = 0.2
    """Share of prompts replaced by the empty prompt, for policy and reference alike."""
    noise_range: Fixed[tuple[Share, Share]] = (0, 1)
    """Part of the noise range that timesteps are drawn from; 0 is clean, 1 is pure noise."""
    noise_draw: Fixed[Literal["auto", "uniform", "stratified", "logit_normal"]] = "auto"
    """How an optimizer step's noise levels are drawn from that range: each by itself; one from each of as many
    equal parts as there are samples, so that no step misses a part of the schedule; or by a normal variable's sigmoid,
    which prefers the middle (Esser et al., arXiv 2403.03206). "auto": the last for flow models, the first for all
    others."""
    own_noise: Fixed[Share] = 0
    """Share of training samples that are noised with the very noise they were drawn from, which follows from their seed
    (arXiv 2605.09433): on flow models that is the line the sampler took."""
    global_batch: Fixed[Count] = 64
    """Samples of an optimizer step, over all workers and accumulated micro-batches."""
    micro_batch: Noted[Count] = 64
    """Samples a worker takes through the model at once."""
    epochs: Fixed[Positive] = 2
    """Draws of a round as a multiple of its verdicts."""
    max_draws: Fixed[Count] = 32
    """How often a sample may be drawn in a round of both classes. Where one class has so few samples that `gamma` would
    draw them more often, the other class is drawn instead, and the run says so."""
    optimizer: Fixed[Literal["adamw", "adamw_8bit", "adamw_paged", "adafactor"]] = "adamw"
    """AdamW; with a quarter of the state; with the state in the host's memory where the card has no room for it (both
    of bitsandbytes); or Adafactor, with next to no state."""
    learning_rate: Fixed[Positive] = 1e-5
    """The largest; `warmup_steps` leads up to it."""
    warmup_steps: Fixed[Annotated[int, Field(ge=0)]] = 0
    """Optimizer steps over which the learning rate rises from 0."""
    decay: Fixed[Literal["constant", "cosine"]] = "constant"
    """How the learning rate goes on after the warm-up; "cosine" falls to 0 over `rounds` (and is stretched
    when a run is continued with more of them)."""
    weight_decay: Fixed[NonNegative] = 0
    """Of AdamW and Adafactor."""
    max_grad_norm: Fixed[Positive] = 1
    """Gradients of a greater norm are scaled down to it."""
    adapter: Adapter = Adapter()
    sampling_policy: Annotated[SamplingPolicy, BeforeValidator(as_sampling_policy)] = SamplingPolicy()
    """Which weights are published, to draw the next round: the trained ones, or a running average."""
    device: Noted[Device] = "auto"
    """Of train workers; "auto": a GPU where `resources` asks for one."""
    dtype: Fixed[Literal["float32", "bfloat16"]] = "float32"
    """Precision of the forward passes (autocast); weights, errors and optimizer stay float32. Not float16: its small
    gradients underflow without loss scaling."""
    base_dtype: Fixed[Literal["float32", "bfloat16"] | None] = None
    """Precision in which a frozen base is held, under adapters that stay float32; None: that of the forward passes."""
    compile: Noted[bool] = False
    """torch.compile the denoiser of every worker, by the blocks that it repeats where it says which."""
    gradient_checkpointing: Noted[bool] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    workers: Noted[Count] = 1
    """Ray Train workers, one a card; each takes its share of `global_batch`."""
    strategy: Fixed[Literal["ddp", "fsdp"]] = "ddp"
    """What each worker holds: all of what is trained, or, of full fine-tuning, its share of weights, gradients,
    optimizer and reference (FSDP2), which is gathered block by block."""
    resources: Resources = Resources()
    on_nonfinite: Free[Literal["stop", "leave_out"]] = "stop"
    """What to do when an optimizer step's error, loss or gradient is not finite; the step is taken in no case. Stop the
    run, which names the samples to blame and goes on from the last good policy when the command is given again; or
    leave those samples out of the round. Where no single sample is to blame, the run stops."""
    max_failures: Free[int] = 3
    """How often Ray Train restarts the workers after a crash; -1: always."""
    keep_checkpoints: Free[Annotated[int, Field(ge=2)]] = 2
    """The last so many checkpoints stay, to go on from when the newest is damaged."""
    watch: Annotated[CollapseWatch, BeforeValidator(as_watch)] = CollapseWatch()
    """Whether training takes the policy apart."""

    @property
    def on_cpu(self) -> bool:
        """Whether workers compute without a card, whatever they ask of the cluster."""
        return self.device == "cpu" or (self.device == "auto" and not self.resources.num_gpus)

    @model_validator(mode="after")
    def _batch_adds_up(self) -> "Train":
        per_worker, rest = divmod(self.global_batch, self.workers)
        if rest or per_worker % min(self.micro_batch, per_worker):
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of workers ({self.workers}) "
                f"x micro_batch ({self.micro_batch})"
            )
        self.objective.check_batch(self.global_batch, min(self.micro_batch, per_worker))
        if self.base_dtype == "bfloat16" and self.adapter.kind == "full":
            raise ValueError("base_dtype bfloat16 is for adapters; weights that are all trained are held in float32")
        if self.base_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError(
                "base_dtype bfloat16 with dtype float32: forward passes through bfloat16 weights are not float32; give "
                "dtype bfloat16, too"
            )
        if self.strategy == "fsdp":
            self._fits_shards()
        if self.noise_range[0] >= self.noise_range[1]:
            raise ValueError(f"noise_range {list(self.noise_range)} must rise, for instance [0, 1]")
        return self

    def _fits_shards(self) -> None:
        if self.adapter.kind != "full":
            raise ValueError(
                "strategy fsdp with adapter.kind lora: adapters, their gradients and their optimizer are small, and a "
                "frozen base is not sharded; give strategy ddp, with dtype bfloat16 and gradient_checkpointing where "
                "memory is short, or adapter.kind full"
            )
        if self.optimizer != "adamw":
            raise ValueError(f"strategy fsdp with optimizer {self.optimizer}: it takes no shards; give adamw")
        if getattr(self.objective, "safeguard", False):
            raise ValueError(
                "strategy fsdp with objective.safeguard: of shards, the gradients of desirable and undesirable samples "
                "are not had apart; give strategy ddp"
            )


def held_dtype(train: Train) -> Literal["float32", "bfloat16"]:
    """Precision in which a train worker holds the denoiser."""
    return "float32" if train.adapter.kind == "full" else train.base_dtype or train.dtype


def steps_for(verdicts: int, train: Train) -> int:
    """Optimizer steps of a round with so many verdicts: epochs x verdicts / global batch, at least one if any."""
    return max(1, round(train.epochs * verdicts / train.global_batch)) if verdicts else 0
