"""SR4 (paper S) and SR3: super-resolution by diffusion of what an enlarged image lacks."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pyrdiff.plugins import Method
from pyrdiff.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from pyrdiff.data import ImageLevels
    from pyrdiff.models import ResidualSRUNet2DModel
    from pyrdiff.pipelines import ResidualSRPipeline
    from pyrdiff.schedulers import CosineResidualScheduler
    from pyrdiff.training.loop import DeviceBatch
    from pyrdiff.training.losses import Draws

# SR3's public code goes linearly from 1e-6 to 1e-2 in 2000 steps; with other numbers of steps, to the same noise.
LINEAR_BETAS, LINEAR_STEPS = (1e-6, 1e-2), 2000


@dataclass(kw_only=True)
class SuperResolutionSettings(TrainingSettings):
    """
    Flags of SR4 and SR3. SR3: low_res_injection none, attention 16x16, beta_schedule linear, prediction_target image,
    ddpm_num_steps 2000.
    """

    allow_enlarging: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    output_dir: str = "runs/sr"
    scale_factor: tuple[int, ...] = (4,)
    """Factors to enlarge by; the low-resolution images are made on the fly."""
    degradation: Literal["bicubic", "realistic"] = "bicubic"
    """How they are made: bicubic; or with blur, noise and JPEG, for inputs from outside."""
    train_batch_size: int = 16
    """Images a step and process."""
    preset: Literal["tiny", "mini", "small", "paper"] = "small"
    """Network: tiny 1.7M, mini 3.6M, small 14M, paper 96M parameters."""
    block_out_channels: tuple[int, ...] | None = None
    """Channels of each level of the UNet, instead of the preset's."""
    low_res_injection: Literal["conv_stack", "direct", "bicubic", "large_kernel", "none"] = "conv_stack"
    """How the low-resolution image reaches the middle layers."""
    attention: Literal["middle", "16x16"] = "middle"
    """Where there is self-attention: at the lowest level, or at the one above."""
    input_fusion: Literal["concat", "attention"] = "concat"
    """How the enlarged input joins the noisy image."""
    ddpm_num_steps: int = 500
    """Steps of the noise process."""
    beta_schedule: Literal["cosine", "linear"] = "cosine"
    prediction_target: Literal["residual", "image"] = "residual"
    """What is diffused: what the enlarged input lacks, or the image."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts of it."""
    residual_scale: float | None = None
    """Factor on the residual; by default 1 / its standard deviation in the training images. 1 is the paper's."""
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """Of the noise of a step; "learned_range" adds the variational bound to the loss."""
    vlb_weight: float = 0.001
    """Weight of the variational bound (lambda of eq. 8; the bound is the sum over all steps)."""
    loss_type: Literal["l2", "l1"] = "l2"
    shared_noise: bool = False
    """One noise for the whole batch, as the paper's baseline has it."""
    lr_warmup_steps: int = 500
    validation_data_dir: str | None = None
    """Images that are not trained on, for the pictures and numbers of progress; by default training images."""
    lpips_network: Literal["alex", "squeeze", "vgg"] | None = None
    """Adds LPIPS to those numbers."""
    lpips_weights: str | None = None
    """File of that network's weights; downloaded by default."""

    def __post_init__(self):
        super().__post_init__()
        self._check("resolution", len(self.sizes) == 1, "one size")
        check_factors(self)
        self._check("ddpm_num_steps", self.ddpm_num_steps >= 2, "2 or more")
        scale = self.residual_scale
        self._check("residual_scale", scale is None or 0 < scale < float("inf"), "a number above 0")
        target = self.prediction_target
        self._check("residual_scale", target == "residual" or scale in (None, 1), "1 with prediction_target='image'")
        self._check("vlb_weight", 0 < self.vlb_weight < float("inf"), "a number above 0")
        learned, kind = self.variance_type == "learned_range", self.prediction_type
        self._check("prediction_type", kind == "epsilon" or not learned, "'epsilon' with variance_type='learned_range'")
        if self.lpips_weights is not None:
            self._check("lpips_network", self.lpips_network is not None, "a network, for lpips_weights")


