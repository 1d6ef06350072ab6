# SPDX-License-Identifier: Apache-2.0
# Written by pyrdiff; stands alone.
"""Network of super-resolution that works on squares of pixels as channels: a call costs what the small image costs."""

import importlib
import inspect
import math
import numbers
import numpy as np
import re
import sys
import torch
import torch.nn.functional as F
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from pathlib import Path
from torch import nn
from typing import NamedTuple, TypeVar


# pyrdiff.parts.batch: A batch of images at the door of a network or scheduler, and numbers of which each image has its own.

def check_batch(sample: torch.Tensor, channels: int, multiple: int) -> None:
    """
    The sample must be images [B, channels, H, W] with sides that are multiples of `multiple`.

    Raises:
        ValueError: if it is not.
    """
    if sample.ndim != 4 or sample.shape[1] != channels:
        raise ValueError(f"sample has shape {tuple(sample.shape)}: expected {channels} channels")
    if sample.shape[-2] % multiple or sample.shape[-1] % multiple:
        raise ValueError(f"sample has shape {tuple(sample.shape)}: expected sides that are multiples of {multiple}")


def one_for_each(name: str, value: torch.Tensor | float, images: torch.Tensor) -> torch.Tensor:
    """
    A number for all images [B, ...], or one for each, as float32 numbers on the device that it was given on.

    Raises:
        ValueError: for a shape other than (), (1,) and (B,).
    """
    numbers = torch.as_tensor(value, dtype=torch.float32)
    if numbers.shape not in ((), (1,), (len(images),)):
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}: expected a number or ({len(images)},)")
    return numbers


