"""
The plans that `pyrdiff bench --tune` found for a model, on fresh seeds, beside those that it had before:

    pyrdiff bench runs/mine/pipeline --reference held_out --tune 9 --output tuning.json
    python benchmarks/tuning.py --name faces --model runs/mine/pipeline --search tuning.json --before model_index.json \
        --reference train --weights squeezenet.pth --result benchmarks/results/tuning.json

`--before` is a copy of the folder's model_index.json from before the search. The result keeps the other models' rows.
"""

import argparse
import json
from pathlib import Path

import engine
import report
import scoring

NAMES = ("fast", "balanced", "best")


def measure(options) -> dict:
    """The rows of one model: its plans of before and those that were found, each plan once."""
    import torch

    import pyrdiff

    torch.set_num_threads(1)
    search = json.loads(Path(options.search).read_text(encoding="utf-8"))
    earlier = json.loads(Path(options.before).read_text(encoding="utf-8")).get("plans") or {}
    pipeline = pyrdiff.load(options.model)
    pipeline.set_progress_bar_config(disable=True)
    top, channels = pipeline.unet.config.resolutions[-1], pipeline.unet.config.image_channels
    size = tuple(top) if isinstance(top, (list, tuple)) else (top, top)
    scorer = scoring.Scorer(
        options.reference, options.array_key, size, channels, options.features, options.weights,
        torch.device("cpu"), 0, 3000, 0, 200,
    )  # fmt: skip
    plans = {name: found["plan"] for name, found in search["plans"].items()}
    plans |= {f"{name}, before": plan for name, plan in earlier.items() if name in NAMES}
    rows = []
    for name, plan in plans.items():
        same = next((row for row in rows if row["arguments"] == plan), None)
        if same is not None:
            same["plan"] += f" = {name}"
            continue
        path = Path(options.samples) / f"{options.name} {name}.npy".replace(" ", "_").replace(",", "")
        images = engine.sample(pipeline, plan, options.count, path, bf16=True)
        searched = search["plans"].get(name, {})
        rows.append(
            {
                "plan": name,
                "arguments": plan,
                "nfe_eq": pipeline.plan(plan=plan).nfe_eq,
                "searched": {key: searched.get(key) for key in ("distance", "interval", "samples")},
                **scorer(images),
            }
        )
    spent = {key: search[key] for key in ("seconds", "rounds", "held_out", "yardstick")}
    return {**spent, "compared_with": scorer.description["compared_with"], "rows": rows}


def table(result: dict) -> str:
    """Every plan of every model."""
    lines = [
        f"{result['features']} features (not FID), samples in bfloat16. Searches compare with images held out, fresh "
        f"seeds with training images. {report.caption(result)}",
        "",
        "| model | search | plan | NFE-eq | KID, searched [95 %] | KID, fresh seeds | Fréchet, fresh seeds [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        rounds = ", ".join(f"{plans} plans x {samples}" for plans, samples in model["rounds"])
        how = f"{model['seconds'] / 60:.1f} minutes: {rounds}; {model['held_out']} images"
        for row in model["rows"]:
            searched, low_high = row["searched"], "-"
            if searched["distance"] is not None:
                low_high = "{:.3g} [{:.3g}, {:.3g}]".format(searched["distance"], *searched["interval"])
            frechet = "{:.0f} [{:.0f}, {:.0f}], {} images".format(
                row["frechet"], *row["frechet_interval"], row["images"]
            )
            lines.append(
                f"| {name} | {how} | {row['plan']} | {row['nfe_eq']:.1f} | {low_high} | {row['kid']:.3g} | {frechet} |"
            )
            name, how = "", ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model, in the table")
    parser.add_argument("--model", required=True)
    parser.add_argument("--search", required=True, help="what `pyrdiff bench --tune` wrote")
    parser.add_argument("--before", required=True, help="model_index.json of before the search")
    parser.add_argument("--reference", required=True, help="training images")
    parser.add_argument("--array_key")
    parser.add_argument("--features", default="squeezenet")
    parser.add_argument("--weights", help="of the feature network")
    parser.add_argument("--count", type=int, default=250, help="samples a plan")
    parser.add_argument("--samples", default="runs/tuning", help="folder to keep them in")
    parser.add_argument("--result", required=True)
    options = parser.parse_args()
    path = Path(options.result)
    earlier = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    models = {**earlier, options.name: measure(options)}
    result = {"bench": "tuning", "features": options.features, "models": models, **report.surroundings(1, gpu=False)}
    report.save(result, options.result)


if __name__ == "__main__":
    main()
