"""The classes of a call: as its user names them, as numbers for the network, and as often as in training."""

from collections.abc import Mapping, Sequence

import numpy as np

from pyrdiff.parts.checks import check_count
from pyrdiff.parts.settings import is_whole

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
