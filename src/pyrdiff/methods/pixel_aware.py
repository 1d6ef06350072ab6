"""Pixel-aware diffusion (paper X): a small VAE gives the structure that sets each pixel's rate; one call, one image."""

from pathlib import Path
from typing import TYPE_CHECKING

from pyrdiff.methods.pixel_aware_autoencoder import first
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
    structure_of,
)
from pyrdiff.plugins import Method

if TYPE_CHECKING:
    import torch

    from pyrdiff.data import ImageLevels
    from pyrdiff.models import ParallelTrajectoryUNet2DModel, ScaleAutoencoder
    from pyrdiff.pipelines import ParallelTrajectoryPipeline
    from pyrdiff.schedulers import PixelAwareScheduler
    from pyrdiff.training.loop import DeviceBatch
    from pyrdiff.training.losses import Draws

CLIP = 100.0  # squared errors, in units of their expectation, beyond which the loss is flat
SHORTEST = 0.01  # the earliest time that is trained, as a share of the process; a last step gives the estimate itself


def build_unet(settings: PixelAwareSettings, channels: int) -> "ParallelTrajectoryUNet2DModel":
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


def build_scheduler(
    settings: PixelAwareSettings, images: "ImageLevels", given: "ScaleAutoencoder | None" = None
) -> "PixelAwareScheduler":
    """The noise process, with the spread of images about their structures."""
    if settings.mode == "paper":
        return build_process(settings)
    known = None if given is None else given.config.residual_std
    return build_process(settings, measure_residual(settings, images, given) if known is None else known)


def loss(
    network: "torch.nn.Module",
    scheduler: "PixelAwareScheduler",
    settings: PixelAwareSettings,
    batch: "DeviceBatch",
    draws: "Draws",
    given: "ScaleAutoencoder | None" = None,
) -> "torch.Tensor":
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


def paper_loss(
    network: "torch.nn.Module",
    scheduler: "PixelAwareScheduler",
    settings: PixelAwareSettings,
    clean: "torch.Tensor",
    noise: "torch.Tensor",
    draws: "Draws",
    given: "ScaleAutoencoder",
) -> "torch.Tensor":
    """Eq. 15 at whole steps, for images [B, C, H, W] in [epsilon, 1]."""
    import torch

    timesteps = 1 + draws.integers(len(scheduler), len(clean))
    noisy = scheduler.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        scale = given(noisy, timesteps).structure.float()
    steps = head_steps(settings, len(scheduler), draws)
    output = network(noisy, timesteps, structure=scale, steps=steps)
    return head_loss(scheduler, output.noises, noisy, clean, timesteps, steps, None)


def head_steps(settings: PixelAwareSettings, total: int, draws: "Draws") -> list[int]:
    """Different steps j, the same in every process."""
    count = min(settings.head_steps, total)
    return [1 + draws.choice(range(k * total // count, (k + 1) * total // count)) for k in range(count)]


def head_loss(
    scheduler: "PixelAwareScheduler",
    noises: "torch.Tensor",
    noisy: "torch.Tensor",
    clean: "torch.Tensor",
    timesteps: "torch.Tensor",
    steps: list[int],
    structure: "torch.Tensor | None",
) -> "torch.Tensor":
    """
    Eq. 15 with the noise at j replaced by its expectation given the sample and the image. The minimiser and the
    expected gradient are the same, the variance is smaller, and no path needs to be drawn. It is twice the mean over
    all steps, since about half of them are masked (j > i).
    """
    import torch

    target = scheduler.tied_noise(noisy, clean, timesteps, steps, structure)
    last = torch.tensor(steps, dtype=timesteps.dtype).to(timesteps.device, non_blocking=True)
    kept = timesteps[None] >= last[:, None]
    return 2 * ((noises.float() - target).square() * kept[:, :, None, None, None]).mean()


def build_pipeline(
    settings: PixelAwareSettings,
    network: "torch.nn.Module",
    scheduler: "PixelAwareScheduler",
    images: "ImageLevels",
    given: "ScaleAutoencoder | None" = None,
) -> "ParallelTrajectoryPipeline":
    from pyrdiff.pipelines import ParallelTrajectoryPipeline

    return ParallelTrajectoryPipeline(network, given, scheduler)


def preview(
    settings: PixelAwareSettings,
    pipeline: "ParallelTrajectoryPipeline",
    images: "ImageLevels",
    path: Path,
    given: "ScaleAutoencoder | None" = None,
) -> dict[str, float]:
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


def _paper_rows(
    settings: PixelAwareSettings, pipeline: "ParallelTrajectoryPipeline", clean: "torch.Tensor"
) -> list[list]:
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
