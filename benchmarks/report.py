"""
Results are JSON files; tables are printed from them, never typed. Fill the tables of the README from the results:

    python benchmarks/report.py            # --check: only say whether they are up to date; --plots: draw those, too

A marker is `<!-- table: FILE -->` or, if the bench has several tables of a result, `<!-- table: FILE VIEW -->`.
"""

import argparse
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: (\S+?)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def surroundings(threads: int, gpu: bool = True) -> dict:
    """What a timing depends on, beside the code: processor (the GPU, if it is used), threads, load, versions."""
    import diffusers
    import torch

    import pyrdiff

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name()
        if gpu and torch.cuda.is_available()
        else (names or [platform.processor()])[0],
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": {
            "pyrdiff": pyrdiff.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def caption(result: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    load = result["load"][0]
    return f"{result['device']}, {result['threads']} threads, load {load} at the end; {versions}."


def save(result: dict, path: str) -> None:
    """Writes a result and prints its table."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(target)
    print(table_of(target))


def table_of(path: Path, view: str | None = None) -> str:
    """The table of a result, by the bench that made it; `view` chooses one of several."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return importlib.import_module(result["bench"]).table(result, **({"view": view} if view else {}))


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
    check = options.check
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = TABLE.sub(lambda found: found[1] + table_of(HERE / "results" / found[2], found[3]) + "\n" + found[4], text)
    if check and filled != text:
        sys.exit("benchmarks/README.md: its tables are not those of the results; run benchmarks/report.py")
    if not check:
        readme.write_text(filled, encoding="utf-8")
    if options.plots:
        draw_plots()


if __name__ == "__main__":
    main()
