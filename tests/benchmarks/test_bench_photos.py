"""The bench of enlarged photographs, on an untrained toy; and its measure of ringing in closed form."""

import json
import math
import sys

import numpy as np
import photos
import pytest
import torch
from PIL import Image
from ringing import ringing

import pyrdiff
from pyrdiff.data import degrade, shrink


def step(height: int = 48, width: int = 96) -> torch.Tensor:
    """Two smooth halves."""
    return torch.where(torch.arange(width) < width // 2, 0.3, 0.7).expand(1, 1, height, width).contiguous()


def test_ringing_is_what_is_added_to_smooth_places_near_edges():
    truth = step()
    wave = torch.sin(math.pi / 2 * torch.arange(48.0) + 0.4)[:, None]  # of 4 pixels: its mean of 9 is a ninth of it
    for strength in (0.01, 0.04):
        expected = 255 * strength * wave.square().mean().sqrt().item()
        assert ringing(truth + strength * wave, truth) == pytest.approx(expected, rel=0.13)
    assert ringing(truth, truth) == 0
    assert ringing(truth + 0.1, truth) == pytest.approx(0, abs=1e-3), "brightness is no ringing"
    far = torch.arange(96) >= 80
    assert ringing(truth + 0.2 * wave * far, truth) < 0.2, "too far from the edge"
    assert ringing(truth, torch.full_like(truth, 0.5)) is None


@pytest.fixture
def folder(tmp_path):
    """A model for x2, and two images with what is made of them."""
    torch.manual_seed(0)
    unet = pyrdiff.ShuffledSRModel(
        block_out_channels=(8, 8), layers_per_block=(1, 1), scale_factors=(2,), sees_sample=False
    )
    scheduler = pyrdiff.CosineResidualScheduler(1, prediction_type="sample")
    plans = {"default": {"num_inference_steps": 1}}
    pyrdiff.hub.export(pyrdiff.ResidualSRPipeline(unet, scheduler, plans), tmp_path / "model")
    (tmp_path / "high").mkdir()
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (24, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "high" / f"{name}.png")
    return tmp_path


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["photos.py", *map(str, flags)])
    photos.main()


def test_inputs_are_those_of_the_library(folder, monkeypatch):
    for kind in ("bicubic", "realistic"):
        run(monkeypatch, "inputs", "--high", folder / "high", "--output", folder / kind, "--factor", 2,
            "--degradation", kind, "--strength", 0.5)  # fmt: skip
    high = (
        torch.from_numpy(np.array(Image.open(folder / "high" / "b.png"))).permute(2, 0, 1)[None, ..., :32] / 127.5 - 1
    )
    draws = photos.Draws(0, 1, device=torch.device("cpu"))
    for kind, expected in (
        ("bicubic", shrink(high, 2)),
        ("realistic", degrade(high, 2, "realistic", draws, torch.tensor([0.5]))),
    ):
        pixels = np.array(Image.open(folder / kind / "b.png"))
        assert np.array_equal(pixels, ((expected[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_every_arm_has_a_row(folder, monkeypatch):
    monkeypatch.setattr(
        "pyrdiff.metrics.lpips", lambda a, b, *, network, weights, **known: pyrdiff.metrics.psnr(a, b, **known)
    )
    run(monkeypatch, "inputs", "--high", folder / "high", "--output", folder / "low", "--factor", 2)
    made = folder / "other" / "toy, realistic"
    made.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        almost = Image.open(folder / "high" / name)
        almost.putpixel((8, 8), (128, 128, 128))
        almost.save(made / name)
    told = {"toy, realistic": {"seconds": {"a.png": 1.0, "b.png": 2.0}}}
    (folder / "other" / "seconds.json").write_text(json.dumps(told))
    run(monkeypatch, "measure", "--factor", 2, "--sets", f"toy, realistic={folder / 'low'},{folder / 'high'}",
        "--models", f"ours={folder / 'model'}", "--files", f"other={folder / 'other'}", "--details", 0, 1,
        "--pictures", folder / "pictures", "--output", folder / "result.json")  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    rows = {row["name"]: row for row in result["sets"][0]["rows"]}
    ours = ["ours, detail 0", "ours, detail 1", "ours, restore 0.5", "ours, restore 1"]
    assert list(rows) == ["bicubic", "other", *ours]
    other, bicubic = rows["other"], rows["bicubic"]
    assert other["psnr_y"] > 30 > bicubic["psnr_y"]
    assert other["seconds_a_megapixel"] == pytest.approx(3 / (2 * 24 * 32 / 1e6))
    assert rows["ours, detail 0"]["psnr_y"] == pytest.approx(bicubic["psnr_y"], abs=0.01), "it has learnt nothing yet"
    assert len(list((folder / "pictures").rglob("*.png"))) == 12
    assert photos.table(result).count("\n|") == 8
    card = folder / "model" / "README.md"
    before = card.read_text()
    run(monkeypatch, "card", "--result", folder / "result.json", "--output", card)
    assert "| ours, detail 1 |" in card.read_text() and "Not measured" not in card.read_text()
    assert card.read_text().split("## Training")[1] == before.split("## Training")[1]
