"""The paper's experiment with points of the plane: `python jobs/utilities_2d.py` (about 20 seconds on one core).

Section 6 of Li et al. (arXiv 2404.04465): pretrain a small epsilon-prediction model on one Gaussian cloud, call one
corner of it desirable and another undesirable, fine-tune a copy with each utility, and look where the samples land.
Noising and sampling are diffusers', the objectives are `kto_ray.objectives`; supervised fine-tuning (SFT) on the
desirable points is the baseline. Writes one figure and prints where each model lands.

Measured, seeds 0 to 5, with the settings below (one set for all utilities): share of points within two standard
deviations of the desirable and of the undesirable centre (the two circles overlap), and share closer to the latter.

                       near desirable   near undesirable   closer to undesirable
    base                  28-29 %           18-19 %              28-31 %
    sft                   83-85 %           37-41 %              14-17 %
    kahneman_tversky      80-83 %           15-19 %               2-3 %
    loss_averse           70-73 %           20-23 %               7-9 %
    risk_seeking           0-27 %              0 %                  0 %
    mirrored              65-67 %           22-24 %              14-17 %
    risk_seeking,         81-83 %           22-25 %               8-9 %
      mirrored
    linear                86-88 %            6-9 %                  0 %
    linear, safeguarded   86-88 %           11-15 %               0-1 %
    by noise level        61-63 %           21-22 %              11-13 %

What the paper says of Kahneman-Tversky shows: it lands on the desirable cluster like SFT and avoids the undesirable
one. What it says of the other two does not. There, loss-averse deviates from the desirable points to avoid the
undesirable, and risk-seeking behaves like SFT; with the paper's formulas the parts are exchanged:

- risk_seeking, -log sigmoid(-x), has a slope that grows to 1 in gains. Pushing an undesirable point away earns ever
  on, both denoising errors rise, and the model runs away past the desirable cluster; after 1,600 steps instead of 400
  its points are at 1e34.
- loss_averse, log sigmoid(x), has a slope that falls to 0 in gains. It rests as soon as no point is a loss, and stays
  between base and Kahneman-Tversky, after 1,600 steps too.

Beyond the paper: with a slope that never falls, linear follows both classes best in these 400 steps, and the safeguard
costs it a little of its distance to the undesirable. Measured by the mirror image (`DiffusionKTO.mirror`), undesirable
points cannot be pushed away without end, and risk_seeking stays on the desirable cluster; Kahneman-Tversky gets less
far in these 400 steps. A reference point and margins by noise level, which help where every round is drawn anew
(docs/bake_off.md), hold the model nearer to the base on this fixed set of points.

This order (loss_averse least far from the base, risk_seeking farthest from the undesirable) held wherever we looked,
with one or two seeds each: beta 0.3 to 30,000; gamma 0.5 to 0.95; reference points batch_kl and zero; points
standardised or not. A larger beta holds all but risk_seeking nearer to the base. At gamma 0.5 all three overshoot the
desirable cluster; at gamma 0.95 and beta 1 all three resemble SFT and none avoids much.

Points are float32 of shape (N, 2), or (B, 2) in a batch; in the paper's units outside of the models, `standardised`
inside. Timesteps are int64 of shape (B,). F is the number of frequencies that encode a timestep.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor, nn

from kto_ray.objectives import SFT, DiffusionKTO
from kto_ray.objectives.protocol import Outputs, Rewards, denoising_error
from kto_ray.train.safeguard import Safeguard


@dataclass(frozen=True)
class Cluster:
    """An isotropic Gaussian of the plane."""

    center: tuple[float, float]
    std: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.tensor(self.center) + self.std * torch.randn((count, 2), generator=generator)

    def distances(self, points_N2: Tensor) -> Tensor:
        """From the centre to each point, (N,), in standard deviations."""
        distances_N: Tensor = (points_N2 - torch.tensor(self.center)).norm(dim=1)
        return distances_N / self.std


PRETRAINING = Cluster((0.5, 0.8), 0.2)  # the paper states the variances 0.04, 0.01, 0.01
DESIRABLE = Cluster((0.3, 0.8), 0.1)
UNDESIRABLE = Cluster((0.3, 0.6), 0.1)

BATCH = 256
SAMPLES = 3500  # as in the paper
GAMMA = 0.8  # probability that a training point is desirable; as in the paper
BETA = 3.0
NOISE_LEVELS = 100

METHODS: dict[str, SFT | DiffusionKTO] = {
    "sft": SFT(),
    "kahneman_tversky": DiffusionKTO(beta=BETA),
    "loss_averse": DiffusionKTO(beta=BETA, utility="loss_averse"),
    "risk_seeking": DiffusionKTO(beta=BETA, utility="risk_seeking"),
    "mirrored": DiffusionKTO(beta=BETA, mirror=True),
    "risk_seeking, mirrored": DiffusionKTO(beta=BETA, utility="risk_seeking", mirror=True),
    "linear": DiffusionKTO(beta=BETA, utility="linear"),
    "linear, safeguarded": DiffusionKTO(beta=BETA, utility="linear", safeguard=True),
    "by noise level": DiffusionKTO(beta=BETA, reference_point="noise_mean", scale_by_noise=True),
}
"""SFT, the paper's three utilities, and options beyond the paper."""


