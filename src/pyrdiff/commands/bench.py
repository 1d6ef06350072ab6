"""
Time and measure ways of calling one saved model, side by side in one run.

Example: pyrdiff bench runs/mine/pipeline --reference my_test_images -o bench.json

An arm is {name: arguments of the call}. Of a model that generates they are its named plans, the default call and, where
it can run them, solvers of stock diffusion at full size; of one that enlarges its plans and bicubic. All arms are timed
first, in turn, and scored after that. For a quicker run name some with --only, or lower --runs and --num_images. Plans
of more than 50 NFE-eq run only if they are named there.
"""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.evaluate import check_resolution
from pyrdiff.commands.paths import check_paths
from pyrdiff.commands.sample import write_json
from pyrdiff.commands.tuning import tune_saved
from pyrdiff.machine import device_name, in_turn, open_device, versions
from pyrdiff.parts.json_files import read_json

if TYPE_CHECKING:
    from pyrdiff.commands.bench_tasks import Arm, Task

SLOW = 50  # NFE-eq; slower plans have to be asked for
LEAST = 4  # images, for the third nearest other one that precision and recall look at
OURS = ("batch_size", "image", "scale_factor", "num_samples", "generator", "output_type", "return_dict")  # no arm's


@dataclass(kw_only=True)
class BenchSettings:
    """Flags of `pyrdiff bench`."""

    model: str
    """Folder of a saved pipeline, or a repository on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    reference: str
    """Folder, .npy or .npz of real images, best held out; fitted to the model's size."""
    array_key: str | None = None
    """Array of an .npz reference."""
    resolution: tuple[int, ...] | None = None
    """Side, or height and width, to fit the reference to; by default the size of what the model generates."""
    output: str
    """JSON to write, which `pyrdiff push` can put into the model card."""
    arms: str | None = None
    """JSON file with further arms, {name: {argument of the call: value}}."""
    only: tuple[str, ...] = ()
    """Names of the arms to run; by default all."""
    num_images: int = 256
    """Images an arm that are scored: generated ones, or the first of the reference to be enlarged."""
    batch_size: int = 16
    """Images a call."""
    runs: int = 5
    """Timed runs of every arm, after one to warm up; the median counts."""
    features: Literal["squeezenet", "alexnet", "inception", "dinov2", "classifier"] = "inception"
    """Feature network of the distances; inception gives FID."""
    weights: str | None = None
    """File of the feature network; by default downloaded."""
    lpips_network: Literal["alex", "squeeze", "vgg"] = "alex"
    """Trunk of LPIPS."""
    lpips_weights: str | None = None
    """File of LPIPS's trunk; by default downloaded, and LPIPS is left out where that fails."""
    scale_factor: int | None = None
    """How much smaller the inputs of a model that enlarges are made; by default what its call has."""
    resamples: int = 100
    """For the 95 % intervals; 0 for none."""
    seed: int = 0
    """Image k has the seed SEED + k, in all arms."""
    device: str | None = None
    """By default the GPU if there is one."""
    tune: float | None = None
    """Instead of a bench: search for so many minutes for the model's own plans, by the distance from the reference, and
    write them into its folder."""

    def __post_init__(self):
        for name, least in (("num_images", LEAST), ("batch_size", 1), ("runs", 1)):
            expect(self, name, getattr(self, name) >= least, f"{least} or more")
        check_resolution(self)
        expect(self, "scale_factor", self.scale_factor is None or self.scale_factor >= 2, "2 or more")
        expect(self, "resamples", self.resamples == 0 or self.resamples >= 2, "0, or 2 or more")
        writable = not Path(self.output).is_dir() and not any(folder.is_file() for folder in Path(self.output).parents)
        expect(self, "output", writable, "a file to write")
        expect(self, "tune", self.tune is None or self.tune > 0, "minutes, above 0")


