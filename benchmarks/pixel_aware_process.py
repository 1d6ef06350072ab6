"""
The noise process of paper X (pixel-aware diffusion), as printed and as shipped, measured on images, and what networks
trained for it make of its noise:

    python benchmarks/pixel_aware_process.py --images DATA --size 32 --channels 1 --output OUT.json
    python benchmarks/pixel_aware_process.py ... --paper_model A/pipeline --structure_model B/pipeline --strips OUT.png

Parts: "convergence" (fig. 2), "gap" (what is left of an image at the last step), "known" (algorithm 1 with the exact
noises, appendix B), and with models "scales" (fig. 3 and 5, appendix F) and "reconstruction" (algorithm 1, learned).
The images should be ones that the models have not seen.
"""

import argparse
import itertools
import math
import os
from pathlib import Path

import report
import residual_sr
import scoring

PARTS = ("convergence", "gap", "known", "scales", "reconstruction")
LEARNED = ("scales", "reconstruction")
PAPER = {"paper, T=200": (200, 20.0), "paper, T=500": (500, 50.0)}  # T and gamma of section 4
EPSILON = 4e-3  # darkest value of an image, that of the paper and of the schedulers
FRACTIONS = [k / 10 for k in range(11)]
DARK = 0.05  # of [0, 1]: up to there a pixel is called dark
FLOORS = (0.0, 0.05, 0.1, 0.25)
LEAKS = ((20.0, 0.0), (50.0, 0.0), (20.0, 0.1), (20.0, 0.25))  # gamma and floor
KNOWN_AT = (1, 2, 4, 10)  # T is divided by these
SCALES_AT = (20, 4, 2, 1)
RECONSTRUCTED_AT = (1, 2, 4, 10, 40)
INACCURACY = 0.01  # standard deviation of an error on every known noise
HIDDEN, LEAK_BATCH = 256, 128
STRIP = 12  # steps of a strip


def seeded(seed: int):
    import torch

    return torch.Generator().manual_seed(seed)


def per_image(seed: int, count: int) -> list:
    """A generator for each image, so that its noise does not depend on the batches."""
    return [seeded(seed * 1_000_000 + index) for index in range(count)]


def normals(shape, seed: int, dtype=None):
    import torch

    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def mean_square(values) -> float:
    return values.double().square().mean().item()


def raw_and_clipped(found, truth) -> dict[str, float]:
    """Mean squared errors, also of what a viewer sees."""
    return {"raw": mean_square(found - truth), "clipped": mean_square(found.clamp(0, 1) - truth)}


def paper_process(steps: int = 200, gamma: float = 20.0, floor: float = 0.0):
    from pyrdiff import PixelAwareScheduler

    return PixelAwareScheduler(steps, gamma, floor=floor, mode="paper")


# Convergence: mean and variance over all pixels (fig. 2).


def processes() -> dict:
    """{name: (T, alpha_bar of images at a step)}; the shipped process follows the image, the best of structures."""
    import torch
    from diffusers import DDPMScheduler

    from pyrdiff import PixelAwareScheduler

    def pixel_aware(scheduler):
        return len(scheduler), lambda x, i: scheduler.log_alpha_bar(scheduler.rate(x), i).exp()

    def ddpm(steps):
        products = DDPMScheduler(steps, 1e-4, 0.02, beta_schedule="linear").alphas_cumprod
        return steps, lambda x, i: torch.full_like(x, products[i - 1].item() if i else 1.0)

    found = {name: pixel_aware(paper_process(*settings)) for name, settings in PAPER.items()}
    found["shipped, T=200"] = pixel_aware(PixelAwareScheduler())
    return {**found, "DDPM, T=500": ddpm(500), "DDPM, T=1000": ddpm(1000)}


