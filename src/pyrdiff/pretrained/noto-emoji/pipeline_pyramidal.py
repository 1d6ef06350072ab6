# SPDX-License-Identifier: Apache-2.0
# Written by pyrdiff; stands alone.
"""Pyramidal sampling of Pyramidal DDPM (paper P, algorithm 1): start small, then enlarge, renoise and refine."""

import PIL.Image
import copy
import diffusers
import importlib
import inspect
import json
import math
import numbers
import numpy as np
import os
import re
import sys
import torch
import torch.nn.functional as F
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar


# pyrdiff.parts.settings: Checks of the settings of networks and schedulers. Each raises `ValueError` with name, value and what is accepted.

def check_choices(settings: Mapping, choices: Mapping[str, Sequence]) -> None:
    """Each setting that `choices` names must have one of the values there."""
    for name, accepted in choices.items():
        if settings[name] not in accepted:
            raise ValueError(f"{name}={settings[name]!r}: expected one of {tuple(accepted)}")


def is_whole(value: object) -> bool:
    """True for a whole number, also one of numpy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(settings: Mapping, *names: str, optional: bool = False) -> None:
    """Each of these settings must be a whole number from 1 up, or None if that is allowed."""
    for name in names:
        value = settings[name]
        if not (is_whole(value) and value >= 1 or optional and value is None):
            raise ValueError(f"{name}={value!r}: expected a whole number from 1 up{' or None' * optional}")


def check_positive(settings: Mapping, *names: str) -> None:
    """Each of these settings must be a finite number above 0."""
    for name in names:
        if not 0 < settings[name] < math.inf:
            raise ValueError(f"{name}={settings[name]}: expected a finite number above 0")


def checked_factors(factors: Sequence[int] | None) -> list[int] | None:
    """The setting `scale_factors` as a config keeps it: different whole numbers from 2 up, or None."""
    if factors is None:
        return None
    given = list(factors) if isinstance(factors, (list, tuple)) else []
    whole = all(is_whole(factor) and factor >= 2 for factor in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(f"scale_factors={factors}: expected different whole numbers from 2 up, or None")
    return given


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


# pyrdiff.parts.checks: Checks of arguments that several pipelines take. Each raises `ValueError` with the name, the value and what fits.

Size = int | tuple[int, int]
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_number(value) -> bool:
    """Whether it is a finite real number, also one of numpy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value) -> bool:
    """Whether it is a whole number from 1 up."""
    return is_whole(value) and value > 0


def check_count(name: str, value) -> None:
    if not is_count(value):
        raise ValueError(f"{name}={value!r}: expected a whole number from 1 up")


def check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_strength(name: str, value) -> None:
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")


def check_size(name: str, size: Size) -> tuple[int, int]:
    """The size as (height, width)."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(is_count(side) for side in pair):
        raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
    return pair


def check_generators(generator: Generators) -> None:
    """One generator, a list of them, or none."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator={one!r}: expected a torch.Generator or a list of them, such as "
                "torch.Generator().manual_seed(5)"
            )


def check_generator(generator: Generators, batch_size: int) -> None:
    """One generator, or as many as there are images."""
    check_generators(generator)
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")


def check_scheduler(name: str, scheduler) -> None:
    """The scheduler must be able to renoise an image, and say its noise process."""
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{name}={type(scheduler).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
            "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "HeunDiscreteScheduler"
        )


# pyrdiff.parts.noise: White noise by one generator, or by one an image.

