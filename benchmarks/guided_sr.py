"""
Super-resolution with the unconditional network (paper P, tables 3 and 4): every arm on the same weights and the same
held-out images, enlarged from what the operator makes of them, in 8 bits.

    python benchmarks/guided_sr.py --model runs/pddpm/pipeline --reference photos --factor 4 --output result.json

DPS and ILVR run as their papers have them, from pure noise at full size. DPS takes minutes an image on a CPU, so
--slow_images says how many of the images it gets; the other arms are then compared with it on those.
"""

import time
from pathlib import Path

import report
import scoring
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from flags import LPIPS, SCORED, parser_of
from pictures import write_rows
from samplers import DDIM, DDPM, DPM, SDE, scheduler_like

import pyrdiff
from pyrdiff.parts.operators import SeparableOperator


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


def from_noise(pipeline, operator, measured, generators, kind: str, steps: int, scale: float = 1.0):
    """DPS (Chung et al. 2023, algorithm 1) or ILVR (Choi et al. 2021, algorithm 1), ancestral steps from pure noise."""
    unet, size = pipeline.unet.requires_grad_(False), list(operator.large)
    scheduler = pipeline.scheduler
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
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = pyrdiff.load(options.model, pipeline_class="GuidedSRPipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    resolutions, channels = pipeline.unet.config.resolutions, pipeline.unet.config.image_channels
    top = resolutions[-1]
    scorer = scoring.Scorer.of(options, top, channels, device, held=options.images)
    truth = torch.from_numpy(scorer.held).permute(0, 3, 1, 2).float() / 255
    small = top // options.factor
    operator = SeparableOperator.named(options.operator, (top, top), (small, small), channels)
    measured = (operator.A(truth).clamp(0, 1) * 255).round() / 255
    base, rows = pipeline.scheduler, []
    for name, arm in arms(top).items():
        if options.only and not any(part in name for part in options.only):
            continue
        count = min(options.slow_images, options.images) if arm["kind"] == "dps" else options.images
        if not count:
            continue
        kind, changes = arm.get("scheduler", DDPM)
        pipeline.register_modules(scheduler=scheduler_like(base, kind, changes))
        settings = {key: value for key, value in arm.items() if key not in ("kind", "scheduler")}
        began = time.perf_counter()
        images = enlarge(pipeline, operator, measured[:count], arm["kind"], settings, options)
        seconds = (time.perf_counter() - began) / count
        row = {
            "name": name,
            "settings": {**settings, "scheduler": kind, **changes},
            "images": count,
            **scores_of(images, truth[:count], options),
            "consistency_255": 255 * (operator.A(images) - measured[:count]).abs().mean().item(),
            "nfe_eq": network_calls(pipeline, small, arm["kind"], settings, options.factor),
            "gradient": settings.get("guidance") in ("gradient", "paper") or arm["kind"] == "dps",
            "seconds_an_image": seconds,
        }
        if count == options.images:
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            row.update({key: value for key, value in scorer(pixels).items() if key.startswith("frechet")})
        rows.append(row)
        print(f"{name}: {row['psnr']:.2f} dB, LPIPS {row['lpips']:.4f}, {seconds:.2f} s an image", flush=True)
        if options.grids:
            write_rows([measured[:8], images[:8], truth[:8]], Path(options.grids) / f"{name}.png")
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


def enlarge(pipeline, operator, measured, kind: str, settings: dict, options):
    """Outputs of an arm, [N, C, H, W] in [0, 1], rounded to 8 bits as a file is."""
    size = operator.large

    def make(indices: range):
        part = measured[indices.start : indices.stop].to(pipeline.unet.device)
        generators = scoring.generators(options.seed, indices)
        if kind == "resize":
            return F.interpolate(part, size, mode="bicubic").clamp(0, 1)
        if kind == "guided":
            given = dict(operator=options.operator, generator=generators, output_type="pt", **settings)
            return pipeline(part, options.factor, **given).images
        return from_noise(pipeline, operator, part, generators, kind, **settings)

    return (scoring.in_batches(make, len(measured), options.batch_size) * 255).round() / 255


def network_calls(pipeline, small: int, kind: str, settings: dict, factor: int) -> float:
    """NFE-eq of an arm."""
    if kind == "guided":
        names = ("resolutions", "refine_steps", "refine_strength", "spacing")
        plan = pipeline.plan(small, factor, **{key: value for key, value in settings.items() if key in names})
        return sum(level.nfe_eq for level in plan)
    return float(settings.get("steps", 0))


def scores_of(images, truth, options) -> dict:
    """Means over the images; LPIPS also of those that the slow arms get, and with its interval."""
    each = scoring.fidelity(images, truth, options)
    few = each["lpips"][: options.slow_images].mean().item() if options.slow_images else None
    means = {key: values.mean().item() for key, values in each.items()}
    return {**means, "lpips_slow": few, "lpips_interval": scoring.interval_of_mean(each["lpips"])}


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
    parser = parser_of(__doc__, "model", *SCORED, *LPIPS, "images", "only", "batch_size", "seed", "grids", "title")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--operator", default="bicubic")
    parser.add_argument("--slow_images", type=int, default=0, help="of the images, by 1000 steps of DPS")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
