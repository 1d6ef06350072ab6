"""
Results are JSON files; tables are printed from them, never typed. Fill the tables of the READMEs from the results:

    python benchmarks/report.py            # --check: only say whether they are up to date; --plots: draw those, too

A marker is `<!-- table: FILE -->` or, if the bench has several tables of a result, `<!-- table: FILE VIEW -->`. The
project's README has a summary.
"""

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: (\S+?)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def surroundings(threads: int, gpu: bool = True) -> dict:
    """What a timing depends on, beside the code: processor (the GPU, if it is used), threads, load, versions."""
    import torch

    from pyrdiff.machine import device_name, versions

    return {
        "device": device_name(torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")),
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": versions("pyrdiff", "torch", "diffusers"),
    }


def caption(result: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    load = result["load"][0]
    return f"{result['device']}, {result['threads']} threads, load {load} at the end; {versions}."


def save(result: dict, path: str) -> None:
    """Writes a result and prints its table."""
    print(table_of(write(result, path)))


def write(result: dict, path: str) -> Path:
    """Writes a result; a reader sees the file before it or after it."""
    from pyrdiff.data import replacing

    with replacing(path) as beside:
        beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


def table_of(path: Path, view: str | None = None) -> str:
    """The table of a result, by the bench that made it; `view` chooses one of several."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return importlib.import_module(result["bench"]).table(result, **({"view": view} if view else {}))


def summary() -> str:
    """The project's README: some rows of the tables, each beside what it stands against."""

    def read(name: str) -> dict:
        return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))

    faces, larger, quick = read("faces.json"), read("sr_faces_frontier.json"), read("pixel_aware_ddpm.json")
    lines = ["| | | Fréchet [95 %] or LPIPS | seconds an image |", "|---|---|---|---|"]
    for name, arm in (
        ("pyramid of 30/4/4 calls", "saved plan fast"),
        ("pyramid of 20/3/2 calls", "pyramid 20/3/2, SDE-DPM-Solver++"),
        ("*DPM-Solver++, 20 calls at full size*", "DPM-Solver++ 20"),
    ):
        row = faces["arms"][arm]
        low, high = row["score"]["frechet_interval"]
        seconds = row["seconds"]["throughput"]["median"] / 16  # timed 16 at a time
        lines.append(
            f"| faces, 64x64 | {name} | {row['score']['frechet']:.0f} [{low:.0f}, {high:.0f}] | {seconds:.2f} |"
        )
    rows = {row["name"]: row for row in larger["rows"]}
    for name, arm in (("SR4, plan fast, 4 calls", "found 4: SDE-DPM-Solver++"), ("*bicubic*", "bicubic")):
        row = rows[arm]
        seconds = f"{row['seconds_an_image']:.2f}" if row["seconds_an_image"] else "-"
        low, high = row["lpips_interval"]
        lines.append(
            f"| faces, 16x16 to 64x64 | {name} | LPIPS {row['lpips']:.3f} [{low:.3f}, {high:.3f}] | {seconds} |"
        )
    rows = {(row["method"], row["name"]): row for row in quick["rows"]}
    for name, arm in (
        ("pixel-aware, 1 call", ("pixel-aware", "1 pass")),
        ("pixel-aware, 2 calls", ("pixel-aware", "2 passes, at 200 and 50")),
        ("*DPM-Solver++, 10 calls, ordinary DDPM*", ("DDPM", "DPM-Solver++ 10")),
        ("*SDE-DPM-Solver++, 20 calls, the same*", ("DDPM", "SDE-DPM-Solver++ 20")),
    ):
        row = rows[arm]
        low, high = row["frechet_interval"]
        lines.append(
            f"| Fashion-MNIST, 32x32 | {name} | {row['frechet']:.0f} [{low:.0f}, {high:.0f}] | {row['seconds']:.4f} |"
        )
    photographs = read("photos_x4.json")["sets"][0]
    rows = {row["name"]: row for row in photographs["rows"]}
    for name, arm in (
        ("photos-x4, 1 call", "photos-x4, detail 1"),
        ("*Real-ESRGAN x4plus*", "Real-ESRGAN x4plus"),
        ("*bicubic*", "bicubic"),
    ):
        row = rows[arm]
        seconds = "-" if arm == "bicubic" else f"{row['seconds']:.2f}"
        lines.append(
            f"| photographs x4, {photographs['name']} | {name} | LPIPS {row['lpips_squeeze']:.3f}, "
            f"PSNR {row['psnr_y']:.1f} dB | {seconds} |"
        )
    return "\n".join(lines)


def draw_plots() -> None:
    """Draws the plot of every result whose bench has one, beside its JSON file."""
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        bench = importlib.import_module(result["bench"])
        if hasattr(bench, "plot"):
            bench.plot(result, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    options = parser.parse_args()
    for readme, printed in (
        (HERE / "README.md", lambda found: table_of(HERE / "results" / found[2], found[3])),
        (HERE.parent / "README.md", lambda found: {"summary": summary}[found[2]]()),
    ):
        text = readme.read_text(encoding="utf-8")
        filled = TABLE.sub(lambda found, printed=printed: f"{found[1]}{printed(found)}\n{found[4]}", text)
        if options.check and filled != text:
            sys.exit(f"{readme}: its tables are not those of the results; run benchmarks/report.py")
        if not options.check:
            readme.write_text(filled, encoding="utf-8")
    if options.plots:
        draw_plots()


if __name__ == "__main__":
    main()
