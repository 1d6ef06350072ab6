"""
Does the Gaussian calculus rank the plans of a trained network as its Frechet distances do? With a perfect network in
it, with the error that the network makes on held-out images added, and with the gain that it really has:

    python benchmarks/calculus_rank.py --model runs/pddpm/pipeline --train my_images --reference my_test_images \
        --bench benchmarks/results/mine.json --output benchmarks/results/calculus_rank.json
"""

import json
from pathlib import Path

import report
from calculus import Modes, enlarge, half_log_snr, perfect_response, signal_and_noise, step_coefficients
from fitting import level_steps
from flags import parser_of
from samplers import build_scheduler
from spectra import Spectra, radial_covariance

MEMORY = 1.0  # distance in log(a / s) over which the network's error at one call resembles that at another


def respond(network, alphas_cumprod, images, spectra, points: int, seed: int) -> dict:
    """
    What the network does to each colour axis and radius, by noise level: `gain`, the regression of the clean estimate
    on the noisy image; `excess`, its squared error beyond that of the best linear estimate; [points, C, bins] a level.
    """
    import torch

    grid = half_log_snr(alphas_cumprod)
    wanted = torch.linspace(float(grid[-1]), float(grid[0]), points, dtype=torch.float64)
    times = torch.stack([(grid - value).abs().argmin() for value in wanted])
    generator, found = torch.Generator().manual_seed(seed), {"gain": [], "excess": []}

    def power(part):  # on the colour axes, [C, bins]
        covariance = radial_covariance(part.double())
        return torch.einsum("kc,bcd,kd->kb", spectra.colors, covariance, spectra.colors)

    for level, whole in enumerate(images):
        mean, rows = whole.mean(0), {"gain": [], "excess": []}
        for time in times:
            a, s = (part.float() for part in signal_and_noise(grid[time]))
            totals = torch.zeros(3, *spectra.power[level].shape, dtype=torch.float64)
            for part in whole.split(32):
                noisy = a * part + s * torch.randn(part.shape, generator=generator)
                with torch.no_grad():
                    clean = ((noisy - s * network(noisy, int(time)).sample) / a).clamp(-1, 1)
                x, y = noisy - a * mean, clean - mean
                both = (power(x + y) - power(x) - power(y)) / 2  # the real part of the product
                for total, value in zip(totals, (both, power(x), power(clean - part)), strict=True):
                    total += len(part) / len(whole) * value
            product, noisy_power, error = totals
            variance = spectra.power[level]
            best = variance * s**2 / (a**2 * variance + s**2)
            rows["gain"].append(product / noisy_power)
            rows["excess"].append((error - best).clamp(min=0))
        for name in found:
            found[name].append(torch.stack(rows[name]))
        print(f"{whole.shape[-2:]}: measured at {points} noise levels", flush=True)
    return {"log_snr": grid[times], **found}


def run_with_error(levels, gain_at, error_at):
    """`calculus.delivered`, and beside it the variance that the network's error adds, correlated between calls."""
    import torch

    power = error = None
    for index, level in enumerate(levels):
        a, s = signal_and_noise(level.log_snr[0])
        if power is None:
            power = torch.ones_like(gain_at(index, level.log_snr[0]))
            error = torch.zeros_like(power)
        else:
            below = levels[index - 1].size
            power, error = (a**2 * enlarge(part, below, level.size) for part in (power, error))
            power = power + s**2
        zero = torch.zeros_like(power)
        xx, xp, pp = power, zero, zero
        exx, exp, epp, exu, epu = (
            error,
            zero,
            zero,
            zero,
            zero,
        )  # of x, the clean estimate before, the error's own state
        for i, (A, B, C, S) in enumerate(step_coefficients(level.solver, level.log_snr)):
            gain, q = gain_at(index, level.log_snr[i]), error_at(index, level.log_snr[i]).sqrt()
            g = A + B * gain
            xx, xp, pp = g**2 * xx + 2 * g * C * xp + C**2 * pp + S**2, gain * (g * xx + C * xp), gain**2 * xx
            kept = torch.exp((level.log_snr[i - 1] - level.log_snr[i]) / MEMORY) if i else 0.0
            exu, epu = kept * exu, kept * epu
            crossed = g * exu + C * epu + B * q
            exx, exp, epp, exu, epu = (
                g**2 * exx + C**2 * epp + B**2 * q**2 + 2 * (g * C * exp + g * B * q * exu + C * B * q * epu),
                gain * (g * exx + C * exp + B * q * exu) + q * crossed,
                gain**2 * exx + q**2 + 2 * gain * q * exu,
                crossed,
                gain * exu + q,
            )
        power, error = xx, exx
    return power, error


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's."""
    import numpy as np

    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def plans_of(result: dict, pipeline) -> dict[str, tuple]:
    """The scored arms whose solver the calculus knows: name -> (levels, distance, octaves, NFE-eq)."""
    import pyrdiff

    found, alphas = {}, pipeline.scheduler.alphas_cumprod
    for name, arm in result["arms"].items():
        settings, score = arm["settings"], arm.get("score")
        if score is None or settings["loop"] not in ("pyramid", "stock"):
            continue
        schedulers = [part and build_scheduler(part, pipeline.scheduler) for part in settings["changed"]]
        arguments = {key: value for key, value in settings["arguments"].items() if key != "stage_jump"}
        if settings["loop"] == "stock":
            arguments["resolutions"] = [pipeline.plan().levels[-1].size]
        runner = pyrdiff.PyramidalPipeline(pipeline.unet, *schedulers)
        try:
            levels = level_steps(runner.plan(**arguments), schedulers, alphas)
        except ValueError as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        found[name] = (levels, score["frechet"], score["octaves"], arm["nfe_eq"])
    return found


