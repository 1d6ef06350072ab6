"""What makes a run unlikely to become good, told before it begins: a line each, with what to do."""

import numpy as np

from pyrdiff.data import ImageLevels

from .settings import TrainingSettings

FEW_IMAGES = 50  # whole ones, of which a network of millions of numbers remembers each (docs/questions.md)
CHUNK = 1024  # images that are looked at together


def notes_on_images(images: ImageLevels, settings: TrainingSettings) -> list[str]:
    """What is odd about the images of a run."""
    notes = []
    whole = settings.generates and settings.patch_size is None and settings.init_from is None
    if whole and len(images) < FEW_IMAGES:
        notes.append(
            f"{len(images)} images: trained on fewer than {FEW_IMAGES}, a model draws hardly anything else than these; "
            "expected more, or --init_from with a trained model"
        )
    if images.channels == 3 and _are_gray(images.arrays[0]):
        notes.append("all images are gray: --image_channels 1 trains a model that cannot tint them")
    flat = _of_one_colour(images)
    if flat:
        share = f"{len(flat)} of {len(images)} images are" if len(flat) > 1 else f"1 of {len(images)} images is"
        notes.append(f"{share} of one colour, and so will be some that the model draws: {images.names[flat[0]]}")
    return notes


def notes_on_length(steps: int, settings: TrainingSettings) -> list[str]:
    """What is odd about the number of steps of a run."""
    if steps <= settings.lr_warmup_steps:
        return [f"{steps} steps are no more than --lr_warmup_steps: the model will learn next to nothing"]
    return []


def _are_gray(array: np.ndarray) -> bool:
    """True if red, green and blue are equal everywhere in images [N, h, w, 3]. Ends at the first chunk with colours."""
    chunks = (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))
    return all((chunk == chunk[..., :1]).all() for chunk in chunks)


def _of_one_colour(images: ImageLevels) -> list[int]:
    """Images whose pixels are all the same: looked for among the smallest, confirmed among the largest."""
    lowest, highest = images.arrays[0], images.arrays[-1]
    flat = []
    for start in range(0, len(lowest), CHUNK):
        chunk = lowest[start : start + CHUNK]
        same = (chunk == chunk[:, :1, :1]).all(axis=(1, 2, 3))
        flat += [start + int(index) for index in np.flatnonzero(same)]
    return [index for index in flat if (highest[index] == highest[index][:1, :1]).all()]