def convergence(images, options) -> dict:
    """Of x_i at fractions of the process: measured with drawn noise, and in closed form; and dark pixels' at i = T."""
    dark, rows = images <= images.new_tensor(DARK * (1 - EPSILON) + EPSILON), []
    for index, (name, (steps, alpha_bar)) in enumerate(processes().items()):
        row = {"name": name, "steps": steps, "mean": [], "variance": [], "expected_mean": [], "expected_variance": []}
        for place, fraction in enumerate(FRACTIONS):
            kept = alpha_bar(images, round(fraction * steps)).clamp(max=1)
            noisy = kept.sqrt() * images + (1 - kept).sqrt() * normals(images.shape, options.seed + 100 * index + place)
            exact = (kept.sqrt() * images).double()
            row["mean"].append(noisy.double().mean().item())
            row["variance"].append(noisy.double().var().item())
            row["expected_mean"].append(exact.mean().item())
            row["expected_variance"].append((exact.square() + 1 - kept).mean().item() - exact.mean().item() ** 2)
        row["dark_variance"] = noisy[dark].double().var().item() if dark.sum() > 1 else None
        row["darkest_keeps"] = kept[images == images.amin()][0].item()
        rows.append(row)
    return {"fractions": FRACTIONS, "dark": dark.double().mean().item(), "darkest": images.amin().item(), "rows": rows}


# The gap: how far the last step is from pure noise, and what a network reads in it.


def gap(images, options) -> dict:
    rows = []
    for gamma in (20.0, 50.0):
        needed = floor_needed(images, gamma)
        for floor in FLOORS:
            process = paper_process(gamma=gamma, floor=floor)
            nats = information(process, images)
            rows.append(
                {
                    "gamma": gamma,
                    "floor": floor,
                    **process.prior_gap_report(images),
                    "information_per_pixel": nats,
                    "information_per_image": nats * images[0].numel(),
                    "floor_needed": needed,
                }
            )
    return {"rows": rows, "leak": leak(images, options)}


def information(process, images) -> float:
    """
    Mutual information of x_0 and x_T in nats a pixel, if pixels were independent: the entropy of the mixture of all
    values' x_T, less the mean of their own. The shares of the values are those of a histogram of 256 levels.
    """
    import torch

    scaled = (process.from_range(images.double()) * 255).round().long()
    share = torch.bincount(scaled.flatten(), minlength=256).double() / scaled.numel()
    values, share = process.to_range(torch.linspace(0, 1, 256, dtype=torch.float64))[share > 0], share[share > 0]
    left = process.image_scale(values)
    variance = -torch.expm1(left.log())
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    distance = (grid[:, None] - left.sqrt() * values).square() / variance
    density = (share * (-0.5 * distance).exp() / (2 * math.pi * variance).sqrt()).sum(1)
    entropy = -torch.special.xlogy(density, density).sum() * (grid[1] - grid[0])
    own = (share * 0.5 * (2 * math.pi * math.e * variance).log()).sum()
    return (entropy - own).clamp(min=0).item()


def floor_needed(images, gamma: float, tolerance: float = 1e-3) -> float:
    """The least floor with which the KL a pixel is within the tolerance, to 6 digits; at most 0.5."""

    def open_at(floor: float) -> bool:
        return paper_process(gamma=gamma, floor=floor).prior_gap_report(images)["kl_per_pixel"] > tolerance

    if not open_at(0.0):
        return 0.0
    low, high = 0.0, 0.5
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if open_at(middle) else (low, middle)
    return high


def leak(images, options) -> dict:
    """Error of a small network's estimate of the image from x_T alone, against that of the mean image."""
    fit, held = images[: -options.held_images], images[-options.held_images :]
    mean, rows = fit.mean(0, keepdim=True), []
    for gamma, floor in LEAKS:
        process = paper_process(gamma=gamma, floor=floor)
        estimate = fit_reader(process, fit, mean, options)
        noisy = process.add_noise(held, normals(held.shape, options.seed + 1), len(process))
        error = mean_square(estimate(noisy) - held)
        rows.append({"gamma": gamma, "floor": floor, "mse": error, "share": error / mean_square(mean - held)})
        print(f"leak at gamma {gamma:g}, floor {floor:g}: {rows[-1]['share']:.1%} of the error", flush=True)
    return {"constant_mse": mean_square(mean - held), "fit_images": len(fit), "steps": options.leak_steps, "rows": rows}


