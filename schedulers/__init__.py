"""Schedulers: custom diffusers schedulers, each file usable on its own."""

from .scheduling_cosine_residual import CosineResidualScheduler
from .scheduling_pixel_aware import PixelAwareScheduler

__all__ = ["CosineResidualScheduler", "PixelAwareScheduler"]
