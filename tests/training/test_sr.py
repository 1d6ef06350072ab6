"""SR4 and SR3 at toy size: the loss against its formulas, what is trained, logged and exported, what is refused."""

import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pyrdiff
from pyrdiff.cli import parse
from pyrdiff.data import ImageLevels, degrade, shrink
from pyrdiff.methods import sr
from pyrdiff.methods.sr import METHOD, SuperResolutionSettings
from pyrdiff.plugins import methods
from pyrdiff.training.checkpoints import load_checkpoint
from pyrdiff.training.loop import prepare, train
from pyrdiff.training.losses import Draws
from pyrdiff.training.settings import TrainingStopped

SCRIPT = Path(pyrdiff.__file__).parents[2] / "examples" / "train_sr.py"
CPU = torch.device("cpu")


def photos(count: int, height: int = 16, width: int = 16, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [N, H, W, C]: gray-ish blobs with edges and some grain."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(size=(count, 1, height // 4, width // 4)))
    shapes = torch.tanh(3 * F.interpolate(coarse, (height, width), mode="bicubic")).movedim(1, -1).numpy()
    values = 128 + 80 * shapes + random.normal(scale=5, size=(count, height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def toy_sr(toy, tmp_path_factory):
    """toy_sr(**changes): flags of a run of 12 steps on 24 images of 16x16 into a new folder."""
    array = tmp_path_factory.mktemp("photos") / "images.npy"
    np.save(array, photos(24))
    changes = dict(train_data_dir=str(array), resolution=["16"], block_out_channels=[32, 32], ddpm_num_steps=20)
    return lambda **more: toy(**{**changes, **more})


def settings_of(flags: dict) -> SuperResolutionSettings:
    return SuperResolutionSettings(**flags)


def fit_toy(flags: dict, method=METHOD) -> Path:
    """Trains, without an export, and returns the run's folder."""
    prepare(method, settings_of(flags)).fit()
    return Path(flags["output_dir"])


def train_toy(flags: dict) -> Path:
    """Trains, exports, and returns the run's folder."""
    folder = Path(flags["output_dir"])
    assert train(METHOD, settings_of(flags)) == folder / "pipeline"
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    steps = {}
    for line in lines_of(folder):
        if "loss" in line:
            assert steps.setdefault(line["step"], line["loss"]) == line["loss"]
    return steps


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    groups, _ = load_checkpoint(folder / f"checkpoint-{step}")
    return {f"{group}/{name}": value for group, entries in groups.items() for name, value in entries.items()}


def levels_of(array: np.ndarray, *sizes) -> ImageLevels:
    return ImageLevels.build(array, list(sizes) or [array.shape[1:3]], channels=array.shape[-1])


def to_range(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def trained(toy_sr) -> Path:
    """A run with the default settings and validation numbers of training images every 8 steps."""
    return train_toy(toy_sr(save_images_steps=6, eval_batch_size=3))


# The loss.


class Loss:
    """One call of the loss, and what it should have made of the same draws, by hand."""

    def __init__(self, flags: dict, predict, count: int = 64, seed: int = 3):
        self.settings = settings_of(flags)
        self.scheduler = sr.build_scheduler(replace(self.settings, residual_scale=None), levels_of(photos(24)))
        self.high, self.predict = to_range(photos(count, seed=1)), predict
        self.count, self.seed = count, seed

    def call(self) -> torch.Tensor:
        draws = Draws(self.seed, device=CPU)
        return sr.loss(self.network, self.scheduler, self.settings, SimpleNamespace(images=self.high), draws)

    def network(self, noisy, level, upsampled, return_dict):
        assert not return_dict
        self.noisy, self.level, self.upsampled = noisy, level, upsampled
        low = shrink(self.high, 2)
        torch.testing.assert_close(upsampled, F.interpolate(low, (16, 16), mode="bicubic", antialias=True))
        scale = self.scheduler.config.residual_scale
        residual = self.settings.prediction_target == "residual"
        self.clean = (self.high - upsampled) * scale if residual else self.high
        a, s = (part.double()[:, None, None, None] for part in (level, (1 - level.double().square()).sqrt()))
        self.noise = (noisy - a * self.clean) / s
        target = {"epsilon": self.noise, "v_prediction": a * self.noise - s * self.clean, "sample": self.clean}
        self.target = target[self.settings.prediction_type]
        return (self.predict(self.target).float(),)


TARGETS = [(kind, target) for kind in ("epsilon", "v_prediction", "sample") for target in ("residual", "image")]


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_the_exact_target_has_no_loss_and_zeros_have_its_size(toy_sr, kind, target):
    flags = toy_sr(scale_factor=[2], prediction_type=kind, prediction_target=target)
    exact = Loss(flags, lambda target: target)
    assert exact.call() < 1e-5
    nothing = Loss(flags, torch.zeros_like)
    assert nothing.call().item() == pytest.approx(nothing.target.square().mean().item(), rel=1e-4)
    one = Loss({**flags, "loss_type": "l1"}, torch.zeros_like)
    assert one.call().item() == pytest.approx(one.target.abs().mean().item(), rel=1e-4)


def test_noise_is_normal_and_levels_lie_uniformly_between_two_steps(toy_sr):
    case = Loss(toy_sr(scale_factor=[2]), lambda target: target, count=512)
    case.call()
    assert abs(case.noise.mean()) < 0.02 and case.noise.std() == pytest.approx(1, abs=0.02)
    assert (case.noise[1] - case.noise[0]).abs().mean() > 0.5
    edges = case.scheduler.noise_level(torch.arange(-1, 20)).double()  # falling
    step = (edges[None] >= case.level[:, None]).sum(1) - 1
    assert sorted(set(step.tolist())) == list(range(20))
    share = (edges[step] - case.level) / (edges[step] - edges[step + 1])
    assert torch.histc(share, 4, 0, 1).min() > 90
    assert case.level.max() < 1 and case.level.min() > 0


def test_shared_noise_is_one_for_all(toy_sr):
    case = Loss(toy_sr(scale_factor=[2], shared_noise=True), lambda target: target)
    case.call()
    low = case.level < 0.9
    torch.testing.assert_close(case.noise[low], case.noise[low][:1].expand_as(case.noise[low]), rtol=0, atol=1e-4)
    assert case.noise[low][0].std() == pytest.approx(1, abs=0.1)


def test_a_learned_variance_is_trained_by_the_bound_at_whole_steps(toy_sr):
    def output(place):
        return lambda target: torch.cat((target, torch.full_like(target, place)), 1)

    flags = toy_sr(scale_factor=[2], variance_type="learned_range", vlb_weight=0.01)
    case = Loss(flags, output(1.0))
    value = case.call().item()
    edges = case.scheduler.noise_level(torch.arange(20))
    distance, time = (edges[None] - case.level[:, None]).abs().min(1)
    assert distance.max() == 0
    # The bound with the true noise, at all times but 0, has the closed form of two variances.
    gamma = case.scheduler.alphas_cumprod.double()
    gamma_prev = torch.cat([torch.ones(1).double(), gamma[:-1]])
    ratio = ((1 - gamma_prev) / (1 - gamma))[time]
    expected = 0.5 * (ratio - 1 - ratio.clamp(min=1e-9).log()) / math.log(2)
    first = time == 0
    assert 0 < first.sum() < 10
    mean = case.scheduler._gamma(time[first])
    beta = (1 - mean).double().sqrt()
    half = case.scheduler.config.residual_scale / 255
    # At time 0 the mean is the clean value but for rounding: the bin around it holds this much of the normal.
    expected[first] = -torch.log2(torch.special.erf(half / beta / math.sqrt(2)))
    assert value == pytest.approx(0.01 * 20 * expected.mean().item(), rel=1e-3, abs=1e-5)
    half_weight = Loss({**flags, "vlb_weight": 0.005}, output(1.0)).call().item()
    assert half_weight == pytest.approx(value / 2, rel=1e-3)
    assert Loss(flags, output(-1.0)).call().item() < value


def test_the_bound_trains_the_variance_alone(toy_sr):
    parts = {}

    def output(target):
        parts["noise"] = (target + 0.5).float().requires_grad_()
        parts["place"] = torch.zeros_like(target).float().requires_grad_()
        return torch.cat((parts["noise"], parts["place"]), 1)

    case = Loss(toy_sr(scale_factor=[2], variance_type="learned_range"), output)
    gradients = torch.autograd.grad(case.call(), list(parts.values()))
    plain = 2 * (parts["noise"] - case.target) / parts["noise"].numel()
    torch.testing.assert_close(gradients[0].double(), plain.double(), rtol=1e-4, atol=1e-8)
    assert gradients[1].abs().sum() > 0


def test_each_step_has_one_factor_and_all_are_used(toy_sr):
    settings = settings_of(toy_sr(scale_factor=[2, 4]))
    scheduler = sr.build_scheduler(settings, levels_of(photos(24)))
    high, seen = to_range(photos(4)), []

    def network(noisy, level, upsampled, return_dict):
        seen.append(upsampled)
        return (noisy,)

    for step in range(40):
        sr.loss(network, scheduler, settings, SimpleNamespace(images=high), Draws(0, step, device=CPU))
    made = [F.interpolate(shrink(high, factor), (16, 16), mode="bicubic", antialias=True) for factor in (2, 4)]
    counts = [sum(torch.allclose(one, upsampled, atol=1e-6) for upsampled in seen) for one in made]
    assert sum(counts) == 40 and min(counts) > 8


VARIANTS = {
    "default": dict(scale_factor=[2, 4]),
    "shared": dict(shared_noise=True, loss_type="l1"),
    "learned": dict(variance_type="learned_range", degradation="realistic", scale_factor=[2, 4]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_have_the_parts_of_one_loss(toy_sr, variant):
    settings = settings_of(toy_sr(**VARIANTS[variant]))
    scheduler = sr.build_scheduler(settings, levels_of(photos(24)))
    torch.manual_seed(0)
    network, high = sr.build_model(settings, 3).eval(), to_range(photos(8))
    whole = sr.loss(network, scheduler, settings, SimpleNamespace(images=high), Draws(7, device=CPU))
    parts = [
        sr.loss(network, scheduler, settings, SimpleNamespace(images=half), draws)
        for index, half in enumerate(high.chunk(2))
        for draws in [Draws(7, device=CPU, num_processes=2, process_index=index)]
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)
    assert parts[0] != parts[1]


# The scheduler.


def measured(array: np.ndarray, factors) -> float:
    """The residual's standard deviation, without our code."""
    high, residuals = to_range(array), []
    for factor in factors:
        small = F.interpolate(
            high, (high.shape[-2] // factor, high.shape[-1] // factor), mode="bicubic", antialias=True
        )
        small = ((small + 1) * 127.5).clamp(0, 255).round() / 127.5 - 1
        residuals.append(high - F.interpolate(small, high.shape[-2:], mode="bicubic", antialias=True))
    return torch.cat(residuals).double().std().item()


@pytest.mark.parametrize("factors", [[2], [4], [2, 4]], ids=str)
def test_the_residual_scale_is_one_over_the_standard_deviation(toy_sr, factors):
    images = photos(40, 16, 32)  # more than the 16 that are looked at at a time
    settings = settings_of(toy_sr(resolution=["16x32"], scale_factor=factors))
    scale = sr.build_scheduler(settings, levels_of(images)).config.residual_scale
    assert scale == pytest.approx(1 / measured(images, factors), rel=1e-3)
    assert len(f"{scale:.12g}".replace(".", "").strip("0")) <= 4
    few = sr.fit_residual_scale(settings, levels_of(images), count=3)
    assert few == pytest.approx(1 / measured(images[[0, 19, 39]], factors), rel=1e-3)


def test_the_residual_scale_of_patches_realistic_inputs_and_a_given_one(toy_sr):
    images = levels_of(photos(24, 18, 18))
    flags = toy_sr(resolution=["18"], patch_size=16)
    patches = sr.build_scheduler(settings_of(flags), images).config.residual_scale
    assert patches == pytest.approx(1 / measured(photos(24, 18, 18)[:, :16, :16], [4]), rel=1e-3)
    realistic = sr.build_scheduler(settings_of({**flags, "degradation": "realistic"}), images).config.residual_scale
    assert realistic < patches, "noise and blur leave more to be made up"
    assert sr.build_scheduler(settings_of({**flags, "residual_scale": 1.0}), images).config.residual_scale == 1
    image = sr.build_scheduler(settings_of({**flags, "prediction_target": "image"}), images).config
    assert (image.residual_scale, image.prediction_target) == (1, "image")


@pytest.mark.parametrize("steps", [2, 20, 500, 2000])
def test_linear_betas_are_sr3s_and_reach_its_noise_in_fewer_steps(toy_sr, steps):
    settings = settings_of(toy_sr(beta_schedule="linear", ddpm_num_steps=steps, residual_scale=1.0))
    scheduler = sr.build_scheduler(settings, None)
    exact = np.linspace(1e-6, 1e-2, 2000)
    if steps == 2000:
        np.testing.assert_allclose(scheduler.betas, exact, rtol=1e-5)
    if steps >= 500:  # with fewer, the product is not the sum of the betas any more
        assert scheduler.alphas_cumprod[-1].log().item() == pytest.approx(np.log1p(-exact).sum(), rel=0.05)
    assert scheduler.alphas_cumprod[-1] < 0.01


# What is trained.


RUNS = {
    "default": {},
    "sr3": dict(low_res_injection="none", attention="16x16", beta_schedule="linear", prediction_target="image"),
    "learned range": dict(variance_type="learned_range"),
    "shared noise, l1, factors, realistic": dict(
        shared_noise=True, loss_type="l1", low_res_injection="large_kernel", scale_factor=[2, 4],
        degradation="realistic",
    ),
    "fusion, v, bicubic": dict(
        input_fusion="attention", prediction_type="v_prediction", attention="16x16", low_res_injection="bicubic"
    ),
    "gray patches": dict(
        image_channels=1, prediction_type="sample", resolution=["8x16"], patch_size=12, random_flip=True,
        low_res_injection="direct", scale_factor=[2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_its_pipeline_enlarges(toy_sr, name):
    flags = toy_sr(**{"max_train_steps": 12, "ddpm_num_steps": 8, "lr_scheduler": "constant", **RUNS[name]})
    settings = settings_of(flags)
    folder = train_toy(flags)
    losses = list(losses_of(folder).values())
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:2])

    pipeline = pyrdiff.load(folder / "pipeline")
    network, scheduler = pipeline.unet.config, pipeline.scheduler.config
    learned, channels = settings.variance_type == "learned_range", settings.image_channels
    assert network.out_channels == (2 if learned else 1) * channels
    assert network.low_res_injection == (None if name == "sr3" else settings.low_res_injection)
    assert (network.attention, network.input_fusion) == (settings.attention, settings.input_fusion)
    assert list(network.scale_factors) == list(settings.scale_factor)
    height, width = settings.window
    assert network.sample_size == height if height == width else list(network.sample_size) == [height, width]
    assert scheduler.prediction_target == settings.prediction_target
    assert (scheduler.prediction_type, scheduler.variance_type) == (settings.prediction_type, settings.variance_type)
    assert scheduler.num_train_timesteps == 8

    factor = max(settings.scale_factor)
    low = shrink(to_range(photos(1, 16, 16, channels, seed=9)), factor) / 2 + 0.5
    pipeline.set_progress_bar_config(disable=True)
    for plan in ("default", "paper"):
        output = pipeline(low, plan=plan, generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert output.shape == (1, channels, 16, 16) and output.isfinite().all()


@pytest.mark.parametrize("steps", [50, 500, 2000])
def test_the_plans_are_ones_that_a_pipeline_takes(toy_sr, steps):
    found = sr.plans(settings_of(toy_sr(ddpm_num_steps=steps)))
    assert set(found) == {"default", "balanced", "fast", "paper"}
    network = pyrdiff.ResidualSRUNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8)
    pipeline = pyrdiff.ResidualSRPipeline(network, pyrdiff.CosineResidualScheduler(steps), found)
    calls = {name: len(pipeline.cost(8, 4, plan=name).timesteps) for name in found}
    assert calls == {"default": 20, "balanced": 8, "fast": 4, "paper": steps}


@pytest.mark.parametrize(
    "changes", [{"ddpm_num_steps": 8}, {"beta_schedule": "linear"}, {"prediction_target": "image"}]
)
def test_plans_that_were_found_elsewhere_are_left_out(toy_sr, changes):
    assert set(sr.plans(settings_of(toy_sr(**{"ddpm_num_steps": 500, **changes})))) == {"default", "paper"}


def test_the_exported_scale_is_measured(trained):
    scale = pyrdiff.load(trained / "pipeline").scheduler.config.residual_scale
    assert scale == pytest.approx(1 / measured(photos(24), [4]), rel=1e-3)


STOPS = {
    "default": {},
    "everything": dict(
        degradation="realistic", scale_factor=[2, 4], random_flip=True, patch_size=8, variance_type="learned_range",
        gradient_accumulation_steps=2, shared_noise=True, max_train_steps=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", STOPS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(toy_sr, trained, variant):
    """Pictures of progress change nothing either: one run has them and the other has not."""
    flags, calls = toy_sr(**STOPS[variant], save_images_steps=4, eval_batch_size=1), iter(range(10**6))

    def loss(*args):
        if next(calls) == 5 * flags.get("gradient_accumulation_steps", 1):
            signal.raise_signal(signal.SIGTERM)
        return sr.loss(*args)

    with pytest.raises(TrainingStopped):
        fit_toy(flags, replace(METHOD, loss=loss))
    resumed = fit_toy(flags)
    whole = trained if variant == "default" else fit_toy(toy_sr(**STOPS[variant]))
    last = flags["max_train_steps"]
    left, right = tensors_of(resumed, last), tensors_of(whole, last)
    assert left.keys() == right.keys() and len(left) > 100
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert losses_of(resumed) == losses_of(whole) and sorted(losses_of(resumed)) == list(range(1, last + 1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(scale_factor=[2]), "network="),
        (dict(low_res_injection="direct"), "network="),
        (dict(variance_type="learned_range"), "network="),
        (dict(prediction_type="sample"), "scheduler="),
        (dict(residual_scale=1.0), "scheduler="),
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_its_folder_is_refused(toy_sr, trained, tmp_path, changes, named):
    folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=f"checkpoint-12 has {named}"):
        train_toy(toy_sr(output_dir=str(folder), **changes))


# Progress.


def test_pictures_and_numbers_of_progress_are_of_training_images(trained):
    lines = [line for line in lines_of(trained) if "validation" in line]
    assert [line["step"] for line in lines] == [6, 12]
    for line in lines:
        names = ("psnr", "ssim", "consistency")
        assert line["validation"].keys() == {*names, *(f"bicubic_{name}" for name in names)}
        assert all(math.isfinite(value) for value in line["validation"].values())
    first, last = (line["validation"] for line in lines)
    for name in first:
        assert (first[name] == last[name]) == name.startswith("bicubic_")
    high = to_range(photos(24)[:3])
    bicubic = F.interpolate(shrink(high, 4), (16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    error = ((bicubic - high) / 2).square().mean((1, 2, 3))
    assert last["bicubic_psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=0.02)
    for step in (6, 12):
        with Image.open(trained / "samples" / f"step-{step:07d}.png") as grid:
            assert grid.size == (3 * 18 + 2, 4 * 18 + 2) and grid.mode == "RGB"
            pixels = np.asarray(grid)
        rows = [[pixels[2 + 18 * y :][:16, 2 + 18 * x :][:, :16] for x in range(3)] for y in range(4)]
        for column, (image, low) in enumerate(zip(photos(24)[:3], shrink(high, 4), strict=True)):
            small = ((low + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(rows[0][column], small.repeat(4, 0).repeat(4, 1)), "the input"
            assert np.array_equal(rows[3][column], image), "the original"
            enlarged = ((bicubic[column] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.abs(rows[1][column].astype(int) - enlarged).max() <= 1, "bicubic"
            assert not np.array_equal(rows[2][column], rows[1][column])


def test_pictures_of_progress_are_as_large_as_what_is_trained_on(toy_sr):
    images = levels_of(photos(24))
    settings = settings_of({**toy_sr(), "patch_size": 8, "scale_factor": [2], "eval_batch_size": 3})
    assert np.array_equal(sr.validation_images(settings, images), to_range(photos(24)[:3, 4:12, 4:12]))


def test_numbers_of_progress_are_of_validation_images_where_there_are_some(toy_sr, tmp_path):
    validation, factor = photos(7, 20, 16, seed=5), 2
    for index, pixels in enumerate(validation[..., 0]):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    images, seen = levels_of(photos(24, channels=1)), []
    flags = toy_sr(validation_data_dir=str(tmp_path), eval_batch_size=3, image_channels=1, background=[255, 255, 255])
    settings = settings_of({**flags, "scale_factor": [2], "save_images_steps": 1, "degradation": "realistic"})

    class Pipeline:
        """Enlarges by repeating pixels."""

        def __call__(self, low, scale_factor, generator, output_type):
            seen.append(low)
            assert scale_factor == factor and len(generator) == 3 and output_type == "pt"
            return SimpleNamespace(images=low.repeat_interleave(factor, -1).repeat_interleave(factor, -2))

        def set_progress_bar_config(self, disable):
            pass

        upsample = staticmethod(pyrdiff.ResidualSRPipeline.upsample)
        numpy_to_pil = staticmethod(pyrdiff.ResidualSRPipeline.numpy_to_pil)

    values = sr.preview(settings, Pipeline(), images, tmp_path / "grid.png")
    expected = ImageLevels.build(tmp_path, [16], channels=1).arrays[0][[0, 2, 4]]
    assert np.array_equal(sr.validation_images(settings, images), to_range(expected))
    low = degrade(to_range(expected), 2, "realistic", Draws(5, device=CPU)) / 2 + 0.5
    assert torch.equal(seen[0], low)
    error = (low.repeat_interleave(2, -1).repeat_interleave(2, -2) - to_range(expected) / 2 - 0.5).square()
    assert values["psnr"] == pytest.approx((-10 * error.mean((1, 2, 3)).log10()).mean().item(), abs=1e-3)
    assert Image.open(tmp_path / "grid.png").mode == "L"


def test_the_same_command_after_the_end_only_exports_again(trained, toy_sr):
    before = losses_of(trained), tensors_of(trained, 12)
    flags = {**json.loads((trained / "settings.json").read_text())}
    train_toy(flags)
    assert losses_of(trained) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in tensors_of(trained, 12).items())


@pytest.mark.parametrize("steps", [2, 3])
def test_a_very_short_noise_process_has_pictures_too(toy_sr, steps):
    folder = train_toy(toy_sr(ddpm_num_steps=steps, save_images_steps=1, eval_batch_size=1, max_train_steps=1))
    with Image.open(folder / "samples" / "step-0000001.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (4 * 18 + 2, 18 + 2, 3)
    _, bicubic, enlarged, original = (pixels[2 + 18 * row :][:16, 2:18] for row in range(4))
    assert np.array_equal(original, photos(24)[0]) and not np.array_equal(enlarged, bicubic)
    plans = pyrdiff.load(folder / "pipeline").config.plans
    assert plans and all(1 <= plan["num_inference_steps"] <= steps for plan in plans.values())


# Flags and what is refused.


def parsed(*args: str) -> SuperResolutionSettings:
    return parse(SuperResolutionSettings, METHOD.summary, ["--train_data_dir", "images", *args])


def test_values_arrive():
    settings = parsed("--scale_factor", "2", "4", "--low_res_injection", "none", "--resolution", "32x64")
    assert settings.scale_factor == (2, 4) and settings.low_res_injection == "none"
    assert settings.window == settings.sizes[0] == (32, 64)
    assert parsed("--patch_size", "48", "--resolution", "32x64").window == (32, 48)
    assert parsed().scale_factor == (4,) and parsed().sizes == [(64, 64)]
    assert methods()["sr"] is METHOD


REFUSED = [
    ("--scale_factor 3", "scale_factor=(3,): expected numbers that divide both sides of what is trained on, (64, 64)"),
    ("--scale_factor 2 4 --resolution 64x66", "scale_factor=(2, 4): expected numbers that divide both sides"),
    ("--scale_factor 4 --patch_size 18", "scale_factor=(4,): expected numbers that divide both sides"),
    ("--scale_factor 1", "scale_factor=(1,): expected different whole numbers from 2 up"),
    ("--scale_factor 2 2", "scale_factor=(2, 2): expected different whole numbers from 2 up"),
    ("--resolution 32 64", "resolution=('32', '64'): expected one size"),
    ("--resolution 0", "resolution=('0',): expected numbers such as 64"),
    ("--patch_size 0", "patch_size=0: expected 1 or more"),
    ("--ddpm_num_steps 1", "ddpm_num_steps=1: expected 2 or more"),
    ("--residual_scale 0", "residual_scale=0.0: expected a number above 0"),
    ("--residual_scale nan", "residual_scale=nan: expected a number above 0"),
    ("--residual_scale 3 --prediction_target image", "residual_scale=3.0: expected 1 with prediction_target='image'"),
    ("--vlb_weight 0", "vlb_weight=0.0: expected a number above 0"),
    (
        "--variance_type learned_range --prediction_type v_prediction",
        "prediction_type='v_prediction': expected 'epsilon' with variance_type='learned_range'",
    ),
    ("--lpips_weights alex.pth", "lpips_network=None: expected a network, for lpips_weights"),
    ("--train_batch_size 0", "train_batch_size=0: expected 1 or more"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[args for args, _ in REFUSED])
def test_a_bad_value_is_one_line_and_exit_code_2(capsys, args, message):
    with pytest.raises(SystemExit) as caught:
        parsed(*args.split())
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and message in output.err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--scale_facto 2", ["--scale_facto", "--scale_factor"]),
        ("--allow_enlarging True", ["--allow_enlarging"]),
        ("--scale_factor two", ["--scale_factor", "two"]),
        ("--degradation jpeg", ["--degradation", "jpeg", "bicubic", "realistic"]),
        ("--low_res_injection None", ["--low_res_injection", "conv_stack", "none"]),
    ],
)
def test_an_unknown_flag_or_value_is_named(capsys, args, named):
    with pytest.raises(SystemExit) as caught:
        parsed(*args.split())
    output = capsys.readouterr()
    message = " ".join(output.err.replace("│", " ").split())
    assert caught.value.code == 2 and all(word in message for word in named), message


def bad_runs(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    np.save(tmp_path / "small.npy", photos(4, 16, 12))
    np.save(tmp_path / "flat.npy", np.full((4, 16, 16, 3), 128, np.uint8))
    small, flat, nothing = (str(tmp_path / name) for name in ("small.npy", "flat.npy", "nothing.npy"))
    return {
        "small images": (dict(train_data_dir=small), r"bad image .*small.npy\[0\]: 16x12 pixels, smaller than 16x16"),
        "only small images": (dict(train_data_dir=small, on_bad_image="skip"), "none of its 4 images can be read"),
        "flat images": (dict(train_data_dir=flat), "residuals: .* of variance 0"),
        "no such folder": (dict(train_data_dir="./" + nothing), "does not exist"),
        "sides": (dict(resolution=["14"], scale_factor=[2], preset="mini", block_out_channels=None), "multiples of 8"),
        "window": (dict(patch_size=6, scale_factor=[2], preset="mini", block_out_channels=None), "6x6 is trained on"),
        "channels": (dict(block_out_channels=[32, 48]), r"block_out_channels=\[32, 48\]: expected .*multiples of 32"),
        "one level": (dict(block_out_channels=[32]), r"block_out_channels=\[32\]: expected 2 levels or more"),
        "no validation": (dict(validation_data_dir="./" + nothing), "does not exist"),
        "small validation": (dict(validation_data_dir=small), "16x12 pixels, smaller than 16x16"),
        "lpips size": (dict(lpips_network="alex"), "lpips_network='alex': .*expected"),
        "lpips weights": (
            dict(lpips_network="vgg", lpips_weights=nothing),
            "lpips_network='vgg': .*(which is no file|lpips package)",
        ),
    }


BAD = ["small images", "only small images", "flat images", "no such folder", "sides", "window", "channels",
       "one level", "no validation", "small validation", "lpips size", "lpips weights"]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_no_run_can_be_made_of_is_refused_and_writes_nothing(toy_sr, tmp_path, name):
    bad = bad_runs(tmp_path)
    assert list(bad) == BAD
    changes, message = bad[name]
    flags = toy_sr(save_images_steps=100, **changes)
    with pytest.raises(ValueError, match=message):
        train_toy(flags)
    assert not Path(flags["output_dir"]).exists()


@pytest.mark.parametrize("good", [True, False])
def test_the_script(toy_sr, monkeypatch, capsys, good):
    flags = toy_sr(max_train_steps=1, resolution=["16" if good else "20"])
    words = [str(SCRIPT)]
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    monkeypatch.setattr(sys, "argv", words)
    if good:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert (Path(flags["output_dir"]) / "pipeline" / "model_index.json").is_file()
        return
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and not Path(flags["output_dir"]).exists()
    assert errors.splitlines()[-1].startswith("error: bad image") and "16x16 pixels, smaller than 20x20" in errors


def test_help_needs_no_torch():
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: print('code', done.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=600)
    assert result.stdout.endswith("code 0 False\n"), result.stderr
    assert all(f"--{flag} " in result.stdout for flag in ("scale_factor", "degradation", "patch_size", "vlb_weight"))