def fit_reader(process, images, mean, options):
    """A function of x_T, trained to give x_0: two hidden layers on x_T and |x_T|. Untrained, it is the mean image."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        pixels = mean.numel()
        network = nn.Sequential(
            nn.Linear(2 * pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, pixels)
        )
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)

    def estimate(noisy):
        flat = noisy.flatten(1)
        inputs = torch.cat((flat, flat.abs() - math.sqrt(2 / math.pi)), 1)
        return mean + network(inputs).reshape(noisy.shape)

    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.leak_steps)
    draws, total = seeded(options.seed), len(process)
    for _ in range(options.leak_steps):
        clean = images[torch.randint(len(images), (LEAK_BATCH,), generator=draws)]
        noisy = process.add_noise(clean, torch.randn(clean.shape, generator=draws), total)
        loss = (estimate(noisy) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return torch.no_grad()(estimate)


# Known noises: algorithm 1 where nothing is learned (appendix B).


def known(images, options) -> dict:
    """Errors of algorithm 1 with the exact image scale, in float64, and their expectation given the images."""
    import torch

    process, clean = paper_process(), images[-options.known_images :].double()
    rate, total = process.rate(clean), len(process)
    states, noises = process.sample_path(clean, range(1, total + 1), generator=seeded(options.seed))
    single = noises_of_steps(process, rate, noises)
    times = [total // part for part in KNOWN_AT]
    variance = {time: process.fresh_variance(rate, time).mean().item() for time in times}
    rows = []
    for source, reading in itertools.product(("of the path", "optimal"), "AB"):
        arms = [
            {"source": source, "reading": reading, "fresh": fresh, "inaccuracy": inaccuracy, "errors": []}
            for fresh in (1.0, 0.0)
            for inaccuracy in (0.0, INACCURACY)
        ]
        for time in times:
            given = noises if reading == "A" else single
            if source == "optimal":
                given = optimal(process, rate, clean, states[time - 1], time, reading)
            power = power_of_weights(process, rate, time, reading)
            for arm in arms:
                fresh, inaccuracy = arm["fresh"], arm["inaccuracy"]
                # A: the innovations of the path itself are never taken back; fresh noise comes on top of them.
                arm["multiple"] = fresh + (source == "of the path" and reading == "A")
                found, draws = states[time - 1], seeded(options.seed + 1)
                for step in range(time, 0, -1):
                    noise = given[step - 1]
                    if inaccuracy:
                        noise = noise + inaccuracy * torch.randn(noise.shape, generator=draws, dtype=noise.dtype)
                    found = process.step_paper(noise, step, found, clean, reading, fresh, draws)
                expected = arm["multiple"] * variance[time] + inaccuracy**2 * power
                arm["errors"].append({**raw_and_clipped(found, clean), "expected": expected})
        rows += arms
    return {
        "steps": total,
        "gamma": process.config.gamma,
        "images": len(clean),
        "times": times,
        "variance": [variance[time] for time in times],
        "constant_mse": mean_square(images[: -options.held_images].mean(0, keepdim=True) - clean),
        "rows": rows,
    }


def terms(process, rate, step: int) -> tuple:
    """alpha_j, 1 - alpha_j, alpha_bar_j, 1 - alpha_bar_j."""
    import torch

    log, log_before = process.log_alpha_bar(rate, step), process.log_alpha_bar(rate, step - 1)
    return (log - log_before).exp(), -torch.expm1(log - log_before), log.exp(), -torch.expm1(log)


def noises_of_steps(process, rate, noises):
    """epsilon_j of eq. 2 of a path, [T, ...], from its noises of eq. 3."""
    import torch

    found, before = [], torch.zeros_like(noises[0])
    for step, noise in enumerate(noises, start=1):
        alpha, beta, _, rest = terms(process, rate, step)
        found.append((rest.sqrt() * noise - alpha.sqrt() * before) / beta.sqrt())
        before = rest.sqrt() * noise
    return torch.stack(found)


def optimal(process, rate, clean, sample, time: int, reading: str):
    """What a perfect network predicts that knows the image and x_i: the expected noises, [i, ...]."""
    import torch

    if reading == "A":
        return process.tied_noise(sample, clean, time, range(1, time + 1))
    _, _, kept, rest = terms(process, rate, time)
    noise_part = (sample - kept.sqrt() * clean) / rest
    found = []
    for step in range(1, time + 1):
        _, beta, kept_then, _ = terms(process, rate, step)
        found.append(beta.sqrt() * (kept / kept_then).sqrt() * noise_part)
    return torch.stack(found)


def power_of_weights(process, rate, time: int, reading: str) -> float:
    """Variance at x_0 of independent errors of variance 1 on every Z^j, the mean over pixels."""
    total = 0.0
    for step in range(1, time + 1):
        _, beta, kept, rest = terms(process, rate, step)
        total += ((beta**2 / rest if reading == "A" else beta) / kept).mean().item()
    return total


# Learned scales (fig. 3 and 5, appendix F).


def noisy_images(process, clean, step: int, seed: int):
    """x_i, the rates following the images: what the paper's forward process gives, and the autoencoders saw."""
    return process.add_noise(clean, normals(clean.shape, seed), step)


