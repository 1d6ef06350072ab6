"""What the networks share: presets by name, and the arguments of a parent class."""

import inspect
from typing import TypeVar

from diffusers import UNet2DModel

PresetNetwork = TypeVar("PresetNetwork")


class Presets:
    """Put in front of `ModelMixin`: gives a network `from_preset`. The class sets `presets` to {name: settings}."""

    presets: dict[str, dict] = {}

    @classmethod
    def from_preset(cls: type[PresetNetwork], name: str, **overrides) -> PresetNetwork:
        """
        A network by name, with some settings changed, e.g. `from_preset("small", image_channels=1)`.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in cls.presets:
            raise ValueError(f"name={name!r}: expected one of {sorted(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})


def unet_arguments(network: UNet2DModel, **changes) -> dict:
    """What a subclass of `UNet2DModel` gives its parent: the settings of the same names in its config, or `changes`."""
    names = inspect.signature(UNet2DModel.__init__).parameters
    return {name: value for name, value in network.config.items() if name in names} | changes