def main(args: list[str]) -> dict:
    options = parse(BenchSettings, __doc__, args, prog="pyrdiff bench")
    files = ["arms", "weights", "lpips_weights"]
    check_paths(options, models=["model"], images=["reference"], files=files, written=["output"])
    if options.tune is not None:
        announce(f"{options.tune:g} minutes of search for plans of {options.model}, by images of {options.reference}")
        return tune_saved(options)
    announce(
        f"{options.model} beside images of {options.reference}: each way is timed {options.runs} times and scored, "
        f"into {options.output} (Ctrl-C keeps the ways that are scored)"
    )
    import torch
    from tqdm import tqdm

    from pyrdiff.hub import card

    # 1. What could be wrong, before any work.
    further = read_arms(options.arms)
    task = open_task(options)
    arms = choose_arms(task, further, options)

    # 2. Timing, then scoring.
    task.prepare()
    load = os.getloadavg()[0]
    times = time_arms(task, arms, options)
    rows, code = {}, 0
    try:
        with tqdm(total=len(arms) * task.scored_images, unit="image", disable=None) as task.bar:
            for name, arm in arms.items():
                task.bar.set_description(f"scoring {name}")
                row = {"arguments": arm.arguments or {}, "yardstick": arm.yardstick, **times[name]}
                rows[name] = {**row, "nfe_eq": arm.nfe_eq, "metrics": task.score(name, arm)}
    except (KeyboardInterrupt, SystemExit) as stopped:  # Ctrl-C and SIGTERM
        if not rows:
            raise
        code = getattr(stopped, "code", 130)

    # 3. One JSON, without paths of this machine.
    named = ("num_images", "batch_size", "runs", "features", "lpips_network", "resamples", "only", "array_key")
    result = {
        "kind": "pyrdiff bench",
        "pipeline": type(task.pipeline).__name__,
        "task": task.name,
        "model": {"name": name_of(options.model), "revision": options.revision},
        "reference": {"name": name_of(options.reference), "images": task.reference_images},
        "conventions": {
            **task.conventions,
            "images": "8 bits a channel, as PIL images have them",
            "interval": "95 %, bootstrap over an arm's images, for the figure at this count",
            "time": f"whole calls up to PIL images, arms in turn after a warm-up, median of {options.runs}; "
            f"ms_per_image at batch {options.batch_size}, latency_ms at batch 1",
            "nfe_eq": "network calls an image, weighted by area; 1 is a call at the size of the result",
        },
        "settings": {name: getattr(options, name) for name in (*named, "resolution", "scale_factor")},
        "versions": versions(),
        "device": device_name(task.device),
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "seed": options.seed,
        "arms": rows,
        "not_reached": [name for name in arms if name not in rows],
    }
    result = json.loads(json.dumps(result, allow_nan=False))
    write_json(result, Path(options.output))
    print(card.table(result))
    print(f"{len(rows)} of {len(arms)} ways: {options.output}")
    if Path(options.model).is_dir():
        model, bench = shlex.quote(options.model), shlex.quote(options.output)
        print(f"next: pyrdiff push {model} user/name --bench {bench} --dry_run")
    return {**result, "exit_code": code}


def open_task(options: BenchSettings) -> "Task":
    """The model and the reference images, read and checked."""
    import pyrdiff
    from pyrdiff.commands.bench_tasks import Enlarging, Generating
    from pyrdiff.data import open_source
    from pyrdiff.hub import needs_image

    source = open_source(Path(options.reference), array_key=options.array_key)
    if len(source) < LEAST:
        raise ValueError(f"--reference: has {len(source)} images; expected {LEAST} or more")
    device = open_device(options.device)
    pipeline = pyrdiff.load(options.model, revision=options.revision).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return (Enlarging if needs_image(type(pipeline)) else Generating)(pipeline, source, options, device)


def name_of(place: str) -> str:
    """The last part of a path, of a training its folder's, or a repository's name."""
    if not Path(place).exists():
        return place
    path = Path(place).resolve()
    return path.parent.name if path.name == "pipeline" else path.name


