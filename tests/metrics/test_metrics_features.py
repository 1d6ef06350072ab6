"""Feature networks: one property over all, the names of distances, and a classifier that learns."""

import json

import pytest
import torch
import torch.nn.functional as F

from pyrdiff.metrics import Classifier, frechet_distance, kid, open_features, train_classifier
from pyrdiff.metrics.features import _resize_tensorflow

UNIT = (0, 1)


def images(count: int, channels: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, mlp_ratio=1)
    folder = tmp_path_factory.mktemp("dinov2") / "dinov2-toy"
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    train_classifier(images(40), torch.arange(40) % 2, data_range=UNIT, epochs=1).save(path)
    return path


DIMENSIONS = {"squeezenet": 512, "alexnet": 256, "dinov2": 16, "classifier": 128}


@pytest.fixture(params=DIMENSIONS)
def opened(request, squeezenet_file, alexnet_file, dinov2_folder, classifier_file):
    files = dict(squeezenet=squeezenet_file, alexnet=alexnet_file, dinov2=dinov2_folder, classifier=classifier_file)
    return open_features(request.param, files[request.param], batch_size=2), DIMENSIONS[request.param]


def test_every_network(opened):
    network, dimension = opened
    network.batch_size = 5
    whole = network(images(5), data_range=UNIT)
    assert whole.shape == (5, dimension) and whole.dtype == torch.float32 and not whole.requires_grad
    network.batch_size = 2
    assert torch.allclose(network(images(5), data_range=UNIT), whole, atol=1e-4, rtol=1e-4)
    assert torch.allclose(network(2 * images(5) - 1, data_range=(-1, 1)), whole, atol=1e-4, rtol=1e-4)
    gray = images(2, 1)
    assert torch.equal(network(gray, data_range=UNIT), network(gray.repeat(1, 3, 1, 1), data_range=UNIT))
    assert {"network", "layer", "resize", "normalisation", "weights_sha256"} <= set(network.conventions)
    assert len(network.conventions["weights_sha256"]) == 12
    json.dumps(network.conventions)
    with pytest.raises(ValueError, match="^images has values"):
        network(images(2) + 1, data_range=UNIT)


def test_distances_of_images_are_those_of_their_features(opened):
    network, _ = opened
    real, fake = images(12), images(9, seed=1)
    features = [network(part, data_range=UNIT) for part in (real, fake)]
    for metric in (frechet_distance, kid):
        of_images, of_features = (
            metric(real, fake, features=network, data_range=UNIT),
            metric(*features, features=network),
        )
        assert of_images.value == of_features.value and of_images.name == of_features.name
        assert network.name in of_images.name and "FID" not in of_images.name and "KID" not in of_images.name
        assert of_images.conventions["features"] == network.conventions
        assert of_images.conventions["image_size"] == [32, 32]
    with pytest.raises(ValueError, match="^real, generated of sizes"):
        frechet_distance(real, images(9, side=40), features=network, data_range=UNIT)


def test_the_name_fid_is_for_its_network_only(opened):
    network, _ = opened
    real, fake = torch.randn(9, 4), torch.randn(9, 4)
    network.name = "inception"
    assert frechet_distance(real, fake, features=network).name == "FID"
    assert kid(real, fake, features=network).name == "KID"
    assert frechet_distance(real, fake).name == "FD-features"


