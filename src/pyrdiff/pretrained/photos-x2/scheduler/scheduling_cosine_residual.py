# SPDX-License-Identifier: Apache-2.0
# Written by pyrdiff; stands alone.
"""The noise process of SR4 (paper S) and of SR3: cosine or linear steps, run on the residual or on the image."""

import importlib
import inspect
import math
import numbers
import numpy as np
import re
import sys
import torch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from pathlib import Path
from typing import Literal, NamedTuple


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


# pyrdiff.parts.checks: Checks of arguments that several pipelines take. Each raises `ValueError` with the name, the value and what fits.

Size = int | tuple[int, int]
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_number(value) -> bool:
    """Whether it is a finite real number, also one of numpy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value) -> bool:
    """Whether it is a whole number from 1 up."""
    return is_whole(value) and value > 0


def check_count(name: str, value) -> None:
    if not is_count(value):
        raise ValueError(f"{name}={value!r}: expected a whole number from 1 up")


def check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_strength(name: str, value) -> None:
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")


def check_size(name: str, size: Size) -> tuple[int, int]:
    """The size as (height, width)."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(is_count(side) for side in pair):
        raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
    return pair


def check_generators(generator: Generators) -> None:
    """One generator, a list of them, or none."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator={one!r}: expected a torch.Generator or a list of them, such as "
                "torch.Generator().manual_seed(5)"
            )


def check_generator(generator: Generators, batch_size: int) -> None:
    """One generator, or as many as there are images."""
    check_generators(generator)
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")


def check_scheduler(name: str, scheduler) -> None:
    """The scheduler must be able to renoise an image, and say its noise process."""
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{name}={type(scheduler).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
            "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "HeunDiscreteScheduler"
        )


# pyrdiff.parts.noise: White noise by one generator, or by one an image.

def white_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    Standard normal numbers [B, ...], drawn on the generator's device.

    Raises:
        ValueError: for generators that are none, or another number than one, or one for each of B.
    """
    check_generators(generator)
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {shape[0]}")
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)


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


# pyrdiff.parts.timesteps: The timesteps that a scheduler is asked to run.

def chosen_timesteps(
    num_inference_steps: int | None, timesteps: Sequence[int] | None, lowest: int, highest: int
) -> list[int] | None:
    """
    What `set_timesteps` of a scheduler was asked for: the chosen timesteps, or None for a number of steps.

    Args:
        num_inference_steps: A number of steps, at most as many as there are timesteps.
        timesteps: Descending whole numbers from `highest` to `lowest`.
        lowest, highest: The timesteps that the scheduler has.

    Raises:
        ValueError: unless exactly one of the two is given, and fits.
    """
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError(f"num_inference_steps={num_inference_steps}, timesteps={timesteps}: expected one of the two")
    if timesteps is None:
        most = highest - lowest + 1
        if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: expected a whole number from 1 to {most}")
        return None
    times = [int(time) for time in timesteps]
    descending = times == list(timesteps) and times == sorted(set(times), reverse=True)
    if not times or not descending or times[0] > highest or times[-1] < lowest:
        raise ValueError(f"timesteps={list(timesteps)}: expected descending whole numbers from {highest} to {lowest}")
    return times


# pyrdiff.schedulers.scheduling_cosine_residual

@dataclass
class CosineResidualSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: [B, C, H, W], the sample at the previous timestep.
        pred_original_sample: [B, C, H, W], the clean estimate: a scaled residual (see `compose`), or an image.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class ReverseStep(NamedTuple):
    """
    The numbers of one reverse step. gamma and gamma' are those of its timestep and of the next one (1 after the last
    step), and alpha = gamma / gamma'.
    """

    prev_timestep: int  # -1 after the last step
    signal: float  # sqrt(gamma)
    noise: float  # sqrt(1 - gamma)
    prev_signal: float  # sqrt(gamma')
    prev_noise_power: float  # 1 - gamma'
    clean_weight: float  # of the clean estimate in the mean, eq. 4
    sample_weight: float  # of the sample in the mean, eq. 4
    small_spread: float  # sqrt(beta~), eq. 5
    large_spread: float  # sqrt(beta) = sqrt(1 - alpha), eq. 7


