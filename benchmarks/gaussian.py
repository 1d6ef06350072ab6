"""
The Gaussian oracle: what plans, solvers and spacings do to images whose best noise prediction is a closed form. No
training: for a natural spectrum (power ~ k^-2.5) at 8/16/32, the share of the power that each octave keeps.

    python benchmarks/gaussian.py --output benchmarks/results/gaussian.json

The Gaussian calculus (`calculus.py`) stands beside runs of the real pipeline; rows whose solver it does not know are
run only.
"""

import time

import report
import torch
from calculus import SOLVERS, Modes, solver_of
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from fitting import fit, level_steps, octave_shares
from flags import parser_of
from spectra import Spectra, radial_covariance

SIDES = (8, 16, 32)
DPM, SDE = ("DPMSolverMultistepScheduler", {}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
DDPM, DDIM = ("DDPMScheduler", {"clip_sample": False}), ("DDIMScheduler", {"clip_sample": False})
UNIPC = ("UniPCMultistepScheduler", {})
ROWS = {
    "full size, DDPM 1000": (DDPM, DDPM, dict(resolutions=[32], num_inference_steps=1000)),
    "full size, DDIM 20": (DDIM, DDIM, dict(resolutions=[32], num_inference_steps=20)),
    "full size, UniPC 20": (UNIPC, UNIPC, dict(resolutions=[32], num_inference_steps=20)),
    "full size, DPM-Solver++ 20": (DPM, DPM, dict(resolutions=[32], num_inference_steps=20)),
    "full size, DPM-Solver++ 20, log-SNR": (
        DPM,
        DPM,
        dict(resolutions=[32], num_inference_steps=20, spacing="log_snr"),
    ),
    "full size, SDE-DPM-Solver++ 20": (SDE, SDE, dict(resolutions=[32], num_inference_steps=20)),
    "pyramid, DDPM (paper)": (DDPM, DDPM, dict(num_inference_steps=1000, refine_steps=30)),
    "pyramid, DDPM": (DDPM, DDPM, dict(num_inference_steps=100, refine_steps=8)),
    "pyramid, DPM-Solver++": (DPM, DPM, dict(num_inference_steps=20, refine_steps=5)),
    "pyramid, DPM-Solver++, log-SNR": (DPM, DPM, dict(num_inference_steps=20, refine_steps=8, spacing="log_snr")),
    "pyramid, DPM-Solver++, log-SNR, short": (
        DPM,
        DPM,
        dict(num_inference_steps=20, refine_steps=5, spacing="log_snr"),
    ),
    "pyramid, SDE-DPM-Solver++": (SDE, SDE, dict(num_inference_steps=20, refine_steps=5)),
}
FITTED = {
    "full size, DPM-Solver++ 8, fitted": ("dpmsolver++", (8,)),
    "pyramid, DPM-Solver++, fitted": ("dpmsolver++", (20, 5, 5)),
    "pyramid, DPM-Solver++, fitted, 10/4/4": ("dpmsolver++", (10, 4, 4)),
    "pyramid, DPM-Solver++, fitted, 10/3/3": ("dpmsolver++", (10, 3, 3)),
    "pyramid, DPM-Solver++, fitted, 8/3/2": ("dpmsolver++", (8, 3, 2)),
    "pyramid, SDE-DPM-Solver++, fitted": ("sde-dpmsolver++", (20, 5, 5)),
    "pyramid, DDPM then DPM-Solver++, fitted": (("ddpm", "dpmsolver++"), (30, 5, 5)),
}


def variance(height: int, width: int) -> torch.Tensor:
    """Of each orthonormal Fourier mode [height, width]: power ~ k^-2.5 in steps of whole cycles per image."""
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    k = (rows[:, None].double().square() + columns.double().square()).sqrt().round()
    return 0.05 * height * width * k.clamp(1, max(height, width) // 2) ** -2.5


class GaussianNoisePredictor(ModelMixin, ConfigMixin):
    """The best noise prediction for such images: s x / (a^2 v + s^2) in every mode."""

    @register_to_config
    def __init__(self, alphas_cumprod: list, in_channels: int = 1, resolutions: tuple = SIDES):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, return_dict=True):
        alpha = self.config.alphas_cumprod[int(timestep)]
        gain = (1 - alpha) ** 0.5 / (alpha * variance(*sample.shape[-2:]) + 1 - alpha)
        return (torch.fft.ifft2(torch.fft.fft2(sample.double()) * gain).real.to(sample.dtype),)


def measure(options) -> dict:
    import diffusers

    import pyrdiff

    torch.set_num_threads(options.threads)
    ddpm = diffusers.DDPMScheduler()
    alphas = ddpm.alphas_cumprod.double()
    sizes = [(side, side) for side in SIDES]
    bins = [0.05 * side * side * torch.arange(side // 2 + 1).double().clamp(min=1)[None] ** -2.5 for side in SIDES]
    spectra, network = Spectra(torch.ones(1, 1).double(), sizes, bins), GaussianNoisePredictor(alphas.tolist())
    modes = Modes.of(*sizes[-1])

    def make(kind):
        return getattr(diffusers, kind[0]).from_config(ddpm.config, **kind[1])

    def run(name, low, high, arguments, seconds=None):
        pipeline = pyrdiff.PyramidalPipeline(network, make(low), make(high))
        pipeline.set_progress_bar_config(disable=True)
        plan, calculus = pipeline.plan(**arguments), None
        try:
            solver_of(pipeline.scheduler)
            levels = level_steps(plan, (pipeline.scheduler, pipeline.refine_scheduler), alphas)
            calculus = octave_shares(levels, spectra).mean(1).tolist()
        except ValueError:
            assert low not in (DPM, SDE, DDPM, DDIM)
        power = 0.0
        for first in range(0, options.images, 500):
            generator = torch.Generator().manual_seed(options.seed + first)
            images = pipeline(500, generator=generator, output_type="latent", **arguments).images
            power = power + radial_covariance(images)[:, 0, 0]
        share = (power / len(range(0, options.images, 500)) / bins[-1][0])[modes.bins]
        octaves = modes.octave_means(share[None])[:, 0].tolist()
        difference = max(abs(a / b - 1) for a, b in zip(calculus, octaves, strict=True)) if calculus else None
        print(name, [round(value, 3) for value in octaves], difference, flush=True)
        return {
            "name": name,
            "calls": [len(level.timesteps) for level in plan.levels],
            "nfe_eq": plan.nfe_eq,
            "octaves": octaves,
            "calculus": calculus,
            "difference": difference,
            "times": [[int(time) for time in level.timesteps] for level in plan.levels],
            "fit_seconds": seconds,
        }

    rows = [run(name, *row) for name, row in ROWS.items()]
    classes = {"dpmsolver++": DPM, "sde-dpmsolver++": SDE, "ddpm": DDPM}
    assert set(classes) <= set(SOLVERS)
    for name, (solver, calls) in FITTED.items():
        began = time.perf_counter()
        part = Spectra(spectra.colors, sizes[-len(calls) :], bins[-len(calls) :])
        fitted = fit(part, alphas, calls, solver)
        seconds = time.perf_counter() - began
        low, high = (solver, solver) if isinstance(solver, str) else solver
        arguments = {key: fitted.plan[key] for key in ("resolutions", "spacing")}
        rows.append(run(name, classes[low], classes[high], arguments, seconds))
    return {
        "bench": "gaussian",
        "images": options.images,
        "seed": options.seed,
        **report.surroundings(options.threads, gpu=False),
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['images']} images a row, seed {result['seed']}. {report.caption(result)}",
        "",
        "| plan | calls | NFE-eq | power an octave, run | the calculus | largest difference | fit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        calls = "/".join(map(str, row["calls"]))
        run = " ".join(f"{value:.2f}" for value in row["octaves"])
        calculus = " ".join(f"{value:.2f}" for value in row["calculus"]) if row["calculus"] else "-"
        difference = f"{100 * row['difference']:.1f} %" if row["calculus"] else "-"
        fit = f"{row['fit_seconds']:.1f} s" if row["fit_seconds"] else "-"
        lines.append(f"| {row['name']} | {calls} | {row['nfe_eq']:.2f} | {run} | {calculus} | {difference} | {fit} |")
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__, "seed", images=4000, threads=1).parse_args()
    if options.images < 500 or options.images % 500:
        raise SystemExit(f"--images={options.images}: expected a multiple of 500")
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
