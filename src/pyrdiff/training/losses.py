"""Draws that do not depend on the number of processes, and the training losses built on them."""

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from pyrdiff.data.seeds import seed_of


class Draws:
    """
    Random numbers of one batch: drawn for the batches of all processes together, from a seed of its own, of which each
    process takes its part. So 2 processes train on the numbers that 1 process with twice the batch would see.
    """

    def __init__(self, *seed: int, device: torch.device, num_processes: int = 1, process_index: int = 0):
        self.generator = torch.Generator(device).manual_seed(seed_of(*seed))
        self.num_processes, self.process_index = num_processes, process_index

    def _part(self, values: torch.Tensor) -> torch.Tensor:
        return values.chunk(self.num_processes)[self.process_index]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers of this process's shape, [B, ...]."""
        whole = (shape[0] * self.num_processes, *shape[1:])
        return self._part(torch.randn(whole, generator=self.generator, device=self.generator.device))

    def integers(self, high: int, count: int) -> torch.Tensor:
        """Whole numbers in [0, high), [count]."""
        whole = (count * self.num_processes,)
        return self._part(torch.randint(high, whole, generator=self.generator, device=self.generator.device))


def noise_prediction_loss(
    predict, scheduler, images: torch.Tensor, draws: Draws, snr_gamma: float | None = None
) -> torch.Tensor:
    """
    Mean squared error of the prediction at a random time (paper P, eq. 5 and 8).

    Args:
        predict: f(noisy images [B, C, H, W], timesteps [B]) -> prediction [B, C, H, W].
        scheduler: Its `prediction_type` says what is predicted: epsilon, v_prediction or sample.
        images: [B, C, H, W] in [-1, 1].
        draws: Where noise and times come from.
        snr_gamma: Weight each time by min(SNR, gamma), as Min-SNR does; by default the plain error.
    """
    noise = draws.normal(*images.shape)
    timesteps = draws.integers(scheduler.config.num_train_timesteps, len(images))
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
