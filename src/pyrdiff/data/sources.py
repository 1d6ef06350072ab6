"""Where images come from: a folder, an array, an array file, a Hub data set or the embedded letters."""

import hashlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from .glyphs import draw_glyphs
from .images import BadImageError, decode_image, fit_image
from .labels import Labels, labels_in_archive, labels_in_dataset, labels_of_folder
from .listing import look_into

if TYPE_CHECKING:
    import datasets

GLYPH_SIZE = 64  # of the set that `open_source("glyphs")` gives
BAD_HEADER = (ValueError, SyntaxError, tokenize.TokenError)  # what numpy makes of one
UNPACKED_FREELY = 2**30  # bytes of an array in a .npz file
MOST_UNPACKED = 100  # times the size of the file, above that
ARRAY_SHAPES = "uint8 arrays [N, H, W] or [N, H, W, C] with C 1, 3 or 4"


@runtime_checkable
class ImageSource(Protocol):
    """A numbered set of images. One whose images have classes may say them by `labels`, a `Labels`.

    Attributes:
        names: What each image is called in errors and logs.
    """

    names: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Path | bytes | Image.Image:
        """Image `index` as something `decode_image` accepts. May run in several threads at once."""

    def key(self) -> dict:
        """What identifies the images, as JSON values: equal keys stand for equal images."""


