"""What the page says of plans and runs, in words."""

from pyrdiff.machine import duration

from .events import Level, Progress, Result, Waiting
from .model import Model
from .session import Outlook


def calls(count: int) -> str:
    return f"{count} network call{'' if count == 1 else 's'}"


# Plans.


def plan_choices(model: Model, enlarging: bool = False) -> list[tuple[str, str]]:
    """(what a plan is called in the page, its name), the quickest first."""
    pipeline = model.enlarger if enlarging else model.pipeline
    rows = []
    for name, network_calls in model.plans(pipeline).items():
        costs = [] if enlarging else model.costs({"plan": name})
        seconds = model.expected(costs)
        order = sum(cost.calls * cost.pixels for cost in costs)
        parts = [f"~{duration(seconds)}" if seconds is not None else network_calls, quality(name, model.quality)]
        rows.append((order, f"{name} {', '.join(filter(None, parts))}".strip(), name))
    return [(label, name) for _, label, name in sorted(rows, key=lambda row: row[0])]


def quality(name: str, measured: dict[str, tuple[float, float]]) -> str:
    """How good a plan's images are beside those of the others, by what was measured of the model."""
    if not measured:
        return ""
    if name not in measured:
        return "not measured"
    best, (value, low) = min(value for value, _ in measured.values()), measured[name]
    if value == best:
        return "best measured"
    if low <= best:
        return "about as good as the best"
    return "rougher" if value <= 1.5 * best else "rough"


# Runs.


def waiting(event: Waiting) -> str:
    return f"Waiting in line: {event.ahead} run{'' if event.ahead == 1 else 's'} before yours."


def progress(event: Progress) -> str:
    parts = [event.task] if event.task else []
    if event.steps:
        parts.append(f"step {min(event.step + 1, event.steps)} of {event.steps}")
    if event.window > 1 or event.windows > 1:
        parts.append(f"tile {event.window}" + (f" of {event.windows}" if event.windows > 1 else ""))
    if not event.steps:
        parts.append(calls(event.calls))
    parts.append(f"{duration(event.seconds)} so far")
    if event.seconds_left is not None:
        parts.append(f"about {duration(event.seconds_left)} left")
    return ", ".join(parts)


def done(result: Result, *facts: str) -> str:
    parts = [*facts, calls(result.calls), f"{result.seconds:.2f} s"]
    if result.consistency is not None:
        parts.append(f"consistency {result.consistency:.4f} (mean difference to the input when made smaller again)")
    return "; ".join([*parts, *result.notes])


def cost(part: Result | Level) -> list[str]:
    """Calls, area and seconds, a line each."""
    return [f"{part.calls} call{'' if part.calls == 1 else 's'}", f"{part.nfe_eq:.2f} NFE-eq", f"{part.seconds:.2f} s"]


def outlook(found: Outlook) -> str:
    before, after = ("{}×{}".format(*size) for size in (found.before, found.after))
    text = f"{before} → {after} pixels"
    if found.windows > 1:
        text += f" in {found.windows} tiles"
    if found.seconds is not None:
        text += f", about {duration(found.seconds)}"
    return "; ".join([text, *found.notes])


# Comparisons.


def verdict(results: list[Result], model: Model) -> list[str]:
    """Who won by what was measured, and by how much; what was not measured is said."""
    return [_fastest(results), _best(results, model)]


def _fastest(results: list[Result]) -> str:
    first, *others = sorted(results, key=lambda result: result.seconds)
    shown = [f"{each.seconds / first.seconds:.1f} times the {first.seconds:.2f} s for {each.name}" for each in others]
    if others[0].seconds < 1.1 * first.seconds:
        lead = f"{first.name} and {others[0].name} are about equally fast"
    else:
        lead = f"{first.name} is the fastest"
    return f"Time: {lead} ({', '.join(shown)}). One run each: what else this machine does counts in."


def _best(results: list[Result], model: Model) -> str:
    if all(result.consistency is not None for result in results):
        first, *others = sorted(results, key=lambda result: result.consistency)
        shown = ", ".join(f"{each.consistency:.4f} for {each.name}" for each in others)
        return (
            f"Fidelity: {first.name} is closest to the picture when made smaller again "
            f"({first.consistency:.4f}; {shown}). That does not say how natural the details look."
        )
    known = [result.name for result in results if result.name in model.quality]
    if len(known) < 2:
        return "Quality: not measured here; your eyes decide."
    first, *others = sorted(known, key=lambda name: model.quality[name][0])
    value = model.quality[first][0]
    shown = []
    for name in others:
        apart = "" if model.quality[name][1] > value else ", no clear difference"
        shown.append(f"{name} has {model.quality[name][0] / value:.2f} times that{apart}")
    said = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return (
        f"Quality, as measured with the model over many images: {first} has the least distance to real ones, {said}; "
        f"{'; '.join(shown)}. These few images measure nothing: your eyes decide."
    )
