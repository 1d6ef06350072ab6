"""
Super-resolution with the unconditional network (paper P, tables 3 and 4): every arm on the same weights and the same
held-out images, enlarged from what the operator makes of them, in 8 bits.

    python benchmarks/guided_sr.py --model runs/pddpm/pipeline --reference photos --factor 4 --output result.json

DPS and ILVR run as their papers have them, from pure noise at full size. DPS takes minutes an image on a CPU, so
--slow_images says how many of the images it gets; the other arms are then compared with it on those.
"""

import argparse
import os
import time
from pathlib import Path

import report
import scoring

SDE = ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
DPM, DDPM, DDIM = ("DPMSolverMultistepScheduler", {}), ("DDPMScheduler", {}), ("DDIMScheduler", {})


def arms(top: int) -> dict[str, dict]:
    """{name: {"kind", "scheduler", arguments of the pipeline's call or of the loop}} for outputs of side `top`."""
    few = {"refine_steps": 4, "refine_strength": 0.2}
    found = {
        "bicubic": {"kind": "resize"},
        "projection 8": {"scheduler": SDE},
        "projection 4, strength 0.2": {"scheduler": SDE, **few},
        "gradient 8": {"scheduler": SDE, "guidance": "gradient"},
        "gradient 4, strength 0.2": {"scheduler": SDE, "guidance": "gradient", **few},
        "none 8": {"scheduler": SDE, "guidance": "none"},
        "projection 8, DDPM": {"scheduler": DDPM},
        "gradient 8, DDPM": {"scheduler": DDPM, "guidance": "gradient"},
        "projection 8, DDIM": {"scheduler": DDIM},
        "projection 8, DPM-Solver++": {"scheduler": DPM},
        "projection 8, log-SNR": {"scheduler": SDE, "spacing": "log_snr"},
        "projection 8, hard consistency": {"scheduler": SDE, "hard_consistency": True},
        "projection 8, one level": {"scheduler": SDE, "resolutions": [top]},
        "projection 12, one level": {"scheduler": SDE, "resolutions": [top], "refine_steps": 12},
    }
    for strength in (0.1, 0.5):
        found[f"projection 8, strength {strength}"] = {"scheduler": SDE, "refine_strength": strength}
    for scale in (1.0, 2.0, 5.0, 10.0, 15.0, 20.0):
        found[f"printed gradient 8, scale {scale:g}"] = {
            "scheduler": DDPM,
            "guidance": "paper",
            "guidance_scale": scale,
        }
    found["ILVR 100"] = {"kind": "ilvr", "steps": 100}
    found["DPS 1000"] = {"kind": "dps", "steps": 1000, "scale": 1.0}
    for arm in found.values():
        arm.setdefault("kind", "guided")
    return found


def from_noise(pipeline, scheduler, operator, measured, generators, kind: str, steps: int, scale: float = 1.0):
    """DPS (Chung et al. 2023, algorithm 1) or ILVR (Choi et al. 2021, algorithm 1), ancestral steps from pure noise."""
    import torch
    import torch.nn.functional as F
    from diffusers.utils.torch_utils import randn_tensor

    unet, size = pipeline.unet.requires_grad_(False), [factor.shape[1] for factor in operator.factors[:2]]
    scheduler.set_timesteps(steps)
    wanted = 2 * measured - 1
    shape = (len(measured), measured.shape[1], *size)
    latents = randn_tensor(shape, generator=generators, device=measured.device)
    guide = F.interpolate(wanted, tuple(size), mode="bicubic")

    def low_pass(image):
        return F.interpolate(operator.A(image), tuple(size), mode="bicubic")

    for time_step in scheduler.timesteps:
        with torch.set_grad_enabled(kind == "dps"):
            sample = latents.detach().requires_grad_(kind == "dps")
            noise = unet(sample, time_step, return_dict=False)[0]
            if kind == "dps":
                alpha = scheduler.alphas_cumprod[time_step].item()
                clean = (sample - (1 - alpha) ** 0.5 * noise) / alpha**0.5
                distance = (wanted - operator.A(clean)).flatten(1).norm(dim=1).sum()
                gradient = torch.autograd.grad(distance, sample)[0]
        latents = scheduler.step(noise.detach(), time_step, sample.detach(), generator=generators).prev_sample
        if kind == "dps":
            latents = latents - scale * gradient
        else:
            before = scheduler.previous_timestep(time_step)
            fresh = randn_tensor(shape, generator=generators, device=measured.device)
            known = guide if before < 0 else scheduler.add_noise(guide, fresh, torch.tensor([int(before)]))
            latents = latents + low_pass(known) - low_pass(latents)
    return latents.clamp(-1, 1) / 2 + 0.5


