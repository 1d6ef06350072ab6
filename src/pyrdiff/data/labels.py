"""The classes of images: sub-folders of a folder, the array beside the images of an .npz, a column of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyrdiff.parts.outputs import is_training

from .listing import Listing

if TYPE_CHECKING:
    import datasets

BESIDE = ("y_train", "labels")  # names of arrays in an .npz that hold labels


class Labels(NamedTuple):
    """
    Classes of a set of images.

    Attributes:
        names: Of the classes, sorted; a class's number is its place.
        numbers: int64 [N], of each image its class.
    """

    names: tuple[str, ...]
    numbers: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Labels":
        """
        Labels of images whose classes are called so.

        Args:
            values: [N], strings or whole numbers, which are sorted as such.

        Raises:
            ValueError: for a name that cannot be printed.
        """
        found, numbers = np.unique(values, return_inverse=True)
        names = tuple(str(name) for name in found)
        for name in names:
            if not name or not name.isprintable():
                raise ValueError(f"class_labels: a class is called {name!r}; expected names that can be printed")
        return cls(names, numbers.reshape(-1).astype(np.int64))


def labels_of_folder(listing: Listing) -> Labels:
    """
    The first sub-folder that each image lies in is its class.

    Raises:
        ValueError: if an image lies in none of them, or one of them has no image.
    """
    places = [path.relative_to(listing.folder).parts for path in listing.images]
    beside = [parts[0] for parts in places if len(parts) == 1]
    if beside:
        raise ValueError(
            f"class_labels: {len(beside)} images of {str(listing.folder)!r} lie in no sub-folder, such as {beside[0]}; "
            "expected all in sub-folders, one a class"
        )
    known = {parts[0] for parts in places} | {path.relative_to(listing.folder).parts[0] for path in listing.of_runs}
    for path in sorted(listing.folder.iterdir()):
        if path.name in known or path.name.startswith(".") or not path.is_dir():
            continue
        if not any(is_training(settings.parent) for settings in path.rglob("settings.json")):
            raise ValueError(f"class_labels: {str(path)!r} has no image; expected one at least for each class")
    return Labels.of(np.array([parts[0] for parts in places]))


def labels_in_archive(arrays: np.lib.npyio.NpzFile, count: int, path: Path) -> Labels:
    """
    The array `y_train` or `labels` of an .npz.

    Args:
        arrays: The open file.
        count: Number of images.
        path: Of the file, for messages.

    Raises:
        ValueError: unless one of the two is there, with a string or a whole number for each image.
    """
    key = next((name for name in BESIDE if name in arrays.files), None)
    if key is None:
        raise ValueError(f"class_labels: {str(path)!r} has only {sorted(arrays.files)}; expected one of {BESIDE}")
    try:
        values = arrays[key]
    except ValueError as error:  # Python objects, which are never unpickled
        raise ValueError(f"class_labels: {key} of {str(path)!r} cannot be read: {error}") from error
    if values.dtype.kind not in "iuU" or values.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"class_labels: {key} of {str(path)!r} is {values.dtype} {list(values.shape)}; expected whole numbers or "
            f"strings, [{count}]"
        )
    return Labels.of(values.reshape(-1))


def labels_in_dataset(dataset: "datasets.Dataset", name: str) -> Labels:
    """
    The only column of classes that a data set has.

    Args:
        dataset: One split.
        name: Of the data set, for messages.

    Raises:
        ValueError: unless there is just one, with a class in each row.
    """
    import datasets

    columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(columns) != 1:
        raise ValueError(f"class_labels: {name} has the columns of classes {columns}; expected one")
    numbers = np.array([-1 if number is None else number for number in dataset[columns[0]]])
    if (numbers < 0).any():
        raise ValueError(f"class_labels: {columns[0]} of {name} has rows without a class; expected one in each")
    return Labels.of(np.array(dataset.features[columns[0]].names)[numbers])