# Arms


def read_arms(path: str | None) -> dict[str, dict]:
    """The arms of a JSON file. Raises `ValueError` for another file."""
    if path is None:
        return {}
    try:
        arms = read_json(path)
    except ValueError as error:
        raise ValueError(f"--arms: {error}") from error
    if not isinstance(arms, dict) or not all(isinstance(arguments, dict) for arguments in arms.values()):
        raise ValueError(f"--arms: {path!r}: expected {{name: {{argument of the call: value}}}}")
    return arms


def choose_arms(task: "Task", further: Mapping[str, dict], options: BenchSettings) -> "dict[str, Arm]":
    """
    The pipeline's own arms and those of the file, as far as they were asked for.

    Args:
        task: Of the pipeline.
        further: {name: arguments of the call} from the file.
        options: `only` says what was asked for.

    Returns:
        {name: arm}. An own arm that this model cannot run is left out with a line on stderr.

    Raises:
        ValueError: for all else that is wrong.
    """
    from pyrdiff.commands.bench_tasks import Arm

    arms, accepted = task.arms(), sorted(set(task.takes) - set(OURS))
    for name, arguments in further.items():
        unknown = sorted(set(arguments) - set(accepted))
        if unknown:
            raise ValueError(f"--arms: {name!r} has {unknown}; expected arguments of the call: {accepted}")
        arms[name] = Arm(arguments)
    expect(options, "only", set(options.only) <= set(arms), f"some of {list(arms)}")
    asked = set(options.only) or set(arms)
    chosen = {}
    for name, arm in arms.items():
        if name not in asked:
            continue
        try:
            size, arm.nfe_eq = task.planned(arm)
        except ValueError as error:
            if name in further or options.only:
                raise ValueError(f"arm {name!r}: {error}") from error
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        if arm.nfe_eq is not None and arm.nfe_eq > SLOW and name not in (*further, *options.only):
            print(f"left out: {name}: {arm.nfe_eq:.0f} NFE-eq; --only with its name runs it", file=sys.stderr)
            continue
        if size is not None and tuple(size) != task.size:
            raise ValueError(
                f"arm {name!r}: its images have size {tuple(size)}, the reference {task.size}; expected one size, or "
                "--resolution to fit the reference"
            )
        chosen[name] = arm
    if not chosen:
        raise ValueError("--arms: the model can run none of its own; expected a file with some that it can")
    return chosen


# Time


def time_arms(task: "Task", arms: "Mapping[str, Arm]", options: BenchSettings) -> dict[str, dict]:
    """{name: network calls, ms an image and latency} of every arm."""
    import torch

    calls = dict.fromkeys(arms, 0)

    def run(name: str, batch: int, turn: int) -> None:
        """One call. Its network calls are counted while it warms up, so that no hook is timed."""
        inputs = task.inputs(range(batch))
        if turn >= 0:
            task.images(name, arms[name], inputs)
            return
        calls[name] = 0

        def count(*_) -> None:
            calls[name] += 1

        networks = [task.pipeline.unet, getattr(task.pipeline, "guide", None)]
        hooks = [network.register_forward_pre_hook(count) for network in networks if network is not None]
        try:
            task.images(name, arms[name], inputs)
        finally:
            for hook in hooks:
                hook.remove()

    works = {(name, batch): partial(run, name, batch) for name in arms for batch in (1, options.batch_size)}
    with torch.no_grad():
        seconds = in_turn(works, options.runs, task.device, progress="timing")
    return {
        name: {
            "network_calls": calls[name],
            "ms_per_image": digits(1000 * statistics.median(seconds[name, options.batch_size]) / options.batch_size),
            "latency_ms": digits(1000 * statistics.median(seconds[name, 1])),
        }
        for name in arms
    }


def digits(value: float, count: int = 4) -> float:
    """The value with so many significant digits."""
    return float(f"{value:.{count}g}")
