"""Pipelines as blocks of Modular Diffusers: the same images as the pipelines called by hand."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.modular_pipelines import SequentialPipelineBlocks
from PIL import Image

import pyrdiff
from pyrdiff.modular import PipelineBlock
from pyrdiff.pipelines import __all__ as PIPELINES


@pytest.fixture(scope="module")
def components() -> dict:
    torch.manual_seed(0)
    unet = pyrdiff.CoordinateUNet2DModel(
        resolutions=(4, 8),
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return {"unet": unet, "scheduler": DDIMScheduler()}


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_generate_and_enlarge_in_a_sequence(components):
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {
            "generate": PipelineBlock(pyrdiff.PyramidalPipeline),
            "enlarge": PipelineBlock(pyrdiff.GuidedSRPipeline, reads={"image": "images"}),
        }
    )
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**components)
    steps = dict(num_inference_steps=4, refine_steps=2)
    made = pipeline(batch_size=2, scale_factor=2, output="images", generator=torch.Generator().manual_seed(3), **steps)
    generator = torch.Generator().manual_seed(3)
    small = pyrdiff.PyramidalPipeline(**components)(2, generator=generator, **steps).images
    large = pyrdiff.GuidedSRPipeline(**components)(small, scale_factor=2, refine_steps=2, generator=generator).images
    assert made[0].size == (16, 16)
    assert np.array_equal(pixels(made), pixels(large))


def test_an_enlarger_needs_its_image(components):
    pipeline = PipelineBlock(pyrdiff.GuidedSRPipeline).init_pipeline()
    pipeline.update_components(**components)
    with pytest.raises(ValueError, match="'image' is missing"):
        pipeline(refine_steps=2)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_block_names_what_its_pipeline_takes_and_gives(name):
    block = PipelineBlock(getattr(pyrdiff, name))
    parts = {spec.name for spec in block.expected_components}
    assert {"unet", "scheduler"} <= parts
    inputs = {each.name: each for each in block.inputs}
    assert "generator" in inputs and "self" not in inputs
    assert inputs["image"].required == name.endswith("SRPipeline") if "image" in inputs else True
    assert [each.name for each in block.intermediate_outputs][0] == "images"
    assert block.description.startswith(getattr(pyrdiff, name).__doc__.strip().split("\n")[0][:40])


def test_what_a_pipeline_does_not_take_is_refused():
    with pytest.raises(ValueError, match="reads=.*picture.*GuidedSRPipeline takes"):
        PipelineBlock(pyrdiff.GuidedSRPipeline, reads={"picture": "images"})
    with pytest.raises(ValueError, match="settings=.*plan.*PyramidalPipeline takes"):
        PipelineBlock(pyrdiff.PyramidalPipeline, settings={"plan": {}})


def test_settings_reach_the_constructor(components):
    plans = {"short": {"num_inference_steps": 3, "refine_steps": 2}}
    pipeline = PipelineBlock(pyrdiff.PyramidalPipeline, settings={"plans": plans}).init_pipeline()
    pipeline.update_components(**components)
    made = pipeline(plan="short", output="images", generator=torch.Generator().manual_seed(1))
    by_hand = pyrdiff.PyramidalPipeline(**components, plans=plans)
    expected = by_hand(plan="short", generator=torch.Generator().manual_seed(1)).images
    assert np.array_equal(pixels(made), pixels(expected))
