import inspect

import pytest
import torch
from diffusers import UNet2DModel

from pyrdiff.models import ResidualSRUNet2DModel
from pyrdiff.models.unet_residual_sr import PRESETS

TINY = dict(norm_num_groups=4, attention_head_dim=8)
SCHEMES = ("conv_stack", "direct", "bicubic", "large_kernel")
WIDTHS = {2: (8, 16), 3: (8, 16, 24), 4: (8, 16, 24, 32)}


def network(levels: int = 3, **changes) -> ResidualSRUNet2DModel:
    torch.manual_seed(0)
    return ResidualSRUNet2DModel(**{**TINY, "block_out_channels": WIDTHS[levels], **changes}).eval()


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("attention", ["middle", "16x16"])
@pytest.mark.parametrize("levels", [2, 4])
def test_without_injection_it_is_unet2dmodel_at_5000_times_the_noise_level(levels, attention):
    model = network(levels, low_res_injection=None, attention=attention)
    marks = [attention == "16x16" and level == levels - 2 for level in range(levels)]
    parent = UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=WIDTHS[levels],
        down_block_types=["AttnDownBlock2D" if mark else "DownBlock2D" for mark in marks],
        up_block_types=["AttnUpBlock2D" if mark else "UpBlock2D" for mark in marks[::-1]],
        layers_per_block=1,
        add_attention=attention == "middle",
        **TINY,
    ).eval()
    parent.load_state_dict(model.state_dict())
    sample, low_res, level = pictures(2, 3, 16, 24), pictures(2, 3, 16, 24, seed=1), torch.tensor([0.3, 0.999])
    expected = parent(torch.cat((sample, low_res), 1), 5000 * level).sample
    assert torch.equal(model(sample, level, low_res).sample, expected)
    assert torch.equal(model(sample, level, low_res, return_dict=False)[0], expected)
    alone = model(sample, 0.3, low_res).sample
    torch.testing.assert_close(alone[:1], expected[:1], rtol=0, atol=1e-6)
    assert not torch.allclose(alone[1:], expected[1:], atol=1e-4)


@pytest.mark.parametrize("attention", ["middle", "16x16"])
def test_attention_is_at_the_lowest_level_or_at_the_one_above(attention):
    model, seen = network(4, attention=attention), []
    for name, module in model.named_modules():
        if type(module).__name__ == "Attention":
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.append((name, inputs[0].shape[-2:])))
    model(pictures(1, 3, 16, 24), 0.5, pictures(1, 3, 16, 24))
    places = [(name.split(".attentions")[0], tuple(size)) for name, size in seen]
    if attention == "middle":
        assert places == [("mid_block", (2, 3))]
    else:
        assert places == [("down_blocks.2", (4, 6)), ("up_blocks.1", (4, 6)), ("up_blocks.1", (4, 6))]


