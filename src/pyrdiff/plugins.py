"""What the loop, the loader and the command line know of a method: one description, found by entry point."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points

from pyrdiff.parts.settings import did_you_mean

GROUP = "pyrdiff.methods"


@dataclass(frozen=True)
class Method:
    """
    A trainable method. Its functions import torch when called, so that listing methods and their flags is quick.

    Args:
        name: As users type it, and as the entry point is called; "-" and "_" are the same to users.
        summary: One line for `--help`.
        settings: Dataclass of the method's flags; a `TrainingSettings`, whose `_check` is there for subclasses.
        model: f(settings, channels) -> the network. If the settings have `class_labels`, it is also given
            `class_names`, those of the classes that the images have.
        adopt: f(settings, channels, class name, config) -> the network that can begin with the weights of another,
            whose class and config these are; `ValueError` if there is none. `class_names` as for `model`. Without it a
            run begins only with the weights of a network that is built as its own.
        scheduler: f(settings, images) -> the noise schedule that it is trained with; `images` are `ImageLevels`.
        loss: f(network, scheduler, settings, batch, draws) -> scalar; `batch` holds images [B, C, H, W] in [-1, 1].
        pipeline: f(settings, network, scheduler, images) -> the pipeline to sample with and to publish. Its constructor
            takes components and plain values, which `pyrdiff.load` gives it again. Its call takes `generator`, also a
            list, one an image, and returns an output with `images`; what generates takes `batch_size`, what enlarges
            requires `image`. `plan`, `return_levels`, `return_trajectory` and `callback_on_step_end` are used where
            they are there.
        preview: f(settings, pipeline, images, path) -> {name: number} to log; writes a picture to `path`.
        first: f(settings) -> (`Method`, its settings) of a network that this one builds on, or None. It is trained
            first, by the same loop, into the folder of its method's name; `scheduler`, `loss`, `pipeline` and `preview`
            of this method then get the finished network as the argument `given`. Its own `pipeline` may be any object
            for its `preview`: it is not exported.
        finish: f(settings, network, images), for a method that is the `first` of another: last work on the trained
            network, such as fitting what is not learned by gradients, before it is kept.
        tune: f(settings, pipeline, folder), last work on the exported folder, such as a search for plans; `pipeline`
            checks before the training what it needs.
        classes: f() -> the pipelines, models and schedulers that the method's saved folders are made of, as far as
            they are not in diffusers. `pyrdiff.load` builds folders from these classes and no others.
        limits: For model cards: what such models cannot do, in a sentence or two.
    """

    name: str
    summary: str
    settings: type
    model: Callable
    scheduler: Callable
    loss: Callable
    pipeline: Callable
    preview: Callable
    first: Callable | None = None
    finish: Callable | None = None
    adopt: Callable | None = None
    tune: Callable | None = None
    classes: Callable[[], tuple[type, ...]] = tuple
    limits: str = ""

    def building_on(self, network) -> "Method":
        """This method with the finished network of its `first` in place."""
        names = ("scheduler", "loss", "pipeline", "preview")
        return replace(self, **{name: partial(getattr(self, name), given=network) for name in names}, first=None)


@dataclass(frozen=True)
class Plugin:
    """An entry of `pyrdiff.methods`: the package that it is from, and the method or, if it failed, why."""

    name: str
    package: str
    version: str
    module: str
    method: Method | None
    error: str | None = None


@cache
def plugins() -> tuple[Plugin, ...]:
    """Every installed entry, pyrdiff's own first. One that cannot be loaded says why and harms no other."""
    found, taken = [], {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.dist.name != "pyrdiff", entry.name)):
        method, error = _loaded(entry)
        if method is not None and entry.name in taken:
            method, error = None, f"the name {entry.name!r} is taken by the package {taken[entry.name]}"
        if method is not None:
            taken[entry.name] = entry.dist.name
        found.append(Plugin(entry.name, entry.dist.name, entry.dist.version, entry.module, method, error))
    return tuple(found)


def _loaded(entry: EntryPoint) -> tuple[Method | None, str | None]:
    try:
        method = entry.load()
    except (Exception, SystemExit) as error:  # code of others: whatever it raises is theirs
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not isinstance(method, Method):
        return None, f"{entry.value} is a {type(method).__name__}; expected a pyrdiff.plugins.Method"
    if method.name != entry.name:
        return None, f"{entry.value} has the name {method.name!r}; expected that of its entry point, {entry.name!r}"
    return method, None


def methods() -> dict[str, Method]:
    """
    Every installed method that could be loaded, by name: ours and those of other packages.

    Example:
        >>> {"pddpm", "pixel_aware", "sr"} <= set(methods())
        True
    """
    return {plugin.name: plugin.method for plugin in plugins() if plugin.method is not None}


def find(name: str) -> Method:
    """
    The method that a user names.

    Raises:
        ValueError: if there is none of this name, or it failed to load (which is said then).
    """
    wanted = name.replace("-", "_")
    for plugin in plugins():
        if plugin.name.replace("-", "_") == wanted and plugin.method is not None:
            return plugin.method
    for plugin in plugins():
        if plugin.name.replace("-", "_") == wanted:
            raise ValueError(f"method {name!r} of the package {plugin.package} failed to load: {plugin.error}")
    known = sorted(methods())
    raise ValueError(f"method {name!r}: expected one of {known}{did_you_mean(wanted, known)}")


@cache
def classes() -> dict[str, type]:
    """
    Pipelines, models and schedulers of every installed method by class name, in the order of `plugins`: where two have
    the same name, the earlier one counts. A method whose classes cannot be imported adds none.
    """
    found = {}
    for method in methods().values():
        try:
            for each in method.classes():
                found.setdefault(each.__name__, each)
        except Exception:  # `pyrdiff plugins` says why
            continue
    return found
