"""The network on squares of pixels: what it sees, what it is told, how far it looks, what is refused."""

import re

import pytest
import torch

from pyrdiff.models import ShuffledSRModel
from pyrdiff.models.net_shuffled_sr import PRESETS


def network(awake: bool = True, **changes) -> ShuffledSRModel:
    """A small one; awake: with weights where it begins with zeros."""
    torch.manual_seed(0)
    model = ShuffledSRModel(
        **{"block_out_channels": (8, 12), "layers_per_block": (1, 1), "embedding_dim": 8, **changes}
    )
    if awake:
        for name, parameter in model.named_parameters():
            if "condition." in name or "conv_out" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_begins_with_nothing_to_add():
    sample = pictures(2, 3, 16, 24)
    assert not network(awake=False)(sample, 0.5, sample).sample.any()


@torch.no_grad()
def test_without_a_sample_only_the_image_counts():
    model, low_res = network(sees_sample=False), pictures(2, 3, 16, 24)
    expected = model(pictures(2, 3, 16, 24, seed=1), 0.3, low_res).sample
    assert torch.equal(model(pictures(2, 3, 16, 24, seed=2), 0.9, low_res).sample, expected)
    assert not torch.equal(model(low_res, 0.3, -low_res).sample, expected)
    seeing = network()
    one, other = (seeing(pictures(2, 3, 16, 24, seed=seed), 0.3, low_res).sample for seed in (1, 2))
    assert not torch.equal(one, other)


@torch.no_grad()
def test_each_image_is_told_its_own():
    model, low_res = network(), pictures(2, 3, 16, 24)
    for name in ("noise_level", "detail", "restore"):
        told = {"noise_level": 0.5, "detail": 0.5, "restore": 0.5}
        apart = model(low_res, low_res=low_res, **{**told, name: torch.tensor([0.2, 0.9])}).sample
        for index, value in enumerate((0.2, 0.9)):
            alone = model(low_res, low_res=low_res, **{**told, name: value}).sample
            torch.testing.assert_close(apart[index], alone[index], rtol=0, atol=1e-6)
            assert (apart[index] - alone[1 - index]).abs().max() > 1e-4
    by_default = model(low_res, 0.5, low_res).sample
    assert torch.equal(model(low_res, 0.5, low_res, 1.0, 0.0, return_dict=False)[0], by_default)


@torch.no_grad()
def test_a_place_sees_its_surroundings_and_no_more():
    model, low_res = network(), pictures(1, 3, 128, 128)
    other = low_res.clone()
    other[..., :16, :] = -other[..., :16, :]
    change = (model(other, 0.5, other).sample - model(low_res, 0.5, low_res).sample).abs().amax((0, 1, 3))
    assert change[:16].min() > 0 and change[96:].max() == 0


def test_presets_have_the_sizes_that_are_said():
    for name, millions in (("tiny", 0.21), ("mini", 2.58), ("small", 14.1)):
        count = sum(parameter.numel() for parameter in ShuffledSRModel.from_preset(name).parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.01), name
    assert set(PRESETS) == {"tiny", "mini", "small"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block_out_channels=(8,)), "block_out_channels=(8,): expected two whole numbers from 1 up"),
        (dict(block_out_channels=(6, 8)), "block_out_channels=(6, 8): expected a multiple of 4 first"),
        (dict(layers_per_block=(0, 1)), "layers_per_block=(0, 1): expected two whole numbers from 1 up"),
        (dict(image_channels=0), "image_channels=0: expected a whole number from 1 up"),
        (dict(in_channels=4), "in_channels=4: expected image_channels=3 or None"),
        (dict(scale_factors=(1,)), "scale_factors=(1,): expected different whole numbers from 2 up, or None"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        network(awake=False, **changes)


def test_bad_shapes():
    model = network()
    with pytest.raises(ValueError, match="low_res has shape .*: expected the sample's"):
        model(pictures(1, 3, 16, 16), 0.5, pictures(1, 3, 16, 8))
    with pytest.raises(ValueError, match="expected sides that are multiples of 8"):
        model(pictures(1, 3, 16, 12), 0.5, pictures(1, 3, 16, 12))
    with pytest.raises(ValueError, match=r"detail has shape \(3,\): expected a number or \(1,\)"):
        model(pictures(1, 3, 16, 16), 0.5, pictures(1, 3, 16, 16), torch.ones(3))
