"""
Two pipelines as blocks of one, in Modular Diffusers: generate, then enlarge.

    python examples/modular.py noto-emoji larger.png
"""

import sys

from diffusers.modular_pipelines import SequentialPipelineBlocks

import pyrdiff
from pyrdiff.modular import PipelineBlock

model, output = sys.argv[1:3]
blocks = SequentialPipelineBlocks.from_blocks_dict(
    {
        "generate": PipelineBlock(pyrdiff.PyramidalPipeline),
        "enlarge": PipelineBlock(pyrdiff.GuidedSRPipeline, reads={"image": "images"}),
    }
)
pipeline = blocks.init_pipeline()
pipeline.update_components(**pyrdiff.load(model).components)
images = pipeline(batch_size=1, num_inference_steps=20, scale_factor=2, output="images")
images[0].save(output)
