"""Distillation: a trained model that draws or enlarges in many calls learns to jump, in one call or two."""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import ClassVar, Literal

from pyrdiff.plugins import Method
from pyrdiff.training.settings import TrainingSettings

LPIPS_SIDE = 64  # pixels, at least, of the images that LPIPS sees


@dataclass(kw_only=True)
class DistillSettings(TrainingSettings):
    """
    Flags of distillation. What the model says of the images (resolution, channels, classes, factors) need not be given.
    """

    start_name: ClassVar[str] = "distilled from"
    allow_enlarging: ClassVar[bool] = False

    model: str
    """The model to distil: folder or repository of a pyramid or of a super-resolution model, or a bundled model."""
    output_dir: str = "runs/distilled"
    resolution: tuple[str, ...] = ()
    """That of the model."""
    image_channels: Literal[1, 3] | None = None
    """Those of the model."""
    learning_rate: float = 3e-4
    jump_from: float | None = None
    """Share of the noise process at which a level begins: by default 0.285 in a pyramid, 0.5 where images are enlarged.
    More noise leaves more to be drawn anew."""
    second_jump_from: float | None = None
    """The same of the second call of plan "two"; by default 0.42 of the first."""
    lpips_weight: float = 0.5
    """Of LPIPS beside the mean absolute difference; 0 for none."""
    lpips_network: Literal["alex", "squeeze", "vgg"] = "alex"
    """Feature network of LPIPS."""
    lpips_weights: str | None = None
    """File of that network's weights; downloaded by default. What is saved does not need it."""
    degradation: Literal["bicubic", "realistic"] = "bicubic"
    """How images are made smaller, for a model that enlarges: as it was trained."""
    validation_data_dir: str | None = None
    """Images that are not trained on, for the pictures and numbers of a model that enlarges."""

    def __post_init__(self):
        self._check("init_from", self.init_from in (None, self.model), "none; a distillation begins with its model")
        self._check("lora_rank", self.lora_rank is None, "none; all weights learn to jump")
        self.init_from = self.model
        teacher = teacher_of(self.model)
        self.class_labels = bool(teacher.unet.config.get("class_names"))
        self.scale_factor = tuple(teacher.unet.config.get("scale_factors") or ())
        own = tuple(kind_of(teacher).resolution(teacher))
        channels = teacher.unet.config.get("image_channels", teacher.unet.config.in_channels)
        for name, value in (("resolution", own), ("image_channels", channels)):
            given = getattr(self, name)
            given = tuple(given) if isinstance(given, list) else given
            self._check(name, given in ((), None, value), f"that of the model, {value}, or nothing")
            setattr(self, name, value)
        super().__post_init__()
        for name in ("jump_from", "second_jump_from"):
            share = getattr(self, name)
            self._check(name, share is None or 0 < share < 1, "a number in (0, 1)")
        self._check("lpips_weight", 0 <= self.lpips_weight < float("inf"), "0 or more")
        kind_of(teacher).check(self, teacher)
        times = self.jumps
        self._check("second_jump_from", times[0] > times[1] > 0, f"a share of less noise than jump_from, {times[0]}")

    @property
    def jumps(self) -> tuple[int, int]:
        """The times of the calls: of the first, and of the second of plan "two"."""
        teacher = teacher_of(self.model)
        first = kind_of(teacher).JUMP_FROM if self.jump_from is None else self.jump_from
        second = 0.42 * first if self.second_jump_from is None else self.second_jump_from
        steps = teacher.scheduler.config.num_train_timesteps
        return round(first * steps), round(second * steps)


@lru_cache(maxsize=1)
def teacher_of(place: str):
    """
    The pipeline to distil. It is read only.

    Raises:
        ValueError: for one of another kind, or one that is distilled already.
    """
    from pyrdiff import hub

    try:
        teacher = hub.load(place)
        kind_of(teacher)
    except ValueError as error:
        raise ValueError(f"model={place!r}: {error}") from error
    jumps = teacher.unet.config.get("jumps")
    if jumps:
        raise ValueError(
            f"model={place!r}: it is distilled already, to calls at {list(jumps)}; expected the model that it was "
            "distilled from"
        )
    return teacher


