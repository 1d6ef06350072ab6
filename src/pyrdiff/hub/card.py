"""Model cards: what is known when a model is exported, and what is filled in when it is measured and published."""

import inspect
import math
import os
import re
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pyrdiff.parts.json_files import LARGEST, read_json
from pyrdiff.parts.wrappers import plain

from .messages import in_one_line

PLACE = "PATH_OR_REPO"  # replaced by the repository's name when the card is published

NOT_MEASURED = "Not measured. `pyrdiff bench` measures it, and `pyrdiff push --bench` puts the table here."
CARD = """
# {title}

{description}

<!-- pictures -->
<!-- end of pictures -->

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
{call}
```

`trust_remote_code` is needed because the folder carries the pipeline's own code. Where pyrdiff is installed, none of it
runs: `pyrdiff.load("PATH_OR_REPO")`.

## Measured

<!-- measured -->
{measured}
<!-- end of measured -->

## Training

{training}

Images: {data}

## Limits

{limits}
"""


ADAPTER_CARD = """
# {title}

An adapter (LoRA) over the model `{base}`. {description}

```python
import pyrdiff

pipeline = pyrdiff.load("{base}", adapters={{"PATH_OR_REPO": 1.0}})
```

With diffusers alone: `pipeline.unet.load_lora_adapter("PATH_OR_REPO", prefix=None, use_safetensors=True)`.
Both need peft.

## Training

{training}

Images: {data}
"""


def needs_image(pipeline_class: type) -> bool:
    """True if a call cannot do without an image: such a pipeline enlarges or restores, others generate."""
    image = inspect.signature(pipeline_class.__call__).parameters.get("image")
    return image is not None and image.default is inspect.Parameter.empty


def write(
    pipeline: DiffusionPipeline,
    title: str,
    description: str,
    license: str | None,
    training: dict[str, object],
    data: str | None,
    limits: str,
) -> str:
    """The card of a model that was just exported."""
    enlarges = needs_image(type(pipeline))
    classes = class_names(pipeline)
    values = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image" if enlarges else "unconditional-image-generation",
        license=license,
        tags=["pyrdiff", "pixel-space", type(pipeline).__name__],
    )
    if classes:
        training = {**training, "classes": ", ".join(classes)}
    rows = [f"| {name} | {_cell(value)} |" for name, value in training.items()]
    text = CARD.format(
        title=title,
        description=description,
        call=_call(enlarges, classes),
        measured=NOT_MEASURED,
        training="\n".join(["| | |", "|---|---|", *rows]) if rows else "Nothing was recorded.",
        data=data or "not described; nor is their licence.",
        limits=limits or "Not described.",
    )
    return f"---\n{values.to_yaml()}\n---\n{text}"


def write_adapter(
    title: str,
    base: str,
    description: str,
    license: str | None,
    training: dict[str, object],
    data: str | None,
) -> str:
    """The card of an adapter that was just trained."""
    on_hub = base.count("/") == 1
    values = ModelCardData(
        library_name="diffusers", license=license, tags=["pyrdiff", "lora"], base_model=base if on_hub else None
    )
    text = ADAPTER_CARD.format(
        title=title,
        base=base,
        description=description,
        training="\n".join(
            ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in training.items())]
        ),
        data=data or "not described; nor is their licence.",
    )
    return f"---\n{values.to_yaml()}\n---\n{text}"


def class_names(pipeline: DiffusionPipeline) -> list[str]:
    """Of the classes that the pipeline's network knows."""
    network = getattr(pipeline, "unet", None)
    config = {} if network is None else getattr(plain(network), "config", {})
    return list(config.get("class_names") or [])


def _call(enlarges: bool, classes: list[str]) -> str:
    """The line that shows how the pipeline is called."""
    if enlarges:
        return "larger = pipeline(image).images[0]"
    if classes:
        return f"images = pipeline(classes={classes[:4]}, guidance_scale=2.0).images"
    return "images = pipeline(batch_size=4).images"


def fill(
    text: str,
    *,
    name: str | None = None,
    license: str | None = None,
    bench: dict | None = None,
    pictures: dict[str, str] | None = None,
) -> str:
    """
    A card with what is given filled in; what a person wrote into it stays.

    Args:
        text: The card.
        name: What to load it by, for the snippet.
        license: Licence identifier.
        bench: A result of `pyrdiff bench`; `ValueError` if something is missing in it.
        pictures: {file: what it shows}.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    data = card.data
    if license is not None:
        data.license = license
    if name is not None:
        text = text.replace(PLACE, name)
    if bench is not None:
        try:
            text = _between(text, "measured", measured(bench))
        except (KeyError, TypeError) as error:
            raise ValueError(f"bench: expected a result of `pyrdiff bench`, which has {error}") from error
        data.model_name = name or bench["model"]["name"]
        data.eval_results = eval_results(bench, data.pipeline_tag)
    if pictures:
        text = _between(text, "pictures", "\n\n".join(f"![{shows}]({file})" for file, shows in pictures.items()))
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return f"---\n{data.to_yaml()}\n---\n{body}"


def of_other_weights(text: str, rows: dict[str, object]) -> str:
    """
    The card of a model with other weights of the same training: nothing is measured of these, and no picture is theirs.

    Args:
        text: The model's card.
        rows: {name: value} for the table of its training.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data.eval_results = None
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = _between(_between(body, "measured", NOT_MEASURED), "pictures", "")
    before, head, after = body.partition("## Training\n\n| | |\n|---|---|\n")
    lines = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items())
    body = f"{before}{head}{lines}{after}" if head else f"{body.rstrip()}\n\n| | |\n|---|---|\n{lines}"
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


