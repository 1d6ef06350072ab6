"""What networks trained for the pixel-aware noise process make of its noise: the learned parts of the bench."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from process_measures import EPSILON, mean_square, normals, per_image, processes, seeded

from pyrdiff.metrics import ssim
from pyrdiff.training.previews import save_grid

SCALES_AT = (20, 4, 2, 1)  # T is divided by these
RECONSTRUCTED_AT = (1, 2, 4, 10, 40)
STRIP = 12  # steps of a strip


# Learned scales (fig. 3 and 5, appendix F).


def noisy_images(process, clean, step: int, seed: int):
    """x_i, the rates following the images: what the paper's forward process gives, and the autoencoders saw."""
    return process.add_noise(clean, normals(clean.shape, seed), step)


def estimated(pipeline, noisy, step: int, batch_size: int):
    """The brightness that the autoencoder's output stands for; of a scale, the solution of eq. 7, not clipped."""
    network, config, found = pipeline.autoencoder, pipeline.scheduler.config, []
    with torch.no_grad():
        for part in noisy.split(batch_size):
            output = network(part.to(network.device, network.dtype), step).structure.float().cpu()
            if network.config.output == "scale":
                output = -output.clamp(min=torch.finfo(torch.float32).tiny).log() / config.gamma - config.floor
            found.append(output)
    return torch.cat(found)


def scales(pipelines: dict, images, options) -> dict:
    rows = []
    fit, held = images[: -options.held_images], images[-options.held_images :]
    for name, pipeline in pipelines.items():
        process, network = pipeline.scheduler, pipeline.autoencoder
        for part in SCALES_AT:
            step = max(1, len(process) // part)
            noisy = noisy_images(process, held, step, options.seed + 2)
            true, found = views_of(process, held, step), {}
            found[name] = views_of(process, estimated(pipeline, noisy, step, options.batch_size), step)
            constant = {key: value.mean(0, keepdim=True) for key, value in views_of(process, fit, step).items()}
            found["constant"] = {key: value.expand_as(held) for key, value in constant.items()}
            row = {"model": name, "output": network.config.output, "step": step, "steps": len(process)}
            for key, estimate in found.items():
                row["found" if key == name else "constant"] = {
                    what: compared(estimate[what], true[what]) for what in true
                }
            rows.append(row)
            print(f"{name}, i = {step}: SSIM of x_delta {row['found']['scale']['ssim']:.3f}", flush=True)
    return {"rows": rows}


def views_of(process, brightness, step: int) -> dict:
    """An image, its x_delta (eq. 7, without floor) and its alpha_bar_i, each in [0, 1]."""
    config = process.config
    return {
        "clean": brightness.clamp(config.epsilon, 1),
        "scale": (-config.gamma * brightness).exp().clamp(0, 1),
        "alpha_bar": process.log_alpha_bar(process.rate(brightness), step).exp().clamp(0, 1),
    }


def compared(found, true) -> dict:

    both = torch.stack((found.flatten(), true.flatten())).double()
    correlation = torch.corrcoef(both)[0, 1].item() if (both.std(1) > 0).all() else None
    similarity = ssim(found.contiguous(), true, data_range=(0, 1)).value
    return {"mse": mean_square(found - true), "ssim": similarity, "correlation": correlation}


# Learned reconstruction.


def reconstruction(pipelines: dict, images, options) -> dict:
    rows, clean = [], images[-options.recon_images :]
    for name, pipeline in pipelines.items():
        process = pipeline.scheduler
        arms = {"paper": {"algorithm 1, eta 1": {"eta": 1.0}, "algorithm 1, eta 0": {"eta": 0.0}}}
        arms["structure"] = {"1 pass": {"num_passes": 1}, "4 passes": {"num_passes": 4}}
        arms = {"autoencoder alone": {}, **arms[process.config.mode]}
        rows += [{"model": name, "name": arm, "errors": []} for arm in arms]
        for part in RECONSTRUCTED_AT:
            step = max(1, len(process) // part)
            noisy = noisy_images(process, clean, step, options.seed + 3)
            for row, arguments in zip(rows[-len(arms) :], arms.values(), strict=True):
                raw, clipped = reconstructed(pipeline, noisy, step, arguments, options)
                error = {"step": step, "raw": mean_square(raw - clean)}
                row["errors"].append({**error, "clipped": mean_square(clipped.clamp(0, 1) - clean)})
            print(f"{name}, from i = {step}: done", flush=True)
    constant = mean_square(images[: -options.held_images].mean(0, keepdim=True) - clean)
    return {"images": len(clean), "constant_mse": constant, "rows": rows}


def reconstructed(pipeline, noisy, step: int, arguments: dict, options) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 as it comes, and with each of several passes clipped. Without arguments it is the autoencoder's."""
    if not arguments:
        found = estimated(pipeline, noisy, step, options.batch_size)
        return found, found
    passes = min(arguments.get("num_passes", 1), step)
    given = {**arguments, "num_passes": passes, "mode": pipeline.scheduler.config.mode}
    raw = restore(pipeline, noisy, step, options, clip_sample=False, **given)
    return raw, raw if passes == 1 else restore(pipeline, noisy, step, options, clip_sample=True, **given)


def restore(pipeline, noisy, step: int, options, **arguments):
    """What a pipeline makes of x_i, in the scheduler's range."""
    found, generators = [], per_image(options.seed, len(noisy))
    for first in range(0, len(noisy), options.batch_size):
        part = slice(first, first + options.batch_size)
        output = pipeline(
            image=noisy[part], timestep=step, generator=generators[part], output_type="latent", **arguments
        )
        found.append(output.images.float().cpu())
    return torch.cat(found)


# Strips (fig. 7 to 10).


def draw_strips(pipeline, images, options) -> None:
    """
    For each of two images: one chain of the paper's process, of the shipped one and of DDPM, all at the same fractions
    of the process; and with a structure model its way back from noise about that image's structure.
    """
    rows, places = [], range(1, STRIP + 1)
    shown = {name: processes()[name] for name in ("paper, T=200", "shipped, T=200", "DDPM, T=500")}

    def pictures(states):
        states = ((torch.cat(states) - EPSILON) / (1 - EPSILON)).clamp(0, 1)
        return DiffusionPipeline.numpy_to_pil(states.permute(0, 2, 3, 1).numpy())

    for index, image in enumerate(images[-2:].split(1)):
        for steps, alpha_bar in shown.values():
            draws, states, kept = seeded(options.seed + index), [image], torch.ones_like(image)
            for place in places:
                now = alpha_bar(image, round(place * steps / STRIP))
                white = torch.randn(image.shape, generator=draws)
                states.append((now / kept).sqrt() * states[-1] + (1 - now / kept).clamp(min=0).sqrt() * white)
                kept = now
            rows.append(pictures(states))
        if pipeline is not None:
            total = len(pipeline.scheduler)
            steps = sorted({max(1, round(place * total / STRIP)) for place in places})
            output = pipeline(
                image=pipeline.scheduler.from_range(image),
                timestep=0,
                num_passes=min(4, total),
                mode="structure",
                return_trajectory=True,
                trajectory_steps=steps,
                generator=seeded(options.seed + index),
                output_type="pt",
            )
            states = [state.cpu() for state in [*output.trajectory, output.images]]
            rows.append(DiffusionPipeline.numpy_to_pil(torch.cat(states).permute(0, 2, 3, 1).float().numpy()))
    path = Path(options.strips)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(rows, path)
