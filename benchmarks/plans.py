"""
Time and score sampling plans on one trained network, side by side, in one run:

    python benchmarks/plans.py --model runs/pddpm/pipeline --reference my_images --output benchmarks/results/plans.json

Arms are run in turn, again and again, and stock loops of diffusers on the same network stand beside ours.
"""

import argparse
import os
import statistics
import time

import report

SLOW = 60  # NFE-eq; arms above it are run `--slow_runs` times


def arms(pipeline) -> dict:
    """Name: (scheduler, refine scheduler, arguments of a call). One level is the stock loop on the same network."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    config, clip = pipeline.scheduler.config, dict(thresholding=True, sample_max_value=1.0)
    ddpm = DDPMScheduler.from_config(config)
    ddim = DDIMScheduler.from_config(config)
    solver = DPMSolverMultistepScheduler.from_config(config, **clip)
    unipc = UniPCMultistepScheduler.from_config(config, **clip)
    top = [pipeline.unet.config.resolutions[-1]]
    return {
        "DDPM 1000, full size": (ddpm, None, dict(resolutions=top, num_inference_steps=1000)),
        "DDPM 100, full size": (ddpm, None, dict(resolutions=top, num_inference_steps=100)),
        "DDIM 50, full size": (ddim, None, dict(resolutions=top, num_inference_steps=50)),
        "DPM-Solver++ 20, full size": (solver, None, dict(resolutions=top, num_inference_steps=20)),
        "UniPC 20, full size": (unipc, None, dict(resolutions=top, num_inference_steps=20)),
        "pyramid 1000/30/30, DDPM (paper)": (ddpm, None, dict(num_inference_steps=1000, refine_steps=30)),
        "pyramid 100/10/10, DDPM (paper)": (ddpm, None, dict(num_inference_steps=100, refine_steps=10)),
        "pyramid 100/8/8, DDPM + DPM-Solver++": (ddpm, solver, dict(num_inference_steps=100, refine_steps=8)),
        "pyramid 100/8/8, DDPM + DPM-Solver++, matched jump": (
            ddpm,
            solver,
            dict(num_inference_steps=100, refine_steps=8, stage_jump="matched"),
        ),
        "pyramid 100/8/8, DDPM + DPM-Solver++, strength 0.2": (
            ddpm,
            solver,
            dict(num_inference_steps=100, refine_steps=8, refine_strength=0.2),
        ),
        "pyramid 100/8/8, DDPM": (ddpm, None, dict(num_inference_steps=100, refine_steps=8)),
        "pyramid 50/5/5, DDPM + DPM-Solver++": (ddpm, solver, dict(num_inference_steps=50, refine_steps=5)),
        "pyramid 20/5/5, DPM-Solver++": (solver, None, dict(num_inference_steps=20, refine_steps=5)),
        "pyramid 20/5/5, matched jump": (
            solver,
            None,
            dict(num_inference_steps=20, refine_steps=5, stage_jump="matched"),
        ),
    }


def measure(options) -> dict:
    import torch

    import pyrdiff
    from pyrdiff.data import ImageLevels, open_source

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = pyrdiff.load(options.model)
    base.unet.to(device)
    if device.type == "cuda":
        base.unet.to(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    chosen = arms(base)
    if options.only:
        chosen = {name: arm for name, arm in chosen.items() if any(part in name for part in options.only)}

    def sample(name: str, count: int, seed: int):
        scheduler, refine, arguments = chosen[name]
        pipeline = pyrdiff.PyramidalPipeline(base.unet, scheduler, refine, base.config.detail_spectra)
        pipeline.set_progress_bar_config(disable=True)
        began = time.perf_counter()
        with autocast:
            images = pipeline(
                count, generator=torch.Generator().manual_seed(seed), output_type="latent", **arguments
            ).images
        images = images.float().cpu()
        seconds = time.perf_counter() - began
        arguments = {key: value for key, value in arguments.items() if key != "stage_jump"}
        return images, seconds, pipeline.plan(**arguments)

    results = {name: {"name": name, "seconds": []} for name in chosen}
    kept = {name: [] for name in chosen}
    for turn in range(options.runs):
        for name, (scheduler, refine, arguments) in chosen.items():
            settings = {key: value for key, value in arguments.items() if key != "stage_jump"}
            cost = pyrdiff.PyramidalPipeline(base.unet, scheduler, refine).plan(**settings).nfe_eq
            if turn >= options.slow_runs and cost > SLOW:
                continue
            images, seconds, plan = sample(name, options.batch_size, options.seed + turn)
            kept[name].append(images)
            results[name]["seconds"].append(round(seconds, 4))
            results[name]["calls"] = [len(level.timesteps) for level in plan.levels]
            results[name]["nfe_eq"] = plan.nfe_eq
            print(f"run {turn + 1}: {name}: {seconds:.2f} s", flush=True)

    sizes = base.unet.config.resolutions
    source = open_source(options.reference, array_key=options.array_key)
    reference = ImageLevels.build(source, sizes, channels=base.unet.config.image_channels)
    truth = torch.from_numpy(reference.arrays[-1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    slowest = next((row for name, row in results.items() if name.startswith("DDPM 1000")), None)
    for name, row in results.items():
        while options.score_images > sum(map(len, kept[name])) and row["nfe_eq"] <= SLOW:
            kept[name].append(sample(name, options.batch_size, options.seed + 1000 + len(kept[name]))[0])
        images = torch.cat(kept[name])
        row["images"] = len(images)
        row["octaves"] = [round(value, 3) for value in octaves(images, truth)]
        row["seconds_median"] = statistics.median(row["seconds"])
        row["seconds_min"] = min(row["seconds"])
        if slowest is not None:
            row["vs_ddpm_1000"] = slowest["seconds_median"] / row["seconds_median"]
        # A Frechet distance depends on the number of images: arms that have fewer get none.
        if options.lpips_weights and len(images) >= options.runs * options.batch_size:
            row["frechet_squeezenet"] = frechet(images, truth[: options.reference_images], options.lpips_weights)
    return {
        "bench": "plans",
        "batch_size": options.batch_size,
        "seed": options.seed,
        "bf16": options.bf16,
        "model": {"parameters": sum(p.numel() for p in base.unet.parameters()), "resolutions": list(sizes)},
        "data": {"fingerprint": reference.fingerprint, "images": len(reference)},
        **report.surroundings(options.threads),
        "arms": list(results.values()),
    }


def octaves(images, truth) -> list[float]:
    """Power of samples in each octave (cycles per image: 1, 2, 3-4, 5-8, ...) as a share of the data's."""
    from pyrdiff.data import radial_covariance

    ratio = []
    ours, theirs = (radial_covariance(part).diagonal(dim1=1, dim2=2).mean(1) for part in (images, truth[:2000]))
    low = 1
    for high in (2**power for power in range(16)):
        if high > images.shape[-1] // 2:
            break
        ratio.append((ours[low : high + 1].mean() / theirs[low : high + 1].mean()).item())
        low = high + 1
    return ratio


