"""Networks that turn an image into a vector, for distances between sets of images."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pyrdiff.data import replacing

from .result import DataRange, check_images, check_range, to_unit
from .trunks import NETWORKS, SMALLEST, imagenet_normal, inception, open_trunk, sha256_of

NAMES = ("squeezenet", "alexnet", "inception", "dinov2", "classifier")
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, the network of FD-DINOv2
DINOV2_SIDE = 224
CLASSIFIER_WIDTH = 128


class FeatureNetwork(Protocol):
    """Float images [B, 1 or 3, H, W] to float32 features [B, D] on their device.

    Attributes:
        name: Of the network.
        channels: 1 or 3; a network of 3 takes gray images too, repeated.
        conventions: Network, layer, resize, normalisation and the start of the weights' SHA-256, as JSON values.
    """

    name: str
    channels: int
    conventions: dict

    def __call__(self, images: Tensor, *, data_range: DataRange) -> Tensor: ...


class ImageFeatures:
    """A `FeatureNetwork` from a function of RGB or gray images in [0, 1]. Runs in batches and without gradients.

    Args:
        name, channels, conventions: As in `FeatureNetwork`.
        network: float32 [b, channels, H, W] in [0, 1] on `device` to [b, D].
        device: Where the network is.
        batch_size: Images at a time. Changes the result by rounding only.
        smallest: Least side of an image.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        conventions: dict,
        network: Callable[[Tensor], Tensor],
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        smallest: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        self.name = name
        self.channels = channels
        self.conventions = conventions
        self.network = network
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.smallest = smallest

    @torch.no_grad()
    def __call__(self, images: Tensor, *, data_range: DataRange) -> Tensor:
        """Features [B, D] of float images [B, C, H, W] with values in `data_range`; ValueError for anything else."""
        check_images("images", images, data_range)
        if images.shape[1] > self.channels:
            raise ValueError(f"images of {images.shape[1]} channels: expected at most {self.channels} for {self.name}")
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"images of {list(images.shape[-2:])}: expected sides of {self.smallest} or more for {self.name}"
            )
        batches = []
        for batch in images.split(self.batch_size):
            batch = to_unit(batch.to(self.device), data_range, torch.float32).expand(-1, self.channels, -1, -1)
            batches.append(self.network(batch).float())
        return torch.cat(batches).to(images.device)


def open_features(
    name: str,
    weights: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> ImageFeatures:
    """Open a feature network. Distances are comparable only within one network, one count and one image size.

    | name | features | weights |
    |---|---|---|
    | "squeezenet" | 512: the last fire module, averaged over positions; images as they are | torchvision's layout |
    | "alexnet" | 256: the last ReLU, averaged over positions; images as they are | torchvision's layout |
    | "inception" | 2048: the network of FID, images rounded to 8 bits, resized to 299 as there | pytorch-fid's file |
    | "dinov2" | the class token, images resized to 224; FD-DINOv2 with the default, ViT-L/14 | folder or repository |
    | "classifier" | 128: see `train_classifier` | what its `save` wrote; must be given |

    Args:
        name: See above.
        weights: A path (see `open_trunk`); None for the published weights, downloaded once.
        device: Where the network runs.
        batch_size: Images at a time.

    Raises:
        ValueError: for another name, and for weights that are missing, of another network or cannot be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(map(repr, NAMES))}")
    if name == "classifier":
        if weights is None:
            raise ValueError("weights=None for 'classifier': expected a file that Classifier.save wrote")
        return Classifier.load(weights, device=device, batch_size=batch_size)
    if name == "dinov2":
        return _open_dinov2(weights, device, batch_size)

    state, digest = open_trunk(name, weights, device)
    if name == "inception":
        conventions = {
            "layer": "last pooling, 2048",
            "resize": "299, bilinear as TensorFlow 1 does, after rounding to 8 bits",
            "normalisation": "(x - 128) / 128 of 0..255",
        }

        def network(images: Tensor) -> Tensor:
            pixels = _resize_tensorflow((images * 255).round(), 299)
            return inception(state, (pixels - 128) / 128)[-1]

    else:
        layer = {"squeezenet": "last fire module, 512", "alexnet": "last ReLU, 256"}[name]
        conventions = {
            "layer": layer + ", mean over positions",
            "resize": None,
            "normalisation": "ImageNet mean and std",
        }

        def network(images: Tensor) -> Tensor:
            return NETWORKS[name](state, imagenet_normal(images))[-1].mean((2, 3))

    conventions = {"network": name, **conventions, "weights_sha256": digest}
    return ImageFeatures(name, 3, conventions, network, device, batch_size, SMALLEST[name])


def _resize_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear [B, C, side, side] with output pixel i at input i·size/side, as in the graph of FID's network."""
    for axis in (2, 3):
        size = images.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        below = place.long()
        above = (below + 1).clamp(max=size - 1)
        share = (place - below).reshape((-1, 1) if axis == 2 else (1, -1))
        images = images.index_select(axis, below).lerp(images.index_select(axis, above), share)
    return images


def _open_dinov2(weights: str | os.PathLike | None, device: str | torch.device, batch_size: int) -> ImageFeatures:
    from transformers import Dinov2Model

    source = DINOV2 if weights is None else str(weights)
    try:
        model = Dinov2Model.from_pretrained(source, use_safetensors=True).eval().to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"weights={source!r}, which cannot be loaded ({str(error).splitlines()[0]}): expected a folder or "
            "a repository with a Dinov2Model"
        ) from error
    state = save({key: value.contiguous().cpu() for key, value in model.state_dict().items()})
    name = "dinov2" if source == DINOV2 else f"dinov2:{Path(source).name}"
    conventions = {
        "network": source if weights is None else Path(source).name,
        "layer": f"class token after the last norm, {model.config.hidden_size}",
        "resize": f"{DINOV2_SIDE}, bicubic, antialiased, clamped to the range",
        "normalisation": "ImageNet mean and std",
        "weights_sha256": sha256_of(state),
    }

    def network(images: Tensor) -> Tensor:
        size = (DINOV2_SIDE, DINOV2_SIDE)
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return model(pixel_values=imagenet_normal(images)).pooler_output

    return ImageFeatures(name, 3, conventions, network, device, batch_size)


