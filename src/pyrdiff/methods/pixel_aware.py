"""Pixel-aware diffusion (paper X): a small VAE gives the structure that sets each pixel's rate; one call, one image."""

from dataclasses import dataclass, replace
from typing import Literal

from pyrdiff.plugins import Method
from pyrdiff.training.settings import TrainingSettings

CLIP = 100.0  # squared errors, in units of their expectation, beyond which the loss is flat
SHORTEST = 0.01  # the earliest time that is trained, as a share of the process; a last step gives the estimate itself
ACTIVE = 0.05  # a latent dimension is in use if its mean has at least this variance over the images
RIDGE = 1e-3  # added to the diagonal of the prior's covariances
NOISY = 0.25  # share of the autoencoder's inputs that are noisy, for restoring
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


# The networks and the noise process.


def build_autoencoder(settings: PixelAwareSettings, channels: int):
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


def build_unet(settings: PixelAwareSettings, channels: int):
    from pyrdiff.models import ParallelTrajectoryUNet2DModel
    from pyrdiff.models.unet_parallel_trajectory import LiteralHead

    overrides = squares(settings)
    if settings.encoder_channels is not None:
        levels = ParallelTrajectoryUNet2DModel.presets[settings.preset].get("attention_levels", ())
        levels = tuple(level for level in levels if level < len(settings.encoder_channels))
        overrides |= {"encoder_channels": settings.encoder_channels, "decoder_channels": None}
        overrides["attention_levels"] = levels
    height, width = (side // overrides.get("patch_size", 1) for side in settings.sizes[0])
    if settings.head == "literal" and height * width > LiteralHead.MAX_PIXELS:
        overrides["head_attention"] = False
    network = ParallelTrajectoryUNet2DModel.from_preset(
        settings.preset,
        image_channels=channels,
        sample_size=sample_size(settings),
        num_train_timesteps=steps_of(settings),
        use_structure=settings.use_structure,
        head=settings.head,
        target="noise" if settings.mode == "paper" else "clean",
        **overrides,
    )
    multiple = network.config.patch_size * 2 ** (len(network.config.encoder_channels) - 1)
    if any(side % multiple for side in settings.sizes[0]):
        raise ValueError(f"resolution={settings.resolution}: expected multiples of {multiple} for this network")
    return network


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


def build_process(settings: PixelAwareSettings, residual_std: float = 0.1):
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


def in_range(scheduler, images):
    """Images in [-1, 1] as the loop gives them, in the process's [epsilon, 1]."""
    return scheduler.to_range((images + 1) / 2)


def some_images(scheduler, images, count: int):
    """Batches [B, C, H, W] in [epsilon, 1] of up to `count` training images, spread over all."""
    from pyrdiff.methods.images import spread_over

    return (in_range(scheduler, batch) for batch in spread_over(images, count, batch_size=256))


# First: the autoencoder and its prior.


def autoencoder_loss(network, scheduler, settings: PixelAwareSettings, batch, draws):
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


def network_config(network):
    """The config of a network, also inside what compiles or distributes it."""
    while not hasattr(network, "config"):
        network = getattr(network, "module", None) or network._orig_mod
    return network.config


def finish_autoencoder(settings: PixelAwareSettings, network, images) -> None:
    """Measures what gradients do not learn: how far images are from their structures, and the prior."""
    if settings.mode == "structure":
        network.register_to_config(residual_std=measure_residual(settings, images, network))
    fit_prior(settings, network, images)


def fit_prior(settings: PixelAwareSettings, network, images) -> None:
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


def preview_autoencoder(settings: PixelAwareSettings, network, images, path) -> dict[str, float]:
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


def in_pictures(scheduler, images):
    """Images [B, C, H, W] in [epsilon, 1] as Pillow images."""
    from pyrdiff.methods.images import as_pictures

    return as_pictures(scheduler.from_range(images).clamp(0, 1))


def first(settings: PixelAwareSettings) -> tuple[Method, PixelAwareSettings] | None:
    """The autoencoder's training, with its share of the budget."""
    if not settings.use_structure:
        return None
    minutes = settings.minutes and settings.minutes * settings.autoencoder_share
    resume = "none" if settings.resume_from_checkpoint == "none" else "latest"
    changes = dict(max_train_steps=settings.autoencoder_steps, minutes=minutes, resume_from_checkpoint=resume)
    return AUTOENCODER, replace(settings, **changes)


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


# Then: the network.


def build_scheduler(settings: PixelAwareSettings, images, given=None):
    """The noise process, with the spread of images about their structures."""
    if settings.mode == "paper":
        return build_process(settings)
    known = None if given is None else given.config.residual_std
    return build_process(settings, measure_residual(settings, images, given) if known is None else known)


def measure_residual(settings: PixelAwareSettings, images, given=None) -> float:
    """The RMS of image minus structure of up to 2048 images, to 3 digits."""
    import torch

    scheduler = build_process(settings)
    generator, total, count = torch.Generator().manual_seed(settings.seed), 0.0, 0
    for clean in some_images(scheduler, images, 2048):
        noise = torch.randn(len(clean), given.config.latent_dim, generator=generator) if given is not None else None
        structure = structure_of(given, clean if given is None else clean.to(given.device), noise)
        total, count = total + (clean - structure.cpu()).double().square().sum().item(), count + clean.numel()
    return float(f"{(total / count) ** 0.5:.3g}")


def structure_of(autoencoder, clean, noise):
    """s_0 of images [B, C, H, W] in [epsilon, 1], decoded from a draw of q(z | x_0) by `noise` [B, Z]."""
    import torch

    if autoencoder is None:
        return torch.full_like(clean, GRAY)
    with torch.no_grad():
        mean, log_variance = (moment.float() for moment in autoencoder.encode(clean))
        latents = mean + (log_variance / 2).exp() * noise.to(mean.device)
        return autoencoder.decode(latents).float()


def loss(network, scheduler, settings: PixelAwareSettings, batch, draws, given=None):
    """
    Mode "structure": the error of the preconditioned clean estimate at a time between steps, and for the head "literal"
    that of its noises. Mode "paper": eq. 15, with the image scale that the autoencoder estimates.
    """
    clean, total = in_range(scheduler, batch.images), len(scheduler)
    noise = draws.normal(*clean.shape)
    if settings.mode == "paper":
        return paper_loss(network, scheduler, settings, clean, noise, draws, given)
    codes = None if given is None else draws.normal(len(clean), given.config.latent_dim)
    structure = structure_of(given, clean, codes)
    timesteps = total * (SHORTEST + (1 - SHORTEST) * draws.uniform(len(clean)))
    noisy = scheduler.add_noise(clean, noise, timesteps, structure)
    network_input, skip, scale = scheduler.precondition(noisy, timesteps, structure)
    steps = None if settings.head == "tied" else head_steps(settings, total, draws)
    arguments = {"structure": structure} if settings.use_structure else {}
    output = network(network_input, timesteps, steps=steps, **arguments)
    value = (output.sample.float() - (clean - skip) / scale).square().clamp(max=CLIP).mean()
    if steps is not None:
        value = value + head_loss(scheduler, output.noises, noisy, clean, timesteps, steps, structure)
    return value


def paper_loss(network, scheduler, settings: PixelAwareSettings, clean, noise, draws, given):
    """Eq. 15 at whole steps, for images [B, C, H, W] in [epsilon, 1]."""
    import torch

    timesteps = 1 + draws.integers(len(scheduler), len(clean))
    noisy = scheduler.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        scale = given(noisy, timesteps).structure.float()
    steps = head_steps(settings, len(scheduler), draws)
    output = network(noisy, timesteps, structure=scale, steps=steps)
    return head_loss(scheduler, output.noises, noisy, clean, timesteps, steps, None)


def head_steps(settings: PixelAwareSettings, total: int, draws) -> list[int]:
    """Different steps j, the same in every process."""
    count = min(settings.head_steps, total)
    return [1 + draws.choice(range(k * total // count, (k + 1) * total // count)) for k in range(count)]


def head_loss(scheduler, noises, noisy, clean, timesteps, steps, structure):
    """
    Eq. 15 with the noise at j replaced by its expectation given the sample and the image. The minimiser and the
    expected gradient are the same, the variance is smaller, and no path needs to be drawn. It is twice the mean over
    all steps, since about half of them are masked (j > i).
    """
    target = scheduler.tied_noise(noisy, clean, timesteps, steps, structure)
    kept = timesteps[None] >= timesteps.new_tensor(steps)[:, None]
    return 2 * ((noises.float() - target).square() * kept[:, :, None, None, None]).mean()


def build_pipeline(settings: PixelAwareSettings, network, scheduler, images, given=None):
    from pyrdiff.pipelines import ParallelTrajectoryPipeline

    return ParallelTrajectoryPipeline(network, given, scheduler)


def preview(settings: PixelAwareSettings, pipeline, images, path, given=None) -> dict[str, float]:
    """Rows of structures and of samples by 1, 2, 4 and 8 passes; in mode "paper" what algorithm 1 makes of images."""
    from pyrdiff.methods.images import generators
    from pyrdiff.training.previews import save_grid

    count = settings.eval_batch_size
    pipeline.set_progress_bar_config(disable=True)
    if settings.mode == "paper":
        rows = _paper_rows(settings, pipeline, next(some_images(pipeline.scheduler, images, count)))
    else:
        numbers = [passes for passes in (1, 2, 4, 8) if passes <= len(pipeline.scheduler)]
        outputs = [pipeline(count, num_passes=n, generator=generators(settings.seed, count)) for n in numbers]
        rows = [output.images for output in outputs]
        rows = [outputs[0].structure, *rows] if settings.use_structure else rows
    pipeline.set_progress_bar_config(disable=False)
    save_grid(rows, path)
    return {}


def _paper_rows(settings: PixelAwareSettings, pipeline, clean) -> list[list]:
    """The images, and the estimated structures and results of algorithm 1 from T / 10 and from T."""
    import torch

    from pyrdiff.methods.images import generators

    scheduler, rows = pipeline.scheduler, [clean]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(settings.seed))
    for timestep in (max(1, len(scheduler) // 10), len(scheduler)):
        noisy = scheduler.add_noise(clean, noise, timestep)
        seeded = generators(settings.seed, len(clean))
        output = pipeline(image=noisy, timestep=timestep, generator=seeded, output_type="latent")
        rows += [output.structure.cpu(), output.images.cpu()]
    return [in_pictures(scheduler, row) for row in rows]


def classes() -> tuple[type, ...]:
    from pyrdiff.models import ParallelTrajectoryUNet2DModel, ScaleAutoencoder
    from pyrdiff.pipelines import ParallelTrajectoryPipeline
    from pyrdiff.schedulers import PixelAwareScheduler

    return ParallelTrajectoryPipeline, ParallelTrajectoryUNet2DModel, PixelAwareScheduler, ScaleAutoencoder


METHOD = Method(
    name="pixel_aware",
    summary="Pixel-aware diffusion: train an autoencoder of structures and a network that generates in one call.",
    settings=PixelAwareSettings,
    model=build_unet,
    scheduler=build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=preview,
    first=first,
    classes=classes,
    limits=(
        "It draws images of one size and of the kind that it was trained on, without a prompt; they are "
        "smooth, and many passes leave a grain."
    ),
)