def frechet(images, truth, weights: str) -> float:
    """
    Frechet distance between the SqueezeNet features (512, last fire module, mean over positions) of both sets.
    Not FID: another network, few samples. Compare only within one table.
    """
    import torch

    features = [squeezenet_features(part, weights).double() for part in (images.clamp(-1, 1), truth)]
    (m1, c1), (m2, c2) = ((part.mean(0), torch.cov(part.T)) for part in features)
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()


def squeezenet_features(images, weights: str):
    import torch
    import torch.nn.functional as F

    state = torch.load(weights, weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)

    def conv(x, name, **kw):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kw).relu()

    def fire(x, name):
        x = conv(x, f"{name}.squeeze")
        return torch.cat((conv(x, f"{name}.expand1x1"), conv(x, f"{name}.expand3x3", padding=1)), 1)

    collected = []
    for x in images.expand(-1, 3, -1, -1).split(64):
        x = conv((x - shift) / scale, "0", stride=2)
        for layer in range(2, 13):
            if layer in (2, 5, 8):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            else:
                x = fire(x, str(layer))
        collected.append(x.mean((2, 3)))
    return torch.cat(collected)


def table(result: dict) -> str:
    lines = [
        f"{result['model']['parameters'] / 1e6:.1f}M parameters at {result['model']['resolutions']}, batch "
        f"{result['batch_size']}, {'bf16' if result['bf16'] else 'float32'}, seed {result['seed']}. "
        f"{report.caption(result)} Scores against {result['data']['images']} reference images.",
        "",
        "| plan | calls | NFE-eq | seconds, median (min) of n | vs DDPM-1000 | Fréchet (images) | power an octave |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in result["arms"]:
        calls = "/".join(map(str, arm["calls"]))
        seconds = f"{arm['seconds_median']:.2f} ({arm['seconds_min']:.2f}) of {len(arm['seconds'])}"
        speed = f"x{arm['vs_ddpm_1000']:.1f}" if "vs_ddpm_1000" in arm else "-"
        distance = f"{arm['frechet_squeezenet']:.1f} ({arm['images']})" if "frechet_squeezenet" in arm else "-"
        power = " ".join(f"{value:.2f}" for value in arm["octaves"])
        lines.append(f"| {arm['name']} | {calls} | {arm['nfe_eq']:.2f} | {seconds} | {speed} | {distance} | {power} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="exported pyramidal pipeline")
    parser.add_argument("--reference", help="images to compare the spectrum and features with, best held out")
    parser.add_argument("--array_key", help="array of an .npz reference")
    parser.add_argument("--output", help="JSON to write")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow_runs", type=int, default=2, help="runs of the arms above 60 NFE-eq")
    parser.add_argument("--score_images", type=int, default=0, help="sample at least so many of each arm for scores")
    parser.add_argument("--reference_images", type=int, default=2000)
    parser.add_argument("--lpips_weights", help="SqueezeNet trunk (torchvision's features) for the Frechet distance")
    parser.add_argument("--only", nargs="*", help="arms whose name has one of these in it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    if not (options.model and options.reference and options.output):
        parser.error("expected --model, --reference and --output")
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
