"""Pixel-aware diffusion (paper X): the flags, the noise process, and images and structures in its range."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pyrdiff.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from PIL import Image

    from pyrdiff.data import ImageLevels
    from pyrdiff.models import ScaleAutoencoder
    from pyrdiff.schedulers import PixelAwareScheduler

GRAY = 0.5  # the structure of a network that has none


@dataclass(kw_only=True)
class PixelAwareSettings(TrainingSettings):
    """
    Flags of pixel-aware diffusion. The autoencoder is trained first and its prior fitted, then the network; the same
    command resumes in any of the three. The paper's own model: mode paper, head literal.
    """

    output_dir: str = "runs/pixel_aware"
    resolution: tuple[str, ...] = ("32",)
    """Size of the images, a number or HEIGHTxWIDTH."""
    preset: Literal["tiny", "mini", "small", "paper-cifar10", "paper-celeba"] = "small"
    """Both networks. tiny and mini are for a CPU: squares of pixels enter as channels, so that 16 make a side."""
    encoder_channels: tuple[int, ...] | None = None
    """Channels of each level of the UNet, instead of the preset's."""
    latent_dim: int | None = None
    """Size of the latent, instead of the preset's."""
    mode: Literal["structure", "paper"] = "structure"
    """structure generates; paper is the method as printed, for comparison: its sampler diverges."""
    use_structure: bool = True
    """False: no autoencoder, a uniform rate and EDM's preconditioning about mid-gray (the baseline)."""
    schedule: Literal["pixel", "uniform"] = "pixel"
    """Rates that follow the structure, or the same for all pixels (an ablation)."""
    head: Literal["tied", "literal"] = "tied"
    """What predicts the noises of the other steps: nothing (they follow in closed form), or a sub-network a step."""
    head_steps: int = 8
    """Steps, drawn anew for each batch, that such a head is trained on at a time."""
    num_train_timesteps: int | None = None
    """Steps T of the noise process; by default the preset's, 200 or 500."""
    gamma: float | None = None
    """Rate of a pixel of brightness 1; by default T / 10, as in the paper."""
    floor: float | None = None
    """Added to the brightness; by default 0.1, and 0 in mode paper."""
    ramp_power: float | None = None
    """Of the time; by default 3, and 1 in mode paper."""
    recon_std: float = 0.08
    """The spread of an image about its structure that the autoencoder is trained for: lower is sharper."""
    prior: Literal["gmm", "normal"] = "gmm"
    """Prior of the latents: fitted after the training of the autoencoder, or N(0, I)."""
    prior_components: int = 64
    """Gaussians of the fitted prior, at most: each gets 8 images for every latent dimension in use."""
    prior_images: int = 10_000
    """Images that it is fitted to, at most."""
    autoencoder_steps: int = 5_000
    """Optimiser steps of the autoencoder; max_train_steps counts those of the network."""
    autoencoder_share: float = 0.35
    """Of the minutes, with a budget in minutes."""
    train_batch_size: int = 128
    """Images a step and process."""
    learning_rate: float = 5e-4

    def __post_init__(self):
        super().__post_init__()
        self._check("resolution", len(self.sizes) == 1, "one size")
        self._check("patch_size", self.patch_size is None, "none: the autoencoder sees whole images")
        for name in ("head_steps", "prior_components", "prior_images", "autoencoder_steps"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("num_train_timesteps", "latent_dim"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        for name in ("gamma", "ramp_power"):
            value = getattr(self, name)
            self._check(name, value is None or 0 < value < float("inf"), "a number above 0")
        self._check("floor", self.floor is None or 0 <= self.floor < float("inf"), "a number from 0 up")
        self._check("recon_std", 0 < self.recon_std < float("inf"), "a number above 0")
        self._check("autoencoder_share", 0 < self.autoencoder_share < 1, "a number between 0 and 1")
        self._check("compile", not self.compile or self.head == "tied", "False with a head whose steps are drawn")
        if self.mode == "paper":
            self._check("schedule", self.schedule == "pixel", "'pixel' with mode='paper'")
            self._check("head", self.head != "tied", "'literal' with mode='paper'")
            self._check("use_structure", self.use_structure, "True with mode='paper'")


def sample_size(settings: PixelAwareSettings) -> int | tuple[int, int]:
    height, width = settings.sizes[0]
    return height if height == width else (height, width)


def squares(settings: PixelAwareSettings) -> dict[str, int]:
    """The `patch_size` of CPU-sized networks, with which the shorter side of their finest maps is 16 or little more."""
    if settings.preset not in ("tiny", "mini"):
        return {}
    most = max(min(settings.sizes[0]) // 16, 1)
    fitting = [patch for patch in range(1, most + 1) if all(side % (4 * patch) == 0 for side in settings.sizes[0])]
    return {"patch_size": max(fitting, default=1)}


def steps_of(settings: PixelAwareSettings) -> int:
    """T: 500 is the paper's for its larger images."""
    return settings.num_train_timesteps or (500 if settings.preset == "paper-celeba" else 200)


def build_process(settings: PixelAwareSettings, residual_std: float = 0.1) -> "PixelAwareScheduler":
    from pyrdiff.schedulers import PixelAwareScheduler

    steps = steps_of(settings)
    return PixelAwareScheduler(
        num_train_timesteps=steps,
        gamma=settings.gamma or steps / 10,
        floor=settings.floor,
        ramp_power=settings.ramp_power,
        residual_std=residual_std,
        mode=settings.mode,
        schedule=settings.schedule if settings.use_structure else "uniform",
    )


def in_range(scheduler: "PixelAwareScheduler", images: "torch.Tensor") -> "torch.Tensor":
    """Images in [-1, 1] as the loop gives them, in the process's [epsilon, 1]."""
    return scheduler.to_range((images + 1) / 2)


def some_images(scheduler: "PixelAwareScheduler", images: "ImageLevels", count: int) -> "Iterator[torch.Tensor]":
    """Batches [B, C, H, W] in [epsilon, 1] of up to `count` training images, spread over all."""
    from pyrdiff.methods.images import spread_over

    return (in_range(scheduler, batch) for batch in spread_over(images, count, batch_size=256))


def in_pictures(scheduler: "PixelAwareScheduler", images: "torch.Tensor") -> "list[Image.Image]":
    """Images [B, C, H, W] in [epsilon, 1] as Pillow images."""
    from pyrdiff.methods.images import as_pictures

    return as_pictures(scheduler.from_range(images).clamp(0, 1))


def measure_residual(
    settings: PixelAwareSettings, images: "ImageLevels", given: "ScaleAutoencoder | None" = None
) -> float:
    """The RMS of image minus structure of up to 2048 images, to 3 digits."""
    import torch

    scheduler = build_process(settings)
    generator, total, count = torch.Generator().manual_seed(settings.seed), 0.0, 0
    for clean in some_images(scheduler, images, 2048):
        noise = torch.randn(len(clean), given.config.latent_dim, generator=generator) if given is not None else None
        structure = structure_of(given, clean if given is None else clean.to(given.device), noise)
        total, count = total + (clean - structure.cpu()).double().square().sum().item(), count + clean.numel()
    return float(f"{(total / count) ** 0.5:.3g}")


def structure_of(
    autoencoder: "ScaleAutoencoder | None", clean: "torch.Tensor", noise: "torch.Tensor | None"
) -> "torch.Tensor":
    """s_0 of images [B, C, H, W] in [epsilon, 1], decoded from a draw of q(z | x_0) by `noise` [B, Z]."""
    import torch

    if autoencoder is None:
        return torch.full_like(clean, GRAY)
    with torch.no_grad():
        mean, log_variance = (moment.float() for moment in autoencoder.encode(clean))
        latents = mean + (log_variance / 2).exp() * noise.to(mean.device)
        return autoencoder.decode(latents).float()
