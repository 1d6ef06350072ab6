"""Super-resolution of photographs in one network call, with a dial between fidelity and detail."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pyrdiff.methods import sr
from pyrdiff.plugins import Method
from pyrdiff.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from pyrdiff.data import ImageLevels
    from pyrdiff.models import ShuffledSRModel
    from pyrdiff.pipelines import ResidualSRPipeline
    from pyrdiff.schedulers import CosineResidualScheduler
    from pyrdiff.training.loop import DeviceBatch
    from pyrdiff.training.losses import Draws

# What is drawn for a batch: mirrored or not, rows as columns or not, and by how much LPIPS sees it cut.
TURNS_AND_SHIFTS = tuple(product((False, True), (False, True), range(4), range(4)))


@dataclass(kw_only=True)
class OneCallSettings(TrainingSettings):
    """Flags of super-resolution in one call."""

    allow_enlarging: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    output_dir: str = "runs/photos"
    scale_factor: tuple[int, ...] = (4,)
    """Factors to enlarge by; the low-resolution images are made on the fly."""
    degradation: Literal["bicubic", "realistic", "both"] = "both"
    """How they are made: bicubic; or with blur, noise and JPEG, for inputs from outside; or a third of the batches so.
    The network is told how strong the damage is."""
    train_batch_size: int = 4
    """Images a step and process."""
    preset: Literal["tiny", "mini", "small"] = "mini"
    """Network: tiny 0.2M, mini 2.6M, small 14M parameters."""
    learning_rate: float = 5e-4
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    ema_max_decay: float = 0.999
    perceptual_weight: float = 0.5
    """Of LPIPS beside the mean absolute error, at the end of the dial where detail counts most."""
    perceptual_network: Literal["alex", "squeeze", "vgg"] = "alex"
    smooth_weight: float = 4.0
    """Of the mean absolute error where the truth is smooth: LPIPS forgives ringing there, the eye does not."""
    perceptual_file: str | None = None
    """File of that network's weights; downloaded by default."""
    validation_data_dir: str | None = None
    """Images that are not trained on, for the pictures and numbers of progress; by default training images."""
    lpips_network: Literal["alex", "squeeze", "vgg"] | None = None
    """Adds LPIPS to those numbers."""
    lpips_weights: str | None = None
    """File of that network's weights; downloaded by default."""

    def __post_init__(self):
        super().__post_init__()
        self._check("resolution", len(self.sizes) == 1, "one size")
        sr.check_factors(self)
        multiple = 8  # of the network's sides
        for name in ("patch_size",) if self.patch_size else ("resolution",):
            self._check(name, all(side % multiple == 0 for side in self.window), f"multiples of {multiple}")
        for name in ("perceptual_weight", "smooth_weight"):
            self._check(name, 0 <= getattr(self, name) < float("inf"), "a number from 0 up")
        if self.lpips_weights is not None:
            self._check("lpips_network", self.lpips_network is not None, "a network, for lpips_weights")


def build_model(settings: OneCallSettings, channels: int) -> "ShuffledSRModel":
    from pyrdiff.models import ShuffledSRModel

    height, width = settings.window
    return ShuffledSRModel.from_preset(
        settings.preset,
        image_channels=channels,
        scale_factors=settings.scale_factor,
        sample_size=height if height == width else (height, width),
        sees_sample=False,
    )


def build_scheduler(settings: OneCallSettings, images: "ImageLevels") -> "CosineResidualScheduler":
    """One step, from nothing to the residual."""
    from pyrdiff.schedulers import CosineResidualScheduler

    return CosineResidualScheduler(num_train_timesteps=1, prediction_type="sample")