def beside(numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """A number for each image, shaped [B, 1, ...] so that it multiplies images [B, ...]."""
    return numbers.reshape(-1, *[1] * (images.ndim - 1))


# pyrdiff.parts.presets: What the networks share: presets by name, and the arguments of a parent class.

PresetNetwork = TypeVar("PresetNetwork")


class Presets:
    """Put in front of `ModelMixin`: gives a network `from_preset`. The class sets `presets` to {name: settings}."""

    presets: dict[str, dict] = {}

    @classmethod
    def from_preset(cls: type[PresetNetwork], name: str, **overrides) -> PresetNetwork:
        """
        A network by name, with some settings changed, e.g. `from_preset("small", image_channels=1)`.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in cls.presets:
            raise ValueError(f"name={name!r}: expected one of {sorted(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})


def unet_arguments(network: UNet2DModel, **changes) -> dict:
    """What a subclass of `UNet2DModel` gives its parent: the settings of the same names in its config, or `changes`."""
    names = inspect.signature(UNet2DModel.__init__).parameters
    return {name: value for name, value in network.config.items() if name in names} | changes


# pyrdiff.parts.settings: Checks of the settings of networks and schedulers. Each raises `ValueError` with name, value and what is accepted.

def check_choices(settings: Mapping, choices: Mapping[str, Sequence]) -> None:
    """Each setting that `choices` names must have one of the values there."""
    for name, accepted in choices.items():
        if settings[name] not in accepted:
            raise ValueError(f"{name}={settings[name]!r}: expected one of {tuple(accepted)}")


def is_whole(value: object) -> bool:
    """True for a whole number, also one of numpy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(settings: Mapping, *names: str, optional: bool = False) -> None:
    """Each of these settings must be a whole number from 1 up, or None if that is allowed."""
    for name in names:
        value = settings[name]
        if not (is_whole(value) and value >= 1 or optional and value is None):
            raise ValueError(f"{name}={value!r}: expected a whole number from 1 up{' or None' * optional}")


def check_positive(settings: Mapping, *names: str) -> None:
    """Each of these settings must be a finite number above 0."""
    for name in names:
        if not 0 < settings[name] < math.inf:
            raise ValueError(f"{name}={settings[name]}: expected a finite number above 0")


def checked_factors(factors: Sequence[int] | None) -> list[int] | None:
    """The setting `scale_factors` as a config keeps it: different whole numbers from 2 up, or None."""
    if factors is None:
        return None
    given = list(factors) if isinstance(factors, (list, tuple)) else []
    whole = all(is_whole(factor) and factor >= 2 for factor in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(f"scale_factors={factors}: expected different whole numbers from 2 up, or None")
    return given


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


# pyrdiff.parts.sources: The code of a class, kept from the moment that the class is made.

STANDS_ALONE = "# Written by pyrdiff; stands alone."  # in the first two lines of a file that was joined
OWN_IMPORT = re.compile(r"^from\s+([\w.]+)\s+import", re.MULTILINE)
# By these patterns diffusers looks for files that it would have to bring along, in strings and comments too.
RELATIVE_IMPORT = re.compile(r"^\s*(import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)
MODULES: dict[tuple[str, str, str], str] = {}  # (package, stem, class): the module that defines the class


class SourceFile(NamedTuple):
    """A file, and its text as it was when it was read."""

    path: str
    text: str


class Source(NamedTuple):
    """The module of a class; {module: file} of it and of those of its own package, or pyrdiff's, that it imports."""

    module: str
    files: dict[str, SourceFile]

    @property
    def stem(self) -> str:
        return self.module.rpartition(".")[2]


class KeepsSource:
    """
    Put in front of `ModelMixin` or `SchedulerMixin`, so that a saved folder carries the code of the class as it was
    when the class was made. Later the file may be another: diffusers writes the code of every folder that it loads to
    the same place, and a package may be updated while a training runs.

    Set `RETIRED` to names of settings that earlier versions saved and this one no longer takes: they are passed over.
    """

    RETIRED: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keep_source(cls)
        package, stem = cls.__module__.split(".")[0], cls.__module__.rpartition(".")[2]
        MODULES[package, stem, cls.__name__] = cls.__module__

    def register_to_config(self, **settings) -> None:
        """As stock, with numbers of numpy as those of Python, which a config is saved with."""
        super().register_to_config(**{name: _without_numpy(value) for name, value in settings.items()})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As stock; `auto_map` in a saved config is for diffusers' `AutoModel` and says nothing to the class."""
        passed_over = ("auto_map", *cls.RETIRED)
        config_dict = {name: value for name, value in config_dict.items() if name not in passed_over}
        return super().extract_init_dict(config_dict, **kwargs)


def _without_numpy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def keep_source(cls: type) -> None:
    """Keeps the code of a class with it, if that was not done before and there is a file."""
    if "_kept_source" not in vars(cls):
        cls._kept_source = _read_source(cls.__module__)


def _read_source(module: str) -> Source | None:
    files, waiting = {}, [module]
    own_packages = {module.split(".")[0], "pyrdiff"}
    while waiting:
        name = waiting.pop()
        path = getattr(sys.modules.get(name), "__file__", None)
        if name in files or path is None or not path.endswith(".py") or not Path(path).is_file():
            continue
        text = Path(path).read_text(encoding="utf-8")
        files[name] = SourceFile(path, text)
        if STANDS_ALONE not in text.split("\n")[:2]:
            waiting += [other for other in OWN_IMPORT.findall(text) if other.split(".")[0] in own_packages]
    return Source(module, files) if module in files else None


def source_of(cls: type) -> Source:
    """
    The kept code of a class.

    Raises:
        ValueError: if the class is of a script or of an interactive session. A folder would carry the whole script,
            with whatever else is in it.
    """
    keep_source(cls)
    if cls.__module__ == "__main__" or cls._kept_source is None:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__}, expected a class of a module with a file of its own: "
            "a saved folder carries that file"
        )
    return cls._kept_source


def standalone_text(cls: type) -> str:
    """
    The text of a file that has the class and all that it needs of its own package and of pyrdiff.

    Raises:
        ValueError: if there is no such file, or it cannot be joined with what it imports.
    """
    source = source_of(cls)
    path, text = source.files[source.module]
    if len(source.files) > 1:
        # Not an import statement: the exporter would follow it, and the joined files, which never come here, are used
        # where pyrdiff is not installed. A class comes here only if it imports modules of pyrdiff or of its package.
        text = importlib.import_module("pyrdiff.hub.standalone").join(source)
    relative = RELATIVE_IMPORT.search(text)
    if relative:
        raise ValueError(f"{path}: {relative[0].strip()!r}: expected no line that looks like a relative import")
    return text


def auto_map(cls: type) -> dict[str, str]:
    """What diffusers' `AutoModel` reads in a network's config to find its class in the folder."""
    return {"AutoModel": f"{source_of(cls).stem}.{cls.__name__}"}


# pyrdiff.models.net_shuffled_sr

PRESETS = {
    # Photographs x2 or x4, in an hour or more on a CPU: 2.6M parameters.
    "mini": dict(block_out_channels=(64, 128), layers_per_block=(3, 6)),
    # The same on a GPU: 14M.
    "small": dict(block_out_channels=(96, 256), layers_per_block=(4, 10)),
    # 8 -> 32 in minutes on a CPU: 0.2M.
    "tiny": dict(block_out_channels=(32, 48), layers_per_block=(1, 2)),
}


class ConditionedBlock(nn.Module):
    """Two convolutions beside an identity, and between them a scale and a shift of each channel by the conditions."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(embedding_dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # Near the identity at first, with conditions that change nothing: there is no norm to keep the values in range.
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        return hidden + self.conv2(F.silu(torch.addcmul(shift, self.conv1(hidden), 1 + scale)))


class ShuffledSRModel(KeepsSource, Presets, ModelMixin, ConfigMixin):
    r"""
    Predicts a residual or an image, given the enlarged low-resolution image, as `ResidualSRUNet2DModel` does. Squares
    of 4x4 pixels are the channels of one place (pixel unshuffle, Shi et al. 2016, arXiv:1609.05158), so that at x4 the
    convolutions run on the grid of the small image. There are two levels and no norms: what the network makes of a
    place depends on the pixels around it only.

    It can be told how much detail to make up and how much damage to undo, if it was trained so (loss-conditional
    training, Dosovitskiy and Djolonga 2020).

    Args:
        image_channels: Channels of the image.
        scale_factors: The factors that the network is trained to enlarge by.
        sample_size: What it was trained on.
        block_out_channels: Channels on the grid, multiples of 4, and at half of it.
        layers_per_block: Blocks on the grid, before and again after those at half of it; and blocks at half of it.
        embedding_dim: Of what it is told.
        sees_sample: False for a network of one call, to which the noisy image and its noise level say nothing.
        in_channels, out_channels: `image_channels` or None. In the config they are `image_channels`.

    Height and width of a sample must be multiples of 8.

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS
    CELL = 4
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        scale_factors: tuple[int, ...] | None = None,
        sample_size: int | tuple[int, int] | None = None,
        block_out_channels: tuple[int, int] = (64, 128),
        layers_per_block: tuple[int, int] = (3, 6),
        embedding_dim: int = 64,
        sees_sample: bool = True,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        check_whole(self.config, "image_channels", "embedding_dim")
        for name in ("block_out_channels", "layers_per_block"):
            given = self.config[name]
            good = isinstance(given, (list, tuple)) and len(given) == 2
            if not good or not all(is_whole(value) and value >= 1 for value in given):
                raise ValueError(f"{name}={given!r}: expected two whole numbers from 1 up")
        if block_out_channels[0] % 4:
            raise ValueError(f"block_out_channels={tuple(block_out_channels)}: expected a multiple of 4 first")
        for name, given in (("in_channels", in_channels), ("out_channels", out_channels)):
            if given not in (None, image_channels):
                raise ValueError(f"{name}={given}: expected image_channels={image_channels} or None")
        factors = checked_factors(scale_factors)
        self.register_to_config(in_channels=image_channels, out_channels=image_channels, scale_factors=factors)

        (outer, inner), (around, inside) = block_out_channels, layers_per_block
        pixels = image_channels * self.CELL**2
        self.condition_embedding = nn.Sequential(
            nn.Linear(3, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(2 * pixels if sees_sample else pixels, outer, 3, padding=1)
        self.down_blocks = nn.ModuleList(ConditionedBlock(outer, embedding_dim) for _ in range(around))
        self.downsample = nn.Conv2d(4 * outer, inner, 1)
        self.mid_blocks = nn.ModuleList(ConditionedBlock(inner, embedding_dim) for _ in range(inside))
        self.upsample = nn.Conv2d(inner, 4 * outer, 1)
        self.up_blocks = nn.ModuleList(ConditionedBlock(outer, embedding_dim) for _ in range(around))
        self.conv_up1 = nn.Conv2d(outer, 2 * outer, 3, padding=1)
        self.conv_up2 = nn.Conv2d(outer // 2, outer, 3, padding=1)
        self.conv_out = nn.Conv2d(outer // 4, image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        noise_level: torch.Tensor | float,
        low_res: torch.Tensor,
        detail: torch.Tensor | float = 1.0,
        restore: torch.Tensor | float = 0.0,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """
        Args:
            sample: [B, C, H, W], the noisy residual or image; with `sees_sample=False` its shape alone counts.
            noise_level: sqrt(gamma), the signal's share of `sample`: a number in (0, 1] or [B].
            low_res: [B, C, H, W], the low-resolution image enlarged to the sample's size, in [-1, 1].
            detail: Weight of the perceptual loss in [0, 1] that it was trained with: a number or [B].
            restore: Strength in [0, 1] of the damage that the low-resolution image has: a number or [B].
            return_dict: False for a tuple instead of a `UNet2DOutput`.

        Returns:
            The prediction, [B, C, H, W].

        Raises:
            ValueError: if the shapes do not fit.
        """
        if low_res.shape != sample.shape:
            raise ValueError(f"low_res has shape {tuple(low_res.shape)}: expected the sample's {tuple(sample.shape)}")
        check_batch(sample, self.config.image_channels, 2 * self.CELL)

        # 1. What it is told.
        told = {"noise_level": noise_level, "detail": detail, "restore": restore}
        if not self.config.sees_sample:
            told["noise_level"] = 0.0
        told = [one_for_each(name, value, sample).to(sample.device).expand(len(sample)) for name, value in told.items()]
        embedding = self.condition_embedding(torch.stack(told, dim=1).to(sample.dtype))

        # 2. The images, squares of pixels as channels.
        images = (sample, low_res.to(sample.dtype)) if self.config.sees_sample else (low_res.to(sample.dtype),)
        hidden = self.conv_in(F.pixel_unshuffle(torch.cat(images, dim=1), self.CELL))

        # 3. The grid, half of it, the grid again.
        hidden = self._through(self.down_blocks, hidden, embedding)
        middle = self._through(self.mid_blocks, self.downsample(F.pixel_unshuffle(hidden, 2)), embedding)
        hidden = hidden + F.pixel_shuffle(self.upsample(middle), 2)
        hidden = self._through(self.up_blocks, hidden, embedding)

        # 4. Out, in two steps.
        hidden = F.silu(F.pixel_shuffle(self.conv_up1(hidden), 2))
        output = self.conv_out(F.silu(F.pixel_shuffle(self.conv_up2(hidden), 2)))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _through(self, blocks: nn.ModuleList, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, embedding)
            else:
                hidden = block(hidden, embedding)
        return hidden
