import copy
import math
import pickle

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from pyrdiff.models import CoordinateUNet2DModel
from pyrdiff.models.unet_coordinate import PRESETS

TINY = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)


def network(**changes) -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    return CoordinateUNet2DModel(**{**TINY, **changes}).eval()


def test_grid_has_half_pixel_centres():
    grid = CoordinateUNet2DModel.coordinate_grid(2, 4)
    assert grid.shape == (2, 2, 4) and grid.dtype == torch.float32
    assert grid[0, :, 0].tolist() == [0.25, 0.75]
    assert grid[1, 0].tolist() == [0.125, 0.375, 0.625, 0.875]


def test_a_crop_of_the_grid_is_the_grid_of_the_crop():
    whole = CoordinateUNet2DModel.coordinate_grid(24, 40)
    box = (6 / 24, 10 / 40, 18 / 24, 35 / 40)
    assert torch.allclose(whole[:, 6:18, 10:35], CoordinateUNet2DModel.coordinate_grid(12, 25, box), atol=1e-7)


def test_halving_the_grid_is_the_grid_of_half_the_size():
    halved = torch.nn.functional.avg_pool2d(CoordinateUNet2DModel.coordinate_grid(24, 40)[None], 2)[0]
    assert torch.allclose(halved, CoordinateUNet2DModel.coordinate_grid(12, 20), atol=1e-7)


def test_grids_of_many_boxes():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]])
    grids = CoordinateUNet2DModel.coordinate_grid(6, 5, boxes)
    for grid, box in zip(grids, boxes.tolist(), strict=True):
        assert torch.equal(grid, CoordinateUNet2DModel.coordinate_grid(6, 5, box))


def test_encoding_is_equation_7():
    model = network()
    coordinates = torch.tensor([0.3, 0.8]).reshape(1, 2, 1, 1)
    expected = [f(2**k * value) for value in (0.3, 0.8) for k in range(6) for f in (math.sin, math.cos)]
    encoding = model.encode_coordinates(coordinates)
    assert encoding.shape == (1, 24, 1, 1)
    assert torch.allclose(encoding.flatten(), torch.tensor(expected), atol=1e-6)


def test_the_network_is_unet2dmodel_on_image_and_encoding():
    """The same weights in the parent class, fed the concatenation by hand."""
    model = network()
    parent = UNet2DModel(in_channels=27, out_channels=3, **TINY).eval()
    parent.load_state_dict(model.state_dict())
    sample, timestep = torch.randn(2, 3, 8, 12), torch.tensor([3, 800])
    encoding = model.encode_coordinates(model.coordinate_grid(8, 12)[None]).expand(2, -1, -1, -1)
    expected = parent(torch.cat((sample, encoding), 1), timestep).sample
    assert torch.equal(model(sample, timestep).sample, expected)


def test_coordinates_default_to_the_whole_image_and_matter():
    model = network()
    sample = torch.randn(2, 3, 8, 8)
    whole = model.coordinate_grid(8, 8)[None]
    corner = model.coordinate_grid(8, 8, (0, 0, 0.5, 0.5))[None]
    default = model(sample, 5).sample
    assert torch.equal(default, model(sample, 5, coordinates=whole.expand(2, -1, -1, -1)).sample)
    assert not torch.allclose(default, model(sample, 5, coordinates=corner).sample, atol=1e-3)
    both = model(sample, 5, coordinates=torch.cat((whole, corner))).sample
    assert torch.allclose(both[0], default[0], atol=1e-6)
    assert torch.allclose(both[1], model(sample, 5, coordinates=corner).sample[1], atol=1e-6)


def test_the_ablation_is_a_plain_network():
    model = network(use_coordinates=False)
    assert model.conv_in.in_channels == 3
    sample = torch.randn(1, 3, 8, 8)
    corner = model.coordinate_grid(8, 8, (0, 0, 0.5, 0.5))[None]
    assert torch.equal(model(sample, 5).sample, model(sample, 5, coordinates=corner).sample)


