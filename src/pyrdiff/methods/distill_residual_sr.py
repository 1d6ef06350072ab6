"""Distillation of SR4 and SR3: one call or two, from the enlarged input with some noise instead of from noise alone."""

import copy

from pyrdiff.methods import sr

JUMP_FROM = 0.5  # of the noise process
LEAST = 31  # side of images for LPIPS


def resolution(teacher) -> list[str]:
    size = teacher.unet.config.sample_size
    return ["x".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)]


def check(settings, teacher) -> None:
    settings._check("model", bool(settings.scale_factor), "a model that names its scale_factors")
    learned = teacher.unet.config.out_channels != teacher.unet.config.image_channels
    settings._check("model", not learned, "a model without a learned variance")


def loss(network, scheduler, settings, batch, draws):
    """The enlarged input is noised (of a residual: nothing is), and one call must find the image."""
    import torch

    from pyrdiff.methods.distill import difference
    from pyrdiff.parts.estimates import CleanEstimate, signal_and_noise
    from pyrdiff.pipelines.pipeline_residual_sr import DiffusedTarget

    images = batch.images
    upsampled = sr.pair(settings, images, draws.choice(settings.scale_factor), draws)
    target = DiffusedTarget.of(scheduler, upsampled)
    again = draws.choice((False, False, False, True))
    time = torch.tensor(settings.jumps[again])
    estimate = CleanEstimate.at(scheduler, *signal_and_noise(scheduler, time))
    start = target.diffused(images if again else upsampled)
    noisy = estimate.signal * start + estimate.noise * draws.normal(*images.shape)
    level = torch.full((len(images),), estimate.signal, device=images.device)
    output = network(noisy, level, upsampled, return_dict=False)[0].float()
    return difference(settings, target.compose(estimate.clean(noisy, output)), images)


def pipeline(settings, teacher, network, scheduler):
    from pyrdiff.pipelines import ResidualSRPipeline

    return ResidualSRPipeline(network, scheduler, plans=plans(settings, teacher))


def plans(settings, teacher) -> dict[str, dict]:
    """Plans "one" and "two"; "one" is also what a call without a plan takes."""
    first, second = settings.jumps
    strength = (first + 1) / teacher.scheduler.config.num_train_timesteps
    solver = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}]
    one = {"spacing": [first], "strength": strength, "scheduler": solver}
    return {"default": one, "one": one, "two": {**one, "spacing": [first, second]}}


def preview(settings, pipeline, images, path) -> dict[str, float]:
    if settings.lpips_weight == 0 or min(settings.sizes[0]) < LEAST:  # LPIPS need not be there, or sees nothing
        settings = copy.copy(settings)
        settings.lpips_network = None
    return sr.preview(settings, pipeline, images, path)
