"""Distillation of pyramids: above the lowest level, one call or two instead of many."""

from pyrdiff.methods import pddpm

JUMP_FROM = 0.285  # of the noise process, as plans begin a level


def resolution(teacher) -> list[str]:
    sizes = teacher.unet.config.get("resolutions") or [teacher.unet.config.sample_size]
    return ["x".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size) for size in sizes]


def check(settings, teacher) -> None:
    settings._check("model", len(settings.sizes) > 1, "a pyramid of 2 levels or more: the lowest keeps its calls")
    settings._check("patch_size", settings.patch_size is None, "none: whole images are drawn")
    window = teacher.unet.config.get("noise_window", 1.0)
    steps = teacher.scheduler.config.num_train_timesteps
    settings._check("jump_from", settings.jumps[0] <= window * steps, f"at most {window}, the model's noise_window")


def loss(network, scheduler, settings, batch, draws):
    """
    At the lowest level the loss of the teacher's training. Above, the level below of real images is enlarged and noised
    up to where a level begins, and one call must find the images.
    """
    import torch
    import torch.nn.functional as F

    from pyrdiff.methods.distill import difference
    from pyrdiff.parts.estimates import CleanEstimate, signal_and_noise
    from pyrdiff.parts.wrappers import plain
    from pyrdiff.training.losses import noise_prediction_loss

    images, told = batch.images, {}
    if batch.labels is not None:
        untold = draws.uniform(len(batch.labels)) < pddpm.PyramidalSettings.label_dropout
        told["class_labels"] = batch.labels.masked_fill(untold, plain(network).config.num_class_embeds - 1)

    def predict(noisy, timesteps):
        return network(noisy, timesteps, **told, return_dict=False)[0]

    if batch.level == 0:
        return noise_prediction_loss(predict, scheduler, images, draws)
    first, second = settings.jumps
    again = batch.level == len(settings.sizes) - 1 and draws.choice((False, False, False, True))
    start = images
    if not again:
        below = F.interpolate(images, settings.sizes[batch.level - 1], mode="bicubic", antialias=True)
        start = F.interpolate(below, images.shape[-2:], mode="bicubic", align_corners=False)
    time = second if again else first
    estimate = CleanEstimate.at(scheduler, *signal_and_noise(scheduler, torch.tensor(time)))
    noisy = estimate.signal * start + estimate.noise * draws.normal(*images.shape)
    output = predict(noisy, torch.full((len(images),), time, device=images.device)).float()
    return difference(settings, estimate.clean(noisy, output), images)


def pipeline(settings, teacher, network, scheduler):
    """The teacher's lowest level, and above it the jumps."""
    from pyrdiff.pipelines import PyramidalPipeline

    return PyramidalPipeline(network, scheduler, plans=plans(settings, teacher), colors=teacher.config.colors)


def plans(settings, teacher) -> dict[str, dict]:
    """Plan "one" has one call at each level above the lowest; "two" has two at the top, where details are drawn."""
    named = teacher.config.plans or {}
    low = teacher.lay_out("balanced" if "balanced" in named else next(iter(named), None))[0]
    first, second = settings.jumps
    higher = [[first]] * (len(settings.sizes) - 1)
    chosen = named.get("balanced", {})
    shared = {
        "start_strength": low.strength,
        "scheduler": chosen.get("scheduler", pddpm.plans()["balanced"]["scheduler"]),
    }
    times = [int(time) for time in low.steps.times]
    return {
        "one": {"spacing": [times, *higher], **shared},
        "two": {"spacing": [times, *higher[:-1], [first, second]], **shared},
    }


def preview(settings, pipeline, images, path) -> dict[str, float]:
    return pddpm.preview(settings, pipeline, images, path)