class CosineResidualScheduler(KeepsSource, SchedulerMixin, ConfigMixin):
    """
    Diffusion of what a low-resolution image lacks (paper S). The paper's gamma_t is `alphas_cumprod[t]` here, and its
    step t is timestep t - 1.

    Where the settings coincide, steps are those of diffusers' `DDPMScheduler` and `DDIMScheduler`, with one exception:
    no noise is left after the last step, even if it is not at timestep 0. A solver of diffusers that is made by
    `from_config(scheduler.config)` has the same alphas_cumprod.

    Args:
        num_train_timesteps: Steps of the noise process (paper: 500; SR3: 2000).
        beta_schedule: "cosine" (section 5.2) or "linear". The config calls the first one "squaredcos_cap_v2", since
            diffusers' solvers read it by this name.
        prediction_target: The diffusion runs on the "residual" (eq. 9) or on the "image" (SR3).
        prediction_type: The network predicts the noise ("epsilon", eq. 6), the clean "sample" or "v_prediction".
        variance_type: The variance of an ancestral step's noise: beta_t ("fixed_large", eq. 7), beta~_t ("fixed_small",
            eq. 5), or one between them that the second half of the network's channels says ("learned_range", 5.3).
        residual_scale: Factor on the residual before it is diffused, 1 in the paper. The trainer fits it to 1 / std of
            the training residuals (see `fit_residual_scale`).
        beta_start, beta_end: Ends of the linear schedule (SR3's public code: 1e-6 and 1e-2 at 2000 steps).
        trained_betas: Betas in (0, 1) to use instead. Their number is then `num_train_timesteps`.
        timestep_spacing: How fewer steps are placed: "linspace", "leading" or "trailing", as in `DDPMScheduler`.
        clip_sample: True if a step clips its clean estimate to +-`clip_sample_range`.
        clip_sample_range: In the units of what is diffused: 1 bounds every image, 2 * `residual_scale` every residual.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> scheduler = CosineResidualScheduler(residual_scale=8.0)
        >>> high, upsampled = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.25)
        >>> residual = scheduler.residual(high, upsampled)  # 8 * (high - upsampled)
        >>> residual.unique().item(), scheduler.compose(residual, upsampled).unique().item()
        (2.0, 0.5)
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    CHOICES = {
        "beta_schedule": ("cosine", "squaredcos_cap_v2", "linear"),
        "prediction_target": ("residual", "image"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "variance_type": ("fixed_small", "fixed_large", "learned_range"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
    }

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 500,
        beta_schedule: Literal["cosine", "linear"] = "cosine",
        prediction_target: Literal["residual", "image"] = "residual",
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small",
        residual_scale: float = 1.0,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        trained_betas: np.ndarray | Sequence[float] | None = None,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ):
        check_choices(self.config, self.CHOICES)
        check_positive(self.config, "residual_scale", "clip_sample_range")
        if prediction_target == "image" and residual_scale != 1:
            raise ValueError(f"residual_scale={residual_scale} with prediction_target='image': expected 1")
        self.betas = self._betas()
        # Solvers of diffusers are made from this config, so it names the noise process as diffusers does. No setting
        # counts as a default: a solver would replace it by its own default, such as 1000 steps, clipping, or a first
        # step at the last timestep, where a cosine schedule leaves no signal.
        self.register_to_config(
            num_train_timesteps=len(self.betas),
            beta_schedule="linear" if beta_schedule == "linear" else "squaredcos_cap_v2",
            _use_default_values=[],
        )
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self._gammas = torch.cat([torch.ones(1), self.alphas_cumprod])  # from timestep -1 up
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -1)
        self._steps: dict[int, ReverseStep] | None = None

    def _betas(self) -> torch.Tensor:
        """Noise variances of the single steps, float32 [T]."""
        config = self.config
        if config.trained_betas is not None:
            betas = torch.as_tensor(np.asarray(config.trained_betas, dtype=np.float32))
            if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
                raise ValueError(f"trained_betas={config.trained_betas}: expected a list of numbers in (0, 1)")
            return betas
        check_whole(config, "num_train_timesteps")
        if config.beta_schedule != "linear":
            return betas_for_alpha_bar(config.num_train_timesteps)
        if not 0 < config.beta_start <= config.beta_end < 1:
            raise ValueError(
                f"beta_start={config.beta_start}, beta_end={config.beta_end}: expected 0 < start <= end < 1"
            )
        return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """This class and those of diffusers that read the same noise process from its config."""
        known = super()._get_compatibles()
        return [cls, *(kind for kind in known if "trained_betas" in inspect.signature(kind.__init__).parameters)]

    # What is diffused.

    def residual(self, high: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """
        What is diffused of images `high` [B, C, H, W] in [-1, 1], given their enlarged low-resolution images of the
        same shape and range: the residual of eq. 9 times `residual_scale`, or `high` if `prediction_target="image"`.
        """
        self._check_pair("high", high, upsampled)
        return high if self.config.prediction_target == "image" else (high - upsampled) * self.config.residual_scale

    def compose(self, residual: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """
        The images [B, C, H, W] of eq. 9, in [-1, 1] up to the network's error, not clipped. Undoes `residual` up to
        four roundings, for images in [-1, 1] at most 7 eps / 2: 4.2e-7 in float32, 0.03 in bfloat16.
        """
        self._check_pair("residual", residual, upsampled)
        if self.config.prediction_target == "image":
            return residual
        return residual / self.config.residual_scale + upsampled

    @staticmethod
    def _check_pair(name: str, first: torch.Tensor, upsampled: torch.Tensor) -> None:
        if first.shape != upsampled.shape:
            raise ValueError(f"upsampled has shape {tuple(upsampled.shape)}: expected {name}'s {tuple(first.shape)}")

    @staticmethod
    def fit_residual_scale(residuals: Iterable[torch.Tensor]) -> float:
        """The `residual_scale` for residuals high - upsampled of any shapes: 1 / std over all values, in one pass."""
        count, total, squares = 0, 0.0, 0.0
        for residual in residuals:
            values = residual.detach().double()
            count, total = count + values.numel(), total + values.sum().item()
            squares += values.square().sum().item()
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not 0 < variance < math.inf:
            raise ValueError(f"residuals: {count} values of variance {variance}; expected some, finite, not all equal")
        return variance**-0.5

    # The forward process.

    def noise_level(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """sqrt(gamma), which the networks of SR3 and SR4 see, float32, for timesteps of any shape from -1 to T - 1."""
        return self._gamma(timesteps).sqrt()

    def _gamma(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """gamma, float32, shaped as `timesteps`, which are whole numbers from -1 to T - 1."""
        timesteps = torch.as_tensor(timesteps)
        inside = (timesteps >= -1) & (timesteps < len(self)) & (timesteps == timesteps.floor())
        if timesteps.device.type == "cpu" and not inside.all():
            raise ValueError(f"timesteps={timesteps.tolist()}: expected whole numbers from -1 to {len(self) - 1}")
        if self._gammas.device != timesteps.device:  # kept where it is used, so that a training step waits for no GPU
            self._gammas = self._gammas.to(timesteps.device)
        return self._gammas[timesteps.long() + 1]

    def sample_noise_level(self, timesteps: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise levels for training, float32 [B], each drawn between the level of its timestep and the one before."""
        low, high = self.noise_level(timesteps), self.noise_level(timesteps - 1)
        check_generators(generator)
        source = generator.device if generator is not None else low.device
        return low + (high - low) * torch.rand(low.shape, generator=generator, device=source).to(low.device)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Adds `noise` to `original_samples`, residuals or images [B, C, H, W], at `timesteps` [B] or at a `noise_level`
        sqrt(gamma) [B] (eq. 1, and eq. 2 with sqrt(1 - gamma) where the text has (1 - gamma)).
        """
        signal, sigma = self._signal_and_noise(original_samples, timesteps, noise_level)
        return signal * original_samples + sigma * noise

    def get_velocity(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a "v_prediction" network predicts. Arguments as of `add_noise`; `sample` is the clean one."""
        signal, sigma = self._signal_and_noise(sample, timesteps, noise_level)
        return signal * noise - sigma * sample

    def _signal_and_noise(self, sample: torch.Tensor, timesteps, noise_level) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(gamma) and sqrt(1 - gamma), each [B, 1, ...] in the sample's dtype, rounded once."""
        if (timesteps is None) == (noise_level is None):
            raise ValueError(f"timesteps={timesteps}, noise_level={noise_level}: expected one of the two")
        if noise_level is None:
            gamma = self._gamma(timesteps)
            signal, sigma = gamma.sqrt(), (1 - gamma).sqrt()
        else:
            signal = torch.as_tensor(noise_level, dtype=torch.float32)
            if signal.device.type == "cpu" and not ((signal > 0) & (signal <= 1)).all():
                raise ValueError(f"noise_level={signal.tolist()}: expected numbers in (0, 1]")
            sigma = ((1 - signal) * (1 + signal)).sqrt()  # no cancellation near 1
        return tuple(beside(factor.to(sample.device, sample.dtype), sample) for factor in (signal, sigma))

    # The reverse process.

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample as it is. The method is there because other schedulers scale it."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The steps to run: so many, placed by `timestep_spacing`, or these `timesteps`, descending to 0."""
        times = chosen_timesteps(num_inference_steps, timesteps, 0, len(self) - 1)
        times = self._spaced(num_inference_steps) if times is None else times
        self._steps = dict(zip(times, self._reverse_steps(times), strict=True))
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, device=device)

    def _spaced(self, count: int) -> list[int]:
        """So many timesteps, as `DDPMScheduler` places them."""
        total, spacing = len(self), self.config.timestep_spacing
        if spacing == "linspace":
            times = np.linspace(0, total - 1, count).round()[::-1]
        elif spacing == "leading":
            times = np.arange(count)[::-1] * (total // count)
        else:
            times = (total - np.arange(count) * (total / count)).round() - 1
        return times.astype(int).tolist()

    def _reverse_steps(self, times: list[int]) -> list[ReverseStep]:
        """
        The numbers of the steps at these timesteps, as Python numbers, so that a step waits for no GPU. They are made
        in float32 as in diffusers: 1 - gamma / gamma' cancels, and float64 would differ from `DDPMScheduler`.
        """
        gamma = self.alphas_cumprod.cpu()[times]
        prev_gamma = torch.cat([gamma[1:], torch.ones(1)])
        alpha = gamma / prev_gamma
        small_variance = (1 - prev_gamma) / (1 - gamma) * (1 - alpha)
        columns = {
            "signal": gamma**0.5,
            "noise": (1 - gamma) ** 0.5,
            "prev_signal": prev_gamma**0.5,
            "prev_noise_power": 1 - prev_gamma,
            "clean_weight": prev_gamma**0.5 * (1 - alpha) / (1 - gamma),
            "sample_weight": alpha**0.5 * (1 - prev_gamma) / (1 - gamma),
            "small_spread": small_variance.clamp(min=1e-20) ** 0.5,
            "large_spread": (1 - alpha).clamp(min=1e-20) ** 0.5,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            ReverseStep(prev_timestep, **dict(zip(columns, row, strict=True)))
            for prev_timestep, row in zip([*times[1:], -1], rows, strict=True)
        ]

    def previous_timestep(self, timestep: int) -> int:
        """The timestep that a step leads to (before `set_timesteps`: of the training process); -1 after the last."""
        return self._numbers(timestep).prev_timestep

    def _numbers(self, timestep: int | torch.Tensor) -> ReverseStep:
        if self._steps is None:  # all steps, as in `DDPMScheduler`
            times = list(range(len(self) - 1, -1, -1))
            self._steps = dict(zip(times, self._reverse_steps(times), strict=True))
        if int(timestep) not in self._steps:
            raise ValueError(f"timestep={timestep}: expected one of `timesteps`, {sorted(self._steps, reverse=True)}")
        return self._steps[int(timestep)]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> CosineResidualSchedulerOutput | tuple:
        """
        One reverse step. It is computed in float32 or better, and the results have the sample's dtype. It waits for a
        GPU only if `timestep` itself is on one.

        Args:
            model_output: [B, C, H, W]; for "learned_range" [B, 2C, H, W], the variance's place in [-1, 1] last.
            timestep: One of `timesteps`.
            sample: [B, C, H, W], what is diffused, at that timestep.
            eta: None for an ancestral step (eq. 3 to 7). A number in [0, 1] for a step of DDIM (its eq. 12 and 16),
                which is deterministic at 0. Its noise is a share of beta~, whatever `variance_type` is.
            generator: One, or one for each image.
            return_dict: False for the tuple (prev_sample, pred_original_sample) instead of an output object.

        Raises:
            ValueError: for a timestep that is not run, `eta` out of range, or a shape that does not fit.
        """
        step = self._numbers(timestep)
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected None or a number in [0, 1]")
        self._check_output(model_output, sample)
        dtype, work = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        sample, model_output = sample.to(work), model_output.to(work)
        prediction, variance_place = model_output[:, : sample.shape[1]], model_output[:, sample.shape[1] :]

        # 1. The clean estimate and the noise that the prediction stands for: eq. 2 solved for them.
        if self.config.prediction_type == "epsilon":
            clean, noise = (sample - step.noise * prediction) / step.signal, prediction
        elif self.config.prediction_type == "sample":
            clean, noise = prediction, (sample - step.signal * prediction) / step.noise
        else:
            clean = step.signal * sample - step.noise * prediction
            noise = step.signal * prediction + step.noise * sample

        # 2. Clip the clean estimate, if asked to.
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        # 3. The mean of the previous sample and its spread: eq. 4, or eq. 12 and 16 of DDIM.
        if eta is None:
            spread = self._spread(step, variance_place)
            prev_sample = step.clean_weight * clean + step.sample_weight * sample
        else:
            spread = eta * step.small_spread
            prev_sample = step.prev_signal * clean + max(step.prev_noise_power - spread**2, 0.0) ** 0.5 * noise

        # 4. Noise (eq. 7), but not after the last step.
        if step.prev_timestep >= 0 and eta != 0:
            white = white_noise(sample.shape, generator=generator, device=sample.device, dtype=work)
            prev_sample = prev_sample + spread * white

        prev_sample, clean = prev_sample.to(dtype), clean.to(dtype)
        if not return_dict:
            return prev_sample, clean
        return CosineResidualSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)

    def _spread(self, step: ReverseStep, variance_place: torch.Tensor) -> float | torch.Tensor:
        """Standard deviation of an ancestral step: of eq. 5, of eq. 7, or between them in the logarithm (5.3)."""
        if self.config.variance_type == "fixed_small":
            return step.small_spread
        if self.config.variance_type == "fixed_large":
            return step.large_spread
        share = (variance_place + 1) / 2
        return (share * math.log(step.large_spread) + (1 - share) * math.log(step.small_spread)).exp()

    def _check_output(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        channels = sample.shape[1] * (2 if self.config.variance_type == "learned_range" else 1)
        expected = (len(sample), channels, *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}: expected {expected} for a sample of shape "
                f"{tuple(sample.shape)} and variance_type={self.config.variance_type!r}"
            )
