"""Draws that do not depend on the number of processes, and the training losses built on them."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from pyrdiff.data.seeds import seed_of

CHOICE = 0  # last part of what a choice is seeded with


class Draws:
    """
    Random numbers of one batch: drawn for the batches of all processes together, from a seed of its own, of which each
    process takes its part. So 2 processes train on the numbers that 1 process with twice the batch would see.
    """

    def __init__(self, *seed: int, device: torch.device, num_processes: int = 1, process_index: int = 0):
        self.seed = seed_of(*seed)
        self.generator = torch.Generator(device).manual_seed(self.seed)
        self.num_processes, self.process_index = num_processes, process_index

    def choice(self, options: Sequence):
        """One of the options, the same in every process; waits for no GPU."""
        return options[seed_of(self.seed, CHOICE) % len(options)]

    def _part(self, values: torch.Tensor) -> torch.Tensor:
        return values.chunk(self.num_processes)[self.process_index]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers of this process's shape, [B, ...]."""
        whole = (shape[0] * self.num_processes, *shape[1:])
        return self._part(torch.randn(whole, generator=self.generator, device=self.generator.device))

    def shared_normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers [B, ...] of which all images of all processes have the same."""
        return torch.randn((1, *shape[1:]), generator=self.generator, device=self.generator.device).expand(shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1) of this process's shape, [B, ...]."""
        whole = (shape[0] * self.num_processes, *shape[1:])
        return self._part(torch.rand(whole, generator=self.generator, device=self.generator.device))

    def integers(self, high: int, count: int) -> torch.Tensor:
        """Whole numbers in [0, high), [count]."""
        whole = (count * self.num_processes,)
        return self._part(torch.randint(high, whole, generator=self.generator, device=self.generator.device))


def noise_prediction_loss(
    predict,
    scheduler,
    images: torch.Tensor,
    draws: Draws,
    snr_gamma: float | None = None,
    noisiest: int | None = None,
) -> torch.Tensor:
    """
    Mean squared error of the prediction at a random time (paper P, eq. 5 and 8).

    Args:
        predict: f(noisy images [B, C, H, W], timesteps [B]) -> prediction [B, C, H, W].
        scheduler: Its `prediction_type` says what is predicted: epsilon, v_prediction or sample.
        images: [B, C, H, W] in [-1, 1].
        draws: Where noise and times come from.
        snr_gamma: Weight each time by min(SNR, gamma), as Min-SNR does; by default the plain error.
        noisiest: Times are drawn below this one; by default from all.
    """
    noise = draws.normal(*images.shape)
    timesteps = draws.integers(noisiest or scheduler.config.num_train_timesteps, len(images))
    prediction = predict(scheduler.add_noise(images, noise, timesteps), timesteps).float()
    kind = scheduler.config.prediction_type
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(images, noise, timesteps),
        "sample": lambda: images,
    }[kind]()
    if snr_gamma is None:
        return F.mse_loss(prediction, target)
    # Min-SNR weighs the error of the clean image by min(SNR, gamma); these are its equals for the other two targets.
    snr = compute_snr(scheduler, timesteps)
    weight = snr.clamp(max=snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind]
    return ((prediction - target).square().flatten(1).mean(1) * weight).mean()


def variational_bound(
    scheduler,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    noise_prediction: torch.Tensor,
    variance_place: torch.Tensor,
    timesteps: torch.Tensor,
    half_bin: float,
) -> torch.Tensor:
    """
    The term of the variational bound at each image's time, in bits a dimension (paper S, eq. 8; Nichol and Dhariwal
    2021, section 3.1): the divergence of the learned step from q(y_{t-1} | y_t, y_0), and at time 0 the code length of
    values in bins.

    Args:
        scheduler: Its `alphas_cumprod` are the noise process.
        clean, noisy: [B, C, H, W], y_0 and y_t.
        noise_prediction: [B, C, H, W].
        variance_place: [B, C, H, W], the logarithm's place between beta~ (-1) and beta (1).
        timesteps: [B].
        half_bin: Half of the distance of two values of `clean` next to each other: for an image of 8 bits in [-1, 1] it
            is 1 / 255.

    Returns:
        [B].
    """
    table = _bound_table(scheduler, clean.device)
    at = {name: values[timesteps][:, None, None, None] for name, values in table.items()}

    estimate = (noisy - at["noise"] * noise_prediction) / at["signal"]
    mean = at["of_clean"] * estimate + at["of_noisy"] * noisy
    true_mean = at["of_clean"] * clean + at["of_noisy"] * noisy
    log_variance = torch.lerp(at["small"].expand_as(clean), at["large"].expand_as(clean), (variance_place + 1) / 2)
    ratio = at["small"] - log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp())

    # Above the mean, by erfc, which keeps small probabilities apart in float32; `torch.special.ndtr` does not.
    width, distance = math.sqrt(2) * (0.5 * log_variance).exp(), (clean - mean).abs()
    beyond, further = (torch.special.erfc((distance + sign * half_bin) / width) / 2 for sign in (-1, 1))
    code_length = -(beyond - further).clamp(min=1e-12).log()

    first = (timesteps == 0)[:, None, None, None]
    return torch.where(first, code_length, divergence).flatten(1).mean(1) / math.log(2)


@lru_cache(maxsize=2)
def _bound_table(scheduler, device: torch.device) -> dict[str, torch.Tensor]:
    """What the bound needs of each step, float32 [T]; kept, since a copy in each step would wait for a GPU."""
    gamma = scheduler.alphas_cumprod.cpu().double()
    before = torch.cat([gamma.new_ones(1), gamma[:-1]])
    beta = 1 - gamma / before
    posterior = beta * (1 - before) / (1 - gamma)
    posterior[0] = posterior[1]  # zero; as in the reference, the variance of the step before
    table = {
        "of_clean": before.sqrt() * beta / (1 - gamma),
        "of_noisy": (1 - beta).sqrt() * (1 - before) / (1 - gamma),
        "signal": gamma.sqrt(),
        "noise": (1 - gamma).sqrt(),
        "small": posterior.log(),
        "large": beta.log(),
    }
    return {name: values.float().to(device) for name, values in table.items()}
