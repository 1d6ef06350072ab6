"""Pyramidal DDPM (paper P): one coordinate-conditioned UNet for all resolutions, sampled from coarse to fine."""

import inspect
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from pyrdiff.plugins import Method
from pyrdiff.training.settings import TrainingSettings

WINDOW = 0.35  # of the noise process: what is trained above the lowest resolution
START = 0.55  # of the noise process, the start in the data's colours at 16x16
FAINT = 11.7  # alpha_bar times pixels, at START of the linear noise process at 16x16
MARGIN = 0.02  # of the noise process: so far beyond the noise window is trained, too


@dataclass(kw_only=True)
class PyramidalSettings(TrainingSettings):
    """Flags of Pyramidal DDPM."""

    output_dir: str = "runs/pddpm"
    resolution: tuple[str, ...] = ("16", "32", "64")
    """Resolutions, low to high, each a number or HEIGHTxWIDTH. One step trains one of them."""
    patch_size: int | None = None
    """Train on windows of this size, with their coordinates, instead of whole images."""
    preset: Literal["tiny", "mini", "small", "paper"] = "small"
    """Network: tiny 1.8M, mini 3.8M, small 15M, paper 20M parameters."""
    block_out_channels: tuple[int, ...] | None = None
    """Channels of each level of the UNet, instead of the preset's."""
    use_coordinates: bool = True
    """False is the paper's ablation (fig. 6)."""
    ddpm_num_steps: int = 1000
    """Steps of the noise process."""
    ddpm_beta_schedule: Literal["linear", "squaredcos_cap_v2", "scaled_linear"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    snr_gamma: float | None = None
    """Min-SNR weighting with this gamma (5.0 is usual)."""
    noise_window: float = WINDOW
    """Share of the noise process that is trained above the lowest resolution, where sampling starts from an enlarged
    image and needs no more. 1.0 (the paper) trains all of it: such a network also samples at full size alone."""
    level_share: tuple[int, ...] | None = None
    """Steps a round at each resolution, low to high. By default larger ones, of which a step shows fewer images, come
    more often (1 2 6 for 16 32 64); 1 1 1 is the paper's."""

    class_labels: bool = False
    """Train the images' classes: the sub-folders of the folder of images (each image in one) or the column label of its
    metadata.csv or metadata.jsonl, the array y_train or labels of an .npz, or the column of classes of a data set.
    Their names are in the network's config."""
    label_dropout: float = 0.1
    """Share of the images whose class is not told, for guidance and for images of any class."""
    held_out_dir: str | None = None
    """Images that are not trained on (folder, .npz or .npy array), to choose the finished model's own plans by."""
    tune_minutes: float | None = None
    """For that search, after the training: a few."""
    features: Literal["squeezenet", "alexnet", "inception", "dinov2", "classifier"] = "inception"
    """Feature network of the distances by which plans are chosen."""
    feature_weights: str | None = None
    """Its file; by default downloaded."""

    def __post_init__(self):
        super().__post_init__()
        for low, high in zip(self.sizes, self.sizes[1:], strict=False):
            larger = high[0] > low[0] and high[1] > low[1]
            self._check("resolution", larger, "each to be larger than the one before")
        self._check("noise_window", 0 < self.noise_window <= 1, "a number in (0, 1]")
        shares = self.level_share
        good = shares is None or (len(shares) == len(self.sizes) and min(shares) >= 1)
        self._check("level_share", good, f"a whole number from 1 up for each of the {len(self.sizes)} resolutions")
        self._check("ddpm_num_steps", self.ddpm_num_steps >= 100, "100 or more, the steps that sampling takes")
        self._above_zero("tune_minutes")
        both = (self.tune_minutes is None) == (self.held_out_dir is None)
        self._check("tune_minutes", both, "held_out_dir beside it, with images that are not trained on, or neither")
        adapts = self.lora_rank is not None
        self._check("tune_minutes", not (adapts and self.tune_minutes), "none with lora_rank: plans are the base's")
        self._check("label_dropout", 0 < self.label_dropout < 1, "a number in (0, 1)")
        self._check("snr_gamma", self.snr_gamma is None or self.snr_gamma > 0, "a number above 0")


def build_model(settings: PyramidalSettings, channels: int, class_names: tuple[str, ...] | None = None):
    from pyrdiff.models import CoordinateUNet2DModel
    from pyrdiff.models.unet_coordinate import PRESETS

    overrides = {} if settings.block_out_channels is None else {"block_out_channels": settings.block_out_channels}
    if overrides:
        _check_channels(settings.block_out_channels, PRESETS[settings.preset])
    network = CoordinateUNet2DModel.from_preset(
        settings.preset, image_channels=channels, class_names=class_names, **_of_the_data(settings), **overrides
    )
    _check_sizes(settings, network, f"preset={settings.preset!r}")
    return network


def adopt(
    settings: PyramidalSettings,
    channels: int,
    class_name: str | None,
    config: dict,
    class_names: tuple[str, ...] | None = None,
):
    """
    The network that begins with the weights of a `UNet2DModel` or of one of ours: its architecture, with the channels
    for coordinates, the classes, and what the settings say of the data.
    """
    from diffusers import UNet2DModel

    from pyrdiff.models import CoordinateUNet2DModel

    if class_name not in (None, UNet2DModel.__name__, CoordinateUNet2DModel.__name__):
        raise ValueError(f"a {class_name}; expected a UNet2DModel or a CoordinateUNet2DModel")
    its_channels = config.get("image_channels", config.get("in_channels"))
    if its_channels != channels:
        raise ValueError(f"a network for images of {its_channels} channels; expected image_channels={its_channels}")
    if config.get("out_channels") != channels:
        raise ValueError(f"it predicts {config.get('out_channels')} channels of {channels}; expected as many")
    _check_classes(config, class_names)
    if settings.block_out_channels not in (None, tuple(config["block_out_channels"])):
        raise ValueError(f"block_out_channels={tuple(config['block_out_channels'])}; expected none beside it, or these")
    own = inspect.signature(CoordinateUNet2DModel.__init__).parameters
    taken = {name: config[name] for name in own if name in config}
    for name in ("in_channels", "sample_size", "num_class_embeds", "jumps"):
        taken.pop(name, None)
    given = {"image_channels": channels, "class_names": class_names, **_of_the_data(settings)}
    network = CoordinateUNet2DModel(**{**taken, **given})
    _check_sizes(settings, network, f"init_from={settings.init_from!r}")
    return network


def _check_classes(config: dict, class_names: tuple[str, ...] | None) -> None:
    """Refuses a network with other classes than the run's; one without classes may learn any."""
    if not config.get("num_class_embeds") and not config.get("class_embed_type"):
        return
    if class_names is None:
        raise ValueError("a network that takes class labels; expected one without, or class_labels=True")
    its_names = config.get("class_names")
    if its_names not in (class_names, list(class_names)):
        raise ValueError(f"a network with class_names={its_names}; expected those of the images, {list(class_names)}")


def _of_the_data(settings: PyramidalSettings) -> dict:
    """Settings of the network that do not shape its weights, but for the channels of coordinates."""
    return {
        "use_coordinates": settings.use_coordinates,
        "resolutions": tuple(size[0] if size[0] == size[1] else size for size in settings.sizes),
        "noise_window": settings.noise_window if len(settings.sizes) > 1 else 1.0,
    }


def _check_sizes(settings: PyramidalSettings, network, why: str) -> None:
    multiple = 2 ** (len(network.config.block_out_channels) - 1)
    seen = settings.sizes
    if settings.patch_size is not None:
        seen = [(min(h, settings.patch_size), min(w, settings.patch_size)) for h, w in seen]
    for height, width in seen:
        if height % multiple or width % multiple:
            raise ValueError(
                f"resolution {height}x{width}: expected sides that are multiples of {multiple}, since this network "
                f"halves them {len(network.config.block_out_channels) - 1} times ({why})"
            )


def _check_channels(channels: tuple[int, ...], preset: dict) -> None:
    """Refuses channels that the preset's blocks, norms and attention heads cannot be made of."""
    levels, groups, head = (
        len(preset["down_block_types"]),
        preset.get("norm_num_groups", 32),
        preset["attention_head_dim"],
    )
    if len(channels) != levels:
        raise ValueError(f"block_out_channels={channels}: expected {levels} numbers for this preset")
    attending = [n for n, block in zip(channels, preset["down_block_types"], strict=True) if "Attn" in block]
    if any(n < 1 or n % groups for n in channels) or any(n % head for n in [*attending, channels[-1]]):
        raise ValueError(
            f"block_out_channels={channels}: expected multiples of {groups}, and of {head} where there is attention "
            f"(the last {len(attending)})"
        )


def build_scheduler(settings: PyramidalSettings, images):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=settings.ddpm_num_steps,
        beta_schedule=settings.ddpm_beta_schedule,
        prediction_type=settings.prediction_type,
    )


