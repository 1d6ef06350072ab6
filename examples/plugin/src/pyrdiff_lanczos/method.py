"""What pyrdiff needs to know: flags, network, noise schedule, loss, pipeline. torch is imported only when called."""

from dataclasses import dataclass
from typing import Literal

from pyrdiff.methods import pddpm
from pyrdiff.plugins import Method


@dataclass(kw_only=True)
class LanczosSettings(pddpm.PyramidalSettings):
    """Flags of Pyramidal DDPM, two other defaults, and one more flag."""

    output_dir: str = "runs/lanczos-pyramid"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    lanczos_lobes: int = 3
    """Lobes of the Lanczos kernel on each side that enlarges between two levels."""

    def __post_init__(self):
        super().__post_init__()
        self._check("lanczos_lobes", self.lanczos_lobes >= 1, "1 or more")


def loss(network, scheduler, settings: LanczosSettings, batch, draws):
    """Mean squared error of what the network predicts (here v) at random times, for one level's images or patches."""
    from pyrdiff.models import CoordinateUNet2DModel
    from pyrdiff.training.losses import noise_prediction_loss

    coordinates = None  # whole images
    if batch.boxes is not None and settings.use_coordinates:
        height, width = batch.images.shape[-2:]
        coordinates = CoordinateUNet2DModel.coordinate_grid(height, width, batch.boxes, device=batch.images.device)

    def predict(noisy, timesteps):
        return network(noisy, timesteps, coordinates=coordinates, return_dict=False)[0]

    return noise_prediction_loss(predict, scheduler, batch.images, draws, settings.snr_gamma)


def build_pipeline(settings: LanczosSettings, network, scheduler, images):
    from .pipeline_lanczos_pyramid import LanczosPyramidPipeline

    return LanczosPyramidPipeline(network, scheduler, lanczos_lobes=settings.lanczos_lobes)


def classes() -> tuple[type, ...]:
    from pyrdiff.models import CoordinateUNet2DModel

    from .pipeline_lanczos_pyramid import LanczosPyramidPipeline

    return CoordinateUNet2DModel, LanczosPyramidPipeline


METHOD = Method(
    name="lanczos_pyramid",
    summary="Pyramidal DDPM that predicts v and enlarges with Lanczos between its levels.",
    settings=LanczosSettings,
    model=pddpm.build_model,
    scheduler=pddpm.build_scheduler,
    loss=loss,
    pipeline=build_pipeline,
    preview=pddpm.preview,
    classes=classes,
    limits="It draws images of the kind that it was trained on, without a prompt. Other sizes than those look worse.",
)