class Classifier(ImageFeatures):
    """A small convolutional classifier of ours, whose last hidden layer gives 128 features; see `train_classifier`.

    Args:
        state: Tensors of its network.
        record: How it was trained: size, channels, classes, images, epochs, train_accuracy.
        device, batch_size: As in `ImageFeatures`.
    """

    def __init__(self, state: dict, record: dict, device: str | torch.device = "cpu", batch_size: int = 256):
        self.record = dict(record)
        self.layers = _layers(record["channels"], record["classes"])
        self.layers.load_state_dict(state)
        self.layers.eval().to(device)
        conventions = {
            "network": "classifier: three convolutions and a hidden layer, trained on labels",
            "layer": f"hidden, {CLASSIFIER_WIDTH}, after its ReLU",
            "resize": None,
            "normalisation": "[-1, 1]",
            "trained": self.record,
            "weights_sha256": sha256_of(self._bytes()),
        }
        super().__init__("classifier", record["channels"], conventions, self._hidden, device, batch_size, smallest=4)

    @torch.no_grad()
    def predict(self, images: Tensor, *, data_range: DataRange) -> Tensor:
        """The class of each image [B, C, H, W], int64 [B]."""
        return self.layers[-1](self(images, data_range=data_range).to(self.device)).argmax(1).to(images.device)

    def save(self, path: str | os.PathLike) -> None:
        """Write the network as safetensors, whole or not at all."""
        with replacing(path) as beside:
            beside.write_bytes(self._bytes())

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: str | torch.device = "cpu", batch_size: int = 256
    ) -> "Classifier":
        """Read what `save` wrote; ValueError for anything else."""
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["record"])
            return cls(load_file(path), record, device, batch_size)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"weights={str(path)!r}, which cannot be read ({str(error).splitlines()[0]}): expected a file "
                "that Classifier.save wrote"
            ) from error

    def _hidden(self, images: Tensor) -> Tensor:
        return self.layers[:-1](2 * images - 1)

    def _bytes(self) -> bytes:
        state = {key: value.contiguous().cpu() for key, value in self.layers.state_dict().items()}
        return save(state, metadata={"record": json.dumps(self.record)})  # several keys come in no fixed order


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    data_range: DataRange | None = None,
    epochs: int = 1,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Train a feature network on a set with labels, for where no published network fits or is at hand.

    Fashion-MNIST (60,000 images of 28×28) takes about a minute of one CPU core an epoch. The distance in its features
    sees what tells the classes apart.

    Args:
        images: [N, H, W] or [N, C, H, W], C 1 or 3, sides of 4 or more: uint8, or float with values in `data_range`.
        labels: Integers [N], 0 and up.
        data_range: (low, high) of float images; for uint8 it is (0, 255) and not given.
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: The highest one of Adam, reached after a fifth of the steps and then taken down to 0.
        generator: A CPU generator for the initial weights and the order; seeded with 0 when None.
        device: Where to train.

    Raises:
        ValueError: for wrong shapes, values or settings.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.dtype == torch.uint8 and data_range is None:
        data_range = (0, 255)
    elif images.is_floating_point() and data_range is not None:
        check_images("images", images, data_range)
    else:
        raise ValueError(
            f"images={images.dtype}, data_range={data_range!r}: expected uint8 without a range, or floats with one"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[-2:]) < 4 or len(images) == 0:
        raise ValueError(f"images={list(images.shape)}: expected [N, C, H, W], C 1 or 3, sides of 4 or more")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.min() < 0 or labels.max() < 1:
        raise ValueError(
            f"labels={labels.dtype} {list(labels.shape)}: expected {len(images)} integers, 0 and up, "
            "of two classes or more"
        )
    if min(epochs, batch_size) < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, learning_rate={learning_rate}: expected 1 or more, "
            "1 or more, and above 0"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    labels = labels.long().cpu()
    low, high = check_range(data_range)
    layers = _layers(images.shape[1], int(labels.max()) + 1)
    for name, value in layers.named_parameters():
        if value.ndim > 1:
            nn.init.kaiming_normal_(value, nonlinearity="relu", generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(value)
    layers.to(device)
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.Adam(layers.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.2)
    for _ in range(epochs):
        right = 0
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = images[chosen.to(images.device)].to(device, torch.float32)
            truth = labels[chosen].to(device)
            scores = layers(2 * (batch - low) / (high - low) - 1)
            optimizer.zero_grad()
            F.cross_entropy(scores, truth).backward()
            optimizer.step()
            schedule.step()
            right += (scores.argmax(1) == truth).sum().item()
    record = {
        "size": f"{images.shape[-2]}x{images.shape[-1]}",
        "channels": images.shape[1],
        "classes": int(labels.max()) + 1,
        "images": len(images),
        "epochs": epochs,
        "train_accuracy": round(right / len(images), 4),
    }
    return Classifier(layers.state_dict(), record, device)


def _layers(channels: int, classes: int) -> nn.Sequential:
    """[B, channels, H, W] in [-1, 1] to scores [B, classes]; all but the last layer give the features."""
    layers = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([nn.MaxPool2d(2)] if after < 128 else [])]
        layers += [nn.GroupNorm(8, after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSIFIER_WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(CLASSIFIER_WIDTH, classes))
