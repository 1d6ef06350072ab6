"""
Enlarging photographs, of several models and of other programs' files, on sets of pairs: PSNR and SSIM of luma, LPIPS by
two networks, ringing (ringing.py), consistency, and CPU seconds a megapixel.

    python benchmarks/photos.py inputs --high PHOTOS --output set/low --factor 4 --degradation realistic
    python benchmarks/photos.py measure --sets "Set5=LOW,HIGH" --models "one call=photos-x4" --details 0 0.5 1 \
        --files "another program=FOLDER" --output result.json
    python benchmarks/photos.py card --result result.json --output photos-x4/README.md

FOLDER has a folder of enlarged files a set, of its name, with the names of the inputs, and in seconds.json what they
took: {set: {"seconds": {file: CPU seconds}}}.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import report
import scoring
import torch
from PIL import Image
from ringing import ringing

import pyrdiff
from pyrdiff import metrics
from pyrdiff.data import decode_image, degrade, image_tensor, list_images
from pyrdiff.training.losses import Draws

MEANS = ("psnr_y", "ssim_y", "lpips_alex", "lpips_squeeze", "ringing", "consistency", "seconds_a_megapixel")


def make_inputs(options: argparse.Namespace) -> None:
    """Files made smaller, of the originals cut to multiples of the factor."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(list_images(options.high)):
        high = 2 * cut(image_tensor([decode_image(path, 3)]), options.factor) - 1
        draws = Draws(options.seed, number, device=torch.device("cpu"))
        low = degrade(high, options.factor, options.degradation, draws, torch.tensor([options.strength]))[0]
        pixels = ((low + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(output / f"{path.stem}.png")


def cut(image: torch.Tensor, factor: int) -> torch.Tensor:
    height, width = (side // factor * factor for side in image.shape[-2:])
    return image[..., :height, :width]


class Arm:
    """A way to enlarge: bicubic, a model with arguments, or files that another program made."""

    def __init__(self, name: str, pipeline=None, files: Path | None = None, **arguments):
        self.name, self.pipeline, self.files, self.arguments = name, pipeline, files, arguments
        self.parameters = None if pipeline is None else sum(each.numel() for each in pipeline.unet.parameters())

    def enlarge(self, low: torch.Tensor, size: tuple[int, int], path: Path, name: str) -> tuple[torch.Tensor, float]:
        """The output [1, 3, H, W] in [0, 1] as 8 bits have it, and CPU seconds."""
        if self.files is not None:
            file = self.files / name / f"{path.stem}.png"
            return image_tensor([decode_image(file, 3)])[..., : size[0], : size[1]], self.told(name)["seconds"][
                path.name
            ]
        began = time.process_time()
        if self.pipeline is None:
            made = pyrdiff.ResidualSRPipeline.upsample(low, size)
        else:
            output = self.pipeline(low, output_type="pt", generator=torch.Generator().manual_seed(0), **self.arguments)
            made = output.images if output.mean is None else output.mean
        seconds = time.process_time() - began
        return (made.clamp(0, 1) * 255).round() / 255, seconds

    def told(self, name: str) -> dict:
        return json.loads((self.files / "seconds.json").read_text())[name]


def arms_of(options: argparse.Namespace, realistic: bool) -> list[Arm]:
    arms = [Arm("bicubic")]
    arms += [Arm(name, files=Path(folder)) for name, folder in options.files]
    for name, place in options.models:
        pipeline = pyrdiff.load(place)
        pipeline.set_progress_bar_config(disable=True)
        if not hasattr(pipeline.unet, "CELL"):
            arms.append(Arm(f"{name}, plan {options.plan}", pipeline, plan=options.plan, tile=128))
            arms.append(Arm(f"{name}, the same, mean of 4", pipeline, plan=options.plan, tile=128, num_samples=4))
            continue
        arms += [Arm(f"{name}, detail {detail:g}", pipeline, detail=detail) for detail in options.details]
        if realistic:
            arms += [Arm(f"{name}, restore {share:g}", pipeline, restore=share) for share in (0.5, 1.0)]
        else:
            arms.append(Arm(f"{name}, hard consistency", pipeline, hard_consistency=True))
    return arms


def scores_of(made: torch.Tensor, high: torch.Tensor, low: torch.Tensor, factor: int, options) -> dict:
    unit = dict(data_range=(0, 1))
    on_luma = dict(**unit, channels="y", crop_border=factor)
    weights = {"alex": options.alex_weights, "squeeze": options.squeeze_weights}
    distances = {
        f"lpips_{network}": metrics.lpips(made, high, **unit, network=network, weights=file).value
        for network, file in weights.items()
    }
    return {
        "psnr_y": metrics.psnr(made, high, **on_luma).value,
        "ssim_y": metrics.ssim(made, high, **on_luma).value,
        **distances,
        "ringing": ringing(metrics.luma(made), metrics.luma(high)),
        "consistency": metrics.consistency(made, low, **unit).value,
    }


def measure(options: argparse.Namespace) -> dict:
    torch.set_num_threads(options.threads)
    sets = []
    for name, places in options.sets:
        low_folder, high_folder = places.split(",")
        pairs = list(zip(list_images(low_folder), list_images(high_folder), strict=True))[: options.images]
        sets.append({"name": name, "count": len(pairs), "rows": []})
        for arm in arms_of(options, realistic="realistic" in name):
            sets[-1]["rows"].append(row_of(arm, name, pairs, options))
            row = sets[-1]["rows"][-1]
            print(f"{name}, {arm.name}: {row['psnr_y']:.2f} dB, LPIPS {row['lpips_squeeze']:.3f}", flush=True)
    return {
        "bench": "photos",
        "factor": options.factor,
        "models": {name: scoring.model_hash(place) for name, place in options.models if Path(place).is_dir()},
        **report.surroundings(options.threads),
        "sets": sets,
    }


def row_of(arm: Arm, name: str, pairs: list[tuple[Path, Path]], options: argparse.Namespace) -> dict:
    each = []
    for low_path, high_path in pairs:
        low, high = image_tensor([decode_image(low_path, 3)]), image_tensor([decode_image(high_path, 3)])
        high = cut(high, options.factor)[..., : low.shape[-2] * options.factor, : low.shape[-1] * options.factor]
        low = low[..., : high.shape[-2] // options.factor, : high.shape[-1] // options.factor]
        made, seconds = arm.enlarge(low, tuple(high.shape[-2:]), low_path, name)
        megapixels = high.shape[-1] * high.shape[-2] / 1e6
        scores = scores_of(made, high, low, options.factor, options)
        each.append(
            {"image": high_path.stem, **scores, "seconds": seconds, "seconds_a_megapixel": seconds / megapixels}
        )
        if options.pictures:
            place = Path(options.pictures) / name / arm.name.replace(" ", "_")
            place.mkdir(parents=True, exist_ok=True)
            pixels = (made[0] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place / f"{high_path.stem}.png")
    means = {}
    for key in MEANS:
        values = [scores[key] for scores in each if scores[key] is not None]
        means[key] = statistics.mean(values) if values else None
    total = sum(scores["seconds"] for scores in each)
    pixels = sum(scores["seconds"] / scores["seconds_a_megapixel"] for scores in each if scores["seconds_a_megapixel"])
    means["seconds_a_megapixel"] = total / pixels if pixels else 0.0
    return {
        "name": arm.name, "parameters": arm.parameters, "seconds": total / len(each), **means,
        "each": each,
    }  # fmt: skip


def table(result: dict) -> str:
    factor = result["factor"]
    lines = [
        f"Photographs x{factor}; means. PSNR and SSIM of luma without {factor} pixels at the border; LPIPS by "
        "SqueezeNet and AlexNet; ringing as benchmarks/ringing.py has it, in levels of 255; consistency in units of "
        "1e-5; CPU seconds. " + report.caption(result),
    ]
    for each in result["sets"]:
        lines += [
            "",
            f"**{each['name']}**, {each['count']} images:",
            "",
            "| | PSNR-Y | SSIM-Y | LPIPS squeeze | LPIPS alex | ringing | consistency | s a megapixel |",
            "|---" * 8 + "|",
        ]
        for row in each["rows"]:
            number = {key: "-" if row[key] is None else f"{row[key]:.1f}" for key in ("ringing", "consistency")}
            seconds = "-" if row["name"] == "bicubic" else f"{row['seconds_a_megapixel']:.1f}"
            lines.append(
                f"| {row['name']} | {row['psnr_y']:.2f} | {row['ssim_y']:.3f} | {row['lpips_squeeze']:.3f} "
                f"| {row['lpips_alex']:.3f} | {number['ringing']} | {number['consistency']} | {seconds} |"
            )
    return "\n".join(lines)


def fill_card(options: argparse.Namespace) -> None:
    """Puts the tables of a result into a model's card."""
    result, card = json.loads(Path(options.result).read_text(encoding="utf-8")), Path(options.output)
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- end of measured -->")
    card.write_text(f"{before}{begin}{table(result)}\n{end}{after}", encoding="utf-8")


def named(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PLACE")
    return name, place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    inputs, measuring, card = (commands.add_parser(name) for name in ("inputs", "measure", "card"))
    card.add_argument("--result", required=True, help="JSON of measure")
    for each in (inputs, measuring, card):
        each.add_argument("--output", required=True)
    for each in (inputs, measuring):
        each.add_argument("--factor", type=int, default=4)
    inputs.add_argument("--high", required=True, help="folder of originals")
    inputs.add_argument("--degradation", choices=("bicubic", "realistic"), default="realistic")
    inputs.add_argument("--strength", type=float, default=0.7)
    inputs.add_argument("--seed", type=int, default=0)
    measuring.add_argument("--sets", nargs="+", type=named, required=True, help="NAME=LOW,HIGH")
    measuring.add_argument("--models", nargs="*", type=named, default=[], help="NAME=FOLDER")
    measuring.add_argument("--files", nargs="*", type=named, default=[], help="NAME=FOLDER")
    measuring.add_argument("--details", nargs="*", type=float, default=[0.0, 0.5, 1.0])
    measuring.add_argument("--plan", default="fast", help="of models that sample")
    measuring.add_argument("--images", type=int, help="of each set, at most")
    measuring.add_argument("--pictures", help="folder for the outputs")
    measuring.add_argument("--alex_weights")
    measuring.add_argument("--squeeze_weights")
    measuring.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.command == "inputs":
        make_inputs(options)
    elif options.command == "card":
        fill_card(options)
    else:
        report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
