"""Schedulers: custom diffusers schedulers, each file usable on its own."""

from .scheduling_cosine_residual import CosineResidualScheduler

__all__ = ["CosineResidualScheduler"]
