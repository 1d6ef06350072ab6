"""Pixel-aware diffusion (paper X), first stage: the autoencoder of structures, and the prior of its latents."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyrdiff.methods.pixel_aware_process import (
    PixelAwareSettings,
    build_process,
    in_pictures,
    in_range,
    measure_residual,
    sample_size,
    some_images,
    squares,
    steps_of,
)
from pyrdiff.plugins import Method

if TYPE_CHECKING:
    import torch
    from diffusers.configuration_utils import FrozenDict

    from pyrdiff.data import ImageLevels
    from pyrdiff.models import ScaleAutoencoder
    from pyrdiff.schedulers import PixelAwareScheduler
    from pyrdiff.training.loop import DeviceBatch
    from pyrdiff.training.losses import Draws

ACTIVE = 0.05  # a latent dimension is in use if its mean has at least this variance over the images
RIDGE = 1e-3  # added to the diagonal of the prior's covariances
NOISY = 0.25  # share of the autoencoder's inputs that are noisy, for restoring


def build_autoencoder(settings: PixelAwareSettings, channels: int) -> "ScaleAutoencoder":
    from pyrdiff.models import ScaleAutoencoder

    overrides = squares(settings)
    if settings.latent_dim is not None:
        overrides["latent_dim"] = settings.latent_dim
    return ScaleAutoencoder.from_preset(
        settings.preset,
        image_channels=channels,
        sample_size=sample_size(settings),
        num_train_timesteps=steps_of(settings),
        output="scale" if settings.mode == "paper" else "structure",
        prior=settings.prior,
        **overrides,
    )


def autoencoder_loss(
    network: "torch.nn.Module",
    scheduler: "PixelAwareScheduler",
    settings: PixelAwareSettings,
    batch: "DeviceBatch",
    draws: "Draws",
) -> "torch.Tensor":
    """
    The bound of section 3.2's VAE in mode "structure": the error of the structure as an image, of clean inputs and of
    some noisy ones. In mode "paper" the error of x_delta of noisy inputs. Nats for each value of the image.
    """
    import torch

    from pyrdiff.models import ScaleAutoencoder

    clean = in_range(scheduler, batch.images)
    count, total = len(clean), len(scheduler)
    timesteps = 1 + draws.integers(total, count)
    if settings.mode == "structure":
        timesteps = torch.where(draws.uniform(count) < NOISY, timesteps, 0)
    noisy = scheduler.add_noise(clean, draws.normal(*clean.shape), timesteps)
    output = network(noisy, timesteps, posterior_noise=draws.normal(count, network_config(network).latent_dim))
    target = scheduler.image_scale(clean) if settings.mode == "paper" else clean
    error = (output.structure.float() - target).square().mean() / (2 * settings.recon_std**2)
    divergence = ScaleAutoencoder.kl(output.mean.float(), output.log_variance.float()).mean()
    return error + divergence / clean[0].numel()


def network_config(network: "torch.nn.Module") -> "FrozenDict":
    """The config of a network, also inside what compiles or distributes it."""
    while not hasattr(network, "config"):
        network = getattr(network, "module", None) or network._orig_mod
    return network.config


def finish_autoencoder(settings: PixelAwareSettings, network: "ScaleAutoencoder", images: "ImageLevels") -> None:
    """Measures what gradients do not learn: how far images are from their structures, and the prior."""
    if settings.mode == "structure":
        network.register_to_config(residual_std=measure_residual(settings, images, network))
    fit_prior(settings, network, images)


def fit_prior(settings: PixelAwareSettings, network: "ScaleAutoencoder", images: "ImageLevels") -> None:
    """Fits a Gaussian mixture to the codes of the training images, on the latent dimensions in use."""
    import numpy as np
    import torch
    from sklearn.mixture import GaussianMixture

    if settings.prior == "normal" or settings.mode == "paper":
        return
    scheduler, means, codes = build_process(settings), [], []
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for clean in some_images(scheduler, images, settings.prior_images):
            mean, log_variance = (moment.float().cpu() for moment in network.encode(clean.to(network.device)))
            means.append(mean)
            codes.append(network.sample_latents(mean, log_variance, generator))
    active = torch.nonzero(torch.cat(means).var(0) > ACTIVE).flatten()
    if len(active) < 1:
        raise ValueError(
            f"recon_std={settings.recon_std}: after this training the autoencoder uses none of its latents; expected "
            "another output_dir with more autoencoder_steps or minutes, a smaller recon_std or prior='normal'"
        )
    codes = torch.cat(codes)[:, active].double().numpy()
    components = int(np.clip(len(codes) // (8 * len(active)), 1, settings.prior_components))
    mixture = GaussianMixture(components, reg_covar=RIDGE, max_iter=50, random_state=settings.seed).fit(codes)
    network.set_prior(
        torch.from_numpy(mixture.weights_),
        torch.from_numpy(mixture.means_),
        torch.from_numpy(mixture.covariances_),
        active,
    )
    print(
        f"prior: {components} Gaussians on {len(active)} of {network.config.latent_dim} latents in use, "
        f"{len(codes)} images, {mixture.score(codes):.2f} nats an image",
        flush=True,
    )


def preview_autoencoder(
    settings: PixelAwareSettings, network: "ScaleAutoencoder", images: "ImageLevels", path: Path
) -> dict[str, float]:
    """Rows of images and their structures, clean and from the middle of the noise process."""
    import torch

    from pyrdiff.training.previews import save_grid

    scheduler = build_process(settings)
    clean = next(some_images(scheduler, images, settings.eval_batch_size)).to(network.device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(settings.seed)).to(clean)
    rows, values = [clean], {}
    with torch.no_grad():
        for timestep in (0, len(scheduler) // 2):
            noisy = scheduler.add_noise(clean, noise, timestep) if timestep else clean
            structure = network(noisy, timestep).structure.float()
            target = scheduler.image_scale(clean) if settings.mode == "paper" else clean
            values[f"error_{timestep}"] = (structure - target).square().mean().sqrt().item()
            rows.append(structure)
    save_grid([in_pictures(scheduler, row) for row in rows], path)
    return values


AUTOENCODER = Method(
    name="autoencoder",
    summary="The structure of an image, and a prior of its latent.",
    settings=PixelAwareSettings,
    model=build_autoencoder,
    scheduler=lambda settings, images: build_process(settings),
    loss=autoencoder_loss,
    pipeline=lambda settings, network, scheduler, images: network,
    preview=preview_autoencoder,
    finish=finish_autoencoder,
)


def first(settings: PixelAwareSettings) -> tuple[Method, PixelAwareSettings] | None:
    """The autoencoder's training, with its share of the budget."""
    if not settings.use_structure:
        return None
    minutes = settings.minutes and settings.minutes * settings.autoencoder_share
    resume = "none" if settings.resume_from_checkpoint == "none" else "latest"
    changes = dict(max_train_steps=settings.autoencoder_steps, minutes=minutes, resume_from_checkpoint=resume)
    return AUTOENCODER, replace(settings, **changes)
