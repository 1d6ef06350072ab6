"""The bench of paper X's noise process, on random images and untrained toys."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pixel_aware_process as bench
import process_measures as measures
import process_models as models
import pytest
import report
import torch

import pyrdiff

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and an exported model of each mode."""
    folder = tmp_path_factory.mktemp("bench_process")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    pixels[:, :8] //= 20  # half of them is dark
    np.save(folder / "images.npy", pixels)
    for mode, output, head in (("paper", "scale", "literal"), ("structure", "structure", "tied")):
        torch.manual_seed(0)
        unet = pyrdiff.ParallelTrajectoryUNet2DModel(
            image_channels=1, sample_size=16, encoder_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            attention_head_dim=None, time_embedding_dim=16, num_train_timesteps=STEPS, head=head,
            target="noise" if mode == "paper" else "clean",
        )  # fmt: skip
        autoencoder = pyrdiff.ScaleAutoencoder(
            image_channels=1, sample_size=16, block_out_channels=(8,), bottleneck_channels=2, latent_dim=4,
            norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=STEPS, output=output, prior="normal",
        )  # fmt: skip
        scheduler = pyrdiff.PixelAwareScheduler(STEPS, 20.0, mode=mode)
        pyrdiff.ParallelTrajectoryPipeline(unet, autoencoder, scheduler).save_pretrained(folder / mode / "pipeline")
    line = {"step": 7, "loss": 1.0, "seconds": 120.0}
    (folder / "paper" / "log.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "paper" / "settings.json").write_text(json.dumps({"train_batch_size": 4}))
    return folder


def arguments(folder: Path, *flags) -> list[str]:
    common = ["--images", folder / "images.npy", "--size", 16, "--channels", 1, "--count", 24, "--held_images", 8]
    common += ["--known_images", 4, "--recon_images", 4, "--leak_steps", 3, "--threads", 1]
    return ["bench", *map(str, [*common, "--output", folder / "result.json", *flags])]


@pytest.fixture(scope="module")
def result(folder) -> dict:
    models = ["--paper_model", folder / "paper" / "pipeline", "--structure_model", folder / "structure" / "pipeline"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(folder, *models, "--strips", folder / "strips.png"))
        bench.main()
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def images(folder):
    """The images as the bench has them, in its order."""
    pixels = torch.from_numpy(np.load(folder / "images.npy")).double()[:, None] / 255
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    return (0.004 + 0.996 * pixels)[order]


def test_pixels_become_noise_as_the_closed_forms_say(result, images):
    part = result["parts"]["convergence"]
    rows = {row["name"]: row for row in part["rows"]}
    assert len(rows) == 5 and part["dark"] == pytest.approx((images <= 0.004 + 0.996 * 0.05).double().mean().item())
    floors = {"paper, T=200": (20, 0, 1), "paper, T=500": (50, 0, 1), "shipped, T=200": (20, 0.1, 3)}
    for name, (gamma, floor, power) in floors.items():
        for k, fraction in enumerate(part["fractions"]):
            kept = (-gamma * (images + floor) * fraction**power).exp()
            mean = (kept.sqrt() * images).mean()
            variance = (kept * images**2 + 1 - kept).mean() - mean**2
            assert rows[name]["expected_mean"][k] == pytest.approx(mean.item(), abs=1e-6)
            assert rows[name]["expected_variance"][k] == pytest.approx(variance.item(), abs=1e-5)
        assert rows[name]["darkest_keeps"] == pytest.approx(kept[images == images.min()][0].item(), rel=1e-4)
    ddpm = rows["DDPM, T=500"]
    kept = torch.linspace(1e-4, 0.02, 500, dtype=torch.float64).neg().log1p().sum().exp().item()
    assert ddpm["darkest_keeps"] == pytest.approx(kept, rel=1e-3)
    assert ddpm["expected_mean"][-1] == pytest.approx(kept**0.5 * images.mean().item(), rel=1e-3)
    for row in rows.values():
        for what in ("mean", "variance"):
            assert row[what] == pytest.approx(row[f"expected_{what}"], abs=0.1), row["name"]
    assert rows["paper, T=200"]["dark_variance"] < 0.5 < 0.8 < ddpm["dark_variance"]


def test_the_gap_is_the_closed_form(result, images):
    rows = result["parts"]["gap"]["rows"]
    assert [(row["gamma"], row["floor"]) for row in rows] == [(g, f) for g in (20, 50) for f in (0, 0.05, 0.1, 0.25)]
    for row in rows:
        left = (-row["gamma"] * (images + row["floor"])).exp()
        gap = 0.5 * (images**2 * left - left - torch.log1p(-left))
        assert row["kl_per_pixel"] == pytest.approx(gap.mean().item(), rel=1e-4)
        assert row["kl_per_image"] == pytest.approx(256 * gap.mean().item(), rel=1e-4)
        assert row["worst_pixel"] == pytest.approx(gap.max().item(), rel=1e-4)
        assert 0 <= row["information_per_pixel"] < row["kl_per_pixel"]  # the gap to any one prior bounds it
        assert row["information_per_image"] == pytest.approx(256 * row["information_per_pixel"])
    leak = result["parts"]["gap"]["leak"]
    constant = (images[:-8].mean(0) - images[-8:]).square().mean().item()
    assert leak["constant_mse"] == pytest.approx(constant, rel=1e-4) and leak["fit_images"] == 16
    for row in leak["rows"]:
        assert row["share"] == pytest.approx(row["mse"] / constant, rel=1e-3)
        assert row["share"] == pytest.approx(1, abs=0.2), "next to nothing is learned in 3 steps"


@pytest.mark.parametrize("settings", [dict(), dict(gamma=5.0), dict(floor=0.1), dict(floor=0.02)], ids=str)
@pytest.mark.parametrize("levels", [(7,), (0, 255), (0, 10, 10), (3, 40, 90, 200)], ids=str)
def test_the_information_is_that_of_a_mixture(settings, levels):
    """Of the definition, an integral over each component in its own units; the bench has one grid for all."""
    process = measures.paper_process(**settings)
    values = process.to_range(torch.tensor(levels).double() / 255)
    found = measures.information(process, values.reshape(1, 1, 1, -1).expand(2, 3, 4, -1))
    left = process.image_scale(values)
    components = torch.distributions.Normal(left.sqrt() * values, (1 - left).sqrt())
    white = torch.linspace(-9, 9, 4001).double()
    points = components.mean[:, None] + components.stddev[:, None] * white
    mixture = torch.logsumexp(components.log_prob(points[..., None]), -1) - math.log(len(levels))
    ratio = components.log_prob(points.T).T - mixture
    wanted = torch.trapezoid(ratio * (-0.5 * white**2).exp() / (2 * math.pi) ** 0.5, white).mean().item()
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_the_floor_that_is_needed_is_the_least_one(images, tolerance):
    floor = measures.floor_needed(images, 20.0, tolerance)
    gaps = [measures.paper_process(floor=share * floor).prior_gap_report(images)["kl_per_pixel"] for share in (1, 0.98)]
    assert gaps[0] <= tolerance < gaps[1]
    assert measures.floor_needed(images.clamp(min=0.5), 60.0) == 0


def test_a_network_reads_the_image_where_dark_pixels_keep_theirs(images):
    options = type("Options", (), {"seed": 0, "leak_steps": 60, "held_images": 32})
    dark = (torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    found = measures.leak(0.004 + 0.996 * dark, options)
    shares = {(row["gamma"], row["floor"]): row["share"] for row in found["rows"]}
    assert shares[20, 0.0] < 0.9 < shares[20, 0.25]


def test_known_noises(result, images):
    part = result["parts"]["known"]
    assert part["times"] == [200, 100, 50, 20]
    clean = images[-4:]
    rate = 20 * clean
    for time, given in zip(part["times"], part["variance"], strict=True):
        total = torch.zeros_like(clean)  # sum of S_{j-1} (S_j - S_{j-1}) / S_j
        for step in range(2, time + 1):
            late, early = torch.expm1(rate * step / 200), torch.expm1(rate * (step - 1) / 200)
            total += early * (late - early) / late
        assert given == pytest.approx(total.mean().item(), rel=1e-4)
    multiples = {}
    for row in part["rows"]:
        multiples[row["source"], row["reading"], row["fresh"], row["inaccuracy"]] = row["multiple"]
        for error, variance in zip(row["errors"], part["variance"], strict=True):
            assert error["clipped"] <= error["raw"]
            if row["inaccuracy"] == 0:
                assert error["expected"] == pytest.approx(row["multiple"] * variance)
            if row["multiple"] == row["inaccuracy"] == 0:
                assert error["raw"] < 1e-15, "exact"
        for error in row["errors"][2:]:  # the earlier times, where not a few white pixels are all of the error
            if error["expected"]:
                assert error["raw"] == pytest.approx(error["expected"], rel=0.4)
    assert len(multiples) == 16
    assert [multiples["of the path", "A", fresh, 0] for fresh in (1, 0)] == [2, 1]
    assert [multiples["of the path", "B", fresh, 0] for fresh in (1, 0)] == [1, 0]
    assert [multiples["optimal", reading, fresh, 0] for reading in "AB" for fresh in (1, 0)] == [1, 0, 1, 0]


def test_scales_of_the_models(result, folder, images):
    rows = result["parts"]["scales"]["rows"]
    assert [(row["model"], row["step"]) for row in rows] == [
        (model, step) for model in ("paper", "structure") for step in (2, 10, 20, 40)
    ]
    held, fit = images[-8:], images[:-8]
    constant = ((-20 * fit).exp().mean(0) - (-20 * held).exp()).square().mean().item()
    for row in rows:
        assert row["constant"]["clean"]["mse"] == pytest.approx((fit.mean(0) - held).square().mean().item(), rel=1e-4)
        assert row["constant"]["scale"]["mse"] == pytest.approx(constant, rel=1e-4)
        for what in row["found"].values():
            assert -1 <= what["ssim"] <= 1
    pipeline = pyrdiff.load(folder / "paper" / "pipeline")
    noisy = models.noisy_images(pipeline.scheduler, held.float(), 10, 2)
    with torch.no_grad():
        scale = pipeline.autoencoder(noisy, 10).structure
    found = rows[1]["found"]
    assert found["scale"]["mse"] == pytest.approx((scale - (-20 * held).exp()).square().mean().item(), rel=1e-4)
    brightness = (-scale.log() / 20).clamp(0.004, 1)
    assert found["clean"]["mse"] == pytest.approx((brightness - held).square().mean().item(), rel=1e-4)


def test_an_exact_scale_has_an_ssim_of_one(images):
    process = pyrdiff.PixelAwareScheduler(STEPS, 20.0, mode="paper")
    true = models.views_of(process, images[:4].float(), 10)
    for what in true:
        exact = models.compared(true[what], true[what])
        assert exact == {"mse": 0, "ssim": pytest.approx(1), "correlation": pytest.approx(1)}
    assert torch.allclose(true["alpha_bar"], true["scale"] ** (10 / STEPS), atol=1e-6), "eq. 9"
    assert models.compared(torch.ones(1, 1, 16, 16), torch.rand(1, 1, 16, 16))["correlation"] is None


def test_reconstructions_of_the_models(result, folder, images):
    part = result["parts"]["reconstruction"]
    rows = {(row["model"], row["name"]): row["errors"] for row in part["rows"]}
    assert list(rows) == [
        ("paper", "autoencoder alone"),
        ("paper", "algorithm 1, eta 1"),
        ("paper", "algorithm 1, eta 0"),
        ("structure", "autoencoder alone"),
        ("structure", "1 pass"),
        ("structure", "4 passes"),
    ]
    for errors in rows.values():
        assert [error["step"] for error in errors] == [40, 20, 10, 4, 1]
        assert all(error["raw"] >= 0.99 * error["clipped"] for error in errors)
    fresh, plain = (rows["paper", f"algorithm 1, eta {eta}"] for eta in (1, 0))
    assert fresh[0]["raw"] > plain[0]["raw"], "fresh noise is never taken back"
    # An untrained network predicts 0: what is left is the preconditioning.
    pipeline = pyrdiff.load(folder / "structure" / "pipeline")
    clean = images[-4:].float()
    for error in rows["structure", "1 pass"]:
        noisy = models.noisy_images(pipeline.scheduler, clean, error["step"], 3)
        with torch.no_grad():
            structure = pipeline.autoencoder(noisy, error["step"]).structure
        skip = pipeline.scheduler.precondition(noisy, error["step"], structure)[1]
        assert error["raw"] == pytest.approx((skip - clean).square().mean().item(), rel=1e-3)
        assert error["clipped"] == pytest.approx((skip.clamp(0, 1) - clean).square().mean().item(), rel=1e-3)


def test_tables_and_strips(result, folder):
    path = folder / "result.json"
    whole = report.table_of(path)
    for view in bench.PARTS:
        text = report.table_of(path, view)
        assert text in whole and text.count("16x16") == 1 and "nan" not in text
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == (2 if view == "gap" else 1)
    assert "trained for 7 steps, 2 min" in report.table_of(path, "scales")
    from PIL import Image

    cell = 16 + 2  # pixels and gap
    assert Image.open(folder / "strips.png").size == (13 * cell + 2, 8 * cell + 2)


def test_parts_without_models(folder, monkeypatch):
    output = folder / "few.json"
    monkeypatch.setattr(sys, "argv", arguments(folder, "--parts", "convergence", "--output", output))
    bench.main()
    assert list(json.loads(output.read_text())["parts"]) == ["convergence"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--count", 0], "--count 0: expected 4 or more"),
        (["--images", "/nowhere"], "'/nowhere' does not exist"),
        (["--held_images", 13], "--held_images 13: expected at most half of the 24 images"),
        (["--known_images", 9], "--known_images 9: expected at most --held_images 8"),
        (["--parts", "scales"], "expected --paper_model or --structure_model"),
        (["--parts", "all"], "invalid choice: 'all'"),
        (["--strips", "strips.gif"], "expected a name that ends in .png"),
        (["--paper_model", "structure/pipeline"], "expected mode 'paper', with an autoencoder whose output is 'scale'"),
        (["--structure_model", "structure/pipeline", "--size", 32], "made for images [1, 16, 16]"),
        (["--structure_model", "nothing"], "expected a folder"),
    ],
)
def test_a_bad_argument_is_one_line(folder, monkeypatch, capsys, flags, said):
    flags = [folder / flag if flag in ("structure/pipeline", "nothing") else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", arguments(folder, *flags))
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