def loss(network, scheduler, settings: PyramidalSettings, batch, draws):
    """
    Eq. 8: the noise prediction error at one resolution, the network being told where each pixel lies; above the lowest
    resolution at times within the noise window.
    """
    from pyrdiff.models import CoordinateUNet2DModel
    from pyrdiff.parts.wrappers import plain
    from pyrdiff.training.losses import noise_prediction_loss

    coordinates = None
    if batch.boxes is not None and settings.use_coordinates:
        height, width = batch.images.shape[-2:]
        coordinates = CoordinateUNet2DModel.coordinate_grid(height, width, batch.boxes, device=batch.images.device)

    told = {}
    if batch.labels is not None:
        untold = draws.uniform(len(batch.labels)) < settings.label_dropout
        told["class_labels"] = batch.labels.masked_fill(untold, plain(network).config.num_class_embeds - 1)

    def predict(noisy, timesteps):
        return network(noisy, timesteps, coordinates=coordinates, **told, return_dict=False)[0]

    steps = scheduler.config.num_train_timesteps
    noisiest = steps if batch.level == 0 else min(steps, round((settings.noise_window + MARGIN) * steps))
    return noise_prediction_loss(predict, scheduler, batch.images, draws, settings.snr_gamma, noisiest)


def build_pipeline(settings: PyramidalSettings, network, scheduler, images):
    """Ancestral steps at every level unless a plan says otherwise; the plans are in `plans`."""
    from pyrdiff.data import color_statistics
    from pyrdiff.pipelines import PyramidalPipeline

    start = start_strength(scheduler.alphas_cumprod.tolist(), settings.sizes[0])
    named = plans(settings.ddpm_num_steps, len(settings.sizes), start, settings.noise_window)
    colors = color_statistics(images.arrays[0])
    if images.labels is not None:
        members = [images.labels.numbers == number for number in range(len(images.labels.names))]
        colors["classes"] = [
            {**color_statistics(images.arrays[0][each]), "share": round(float(each.mean()), 6)} for each in members
        ]
    pipeline = PyramidalPipeline(network, scheduler, plans=named, colors=colors)
    if settings.held_out_dir is not None:
        _judges(settings, pipeline)
    return pipeline