def kind_of(teacher) -> ModuleType:
    """What is particular to pipelines of this kind: one module each, with the same functions."""
    from pyrdiff.methods import distill_pyramid, distill_residual_sr

    kinds = {"PyramidalPipeline": distill_pyramid, "ResidualSRPipeline": distill_residual_sr}
    name = type(teacher).__name__
    if name not in kinds:
        raise ValueError(f"a {name}; expected one of {sorted(kinds)}")
    return kinds[name]


def build_model(settings: DistillSettings, channels: int, class_names: tuple[str, ...] | None = None):
    """As `adopt`, with random weights."""
    return adopt(settings, channels, None, {}, class_names)


def adopt(
    settings: DistillSettings,
    channels: int,
    class_name: str | None,
    config: dict,
    class_names: tuple[str, ...] | None = None,
):
    """The teacher's network, which says at what times it will be called."""
    teacher = teacher_of(settings.model)
    its_names = teacher.unet.config.get("class_names")
    if class_names is not None and list(class_names) != list(its_names):
        raise ValueError(f"a network with class_names={list(its_names)}; expected those of the images, {class_names}")
    return type(teacher.unet).from_config({**teacher.unet.config, "jumps": settings.jumps})


def build_scheduler(settings: DistillSettings, images):
    import copy

    return copy.deepcopy(teacher_of(settings.model).scheduler)


def loss(network, scheduler, settings: DistillSettings, batch, draws):
    return kind_of(teacher_of(settings.model)).loss(network, scheduler, settings, batch, draws)


def build_pipeline(settings: DistillSettings, network, scheduler, images):
    if settings.lpips_weight:
        perceptual(settings.lpips_network, settings.lpips_weights, "cpu")  # what is missing for it is found now
    teacher = teacher_of(settings.model)
    return kind_of(teacher).pipeline(settings, teacher, network, scheduler)


def preview(settings: DistillSettings, pipeline, images, path) -> dict[str, float]:
    return kind_of(teacher_of(settings.model)).preview(settings, pipeline, images, path)


@lru_cache(maxsize=2)
def perceptual(network: str, weights: str | None, device: str):
    """LPIPS for a loss; see `pyrdiff.metrics.LPIPS`."""
    from pyrdiff.metrics import LPIPS

    try:
        return LPIPS.open(network, weights, device)
    except (ImportError, ValueError) as error:
        raise ValueError(f"lpips_network={network!r}: {error}; or lpips_weight=0") from error


def difference(settings: DistillSettings, estimate, images):
    """
    How far clean estimates are from the images, both [B, C, H, W] in [-1, 1]: their mean absolute difference and LPIPS.

    LPIPS sees them at twice their size and at 64 pixels or more. Its first layer takes every fourth pixel: at their own
    size it passes over a grain, and even draws one.
    """
    import torch.nn.functional as F

    found = F.l1_loss(estimate, images)
    if settings.lpips_weight == 0:
        return found
    factor = max(2, LPIPS_SIDE / min(images.shape[-2:]))
    pair = (F.interpolate(one, scale_factor=factor, mode="bilinear") for one in (estimate.clamp(-1.2, 1.2), images))
    distance = perceptual(settings.lpips_network, settings.lpips_weights, str(images.device))
    return found + settings.lpips_weight * distance(*pair).mean()


def classes() -> tuple[type, ...]:
    from pyrdiff.methods import pddpm, sr

    return *pddpm.classes(), *sr.classes()


METHOD = Method(
    name="distill",
    summary="Distillation: a pyramid or a super-resolution model learns to jump, in one network call or two.",
    settings=DistillSettings,
    model=build_model,
    adopt=adopt,
    scheduler=build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=preview,
    classes=classes,
    limits=(
        "It knows the calls of its plans and no others. Few calls draw softer details than many, and what its model "
        "could not do, it cannot do either."
    ),
)
