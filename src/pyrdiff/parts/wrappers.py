"""The network inside what is wrapped around it: a compiled module, adapters of PEFT, parallel training."""

import torch
from diffusers import ModelMixin

from pyrdiff.parts.steps import takes


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside its wrappers: the outermost `ModelMixin` in the module, or else the module itself."""
    return next((inner for inner in module.modules() if isinstance(inner, ModelMixin)), module)


def network_takes(module: torch.nn.Module, argument: str) -> bool:
    """
    Whether the network inside the wrappers has this argument of `forward`. Its class says so: a wrapper takes whatever
    it is given and passes it on.
    """
    return takes(type(plain(module)).forward, argument)