def _judges(settings: PyramidalSettings, pipeline):
    """The images held out, [N, C, H, W] in [0, 1], and the feature network that plans are chosen by."""
    from pyrdiff.data import open_source
    from pyrdiff.metrics import open_features
    from pyrdiff.plan import held_out_images

    held_out = held_out_images(pipeline, open_source(settings.held_out_dir), tuple(settings.background))
    features = open_features(settings.features, settings.feature_weights, device=pipeline.device)
    held_out = held_out.to(pipeline.device)
    features(held_out[:1], data_range=(0, 1))  # refuses images that are too small for it
    return held_out, features


def tune(settings: PyramidalSettings, pipeline, folder) -> None:
    """Searches for the model's own plans and writes them into its folder, if there are images to judge them by."""
    from pyrdiff.plan import tune as search

    if settings.held_out_dir is None:
        return
    held_out, features = _judges(settings, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    found = search(pipeline, held_out, features, settings.tune_minutes)
    found.save(folder)
    print(found, flush=True)


def start_strength(alphas_cumprod: list[float], size: tuple[int, int]) -> float:
    """
    The share of the noise process from which plain colours are as good a start as the images themselves: there, of an
    image's details no more is left than at 0.55 of 16x16, which was measured (benchmarks/README.md); and no less than
    that, since small images keep their shapes for longer (at 8x8, 0.42 was worse).

    Args:
        alphas_cumprod: Of the noise process, [training steps].
        size: (height, width) of the lowest level.
    """
    area = size[0] * size[1]  # the noise in a mean over the image falls as this grows, the image's part of it does not
    faint = next((time for time, alpha in enumerate(alphas_cumprod) if alpha * area < FAINT), len(alphas_cumprod))
    return max(START, round(faint / len(alphas_cumprod), 2))


def plans(train_steps: int = 1000, levels: int = 3, start: float = 1.0, noise_window: float = 1.0) -> dict[str, dict]:
    """
    What a saved pipeline offers as `plan=`: a short one and a better one, as measured on a trained network
    (benchmarks/README.md), and the paper's.

    Args:
        train_steps: Of the noise process.
        levels: How many there are.
        start: Share of the noise process that the lowest level starts from, in the colours of the data.
        noise_window: Of the network: no level above starts from more noise.
    """
    from pyrdiff.plan import CLIP

    stochastic = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **CLIP}]
    scale = train_steps * min(1.0, noise_window / WINDOW)

    def placed(low_calls: int, *shares: float) -> dict:
        low = [round(train_steps * start * (1 - index / low_calls)) for index in range(low_calls)]
        low = [min(time, train_steps - 1) for time in low]
        higher = sorted({round(share * scale) for share in shares}, reverse=True)
        return {"spacing": [low, *[higher] * (levels - 1)], "start_strength": start, "scheduler": stochastic}

    return {
        "fast": placed(20, 0.25, 0.12, 0.03),
        "balanced": placed(20, 0.285, 0.17, 0.08, 0.02),
        "paper": {
            "num_inference_steps": train_steps,
            "refine_steps": 30,
            "refine_strength": min(0.3, noise_window),
            "scheduler": ["DDPMScheduler", {}],
        },
    }


def preview(settings: PyramidalSettings, pipeline, images, path) -> dict[str, float]:
    from pyrdiff.training.previews import save_samples

    if images.labels is None:
        return save_samples(settings, pipeline, images, path)
    classes = list(islice(cycle(images.labels.names), settings.eval_batch_size))
    return save_samples(settings, pipeline, images, path, classes=classes)


def classes() -> tuple[type, ...]:
    from pyrdiff.models import CoordinateUNet2DModel
    from pyrdiff.pipelines import GuidedSRPipeline, PyramidalPipeline

    return CoordinateUNet2DModel, GuidedSRPipeline, PyramidalPipeline


METHOD = Method(
    name="pddpm",
    summary="Pyramidal DDPM: train one network at several resolutions, sample from coarse to fine.",
    settings=PyramidalSettings,
    model=build_model,
    adopt=adopt,
    scheduler=build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=preview,
    tune=tune,
    classes=classes,
    limits=(
        "It draws images of the kind that it was trained on, without a prompt, and may repeat training "
        "images where those were few. Sizes far from the trained ones look worse."
    ),
)
