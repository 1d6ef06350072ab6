"""A run that begins with the weights of a trained network."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pyrdiff import hub
from pyrdiff.parts.plans import NOISE_PROCESS
from pyrdiff.parts.weights import unusable
from pyrdiff.plugins import Method

from . import checkpoints
from .settings import TrainingSettings

INPUT = "conv_in.weight"  # a network may have more channels there than the one that it begins with
CLASSES = "class_embedding.weight"  # a network may have it where the one that it begins with knows no classes
OF_THE_DATA = ("sample_size", "resolutions", "scale_factors", "noise_window")  # settings that fit any weights
IN_FLAGS = {"resolutions": "resolution", "scale_factors": "scale_factor"}  # which flag such a setting is from


@dataclass(frozen=True)
class Start:
    """
    A trained network to begin with.

    Args:
        place: Where it is, as the user named it.
        class_name: Of the network; None for that of the run, whose method wrote the checkpoint.
        config: Its settings.
        tensors: {name: values} of its weights.
        scheduler: Settings of the scheduler that it was trained with, if they are known.
    """

    place: str
    class_name: str | None
    config: dict
    tensors: dict[str, torch.Tensor]
    scheduler: dict | None

    def network(self, method: Method, settings: TrainingSettings, **class_names: tuple[str, ...]) -> torch.nn.Module:
        """
        The network of a run that begins with this one, its weights random yet.

        Args:
            method, settings: Of the run.
            class_names: The argument of `Method.model`, if the images have classes.

        Raises:
            ValueError: if the run's network is built otherwise.
        """
        channels = settings.image_channels
        if method.adopt is not None:
            try:
                return method.adopt(settings, channels, self.class_name, self.config, **class_names)
            except Exception as error:  # whatever a constructor makes of strange values
                raise ValueError(f"init_from={self.place!r}: {error}") from error
        network = method.model(settings, channels, **class_names)
        own = type(network).__name__
        if self.class_name not in (None, own):
            raise ValueError(
                f"init_from={self.place!r}: a {self.class_name}; expected a {own}, as {method.name} trains"
            )
        for key, value in _as_json(network.config).items():
            its_value = _as_json(self.config).get(key, value)
            if not key.startswith("_") and key not in OF_THE_DATA and its_value != value:
                raise ValueError(
                    f"init_from={self.place!r}: {key} is {its_value} there and {value} here; expected the same"
                )
        return network

    def copy_into(self, network: torch.nn.Module) -> None:
        """
        Gives the network these weights. Input channels and classes that only the network has get zeros, so that it does
        as before.

        Raises:
            ValueError: for weights that do not fit.
        """
        wanted, there = network.state_dict(), dict(self.tensors)
        if CLASSES in wanted and not self.config.get("num_class_embeds"):
            there.setdefault(CLASSES, torch.zeros_like(wanted[CLASSES]))
        for text, keys in (("lacks", set(wanted) - set(there)), ("has", set(there) - set(wanted))):
            if keys:
                other = "which this run's network has" if text == "lacks" else "which this run's network does not have"
                raise ValueError(f"init_from={self.place!r}: it {text} {min(keys)}, {other}")
        fitted = {}
        for key, value in wanted.items():
            given = there[key].to(value.dtype)
            if key == INPUT and given.shape[1] < value.shape[1]:
                more = torch.zeros(given.shape[0], value.shape[1] - given.shape[1], *given.shape[2:])
                given = torch.cat((given, more), 1)
            if given.shape != value.shape:
                raise ValueError(
                    f"init_from={self.place!r}: {key} is {list(given.shape)} there and {list(value.shape)} here; "
                    "expected the same"
                )
            fitted[key] = given
        network.load_state_dict(fitted)

    def check_same(self, network: torch.nn.Module) -> None:
        """
        Refuses a network that is to be trained at other sizes than this one, or on classes that this one does not know:
        an adapter has no place for them.
        """
        if CLASSES in network.state_dict() and CLASSES not in self.tensors:
            raise ValueError(f"init_from={self.place!r}: knows no classes; expected class_labels=False with lora_rank")
        here, there = dict(network.config), dict(self.config)
        if not there.get("resolutions") and here.get("resolutions") and there.get("sample_size"):
            there["resolutions"] = [there["sample_size"]]
        for name, flag in IN_FLAGS.items():
            if there.get(name) and name in here and _as_json(here[name]) != _as_json(there[name]):
                raise ValueError(
                    f"{flag}: the network of init_from={self.place!r} was trained with {there[name]}, this run has "
                    f"{here[name]}; expected the same with lora_rank"
                )

    def check_scheduler(self, scheduler) -> None:
        """Refuses a run with another noise process or another prediction, for which these weights mean nothing."""
        known = self.scheduler or {}
        names = [name for name in scheduler.config if name in NOISE_PROCESS or not _of_diffusers(scheduler)]
        for name in names:
            here, there = scheduler.config[name], known.get(name, scheduler.config[name])
            if not name.startswith("_") and _as_json(there) != _as_json(here):
                raise ValueError(
                    f"init_from={self.place!r}: it was trained with {name}={there!r}, this run has {here!r}; "
                    "expected the same"
                )

    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode())
            digest.update(self.tensors[key].contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def open_start(place: str, method_name: str) -> Start:
    """
    Reads a network to begin with; no code of it runs.

    Args:
        place: See `pyrdiff.hub.read_network`; or a checkpoint folder of the method, of which the averaged weights are
            taken, if there are such.
        method_name: The run's.

    Raises:
        ValueError: if there is no such network.
    """
    if not (Path(place) / checkpoints.MANIFEST_FILE).is_file():
        try:
            return Start(place, *hub.read_network(place))
        except ValueError as error:
            raise ValueError(f"init_from={place!r}: {error}") from error
    try:
        groups, state = checkpoints.load_checkpoint(Path(place))
        identity = state["identity"]
        trained, config, scheduler = identity["method"], dict(identity["network"]), dict(identity["scheduler"])
        tensors = {**groups["model"], **groups.get("ema", {})}
    except (checkpoints.CheckpointError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"init_from={place!r}: no checkpoint that can be read: {error}") from error
    bad = unusable(tensors)
    if bad:
        raise ValueError(f"init_from={place!r}: {bad[0]} is not finite, or far too large; expected weights")
    if identity.get("lora_rank"):
        raise ValueError(f"init_from={place!r}: a checkpoint of an adapter alone; expected one of a whole network")
    if trained != method_name:
        raise ValueError(f"init_from={place!r}: a checkpoint of {trained!r}; expected one of {method_name!r}")
    return Start(place, None, config, tensors, scheduler)


def _of_diffusers(scheduler) -> bool:
    return type(scheduler).__module__.split(".")[0] == "diffusers"


def _as_json(value):
    return json.loads(json.dumps(value, default=str))
