"""The pixel-aware noise process on images, without a network: the parts of the bench that need no model."""

import itertools
import math

import torch
from diffusers import DDPMScheduler
from torch import nn

from pyrdiff import PixelAwareScheduler

PAPER = {"paper, T=200": (200, 20.0), "paper, T=500": (500, 50.0)}  # T and gamma of section 4
EPSILON = 4e-3  # darkest value of an image, that of the paper and of the schedulers
FRACTIONS = [k / 10 for k in range(11)]
DARK = 0.05  # of [0, 1]: up to there a pixel is called dark
FLOORS = (0.0, 0.05, 0.1, 0.25)
LEAKS = ((20.0, 0.0), (50.0, 0.0), (20.0, 0.1), (20.0, 0.25))  # gamma and floor
KNOWN_AT = (1, 2, 4, 10)  # T is divided by these
INACCURACY = 0.01  # standard deviation of an error on every known noise
HIDDEN, LEAK_BATCH = 256, 128


def seeded(seed: int):
    return torch.Generator().manual_seed(seed)


def per_image(seed: int, count: int) -> list:
    """A generator for each image, so that its noise does not depend on the batches."""
    return [seeded(seed * 1_000_000 + index) for index in range(count)]


def normals(shape, seed: int, dtype=None):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def mean_square(values) -> float:
    return values.double().square().mean().item()


def raw_and_clipped(found, truth) -> dict[str, float]:
    """Mean squared errors, also of what a viewer sees."""
    return {"raw": mean_square(found - truth), "clipped": mean_square(found.clamp(0, 1) - truth)}


def paper_process(steps: int = 200, gamma: float = 20.0, floor: float = 0.0):
    return PixelAwareScheduler(steps, gamma, floor=floor, mode="paper")


# Convergence: mean and variance over all pixels (fig. 2).


def processes() -> dict:
    """{name: (T, alpha_bar of images at a step)}; the shipped process follows the image, the best of structures."""

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
                draws = seeded(options.seed + 1)
                reached = walk_back(process, states[time - 1], given[:time], clean, reading, fresh, inaccuracy, draws)
                expected = arm["multiple"] * variance[time] + inaccuracy**2 * power
                arm["errors"].append({**raw_and_clipped(reached, clean), "expected": expected})
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


def walk_back(process, sample, noises, clean, reading: str, fresh: float, inaccuracy: float, draws):
    """Algorithm 1 from x_i with its i noises, each with an error of that standard deviation."""
    for step in range(len(noises), 0, -1):
        noise = noises[step - 1]
        if inaccuracy:
            noise = noise + inaccuracy * torch.randn(noise.shape, generator=draws, dtype=noise.dtype)
        sample = process.step_paper(noise, step, sample, clean, reading, fresh, draws)
    return sample


def terms(process, rate, step: int) -> tuple:
    """alpha_j, 1 - alpha_j, alpha_bar_j, 1 - alpha_bar_j."""
    log, log_before = process.log_alpha_bar(rate, step), process.log_alpha_bar(rate, step - 1)
    return (log - log_before).exp(), -torch.expm1(log - log_before), log.exp(), -torch.expm1(log)


def noises_of_steps(process, rate, noises):
    """epsilon_j of eq. 2 of a path, [T, ...], from its noises of eq. 3."""
    found, before = [], torch.zeros_like(noises[0])
    for step, noise in enumerate(noises, start=1):
        alpha, beta, _, rest = terms(process, rate, step)
        found.append((rest.sqrt() * noise - alpha.sqrt() * before) / beta.sqrt())
        before = rest.sqrt() * noise
    return torch.stack(found)


def optimal(process, rate, clean, sample, time: int, reading: str):
    """What a perfect network predicts that knows the image and x_i: the expected noises, [i, ...]."""
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