def loss(
    network: "torch.nn.Module",
    scheduler: "CosineResidualScheduler",
    settings: OneCallSettings,
    batch: "DeviceBatch",
    draws: "Draws",
) -> "torch.Tensor":
    """
    Mean absolute error + detail * `perceptual_weight` * LPIPS, with `detail` drawn for each image and told to the
    network (loss-conditional training), so that one network is the best for every weight. The error counts for
    1 + `smooth_weight` where the original is smooth.
    """
    import torch

    mirror, transpose, top, left = draws.choice(TURNS_AND_SHIFTS)
    high = turned(batch.images, mirror, transpose)
    count = len(high)
    upsampled, restore = low_resolution(settings, high, draws)
    # A quarter of the images is at the end of the dial that is the default, an eighth at the other.
    detail = (1.6 * draws.uniform(count) - 0.2).clamp(0, 1)
    level = torch.ones(count, device=high.device)
    residual = network(upsampled, level, upsampled, detail, restore, return_dict=False)[0].float()
    images = scheduler.compose(residual, upsampled)
    weight = 1 + settings.smooth_weight * smoothness(high)
    total = (weight * (images - high).abs()).mean()
    if settings.perceptual_weight == 0:
        return total
    # The convolutions that measure have strides, 4 in AlexNet. On a grid that never moves against the network's own
    # squares of 4 x 4 they would miss some errors always.
    cut = (slice(None), slice(None), slice(top, None), slice(left, None))
    distances = perceptual(settings, images[cut], high[cut])
    return total + settings.perceptual_weight * (detail * distances).mean()


def smoothness(images: "torch.Tensor") -> "torch.Tensor":
    """
    Where images [B, C, H, W] in [-1, 1] are smooth: exp(-20 times the standard deviation of 7 x 7 pixels of gray),
    [B, 1, H, W], 1 where they are constant.
    """
    from torch.nn.functional import avg_pool2d

    def around(values: "torch.Tensor") -> "torch.Tensor":
        return avg_pool2d(values, 7, stride=1, padding=3, count_include_pad=False)

    gray = images.mean(1, keepdim=True)
    variance = around(gray.square()) - around(gray).square()
    return (-20 * variance.clamp(min=0).sqrt()).exp()


def turned(images: "torch.Tensor", mirror: bool, transpose: bool) -> "torch.Tensor":
    """The batch mirrored top to bottom, and, of squares, with rows as columns."""
    images = images.flip(-2) if mirror else images
    return images.mT if transpose and images.shape[-1] == images.shape[-2] else images


def low_resolution(
    settings: OneCallSettings, high: "torch.Tensor", draws: "Draws"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """What the network sees of images [B, C, H, W] in [-1, 1], enlarged; and how strong the damage to it is, [B]."""
    from pyrdiff.data import degrade
    from pyrdiff.pipelines import ResidualSRPipeline

    factor, kind = draws.choice(settings.scale_factor), settings.degradation
    if kind == "both":
        kind = draws.choice(("bicubic", "bicubic", "realistic"))
    strength = draws.uniform(len(high)) * (kind == "realistic")
    low = degrade(high, factor, kind, draws, strength)
    return ResidualSRPipeline.upsample(low, high.shape[-2:]), strength


def perceptual(settings: OneCallSettings, images: "torch.Tensor", originals: "torch.Tensor") -> "torch.Tensor":
    """LPIPS of each pair [B, C, H, W] in [-1, 1], with gradients; [B]. In bfloat16 where the network runs in it."""
    import torch

    from pyrdiff.metrics import LPIPS

    measure = LPIPS.open(settings.perceptual_network, settings.perceptual_file, images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
        return measure(images, originals)


def build_pipeline(
    settings: OneCallSettings,
    network: "torch.nn.Module",
    scheduler: "CosineResidualScheduler",
    images: "ImageLevels",
) -> "ResidualSRPipeline":
    from pyrdiff.pipelines import ResidualSRPipeline

    if settings.perceptual_weight:  # so that what is missing is found before the first step
        some = sr.validation_images(settings, images)[:1]
        try:
            perceptual(settings, some, some)
        except (ImportError, ValueError) as error:
            raise ValueError(f"perceptual_network={settings.perceptual_network!r}: {error}") from error
    if settings.save_images_steps:
        some = sr.validation_images(settings, images)[:1] / 2 + 0.5
        sr.similarity(settings, some, some)
    return ResidualSRPipeline(network, scheduler, plans={"default": {"num_inference_steps": 1}})


def preview(
    settings: OneCallSettings, pipeline: "ResidualSRPipeline", images: "ImageLevels", path: Path
) -> dict[str, float]:
    """As of SR4, of inputs that were only made smaller."""
    return sr.preview(replace(settings, degradation="bicubic"), pipeline, images, path)


METHOD = Method(
    name="sr_one_call",
    summary="Super-resolution in one network call: for photographs, with a dial between fidelity and detail.",
    settings=OneCallSettings,
    model=build_model,
    scheduler=build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=preview,
    classes=sr.classes,
    limits=sr.METHOD.limits,
)
