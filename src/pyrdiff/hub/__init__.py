"""Folders that load anywhere: export a pipeline with its code, load one without running code from it, publish it."""

from . import card
from .adapters import base_digest, inject, merge_adapters, parse_adapters, require_peft, save_adapter
from .card import needs_image
from .checking import Check, check
from .folders import export
from .loading import load
from .networks import SavedNetwork, read_network
from .publishing import Push, push, reserve
from .repository import BUNDLED, public_name

__all__ = [
    "BUNDLED",
    "Check",
    "Push",
    "SavedNetwork",
    "base_digest",
    "card",
    "check",
    "export",
    "inject",
    "load",
    "merge_adapters",
    "needs_image",
    "parse_adapters",
    "public_name",
    "push",
    "read_network",
    "require_peft",
    "reserve",
    "save_adapter",
]
