"""What the page offers to copy is what it did: the Python draws the same image, the command is read by the parser."""

import shlex
from dataclasses import asdict

import pytest
from PIL import Image
from test_session import enlarger, events, pixel_aware, pyramid, same
from test_steering import with_classes

import pyrdiff
from pyrdiff.cli import parse
from pyrdiff.commands.recipes import text_of
from pyrdiff.commands.sample import SampleSettings, call_arguments, drawn_by
from pyrdiff.commands.upscale import UpscaleSettings
from pyrdiff.web.session import Session
from pyrdiff.web.snippets import Request, enlarging, generating


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a session's model, and opens it as a visitor would, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def save(session: Session) -> Session:
        pyrdiff.hub.export(session.pipeline, tmp_path / "my model")
        return Session.open("my model", device="cpu")

    return save


def read_command(command: str, name: str, settings: type) -> object:
    """The settings that the real parser reads."""
    program, given, *flags = shlex.split(command)
    assert (program, given) == ("pyrdiff", name)
    return parse(settings, "", flags)


@pytest.mark.parametrize("request_", [
    Request(7, 2, "fast"),
    Request(7, 1, None, {"num_inference_steps": 3, "refine_steps": 2}),
], ids=["plan", "steps"])  # fmt: skip
def test_what_is_generated(saved, tmp_path, request_):
    session = saved(pyramid())
    python, command = generating(session, request_)
    exec(compile(python, "copied", "exec"), {})
    _, _, (result,) = events(session.generate(request_.count, 7, request_.plan, request_.steps))
    written = [Image.open(tmp_path / f"{7 + index:05d}.png") for index in range(request_.count)]
    assert same(written, result.images)
    settings = read_command(command, "sample", SampleSettings)
    assert (settings.model, settings.num_images, settings.seed) == ("my model", request_.count, 7)
    assert call_arguments(settings) == request_.ways()


def test_classes_and_guidance(saved, tmp_path):
    session = saved(with_classes())
    python, command = generating(session, Request(7, 3, "fast", classes=("dog", "cat"), guidance=2.5))
    exec(compile(python, "copied", "exec"), {})
    _, _, (result,) = events(session.generate(3, 7, "fast", classes=["dog", "cat"], guidance=2.5))
    assert same([Image.open(tmp_path / f"{seed:05d}.png") for seed in (7, 8, 9)], result.images)
    settings = read_command(command, "sample", SampleSettings)
    drawn = [drawn_by(settings, {}, seed) for seed in (7, 8, 9)]
    assert [flags["classes"] for flags in drawn] == [["dog"], ["cat"], ["dog"]]
    assert all((flags["plan"], flags["guidance_scale"]) == ("fast", 2.5) for flags in drawn)


def test_a_picture_of_the_page_is_drawn_again_by_the_command(tmp_path):
    request_ = Request(7, 2, None, {"num_inference_steps": 3, "refine_steps": 2}, classes=("dog", "cat"), guidance=2.0)
    path = tmp_path / "page.png"
    Image.new("L", (2, 2)).save(path, pnginfo=text_of(request_.flags_of("noto-emoji", 1)))
    settings = parse(SampleSettings, "", ["--config", str(path)])
    assert (settings.model, settings.seed, settings.num_images) == ("noto-emoji", 8, 1)
    said = {"num_inference_steps": 3, "refine_steps": 2, "classes": ("cat",), "guidance_scale": 2.0}
    assert call_arguments(settings) == said


def test_passes(saved, tmp_path):
    session = saved(pixel_aware())
    python, command = generating(session, Request(3, 1, None, {"num_passes": 2}))
    exec(compile(python, "copied", "exec"), {})
    _, _, (result,) = events(session.generate(1, 3, steps={"num_passes": 2}))
    assert same([Image.open(tmp_path / "00003.png")], result.images)
    assert read_command(command, "sample", SampleSettings).num_passes == 2


@pytest.mark.parametrize("make, request_", [
    (pyramid, Request(5, steps={"refine_steps": 2}, picture="a photo.png", scale_factor=2, tile=8)),
    (enlarger, Request(5, plan="short", picture="a photo.png", scale_factor=3, tile=16)),
], ids=["guided", "trained"])  # fmt: skip
def test_what_is_enlarged(saved, tmp_path, make, request_):
    session = saved(make())
    Image.linear_gradient("L").resize((6, 5)).convert("RGB").save(tmp_path / "a photo.png")
    python, command = enlarging(session, request_)
    exec(compile(python, "copied", "exec"), {})
    asked = {"scale_factor": request_.scale_factor, "tile": request_.tile, "plan": request_.plan}
    _, _, (result,) = events(session.enlarge("a photo.png", seed=5, steps=request_.steps, **asked))
    assert same([Image.open(tmp_path / f"a photo_x{request_.scale_factor:g}.png")], result.images)
    settings = asdict(read_command(command, "upscale", UpscaleSettings))
    assert (settings["model"], settings["input"]) == ("my model", "a photo.png")
    assert (settings["outscale"], settings["tile"], settings["seed"]) == (request_.scale_factor, request_.tile, 5)
    assert all(settings[name] == value for name, value in request_.ways().items())
