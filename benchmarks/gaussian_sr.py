"""
Super-resolution of Gaussian images, whose posterior is a closed form: what every guidance and solver makes of its mean
and its spread. No training: natural spectrum (power ~ k^-2.5), 8x8 means known of 32x32 pixels, levels 16 and 32.

    python benchmarks/gaussian_sr.py --output benchmarks/results/gaussian_sr.json
"""

import math

import report
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from flags import parser_of
from samplers import DDIM, DDPM, DPM, SDE

SIDE, FACTOR, POWER = 32, 4, 0.00664


def arms() -> dict[str, tuple]:
    found = {"none 8, DDPM": (DDPM, dict(guidance="none", refine_steps=8))}
    for scale in (1.0, 2.0, 5.0, 10.0, 20.0):
        settings = dict(guidance="paper", guidance_scale=scale, refine_steps=8)
        found[f"printed gradient 8, scale {scale:g}, DDPM"] = (DDPM, settings)
    for guidance in ("projection", "gradient"):
        for label, scheduler in (("DDPM", DDPM), ("DDIM", DDIM), ("DPM-Solver++", DPM), ("SDE-DPM-Solver++", SDE)):
            found[f"{guidance} 8, {label}"] = (scheduler, dict(guidance=guidance, refine_steps=8))
        for strength in (0.1, 0.2):
            settings = dict(guidance=guidance, refine_steps=8, refine_strength=strength)
            found[f"{guidance} 8, SDE-DPM-Solver++, strength {strength}"] = (SDE, settings)
        for calls in (3, 4, 5, 6, 8):
            for label, scheduler in (("SDE-DPM-Solver++", SDE), ("DPM-Solver++", DPM)):
                settings = dict(guidance=guidance, refine_steps=calls, spacing="log_snr")
                found[f"{guidance} {calls}, {label}, log-SNR"] = (scheduler, settings)
    return found


def spectra() -> dict[int, torch.Tensor]:
    """Variance of each orthonormal Fourier mode of the images, and of their 2x2 means."""
    waves = torch.fft.fftfreq(SIDE).double()
    radius = SIDE * (waves[:, None] ** 2 + waves**2).sqrt()
    top = POWER * SIDE * SIDE * radius.clamp(min=1) ** -2.5
    box, half = torch.cos(torch.pi * waves) ** 2, SIDE // 2
    means = (top * box[:, None] * box).reshape(2, half, 2, half).sum((0, 2)) / 4
    return {SIDE: top, half: means}


class GaussianNoisePredictor(ModelMixin, ConfigMixin):
    """The best noise prediction for such images: s x / (a^2 v + s^2) in every mode."""

    @register_to_config
    def __init__(self, alphas_cumprod: list, in_channels: int = 1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.spectra = spectra()

    def forward(self, sample, timestep, return_dict=True):
        alpha = self.config.alphas_cumprod[int(timestep)]
        gain = (1 - alpha) ** 0.5 / (alpha * self.spectra[sample.shape[-1]] + 1 - alpha)
        return (torch.fft.ifft2(torch.fft.fft2(sample.double()) * gain).real.to(sample.dtype),)


def posterior(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What is known of some images, [-1, 1], the mean of their posterior, and its standard deviation."""
    pixels = SIDE * SIDE
    covariance = torch.fft.ifft2(spectra()[SIDE]).real
    rows, columns = torch.arange(pixels) // SIDE, torch.arange(pixels) % SIDE
    prior = covariance[(rows[:, None] - rows) % SIDE, (columns[:, None] - columns) % SIDE]
    unit = torch.eye(pixels, dtype=torch.float64).reshape(-1, 1, SIDE, SIDE)
    means = torch.nn.functional.avg_pool2d(unit, FACTOR).reshape(pixels, -1).T
    gain = prior @ means.T @ torch.linalg.inv(means @ prior @ means.T)
    spread = (prior - gain @ means @ prior).diagonal().mean().sqrt().item()
    root = torch.linalg.cholesky(prior + 1e-9 * torch.eye(pixels))
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(images, pixels, generator=generator, dtype=torch.float64) @ root.T
    known = (truth @ means.T).reshape(images, 1, SIDE // FACTOR, SIDE // FACTOR)
    return known.float(), (truth @ means.T @ gain.T).reshape(images, SIDE, SIDE), spread


def measure(options) -> dict:
    import diffusers

    import pyrdiff

    torch.set_num_threads(options.threads)
    ddpm = diffusers.DDPMScheduler(clip_sample=False)
    network = GaussianNoisePredictor(ddpm.alphas_cumprod.double().tolist())
    known, mean, spread = posterior(options.images, options.seed)
    measured = (known / 2 + 0.5).clamp(0, 1).repeat_interleave(options.samples, 0)
    rows = []
    for name, (kind, settings) in arms().items():
        scheduler = getattr(diffusers, kind[0]).from_config(ddpm.config, **kind[1])
        pipeline = pyrdiff.GuidedSRPipeline(network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(options.seed)
        images = pipeline(
            measured,
            FACTOR,
            operator="area",
            clip_sample=False,
            generator=generator,
            output_type="latent",
            **settings,
        ).images.double()
        off = (torch.nn.functional.avg_pool2d(images, FACTOR) / 2 + 0.5 - measured).abs().mean().item() * 255
        images = images.reshape(options.images, options.samples, SIDE, SIDE)
        variance = images.var(1).mean()
        error = ((images.mean(1) - mean).square().mean() - variance / options.samples).clamp(min=0).sqrt().item()
        finite = math.isfinite(error) and error < 10
        rows.append(
            {
                "name": name,
                "settings": {**settings, "scheduler": list(kind)},
                "consistency_255": off if finite else None,
                "mean_error": error if finite else None,
                "spread": (variance.sqrt() / spread).item() if finite else None,
            }
        )
        print(rows[-1], flush=True)
    return {
        "bench": "gaussian_sr",
        "images": options.images,
        "samples": options.samples,
        "seed": options.seed,
        "posterior_spread": spread,
        **report.surroundings(options.threads, gpu=False),
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['samples']} samples of each of {result['images']} images, seed {result['seed']}; the posterior's "
        f"standard deviation is {result['posterior_spread']:.3f} of the [-1, 1] range. {report.caption(result)}",
        "",
        "| guidance, calls a level | consistency, /255 | error of the mean | spread / the posterior's |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["mean_error"] is None:
            lines.append(f"| {row['name']} | diverges | - | - |")
            continue
        lines.append(
            f"| {row['name']} | {row['consistency_255']:.2f} | {row['mean_error']:.3f} | {row['spread']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, "seed", images=16, threads=1)
    parser.add_argument("--samples", type=int, default=64, help="of each image")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