def check_factors(settings: TrainingSettings) -> None:
    """Refuses a `scale_factor` that does not divide the `window` that is trained on."""
    factors = settings.scale_factor
    good = len(factors) > 0 and len(set(factors)) == len(factors) and min(factors, default=0) >= 2
    settings._check("scale_factor", good, "different whole numbers from 2 up")
    for factor in factors:
        fits = all(side % factor == 0 for side in settings.window)
        settings._check(
            "scale_factor", fits, f"numbers that divide both sides of what is trained on, {settings.window}"
        )


def build_model(settings: SuperResolutionSettings, channels: int) -> "ResidualSRUNet2DModel":
    from pyrdiff.models import ResidualSRUNet2DModel

    overrides = {}
    if settings.block_out_channels is not None:
        _check_channels(settings.block_out_channels, ResidualSRUNet2DModel.presets[settings.preset])
        overrides["block_out_channels"] = settings.block_out_channels
    height, width = settings.window
    network = ResidualSRUNet2DModel.from_preset(
        settings.preset,
        image_channels=channels,
        out_channels=channels * (2 if settings.variance_type == "learned_range" else 1),
        low_res_injection=None if settings.low_res_injection == "none" else settings.low_res_injection,
        attention=settings.attention,
        input_fusion=settings.input_fusion,
        scale_factors=settings.scale_factor,
        sample_size=height if height == width else (height, width),
        **overrides,
    )
    multiple = 2 ** (len(network.config.block_out_channels) - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"resolution={settings.resolution}, patch_size={settings.patch_size}: {height}x{width} is trained on, "
            f"expected multiples of {multiple} for preset={settings.preset!r}"
        )
    return network


def _check_channels(channels: tuple[int, ...], preset: dict) -> None:
    """Attention has heads of 32 channels, and norms have the preset's groups."""
    groups = preset.get("norm_num_groups", 32)
    if len(channels) < 2 or any(width < 32 or width % groups or width % 32 for width in channels):
        raise ValueError(f"block_out_channels={channels}: expected 2 levels or more, all multiples of 32")


def build_scheduler(settings: SuperResolutionSettings, images: "ImageLevels") -> "CosineResidualScheduler":
    from pyrdiff.schedulers import CosineResidualScheduler

    betas = [beta * LINEAR_STEPS / settings.ddpm_num_steps for beta in LINEAR_BETAS]
    scale = 1.0
    if settings.prediction_target == "residual":
        scale = settings.residual_scale or fit_residual_scale(settings, images)
    return CosineResidualScheduler(
        num_train_timesteps=settings.ddpm_num_steps,
        beta_schedule=settings.beta_schedule,
        prediction_target=settings.prediction_target,
        prediction_type=settings.prediction_type,
        variance_type=settings.variance_type,
        residual_scale=scale,
        beta_start=betas[0],
        beta_end=min(betas[1], 0.999),
    )