def test_a_sampling_loop_encodes_once(monkeypatch):
    model, calls = network(), []
    encode = model.encode_coordinates
    monkeypatch.setattr(model, "encode_coordinates", lambda grid: calls.append(1) or encode(grid))
    sample, grid = torch.randn(2, 3, 8, 8), model.coordinate_grid(8, 8)[None]
    for coordinates, expected in ((grid, 1), (None, 2)):
        for _ in range(3):
            model(sample, 5, coordinates=coordinates)
        assert len(calls) == expected
    for _ in range(2):  # training goes back and forth between levels
        model(sample, 5), model(torch.randn(1, 3, 16, 16), 5)
    assert len(calls) == 3
    first = model(sample, 5, coordinates=grid).sample
    grid.mul_(0.5)
    assert not torch.equal(first, model(sample, 5, coordinates=grid).sample), "a grid changed in place is encoded anew"


def test_config_survives_saving(tmp_path):
    model = network(image_channels=1, num_frequencies=4, resolutions=[8, (16, 24)])
    model.save_pretrained(tmp_path)
    loaded = CoordinateUNet2DModel.from_pretrained(tmp_path)
    for name in ("image_channels", "in_channels", "out_channels", "num_frequencies", "use_coordinates"):
        assert loaded.config[name] == model.config[name]
    assert loaded.config.in_channels == 1 and loaded.conv_in.in_channels == 17
    assert [size if isinstance(size, int) else tuple(size) for size in loaded.config.resolutions] == [8, (16, 24)]
    sample = torch.randn(1, 1, 8, 8)
    assert torch.allclose(loaded(sample, 7).sample, model(sample, 7).sample, atol=1e-6)


def test_copies_and_pickles_after_a_forward():
    model, sample = network(), torch.randn(1, 3, 8, 8)
    expected = model(sample, 1).sample
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(sample, 1).sample, expected)


@pytest.mark.parametrize(("size", "shape"), [(8, (2, 1, 8, 8)), ((8, 12), (2, 1, 8, 12))])
def test_stock_pipelines_draw_noise_of_the_right_shape(size, shape):
    """The stock pipeline gives what its loop gives by hand, from noise of the image's channels and largest size."""
    model, scheduler = network(image_channels=1, resolutions=(4, size)), DDPMScheduler()
    pipeline = DDPMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(shape, generator=generator)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            sample = scheduler.step(model(sample, timestep).sample, timestep, sample, generator=generator).prev_sample
    expected = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    with torch.device("meta"):
        model = CoordinateUNet2DModel.from_preset(name, image_channels=1)
    assert model.conv_in.in_channels == 25 and model.config.resolutions is not None
    multiple = 2 ** (len(model.config.block_out_channels) - 1)
    assert all(size % multiple == 0 for size in model.config.resolutions)


def test_the_paper_preset_is_the_papers_network():
    with torch.device("meta"):
        config = CoordinateUNet2DModel.from_preset("paper").config
    assert config.block_out_channels[0] == 64 and config.layers_per_block == 1 and config.num_frequencies == 6
    assert list(config.resolutions) == [64, 128, 256]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(image_channels=0), "image_channels=0"),
        (dict(num_frequencies=0), "num_frequencies=0"),
        (dict(in_channels=5), "in_channels=5"),
        (dict(center_input_sample=True), "center_input_sample=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_bad_preset_and_bad_coordinates():
    with pytest.raises(ValueError, match="name='huge'.*small"):
        CoordinateUNet2DModel.from_preset("huge")
    with pytest.raises(ValueError, match=r"coordinates of shape \(1, 2, 4, 4\): expected \(1, 2, 8, 8\)"):
        network()(torch.randn(1, 3, 8, 8), 1, coordinates=torch.zeros(1, 2, 4, 4))


def test_inference_mode():
    model = network()
    with torch.inference_mode():
        grid = model.coordinate_grid(8, 8)[None]
        assert model(torch.randn(1, 3, 8, 8), 1, coordinates=grid).sample.shape == (1, 3, 8, 8)
