"""How schedulers of diffusers are told to clip their clean estimate to [-1, 1]."""

import inspect

import diffusers

CLIP = {"thresholding": True, "sample_max_value": 1.0}  # of DPM-Solver: a quantile between 1 and 1
CLIP_SAMPLE = {"clip_sample": True, "clip_sample_range": 1.0}  # of DDPM and DDIM


def clipping(scheduler: str) -> dict:
    """
    The settings with which a scheduler of diffusers clips.

    Args:
        scheduler: The name of its class.

    Raises:
        ValueError: for one that cannot clip.
    """
    known = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    for settings in (CLIP_SAMPLE, CLIP):
        if settings.keys() <= known.keys():
            return settings
    raise ValueError(f"scheduler={scheduler!r}: expected one that can clip the clean estimate")