def fit_residual_scale(settings: SuperResolutionSettings, images: "ImageLevels", count: int = 4096) -> float:
    """1 / standard deviation of the residual, from up to `count` images spread over all, to 4 digits."""
    import torch

    from pyrdiff.methods.images import spread_over
    from pyrdiff.schedulers import CosineResidualScheduler
    from pyrdiff.training.losses import Draws

    def residuals():
        for number, high in enumerate(spread_over(images, count, batch_size=16)):
            for factor in settings.scale_factor:
                high = high[..., : high.shape[-2] // factor * factor, : high.shape[-1] // factor * factor]
                yield high - pair(settings, high, factor, Draws(settings.seed, number, device=torch.device("cpu")))

    return float(f"{CosineResidualScheduler.fit_residual_scale(residuals()):.4g}")


def pair(settings: SuperResolutionSettings, high: "torch.Tensor", factor: int, draws: "Draws") -> "torch.Tensor":
    """What the network sees of images [B, C, H, W] in [-1, 1]: they are made smaller by the factor, then enlarged."""
    from pyrdiff.data import degrade
    from pyrdiff.pipelines import ResidualSRPipeline

    return ResidualSRPipeline.upsample(degrade(high, factor, settings.degradation, draws), high.shape[-2:])


def loss(
    network: "torch.nn.Module",
    scheduler: "CosineResidualScheduler",
    settings: SuperResolutionSettings,
    batch: "DeviceBatch",
    draws: "Draws",
) -> "torch.Tensor":
    """Eq. 6: the error of the noise at a noise level between two steps; with a learned variance also eq. 8."""
    import torch
    import torch.nn.functional as F

    from pyrdiff.training.losses import variational_bound

    high, count = batch.images, len(batch.images)
    upsampled = pair(settings, high, draws.choice(settings.scale_factor), draws)
    clean = scheduler.residual(high, upsampled)
    noise = (draws.shared_normal if settings.shared_noise else draws.normal)(*high.shape)
    timesteps = draws.integers(len(scheduler), count)
    level = scheduler.noise_level(timesteps)
    learned = settings.variance_type == "learned_range"
    if not learned:  # the bound is of whole steps
        level = torch.lerp(level, scheduler.noise_level(timesteps - 1), draws.uniform(count))
    noisy = scheduler.add_noise(clean, noise, noise_level=level)

    output = network(noisy, level, upsampled, return_dict=False)[0].float()
    prediction = output[:, : high.shape[1]]
    target = {"epsilon": noise, "sample": clean}.get(settings.prediction_type)
    if target is None:
        target = scheduler.get_velocity(clean, noise, noise_level=level)
    simple = (F.l1_loss if settings.loss_type == "l1" else F.mse_loss)(prediction, target)
    if not learned:
        return simple
    half_bin = scheduler.config.residual_scale / 255
    place = output[:, high.shape[1] :]
    bound = variational_bound(scheduler, clean, noisy, prediction.detach(), place, timesteps, half_bin)
    return simple + settings.vlb_weight * len(scheduler) * bound.mean()


def build_pipeline(
    settings: SuperResolutionSettings,
    network: "torch.nn.Module",
    scheduler: "CosineResidualScheduler",
    images: "ImageLevels",
) -> "ResidualSRPipeline":
    from pyrdiff.pipelines import ResidualSRPipeline

    if settings.save_images_steps:  # so that what is missing for the pictures is found now, not at the first picture
        some = validation_images(settings, images)[:1] / 2 + 0.5
        similarity(settings, some, some)
    return ResidualSRPipeline(network, scheduler, plans=plans(settings))


def plans(settings: SuperResolutionSettings) -> dict[str, dict]:
    """
    What a saved pipeline offers as `plan=`: 20 ancestral steps, and all of them. For a residual and a cosine schedule,
    on which they were measured, also 8 and 4 calls that lose nothing against those (benchmarks/README.md).
    """
    steps = settings.ddpm_num_steps
    offered = {"default": {"num_inference_steps": min(20, steps)}, "paper": {"num_inference_steps": steps}}
    if settings.beta_schedule == "cosine" and settings.prediction_target == "residual" and steps >= 50:
        solver = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}]
        # Most of the calls at high noise, as benchmarks/few_steps.py found: 0.96 ((n - k) / n) ** power of the process.
        for name, calls, power in (("balanced", 8, 0.35), ("fast", 4, 0.5)):
            times = [round(0.96 * steps * ((calls - k) / calls) ** power) - 1 for k in range(calls)]
            offered[name] = {"spacing": times, "scheduler": solver}
    return offered