def estimated(pipeline, noisy, step: int, batch_size: int):
    """The brightness that the autoencoder's output stands for; of a scale, the solution of eq. 7, not clipped."""
    import torch

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
    import torch

    from pyrdiff.metrics import ssim

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
                passes = min(arguments.get("num_passes", 1), step)
                found = clipped = estimated(pipeline, noisy, step, options.batch_size)
                if arguments:
                    given = {**arguments, "num_passes": passes, "mode": process.config.mode}
                    found = clipped = restore(pipeline, noisy, step, options, clip_sample=False, **given)
                    if passes > 1:  # clipped between the passes, too
                        clipped = restore(pipeline, noisy, step, options, clip_sample=True, **given)
                error = {"step": step, "raw": mean_square(found - clean)}
                row["errors"].append({**error, "clipped": mean_square(clipped.clamp(0, 1) - clean)})
            print(f"{name}, from i = {step}: done", flush=True)
    constant = mean_square(images[: -options.held_images].mean(0, keepdim=True) - clean)
    return {"images": len(clean), "constant_mse": constant, "rows": rows}


def restore(pipeline, noisy, step: int, options, **arguments):
    """What a pipeline makes of x_i, in the scheduler's range."""
    import torch

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
    import torch
    from diffusers import DiffusionPipeline

    from pyrdiff.training.previews import save_grid

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


# The run.


def open_images(options):
    """Float [N, C, H, W] in [epsilon, 1], of randomly chosen images, and what they are."""
    import torch

    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.data.sources import Some

    source = open_source(options.images, array_key=options.array_key)
    order = torch.randperm(len(source), generator=seeded(options.seed)).tolist()[: options.count]
    levels = ImageLevels.build(Some(source, order), [options.size], channels=options.channels)
    if len(levels) < 2 * options.held_images:
        raise ValueError(
            f"--held_images {options.held_images}: expected at most half of the {len(levels)} images that are used"
        )
    images = torch.from_numpy(levels.arrays[-1]).permute(0, 3, 1, 2).float() / 255
    images = (EPSILON + (1 - EPSILON) * images).contiguous()
    return images, {"images": len(levels), "of": len(source), "fingerprint": levels.fingerprint}


def open_models(options) -> dict:
    import torch
    from diffusers.utils import logging

    import pyrdiff

    logging.disable_progress_bar()
    found = {}
    for mode, folder in (("paper", options.paper_model), ("structure", options.structure_model)):
        if folder is None:
            continue
        flag, output = f"--{mode}_model {folder}", {"paper": "scale", "structure": "structure"}[mode]
        pipeline = pyrdiff.load(folder)
        if not isinstance(pipeline, pyrdiff.ParallelTrajectoryPipeline):
            raise ValueError(f"{flag}: holds a {type(pipeline).__name__}; expected a ParallelTrajectoryPipeline")
        autoencoder = pipeline.autoencoder
        if pipeline.scheduler.config.mode != mode or autoencoder is None or autoencoder.config.output != output:
            raise ValueError(f"{flag}: expected mode '{mode}', with an autoencoder whose output is '{output}'")
        shape = (autoencoder.config.image_channels, *autoencoder.size)
        wanted = (options.channels, options.size, options.size)
        if shape != wanted:
            raise ValueError(f"{flag}: made for images {list(shape)}; expected those of --channels and --size")
        if pipeline.scheduler.config.epsilon != EPSILON:
            raise ValueError(f"{flag}: has epsilon {pipeline.scheduler.config.epsilon}; expected {EPSILON}")
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        found[mode] = pipeline
    return found


