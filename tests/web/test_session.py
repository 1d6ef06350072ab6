"""The work behind the page, without a browser: what is shown is what was made, and nothing a user gives breaks it."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

import pyrdiff
from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    GuidedSRPipeline,
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    PyramidalPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
    ScaleAutoencoder,
)
from pyrdiff.web import run as running
from pyrdiff.web.events import Level, Progress, Result
from pyrdiff.web.session import STATES, Session

PLANS = {"fast": {"num_inference_steps": 2, "refine_steps": [2]}, "long": {"num_inference_steps": 4, "refine_steps": 3}}


def network(channels: int = 3) -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    return CoordinateUNet2DModel(
        image_channels=channels, resolutions=(6, 8), block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def pyramid(channels: int = 3) -> Session:
    """6x6 pixels, which the network rounds to 6, then 8x8."""
    unet = network(channels)
    enlarger = GuidedSRPipeline(unet, DDPMScheduler(100))
    return Session(PyramidalPipeline(unet, DDPMScheduler(100), plans=PLANS), enlarger, max_megapixels=1)


def pixel_aware() -> Session:
    torch.manual_seed(0)
    sizes = dict(image_channels=1, norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=20)
    unet = ParallelTrajectoryUNet2DModel(encoder_channels=(4, 8), layers_per_block=1, **sizes)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    autoencoder = ScaleAutoencoder(
        sample_size=8, block_out_channels=(8,), latent_dim=3, bottleneck_channels=4, prior="normal", **sizes
    )
    return Session(ParallelTrajectoryPipeline(unet, autoencoder, PixelAwareScheduler(20)))


def enlarger() -> Session:
    torch.manual_seed(0)
    unet = ResidualSRUNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, scale_factors=(2, 3)
    )  # fmt: skip
    plans = {"default": {"num_inference_steps": 3}, "short": {"num_inference_steps": 2}}
    return Session(ResidualSRPipeline(unet, CosineResidualScheduler(100), plans))


class OtherPipeline(DiffusionPipeline):
    """Of a third party: no plans, no levels, no callback, and a tuple for an output."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=4):
        image = torch.randn(batch_size, 3, 8, 8, generator=generator if batch_size == 1 else generator[0])
        for time_ in range(num_inference_steps, 0, -1):
            image = image - 0.1 * self.unet(image, time_).sample
        return (self.numpy_to_pil((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()),)


def other() -> Session:
    torch.manual_seed(0)
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    return Session(OtherPipeline(unet, DDPMScheduler(100)))


def events(generator) -> tuple[list[Progress], list[Level], list[Result]]:
    found = list(generator)
    return tuple([each for each in found if isinstance(each, kind)] for kind in (Progress, Level, Result))


def same(one, two) -> bool:
    return [image.tobytes() for image in one] == [image.tobytes() for image in two]


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def each_call(monkeypatch):
    """Progress at every network call, however fast they are."""
    monkeypatch.setattr(running, "SECONDS_BETWEEN", 0.0)


# What a model can do.


@pytest.mark.parametrize("make, tabs", [
    (pyramid, (True, True, False, True)),
    (pixel_aware, (True, False, True, True)),
    (enlarger, (False, True, False, True)),
    (other, (True, False, False, True)),
])  # fmt: skip
def test_the_pipeline_says_what_it_can_do(make, tabs):
    session = make()
    assert (session.generates, session.enlarger is not None, session.has_trajectory, session.compares) == tabs
    assert "parameters" in session.description() and "\n" not in session.description()


def test_what_it_says_of_plans_and_steps():
    session = pyramid()
    assert session.plans() == {"fast": "2 + 2 calls", "long": "4 + 3 calls"}
    assert session.steps() == {"num_inference_steps": 100, "refine_steps": 8}
    assert pixel_aware().steps() == {"num_passes": 1} and pixel_aware().channels == 1
    assert enlarger().plans() == {"default": "", "short": ""} and enlarger().scale_factors == [2, 3]


def test_a_call_that_needs_more_than_an_image_is_refused():
    class Prompted(OtherPipeline):
        def __call__(self, prompt):
            pass

    with pytest.raises(ValueError, match="Prompted needs .'prompt'.: expected a call without, or with an image"):
        Session(Prompted(network(), DDPMScheduler()))


def test_a_saved_model_opens(tmp_path):
    pyrdiff.hub.export(pyramid().pipeline, tmp_path / "model")
    session = Session.open(str(tmp_path / "model"), device="cpu")
    assert session.enlarger is not None and session.name == str(tmp_path / "model")
    with pytest.raises(ValueError, match="device='abacus'"):
        Session.open(str(tmp_path / "model"), device="abacus")
    with pytest.raises(ValueError, match="nowhere"):
        Session.open(str(tmp_path / "nowhere"))


# What it shows.


@pytest.mark.parametrize("arguments", [{"plan": "fast"}, {"steps": {"num_inference_steps": 3, "refine_steps": 2}}])
def test_the_levels_shown_are_those_that_the_call_returns(arguments):
    session = pyramid()
    resolutions = dict(session.pipeline.unet.config)["resolutions"]
    shown, final = [], None
    for event in session.generate(2, 5, **arguments):
        if isinstance(event, Level):
            shown.append([image.copy() for image in event.images])
        final = event
    generator = [torch.Generator().manual_seed(5 + index) for index in range(2)]
    direct = {"plan": "fast"} if "plan" in arguments else arguments["steps"]
    expected = session.pipeline(2, generator=generator, return_levels=True, **direct)
    assert len(shown) == len(expected.levels) == len(resolutions)
    assert all(same(one, two) for one, two in zip(shown, expected.levels, strict=True))
    assert same(final.images, expected.images) and same(final.levels[-1].images, expected.images)


def test_levels_of_sizes_that_the_network_rounds_up(monkeypatch):
    session = pyramid()
    sizes = session.pipeline.plan(resolutions=[5, 9]).levels
    assert sizes[0].network_size == (6, 6) and sizes[0].size == (5, 5)
    monkeypatch.setitem(session.pipeline.config.plans, "odd", {"resolutions": [5, 9], **PLANS["fast"]})
    shown = []
    for event in session.generate(1, 0, "odd"):
        if isinstance(event, Level):
            shown.append((event.size, [image.copy() for image in event.images]))
    direct = session.pipeline(1, generator=torch.Generator().manual_seed(0), plan="odd", return_levels=True)
    assert [size for size, _ in shown] == [(5, 5), (9, 9)]
    assert all(same(one, two) for (_, one), two in zip(shown, direct.levels, strict=True))


def test_costs_are_those_of_the_plan(each_call):
    session = pyramid()
    progress, levels, (result,) = events(session.generate(2, 0, "long"))
    plan = session.pipeline.plan(plan="long")
    assert result.calls == plan.network_calls == 7 and result.nfe_eq == pytest.approx(plan.nfe_eq)
    assert [level.calls for level in levels] == [4, 3]
    assert [level.nfe_eq for level in levels] == [level.nfe_eq for level in plan.levels]
    assert all(level.seconds > 0 for level in levels)
    assert sum(level.seconds for level in levels) <= result.seconds  # each level's own, not from the start
    fractions = [each.fraction for each in progress]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and progress[-1].steps == 7


def test_a_pipeline_of_a_third_party():
    session = other()
    progress, levels, (result,) = events(session.generate(1, 3, steps={"num_inference_steps": 5}))
    assert (result.calls, levels) == (5, []) and len(result.images) == 1
    assert progress[0].fraction is None
    direct = session.pipeline(generator=torch.Generator().manual_seed(3), num_inference_steps=5)[0]
    assert same(result.images, direct)


def test_trajectory():
    session = pixel_aware()
    _, _, (result,) = events(session.trajectory(2, 1, {"num_passes": 2}))
    titles = [title for title, _ in result.columns]
    assert titles[0] == "structure" and titles[1] == "t = 20" and titles[-1] == "image"
    assert len(titles) == 2 + STATES and result.calls == 2
    generator = [torch.Generator().manual_seed(1 + index) for index in range(2)]
    assert same(result.columns[-1][1], session.pipeline(2, num_passes=2, generator=generator).images)


def test_comparing_plans_and_steps():
    session = pyramid()
    progress, _, results = events(session.compare(["fast", "long"], "num_inference_steps", "3", 2, 7))
    assert [each.name for each in results] == ["fast", "long", "num_inference_steps = 3"]
    assert [each.calls for each in results] == [4, 7, 11] and all(each.seconds > 0 for each in results)
    assert progress[0].task == "warm-up"
    for name, result in zip(("fast", "long"), results, strict=False):
        direct = session.pipeline(2, plan=name, generator=[torch.Generator().manual_seed(7 + k) for k in range(2)])
        assert same(result.images, direct.images)
    _, _, results = events(pixel_aware().compare([], "num_passes", "1, 2"))
    assert [each.nfe_eq for each in results] == [1, 2]


def test_comparing_plans_that_enlarge(picture):
    _, _, results = events(enlarger().compare(["default", "short"], path=picture, scale_factor=2))
    assert [(each.calls, each.images[0].size) for each in results] == [(3, (10, 12)), (2, (10, 12))]


# Enlarging.


def test_enlarging_guided_and_trained(picture):
    for session, steps in ((pyramid(), {"refine_steps": 2}), (enlarger(), {"num_inference_steps": 2})):
        _, _, (result,) = events(session.enlarge(picture, 2, 8, 3, steps=steps))
        direct = session.enlarger(Image.open(picture), scale_factor=2, tile=8, **steps,
                                  generator=torch.Generator().manual_seed(3))  # fmt: skip
        assert same(result.images, direct.images) and result.images[0].size == (10, 12)
        assert same([result.before], [Image.open(picture).resize((10, 12), Image.Resampling.BICUBIC)])
        assert result.consistency == pytest.approx(float(direct.consistency[0]))


def test_tiles_are_progress(picture, each_call):
    progress, _, (result,) = events(pyramid().enlarge(picture, 4, 8, steps={"refine_steps": 2}))
    windows = max(each.window for each in progress)
    assert windows > 4 and result.calls > 8 and progress[-1].steps == 4
    fractions = [each.fraction for each in progress]
    assert len(set(fractions)) > 8 and fractions[-1] == 1.0  # it moves within a step


def test_alpha_gray_and_orientation_are_said(tmp_path):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    read, notes = pyramid().read(str(tmp_path / "a.png"))
    assert read.mode == "RGB" and read.size == (2, 4) and read.getpixel((0, 0)) == (255, 255, 255)
    assert any("laid on white" in note for note in notes)
    read, notes = pyramid(1).read(str(tmp_path / "a.png"))
    assert read.mode == "L" and any("made gray" in note for note in notes)
    Image.new("L", (4, 2)).save(tmp_path / "b.png")
    read, notes = pyramid().read(str(tmp_path / "b.png"))
    assert read.mode == "RGB" and notes == ["gray taken as colour, for this model"]
    tall = Image.new("RGB", (4, 2))
    tall.save(tmp_path / "c.jpg", exif=exif)
    read, notes = pyramid().read(str(tmp_path / "c.jpg"))
    assert read.size == (2, 4) and notes == ["turned upright, as its orientation tag says"]


# What users give.


def huge_png(path: Path, width: int = 20_000, height: int = 10_000) -> Path:
    """A good PNG of half a megabyte, that would be 600 megabytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, row = zlib.compressobj(1), bytes(1 + 3 * width)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "text":
        path.write_text("no picture\n")
    elif kind == "empty":
        path.touch()
    elif kind == "broken":
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "damaged":
        Image.fromarray(noise).save(path)
        data = bytearray(path.read_bytes())
        data[20:24] = b"\0\0\0\0"  # no rows
        path.write_bytes(data)
    elif kind == "animated":
        frames = [Image.fromarray(noise), Image.fromarray(noise[::-1])]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "deep":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(path)
    elif kind == "heavy":
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
        with open(path, "r+b") as file:
            file.truncate(65_000_001)
    return path


@pytest.mark.parametrize("kind, said", [
    ("text", "text.png cannot be used: not an image; expected one of PNG, JPEG, WEBP, TIFF, BMP, GIF."),
    ("empty", "empty.png cannot be used: not an image; expected one of PNG, JPEG, WEBP, TIFF, BMP, GIF."),
    ("broken", "broken.png cannot be used: image file is truncated"),
    ("damaged", "damaged.png cannot be used: "),
    ("animated", "animated.png cannot be used: 2 frames or pages: expected one."),
    ("deep", "deep.png cannot be used: 16-bit pixels: expected 8 bits a channel."),
    ("heavy", "heavy.png cannot be used: 65 MB; expected at most 64."),
])  # fmt: skip
def test_a_bad_upload_is_one_sentence(tmp_path, kind, said):
    session = pyramid()
    with pytest.raises(ValueError) as raised:
        session.enlarge(str(bad_file(kind, tmp_path)))
    text = str(raised.value)
    assert text.startswith(said) and "\n" not in text and str(tmp_path) not in text and text.endswith("."), text
    _, _, (result,) = events(session.generate(1, 0, "fast"))  # and it works on
    assert len(result.images) == 1


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    path = huge_png(tmp_path / "bomb.png")
    assert path.stat().st_size < 4e6
    limit = Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    resident = resident_mb()
    with pytest.raises(ValueError) as raised:
        pyramid().enlarge(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(raised.value) == "bomb.png cannot be used: 20000×10000 are 200 megapixels; expected at most 1."
    assert peak < 50e6 and peak_mb() - resident < 300
    assert limit == Image.MAX_IMAGE_PIXELS


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def resident_mb() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    return status_mb("VmRSS")


def peak_mb() -> float:
    return status_mb("VmHWM")


def test_what_would_become_too_large(picture):
    with pytest.raises(ValueError, match="Enlarged 64 times it would have 320×384 pixels, 0 megapixels; expected"):
        session = pyramid()
        session.max_pixels = 100_000
        session.enlarge(picture, 64)


@pytest.mark.parametrize("arguments, said", [
    ({"count": 0}, "Images: got 0; expected a whole number from 1 to 16."),
    ({"count": 17}, "Images: got 17"),
    ({"count": None}, "Images: nothing is entered; expected a whole number from 1 to 16."),
    ({"seed": -1}, "Seed: got -1; expected a whole number from 0 to"),
    ({"seed": 2**63}, "Seed: got"),
    ({"seed": None}, "Seed: nothing is entered"),
    ({"steps": {"num_inference_steps": 0}}, "num_inference_steps: got 0; expected a whole number from 1 to 10000."),
    ({"steps": {"num_inference_steps": 1000}}, "num_inference_steps=1000: expected at most 100"),
    ({"plan": "unknown"}, "plan='unknown'"),
])  # fmt: skip
def test_bad_settings_are_one_sentence(arguments, said):
    session = pyramid()
    with pytest.raises(ValueError) as raised:
        list(session.generate(**{"count": 1, "seed": 0, **arguments}))
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)
    assert events(session.generate(1, 0, "fast"))[2]


def test_too_little_or_nonsense_to_compare(picture):
    with pytest.raises(ValueError, match="Got 1 to compare: choose two or more"):
        pyramid().compare(["fast"])
    with pytest.raises(ValueError, match="Numbers of steps: got '1, x'"):
        pyramid().compare([], "num_inference_steps", "1, x")
    with pytest.raises(ValueError, match="No picture yet"):
        enlarger().compare(["default", "short"])
    with pytest.raises(ValueError, match="enlarges pictures and generates none"):
        enlarger().generate(1, 0)
