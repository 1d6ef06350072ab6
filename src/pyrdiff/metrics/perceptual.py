"""LPIPS, the learned perceptual distance between two images."""

import os
from typing import Literal

import torch
from torch import Tensor

from .result import DataRange, MetricResult, check_pair, check_range, mean_of, to_unit
from .trunks import NETWORKS, SMALLEST, lpips_heads, open_trunk

TRUNKS = {"alex": "alexnet", "squeeze": "squeezenet", "vgg": "vgg16"}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], as LPIPS was trained


class LPIPS:
    """
    LPIPS version 0.1 as a function with gradients, such as a loss needs (Zhang et al. 2018, eq. 1).

    Args:
        network: "alex", "squeeze" or "vgg".
        heads: The linear heads, a tensor [1, C, 1, 1] a layer.
        state: The weights of the network's convolutions.
        digest: Of their file.
    """

    def __init__(self, network: str, heads: list[Tensor], state: dict[str, Tensor], digest: str):
        self.trunk, self.heads, self.state, self.digest = TRUNKS[network], heads, state, digest

    @classmethod
    def open(
        cls,
        network: Literal["alex", "squeeze", "vgg"] = "alex",
        weights: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
    ) -> "LPIPS":
        """With the published weights; arguments and errors as of `lpips`. Files are read once."""
        if network not in TRUNKS:
            raise ValueError(f"network={network!r}: expected one of {', '.join(map(repr, TRUNKS))}")
        heads = lpips_heads(network, device)
        return cls(network, heads, *open_trunk(TRUNKS[network], weights, device))

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """The distance of each pair [B, C, H, W] in [-1, 1], float32 [B]; gradients reach `images` only."""
        with torch.no_grad():
            truth = self._taps(originals)
        layers = zip(self.heads, self._taps(images), truth, strict=True)
        return sum((head * (a - b).square()).sum(1).mean((1, 2)) for head, a, b in layers)

    def _taps(self, images: Tensor) -> list[Tensor]:
        """Activations of unit length at each place."""
        shift, scale = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in (SHIFT, SCALE))
        activations = NETWORKS[self.trunk](self.state, (images.expand(-1, 3, -1, -1) - shift) / scale)
        activations = [tap.float() for tap in activations]
        return [tap / (tap.square().sum(1, keepdim=True).sqrt() + 1e-10) for tap in activations]


@torch.no_grad()
def lpips(
    prediction: Tensor,
    target: Tensor,
    *,
    data_range: DataRange,
    network: Literal["alex", "squeeze", "vgg"] = "alex",
    weights: str | os.PathLike | None = None,
    batch_size: int = 16,
) -> MetricResult:
    """LPIPS version 0.1 (Zhang et al. 2018, eq. 1); the mean over images. 0 for equal images, smaller is nearer.

    The distance of the unit-length features of a network at each position, weighted by channel with the published
    linear heads, averaged over positions and added up over layers. Images are compared at the size they have.

    Args:
        prediction: float [B, C, H, W], values in `data_range`; one channel is repeated to three. On any device.
        target: The same.
        data_range: (low, high), what black and white are; a number is (0, number).
        network: "alex" for comparisons with most papers, "squeeze" is the smallest, "vgg" was made for losses.
        weights: File with the network's weights in torchvision's layout (see `open_trunk`), or None for the published
            file, downloaded once.
        batch_size: So many pairs at a time. Does not change the result.

    Raises:
        ValueError: for wrong shapes, values or settings, and for weights that are missing or of another network.
        ImportError: when the lpips package is missing, whose files hold the linear heads; it is not imported.
    """
    check_pair(prediction, target, data_range)
    if network not in TRUNKS:
        raise ValueError(f"network={network!r}: expected one of {', '.join(map(repr, TRUNKS))}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    trunk = TRUNKS[network]
    if min(prediction.shape[-2:]) < SMALLEST[trunk]:
        raise ValueError(
            f"prediction with images {list(prediction.shape[-2:])}: expected for network={network!r} sides of "
            f"{SMALLEST[trunk]} or more"
        )
    measure = LPIPS.open(network, weights, prediction.device)
    distances = []
    for pair in zip(prediction.split(batch_size), target.split(batch_size), strict=True):
        distances.append(measure(*(2 * to_unit(images, data_range, torch.float32) - 1 for images in pair)))
    conventions = {
        "channels": "gray, repeated to rgb" if prediction.shape[1] == 1 else "rgb",
        "data_range": list(check_range(data_range)),
        "version": "0.1",
        "network": trunk,
        "layers": len(measure.heads),
        "resize": None,
        "weights_sha256": measure.digest,
    }
    return mean_of(f"lpips_{network}", torch.cat(distances), conventions)
