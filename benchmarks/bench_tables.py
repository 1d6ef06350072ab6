"""The tables and the plot of a result of `bench.py`."""

import os

LATENCY_BATCH = 1


def _throughput(row: dict | None, result: dict) -> float | None:
    """Images a second."""
    timed = (row or {}).get("seconds", {}).get("throughput")
    return result["timed"]["batch_size"] / timed["median"] if timed else None


def _peers(result: dict) -> dict[str, tuple[float, bool]]:
    """Images a second of the loops to be compared with, and whether that was timed or scaled by network calls."""
    rows, found = result["arms"], {}
    stock = [row for row in rows.values() if row["settings"]["loop"] == "stock" and _throughput(row, result)]
    for name in ("DPM-Solver++ 20", "DDPM 1000"):
        speed = _throughput(rows.get(name), result)
        if speed is not None:
            found[name] = (speed, True)
        elif name == "DDPM 1000" and stock:
            longest = max(stock, key=lambda row: row["nfe_eq"])
            found[name] = (_throughput(longest, result) * longest["nfe_eq"] / 1000, False)
    return found


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def _cells(row: dict, result: dict) -> dict[str, str]:
    """The cells of an arm, by column."""
    seconds, score = row.get("seconds", {}), row.get("score")
    speed, peers = _throughput(row, result), _peers(result) if "timed" in result else {}
    cells = {
        "calls": "/".join(_number(n) if n % 1 else f"{n:.0f}" for _, n in row.get("calls", [])) or "-",
        "NFE-eq": f"{row['nfe_eq']:.2f}" if "nfe_eq" in row else "-",
        "latency, s": "-",
        "images/s": _number(speed),
        "peak, MiB": f"{row['memory'] / 2**20:.0f}" if "memory" in row else "-",
    }
    if "latency" in seconds:
        latency = seconds["latency"]
        cells["latency, s"] = f"{latency['median']:.3f} ({latency['min']:.3f})"
        if len(latency["values"]) != result["timed"]["runs"]:
            cells["latency, s"] += f" of {len(latency['values'])}"
    for name in ("DPM-Solver++ 20", "DDPM 1000"):
        theirs, timed = peers.get(name, (None, True))
        ratio = speed / theirs if speed and theirs else None
        cells[f"vs {name}"] = "-" if ratio is None else f"{'' if timed else '~'}×{_number(ratio)}"
    if score:
        low, high = score["frechet_interval"]
        cells["Fréchet [95 %]"] = f"{_number(score['frechet'])} [{_number(low)}, {_number(high)}]"
        cells["KID"] = _number(score["kid"])
        cells["precision / recall"] = " / ".join(f"{value:.2f}" for value in score["precision_recall"])
        cells["power an octave"] = " ".join(f"{value:.2f}" for value in score["octaves"])
    return cells


COLUMNS = {
    "main": None,
    "speed": ["calls", "NFE-eq", "latency, s", "images/s", "vs DDPM 1000", "vs DPM-Solver++ 20", "Fréchet [95 %]"],
    "strength": ["calls", "NFE-eq", "images/s", "vs DDPM 1000", "Fréchet [95 %]", "KID", "power an octave"],
    "levels": ["calls", "NFE-eq", "images/s", "vs DDPM 1000", "Fréchet [95 %]", "KID", "power an octave"],
}


def table(result: dict, view: str = "main") -> str:
    """
    A table of a result: "main"; "speed" (paper P, table 1), "strength" (table 2) or "levels" (table 4); "all" rows.
    Raises `ValueError` for another view.
    """
    if view not in (*COLUMNS, "all"):
        raise ValueError(f"view={view!r}: expected one of {[*COLUMNS, 'all']}")
    rows = {name: row for name, row in result["arms"].items() if view == "all" or view in row["views"]}
    cells = {name: _cells(row, result) for name, row in rows.items()}
    if "real" in result:
        cells["real images"] = {
            key: value for key, value in _cells(result["real"], result).items() if key not in ("calls", "NFE-eq")
        }
    columns = COLUMNS.get(view) or list(dict.fromkeys(key for row in cells.values() for key in row))
    lines = [_caption(result), "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '-') for column in columns)} |")
    return "\n".join(lines)


def _caption(result: dict) -> str:
    parts = [
        f"{result['model']['parameters'] / 1e6:.2g}M parameters at {result['model']['resolutions']}, "
        f"{result['precision']}, seed {result['seed']}; {result['clip']}."
    ]
    if "scored" in result:
        scored = result["scored"]
        parts.append(
            f"{scored['features']} features (not FID), {scored['images']} images an arm against "
            f"{scored['compared_with']['frechet']} real ones "
            f"({scored['compared_with']['others']} but for the distance); real images: as many others."
        )
    if "timed" in result:
        timed = result["timed"]
        versions = ", ".join(f"{name} {number}" for name, number in timed["versions"].items())
        parts.append(
            f"Latency at batch {LATENCY_BATCH}, median (min) of {timed['runs']}; images/s and ratios at batch "
            f"{timed['batch_size']}, ~ scaled by network calls. {timed['device']}, {timed['threads']} threads, load "
            f"{timed['load_before']} before and {timed['load'][0]} after; {versions}."
        )
    if "memory" in result:
        parts.append(f"Memory: {result['memory']['what']}, batch {result['memory']['batch_size']}.")
    return " ".join(parts)


def plot(result: dict, path: str | os.PathLike) -> bool:
    """Frechet distance against seconds an image, a curve a method, as a PNG; `False` if no arm has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list] = {}
    for row in result["arms"].values():
        speed = _throughput(row, result)
        if speed and "score" in row:
            low, high = row["score"]["frechet_interval"]
            value = row["score"]["frechet"]
            curves.setdefault(row["method"], []).append((1 / speed, value, max(value - low, 0), max(high - value, 0)))
    if not curves:
        return False
    figure = Figure(figsize=(9, 5), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    for index, (method, points) in enumerate(curves.items()):
        seconds, values, below, above = zip(*sorted(points), strict=True)
        ours = method.startswith("pyramid")
        style = dict(marker="o" if ours else "s", linestyle="-" if ours else "--", color=f"C{index % 10}")
        axes.errorbar(seconds, values, (below, above), label=method, capsize=2, elinewidth=0.7, ms=5, **style)
    if "real" in result:
        axes.axhline(result["real"]["score"]["frechet"], color="gray", linewidth=1, label="real images")
    axes.set_xlabel(f"seconds an image, batch {result['timed']['batch_size']}")
    axes.set_ylabel(f"Fréchet distance, {result['scored']['features']}, {result['scored']['images']} images")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return True
