"""
The noise process of paper X (pixel-aware diffusion), as printed and as shipped, measured on images, and what networks
trained for it make of its noise:

    python benchmarks/pixel_aware_process.py --images DATA --size 32 --channels 1 --output OUT.json
    python benchmarks/pixel_aware_process.py ... --paper_model A/pipeline --structure_model B/pipeline --strips OUT.png

Parts: "convergence" (fig. 2), "gap" (what is left of an image at the last step), "known" (algorithm 1 with the exact
noises, appendix B), and with models "scales" (fig. 3 and 5, appendix F) and "reconstruction" (algorithm 1, learned).
The images should be ones that the models have not seen.
"""

from pathlib import Path

import report
import residual_sr
import scoring
import torch
from diffusers.utils import logging
from flags import parser_of
from process_measures import EPSILON, convergence, gap, known, seeded
from process_models import draw_strips, reconstruction, scales
from process_tables import PARTS, table  # noqa: F401, what report.py prints

import pyrdiff
from pyrdiff.data import ImageLevels, open_source
from pyrdiff.data.sources import Some

LEARNED = ("scales", "reconstruction")


def open_images(options):
    """Float [N, C, H, W] in [epsilon, 1], of randomly chosen images, and what they are."""
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


def main() -> None:
    parser = parser_of(__doc__, "array_key", "title", "seed", batch_size=32)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())}\n")  # no usage
    parser.add_argument("--images", required=True, help="folder, .npy, .npz or data set that the models have not seen")
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
    torch.set_num_threads(options.threads)
    try:
        images, data = open_images(options)
        models = open_models(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report.save(measure(options, images, data, models), options.output)


if __name__ == "__main__":
    main()
