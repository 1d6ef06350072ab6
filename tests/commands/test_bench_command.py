"""`pyrdiff bench`: arms of one model side by side, in one JSON and one table; bad input is one line before any work."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from metrics.conftest import alexnet_file, lpips_heads, squeezenet_file  # noqa: F401
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import pyrdiff
from pyrdiff import cli, hub, metrics
from pyrdiff.commands import bench, bench_tasks
from pyrdiff.hub import card
from pyrdiff.metrics.comparison import distance_statistic
from pyrdiff.plan import bench_plans

UNIT = dict(data_range=(0, 1))
FULL = "DPM-Solver++ 20 at full size"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Exports of untrained pipelines: two that generate, one that enlarges."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    one = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = pyrdiff.CoordinateUNet2DModel(resolutions=(12, 24), layers_per_block=1, norm_num_groups=4, **one)
    plans = {"short": {"num_inference_steps": 3, "refine_steps": 2}, "tiny": {"num_inference_steps": 1}}
    pyramid = pyrdiff.PyramidalPipeline(unet, DDPMScheduler(), plans=plans)
    quick = pyrdiff.ParallelTrajectoryUNet2DModel(
        image_channels=1, sample_size=24, encoder_channels=(8,), norm_num_groups=4, attention_head_dim=8,
        num_train_timesteps=20, use_structure=False,
    )  # fmt: skip
    passes = pyrdiff.ParallelTrajectoryPipeline(quick, None, pyrdiff.PixelAwareScheduler(20))
    unet = pyrdiff.ResidualSRUNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, scale_factors=(2, 3)
    )
    plans = {"default": {"num_inference_steps": 3}, "short": {"num_inference_steps": 2, "eta": 0.0}}
    enlarge = pyrdiff.ResidualSRPipeline(unet, pyrdiff.CosineResidualScheduler(100), plans)
    made = {"pyramid": pyramid, "passes": passes, "enlarge": enlarge}
    return {name: hub.export(pipeline, folder / name) for name, pipeline in made.items()}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, models, squeezenet_file):  # noqa: F811
    """Runs the command with flags: the JSON it wrote, what it printed, the error line, and the exit code."""

    def call(model: str, *flags) -> tuple[dict | None, str, str, int]:
        output = tmp_path / "out" / "bench.json"
        given = ["--model", models.get(model, model), "--output", output, "--batch_size", 4, "--runs", 1]
        given += ["--num_images", 6, "--resamples", 5, "--features", "squeezenet", "--weights", squeezenet_file]
        monkeypatch.setattr(sys, "argv", ["pyrdiff", "bench", *map(str, [*given, *flags])])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed, said = capsys.readouterr()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2), said
        result = json.loads(output.read_text()) if output.exists() else None
        return result, printed, errors[0] if errors else "", code

    return call


def write(folder: Path, count: int, side: int, seed: int = 0) -> list[Image.Image]:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    for index, image in enumerate(images):
        image.save(folder / f"image {index}.png")
    return images


def tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def generators(indices) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in indices]


def test_a_model_that_generates(run, tmp_path, models, squeezenet_file):  # noqa: F811
    real = write(tmp_path / "real", 7, 24)
    result, printed, _, code = run("pyramid", "--reference", tmp_path / "real", "--seed", 5)
    assert code == 0 and [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    assert (result["kind"], result["pipeline"], result["task"]) == ("pyrdiff bench", "PyramidalPipeline", "generate")
    assert result["model"] == {"name": "pyramid", "revision": None}
    assert result["reference"] == {"name": "real", "images": 7}
    assert str(tmp_path) not in json.dumps(result) and str(models["pyramid"].parent) not in json.dumps(result)
    assert result["seed"] == 5 and result["versions"]["torch"] == torch.__version__
    assert list(result["arms"]) == ["short", "tiny", "default", FULL, "DDIM 50 at full size"]
    assert [arm["yardstick"] for arm in result["arms"].values()] == [False, False, False, True, True]

    pipeline = pyrdiff.load(models["pyramid"])
    pipeline.set_progress_bar_config(disable=True)
    for arm in result["arms"].values():
        plan = pipeline.plan(**arm["arguments"])
        assert arm["network_calls"] == plan.network_calls and arm["nfe_eq"] == pytest.approx(plan.nfe_eq)
        assert arm["ms_per_image"] > 0 and arm["latency_ms"] > 0
    assert [result["arms"][name]["nfe_eq"] for name in ("short", FULL)] == [3 / 4 + 2, 20]

    fake = [image for part in (range(5, 9), range(9, 11)) for image in pipeline(
        len(part), generator=generators(part), plan="short"
    ).images]  # fmt: skip
    network = metrics.open_features("squeezenet", squeezenet_file)
    settings = dict(features=network, **UNIT)
    precision, recall = metrics.precision_recall(tensor(real), tensor(fake), **settings)
    frechet = metrics.frechet_distance(tensor(real), tensor(fake), **settings)
    found = result["arms"]["short"]["metrics"]
    assert list(found) == ["FD-squeezenet", "KD-squeezenet", "precision", "recall"]
    for by_hand in (frechet, metrics.kid(tensor(real), tensor(fake), **settings), precision, recall):
        assert found[by_hand.name]["value"] == pytest.approx(by_hand.value, rel=1e-3)
    features = [network(tensor(part), **UNIT) for part in (real, fake)]
    statistics = metrics.FeatureStatistics(512).update(features[0])
    expected = metrics.bootstrap_interval(
        lambda part: statistics.distance(metrics.FeatureStatistics(512).update(part)), features[1], resamples=5
    )
    assert found["FD-squeezenet"]["interval"] == pytest.approx(expected, rel=1e-3)
    assert [row["higher_is_better"] for row in found.values()] == [False, False, True, True]
    conventions = result["conventions"]
    assert (conventions["count"], conventions["count_real"], conventions["resize"]) == (6, 7, None)
    assert conventions["features"] == network.conventions
    first, *lines, counted, following = printed.splitlines()
    assert "each way is timed 1 times" in first and counted.startswith("5 of 5 ways: ")
    assert following.startswith("next: pyrdiff push ") and result["not_reached"] == []
    assert "\n".join(lines) == card.table(result) and len(lines) == 2 + len(result["arms"])
    for name, line in zip(result["arms"], lines[2:], strict=True):
        assert line.startswith(f"| {name} ")


@pytest.mark.parametrize("count, dimension", [(9, 30), (30, 9)])
def test_the_distance_of_resamples_is_the_distance(count, dimension):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, dimension, generator=generator) for n in (40, count))
    reference = metrics.FeatureStatistics(dimension).update(real)
    statistic, sample = distance_statistic(reference, fake)
    for rows in (torch.arange(count), torch.randint(count, (count,), generator=generator)):
        expected = reference.distance(metrics.FeatureStatistics(dimension).update(fake[rows]))
        assert statistic(sample[rows]) == pytest.approx(expected, rel=1e-6)


def test_passes_and_arms_of_a_file(run, tmp_path):
    write(tmp_path / "real", 5, 30)
    further = {"late": {"timesteps": [20, 15, 10]}, "2 passes": {"num_passes": 3}}
    (tmp_path / "arms.json").write_text(json.dumps(further))
    flags = ["--reference", tmp_path / "real", "--resolution", 24, "--arms", tmp_path / "arms.json"]
    result, _, _, code = run("passes", *flags)
    assert code == 0 and "fitted" in result["conventions"]["resize"]
    calls = {name: arm["network_calls"] for name, arm in result["arms"].items()}
    assert calls == {"1 pass": 1, "2 passes": 3, "4 passes": 4, "late": 3}
    assert result["arms"]["late"]["arguments"] == further["late"] and result["arms"]["late"]["nfe_eq"] is None
    other, _, _, code = run("passes", *flags, "--only", "late", "4 passes", "--batch_size", 3)
    assert list(other["arms"]) == ["4 passes", "late"]
    for name, arm in other["arms"].items():  # image k has its own seed, whatever the batch
        value = arm["metrics"]["FD-squeezenet"]["value"]
        assert value == pytest.approx(result["arms"][name]["metrics"]["FD-squeezenet"]["value"], rel=1e-2)


def test_a_model_that_enlarges(run, tmp_path, models, lpips_heads, alexnet_file):  # noqa: F811
    truth = write(tmp_path / "real", 8, 36)[:6]
    flags = ["--reference", tmp_path / "real", "--lpips_weights", alexnet_file]
    result, printed, _, code = run("enlarge", *flags)
    assert code == 0 and result["task"] == "enlarge" and result["reference"]["images"] == 6
    assert {name: arm["network_calls"] for name, arm in result["arms"].items()} == {
        "default": 3,
        "short": 2,
        "bicubic": 0,
    }
    assert result["arms"]["bicubic"]["yardstick"] and result["conventions"]["scale_factor"] == 3
    assert all(f"| {name} " in printed for name in result["arms"])

    low = [image.resize((12, 12), Image.Resampling.BICUBIC) for image in truth]
    bicubic = [image.resize((36, 36), Image.Resampling.BICUBIC) for image in low]
    values = [
        peak_signal_noise_ratio(*map(np.asarray, pair), data_range=255) for pair in zip(truth, bicubic, strict=True)
    ]
    assert result["arms"]["bicubic"]["metrics"]["psnr"]["value"] == pytest.approx(np.mean(values), rel=1e-6)
    pipeline = pyrdiff.load(models["enlarge"])
    pipeline.set_progress_bar_config(disable=True)
    made = [image for part in (range(4), range(4, 6)) for image in pipeline(
        [low[k] for k in part], plan="short", generator=generators(part)
    ).images]  # fmt: skip
    pair = tensor(made), tensor(truth)
    expected = [
        (metrics.psnr(*pair, **UNIT), True),
        (metrics.ssim(*pair, **UNIT), True),
        (metrics.lpips(*pair, weights=alexnet_file, **UNIT), False),
        (metrics.consistency(pair[0], tensor(low), **UNIT), False),
    ]
    found = result["arms"]["short"]["metrics"]
    assert list(found) == [by_hand.name for by_hand, _ in expected]
    for by_hand, higher_is_better in expected:
        row = found[by_hand.name]
        assert row["value"] == pytest.approx(by_hand.value, rel=1e-3) and row["higher_is_better"] == higher_is_better
        interval = metrics.bootstrap_interval(lambda part: part.mean(), by_hand.per_image, resamples=5)
        assert row["interval"] == pytest.approx(interval, rel=1e-3)
    other, *_ = run("enlarge", *flags, "--scale_factor", 2, "--only", "bicubic", "--resamples", 0)
    assert other["conventions"]["scale_factor"] == 2 and list(other["arms"]) == ["bicubic"]
    assert other["arms"]["bicubic"]["metrics"]["psnr"]["interval"] is None


def test_a_reference_of_other_sizes_is_fitted_to_what_the_model_generates(run, tmp_path):
    write(tmp_path / "real", 5, 36)
    Image.new("RGB", (30, 40)).save(tmp_path / "real" / "other.png")
    result, _, _, code = run("pyramid", "--reference", tmp_path / "real", "--only", "tiny")
    assert code == 0 and "fitted" in result["conventions"]["resize"] and result["settings"]["resolution"] == [24, 24]


def test_lpips_is_left_out_where_its_weights_cannot_be_had(run, tmp_path, lpips_heads, monkeypatch):  # noqa: F811
    write(tmp_path / "real", 4, 36)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    flags = ["--reference", tmp_path / "real", "--only", "bicubic"]
    result, _, _, code = run("enlarge", *flags)
    assert code == 0 and list(result["arms"]["bicubic"]["metrics"]) == ["psnr", "ssim", "consistency"]
    assert "no network" in result["conventions"]["left_out"]["lpips"]
    _, _, error, code = run("enlarge", *flags, "--lpips_weights", "none")
    assert code == 2 and error.startswith("error: --lpips_weights='none'")


def test_arms_are_timed_in_turn_after_a_warm_up_and_apart_from_scoring(run, tmp_path, monkeypatch):
    write(tmp_path / "real", 4, 24)
    called, images = [], bench_tasks.Task.images

    def recorded(task, name, arm, inputs):
        called.append((name, inputs["batch_size"]))
        return images(task, name, arm, inputs)

    monkeypatch.setattr(bench_tasks.Task, "images", recorded)
    assert run("pyramid", "--reference", tmp_path / "real", "--only", "short", "tiny", "--runs", 2)[3] == 0
    turn = [("short", 1), ("short", 4), ("tiny", 1), ("tiny", 4)]
    assert called == 3 * turn + [("short", 4), ("short", 2), ("tiny", 4), ("tiny", 2)]


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("pyramid", "--reference none", "--reference='none': expected"),
        ("pyramid", "--reference empty", "--reference='empty' has no image"),
        ("pyramid", "--reference few", "--reference: has 3 images; expected 4"),
        ("enlarge", "--reference mixed", "--reference: has sizes .* expected one, or --resolution"),
        ("pyramid", "--reference real --resolution 36", r"its images have size \(24, 24\), the reference \(36, 36\)"),
        ("pyramid", "--reference broken", "bad image .*image 1.png"),
        (
            "pyramid",
            "--reference real --only short slow",
            r"--only=\('short', 'slow'\): expected some of \['short'",
        ),
        ("pyramid", "--reference real --arms unknown.json", r"--arms: 'mine' has \['speed'\]; expected arguments"),
        ("pyramid", "--reference real --arms ours.json", r"--arms: 'mine' has \['generator'\]"),
        ("pyramid", "--reference real --arms wrong.json", "arm 'mine': num_inference_steps=0: expected"),
        ("pyramid", "--reference real --arms list.json", "--arms: 'list.json': expected {name"),
        ("pyramid", "--reference real --arms none", "--arms='none': expected a file"),
        ("pyramid", "--reference real --num_images 3", "--num_images=3: expected 4 or more"),
        ("pyramid", "--reference real --resolution 0", r"--resolution=\(0,\)"),
        ("pyramid", "--reference real --resamples 1", "--resamples=1"),
        ("pyramid", "--reference real --output real", "--output='real'"),
        ("pyramid", "--reference real --weights none", "--weights='none': expected a file"),
        ("pyramid", "--reference real --scale_factor 2", "--scale_factor: not for a PyramidalPipeline"),
        ("pyramid", "--reference real --device none", "device='none'"),
        ("none", "--reference real", "--model='none': expected a folder"),
        ("enlarge", "--reference real --scale_factor 5", "--scale_factor=5: does not divide"),
        ("enlarge", "--reference real --scale_factor 1", "--scale_factor=1"),
    ],
)
def test_bad_input_is_one_line_before_any_work(model, flags, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "time_arms", lambda *_: pytest.fail("it went to work"))
    monkeypatch.setattr(bench_tasks.Generating, "prepare", lambda *_: pytest.fail("it went to work"))
    for name, count, side in (("real", 4, 24), ("few", 3, 24), ("mixed", 4, 24), ("large", 4, 36), ("broken", 4, 24)):
        write(tmp_path / name, count, side)
    Path("empty").mkdir()
    Image.new("RGB", (9, 9)).save("mixed/image 1.png")
    Path("broken/image 1.png").write_bytes(Path("broken/image 1.png").read_bytes()[:300])
    wrong = {"unknown": {"mine": {"speed": 9}}, "ours": {"mine": {"generator": 1}}, "list": [1]}
    for name, content in (wrong | {"wrong": {"mine": {"num_inference_steps": 0}}}).items():
        Path(f"{name}.json").write_text(json.dumps(content))
    result, printed, error, code = run(model, *flags.split())
    assert (result, printed.count("\n") <= 1, code) == (None, True, 2), printed  # the line that says what will be done
    assert re.search(message, error), error


def test_an_arm_that_the_model_cannot_run_is_left_out_unless_asked_for(run, tmp_path, capsys):
    torch.manual_seed(0)
    one = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = pyrdiff.CoordinateUNet2DModel(resolutions=(12, 24), layers_per_block=1, norm_num_groups=4, **one)
    few = pyrdiff.PyramidalPipeline(unet, DDPMScheduler(30))
    model = hub.export(few, tmp_path / "few")
    write(tmp_path / "real", 4, 24)
    result, *_ = run(model, "--reference", tmp_path / "real")
    assert list(result["arms"]) == [FULL]
    _, _, error, code = run(model, "--reference", tmp_path / "real", "--only", "default", FULL)
    assert code == 2 and error.startswith("error: arm 'default': ")


def test_ctrl_c_leaves_nothing_behind(run, tmp_path, monkeypatch):
    write(tmp_path / "real", 4, 24)
    images, calls = bench_tasks.Task.images, []

    def interrupted(task, *arguments):
        calls.append(arguments)
        if len(calls) == 6:  # while it scores
            raise KeyboardInterrupt
        return images(task, *arguments)

    monkeypatch.setattr(bench_tasks.Task, "images", interrupted)
    result, printed, _, code = run("pyramid", "--reference", tmp_path / "real", "--only", "short")
    assert (result, printed.count("\n"), code, len(calls)) == (None, 1, 130, 6), printed
    assert not (tmp_path / "out").exists()


def small(**arms) -> dict:
    metric = {"FD-x": {"value": 12.345, "interval": [11.0, 14.0], "higher_is_better": False}}
    row = dict(yardstick=False, network_calls=5, nfe_eq=None, ms_per_image=1.5, latency_ms=1234.5, metrics=metric)
    return {"kind": "pyrdiff bench", "arms": {name: {"arguments": {}, **row, **more} for name, more in arms.items()}}


def test_the_table_marks_yardsticks():
    one = {"psnr": {"value": "inf", "interval": None, "higher_is_better": True}}
    result = small(fast={}, stock=dict(yardstick=True, nfe_eq=20.0), other=dict(metrics=one))
    text = card.table(result)
    assert text.splitlines() == [
        "|  | network calls | NFE-eq | ms an image | latency, ms | FD-x ↓ | psnr ↑ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fast | 5 | - | 1.50 | 1234 | 12.3 [11.0, 14.0] | - |",
        "| stock (yardstick) | 5 | 20.0 | 1.50 | 1234 | 12.3 [11.0, 14.0] | - |",
        "| other | 5 | - | 1.50 | 1234 | - | inf |",
    ]
    for wrong in ({}, {"arms": {}}, [], small()):
        with pytest.raises(ValueError, match="^result: expected what `pyrdiff bench` writes"):
            card.table(wrong)


def test_choosing_a_plan_reads_it(tmp_path):
    plan = {"num_inference_steps": 4}
    unsure = {"FD-x": {"value": 9.0, "interval": None, "higher_is_better": False}}
    arms = dict(fast={"arguments": {"plan": "fast"}}, default={}, mine={"arguments": {"plan": plan}, "metrics": unsure})
    (tmp_path / "bench.json").write_text(json.dumps(small(**arms)))
    plans, quality, intervals = bench_plans(tmp_path / "bench.json")
    assert plans == {"fast": "fast", "default": {}, "mine": plan}
    assert quality == {"fast": 12.345, "default": 12.345, "mine": 9.0}
    assert intervals == {"fast": (11.0, 14.0), "default": (11.0, 14.0)}


def test_tuning_writes_plans_and_figures_into_the_folder(run, tmp_path, models, monkeypatch):
    module = sys.modules["pyrdiff.plan.tune"]
    every = [plan for plan in module.candidates(pyrdiff.load(models["pyramid"])) if "spacing" in plan]
    few = [plan for plan in every if len(plan["spacing"][0]) == 20][::3]
    monkeypatch.setattr(module, "candidates", lambda pipeline: few)
    monkeypatch.setattr(module, "MOST", 32)  # so it ends long before its minutes
    folder = shutil.copytree(models["pyramid"], tmp_path / "model")
    write(tmp_path / "real", 32, 24)
    result, printed, _, code = run(str(folder), "--reference", tmp_path / "real", "--tune", 30)
    assert code == 0 and {"balanced", "best", "full"} <= {line.split()[0] for line in printed.splitlines()}
    plans = pyrdiff.load(folder).config.plans
    assert set(plans) == {"short", "tiny", *result["plans"]} and plans["best"] == result["plans"]["best"]["plan"]
    figures = json.loads((folder / "tuning.json").read_text())
    assert figures["plans"] == result["plans"] and figures["yardstick"]["nfe_eq"] == 20
    pyrdiff.load(folder)(1, plan="best")


@pytest.mark.parametrize(
    ("model", "count", "minutes", "named"),
    [
        ("pyramid", 31, 1, "held_out: got 31 images; expected 32 or more"),
        ("passes", 32, 1, "--tune: .*passes' is a ParallelTrajectoryPipeline; expected a PyramidalPipeline"),
        ("noto-emoji", 32, 1, "--tune: 'noto-emoji' is no folder"),
        ("pyramid", 32, 0, "--tune=0.0: expected minutes, above 0"),
    ],
)
def test_what_cannot_be_tuned(run, tmp_path, model, count, minutes, named):
    write(tmp_path / "real", count, 24)
    _, _, error, code = run(model, "--reference", tmp_path / "real", "--tune", minutes)
    assert code == 2 and re.search(named, error)


def test_ctrl_c_keeps_the_arms_that_were_scored(run, tmp_path, monkeypatch):
    write(tmp_path / "real", 5, 24)
    score, scored = bench_tasks.Generating.score, []

    def interrupted(self, name, arm):
        scored.append(name)
        if len(scored) == 2:
            signal.raise_signal(signal.SIGINT)
        return score(self, name, arm)

    monkeypatch.setattr(bench_tasks.Generating, "score", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would pass it over
    flags = ["--reference", tmp_path / "real", "--only", "short", "tiny", "default"]
    result, printed, _, code = run("pyramid", *flags)
    assert code == 130 and list(result["arms"]) == ["short"] and result["not_reached"] == ["tiny", "default"]
    assert "1 of 3 ways" in printed and "| short |" in printed
    assert "short" in card.table(card.read_bench(tmp_path / "out/bench.json"))

    monkeypatch.setattr(bench_tasks.Generating, "score", lambda *_: signal.raise_signal(signal.SIGINT))
    (tmp_path / "out/bench.json").unlink()
    assert run("pyramid", *flags)[0] is None, "nothing was scored, nothing is written"
