"""The pipeline that enlarges with a saved model: its own, or one of its method with the same networks."""

import inspect

from diffusers import DiffusionPipeline

from pyrdiff import plugins

from .card import needs_image


def enlarging(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """
    The pipeline itself if its call needs an image. Otherwise one that does, from the components of this one: of the
    classes of its method (`pyrdiff.plugins.Method.classes`), then of those of the others.

    Raises:
        ValueError: if there is none that takes these components.
    """
    if needs_image(type(pipeline)):
        return pipeline
    own = [method for method in plugins.methods().values() if type(pipeline) in _classes(method)]
    candidates = [*(cls for method in own for cls in _classes(method)), *plugins.classes().values()]
    for cls in dict.fromkeys(candidates):
        if not issubclass(cls, DiffusionPipeline) or not needs_image(cls):
            continue
        required, _ = cls._get_signature_keys(cls)
        components = {name: pipeline.components.get(name) for name in required}
        if None in components.values():
            continue
        try:
            return cls(**components)
        except ValueError:
            continue  # it refuses these networks
    raise ValueError(f"a {type(pipeline).__name__}: expected a model that enlarges, or whose network can be guided")


def image_channels(pipeline: DiffusionPipeline) -> int:
    """How many channels the pipeline's images have, by the config of its networks; 3 if none says."""
    configs = [getattr(component, "config", {}) for component in pipeline.components.values()]
    for name in ("image_channels", "in_channels"):
        for config in configs:
            if config.get(name) is not None:
                return config[name]
    return 3


def arguments_of(pipeline: DiffusionPipeline) -> set[str]:
    """The names of the arguments that the pipeline's call takes."""
    return set(inspect.signature(pipeline.__call__).parameters)


def _classes(method: plugins.Method) -> tuple[type, ...]:
    try:
        return tuple(method.classes())
    except Exception:  # code of others; `pyrdiff plugins` says why
        return ()