def standardised(points_N2: Tensor) -> Tensor:
    """Points with the pretraining cloud as unit Gaussian, which the noise schedule is made for."""
    return (points_N2 - torch.tensor(PRETRAINING.center)) / PRETRAINING.std


def unstandardised(points_N2: Tensor) -> Tensor:
    return points_N2 * PRETRAINING.std + torch.tensor(PRETRAINING.center)


def build_scheduler() -> DDIMScheduler:
    """100 noise levels, from 3 % to 99.9 % noise (standard deviation)."""
    scheduler: DDIMScheduler = DDIMScheduler(
        num_train_timesteps=NOISE_LEVELS,
        beta_schedule="linear",
        beta_start=1e-3,
        beta_end=0.12,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return scheduler


class Denoiser(nn.Module):
    """Predicts the noise (B, 2) in noisy points (B, 2) at timesteps (B,)."""

    frequency_F: Tensor

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequency_F", torch.logspace(0, 2, 8))
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, noisy_B2: Tensor, timesteps_B: Tensor) -> Tensor:
        angle_BF = timesteps_B[:, None] / NOISE_LEVELS * self.frequency_F
        prediction_B2: Tensor = self.layers(torch.cat([noisy_B2, angle_BF.sin(), angle_BF.cos()], dim=1))
        return prediction_B2