def description(pipeline, folder: str) -> dict:
    process = pipeline.scheduler.config
    return {
        "hash": scoring.model_hash(folder),
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "autoencoder_parameters": sum(p.numel() for p in pipeline.autoencoder.parameters()),
        "head": pipeline.unet.config.head,
        "training": residual_sr.training_of(folder),
        "process": {
            name: process[name]
            for name in ("num_train_timesteps", "gamma", "floor", "ramp_power", "residual_std", "schedule")
        },
    }


def measure(options, images, data: dict, models: dict) -> dict:
    functions = {"convergence": convergence, "gap": gap, "known": known}
    found = {}
    for part in options.parts:
        if part in LEARNED:
            found[part] = {"scales": scales, "reconstruction": reconstruction}[part](models, images, options)
        else:
            found[part] = functions[part](images, options)
        print(f"{part}: done", flush=True)
    if options.strips:
        draw_strips(models.get("structure"), images, options)
    folders = {"paper": options.paper_model, "structure": options.structure_model}
    return {
        "bench": "pixel_aware_process",
        "title": options.title,
        "seed": options.seed,
        "size": options.size,
        "channels": options.channels,
        "held_images": options.held_images,
        "data": data,
        "models": {mode: description(pipeline, folders[mode]) for mode, pipeline in models.items()},
        **report.surroundings(options.threads),
        "parts": found,
    }


# Tables.


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def rows_of(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in body)]


def setting(result: dict) -> str:
    size, data = result["size"], result["data"]
    channels = {1: "gray", 3: "RGB"}[result["channels"]]
    return (
        f"{result['title']} {data['images']} of {data['of']} images, {channels}, {size}x{size}, values in [0.004, 1]. "
        f"Seed {result['seed']}."
    )


def table_of_convergence(result: dict) -> list[str]:
    part = result["parts"]["convergence"]
    off = max(
        abs(got - expected)
        for row in part["rows"]
        for what in ("mean", "variance")
        for got, expected in zip(row[what], row[f"expected_{what}"], strict=True)
    )
    head = ["of the process", *(f"{row['name']}: mean, variance" for row in part["rows"])]
    body = [
        [f"{fraction:g}", *(f"{number(row['mean'][k])}, {number(row['variance'][k])}" for row in part["rows"])]
        for k, fraction in enumerate(part["fractions"])
    ]
    body.append(["dark pixels' variance at the end", *(number(row["dark_variance"]) for row in part["rows"])])
    body.append(["what the darkest keep of theirs", *(number(row["darkest_keeps"]) for row in part["rows"])])
    return [
        f"{setting(result)} Mean and variance of all pixels of x_i, noise drawn (closed forms differ by at most "
        f"{number(off)}); pure noise has 0 and 1. The shipped process (floor 0.1, cubic ramp) follows the image itself "
        f"here. Dark: up to {DARK} of white, {part['dark']:.0%} of all pixels. The last row is alpha_bar_T at the "
        "darkest value: 0 for pure noise.",
        "",
        *rows_of(head, body),
    ]