def white_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    Standard normal numbers [B, ...], drawn on the generator's device.

    Raises:
        ValueError: for generators that are none, or another number than one, or one for each of B.
    """
    check_generators(generator)
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {shape[0]}")
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)


# pyrdiff.parts.colors: Images of one colour, spread as the colours of a data set are: all that can be told of an image in much noise.

def check_colors(colors: Mapping | None, channels: int) -> None:
    """
    Refuses what is no mean and covariance of colours.

    Args:
        colors: {"mean": [C], "covariance": [C, C]} of the mean colours of images in [-1, 1], or `None`; and as
            "classes", if there are any, a list of the same of each class, with its "share" of the images.
        channels: C.
    """
    if colors is None:
        return
    share = colors.get("share", 0.0) if isinstance(colors, Mapping) else 0.0
    if not is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"colors: has a share of {share!r}; expected a number from 0 to 1")
    of_classes = colors.get("classes", []) if isinstance(colors, Mapping) else []
    if not isinstance(of_classes, (list, tuple)):
        raise ValueError(f"colors: has the classes {of_classes!r}; expected a list with the colours of each")
    for each in of_classes:
        check_colors(each if isinstance(each, Mapping) else {}, channels)
    try:
        mean, covariance = (torch.tensor(colors[name], dtype=torch.float64) for name in ("mean", "covariance"))
        good = mean.shape == (channels,) and covariance.shape == (channels, channels)
        good = good and bool(covariance.isfinite().all() and mean.isfinite().all())
        good = (
            good and torch.equal(covariance, covariance.T) and bool((torch.linalg.eigvalsh(covariance) > -1e-5).all())
        )
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"colors={colors}: expected the mean [{channels}] and covariance [{channels}, {channels}] of colours"
        )


def draw_colors(
    colors: Mapping,
    shape: tuple[int, int, int, int],
    generator: Generators,
    device: torch.device,
    labels: list[int] | None = None,
) -> torch.Tensor:
    """
    Images of one colour each, in [-1, 1] as far as their spread is.

    Args:
        colors: See `check_colors`.
        shape: [B, C, H, W].
        generator: One, or one an image.
        device: Of the images.
        labels: [B], places in the list of classes; beyond it, an image has the colours of all images.
    """
    normal = white_noise((shape[0], shape[1], 1, 1), generator=generator, device=device)
    classes = colors.get("classes") or []
    if labels is None or not classes:
        root, mean = _root_and_mean(colors)
        drawn = torch.einsum("cd,bdhw->bchw", root.to(normal), normal) + mean.to(normal)[:, None, None]
        return drawn.expand(shape)
    pairs = [_root_and_mean(each) for each in (*classes, colors)]
    roots, means = (torch.stack([pairs[min(label, len(classes))][k] for label in labels]) for k in (0, 1))
    drawn = torch.einsum("bcd,bdhw->bchw", roots.to(normal), normal) + means.to(normal)[:, :, None, None]
    return drawn.expand(shape)


def _root_and_mean(colors: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """The root [C, C] of the covariance, float64, and the mean [C]."""
    values, vectors = torch.linalg.eigh(torch.tensor(colors["covariance"], dtype=torch.float64))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # symmetric, so that it does not depend on signs
    return root, torch.tensor(colors["mean"])


# pyrdiff.parts.labels: The classes of a call: as its user names them, as numbers for the network, and as often as in training.

Classes = str | int | None | Sequence[str | int | None]
NAMED_CLASSES = 12  # in a message
GOLDEN = 0.6180339887498949  # multiples of it, taken modulo 1, are spread evenly however many there are


def count_images(batch_size: int | None, classes: Classes) -> int:
    """How many images a call makes: `batch_size`, or one for each of several classes, or one."""
    if batch_size is None:
        batch_size = len(classes) if isinstance(classes, (list, tuple)) and classes else 1
    check_count("batch_size", batch_size)
    return batch_size


def label_numbers(classes: Classes, count: int, config: Mapping) -> list[int] | None:
    """
    What the network is told of each image's class.

    Args:
        classes: Names or numbers: one for all images, or a list with one for each. `None` stands for no class.
        count: Number of images.
        config: Of the network. If it has `class_names`, its last label stands for no class.

    Returns:
        A label for each image, or `None` for a network without classes.

    Raises:
        ValueError: for a class that the network does not know, or for as many as there are no images.
    """
    wanted = list(classes) if isinstance(classes, (list, tuple)) else [classes]
    if len(wanted) not in (1, count):
        raise ValueError(f"classes={classes!r}: expected one, or one for each of {count} images")
    if not config.get("num_class_embeds"):
        if any(value is not None for value in wanted):
            raise ValueError(f"classes={classes!r}: expected None, since this network knows no classes")
        return None
    labels = [_label_number(value, config) for value in wanted]
    return labels * count if len(labels) == 1 else labels


def spread_classes(config: Mapping, colors: Mapping | None, numbers: Sequence[int]) -> list[str] | None:
    """
    Classes of images that together stand for the training images: each as often as there.

    Args:
        config: Of the network.
        colors: Of the pipeline; "share" in its "classes" says how often each is. Without, all are as often.
        numbers: Of the images, 0 or more. An image of a number has the same class whatever the others are.

    Returns:
        A class for each image, or `None` for a network without classes.
    """
    total, names = config.get("num_class_embeds"), config.get("class_names")
    if not total:
        return None
    names = [str(number) for number in range(total)] if names is None else list(names)
    shares = np.array([each.get("share", 0.0) for each in (colors or {}).get("classes") or []])
    if len(shares) != len(names) or shares.sum() <= 0:
        shares = np.ones(len(names))
    places = (np.asarray(numbers, dtype=np.float64) + 0.5) * GOLDEN % 1
    found = np.searchsorted(np.cumsum(shares) / shares.sum(), places, side="right")
    return [names[min(index, len(names) - 1)] for index in found]


def _label_number(value: str | int | None, config: Mapping) -> int:
    """A class by its name or number. Where the names are numbers, a number is a name."""
    named, total = config.get("class_names"), config["num_class_embeds"]
    names = [str(number) for number in range(total)] if named is None else list(named)
    if value is None and named is not None:
        return len(names)
    if isinstance(value, str) and value in names:
        return names.index(value)
    if is_whole(value) and str(value) in names:
        return names.index(str(value))
    only_numbers = all(name.removeprefix("-").isdecimal() for name in names)
    place = int(value) if is_whole(value) or (isinstance(value, str) and value.isdecimal()) else -1
    if not only_numbers and 0 <= place < len(names):
        return place
    known = names if len(names) <= NAMED_CLASSES else [*names[:NAMED_CLASSES], f"{len(names) - NAMED_CLASSES} others"]
    more = "" if only_numbers else f", or a number from 0 to {len(names) - 1}"
    none = " for each image" if value is None else ""
    raise ValueError(f"classes={value!r}: expected one of {', '.join(known)}{more}{none}")


# pyrdiff.parts.guidance: Guidance: predictions drawn away from those of the network without the class, or of a worse network.

def check_guidance(scale: float, interval: Sequence[float] | None, config: Mapping, has_guide: bool) -> None:
    """
    Checks the arguments `guidance_scale` and `guidance_interval`.

    Args:
        scale, interval: The arguments.
        config: Of the network.
        has_guide: Whether there is a worse network to guide by.

    Raises:
        ValueError: for numbers out of range, or a network that cannot be guided.
    """
    if not is_number(scale) or scale < 0:
        raise ValueError(f"guidance_scale={scale!r}: expected a number from 0 up")
    if interval is not None:
        good = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval))
        if not good or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"guidance_interval={interval!r}: expected (low, high) within [0, 1]")
    if scale != 1 and config.get("class_names") is None and not has_guide:
        lacks = "has no label for images of no class" if config.get("num_class_embeds") else "knows no classes"
        raise ValueError(
            f"guidance_scale={scale}: expected 1.0, since this network {lacks}, and no `guide` comes with it"
        )


def check_guided(scales: Sequence[float], classes: Classes, has_guide: bool) -> None:
    """
    Refuses guidance by classes of images none of which has one.

    Args:
        scales: At each step of a call.
        classes: Of the call.
        has_guide: Whether it is guided by a worse network, whatever the classes.

    Raises:
        ValueError: if there is nothing to guide by.
    """
    scale = next((scale for scale in scales if scale != 1), 1)
    named = classes if isinstance(classes, (list, tuple)) else [classes]
    if scale != 1 and not has_guide and all(value is None for value in named):
        raise ValueError(f"guidance_scale={scale:g}: expected classes beside it, which guidance draws towards")


def guidance_scales(
    scale: float, interval: Sequence[float] | None, times: Sequence[float], train_steps: int
) -> list[float]:
    """The scale at each time: 1, which is none, where the share of the noise process is outside the interval."""
    low, high = (0.0, 1.0) if interval is None else interval
    return [float(scale) if low <= time / train_steps <= high else 1.0 for time in times]


def check_guide(guide: Mapping, network: Mapping) -> None:
    """
    Refuses a guide that cannot be called as the network is.

    Args:
        guide, network: Their configs.

    Raises:
        ValueError: the setting is named.
    """

    def both(*names: str) -> tuple:
        return tuple(
            next((config[name] for name in names if config.get(name) is not None), None) for config in (guide, network)
        )

    for name, (its, ours) in (
        ("image_channels", both("image_channels", "in_channels")),
        ("class_names", both("class_names")),
        ("num_class_embeds", both("num_class_embeds")),
    ):
        if its != ours:
            raise ValueError(f"guide has {name}={its!r}: expected {ours!r}, as the network has")
    its, ours = (len(config.get("block_out_channels", (1,))) for config in (guide, network))
    if its > ours:
        raise ValueError(f"guide has {its} levels of channels: expected at most {ours}, as the network has")
    its, ours = (config.get("noise_window", 1.0) for config in (guide, network))
    if its < ours:
        raise ValueError(f"guide has noise_window={its}: expected {ours} or more, as the network has")


# pyrdiff.parts.levels: The levels of a pyramid: their sizes, and what a level needs of the network.

def per_level(name: str, value, count: int) -> list:
    """One value for each of the `count` refined levels: the one that was given, or those."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}={list(value)}: expected one number, or one for each of the {count} higher levels")
    return list(value)


def check_growing(name: str, resolutions: Sequence[Size]) -> list[tuple[int, int]]:
    """Sizes as (height, width), each larger than the one before."""
    if not isinstance(resolutions, Sequence) or isinstance(resolutions, str) or not resolutions:
        raise ValueError(f"{name}={resolutions}: expected a list of sizes, low to high, such as [16, 32, 64]")
    sizes = [check_size(name, size) for size in resolutions]
    for low, high in zip(sizes, sizes[1:], strict=False):
        if high[0] < low[0] or high[1] < low[1] or high == low:
            raise ValueError(f"{name}={list(resolutions)}: expected each level to be larger than the one before")
    return sizes


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return tuple(math.ceil(side / multiple) * multiple for side in size)


def nfe_eq(calls: int, size: tuple[int, int], top: tuple[int, int]) -> float:
    """The cost of network calls at a size, in calls at the top size, by area."""
    return calls * math.prod(size) / math.prod(top)