def preview(
    settings: SuperResolutionSettings, pipeline: "ResidualSRPipeline", images: "ImageLevels", path: Path
) -> dict[str, float]:
    """Rows of inputs, inputs enlarged (bicubic), outputs, originals; how near outputs and bicubic are to originals."""
    import torch
    from PIL import Image

    from pyrdiff.data import degrade
    from pyrdiff.methods.images import as_pictures, generators
    from pyrdiff.metrics import consistency
    from pyrdiff.training.losses import Draws
    from pyrdiff.training.previews import save_grid

    high = validation_images(settings, images)
    factor = max(settings.scale_factor)
    low = degrade(high, factor, settings.degradation, Draws(settings.seed, device=torch.device("cpu"))) / 2 + 0.5
    high = high / 2 + 0.5
    pipeline.set_progress_bar_config(disable=True)
    seeded = generators(settings.seed, len(high))
    output = pipeline(low, scale_factor=factor, generator=seeded, output_type="pt").images.cpu()
    pipeline.set_progress_bar_config(disable=False)
    bicubic = pipeline.upsample(low, high.shape[-2:]).clamp(0, 1)

    size = (high.shape[-1], high.shape[-2])
    rows = [[picture.resize(size, Image.Resampling.NEAREST) for picture in as_pictures(low)]]
    rows += [as_pictures(row) for row in (bicubic, output, high)]
    save_grid(rows, path)

    values = {}
    for name, enlarged in (("", output), ("bicubic_", bicubic)):
        values |= {name + measure: value for measure, value in similarity(settings, enlarged, high).items()}
        values[f"{name}consistency"] = consistency(enlarged, low, data_range=(0, 1)).value
    return values


def similarity(
    settings: SuperResolutionSettings, images: "torch.Tensor", originals: "torch.Tensor"
) -> dict[str, float]:
    """How near images [B, C, H, W] in [0, 1] are to the originals; SSIM where they are as large as its window."""
    from pyrdiff.metrics import lpips, psnr, ssim

    values = {"psnr": psnr(images, originals, data_range=(0, 1)).value}
    if min(images.shape[-2:]) >= 11:
        values["ssim"] = ssim(images, originals, data_range=(0, 1)).value
    if settings.lpips_network is not None:
        network = {"network": settings.lpips_network, "weights": settings.lpips_weights}
        try:
            values["lpips"] = lpips(images, originals, data_range=(0, 1), **network).value
        except (ImportError, ValueError) as error:
            raise ValueError(f"lpips_network={settings.lpips_network!r}: {error}") from error
    return values


def validation_images(settings: SuperResolutionSettings, images: "ImageLevels") -> "torch.Tensor":
    """
    `eval_batch_size` images [B, C, H, W] in [-1, 1] of the validation folder, if there is one. Of a training on windows
    their middles, as large as those: whole photographs would take longer than the training between two pictures.
    """
    from pyrdiff.methods.images import as_tensor

    top, count = images.arrays[-1], settings.eval_batch_size
    if settings.validation_data_dir is not None:
        how = (settings.image_channels, tuple(settings.background), settings.on_bad_image)
        top = _validation_array(settings.validation_data_dir, settings.sizes[0], count, *how)
    factor = max(settings.scale_factor)
    height, width = (
        min(side, of_image) // factor * factor for side, of_image in zip(settings.window, top.shape[1:3], strict=True)
    )
    above, left = (top.shape[1] - height) // 2, (top.shape[2] - width) // 2
    return as_tensor(top[:count, above : above + height, left : left + width])


@lru_cache(maxsize=1)
def _validation_array(
    folder: str, size: tuple[int, int], count: int, channels: int, background: tuple, on_bad_image: str
):
    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.data.sources import Some

    source = open_source(folder, leave_out_runs=True)
    some = Some(source, range(0, len(source), max(1, len(source) // count))[:count])
    return ImageLevels.build(some, [size], channels, background, on_bad_image, allow_enlarging=False).arrays[0]


def classes() -> tuple[type, ...]:
    from pyrdiff.models import ResidualSRUNet2DModel, ShuffledSRModel
    from pyrdiff.pipelines import ResidualSRPipeline
    from pyrdiff.schedulers import CosineResidualScheduler

    return CosineResidualScheduler, ResidualSRPipeline, ResidualSRUNet2DModel, ShuffledSRModel


METHOD = Method(
    name="sr",
    summary="SR4 and SR3: train super-resolution on a folder, by diffusion of what an enlarged image lacks.",
    settings=SuperResolutionSettings,
    model=build_model,
    scheduler=build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=preview,
    classes=classes,
    limits=(
        "Details that it adds are plausible, not true: never use it to read what a picture does not show. "
        "Inputs made smaller in another way than in training, or of another kind, come out worse."
    ),
)
