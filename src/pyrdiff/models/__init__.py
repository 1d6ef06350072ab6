"""Networks: custom diffusers models, each file usable on its own."""

from .unet_coordinate import CoordinateUNet2DModel
from .unet_residual_sr import ResidualSRUNet2DModel

__all__ = ["CoordinateUNet2DModel", "ResidualSRUNet2DModel"]
