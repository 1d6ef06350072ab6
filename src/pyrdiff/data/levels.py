"""The training images at every resolution, decoded once and kept in memory or in memory-mapped files."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from pyrdiff.parts.files import replacing

from .images import MAX_PIXELS, WHITE, BadImageError, check_decoding, decode_image, fit_image
from .labels import Labels
from .sources import ImageSource, open_source

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2  # raised when the same key would give other files
HASH_ROWS = 1024


class ImageLevels:
    """Images at several resolutions, each made from the original directly.

    Attributes:
        sizes: (height, width) of each level, from low to high.
        arrays: uint8 [N, h, w, C] per level, values in 0..255; read-only memory-maps when they come from a cache.
        names: What each of the N images is called.
        bad: (name, reason) of each image that was left out.
        composited: How many of the N had transparency, which was composited on the background.
        enlarged: How many of the N are smaller than the highest level in height or width.
        notes: {what was converted or looks wrong: (how many of the N, the name of the first)}; see `decode_image`.
        labels: The classes of the N images, or None.
        fingerprint: SHA-256 over sizes, channels, the pixels of the highest level, and the classes if there are any.

    Raises:
        ValueError: when sizes, arrays and names do not fit together, or a class has no image.
    """

    def __init__(
        self,
        sizes: Sequence[int | tuple[int, int]],
        arrays: Sequence[np.ndarray],
        names: Sequence[str],
        bad: Sequence[tuple[str, str]] = (),
        composited: int = 0,
        enlarged: int = 0,
        fingerprint: str | None = None,
        notes: Mapping[str, Sequence] | None = None,
        labels: Labels | None = None,
    ):
        self.sizes = check_sizes(sizes)
        self.arrays = list(arrays)
        self.names = list(names)
        self.bad = list(bad)
        self.composited = composited
        self.enlarged = enlarged
        self.notes = {note: tuple(count_and_name) for note, count_and_name in (notes or {}).items()}
        if len(self.arrays) != len(self.sizes):
            raise ValueError(f"arrays: {len(self.arrays)}; expected one for each of the {len(self.sizes)} sizes")
        channels = self.arrays[0].shape[-1]
        for (height, width), array in zip(self.sizes, self.arrays, strict=True):
            expected = (len(self.names), height, width, channels)
            if array.dtype != np.uint8 or array.shape != expected or channels not in (1, 3) or not self.names:
                raise ValueError(
                    f"arrays={array.dtype} {list(array.shape)} for level {height}×{width}: expected uint8 "
                    f"[N, {height}, {width}, C], with C 1 or 3 and N the number of names, {len(self.names)}, at least 1"
                )
        self.fingerprint = fingerprint or fingerprint_of(self.sizes, self.arrays[-1])
        self.labels = labels
        if labels is not None:
            _check_labels(labels, len(self))
            self.fingerprint = _labelled(self.fingerprint, labels)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def channels(self) -> int:
        """1 (gray) or 3 (RGB)."""
        return self.arrays[0].shape[-1]

    @classmethod
    def build(
        cls,
        source: ImageSource | str | os.PathLike | np.ndarray,
        sizes: Sequence[int | tuple[int, int]],
        channels: Literal[1, 3] = 3,
        background: tuple[int, int, int] = WHITE,
        on_bad_image: Literal["stop", "skip"] = "stop",
        allow_enlarging: bool = True,
        cache_dir: str | os.PathLike | None = None,
        max_pixels: int = MAX_PIXELS,
        progress: bool = False,
        num_threads: int | None = None,
    ) -> "ImageLevels":
        """Decode every image of `source` once and fit it to every size.

        With `cache_dir` the levels are .npy files there, memory-mapped, and found again when the same images (folders:
        same relative paths, sizes in bytes and times of change) are asked for with the same settings. Files that are
        missing or of the wrong length, shape or type are made anew; their pixels are not checked again. Several
        processes may build the same levels at the same time.

        Args:
            source: An `ImageSource`, or what `open_source` accepts.
            sizes: Sides or (height, width), both growing from each level to the next.
            channels: 3 for RGB, 1 for gray.
            background: (red, green, blue) in 0..255 behind transparent pixels.
            on_bad_image: "stop" raises at the first image that cannot be read; "skip" leaves such images out, logs each
                and lists it in `bad`.
            allow_enlarging: Whether an image smaller than the highest level is enlarged, or else is a bad image.
            cache_dir: Folder of the cache, made if missing; None keeps the levels in memory.
            max_pixels: Larger images are bad images and not decoded.
            progress: Show a progress bar, on a terminal.
            num_threads: Decoding threads; None for one a core, at most 8. Does not change the result.

        Raises:
            ValueError: for a bad image with "stop", when no image is left with "skip", and when an argument is out of
                range.
        """
        sizes = check_sizes(sizes)
        check_decoding(channels, background, max_pixels)
        if on_bad_image not in ("stop", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}: expected 'stop' or 'skip'")
        if num_threads is None:
            num_threads = min(8, os.cpu_count() or 1)
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: expected None, or 1 or more")
        if not isinstance(source, ImageSource):
            source = open_source(source)
        reading = _Reading(
            source, sizes, channels, tuple(background), allow_enlarging, max_pixels, num_threads, progress
        )

        if cache_dir is None:
            arrays = [np.empty((len(source), *size, channels), np.uint8) for size in sizes]
            record = reading.run([_ArrayWriter(array) for array in arrays], on_bad_image)
            arrays = [array[: len(source) - len(record["bad"])] for array in arrays]
            record["fingerprint"] = fingerprint_of(sizes, arrays[-1])
        else:
            folder = Path(cache_dir) / reading.key()[:16]
            record, arrays = _load(folder, reading) or _make(folder, reading, on_bad_image)

        bad = [(source.names[index], reason) for index, reason in record["bad"]]
        if bad and on_bad_image == "stop":  # only a cache made with "skip" comes here
            raise _stopped(*bad[0])
        left_out = {index for index, _ in record["bad"]}
        kept = [index for index in range(len(source)) if index not in left_out]
        names, labels = [source.names[index] for index in kept], getattr(source, "labels", None)
        if labels is not None:
            labels = Labels(labels.names, labels.numbers[kept])
        for note, (count, first) in record["notes"].items():
            logger.warning("%d of %d images, %s the first: %s", count, len(names), first, note)
        told = {key: record[key] for key in ("composited", "enlarged", "fingerprint", "notes")}
        return cls(sizes, arrays, names, bad, **told, labels=labels)


def check_sizes(sizes: Sequence[int | tuple[int, int]]) -> list[tuple[int, int]]:
    """Sides or (height, width) pairs as a list of pairs.

    Raises:
        ValueError: unless there is at least one, all are ints of 1 or more, and both grow from each to the next.
    """
    pairs = [tuple(size) if isinstance(size, Sequence) else (size, size) for size in sizes]
    valid = bool(pairs) and all(
        len(pair) == 2 and all(isinstance(side, int) and side >= 1 for side in pair) for pair in pairs
    )
    if not valid or any(a[0] >= b[0] or a[1] >= b[1] for a, b in zip(pairs, pairs[1:], strict=False)):
        raise ValueError(
            f"sizes={list(sizes)}: expected sides or (height, width) of 1 or more, growing from low to high"
        )
    return pairs


def fingerprint_of(sizes: Sequence[tuple[int, int]], top: np.ndarray) -> str:
    """SHA-256, in hexadecimal, over the sizes, the channels and the pixels of the highest level [N, h, w, C]."""
    digest = hashlib.sha256(json.dumps([[list(size) for size in sizes], top.shape[-1]]).encode())
    for start in range(0, len(top), HASH_ROWS):
        digest.update(np.ascontiguousarray(top[start : start + HASH_ROWS]))
    return digest.hexdigest()


def _check_labels(labels: Labels, images: int) -> None:
    if len(labels.numbers) != images:
        raise ValueError(f"labels: {len(labels.numbers)} for {images} images; expected one for each")
    for name, count in zip(labels.names, np.bincount(labels.numbers, minlength=len(labels.names)), strict=True):
        if count == 0:
            raise ValueError(f"class_labels: the class {name!r} has no image that can be read; expected one at least")


def _labelled(fingerprint: str, labels: Labels) -> str:
    """The fingerprint of the same images with these classes."""
    digest = hashlib.sha256(json.dumps([fingerprint, labels.names]).encode())
    digest.update(np.ascontiguousarray(labels.numbers, "<i8"))
    return digest.hexdigest()


def _stopped(name: str, reason: str) -> ValueError:
    return ValueError(f"bad image {name}: {reason} (on_bad_image='skip' leaves such images out)")


@dataclass(frozen=True)
class _Reading:
    """What to read and how."""

    source: ImageSource
    sizes: list[tuple[int, int]]
    channels: int
    background: tuple[int, int, int]
    allow_enlarging: bool
    max_pixels: int
    num_threads: int
    progress: bool

    def settings(self) -> dict:
        refusing = {} if self.allow_enlarging else {"allow_enlarging": False}
        return {
            **refusing,
            "format": CACHE_FORMAT,
            "source": self.source.key(),
            "sizes": [list(size) for size in self.sizes],
            "channels": self.channels,
            "background": list(self.background),
            "max_pixels": self.max_pixels,
        }

    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def run(self, writers: list, on_bad_image: str) -> dict:
        """Write the levels of every good image, in the order of the source; say how it went."""
        record = {"bad": [], "composited": 0, "enlarged": 0, "notes": {}}
        for index, result in enumerate(self._results()):
            if isinstance(result, BadImageError):
                if on_bad_image == "stop":
                    raise _stopped(result.name, result.reason) from result
                logger.warning("skipped %s: %s", result.name, result.reason)
                record["bad"].append([index, result.reason])
                continue
            levels, composited, enlarged, notes = result
            for note in notes:
                count, first = record["notes"].get(note, (0, self.source.names[index]))
                record["notes"][note] = [count + 1, first]
            record["composited"] += composited
            record["enlarged"] += enlarged
            for writer, level in zip(writers, levels, strict=True):
                writer.write(level)
        if len(record["bad"]) == len(self.source):
            first = f"{self.source.names[0]}: {record['bad'][0][1]}"
            raise ValueError(f"source: none of its {len(self.source)} images can be read; the first is {first}")
        return record

    def _results(self) -> Iterator:
        """Results in order, a few at a time, so that memory does not depend on how many images there are."""
        indices = range(len(self.source))
        chunk = 32 * self.num_threads
        bar = tqdm(total=len(indices), desc="images", unit="image", disable=None if self.progress else True)
        with bar, ThreadPoolExecutor(self.num_threads) as pool:
            for start in range(0, len(indices), chunk):
                for result in pool.map(self._read, indices[start : start + chunk]):
                    yield result
                    bar.update()

    def _read(self, index: int) -> tuple[list[np.ndarray], bool, bool, list[str]] | BadImageError:
        """The levels of one image, whether it was composited, whether enlarged, its notes; or what is wrong with it."""
        name = self.source.names[index]
        try:
            image = decode_image(self.source.read(index), self.channels, self.background, self.max_pixels, name)
        except BadImageError as error:
            return error
        (height, width) = self.sizes[-1]
        enlarged = image.height < height or image.width < width
        if enlarged and not self.allow_enlarging:
            return BadImageError(name, f"{image.height}x{image.width} pixels, smaller than {height}x{width}")
        levels = [np.asarray(fit_image(image, *size)).reshape(*size, self.channels) for size in self.sizes]
        return levels, image.info["composited"], enlarged, image.info["notes"]


class _ArrayWriter:
    """Fills an array row by row."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.count = 0

    def write(self, row: np.ndarray) -> None:
        self.array[self.count] = row
        self.count += 1