def add_noise(points_B2: Tensor, scheduler: DDIMScheduler, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy points, the noise in them (both (B, 2), standardised), and their timesteps (B,)."""
    noise_B2 = torch.randn(points_B2.shape, generator=generator)
    timesteps_B = torch.randint(NOISE_LEVELS, (len(points_B2),), generator=generator)
    noisy_B2 = scheduler.add_noise(standardised(points_B2), noise_B2, timesteps_B)
    return noisy_B2, noise_B2, timesteps_B


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def pretrain(seed: int = 0, steps: int = 1500) -> Denoiser:
    """A model of the pretraining cloud, by the standard diffusion objective."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator: leave it as it was
        torch.manual_seed(seed)
        model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        noisy_B2, noise_B2, timesteps_B = add_noise(PRETRAINING.draw(BATCH, generator), scheduler, generator)
        loss = denoising_error(model(noisy_B2, timesteps_B), noise_B2).mean()
        descend(loss, optimizer)
        decay.step()
    return model


def finetune(method: str, base: Denoiser, seed: int = 0, steps: int = 400, lr: float = 1e-4) -> Denoiser:
    """A copy of `base` after fine-tuning with one of `METHODS`.

    Every method sees the same points, verdicts, noise and timesteps under the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    policy, reference = copy.deepcopy(base), base
    objective = METHODS[method]
    memory = objective.begin((0.0, 1.0))
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        desirable_B = torch.rand(BATCH, generator=generator) < GAMMA
        points_B2 = torch.where(
            desirable_B[:, None], DESIRABLE.draw(BATCH, generator), UNDESIRABLE.draw(BATCH, generator)
        )
        noisy_B2, noise_B2, timesteps_B = add_noise(points_B2, scheduler, generator)
        with torch.no_grad():
            reference_B2 = reference(noisy_B2, timesteps_B)
        outputs = Outputs(policy(noisy_B2, timesteps_B), noise_B2, reference_B2)
        scale = None
        if objective.needs.whole_step:
            level_B = timesteps_B / NOISE_LEVELS
            scale, memory = objective.scale(Rewards(outputs.reward_B.detach(), desirable_B, level_B), memory)
        loss_B = objective.losses(outputs, desirable_B, scale).loss_B
        if not objective.needs.undesirable:
            loss_B = loss_B[desirable_B]
        if objective.needs.classes_apart:
            safeguard = Safeguard(list(policy.parameters()))
            safeguard.add(loss_B / BATCH, desirable_B)
            safeguard.finish(ranks=1)
            optimizer.step()
        else:
            descend(loss_B.mean(), optimizer)
        decay.step()
    return policy


@torch.no_grad()
def sample(model: Denoiser, count: int = SAMPLES, seed: int = 0, steps: int = 25) -> Tensor:
    """Points (N, 2) drawn from the model by DDIM."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    points_N2 = torch.randn((count, 2), generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        noise_N2 = model(points_N2, timestep.expand(count))
        points_N2 = scheduler.step(noise_N2, timestep, points_N2).prev_sample
    return unstandardised(points_N2)


def landing(points_N2: Tensor) -> dict[str, float]:
    """Where a cloud lies: its median point, and shares of its points."""
    to_desirable_N, to_undesirable_N = DESIRABLE.distances(points_N2), UNDESIRABLE.distances(points_N2)
    x, y = points_N2.median(dim=0).values.tolist()
    shares = {
        "near_desirable": to_desirable_N < 2,
        "near_undesirable": to_undesirable_N < 2,
        "closer_to_undesirable": to_undesirable_N < to_desirable_N,
    }
    return {"x": x, "y": y, **{name: chosen_N.float().mean().item() for name, chosen_N in shares.items()}}


def draw_figure(clouds: Mapping[str, Tensor], path: Path) -> None:
    """A panel of points each, with the 2-sigma circles of the desirable (green) and the undesirable (red) cluster."""
    columns = 4
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = list(figure.subplots(-(-len(clouds) // columns), columns, sharex=True, sharey=True).flat)
    for panel in panels[len(clouds) :]:
        panel.axis("off")
    for panel, (name, points_N2) in zip(panels[: len(clouds)], clouds.items(), strict=True):
        panel.set(title=name, xlim=(-0.3, 1.3), ylim=(0.0, 1.6), aspect="equal")
        panel.scatter(*points_N2.T.numpy(), s=2, alpha=0.3, linewidths=0)
        for cluster, color in ((DESIRABLE, "tab:green"), (UNDESIRABLE, "tab:red")):
            panel.add_patch(Circle(cluster.center, 2 * cluster.std, fill=False, color=color))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def run(seed: int = 0) -> dict[str, Tensor]:
    """The whole experiment: the cloud (3500, 2) of the data, of the base model, and of each method."""
    generator = torch.Generator().manual_seed(seed)
    data_N2 = torch.cat([cluster.draw(SAMPLES // 2, generator) for cluster in (DESIRABLE, UNDESIRABLE)])
    base = pretrain(seed)
    clouds = {"data": data_N2, "base": sample(base, seed=seed)}
    for method in METHODS:
        clouds[method] = sample(finetune(method, base, seed), seed=seed)
    return clouds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/utilities_2d.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)  # matrices this small only wait for each other on more threads
    clouds = run(args.seed)
    for name, points_N2 in clouds.items():
        print(f"{name:22}  " + "  ".join(f"{figure} {value:.2f}" for figure, value in landing(points_N2).items()))
    draw_figure(clouds, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