class FolderImages:
    """
    The images of a folder and the folders below it; `listing` says what is taken. See `look_into`, and for
    `class_labels` `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, leave_out_runs: bool = False, class_labels: bool = False):
        self.folder = Path(folder)
        self.listing = look_into(folder, leave_out_runs)
        self.labels = labels_of_folder(self.listing) if class_labels else None
        self.paths = self.listing.images
        self.names = [str(path) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Path:
        return self.paths[index]

    def key(self) -> dict:
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                stat = path.stat()
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                state = "unreadable"
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0{state}\0".encode("utf-8", "surrogateescape"))
        return {"kind": "folder", "path": str(self.folder.resolve()), "files": digest.hexdigest()}


class ArrayImages:
    """The images of a uint8 array [N, H, W] or [N, H, W, C] (C = 1 gray, 3 RGB, 4 RGBA), values in 0..255.

    Args:
        array: The images.
        name: Images are called "name[index]".
        key: What identifies the array; made from its bytes when None.
        labels: Classes of the images, if they are known.

    Raises:
        ValueError: for another type or shape, or without images.
    """

    def __init__(self, array: np.ndarray, name: str = "array", key: dict | None = None, labels: Labels | None = None):
        if not _is_image_array(array):
            raise ValueError(f"{name}={array.dtype} {list(array.shape)}: expected {ARRAY_SHAPES}, none empty")
        self.array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
        self.names = [f"{name}[{index}]" for index in range(len(array))]
        self.labels = labels
        self._key = key

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def key(self) -> dict:
        if self._key is None:
            digest = hashlib.sha256()
            for image in self.array:
                digest.update(np.ascontiguousarray(image))
            self._key = {"kind": "array", "shape": list(self.array.shape), "sha256": digest.hexdigest()}
        return self._key


class HubImages:
    """The images in one column of a `datasets.Dataset`, read as stored (not decoded by `datasets`).

    Args:
        dataset: One split.
        name: Images are called "name[row]".
        column: A column of feature type `datasets.Image`; None for the only one.
        class_labels: Whether to read the classes in the only column of feature type `datasets.ClassLabel`.

    Raises:
        ValueError: when there is no such column, or several and none is named.
    """

    def __init__(self, dataset: "datasets.Dataset", name: str, column: str | None = None, class_labels: bool = False):
        import datasets

        columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if column is None and len(columns) == 1:
            column = columns[0]
        if column not in columns:
            raise ValueError(
                f"image_column={column!r} for {name}, whose columns of images are {columns} "
                f"(all columns: {list(dataset.features)}): expected a column of images, or None if there is just one"
            )
        if len(dataset) == 0:
            raise ValueError(f"source={name!r} has no rows: expected a split with images")
        self.column = column
        self.labels = labels_in_dataset(dataset, name) if class_labels else None
        self.rows = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.names = [f"{name}[{index}]" for index in range(len(dataset))]
        self._key = {"kind": "dataset", "name": name, "column": column, "fingerprint": dataset._fingerprint}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes | Path:
        value = self.rows[index][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise BadImageError(self.names[index], "no image in this row")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])

    def key(self) -> dict:
        return self._key


def read_image(
    source: ImageSource, index: int, channels: Literal[1, 3], size: tuple[int, int] | None = None
) -> Image.Image:
    """
    Image `index` of a source, in mode "L" or "RGB".

    Args:
        source: The set.
        index: From 0.
        channels: 3 for RGB, 1 for gray.
        size: (height, width) to fit it to; see `fit_image`.

    Raises:
        BadImageError: if it cannot be read.
    """
    image = decode_image(source.read(index), channels, name=source.names[index])
    return image if size is None else fit_image(image, *size)


def sizes_of(source: ImageSource, progress: str | None = None) -> list[tuple[int, int]]:
    """
    (height, width) of each image. Every image is decoded: the first bad one raises `BadImageError`. `progress` is the
    title of a progress bar, which a terminal shows.
    """
    indices = tqdm(range(len(source)), desc=progress, unit="image", disable=True if progress is None else None)
    images = (read_image(source, index, 3) for index in indices)
    return [(image.height, image.width) for image in images]


class Some:
    """Some images of a source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.names = [source.names[index] for index in self.indices]
        labels = getattr(source, "labels", None)
        self.labels = None if labels is None else Labels(labels.names, labels.numbers[self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Path | bytes | Image.Image:
        return self.source.read(self.indices[index])

    def key(self) -> dict:
        return {"kind": "some", "of": self.source.key(), "indices": self.indices}


def open_source(
    source: str | os.PathLike | np.ndarray,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    array_key: str | None = None,
    leave_out_runs: bool = False,
    class_labels: bool = False,
) -> ImageSource:
    """Open a set of images. What `source` may be, in the order in which it is tried:

    1. a uint8 array [N, H, W] or [N, H, W, C], C = 1, 3 or 4, values in 0..255;
    2. the string "glyphs": the embedded letters, `draw_glyphs(size=64)` (for a folder of that name give a `Path`);
    3. the path of a folder: its images and those of the folders below it;
    4. the path of a .npy or .npz file with such an array. Of several arrays in a .npz the one named `array_key` is
       taken, else "x_train", else the only one of such a shape;
    5. any other string: a data set of the Hugging Face Hub, `datasets.load_dataset(source, dataset_config, split=…)`.

    Args:
        source: See above.
        dataset_config: Configuration of a Hub data set.
        split: Split of a Hub data set.
        image_column: Column of a Hub data set; None for the only one of feature type `datasets.Image`.
        array_key: Name of an array in a .npz file.
        leave_out_runs: Of a folder, whether images that runs of ours wrote are left out; see `look_into`.
        class_labels: Whether the source is to say the images' classes as its `labels`. Of a folder these are its
            sub-folders, or what its metadata.csv or metadata.jsonl says (column `label`, or the only one beside
            `file_name`), of a .npz file its array "y_train" or "labels", of a Hub data set its only column of feature
            type `datasets.ClassLabel`.

    Raises:
        ValueError: when `source` is none of these, has no images, or an option does not go with its kind; with
            `class_labels`, when an image has no class or a class has no image.
    """
    hub_options = {"dataset_config": dataset_config, "image_column": image_column}
    path = None if isinstance(source, np.ndarray) or source == "glyphs" else Path(source)
    local = path is None or path.exists()
    if local:
        _refuse(hub_options, source, "a Hub data set")
    if not (local and path is not None and path.suffix == ".npz"):
        _refuse({"array_key": array_key}, source, "a .npz file")

    if class_labels and (path is None or path.suffix == ".npy"):
        what = "an array" if isinstance(source, np.ndarray) else repr(str(source))
        raise ValueError(f"class_labels for {what}: expected for a folder, a .npz file or a Hub data set only")
    if isinstance(source, np.ndarray):
        return ArrayImages(source)
    if path is None:
        return ArrayImages(draw_glyphs(GLYPH_SIZE), "glyphs")
    if path.is_dir():
        return FolderImages(path, leave_out_runs, class_labels)
    if path.exists():
        return _open_file(path, array_key, class_labels)
    if not isinstance(source, str) or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(
            f"source={str(source)!r} does not exist: expected a folder, a .npy or .npz file, 'glyphs' or the "
            "name of a Hub data set"
        )
    return _open_hub(source, dataset_config, split, image_column, class_labels)


def _refuse(options: dict[str, str | None], source: object, kind: str) -> None:
    for option, value in options.items():
        if value is not None:
            what = "an array" if isinstance(source, np.ndarray) else repr(str(source))
            raise ValueError(f"{option}={value!r} for {what}: expected for {kind} only")


def _is_image_array(array: np.ndarray) -> bool:
    return _is_image_shape(array.shape, array.dtype)


def _is_image_shape(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    shaped = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3, 4))
    return dtype == np.uint8 and shaped and math.prod(shape) > 0


def _open_file(path: Path, array_key: str | None, class_labels: bool) -> ArrayImages:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"source={str(path)!r}: expected a folder of images, a .npy or a .npz file")
    stat = path.stat()
    key = {"kind": "file", "path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    labels = None
    try:
        array = _load_array(path)
        if path.suffix == ".npz":
            with array as arrays:
                array_key, array = _choose_array(arrays, array_key, path)
                labels = labels_in_archive(arrays, len(array), path) if class_labels else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"source={str(path)!r} cannot be read ({error}): expected a whole {path.suffix}") from error
    name = str(path) + (f":{array_key}" if array_key else "")
    return ArrayImages(array, name, key | {"array": array_key}, labels)