class _FileWriter:
    """Appends rows to a .npy file; the header says how many once it is finished."""

    def __init__(self, path: Path, row_shape: tuple[int, ...]):
        self.file = open(path, "wb")
        self.row_shape = row_shape
        self.count = 0
        self._write_header()

    def write(self, row: np.ndarray) -> None:
        with self._named_in_errors():
            self.file.write(np.ascontiguousarray(row).data)
        self.count += 1

    def finish(self) -> None:
        with self._named_in_errors():
            start = self.file.tell() - self.count * int(np.prod(self.row_shape))
            self.file.seek(0)
            self._write_header()
            assert self.file.tell() == start, "numpy's headers leave room for the first axis to grow"
            self.file.close()

    def __enter__(self) -> "_FileWriter":
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):  # of what was not finished, nothing is kept
            self.file.close()

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        """Python does not say which file it could not write to."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from error

    def _write_header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _level_path(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"{size[0]}x{size[1]}.npy"


def _load(folder: Path, reading: _Reading) -> tuple[dict, list[np.ndarray]] | None:
    """What the cache holds, or None when it lacks something."""
    path = folder / "levels.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        arrays = [np.load(_level_path(folder, size), mmap_mode="r") for size in reading.sizes]
        fits = record["key"] == reading.key() and record["count"] + len(record["bad"]) == len(reading.source)
        for size, array in zip(reading.sizes, arrays, strict=True):
            fits &= array.dtype == np.uint8 and array.shape == (record["count"], *size, reading.channels)
        if not fits:
            raise ValueError("its files do not fit together")
        return {name: record[name] for name in ("bad", "composited", "enlarged", "fingerprint", "notes")}, arrays
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("cache %s is damaged (%s) and is made anew", folder, error)
        return None


def _make(folder: Path, reading: _Reading, on_bad_image: str) -> tuple[dict, list[np.ndarray]]:
    """Writes the cache. Its files take their names once all are complete: last the JSON that declares them whole."""
    finals = [_level_path(folder, size) for size in reading.sizes]
    with ExitStack() as stack:  # ends with what was entered first
        declared = stack.enter_context(replacing(folder / "levels.json"))
        written = [stack.enter_context(replacing(path)) for path in finals]
        _sweep_earlier_releases(folder)
        writers = [
            stack.enter_context(_FileWriter(path, (*size, reading.channels)))
            for path, size in zip(written, reading.sizes, strict=True)
        ]
        record = reading.run(writers, on_bad_image)
        for writer in writers:
            writer.finish()
        top = np.load(written[-1], mmap_mode="r")
        record |= {"fingerprint": fingerprint_of(reading.sizes, top), "count": len(top)}
        del top
        text = json.dumps({"key": reading.key(), **reading.settings(), **record}, indent=1)
        declared.write_text(text, encoding="utf-8")
    return record, [np.load(path, mmap_mode="r") for path in finals]


def _sweep_earlier_releases(folder: Path) -> None:
    """What killed processes of releases up to 0.1.0 left, once nobody has written to it for a day."""
    for path in folder.glob("*.*.tmp"):
        if re.fullmatch(r".+\.(npy|json)\.[0-9a-f]{32}\.tmp", path.name) and time.time() - path.stat().st_mtime > 86400:
            path.unlink(missing_ok=True)