def measure(options) -> dict:
    import torch

    import pyrdiff
    from pyrdiff.data import ImageLevels, open_source

    torch.set_num_threads(options.threads)
    pipeline = pyrdiff.load(options.model)
    config = pipeline.unet.config
    sizes = [level.size for level in pipeline.plan(num_inference_steps=2, refine_steps=2, refine_strength=1.0).levels]
    known = dict(sizes=sizes, channels=config.image_channels)
    spectra = Spectra.of(ImageLevels.build(open_source(options.train, array_key=options.train_key), **known))
    arrays = ImageLevels.build(open_source(options.reference, array_key=options.array_key), **known).arrays
    order = torch.randperm(len(arrays[0]), generator=torch.Generator().manual_seed(options.seed)).numpy()
    images = []
    for array in arrays:  # as many pixels at every level
        count = min(len(order), max(32, options.images * arrays[0][0].size // array[0].size))
        images.append(torch.from_numpy(array[order[:count]]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    network = respond(pipeline.unet, pipeline.scheduler.alphas_cumprod, images, spectra, options.points, options.seed)
    bins, places = [Modes.of(*size).bins for size in spectra.sizes], network["log_snr"]

    def interpolated(name, first):
        def at(level, log_snr):
            table, i = network[name][first + level], int(torch.searchsorted(places, log_snr).clamp(1, len(places) - 1))
            share = ((log_snr - places[i - 1]) / (places[i] - places[i - 1])).clamp(0, 1)
            return torch.lerp(table[i - 1], table[i], share)[:, bins[first + level]]

        return at

    truth, modes = spectra.modes(len(spectra.sizes) - 1), Modes.of(*spectra.sizes[-1])
    rows = []
    for name, (levels, distance, octaves, cost) in plans_of(
        json.loads(Path(options.bench).read_text(encoding="utf-8")), pipeline
    ).items():
        first = spectra.sizes.index(tuple(levels[0].size))
        if [tuple(level.size) for level in levels] != spectra.sizes[first:]:
            continue
        perfect = perfect_response([spectra.modes(level) for level in range(first, len(spectra.sizes))])
        variants = {
            "perfect network": (perfect, lambda level, log_snr, like=truth: torch.zeros(like.shape[0], 1).double()),
            "its error added": (perfect, interpolated("excess", first)),
            "its own gain": (
                interpolated("gain", first),
                lambda level, log_snr, like=truth: torch.zeros(like.shape[0], 1).double(),
            ),
        }
        scores = {}
        for variant, responses in variants.items():
            power, error = run_with_error(levels, *responses)
            away = ((power / truth).sqrt() - 1).square() + error / truth
            scores[variant] = modes.octave_means(away).mean()
        rows.append(
            {
                "name": name,
                "nfe_eq": cost,
                "frechet": distance,
                "octaves": octaves,
                "calculus": {key: float(value) for key, value in scores.items()},
            }
        )
    if len(rows) < 3:
        raise ValueError(f"--bench {options.bench}: has {len(rows)} scored plans that the calculus knows; expected 3")
    distances = [row["frechet"] for row in rows]
    return {
        "bench": "calculus_rank",
        "images": [len(part) for part in images],
        "points": options.points,
        "seed": options.seed,
        **report.surroundings(options.threads, gpu=False),
        "correlation": {
            key: rank_correlation([row["calculus"][key] for row in rows], distances) for key in rows[0]["calculus"]
        },
        "rows": sorted(rows, key=lambda row: row["frechet"]),
    }


def table(result: dict) -> str:
    names = list(result["correlation"])
    lines = [
        f"{len(result['rows'])} plans, best first; the network's response from {result['images']} held-out images at "
        f"{result['points']} noise levels, seed {result['seed']}. {report.caption(result)}",
        "",
        "| plan | NFE-eq | Fréchet | " + " | ".join(f"calculus, {name}" for name in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in result["rows"]:
        scores = " | ".join(f"{row['calculus'][name]:.3g}" for name in names)
        lines.append(f"| {row['name']} | {row['nfe_eq']:.2f} | {row['frechet']:.0f} | {scores} |")
    found = " | ".join(f"**{result['correlation'][name]:+.2f}**" for name in names)
    lines.append(f"| **rank correlation with the Fréchet distance** | | | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, "model", "reference", "array_key", "seed", images=256, threads=1)
    parser.add_argument("--train", required=True, help="images that the model was trained on, for their spectra")
    parser.add_argument("--train_key", help="array of an .npz of those")
    parser.add_argument("--bench", required=True, help="JSON of bench.py with scores of that model")
    parser.add_argument("--points", type=int, default=12, help="noise levels")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