def test_what_is_missing_is_said(tmp_path, alexnet_file, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    for name, weights, message in (
        (
            "resnet",
            None,
            "^name='resnet': expected one of 'squeezenet', 'alexnet', 'inception', 'dinov2', 'classifier'",
        ),
        ("inception", None, "^weights=None, but https.*no route"),
        ("inception", alexnet_file, "^weights=.*not a state dict of inception"),
        ("squeezenet", tmp_path / "none", "^weights=.*no file"),
        ("classifier", None, "^weights=None for 'classifier'"),
        ("classifier", alexnet_file, "^weights=.*cannot be read"),
        ("dinov2", tmp_path / "none", "^weights=.*cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_features(name, weights)
        assert "\n" not in str(error.value)
    network = open_features("alexnet", alexnet_file)
    with pytest.raises(ValueError, match=r"^images of \[30, 30\]: expected sides of 31 or more for alexnet"):
        network(images(1, side=30), data_range=UNIT)
    with pytest.raises(ValueError, match="^batch_size=0"):
        open_features("alexnet", alexnet_file, batch_size=0)


def test_the_resize_of_fid_puts_pixel_i_at_i_times_the_ratio():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    up = _resize_tensorflow(ramp, 16)
    assert up[0, 0, 0].tolist() == [min(index / 2, 7) for index in range(16)]
    assert torch.equal(_resize_tensorflow(ramp, 8), ramp)
    assert torch.equal(_resize_tensorflow(ramp.mT, 16), up.mT)
    assert not torch.allclose(up, F.interpolate(ramp, (16, 16), mode="bilinear"))


def patterns(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes, uint8 [N, 12, 12]: upright (0), lying (1) or of both kinds (2)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    stripes = 60.0 * (torch.arange(12) % 4 < 2)
    upright, lying = (labels != 1)[:, None, None] * stripes, (labels != 0)[:, None, None] * stripes[:, None]
    noise = 40 * torch.rand(count, 12, 12, generator=generator)
    return (upright + lying + noise).byte(), labels


def test_a_classifier_learns_and_is_kept(tmp_path):
    network = train_classifier(*patterns(600, 0), epochs=3)
    unseen, labels = patterns(200, 1)
    unseen = unseen[:, None].float()
    assert (network.predict(unseen, data_range=(0, 255)) == labels).float().mean() > 0.95
    again = train_classifier(*patterns(600, 0), epochs=3)
    assert again.conventions == network.conventions, "the same seed gives the same weights"
    network.save(tmp_path / "network.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]
    loaded = Classifier.load(tmp_path / "network.safetensors")
    assert loaded.conventions == network.conventions and loaded.channels == 1
    assert loaded.conventions["trained"]["images"] == 600
    assert torch.equal(loaded(unseen, data_range=(0, 255)), network(unseen, data_range=(0, 255)))
    one = unseen[labels == 0]
    half = len(one) // 2
    near, far = (frechet_distance(one[:half], other, features=network, data_range=(0, 255)).value
                 for other in (one[half:], unseen[labels == 1]))  # fmt: skip
    assert far > 10 * near
    with pytest.raises(ValueError, match="^images of 3 channels: expected at most 1 for classifier"):
        network(images(2), data_range=UNIT)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=images(8)), "^images=torch.float32, data_range=None"),
        (dict(data_range=UNIT), "^images=torch.uint8, data_range="),
        (dict(images=torch.zeros(8, 2, 8, 8, dtype=torch.uint8)), r"^images=\[8, 2, 8, 8\]"),
        (dict(labels=torch.zeros(8, dtype=torch.long)), "^labels=.*two classes"),
        (dict(labels=torch.arange(7)), r"^labels=torch.int64 \[7\]: expected 8 integers"),
        (dict(epochs=0), "^epochs=0, batch_size="),
    ],
)
def test_bad_training(change, message):
    given = dict(images=torch.zeros(8, 8, 8, dtype=torch.uint8), labels=torch.arange(8) % 2) | change
    with pytest.raises(ValueError, match=message):
        train_classifier(**given)


def test_squeezenet_of_real_weights(shared):
    """A set, against its noisy self and against itself upside down."""
    network = open_features("squeezenet", shared / "weights/lpips/squeeze.backbone.pth")
    real = images(24, side=24)
    real = F.avg_pool2d(real, 5, 1, 2)
    distances = [
        frechet_distance(real, (real + part * (images(24, side=24, seed=1) - 0.5)).clamp(0, 1), features=network,
                         data_range=UNIT).value for part in (0, 0.1, 0.5)
    ]  # fmt: skip
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[0] < distances[1] < distances[2]