def _load_array(path: Path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except BAD_HEADER as error:
        raise OSError(f"not a whole array file without Python objects ({error})") from error
    if isinstance(array, np.ndarray) != (path.suffix == ".npy"):
        raise OSError("its content is not what its name says")
    return array


def _choose_array(arrays: np.lib.npyio.NpzFile, array_key: str | None, path: Path) -> tuple[str, np.ndarray]:
    expected = f"expected one of the arrays in {str(path)!r}: {sorted(arrays.files)}"
    if array_key is None and "x_train" in arrays.files:
        array_key = "x_train"
    if array_key is not None and array_key not in arrays.files:
        raise ValueError(f"array_key={array_key!r}: {expected}")
    if array_key is None:
        images = [key for key in arrays.files if _holds_images(arrays, key)]
        if len(images) != 1:
            raise ValueError(f"array_key=None, but {len(images)} arrays are {ARRAY_SHAPES}: {expected}")
        (array_key,) = images
    size, most = _unpacked_size(arrays, array_key), max(UNPACKED_FREELY, MOST_UNPACKED * path.stat().st_size)
    if size > most:
        raise ValueError(
            f"source={str(path)!r}: {array_key} would unpack to {size / 1e9:,.3g} GB, more than {MOST_UNPACKED} times "
            "the file; expected a .npy file for such an array, which is read as needed"
        )
    try:
        return array_key, arrays[array_key]
    except ValueError as error:
        raise OSError(f"{array_key}: {error}") from error


def _header(arrays: np.lib.npyio.NpzFile, key: str) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and type of an array, by its header alone; None if it is no array without Python objects."""
    name = key if key in arrays.zip.namelist() else f"{key}.npy"
    with arrays.zip.open(name) as member:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        except BAD_HEADER:
            return None
    return None if dtype.hasobject else (shape, dtype)


def _holds_images(arrays: np.lib.npyio.NpzFile, key: str) -> bool:
    header = _header(arrays, key)
    return header is not None and _is_image_shape(*header)


def _unpacked_size(arrays: np.lib.npyio.NpzFile, key: str) -> int:
    """Bytes of an array, by its header; `OSError` if it is none."""
    header = _header(arrays, key)
    if header is None:
        raise OSError(f"{key} is no array without Python objects")
    shape, dtype = header
    return math.prod(shape) * dtype.itemsize


def _open_hub(name: str, config: str | None, split: str, column: str | None, class_labels: bool) -> HubImages:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # code of `datasets` and of what it reads with: whatever it raises is its own
        raise ValueError(
            f"source: {name!r} is not an existing path, and cannot be loaded as a Hub data set: {error}"
        ) from error
    return HubImages(dataset, ":".join(part for part in (name, config, split) if part), column, class_labels)
