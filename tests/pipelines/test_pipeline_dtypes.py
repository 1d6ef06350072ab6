"""Networks in float32, bfloat16 and float16: every pipeline stays finite, and near what float32 gives."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    GuidedSRPipeline,
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    PyramidalPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
    ScaleAutoencoder,
)
from pyrdiff.parts.windows import Tiling, WindowedNetwork

DTYPES = (torch.bfloat16, torch.float16)
# Distances from float32 in units of the type's precision, 2**-7 and 2**-10: of the images, relative to their largest
# value (measured: up to 4.3), and of gradients (measured: up to 9.7).
IMAGES, GRADIENTS = 8, 16
BLOCKS = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
TINY = dict(**BLOCKS, layers_per_block=1, norm_num_groups=4, image_channels=1, resolutions=(4, 8))
RESIDUAL = dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, image_channels=1)
TIMED = dict(norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=20, image_channels=1, sample_size=8)


def soft_image() -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def pyramid():
    pipeline = PyramidalPipeline(CoordinateUNet2DModel(**TINY), DPMSolverMultistepScheduler())
    return pipeline, dict(batch_size=2, num_inference_steps=4, refine_steps=3)


def guided(guidance: str):
    pipeline = GuidedSRPipeline(CoordinateUNet2DModel(**TINY), DPMSolverMultistepScheduler())
    return pipeline, dict(image=soft_image(), scale_factor=2, refine_steps=4, guidance=guidance)


def residual():
    pipeline = ResidualSRPipeline(ResidualSRUNet2DModel(**RESIDUAL), CosineResidualScheduler(50))
    return pipeline, dict(image=soft_image(), scale_factor=2, num_inference_steps=5)


def pixel_aware(**head):
    unet = ParallelTrajectoryUNet2DModel(**TIMED, encoder_channels=(4, 8), layers_per_block=1, **head)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    structure = ScaleAutoencoder(**TIMED, block_out_channels=(8,), latent_dim=4, bottleneck_channels=4, prior="normal")
    pipeline = ParallelTrajectoryPipeline(unet, structure, PixelAwareScheduler(20))
    return pipeline, dict(batch_size=2, num_passes=3, return_trajectory=True)


CASES = {
    "pyramid": pyramid,
    "guided by projection": lambda: guided("projection"),
    "guided by gradient": lambda: guided("gradient"),
    "residual": residual,
    "pixel-aware": pixel_aware,
    "pixel-aware, sub-networks": lambda: pixel_aware(head="literal"),
}


def images_of(name: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    pipeline, arguments = CASES[name]()
    pipeline.to(dtype).set_progress_bar_config(disable=True)
    output = pipeline(**arguments, generator=torch.Generator().manual_seed(3), output_type="latent")
    return torch.stack([output.images, *(getattr(output, "trajectory", None) or [])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_network_of_less_precision_gives_nearly_the_same_images(name, dtype):
    expected, images = images_of(name, torch.float32), images_of(name, dtype)
    assert images.dtype == torch.float32 and images.isfinite().all()
    distance = ((images - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert 0 < distance <= IMAGES * torch.finfo(dtype).eps, "0 would mean that the network was float32"


@pytest.mark.parametrize("tiling", [None, Tiling(8, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_gradients_survive_a_network_of_less_precision(dtype, tiling):
    """Of 1e-7, as guidance asks for near the end: by themselves, float16 rounds them to 0."""
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(**TINY).requires_grad_(False)
    sample, cotangent = torch.randn(2, 1, 16, 16), 1e-7 * torch.randn(2, 1, 16, 16)
    coordinates = CoordinateUNet2DModel.coordinate_grid(16, 16)[None]

    def pulled(kind: torch.dtype) -> torch.Tensor:
        def network(inputs, time, condition):
            return unet(inputs.to(kind), time, condition.expand(2, -1, -1, -1), return_dict=False)[0].float()

        unet.to(kind)
        return WindowedNetwork(network, 2, tiling).differentiate(sample, torch.tensor(10), coordinates).pull(cotangent)

    expected = pulled(torch.float32)
    error = (pulled(dtype) - expected).norm() / expected.norm()
    assert error < GRADIENTS * torch.finfo(dtype).eps