def read(path: Path) -> str:
    """
    The text of a card.

    Raises:
        ValueError: if it is too large, no text, or its metadata are none.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"has {path.stat().st_size} bytes; expected at most {LARGEST}")
        text = path.read_text(encoding="utf-8")
        ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: expected a model card: {in_one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: expected a model card, its metadata nested less deeply") from error
    return text


def read_bench(path: str | os.PathLike) -> dict:
    """
    A result of `pyrdiff bench`.

    Raises:
        ValueError: for another file.
    """
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"bench: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != "pyrdiff bench":
        raise ValueError(f"bench={str(path)!r}: expected a result of `pyrdiff bench`")
    return result


def table(result: dict) -> str:
    """
    A bench as a Markdown table: an arm a row, yardsticks marked.

    Args:
        result: What `pyrdiff bench` wrote, read from its JSON.

    Raises:
        ValueError: for another file's content.
    """
    if not isinstance(result, dict) or result.get("kind") != "pyrdiff bench" or not result.get("arms"):
        raise ValueError("result: expected what `pyrdiff bench` writes, with the kind 'pyrdiff bench' and arms")
    arms = result["arms"]
    measures = {name: row["higher_is_better"] for arm in arms.values() for name, row in arm["metrics"].items()}
    planned = any(arm["nfe_eq"] is not None for arm in arms.values())
    head = ["", "network calls", *["NFE-eq"] * planned, "ms an image", "latency, ms"]
    rows = [head + [f"{name} {'↑' if higher else '↓'}" for name, higher in measures.items()]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for name, arm in arms.items():
        name = " ".join(name.split()).replace("|", "\\|")
        row = [f"{name} (yardstick)" if arm["yardstick"] else name, str(arm["network_calls"])]
        row += [_shown(arm["nfe_eq"])] * planned + [_shown(arm["ms_per_image"]), _shown(arm["latency_ms"])]
        rows.append(row + [_measured(arm["metrics"].get(measure)) for measure in measures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured(bench: dict) -> str:
    """The table of a bench, and how its numbers came about."""
    conventions, reference = bench["conventions"], bench["reference"]
    how = [f"{conventions['count']} images an arm, seed {bench['seed']}"]
    how.append(f"against {reference['images']} of {reference['name']}")
    if conventions.get("features"):
        how[-1] += f" in {conventions['features']['network']} features"
    if conventions.get("scale_factor"):
        how.append(f"enlarged by {conventions['scale_factor']} after {conventions['low_res']}")
    how += [conventions["resize"]] if conventions.get("resize") else []
    how += [f"brackets: {conventions['interval']}", f"times: {conventions['time']}"]
    how.append(f"{bench['device']}, {bench['threads']} threads, load {bench['load']} before")
    versions = ", ".join(f"{name} {number}" for name, number in bench["versions"].items())
    return f"{table(bench)}\n\n{'; '.join(how)}; {versions}."


def eval_results(bench: dict, task: str | None) -> list[EvalResult]:
    """The measures of every arm that is no yardstick, as the Hub's model index takes them."""
    results = []
    for arm, row in bench["arms"].items():
        for metric, measured in row["metrics"].items():
            if not row["yardstick"] and isinstance(measured["value"], (int, float)):
                results.append(
                    EvalResult(
                        task_type=task or "image-to-image",
                        dataset_type=bench["reference"]["name"],
                        dataset_name=f"{bench['reference']['name']} ({bench['reference']['images']} images)",
                        metric_type=metric,
                        metric_name=f"{metric}, {arm}",
                        metric_value=measured["value"],
                    )
                )
    return results


def _between(text: str, name: str, new: str) -> str:
    """`new` between the two marks of a section; at the end if a person took the marks out."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        return f"{text.rstrip()}\n\n{begin}\n{new}\n{end}\n"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _measured(row: dict | None) -> str:
    if row is None:
        return "-"
    between = row["interval"]
    return _shown(row["value"]) + ("" if between is None else " [{}, {}]".format(*map(_shown, between)))


def _shown(value: float | str | None) -> str:
    """Three digits, without exponents in between."""
    if value is None:
        return "-"
    value = float(value)
    if not math.isfinite(value) or value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
