"""Networks: custom diffusers models, each file usable on its own."""

from .autoencoder_scale import ScaleAutoencoder
from .net_shuffled_sr import ShuffledSRModel
from .unet_coordinate import CoordinateUNet2DModel
from .unet_parallel_trajectory import ParallelTrajectoryUNet2DModel
from .unet_residual_sr import ResidualSRUNet2DModel

__all__ = [
    "CoordinateUNet2DModel",
    "ParallelTrajectoryUNet2DModel",
    "ResidualSRUNet2DModel",
    "ScaleAutoencoder",
    "ShuffledSRModel",
]
