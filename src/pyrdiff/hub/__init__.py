"""Folders that load anywhere: export a pipeline with its code, load one without running code from it, publish it."""

from . import card
from .card import needs_image
from .checking import Check, check
from .folders import export
from .loading import load
from .networks import SavedNetwork, read_network
from .publishing import Push, push, reserve
from .repository import BUNDLED

__all__ = [
    "BUNDLED",
    "Check",
    "Push",
    "SavedNetwork",
    "card",
    "check",
    "export",
    "load",
    "needs_image",
    "push",
    "read_network",
    "reserve",
]