def table_of_gap(result: dict) -> list[str]:
    part = result["parts"]["gap"]
    found = part["leak"]
    names = ("kl_per_pixel", "kl_per_image", "worst_pixel", "information_per_pixel", "information_per_image")
    body = [[f"{row['gamma']:g}", f"{row['floor']:g}", *(number(row[name]) for name in names)] for row in part["rows"]]
    head = ["gamma", "floor", "KL a pixel", "KL an image", "worst pixel", "information a pixel", "an image"]
    needed = {row["gamma"]: row["floor_needed"] for row in part["rows"]}
    needed = ", ".join(f"{number(value)} at gamma {gamma:g}" for gamma, value in needed.items())
    return [
        f"{setting(result)} Nats between x_T given the image and N(0, I), and of mutual information of x_0 and x_T by "
        f"the histogram of pixel values, as if pixels were independent (for an image: at most). Floor 0 is the "
        f"paper's. 0.001 nats of KL a pixel need a floor of {needed}.",
        "",
        *rows_of(head, body),
        "",
        f"Measured: a network of two hidden layers of {HIDDEN} that is given x_T alone, trained for {found['steps']} "
        f"steps on {found['fit_images']} of the images, on the {result['held_images']} others. 100 % is the error of "
        f"the mean image, {number(found['constant_mse'])}: x_T tells nothing. A better network would read no less.",
        "",
        *rows_of(
            ["gamma", "floor", "squared error of x_0 from x_T", "of the mean image's"],
            [
                [f"{row['gamma']:g}", f"{row['floor']:g}", number(row["mse"]), f"{100 * row['share']:.3g} %"]
                for row in found["rows"]
            ],
        ),
    ]


def table_of_known(result: dict) -> list[str]:
    part = result["parts"]["known"]
    times, body = part["times"], []
    for row in part["rows"]:
        cells = [row["reading"], row["source"], f"{100 * row['inaccuracy']:g} %", "yes" if row["fresh"] else "no"]
        cells.append({0: "0", 1: "V", 2: "2 V"}[int(row["multiple"])] + (" + W" if row["inaccuracy"] else ""))
        errors = row["errors"]
        cells += [f"{number(e['raw'])} ({number(e['expected'])}), {number(e['clipped'])}" for e in errors]
        body.append(cells)
    body.append(["V", *["-"] * 4, *map(number, part["variance"])])
    head = ["reading", "Z", "error of Z", "fresh noise", "theory", *(f"from i = {time}" for time in times)]
    return [
        f"{setting(result)} Algorithm 1 of the paper (T = {part['steps']}, gamma {part['gamma']:g}) on "
        f"{part['images']} of the images with the exact image scale, in float64: squared error of x_0 (expected in "
        "theory), and clipped to [0, 1]. Z is the noise of the very path, or its expectation given x_i and x_0, the "
        "best that a network could predict. Reading A: noises of eq. 3, factor of eq. 4; B: noises of eq. 2, line 9 "
        "as printed. V is the variance that fresh noise of all steps has at x_0, W that of the errors of Z; means over "
        "pixels, dominated by the brightest. "
        f"The mean image has {number(part['constant_mse'])}.",
        "",
        *rows_of(head, body),
    ]


def models_of(result: dict) -> str:
    texts = []
    for mode, model in result["models"].items():
        trained, process = model["training"], model["process"]
        time = f", trained for {trained['steps']} steps, {trained['minutes']:.0f} min" if trained else ""
        texts.append(
            f"{mode}: {(model['parameters'] + model['autoencoder_parameters']) / 1e6:.2g}M parameters{time}, "
            f"T = {process['num_train_timesteps']}, gamma {process['gamma']:g}, floor {process['floor']:g}, ramp "
            f"u^{process['ramp_power']:g}"
        )
    return "; ".join(texts)


def table_of_scales(result: dict) -> list[str]:
    body = []
    for row in result["parts"]["scales"]["rows"]:
        gives = {"scale": "x_delta", "structure": "x_0"}[row["output"]]
        cells = [row["model"], gives, f"{row['step']} of {row['steps']}"]
        for what, names in (
            ("scale", ("ssim", "mse", "correlation")),
            ("alpha_bar", ("ssim",)),
            ("clean", ("ssim", "mse")),
        ):
            cells += [f"{number(row['found'][what][name])} ({number(row['constant'][what][name])})" for name in names]
        body.append(cells)
    head = ["model", "it gives", "from i", "x_delta: SSIM", "squared error", "correlation", "alpha_bar_i: SSIM"]
    head += ["x_0: SSIM", "squared error"]
    return [
        f"{setting(result)} One call of the autoencoder on x_i, the rates following the image, {result['held_images']} "
        "images; in brackets the best constant picture, the mean over other images. x_delta = exp(-gamma x_0); of a "
        "model that gives it, x_0 = -log(x_delta) / gamma, clipped. Each model has its own process, so that the same i "
        f"is less noise on a cubic ramp than on a linear one. {models_of(result)}.",
        "",
        *rows_of(head, body),
    ]


