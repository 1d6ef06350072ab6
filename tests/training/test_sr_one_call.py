"""Super-resolution in one call at toy size: the loss against its formula, what is told, trained and exported."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyrdiff
from pyrdiff.data import shrink
from pyrdiff.methods import sr_one_call
from pyrdiff.methods.sr_one_call import METHOD, OneCallSettings
from pyrdiff.pipelines import ResidualSRPipeline
from pyrdiff.training.loop import DeviceBatch, train
from pyrdiff.training.losses import Draws

CPU = torch.device("cpu")


@pytest.fixture
def toy_photos(toy, tmp_path):
    """toy_photos(**changes): settings of a run of 12 steps on 24 images of 16x16 into a new folder."""
    array = tmp_path / "images.npy"
    np.save(array, np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))

    def settings(**changes) -> OneCallSettings:
        flags = toy(train_data_dir=str(array), resolution=["16"], scale_factor=[2], perceptual_weight=0.0, **changes)
        del flags["block_out_channels"]
        return OneCallSettings(**flags)

    return settings


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draws(seed: int = 0) -> Draws:
    return Draws(seed, device=CPU)


class Adds(torch.nn.Module):
    """A network that adds a number, and remembers what it was told."""

    def __init__(self, number: float = 0.0):
        super().__init__()
        self.number = number

    def forward(self, sample, noise_level, low_res, detail, restore, return_dict=True):
        self.seen = low_res, detail, restore
        return (torch.full_like(low_res, self.number),)


def loss_of(settings, network, images: torch.Tensor, seed: int = 0) -> float:
    scheduler = sr_one_call.build_scheduler(settings, None)
    return sr_one_call.loss(network, scheduler, settings, DeviceBatch(images, None), draws(seed)).item()


def test_smooth_places_count_more(toy_photos):
    flat, grain = torch.full((1, 3, 16, 16), 0.3), torch.ones(1, 3, 16, 16)
    grain[..., ::2, 1::2] = grain[..., 1::2, ::2] = -1
    assert (sr_one_call.smoothness(flat) - 1).abs().max() < 0.005, "1 up to rounding"
    inside = sr_one_call.smoothness(0.05 * grain)[..., 3:-3, 3:-3]
    torch.testing.assert_close(inside, torch.full_like(inside, math.exp(-20 * 0.05)), rtol=1e-2, atol=0)
    settings = toy_photos(degradation="bicubic", smooth_weight=4.0)
    assert loss_of(settings, Adds(0.1), flat) == pytest.approx(5 * 0.1, abs=0.02)  # 0.3 is no 8-bit value


def test_the_loss_is_the_error_of_the_enlarged_image_and_the_distance_by_detail(toy_photos, monkeypatch):
    settings, high = toy_photos(degradation="bicubic", smooth_weight=0.0), pictures(4, 3, 16, 16)
    network = Adds(0.25)
    found = loss_of(settings, network, high)
    turned = sr_one_call.turned(high, *draws().choice(sr_one_call.TURNS_AND_SHIFTS)[:2])
    enlarged = ResidualSRPipeline.upsample(shrink(turned, 2), (16, 16))
    error = (enlarged + 0.25 - turned).abs().mean().item()
    assert found == pytest.approx(error, rel=1e-5)
    low_res, detail, restore = network.seen
    torch.testing.assert_close(low_res, enlarged)
    assert not restore.any() and detail.min() >= 0 and detail.max() <= 1

    settings.perceptual_weight = 0.5
    distances, cuts = torch.tensor([1.0, 2.0, 3.0, 4.0]), set()

    def measure(settings, images, originals):
        assert images.shape == originals.shape
        cuts.add(images.shape)
        return distances

    monkeypatch.setattr(sr_one_call, "perceptual", measure)
    for seed in range(20):
        with_distance = loss_of(settings, network, high, seed)
        told = network.seen[1]
        settings.perceptual_weight = 0.0
        without = loss_of(settings, network, high, seed)
        settings.perceptual_weight = 0.5
        assert with_distance == pytest.approx(without + 0.5 * (told * distances).mean().item(), rel=1e-4)
    assert len(cuts) > 8, "the grid of what measures moves"


def test_both_ends_of_the_dial_are_trained(toy_photos):
    settings, network, details = toy_photos(degradation="bicubic"), Adds(), []
    for seed in range(100):
        loss_of(settings, network, pictures(4, 3, 16, 16), seed)
        details += network.seen[1].tolist()
    assert np.mean(np.equal(details, 1)) == pytest.approx(0.25, abs=0.07)
    assert np.mean(np.equal(details, 0)) == pytest.approx(0.125, abs=0.06)
    assert len(set(details)) > 200


@pytest.mark.parametrize(("degradation", "share"), [("bicubic", 0), ("realistic", 1), ("both", 1 / 3)])
def test_the_network_is_told_how_strong_the_damage_is(toy_photos, degradation, share):
    settings, high, damaged = toy_photos(degradation=degradation), pictures(4, 3, 16, 16), []
    clean = ResidualSRPipeline.upsample(shrink(high, 2), (16, 16))
    for seed in range(60):
        low_res, strength = sr_one_call.low_resolution(settings, high, draws(seed))
        damaged.append(bool(strength.any()))
        assert (strength.max() < 1) and (strength.min() >= 0)
        assert torch.equal(low_res, clean) != damaged[-1]
    assert np.mean(damaged) == pytest.approx(share, abs=0.2 if degradation == "both" else 0)


def test_batches_are_turned_in_four_ways():
    drawn = {draws(seed).choice(sr_one_call.TURNS_AND_SHIFTS)[:2] for seed in range(40)}
    assert len(drawn) == 4
    high, wide = pictures(2, 3, 16, 16), pictures(2, 3, 8, 16)
    assert len({sr_one_call.turned(high, *turns).sum((0, 1)).numpy().tobytes() for turns in drawn}) == 4
    assert {sr_one_call.turned(wide, *turns).shape for turns in drawn} == {wide.shape}


def test_what_is_trained_is_exported_and_goes_on(toy_photos):
    settings = toy_photos()
    folder = train(METHOD, settings)
    pipeline = pyrdiff.load(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.unet).__name__ == "ShuffledSRModel" and not pipeline.unet.config.sees_sample
    image = pictures(1, 3, 7, 10) / 2 + 0.5
    output = pipeline(image, output_type="pt").images
    assert output.shape == (1, 3, 14, 20) and pipeline.num_timesteps == 1
    assert torch.equal(pipeline(image, output_type="pt").images, output), "nothing is drawn that counts"
    assert not torch.equal(pipeline(image, output_type="pt", detail=0.0).images, output)
    assert torch.equal(pipeline(image, output_type="pt", detail=1.0, restore=0.0).images, output)
    settings.max_train_steps = 16
    train(METHOD, settings)
    log = (Path(settings.output_dir) / "log.jsonl").read_text()
    assert '"step": 16' in log and log.count('"step": 12,') == 1


def test_images_are_those_of_the_network(toy_photos):
    settings = toy_photos()
    torch.manual_seed(0)
    network = sr_one_call.build_model(settings, 3).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    scheduler = sr_one_call.build_scheduler(settings, None)
    images = SimpleNamespace(arrays=[np.zeros((2, 16, 16, 3), np.uint8)])
    pipeline = sr_one_call.build_pipeline(settings, network, scheduler, images)
    pipeline.set_progress_bar_config(disable=True)
    image = pictures(1, 3, 8, 12) / 2 + 0.5
    enlarged = pipeline.upsample(2 * image - 1, (16, 24))
    with torch.no_grad():
        expected = enlarged + network(enlarged, 1.0, enlarged, detail=0.3, restore=0.7).sample
    found = pipeline(image, detail=0.3, restore=0.7, clip_sample=False, output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, value in (("detail", 1.5), ("restore", -0.1), ("detail", "much"), ("restore", float("nan"))):
        with pytest.raises(ValueError, match=rf"{name}=.*: expected a number in \[0, 1\]"):
            pipeline(image, **{name: value})


def test_a_network_that_is_told_nothing_refuses_the_dial():
    unet = pyrdiff.ResidualSRUNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    pipeline = ResidualSRPipeline(unet, pyrdiff.CosineResidualScheduler())
    with pytest.raises(ValueError, match=r"detail=0\.5: expected None, .* a ResidualSRUNet2DModel"):
        pipeline(pictures(1, 3, 8, 8) / 2 + 0.5, 2, detail=0.5)


def test_missing_weights_of_the_loss_are_found_before_the_first_step(toy_photos):
    settings = toy_photos()
    settings.perceptual_weight, settings.perceptual_file = 1.0, "nowhere.pth"
    images = SimpleNamespace(arrays=[np.zeros((2, 16, 16, 3), np.uint8)])
    network = sr_one_call.build_model(settings, 3)
    with pytest.raises(ValueError, match="perceptual_network='alex': "):
        sr_one_call.build_pipeline(settings, network, sr_one_call.build_scheduler(settings, None), images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale_factor=[3]), "scale_factor=.*: expected numbers that divide both sides"),
        (dict(patch_size=12), "patch_size=12: expected multiples of 8"),
        (dict(smooth_weight=-1.0), "smooth_weight=-1.0: expected a number from 0 up"),
        (dict(lpips_weights="x"), "lpips_network=None: expected a network, for lpips_weights"),
    ],
)
def test_bad_settings(toy_photos, changes, message):
    with pytest.raises(ValueError, match=message):
        OneCallSettings(**{**toy_photos().__dict__, **changes})
