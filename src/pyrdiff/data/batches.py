"""Multi-scale batches: one resolution a step, the same number of pixels in each (Pyramidal DDPM).

The paper takes every resolution equally often. A step at twice the side then shows a quarter of the images, so by
default the larger ones come more often here; `level_share` says how often.

What a step gets is a function of (seed, step, micro) alone, so a run that resumes needs nothing but its step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .levels import ImageLevels
from .seeds import seed_of

# First part, after the user's seed, of what each kind of choice is seeded with.
LEVEL_ORDER, IMAGE_ORDER, WINDOWS = 0, 1, 2
# Between as many steps at each level (0) and as many images of each (1). Measured best: benchmarks/README.md.
IMAGES_COUNT = 0.65


def level_shares(batch_sizes: Sequence[int]) -> list[int]:
    """
    Steps a round at each level, where none are asked for: more where a step shows fewer images, as the power
    `IMAGES_COUNT` of how many fewer.

    Args:
        batch_sizes: Images a step, level by level, lowest first.

    Example:
        >>> level_shares([64, 16, 4])  # the same number of pixels a step
        [1, 2, 6]
        >>> level_shares([8, 8, 8])  # patches of one size
        [1, 1, 1]
    """
    return [max(1, round((batch_sizes[0] / size) ** IMAGES_COUNT)) for size in batch_sizes]


@dataclass(frozen=True)
class Batch:
    """Images of one level.

    Attributes:
        images: uint8 [B, C, h, w], contiguous, values in 0..255.
        boxes: float32 [B, 4], the window that each image shows of its (flipped) original as (top, left, bottom, right)
            in [0, 1]; None when images are whole.
        indices: int64 [B], which images these are.
        level: Index of the level, 0 the lowest.
        labels: int64 [B], the classes of these images; None for images without classes.
    """

    images: torch.Tensor
    boxes: torch.Tensor | None
    indices: torch.Tensor
    level: int
    labels: torch.Tensor | None = None


class MultiScaleBatches:
    """Draws the batch of any step.

    Steps go in rounds: a round visits each level as often as its share says, in an order of its own that is the same in
    every process. Each level runs through its images in epochs, each a new permutation, so every image is used as often
    as any other.

    A batch that `num_processes` processes share is drawn as one and each takes its slice: processes do not change what
    is trained on. Two with `batch_size` b see what one with 2b sees, wherever b scales to a whole number at each level.

    Args:
        images: The levels.
        batch_size: Of the lowest level, per process. Level k gets max(1, round(batch_size · area_0 / area_k)), the area
            being that of an image or, with patches, of a patch: 48 at 64×64 gives 12 at 128×128 and 3 at 256×256, the
            paper's batches.
        patch_size: Side, or (height, width), of a random window of each image, cut to the level's size where that is
            smaller; None for whole images.
        random_flip: Mirror images left to right, half of the time, before the window is cut.
        seed: Any int.
        num_processes: How many processes share a batch.
        process_index: Which of them this is, from 0.
        accumulation: How many draws (`micro`) a step has.
        level_share: Steps a round at each level, lowest first, whole numbers; [1, 1, 1] is the paper's. By default as
            `level_shares` has it.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(
        self,
        images: ImageLevels,
        batch_size: int,
        patch_size: int | tuple[int, int] | None = None,
        random_flip: bool = False,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        level_share: Sequence[int] | None = None,
    ):
        counts = {"batch_size": batch_size, "num_processes": num_processes, "accumulation": accumulation}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index}: expected 0..{num_processes - 1} (num_processes)")
        if patch_size is not None:
            patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
            if len(patch_size) != 2 or min(patch_size) < 1:
                raise ValueError(f"patch_size={patch_size}: expected None, a side, or a height and a width")
        self.images = images
        self.batch_size = batch_size
        self.patch_size = patch_size
        self.random_flip = random_flip
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.accumulation = accumulation
        self._windows = [
            size if patch_size is None else (min(patch_size[0], size[0]), min(patch_size[1], size[1]))
            for size in images.sizes
        ]
        if level_share is not None and (len(level_share) != len(images.sizes) or min(level_share) < 1):
            raise ValueError(f"level_share={level_share}: expected 1 or more for each of {len(images.sizes)}")
        self._labels = None if images.labels is None else torch.from_numpy(images.labels.numbers)
        self.level_share = list(level_share or level_shares(self.batch_sizes))
        self._visits = [level for level, share in enumerate(self.level_share) for _ in range(share)]
        self._permutations: list[dict[int, torch.Tensor]] = [{} for _ in images.sizes]

    @property
    def batch_sizes(self) -> list[int]:
        """Images per process and draw, level by level."""
        areas = [height * width for height, width in self._windows]
        return [max(1, round(self.batch_size * areas[0] / area)) for area in areas]

    def level_of(self, step: int) -> int:
        """The level that step `step` (from 0) uses."""
        return self._visit(step)[0]

    def _visit(self, step: int) -> tuple[int, int]:
        """The level of a step, and how many steps before were at the same level."""
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        round_index, place = divmod(step, len(self._visits))
        generator = torch.Generator().manual_seed(seed_of(self.seed, LEVEL_ORDER, round_index))
        order = [self._visits[index] for index in torch.randperm(len(self._visits), generator=generator)]
        level = order[place]
        return level, round_index * self.level_share[level] + order[:place].count(level)

    def draw(self, step: int, micro: int = 0) -> Batch:
        """This process's images for draw `micro` (0 ≤ micro < accumulation) of step `step` (from 0).

        Raises:
            ValueError: when `step` or `micro` is out of range.
        """
        if not 0 <= micro < self.accumulation:
            raise ValueError(f"micro={micro}: expected 0..{self.accumulation - 1} (accumulation)")
        level, visit = self._visit(step)
        (height, width), (window_height, window_width) = self.images.sizes[level], self._windows[level]
        share = self.batch_sizes[level]
        whole = share * self.num_processes
        mine = slice(self.process_index * share, (self.process_index + 1) * share)

        position = (visit * self.accumulation + micro) * whole + mine.start
        indices = self._stream(level, position, share)

        # Drawn for all processes and cut after, so that their number does not matter.
        generator = torch.Generator().manual_seed(seed_of(self.seed, WINDOWS, step, micro))
        tops = torch.randint(height - window_height + 1, (whole,), generator=generator)[mine]
        lefts = torch.randint(width - window_width + 1, (whole,), generator=generator)[mine]
        flips = (torch.rand(whole, generator=generator) < 0.5)[mine] & self.random_flip

        array = self.images.arrays[level]
        pixels = np.empty((share, array.shape[-1], window_height, window_width), np.uint8)
        places = zip(indices.tolist(), tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)
        for row, (index, top, left, flip) in enumerate(places):
            # Columns left..left+w of the mirrored image are columns W-left-w..W-left of the original, backwards.
            start = width - left - window_width if flip else left
            window = array[index, top : top + window_height, start : start + window_width]
            pixels[row] = (window[:, ::-1] if flip else window).transpose(2, 0, 1)

        boxes = None
        if self.patch_size is not None:
            corners = torch.stack([tops, lefts, tops + window_height, lefts + window_width], dim=1)
            boxes = corners.float() / torch.tensor([height, width, height, width])
        labels = None if self._labels is None else self._labels[indices]
        return Batch(torch.from_numpy(pixels), boxes, indices, level, labels)

    def _stream(self, level: int, start: int, count: int) -> torch.Tensor:
        """Images `start` to `start + count` of the level's endless stream: epoch after epoch, each a permutation."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, len(self.images))
            part = self._permutation(level, epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _permutation(self, level: int, epoch: int) -> torch.Tensor:
        kept = self._permutations[level]
        permutation = kept.get(epoch)
        if permutation is None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, IMAGE_ORDER, level, epoch))
            permutation = torch.randperm(len(self.images), generator=generator)
            # Two, for the batch that spans an epoch's end; a new dict, as another thread may be reading the old one.
            latest = dict(list(kept.items())[-1:])
            self._permutations[level] = latest | {epoch: permutation}
        return permutation