def pixel_grid(height: int, width: int, box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """(row, column) of the pixel centres of a window (top, left, bottom, right), float32 [2, height, width]."""
    top, left, bottom, right = box
    rows = top + (bottom - top) * (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = left + (right - left) * (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).float()


def padded_grid(height: int, width: int, multiple: int) -> torch.Tensor:
    """The grid [1, 2, H, W] of an image that is padded below and right to multiples; what is added stays inside it."""
    axes = [
        ((torch.arange(side + -side % multiple, dtype=torch.float64) + 0.5) / side).clamp(max=1)
        for side in (height, width)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()[None]


# pyrdiff.parts.jumps: The times that a distilled network is called at: `jumps` of its config.

def check_jumps(jumps: Sequence[int] | None) -> None:
    """Refuses what is neither None nor descending times from 0 up."""
    if jumps is None:
        return
    times = list(jumps) if isinstance(jumps, (list, tuple)) else []
    whole = all(is_whole(time) and time >= 0 for time in times)
    if not times or not whole or times != sorted(set(times), reverse=True):
        raise ValueError(f"jumps={jumps!r}: expected None or descending whole numbers, the times of network calls")


def check_calls(config: Mapping, times: Sequence[float], plans: Iterable[str], where: str = "") -> None:
    """
    Refuses calls of a distilled network at times that it was not trained for.

    Args:
        config: Of the network. One without `jumps` is called at any time.
        times: Of the calls.
        plans: Names of the plans that there are.
        where: What the calls are of, such as "the level 64x64", for the message.

    Raises:
        ValueError: naming the calls, the network's times and the plans.
    """
    jumps = config.get("jumps")
    if jumps is None or all(time in jumps for time in times):
        return
    shown = f"{len(times)} calls" if len(times) > 4 else f"calls at {[round(float(time)) for time in times]}"
    names = " or ".join(map(repr, sorted(plans))) or "calls at those times"
    raise ValueError(
        f"jumps={list(jumps)}: {where or 'this run'} would take {shown}; this network is distilled to jump from these "
        f"times, expected plan={names}"
    )


# pyrdiff.parts.noise_windows: What a network was trained for at each size: `noise_window` and `jumps` of its config.

def check_noise(
    config: Mapping,
    train_steps: int,
    starts: Sequence[tuple[tuple[int, int], float]],
    box: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
) -> None:
    """
    Refuses levels that start from more noise than the network was trained for at their size.

    Above the lowest of its `resolutions` a network may be trained for a share `noise_window` of the noise process only.
    A size in between is taken for the resolution that is nearest in area.

    Args:
        config: Of the network. One without a `noise_window` was trained for all noise.
        train_steps: Steps of the noise process.
        starts: Of each level its (height, width) and the time that it starts from, 0 to train_steps - 1.
        box: The window of the whole image that the levels show: top, left, bottom, right in [0, 1].

    Raises:
        ValueError: naming the window and the first level that starts beyond it.
    """
    window, trained = config.get("noise_window", 1.0), config.get("resolutions") or ()
    if window >= 1 or len(trained) < 2:
        return
    for (height, width), time in starts:
        if _is_above_lowest(trained, height, width, box) and time > window * train_steps:
            lowest = (
                "x".join(map(str, trained[0])) if isinstance(trained[0], Sequence) else f"{trained[0]}x{trained[0]}"
            )
            raise ValueError(
                f"noise_window={window}: the level {height}x{width} would start from time {time:.0f} of {train_steps}; "
                f"expected at most {int(window * train_steps)}, since this network was trained for more noise at "
                f"{lowest} only (a lower strength, or levels from there on)"
            )


def check_level_calls(
    config: Mapping,
    levels: Sequence[tuple[tuple[int, int], Sequence[float]]],
    plans: Iterable[str],
    box: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
) -> None:
    """
    Refuses calls of a distilled network at times that it was not trained for, above the lowest of its `resolutions`.

    Args:
        config: Of the network.
        levels: Of each its (height, width) and the times of its calls.
        plans: Names of the plans that there are.
        box: As of `check_noise`.

    Raises:
        ValueError: naming the first such level, the network's times and the plans.
    """
    for (height, width), times in levels if config.get("jumps") else ():
        if _is_above_lowest(config.get("resolutions") or (), height, width, box):
            check_calls(config, times, plans, f"the level {height}x{width}")


def _is_above_lowest(trained: Sequence, height: int, width: int, box: Sequence[float]) -> bool:
    """Whether a level is nearest in area to another than the lowest of the sizes that a network was trained at."""
    areas = [math.prod(size) if isinstance(size, Sequence) else size * size for size in trained]
    area = height * width / ((box[2] - box[0]) * (box[3] - box[1]))
    return min(range(len(areas)), key=lambda index: abs(math.log(areas[index] / area)), default=0) > 0


# pyrdiff.parts.plans: Named plans: the arguments of a call that a pipeline keeps in its config, and the schedulers that they run with.

NOISE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
ALWAYS = {"stage_jump": "white"}  # plans in older folders may say what is no longer a choice


@dataclass(frozen=True)
class NamedPlan:
    """Arguments of a call; by "scheduler" or "refine_scheduler", the [class, settings] to run it with, or `None`."""

    arguments: dict = field(default_factory=dict)
    schedulers: dict = field(default_factory=dict)


def read_plan(
    plan: str | dict, plans: dict | None, arguments: tuple[str, ...], schedulers: tuple[str, ...]
) -> NamedPlan:
    """
    A plan by its name or as a dict, taken apart.

    Args:
        plan: What the user gave.
        plans: Those of the pipeline's config.
        arguments, schedulers: What a plan may set.

    Raises:
        ValueError: for an unknown name, or a plan that sets anything else.
    """
    if isinstance(plan, str):
        known = plans or {}
        if plan not in known:
            near = did_you_mean(plan, known)
            raise ValueError(f"plan={plan!r}: expected one of {sorted(known)}, or a dict of arguments{near}")
        plan = known[plan]
    if not isinstance(plan, dict):
        raise ValueError(f"plan={plan!r}: expected a name or a dict of arguments")
    plan = {name: value for name, value in plan.items() if (name, value) not in ALWAYS.items()}
    for name in plan:
        if name not in (*arguments, *schedulers):
            raise ValueError(f"plan has {name!r}: expected {arguments}, {', '.join(schedulers)}")
    return NamedPlan(
        {name: value for name, value in plan.items() if name in arguments},
        {name: value for name, value in plan.items() if name in schedulers},
    )


def given(arguments: NamedTuple) -> dict:
    """Those arguments of a call that are not their defaults."""
    defaults = arguments._field_defaults

    def left_out(name: str, value) -> bool:
        return value is defaults[name] or ((isinstance(value, str) or is_number(value)) and value == defaults[name])

    return {name: value for name, value in arguments._asdict().items() if not left_out(name, value)}


def check_not_beside_plan(plan: str | dict, arguments: NamedTuple, but: tuple[str, ...] = ()) -> None:
    """Refuses arguments that are given beside a plan, but those that may be."""
    for name, value in given(arguments).items():
        if name not in but:
            raise ValueError(f"plan={plan!r} with {name}={value!r}: expected one or the other")


def plan_scheduler(
    name: str, entry: object, process: SchedulerMixin, kept: tuple[str, ...] = (), fixed: dict | None = None
) -> SchedulerMixin:
    """
    A scheduler of diffusers over the same noise process; all else is its own default, or as set.

    Args:
        name: Of the plan's entry, for messages.
        entry: [class of diffusers, {setting: value}].
        process: The scheduler that the network was trained with.
        kept: Further settings that are taken over from it.
        fixed: Settings that a plan may not change.

    Raises:
        ValueError: for a class or a setting that it cannot take.
    """
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
        raise ValueError(f"{name} of the plan is {entry!r}: expected [class of diffusers, {{setting: value}}]")
    kind, settings, fixed = getattr(diffusers, str(entry[0]), None), entry[1], fixed or {}
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{name} of the plan is {entry[0]!r}: expected a scheduler of diffusers")
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    for setting in settings:
        if setting not in known - {*NOISE_PROCESS, *fixed}:
            raise ValueError(f"{name} of the plan sets {setting!r}: expected settings of {entry[0]}'s steps")
    taken = {key: process.config[key] for key in (*NOISE_PROCESS, *kept) if key in process.config}
    options = {key: value for key, value in {**taken, **fixed}.items() if key in known}
    try:
        scheduler = kind(**{**options, **settings})
    except Exception as error:  # whatever a constructor of diffusers makes of strange values
        raise ValueError(f"{name} of the plan: {entry[0]} does not take {settings}: {error}") from error
    check_scheduler(name, scheduler)
    return scheduler


# pyrdiff.parts.sources: The code of a class, kept from the moment that the class is made.

STANDS_ALONE = "# Written by pyrdiff; stands alone."  # in the first two lines of a file that was joined
OWN_IMPORT = re.compile(r"^from\s+([\w.]+)\s+import", re.MULTILINE)
# By these patterns diffusers looks for files that it would have to bring along, in strings and comments too.
RELATIVE_IMPORT = re.compile(r"^\s*(import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)
MODULES: dict[tuple[str, str, str], str] = {}  # (package, stem, class): the module that defines the class


class SourceFile(NamedTuple):
    """A file, and its text as it was when it was read."""

    path: str
    text: str


class Source(NamedTuple):
    """The module of a class; {module: file} of it and of those of its own package, or pyrdiff's, that it imports."""

    module: str
    files: dict[str, SourceFile]

    @property
    def stem(self) -> str:
        return self.module.rpartition(".")[2]


class KeepsSource:
    """
    Put in front of `ModelMixin` or `SchedulerMixin`, so that a saved folder carries the code of the class as it was
    when the class was made. Later the file may be another: diffusers writes the code of every folder that it loads to
    the same place, and a package may be updated while a training runs.

    Set `RETIRED` to names of settings that earlier versions saved and this one no longer takes: they are passed over.
    """

    RETIRED: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keep_source(cls)
        package, stem = cls.__module__.split(".")[0], cls.__module__.rpartition(".")[2]
        MODULES[package, stem, cls.__name__] = cls.__module__

    def register_to_config(self, **settings) -> None:
        """As stock, with numbers of numpy as those of Python, which a config is saved with."""
        super().register_to_config(**{name: _without_numpy(value) for name, value in settings.items()})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As stock; `auto_map` in a saved config is for diffusers' `AutoModel` and says nothing to the class."""
        passed_over = ("auto_map", *cls.RETIRED)
        config_dict = {name: value for name, value in config_dict.items() if name not in passed_over}
        return super().extract_init_dict(config_dict, **kwargs)


def _without_numpy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def keep_source(cls: type) -> None:
    """Keeps the code of a class with it, if that was not done before and there is a file."""
    if "_kept_source" not in vars(cls):
        cls._kept_source = _read_source(cls.__module__)


def _read_source(module: str) -> Source | None:
    files, waiting = {}, [module]
    own_packages = {module.split(".")[0], "pyrdiff"}
    while waiting:
        name = waiting.pop()
        path = getattr(sys.modules.get(name), "__file__", None)
        if name in files or path is None or not path.endswith(".py") or not Path(path).is_file():
            continue
        text = Path(path).read_text(encoding="utf-8")
        files[name] = SourceFile(path, text)
        if STANDS_ALONE not in text.split("\n")[:2]:
            waiting += [other for other in OWN_IMPORT.findall(text) if other.split(".")[0] in own_packages]
    return Source(module, files) if module in files else None


def source_of(cls: type) -> Source:
    """
    The kept code of a class.

    Raises:
        ValueError: if the class is of a script or of an interactive session. A folder would carry the whole script,
            with whatever else is in it.
    """
    keep_source(cls)
    if cls.__module__ == "__main__" or cls._kept_source is None:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__}, expected a class of a module with a file of its own: "
            "a saved folder carries that file"
        )
    return cls._kept_source


def standalone_text(cls: type) -> str:
    """
    The text of a file that has the class and all that it needs of its own package and of pyrdiff.

    Raises:
        ValueError: if there is no such file, or it cannot be joined with what it imports.
    """
    source = source_of(cls)
    path, text = source.files[source.module]
    if len(source.files) > 1:
        # Not an import statement: the exporter would follow it, and the joined files, which never come here, are used
        # where pyrdiff is not installed. A class comes here only if it imports modules of pyrdiff or of its package.
        text = importlib.import_module("pyrdiff.hub.standalone").join(source)
    relative = RELATIVE_IMPORT.search(text)
    if relative:
        raise ValueError(f"{path}: {relative[0].strip()!r}: expected no line that looks like a relative import")
    return text


def auto_map(cls: type) -> dict[str, str]:
    """What diffusers' `AutoModel` reads in a network's config to find its class in the folder."""
    return {"AutoModel": f"{source_of(cls).stem}.{cls.__name__}"}


# pyrdiff.parts.weights: Weights that are numbers: what a run that diverged leaves is neither saved nor loaded.

LARGEST_WEIGHT = 1e18  # its square still fits into float32; weights that were trained are far below


def unusable(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with values that are not finite, or of a size that no training ends with."""
    return sorted(name for name, value in tensors.items() if not _is_usable(value))


def _is_usable(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta or value.numel() == 0:
        return True
    return bool(value.detach().float().abs().amax() <= LARGEST_WEIGHT)  # NaN is not


def refuse_unusable(networks: Iterable[tuple[str, object]], what: str) -> None:
    """
    Refuses networks whose weights are not numbers to go on with.

    Args:
        networks: (name, component); those that are no networks are passed over.
        what: What does not take place, for the message.

    Raises:
        ValueError: the network and the tensor are named.
    """
    for name, network in networks:
        bad = unusable(network.state_dict()) if isinstance(network, torch.nn.Module) else []
        if bad:
            raise ValueError(
                f"{name}: {bad[0]} has values that are not finite or above {LARGEST_WEIGHT:g}; expected those of a "
                f"training that did not diverge. {what}"
            )


# pyrdiff.parts.steps: The steps of one level: a scheduler, respaced to run only the last part of its noise process.

Spacing = str | Sequence[int]  # "scheduler", "log_snr", or descending times


@dataclass(frozen=True)
class LevelSteps:
    """
    A scheduler of its own that is ready for the steps of one level, and the time of every network call.

    Args:
        scheduler: A copy, so that laying out steps changes nothing of the pipeline.
        timesteps: [calls], descending, on the CPU: schedulers read their times as numbers, which would wait for a GPU.
    """

    scheduler: SchedulerMixin
    timesteps: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def times(self) -> list[float]:
        return [float(time) for time in self.timesteps]

    def on(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The time of every call twice: on the CPU for the scheduler, and beside the sample for the network."""
        return zip(self.timesteps, self.timesteps.to(device, non_blocking=True), strict=True)

    def renoise(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The images [B, C, H, W] noised up to the first time (paper P, eq. 2)."""
        time = self.timesteps[:1].to(images.device, non_blocking=True)
        # By a copy: schedulers move their tables to the images for good, and the steps would read them from a GPU.
        return copy.copy(self.scheduler).add_noise(images, noise, time.expand(len(images)))

    def step(
        self,
        output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: Generators,
        eta: float | None = None,
    ) -> torch.Tensor:
        """The next sample [B, C, H, W]."""
        options = {} if eta is None else {"eta": eta}
        if takes(self.scheduler.step, "generator"):
            options["generator"] = generator
        return self.scheduler.step(output, timestep, sample, **options, return_dict=False)[0]


def takes(function, argument: str) -> bool:
    """Whether a function has this argument."""
    return argument in inspect.signature(function).parameters


def lay_out_steps(
    scheduler: SchedulerMixin, calls: int, strength: float, spacing: Spacing, calls_name: str
) -> LevelSteps:
    """
    The steps from `strength` of the noise process down to no noise.

    Args:
        scheduler: Is copied, not changed.
        calls: Network calls. A second-order scheduler calls the network twice a step but for the last, so it makes an
            odd number.
        strength: Share in (0, 1] of the noise process.
        spacing: "scheduler": as the scheduler places its last steps; "log_snr": evenly in log-SNR; or the times.
        calls_name: What the argument `calls` is called where the user gave it.

    Raises:
        ValueError: for steps that the scheduler cannot make.
    """
    scheduler = plainly_clipping(copy.deepcopy(scheduler))
    train_steps = scheduler.config.num_train_timesteps
    steps = (calls + 1) // 2 if scheduler.order == 2 else calls
    if isinstance(spacing, str) and steps > strength * train_steps:
        raise ValueError(
            f"{calls_name}={calls}: expected at most {int(strength * train_steps)}, the training steps up to the noise "
            f"that the level starts from (strength {strength})"
        )
    if spacing == "scheduler":
        begin = _respace(scheduler, steps, strength)
    else:
        begin = 0
        _place(scheduler, _times(scheduler, steps, strength, spacing))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return LevelSteps(scheduler, scheduler.timesteps[begin:])


def plainly_clipping(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    The scheduler, told how to clip its clean estimate to [-1, 1] if it has `thresholding` with `sample_max_value=1`.

    Diffusers looks for a quantile and clamps it between 1 and `sample_max_value`. Where both are 1 the result is the
    same to the last bit without sorting all values of an image, which at 256x256 takes ten times as long as the rest.
    """
    if scheduler.config.get("thresholding") and scheduler.config.get("sample_max_value") == 1:
        scheduler._threshold_sample = clipped_to_one
    return scheduler


def clipped_to_one(sample: torch.Tensor) -> torch.Tensor:
    """A clean estimate of any shape, kept in [-1, 1]."""
    return sample.clamp(-1, 1)


def _respace(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """Gives the scheduler the fewest steps whose last `steps` begin within the strength; returns where they begin."""
    limit, order = strength * scheduler.config.num_train_timesteps, scheduler.order

    def starts_within(total: int) -> bool:
        try:
            scheduler.set_timesteps(total)
        except ValueError as error:
            raise ValueError(f"{type(scheduler).__name__} does not take {total} steps: {error}") from error
        return float(scheduler.timesteps[order * (total - steps)]) <= limit

    totals = range(steps, scheduler.config.num_train_timesteps)
    total = steps + bisect_left(totals, True, key=starts_within)
    scheduler.set_timesteps(total)
    begin = order * (total - steps)
    if len(scheduler.timesteps[begin:]) != order * (steps - 1) + 1:
        raise ValueError(
            f"{type(scheduler).__name__} does not take as many steps as it is asked for: expected another, such as "
            "DPMSolverMultistepScheduler"
        )
    return begin


def _times(scheduler: SchedulerMixin, steps: int, strength: float, spacing: Spacing) -> list[int]:
    if spacing == "log_snr":
        return log_snr_times(scheduler.alphas_cumprod, steps, strength)
    if isinstance(spacing, str):
        raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or one list of times a level")
    times, last = list(spacing), scheduler.config.num_train_timesteps - 1
    if not times or times != sorted(set(times), reverse=True) or times[0] > last or times[-1] < 0:
        raise ValueError(f"spacing={times}: expected descending times from {last} to 0")
    return times


def _place(scheduler: SchedulerMixin, times: list[int]) -> None:
    if not takes(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"spacing: {type(scheduler).__name__} places its steps itself; expected 'scheduler', or a scheduler whose "
            "`set_timesteps` takes `timesteps`, such as DPMSolverMultistepScheduler"
        )
    scheduler.set_timesteps(timesteps=times)


def log_snr_times(alphas_cumprod: torch.Tensor, steps: int, strength: float) -> list[int]:
    """`steps` training times, descending to 0, as evenly spaced in log(alpha_bar / (1 - alpha_bar)) as can be."""
    alphas_cumprod = alphas_cumprod.cpu().double().clamp(1e-8, 1 - 1e-8).numpy()
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    start = max(round(strength * len(log_snr)), steps) - 1
    wanted = np.linspace(log_snr[start], log_snr[0], steps)
    times = [int(np.abs(log_snr - value).argmin()) for value in wanted]
    for index in range(1, steps):
        times[index] = min(times[index], times[index - 1] - 1)
    return [max(time, steps - 1 - index) for index, time in enumerate(times)]


def check_start_above_zero(steps: LevelSteps, name: str, calls: int) -> None:
    """A level must start at some noise: its first step would otherwise do nothing."""
    if steps.times[0] == 0:
        raise ValueError(
            f"{name}={calls}: {type(steps.scheduler).__name__} would start at time 0, where there is no noise; "
            "expected 2 or more, or timestep_spacing='trailing' in its config"
        )


# pyrdiff.parts.wrappers: The network inside what is wrapped around it: a compiled module, adapters of PEFT, parallel training.

def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside its wrappers: the outermost `ModelMixin` in the module, or else the module itself."""
    return next((inner for inner in module.modules() if isinstance(inner, ModelMixin)), module)


def network_takes(module: torch.nn.Module, argument: str) -> bool:
    """
    Whether the network inside the wrappers has this argument of `forward`. Its class says so: a wrapper takes whatever
    it is given and passes it on.
    """
    return takes(type(plain(module)).forward, argument)


# pyrdiff.parts.saving: Saving a pipeline together with its code, so that diffusers alone can load it.

class StandaloneSaving(KeepsSource):
    """
    Put in front of `DiffusionPipeline`: saved folders carry the code of the pipeline and of its components, and
    `from_pretrained` of an installed class needs none of it.
    """

    def register_modules(self, **components):
        """As stock; also reads the code of components that keep none themselves, before its file is replaced."""
        super().register_modules(**components)
        for cls in self._classes_with_code(components).values():
            keep_source(cls)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads wherever diffusers
        is installed. It is the stock folder, with a source file for this class and for each component that is not part
        of diffusers, and with an index and configs that name these files. The arguments are those of
        `DiffusionPipeline`.

        Raises:
            ValueError: if a class is of a script or an interactive session, if a network is inside adapters or what
                distributes it, or if its weights are not finite; nothing was written then.
        """
        check_bare(self.components)
        refuse_unusable(self.components.items(), "Nothing was saved.")
        classes = self._classes_with_code(self.components)
        texts = {name: standalone_text(cls) for name, cls in classes.items()}  # raises before anything is written
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for name, cls in classes.items():
            (folder / name / f"{source_of(cls).stem}.py").write_text(texts[name], encoding="utf-8", newline="\n")
        self._name_code(folder, classes)
        if push_to_hub:
            private, token = hub_arguments.pop("private", None), hub_arguments.get("token")
            repo_id = hub_arguments.pop("repo_id", folder.name)
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            self._upload_folder(folder, repo_id, **hub_arguments)

    def _classes_with_code(self, components: dict[str, object]) -> dict[str, type]:
        """The classes that are not of diffusers by the folder that they are saved in, "" for the pipeline's own."""
        classes = {"": type(self)}
        for name, component in components.items():
            if component is not None:
                classes[name] = type(plain(component) if isinstance(component, torch.nn.Module) else component)
        stock = ("diffusers", "transformers")
        return {name: cls for name, cls in classes.items() if cls.__module__.split(".")[0] not in stock}

    def _name_code(self, folder: Path, classes: dict[str, type]) -> None:
        """Writes the names of the source files to index and configs, and takes out where the pipeline came from."""
        for path in [folder / self.config_name, *folder.glob("*/*config.json")]:
            config = json.loads(path.read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_module")}
            if path.name == self.config_name:
                config |= index_entries(type(self), classes)
            elif issubclass(classes.get(path.parent.name, object), torch.nn.Module):
                config["auto_map"] = auto_map(classes[path.parent.name])
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, *args, **kwargs):
        """
        As stock, but an index that names source files of the folder (see `save_pretrained`) is read as naming the
        installed classes of the same names. `from_pretrained` of this class then runs no code from the folder and needs
        no trust flag. Of a folder of another pipeline, only what this one takes is read.
        """
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        stem = cls.__module__.rpartition(".")[2]
        if index.get("_class_name") not in (cls.__name__, [stem, cls.__name__]):
            takes = inspect.signature(cls.__init__).parameters
            for name in [name for name in index if name not in takes and not name.startswith("_")]:
                del index[name]
        for name, value in index.items():
            if isinstance(value, (list, tuple)) and [type(item) for item in value] == [str, str]:
                here, pyrdiff = cls.__module__.split(".")[0], "pyrdiff"
                module = MODULES.get((here, *value)) or MODULES.get((pyrdiff, *value))
                if module is not None:
                    index[name] = value[1] if name == "_class_name" else [module, value[1]]
        return config


def check_bare(components: dict[str, object]) -> None:
    """Refuses networks with anything around them but what compiles: it would be saved in their place."""
    for name, component in components.items():
        inside = getattr(component, "_orig_mod", component)
        if getattr(inside, "peft_config", None) and inside is plain(inside):
            raise ValueError(
                f"{name}: expected it without adapters, to save it; `pyrdiff.hub.merge_adapters(pipeline)` adds them "
                "to its weights, and `unload_lora()` takes them out"
            )
        if isinstance(inside, torch.nn.Module) and inside is not plain(inside):
            raise ValueError(
                f"{name}={type(inside).__name__}: expected the {type(plain(inside)).__name__} inside, to save it; with "
                "adapters of PEFT, `merge_and_unload()` gives it with them"
            )


def index_entries(pipeline_class: type, classes: dict[str, type]) -> dict[str, object]:
    """
    What the index of a folder says of the code in it.

    Args:
        pipeline_class: The pipeline's class.
        classes: The classes that have code in the folder, by component; "" for the pipeline.

    Returns:
        [file, class] of each, and the `auto_map` of the first network: diffusers' `AutoModel` reads that of the index,
        whatever subfolder it is asked for. Other networks it loads from their own folder, by the `auto_map` there.
    """
    entries = {name or "_class_name": [source_of(cls).stem, cls.__name__] for name, cls in classes.items()}
    for name in inspect.signature(pipeline_class.__init__).parameters:
        if issubclass(classes.get(name, object), torch.nn.Module):
            return {**entries, "auto_map": auto_map(classes[name])}
    return entries


# pyrdiff.parts.sampling: What the pipelines share of a call: progress, interruption, callbacks, and the way out of [-1, 1].

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Item = TypeVar("Item")


class SamplingRun:
    """The running call of a pipeline: what happens after each of its steps."""

    def __init__(self, pipeline, progress, callback: Callable | None, tensor_inputs: Sequence[str]):
        self._pipeline, self._progress = pipeline, progress
        self._callback, self._tensor_inputs = callback, tensor_inputs
        self._steps = 0

    def going(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until the run is interrupted."""
        for item in items:
            if self._pipeline.interrupt:
                return
            yield item

    def after_step(self, timestep: torch.Tensor | int, latents: torch.Tensor) -> torch.Tensor:
        """Tells the callback and the progress bar; returns the latents, or those that the callback made of them."""
        if self._callback is not None:
            tensors = {"latents": latents} if "latents" in self._tensor_inputs else {}
            changed = self._callback(self._pipeline, self._steps, timestep, tensors) or {}
            latents = changed.pop("latents", latents)
        self._steps += 1
        self._progress.update()
        return latents


class SamplingPipeline(StandaloneSaving):
    """A base beside `DiffusionPipeline`, before it: `class P(SamplingPipeline, DiffusionPipeline)`."""

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "SamplingPipeline":
        """As stock, which takes over no network of a class that `__init__` does not name: here of every class."""
        accepted = inspect.signature(cls.__init__).parameters
        shared = {name: component for name, component in pipeline.components.items() if name in accepted}
        return super().from_pipe(pipeline, **shared | kwargs)

    @property
    def components(self) -> dict[str, object]:
        """As stock, without those that are left out by default: other pipelines may not know them."""
        defaults = inspect.signature(type(self).__init__).parameters
        named = super().components.items()
        return {name: value for name, value in named if value is not None or defaults[name].default is not None}

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @contextmanager
    def _running(self, calls: int, callback: Callable | None, tensor_inputs: Sequence[str]) -> Iterator[SamplingRun]:
        self._interrupt, self._num_timesteps = False, calls
        with self.progress_bar(total=calls) as progress:
            yield SamplingRun(self, progress, callback, tensor_inputs)
        self.maybe_free_model_hooks()

    def _check_request(self, batch_size: int, generator: Generators, output_type: str, names: Sequence[str]) -> None:
        """The arguments that all calls have; `names` is `callback_on_step_end_tensor_inputs`."""
        check_generator(generator, batch_size)
        check_output_type(output_type)
        if not set(names) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(names)}: expected a subset of {self._callback_tensor_inputs}"
            )

    @property
    def _channels(self) -> int:
        """Of an image."""
        config = plain(self.unet).config
        return getattr(config, "image_channels", config.in_channels)

    @property
    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this; with pixels in cells, of so many cells."""
        network = plain(self.unet)
        levels = len(getattr(network.config, "block_out_channels", (1,)))
        return getattr(network, "CELL", 1) * 2 ** (levels - 1)

    def _predict(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        coordinates: torch.Tensor,
        labels: torch.Tensor | None = None,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """
        The output [B, C, H, W], float32, of `unet` or another network; it is told where the pixels lie if it wants to
        know, and the labels of the images' classes if there are any: [B], or [B / n] for n windows of each image.
        """
        network = self.unet if network is None else network
        told = {"coordinates": coordinates} if network_takes(network, "coordinates") else {}
        if labels is not None:
            told["class_labels"] = labels.repeat(len(sample) // len(labels))
        return network(sample.to(plain(network).dtype), time, **told, return_dict=False)[0].float()

    def _labels(self, classes: Classes, count: int) -> torch.Tensor | None:
        """What the network is told of the images' classes, int64 [count]; `None` if it knows none."""
        labels = label_numbers(classes, count, plain(self.unet).config)
        return None if labels is None else torch.tensor(labels, device=self._execution_device)

    def _to_output(self, latents: torch.Tensor, size: tuple[int, int], output_type: str) -> Images:
        """Latents [B, C, H, W] in [-1, 1] at a size and in the form that was asked for."""
        if latents.shape[-2:] != size:
            latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
        if output_type == "latent":
            return latents
        return self._in_unit_range((latents / 2 + 0.5).clamp(0, 1), output_type)

    def _in_unit_range(self, images: torch.Tensor, output_type: str) -> Images:
        """Images [B, C, H, W] in [0, 1] as "pil", "np" or "pt"."""
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


# pyrdiff.pipelines.pipeline_pyramidal

@dataclass
class PyramidalLevel:
    """
    One level of a plan: its size (height, width), the size the network runs at, the time of every step, and at how many
    of them guidance calls the network twice.
    """

    size: tuple[int, int]
    network_size: tuple[int, int]
    timesteps: list[float]
    nfe_eq: float
    guided: int = 0

    @property
    def network_calls(self) -> int:
        return len(self.timesteps) + self.guided


@dataclass
class PyramidalPlan:
    """What a call will cost. 1 NFE-eq is one network call for one image at the top level, by area."""

    levels: list[PyramidalLevel]

    @property
    def network_calls(self) -> int:
        return sum(level.network_calls for level in self.levels)

    @property
    def nfe_eq(self) -> float:
        return sum(level.nfe_eq for level in self.levels)

    def __str__(self) -> str:
        rows = [f"{'level':>9}  {'network':>9}  {'calls':>5}  {'first t':>7}  {'NFE-eq':>7}"]
        for level in self.levels:
            size, network = ("{}x{}".format(*pair) for pair in (level.size, level.network_size))
            first = f"{level.timesteps[0]:.0f}"
            rows.append(f"{size:>9}  {network:>9}  {level.network_calls:>5}  {first:>7}  {level.nfe_eq:>7.2f}")
        rows.append(f"{'total':>9}  {'':>9}  {self.network_calls:>5}  {'':>7}  {self.nfe_eq:>7.2f}")
        return "\n".join(rows)


@dataclass
class PyramidalPipelineOutput(BaseOutput):
    """
    Args:
        images: The top level: PIL images, a numpy array [B, H, W, C] in [0, 1], or a tensor [B, C, H, W] ("pt" in
            [0, 1], "latent" in [-1, 1], not clipped).
        levels: The images of every level, low to high, in the same form; `None` unless `return_levels=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    levels: list | None = None


class PyramidalArguments(NamedTuple):
    """The arguments of a call that say its levels and steps, with their defaults: what a plan may set."""

    resolutions: Sequence[Size] | None = None
    num_inference_steps: int = 100
    refine_steps: int | Sequence[int] = 8
    refine_strength: float | Sequence[float] = 0.3
    spacing: str | Sequence[Sequence[int]] = "scheduler"
    start_strength: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None


@dataclass(frozen=True)
class PyramidalStage:
    """
    One level of a running call: its size, the size that the network runs at, both (height, width), its steps, the share
    of the noise process that they begin at, and the scale of guidance at each step.
    """

    size: tuple[int, int]
    network_size: tuple[int, int]
    steps: LevelSteps
    strength: float
    scales: list[float]

    @property
    def guided(self) -> int:
        """At how many steps the network is called twice."""
        return sum(scale != 1 for scale in self.scales)

    @property
    def calls(self) -> int:
        return len(self.steps) + self.guided


class PyramidalPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Generation by Pyramidal DDPM: the whole reverse process at the lowest resolution, then at each higher one only the
    last part of it, from the enlarged and renoised image. Networks that know classes draw images of a class, or of any.

    Parameters:
        unet: A network trained at several resolutions. `coordinates` are given to it if its `forward` takes them, so a
            plain `UNet2DModel` works too.
        scheduler: Any scheduler of diffusers with `add_noise`; runs the lowest level.
        refine_scheduler (*optional*): Runs the levels above; by default the same one.
        plans (`dict`, *optional*): Named plans for `plan=`: {name: {argument of a call: value}}, and in it, as
            "scheduler" and "refine_scheduler", [class of diffusers, {setting: value}] to run the levels with instead.
        colors (`dict`, *optional*): {"mean": [C], "covariance": [C, C]} of the mean colours of the training images, in
            the [-1, 1] range, for `start_strength`; and as "classes" a list of the same of each class.
        guide (*optional*): A worse network of the same images, to guide by (autoguidance, Karras et al. 2024): an early
            average of the same training, or a smaller network. With it, `guidance_scale` needs no classes.
    """

    _optional_components = ["refine_scheduler", "guide"]
    model_cpu_offload_seq = "guide->unet"
    PLAN_ARGUMENTS = PyramidalArguments._fields
    BESIDE_PLANS = ("guidance_scale", "guidance_interval")  # may be given with a plan that does not set them
    RETIRED = ("detail_spectra", "spectra")

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        refine_scheduler: SchedulerMixin | None = None,
        plans: dict | None = None,
        colors: dict | None = None,
        guide: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, refine_scheduler=refine_scheduler, guide=guide)
        self.register_to_config(plans=plans, colors=colors)
        check_colors(colors, self._channels)
        check_scheduler("scheduler", scheduler)
        if refine_scheduler is not None:
            check_scheduler("refine_scheduler", refine_scheduler)
        if guide is not None:
            check_guide(plain(guide).config, plain(unet).config)
        for plan in (plans or {}).values():
            self._choose(plan, PyramidalArguments())

    @staticmethod
    def coordinate_grid(height: int, width: int, box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
        """(row, column) of the pixel centres of a window (top, left, bottom, right), float32 [2, height, width]."""
        return pixel_grid(height, width, box)

    def plan(
        self,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        plan: str | dict | None = None,
        start_strength: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> PyramidalPlan:
        """The levels, steps and cost of a call with these arguments (see `__call__`), without running the network."""
        arguments = PyramidalArguments(
            resolutions,
            num_inference_steps,
            refine_steps,
            refine_strength,
            spacing,
            start_strength,
            guidance_scale,
            guidance_interval,
        )
        stages = self.lay_out(plan, arguments)
        self._check_noise(stages)
        top = stages[-1].network_size
        levels = [
            PyramidalLevel(s.size, s.network_size, s.steps.times, nfe_eq(s.calls, s.network_size, top), s.guided)
            for s in stages
        ]
        return PyramidalPlan(levels)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        plan: str | dict | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        start_strength: float = 1.0,
        classes: str | int | Sequence[str | int | None] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> PyramidalPipelineOutput | tuple:
        """
        Generates images from coarse to fine (algorithm 1, with the noise term outside the bracket as in eq. 6 and the
        cumulative alpha in line 8).

        Args:
            batch_size: Number of images; by default as many as there are `classes`, or 1.
            resolutions: The levels, low to high, each an int or (height, width); by default those that the network was
                trained at. A size that the network cannot run at is rounded up for it, and its result is resized
                (bicubic): `plan` shows both.
            num_inference_steps: Network calls at the lowest level (T_f).
            refine_steps: Network calls at each higher level (T_s times the strength): one number, or one a level.
            refine_strength: Share in (0, 1] of the noise process that a higher level starts from (Delta t_s).
            box: The window of the whole image to generate: top, left, bottom, right in [0, 1]. `resolutions` are then
                those of the window.
            spacing: How the steps of a level are placed: as the scheduler does, uniformly in log-SNR, or the times
                themselves, one descending list a level.
            plan: A plan of the pipeline by its name (`pipeline.config.plans`), or one as a dict, in place of the
                arguments above but `box`, which are then left at their defaults. It may set the guidance; where it does
                not, guidance may be given beside it. A distilled network, which knows few calls, takes its first plan
                where no steps are said.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `PyramidalPipelineOutput` or a tuple (images, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.
            start_strength: Share in (0, 1] of the noise process that the lowest level starts from: 1 is noise alone
                (the paper); below, plain images in the colours of the data (`colors`), noised up to there. What little
                else more noise leaves of an image is hard to learn, and its errors become colour casts.
            classes: What to draw, of a network that knows classes (`unet.config.class_names`): a name or number for all
                images, or a list with one for each. `None` is for images of any class.
            guidance_scale: w of guidance: the prediction is u + w (c - u), c that of the network. u is its prediction
                without the class (Ho and Salimans 2022), both passes in one batch; or, of a pipeline with a `guide`,
                that of the guide (Karras et al. 2024). 1 is none; above, images are more typical of their class, or of
                the data, and less varied. A guided step costs two network calls.
            guidance_interval: (low, high), shares of the noise process within which there is guidance (Kynkäänniemi et
                al. 2024); by default everywhere.

        Raises:
            ValueError: for arguments out of range, before any work.
        """
        arguments = PyramidalArguments(
            resolutions,
            num_inference_steps,
            refine_steps,
            refine_strength,
            spacing,
            start_strength,
            guidance_scale,
            guidance_interval,
        )
        stages = self.lay_out(plan, arguments)
        batch_size = count_images(batch_size, classes)
        labels = self._labels(classes, batch_size)
        check_guided([scale for stage in stages for scale in stage.scales], classes, self.guide is not None)
        self._check_request(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"box={box}: expected (top, left, bottom, right) within [0, 1]")
        self._check_noise(stages, box)
        calls = sum(len(stage.steps) for stage in stages)
        latents, levels = None, []
        with self._running(calls, callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            for stage in run.going(stages):
                latents = self._begin(stage, latents, batch_size, generator, labels)  # line 1; lines 7 and 8
                coordinates = self._coordinates(stage, box, batch_size)
                steps = zip(stage.steps.on(latents.device), stage.scales, strict=True)
                for (timestep, network_time), scale in run.going(steps):  # lines 2 to 4; 9 to 11
                    sample = stage.steps.scheduler.scale_model_input(latents, timestep)
                    prediction = self._guided(sample, network_time, coordinates, labels, scale)
                    latents = stage.steps.step(prediction, timestep, latents, generator)
                    latents = run.after_step(timestep, latents)
                levels.append((latents, stage.size))
            images = self._to_output(latents, stages[-1].size, output_type)
            levels = [self._to_output(*level, output_type) for level in levels] if return_levels else None
        if not return_dict:
            return (images, levels)
        return PyramidalPipelineOutput(images=images, levels=levels)

    def _begin(
        self,
        stage: PyramidalStage,
        latents: torch.Tensor | None,
        batch_size: int,
        generator: Generators,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Noise at the lowest level (line 1), or plain colours in less of it; above, what was reached below, enlarged and
        renoised (eq. 2).
        """
        shape = (batch_size, self._channels, *stage.network_size)
        noise = white_noise(shape, generator=generator, device=self._execution_device)
        if latents is None and stage.strength == 1:
            return noise * stage.steps.scheduler.init_noise_sigma
        if latents is None:
            labels = None if labels is None else labels.tolist()
            plain_images = draw_colors(self.config.colors, shape, generator, noise.device, labels)
            return stage.steps.renoise(plain_images, noise)
        enlarged = F.interpolate(latents, stage.network_size, mode="bicubic", align_corners=False)
        return stage.steps.renoise(enlarged, noise)

    def _guided(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        coordinates: torch.Tensor,
        labels: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """The network's output; unless the scale is 1, drawn away from the guide's, or that for images of any class."""
        if scale == 1:
            return self._predict(sample, time, coordinates, labels)
        if self.guide is not None:
            worse = self._predict(sample, time, coordinates, labels, self.guide)
            return worse + scale * (self._predict(sample, time, coordinates, labels) - worse)
        none = torch.full_like(labels, plain(self.unet).config.num_class_embeds - 1)
        coordinates = coordinates[:1].expand(2 * len(sample), -1, -1, -1)
        both = self._predict(torch.cat((sample, sample)), time, coordinates, torch.cat((none, labels)))
        without, told = both.chunk(2)
        return without + scale * (told - without)

    def _coordinates(self, stage: PyramidalStage, box: Sequence[float], batch_size: int) -> torch.Tensor:
        grid = pixel_grid(*stage.network_size, box).to(self._execution_device)
        return grid[None].expand(batch_size, -1, -1, -1)

    def lay_out(
        self, plan: str | dict | None = None, arguments: PyramidalArguments | None = None
    ) -> list[PyramidalStage]:
        """
        The levels of a call, low to high, each with a scheduler of its own that is ready for its steps.

        Args:
            plan: See `__call__`; beside it the arguments must be the defaults.
            arguments: Of a call; `None` for the defaults.

        Raises:
            ValueError: for what cannot run.
        """
        arguments = PyramidalArguments() if arguments is None else arguments
        arguments, schedulers = self._choose(plan, arguments)
        sizes = self._level_sizes(arguments.resolutions)
        spacings = self._spacings(arguments.spacing, len(sizes))
        calls = self._calls(arguments, spacings)
        strengths = per_level("refine_strength", arguments.refine_strength, len(sizes) - 1)
        for strength in strengths:
            check_strength("refine_strength", strength)
        self._check_start(arguments.start_strength)
        config, guided = plain(self.unet).config, self.guide is not None
        check_guidance(arguments.guidance_scale, arguments.guidance_interval, config, guided)
        stages = []
        for index, (size, strength) in enumerate(zip(sizes, [arguments.start_strength, *strengths], strict=True)):
            name = "refine_steps" if index else "num_inference_steps"
            steps = lay_out_steps(schedulers[min(index, 1)], calls[index], strength, spacings[index], name)
            if (index or strength < 1) and spacings[index] == "scheduler":
                check_start_above_zero(steps, name, calls[index])
            scales = guidance_scales(
                arguments.guidance_scale,
                arguments.guidance_interval,
                steps.times,
                steps.scheduler.config.num_train_timesteps,
            )
            stages.append(PyramidalStage(size, rounded_up(size, self._size_multiple), steps, strength, scales))
        return stages

    def _check_start(self, strength: float) -> None:
        check_strength("start_strength", strength)
        if strength < 1 and self.config.colors is None:
            raise ValueError(f"start_strength={strength}: expected 1.0, since this pipeline carries no `colors`")

    def _check_noise(self, stages: list[PyramidalStage], box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> None:
        """Refuses more noise than the network is trained for at a level's size, or other times than it knows."""
        config, levels = plain(self.unet).config, [(stage.size, stage.steps.times) for stage in stages]
        starts = [(size, times[0]) for size, times in levels]
        check_noise(config, self.scheduler.config.num_train_timesteps, starts, box)
        check_level_calls(config, levels, self.config.plans or (), box)

    def _choose(
        self, plan: str | dict | None, arguments: PyramidalArguments
    ) -> tuple[PyramidalArguments, tuple[SchedulerMixin, SchedulerMixin]]:
        """The arguments of the plan, or those given; and the schedulers of the lowest level and of those above."""
        if plan is None and plain(self.unet).config.get("jumps") and not set(given(arguments)) - {*self.BESIDE_PLANS}:
            plan = next(iter(self.config.plans or ()), None)
        if plan is None:
            return arguments, (self.scheduler, self.refine_scheduler or self.scheduler)
        named = read_plan(plan, self.config.plans, self.PLAN_ARGUMENTS, ("scheduler", "refine_scheduler"))
        beside = {name: getattr(arguments, name) for name in self.BESIDE_PLANS if name not in named.arguments}
        check_not_beside_plan(plan, arguments, tuple(beside))
        chosen = {
            name: plan_scheduler(name, entry, self.scheduler) for name, entry in named.schedulers.items() if entry
        }
        low = chosen.get("scheduler", self.scheduler)
        own = None if named.schedulers else self.refine_scheduler
        return PyramidalArguments(**named.arguments, **beside), (low, chosen.get("refine_scheduler") or own or low)

    def _level_sizes(self, resolutions: Sequence[Size] | None) -> list[tuple[int, int]]:
        """The levels as (height, width), by default those of training."""
        if resolutions is None:
            config = plain(self.unet).config
            resolutions = getattr(config, "resolutions", None) or [config.sample_size]
            if resolutions == [None]:
                raise ValueError("resolutions=None: expected a list, since the network's config names none")
        sizes = check_growing("resolutions", resolutions)
        if min(sizes[0]) < self._size_multiple:
            raise ValueError(
                f"resolutions={list(resolutions)}: expected sides of at least {self._size_multiple} for this network"
            )
        return sizes

    @staticmethod
    def _spacings(spacing: str | Sequence[Sequence[int]], levels: int) -> list[Spacing]:
        """The spacing of each level."""
        if isinstance(spacing, str):
            return [spacing] * levels
        if len(spacing) != levels:
            raise ValueError(f"spacing gives times for {len(spacing)} levels: expected one list for each of {levels}")
        for times in spacing:
            if not isinstance(times, (list, tuple)) or not all(is_whole(time) for time in times):
                raise ValueError(f"spacing={spacing}: expected one list of whole numbers for each level")
        return list(spacing)

    @staticmethod
    def _calls(arguments: PyramidalArguments, spacings: list[Spacing]) -> list[int]:
        """Network calls of each level; where times are given, these say how many."""
        if not isinstance(spacings[0], str):
            return [len(times) for times in spacings]
        refine_steps = per_level("refine_steps", arguments.refine_steps, len(spacings) - 1)
        check_count("num_inference_steps", arguments.num_inference_steps)
        for steps in refine_steps:
            check_count("refine_steps", steps)
        return [arguments.num_inference_steps, *refine_steps]