def input_of(model, name: str, *arguments) -> torch.Tensor:
    """What enters a block when the network is called so."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_low_resolution_image_is_added_to_the_level_above_the_lowest_down_and_up(scheme, levels):
    model, side = network(levels, low_res_injection=scheme), 2 ** (levels - 1)
    size, wanted = (4 * side, 6 * side), (8, 12)
    call = (pictures(2, 3, *size), torch.tensor([0.2, 0.7]), pictures(2, 3, *size, seed=1))
    added = model.injection(call[2])
    assert [tuple(features.shape) for features in added] == [
        (2, WIDTHS[levels][max(levels - 3, 0)], *wanted),
        (2, WIDTHS[levels][-1], *wanted),
    ]
    below = network(levels, low_res_injection=None)
    below.load_state_dict(model.state_dict(), strict=False)
    down, up = f"down_blocks.{levels - 2}", "up_blocks.1"
    torch.testing.assert_close(input_of(model, down, *call), input_of(below, down, *call) + added[0])
    for part in model.injection.project[0].parameters():
        part.data.zero_()
    torch.testing.assert_close(input_of(model, up, *call), input_of(below, up, *call) + added[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_injection_is_a_path_of_its_own_and_is_trained(scheme):
    model = network(low_res_injection=scheme)
    model.conv_in.weight.data[:, 3:] = 0
    sample, low_res = pictures(2, 3, 8, 12), pictures(2, 3, 8, 12, seed=1)
    output = model(sample, 0.5, low_res).sample
    assert (output - model(sample, 0.5, -low_res).sample).abs().mean() > 1e-3
    output.square().mean().backward()
    for name, parameter in model.injection.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    cut = network(low_res_injection=None)
    cut.conv_in.weight.data[:, 3:] = 0
    assert torch.equal(cut(sample, 0.5, low_res).sample, cut(sample, 0.5, -low_res).sample)


def test_what_each_scheme_reads_of_the_image():
    low_res = pictures(1, 3, 16, 24).requires_grad_()

    def read(scheme):
        """Where the image matters for the features of the pixel at (1, 1) of [4, 6]."""
        features = network(4, low_res_injection=scheme).injection(low_res)[0]
        (gradient,) = torch.autograd.grad(features[0, :, 1, 1].sum(), low_res)
        rows, columns = gradient[0].abs().sum(0).nonzero().T
        return (rows.min().item(), rows.max().item()), (columns.min().item(), columns.max().item())

    assert read("direct") == ((6, 6), (6, 6))
    assert read("large_kernel") == ((0, 8), (0, 8))
    rows, columns = read("bicubic")  # 4 * 2 pixels to each side of the centre between 5 and 6, cut by the border
    assert rows == columns == (0, 13)
    assert read("conv_stack") == ((0, 8), (0, 8))


def test_fusion_weighs_the_input_by_query_times_key():
    model = network(low_res_injection=None, input_fusion="attention")
    sample, low_res = pictures(2, 3, 8, 12), pictures(2, 3, 8, 12, seed=1)
    entered = input_of(model, "conv_in", sample, 0.5, low_res)
    weight = 1 / (1 + torch.exp(-model.fusion_query(sample) * model.fusion_key(low_res)))
    assert ((0 < weight) & (weight < 1)).all() and weight.std() > 0.01
    torch.testing.assert_close(entered, torch.cat((sample, weight * low_res), 1))
    model(sample, 0.5, low_res).sample.square().mean().backward()
    assert all(part.grad.abs().sum() > 0 for part in (model.fusion_query.weight, model.fusion_key.weight))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_variance_has_channels_of_its_own(channels):
    model = network(image_channels=channels, out_channels=2 * channels)
    assert model.conv_in.in_channels == 2 * channels
    assert model.config.in_channels == channels and model.config.out_channels == 2 * channels
    image = pictures(1, channels, 8, 8)
    assert model(image, 0.5, image).sample.shape == (1, 2 * channels, 8, 8)
    assert network(image_channels=channels)(image, 0.5, image).sample.shape == (1, channels, 8, 8)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 1.7), ("mini", 3.6), ("small", 14), ("paper", 96)])
def test_presets_have_the_size_that_is_said(name, millions):
    with torch.device("meta"):
        model = ResidualSRUNet2DModel.from_preset(name)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(count, 1 if millions < 10 else None) == millions
    assert name in PRESETS and len(PRESETS) == 4
    assert ResidualSRUNet2DModel.CHOICES.keys() <= model.config.keys()


def test_a_preset_can_be_changed_and_must_be_known():
    model = ResidualSRUNet2DModel.from_preset("tiny", image_channels=1, block_out_channels=(32, 32))
    assert model.config.image_channels == 1 and list(model.config.block_out_channels) == [32, 32]
    with pytest.raises(ValueError, match="name='huge': expected one of .*paper"):
        ResidualSRUNet2DModel.from_preset("huge")


CONFIGS = {
    "default": {},
    "sr3": dict(low_res_injection=None, attention="16x16"),
    "everything": dict(
        image_channels=1, out_channels=2, low_res_injection="large_kernel", input_fusion="attention",
        scale_factors=(2, 4), sample_size=(8, 12), dropout=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_it_survives_saving(tmp_path, changes):
    model = network(**changes)
    model.save_pretrained(tmp_path)
    loaded = ResidualSRUNet2DModel.from_pretrained(tmp_path)
    channels = model.config.image_channels
    image = pictures(1, channels, 8, 12)
    torch.testing.assert_close(loaded(image, 0.4, -image).sample, model(image, 0.4, -image).sample)
    known = inspect.signature(ResidualSRUNet2DModel.__init__).parameters
    before = {name: value for name, value in model.config.items() if not name.startswith("_")}
    for one in (model, loaded):
        config = {name: value for name, value in one.config.items() if not name.startswith("_")}
        assert config.keys() == known.keys() - {"self"}
        assert (config["in_channels"], one.conv_in.in_channels) == (channels, 2 * channels)
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
        assert config == {name: list(value) if isinstance(value, tuple) else value for name, value in before.items()}
    again = ResidualSRUNet2DModel.from_config(model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image_channels=0), "image_channels=0: expected a whole number from 1 up"),
        (dict(low_res_injection="cubic"), "low_res_injection='cubic': expected one of .*'conv_stack'"),
        (dict(attention="8x8"), "attention='8x8': expected one of .*'16x16'"),
        (dict(input_fusion="sum"), "input_fusion='sum': expected one of .*'concat'"),
        (dict(block_out_channels=(8,)), r"block_out_channels=\(8,\): expected 2 levels or more"),
        (dict(scale_factors=()), r"scale_factors=\(\): expected different whole numbers from 2 up"),
        (dict(scale_factors=(1, 2)), r"scale_factors=\(1, 2\): expected"),
        (dict(scale_factors=(2, 2)), r"scale_factors=\(2, 2\): expected"),
        (dict(scale_factors=(2.5,)), r"scale_factors=\(2.5,\): expected"),
        (dict(scale_factors=4), "scale_factors=4: expected"),
        (dict(in_channels=6), "in_channels=6: expected image_channels=3 or None"),
        (dict(out_channels=4), "out_channels=4: expected 3, or 6 with the variance"),
        (dict(center_input_sample=True), "center_input_sample=True: expected False"),
        (dict(time_embedding_type="fourier"), "time_embedding_type='fourier': expected 'positional'"),
        (dict(down_block_types=["AttnDownBlock2D"] * 3), "down_block_types=.*: expected .*attention='middle'"),
        (dict(up_block_types=["UpBlock2D"] * 2), "up_block_types=.*: expected"),
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type=.*: expected 'UNetMidBlock2D'"),
        (dict(add_attention=False), "add_attention=False: expected True"),
        (dict(num_class_embeds=3), "num_class_embeds=3: expected None"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


@pytest.mark.parametrize(
    ("sample", "level", "low_res", "message"),
    [
        ((1, 3, 8, 8), 0.5, (1, 3, 4, 4), r"low_res has shape \(1, 3, 4, 4\): expected the sample's \(1, 3, 8, 8\)"),
        ((2, 3, 8, 8), 0.5, (1, 3, 8, 8), r"low_res has shape \(1, 3, 8, 8\): expected the sample's"),
        ((1, 3, 8, 10), 0.5, (1, 3, 8, 10), r"sample has shape \(1, 3, 8, 10\): expected .*multiples of 4"),
        ((1, 3, 6, 8), 0.5, (1, 3, 6, 8), r"sample has shape \(1, 3, 6, 8\): expected .*multiples of 4"),
        ((1, 1, 8, 8), 0.5, (1, 1, 8, 8), r"sample has shape \(1, 1, 8, 8\): expected 3 channels"),
        ((3, 8, 8), 0.5, (3, 8, 8), r"sample has shape \(3, 8, 8\): expected"),
        ((3, 3, 8, 8), [0.5, 0.6], (3, 3, 8, 8), r"noise_level has shape \(2,\): expected a number or \(3,\)"),
        ((2, 3, 8, 8), [[0.5, 0.6]], (2, 3, 8, 8), r"noise_level has shape \(1, 2\): expected a number or \(2,\)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(sample, level, low_res, message):
    with pytest.raises(ValueError, match=message):
        network()(torch.zeros(sample), torch.tensor(level), torch.zeros(low_res))
