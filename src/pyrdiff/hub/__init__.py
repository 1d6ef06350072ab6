"""Folders that load anywhere: export a pipeline with its code, load one without running code from it, publish it."""

from .checking import Check, check
from .folders import BUNDLED, export
from .loading import load
from .publishing import Push, push

__all__ = ["BUNDLED", "Check", "Push", "check", "export", "load", "push"]