def table_of_reconstruction(result: dict) -> list[str]:
    part, body = result["parts"]["reconstruction"], []
    steps = [f"T/{divisor}" if divisor > 1 else "T" for divisor in RECONSTRUCTED_AT]
    head = ["model", "from x_i by", *(f"i = {step}" for step in steps)]
    for row in part["rows"]:
        cells = [f"{number(error['raw'])}, {number(error['clipped'])}" for error in row["errors"]]
        body.append([row["model"], row["name"], *cells])
    return [
        f"{setting(result)} Squared error of x_0, as it comes and clipped to [0, 1] (with more passes: after each), on "
        f"{part['images']} images whose noise follows the image itself; the mean image has "
        f"{number(part['constant_mse'])}. Each model has its own process: on a cubic ramp x_i has less noise than on a "
        f"linear one, but for i = T. Algorithm 1 in reading A. {models_of(result)}.",
        "",
        *rows_of(head, body),
    ]


def table(result: dict, view: str | None = None) -> str:
    """The table of a part, or all that there are."""
    parts = [part for part in PARTS if part in result["parts"]] if view is None else [view]
    if view is not None and view not in result["parts"]:
        raise ValueError(f"view {view!r}: the result has {sorted(result['parts'])}")
    texts = []
    for part in parts:
        lines = globals()[f"table_of_{part}"](result)
        texts.append("\n".join([f"{lines[0]} {report.caption(result)}", *lines[1:]]))
    return "\n\n".join(texts)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder, .npy, .npz or data set that the models have not seen")
    parser.add_argument("--array_key", help="array of an .npz file")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--count", type=int, default=2000, help="images used, chosen at random")
    parser.add_argument("--held_images", type=int, default=256, help="of them, for what is fitted to the others")
    parser.add_argument("--known_images", type=int, default=32, help="of them, for algorithm 1 with known noises")
    parser.add_argument("--recon_images", type=int, default=64, help="of them, reconstructed by the models")
    parser.add_argument("--leak_steps", type=int, default=600, help="training steps of each network that reads x_T")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="by default all that the models allow")
    parser.add_argument("--paper_model", help="exported pipeline of mode paper")
    parser.add_argument("--structure_model", help="exported pipeline of mode structure")
    parser.add_argument("--strips", help="PNG of forward and reverse strips to write")
    parser.add_argument("--batch_size", type=int, default=32, help="of the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--title", default="Images,", help="what the tables say first")
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    for name in ("size", "held_images", "known_images", "recon_images", "leak_steps", "batch_size", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    for name in ("known_images", "recon_images"):
        if getattr(options, name) > options.held_images:
            parser.error(f"--{name} {getattr(options, name)}: expected at most --held_images {options.held_images}")
    if options.count < 4:
        parser.error(f"--count {options.count}: expected 4 or more")
    if options.strips and Path(options.strips).suffix != ".png":
        parser.error(f"--strips {options.strips}: expected a name that ends in .png")
    learned = bool(options.paper_model or options.structure_model)
    options.parts = [part for part in PARTS if part in (options.parts or PARTS[: None if learned else 3])]
    if set(options.parts) & set(LEARNED) and not learned:
        parser.error(f"--parts {' '.join(options.parts)}: expected --paper_model or --structure_model for {LEARNED}")
    if "scales" in options.parts and options.size < 11:
        parser.error(f"--size {options.size}: expected 11 or more for SSIM, or --parts without scales")
    import torch

    torch.set_num_threads(options.threads)
    try:
        images, data = open_images(options)
        models = open_models(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report.save(measure(options, images, data, models), options.output)


if __name__ == "__main__":
    main()
