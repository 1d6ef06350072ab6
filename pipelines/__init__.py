"""Pipelines: custom diffusers pipelines, each file usable on its own."""

if __name__ == "pyrdiff.pipelines":
    # `SomePipeline.from_pretrained` resolves its components among the modules that are already imported.
    import pyrdiff.models
    import pyrdiff.schedulers  # noqa: F401

from .pipeline_guided_sr import GuidedSRPipeline
from .pipeline_parallel_trajectory import ParallelTrajectoryPipeline
from .pipeline_pyramidal import PyramidalPipeline
from .pipeline_residual_sr import ResidualSRPipeline

__all__ = ["GuidedSRPipeline", "ParallelTrajectoryPipeline", "PyramidalPipeline", "ResidualSRPipeline"]
