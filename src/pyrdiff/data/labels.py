"""The classes of images: sub-folders of a folder or a table in it, an array of an .npz, a column of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyrdiff.parts.outputs import is_training

from .listing import Listing
from .metadata import find_metadata, read_labels

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
    The classes of a folder's images: as its metadata.csv or metadata.jsonl says, or else the first sub-folder that each
    image lies in.

    Raises:
        ValueError: if an image lies in no sub-folder, or one of them has no image; or if the table has no row for an
            image, or one for what is no image there.
    """
    table = find_metadata(listing.folder)
    if table is not None:
        return _labels_of_table(table, listing)
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


def _labels_of_table(table: Path, listing: Listing) -> Labels:
    labels = read_labels(table)
    places = [path.relative_to(listing.folder).as_posix() for path in listing.images]
    known = {*places, *(path.relative_to(listing.folder).as_posix() for path in listing.of_runs)}
    for text, names in (
        (
            "has no row for {}, an image beside it; expected one for each",
            [name for name in places if name not in labels],
        ),
        (
            "has a row for {}, which is no image there; expected only images",
            [name for name in labels if name not in known],
        ),
    ):
        if names:
            raise ValueError(f"class_labels: {str(table)!r} {text.format(repr(names[0]))} ({len(names)} such)")
    values = [labels[place] for place in places]
    whole = all(isinstance(value, int) for value in values)
    return Labels.of(np.array(values if whole else [str(value) for value in values]))


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
