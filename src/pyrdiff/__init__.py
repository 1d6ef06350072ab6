"""pyrdiff: small pixel-space diffusion models of your own images, on diffusers.

Names are loaded when first used, so that `pyrdiff --help` does not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "CoordinateUNet2DModel": "pyrdiff.models",
    "CosineResidualScheduler": "pyrdiff.schedulers",
    "GuidedSRPipeline": "pyrdiff.pipelines",
    "ParallelTrajectoryPipeline": "pyrdiff.pipelines",
    "ParallelTrajectoryUNet2DModel": "pyrdiff.models",
    "PixelAwareScheduler": "pyrdiff.schedulers",
    "PyramidalPipeline": "pyrdiff.pipelines",
    "ResidualSRPipeline": "pyrdiff.pipelines",
    "ResidualSRUNet2DModel": "pyrdiff.models",
    "ScaleAutoencoder": "pyrdiff.models",
    "ShuffledSRModel": "pyrdiff.models",
    "load": "pyrdiff.hub",
    "data": "pyrdiff.data",
    "hub": "pyrdiff.hub",
    "metrics": "pyrdiff.metrics",
    "models": "pyrdiff.models",
    "pipelines": "pyrdiff.pipelines",
    "plan": "pyrdiff.plan",
    "schedulers": "pyrdiff.schedulers",
    "training": "pyrdiff.training",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'pyrdiff' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if module.__name__ == f"pyrdiff.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