def measure(options) -> dict:
    import diffusers
    import torch
    import torch.nn.functional as F

    import pyrdiff
    from pyrdiff.metrics import bootstrap_interval, lpips, psnr, ssim
    from pyrdiff.pipelines.pipeline_guided_sr import SeparableOperator

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = pyrdiff.load(options.model, pipeline_class="GuidedSRPipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    resolutions, channels = pipeline.unet.config.resolutions, pipeline.unet.config.image_channels
    top = resolutions[-1]
    scorer = scoring.Scorer(
        options.reference, options.array_key, top, channels, options.features, options.weights, device,
        options.images, options.reference_images, options.seed, options.resamples,
    )  # fmt: skip
    truth = torch.from_numpy(scorer.held).permute(0, 3, 1, 2).float() / 255
    small = top // options.factor
    operator = SeparableOperator.named(options.operator, (top, top), (small, small), channels)
    measured = (operator.A(truth).clamp(0, 1) * 255).round() / 255
    config, rows = pipeline.scheduler.config, []
    process = {key: config[key] for key in pyrdiff.PyramidalPipeline.NOISE_PROCESS if key in config}

    for name, arm in arms(top).items():
        if options.only and not any(part in name for part in options.only):
            continue
        settings = {key: value for key, value in arm.items() if key not in ("kind", "scheduler")}
        count = min(options.slow_images, options.images) if arm["kind"] == "dps" else options.images
        if not count:
            continue
        kind, changes = arm.get("scheduler", DDPM)
        known = getattr(diffusers, kind).__init__.__wrapped__.__code__.co_varnames
        scheduler = getattr(diffusers, kind)(**{k: v for k, v in process.items() if k in known}, **changes)
        pipeline.register_modules(scheduler=scheduler)
        images, calls, began = [], 0.0, time.perf_counter()
        for first in range(0, count, options.batch_size):
            part = measured[first : min(first + options.batch_size, count)].to(device)
            generators = [torch.Generator().manual_seed(options.seed * 1_000_000 + first + k) for k in range(len(part))]
            if arm["kind"] == "resize":
                made = F.interpolate(part, (top, top), mode="bicubic").clamp(0, 1)
            elif arm["kind"] == "guided":
                made = pipeline(
                    part, options.factor, operator=options.operator, generator=generators, output_type="pt", **settings
                ).images
            else:
                made = from_noise(pipeline, scheduler, operator, part, generators, arm["kind"], **settings)
            images.append((made.cpu() * 255).round() / 255)
        seconds = (time.perf_counter() - began) / count
        if arm["kind"] == "guided":
            names = ("resolutions", "refine_steps", "refine_strength", "spacing")
            plan = pipeline.plan(small, options.factor, **{k: v for k, v in settings.items() if k in names})
            calls = sum(level.nfe_eq for level in plan)
        elif arm["kind"] != "resize":
            calls = float(settings["steps"])
        images = torch.cat(images)
        known = dict(data_range=(0, 1))
        each = {
            "psnr": psnr(images, truth[:count], **known).per_image,
            "ssim": ssim(images, truth[:count], **known).per_image,
            "lpips": lpips(
                images, truth[:count], **known, network=options.lpips, weights=options.lpips_weights
            ).per_image,
        }
        row = {
            "name": name,
            "settings": {**settings, "scheduler": kind, **changes},
            "images": count,
            **{key: value.mean().item() for key, value in each.items()},
            "lpips_slow": each["lpips"][: options.slow_images].mean().item() if options.slow_images else None,
            "lpips_interval": list(
                bootstrap_interval(lambda v: v.mean().item(), each["lpips"][:, None], resamples=1000, level=0.95)
            ),
            "consistency_255": 255 * (operator.A(images) - measured[:count]).abs().mean().item(),
            "nfe_eq": calls,
            "gradient": settings.get("guidance") in ("gradient", "paper") or arm["kind"] == "dps",
            "seconds_an_image": seconds,
        }
        if count == options.images:
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            row.update({key: value for key, value in scorer(pixels).items() if key.startswith("frechet")})
        rows.append(row)
        print(f"{name}: {row['psnr']:.2f} dB, LPIPS {row['lpips']:.4f}, {seconds:.2f} s an image", flush=True)
        if options.grids:
            save_grid([measured[:8], images[:8], truth[:8]], Path(options.grids) / f"{name}.png".replace(" ", "_"))
    return {
        "bench": "guided_sr",
        "title": options.title,
        "factor": options.factor,
        "operator": options.operator,
        "sizes": [small, top],
        "images": options.images,
        "slow_images": options.slow_images,
        "batch_size": options.batch_size,
        "lpips": options.lpips,
        "seed": options.seed,
        "model": scoring.model_hash(options.model),
        **scorer.description,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def save_grid(rows, path: Path) -> None:
    """A row each for the input, the output and the truth, tensors [N, C, H, W] in [0, 1]."""
    import torch
    from PIL import Image

    side = rows[-1].shape[-1]
    rows = [torch.nn.functional.interpolate(row, (side, side), mode="nearest") for row in rows]
    grid = torch.cat([row.permute(1, 2, 0, 3).flatten(2) for row in rows], 1)
    pixels = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def table(result: dict) -> str:
    small, top = result["sizes"]
    slow = result["slow_images"]
    lines = [
        f"{result['title']} x{result['factor']}, {small}x{small} to {top}x{top} ({result['operator']}), "
        f"{result['images']} held-out images; LPIPS {result['lpips']}; Fréchet distance of {result['features']} "
        f"features against {result['compared_with']['frechet']} others; consistency is the mean absolute difference at "
        f"the input's size; a call with gradient counts as one in NFE-eq and costs about two. Seed {result['seed']}, "
        f"batches of {result['batch_size']}. {report.caption(result)}",
        "",
        f"| arm | NFE-eq | PSNR | SSIM | LPIPS [95 %] |{f' LPIPS, first {slow} |' * bool(slow)} Fréchet [95 %] | "
        "consistency, /255 | s an image |",
        "|---" * (9 if slow else 8) + "|",
    ]
    for row in result["rows"]:
        low, high = row["lpips_interval"]
        distance = "-"
        if "frechet" in row:
            distance = "{:.0f} [{:.0f}, {:.0f}]".format(row["frechet"], *row["frechet_interval"])
        few = f" {row['lpips_slow']:.3f} |" if slow else ""
        calls = f"{row['nfe_eq']:.1f}" + (" + gradient" if row["gradient"] else "") if row["nfe_eq"] else "-"
        lines.append(
            f"| {row['name']} | {calls} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['lpips']:.3f} [{low:.3f}, "
            f"{high:.3f}] |{few} {distance} | {row['consistency_255']:.2f} | {row['seconds_an_image']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported pipeline of an unconditional network")
    parser.add_argument("--reference", required=True, help="images that the network has not seen")
    parser.add_argument("--array_key", help="array of an .npz reference")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--operator", default="bicubic")
    parser.add_argument("--images", type=int, default=64, help="enlarged by every arm")
    parser.add_argument("--slow_images", type=int, default=0, help="of them, by 1000 steps of DPS")
    parser.add_argument("--only", nargs="*", help="arms whose name has one of these in it")
    parser.add_argument("--features", default="squeezenet")
    parser.add_argument("--weights", help="of the feature network")
    parser.add_argument("--lpips", default="squeeze", choices=("alex", "squeeze", "vgg"))
    parser.add_argument("--lpips_weights", help="of LPIPS' network")
    parser.add_argument("--reference_images", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--grids", help="folder for images to look at")
    parser.add_argument("--title", default="Images,", help="what the table says first")
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
