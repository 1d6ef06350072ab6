"""Distillation: losses against closed forms, runs from pyramids and super-resolution models, what is refused."""

import configparser
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from metrics.conftest import alexnet_file, lpips_heads  # noqa: F401

import pyrdiff
from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, ResidualSRPipeline, hub
from pyrdiff.commands import distill as command
from pyrdiff.methods import distill, pddpm, sr
from pyrdiff.methods.distill import METHOD, DistillSettings
from pyrdiff.training.loop import DeviceBatch, train
from pyrdiff.training.losses import Draws

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teachers(toy) -> dict[str, Path]:
    """Folders of a pyramid and of a model that enlarges by 2 and 4, each barely trained."""
    flags = toy(max_train_steps=2)
    folders = {"pyramid": train(pddpm.METHOD, pddpm.PyramidalSettings(**flags))}
    flags = toy(max_train_steps=2, resolution=["16"], scale_factor=[2, 4], block_out_channels=[32, 32])
    folders["sr"] = train(sr.METHOD, sr.SuperResolutionSettings(**flags))
    return folders


@pytest.fixture
def flags(toy, teachers):
    """flags(teacher, **changes): of a run of 2 steps without LPIPS, as a dict."""

    def made(teacher: str, **changes) -> dict:
        values = toy(**{"max_train_steps": 2, "lpips_weight": 0.0, "model": str(teachers[teacher]), **changes})
        return {
            key: value for key, value in values.items() if key not in ("resolution", "preset", "block_out_channels")
        }

    return made


@pytest.fixture
def lpips_files(alexnet_file, lpips_heads) -> Path:  # noqa: F811
    """The file of a random trunk, with heads beside it."""
    distill.perceptual.cache_clear()
    yield alexnet_file
    distill.perceptual.cache_clear()


def run(values: dict) -> Path:
    return train(METHOD, DistillSettings(**values))


# Losses.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("again", [False, True])
def test_the_best_jump_of_a_pyramid_is_the_closed_form(flags, monkeypatch, prediction, again):
    """
    Of plain images of Gaussian values v, x_t = a v + s n. The best estimate of one number a pixel, by mean or by
    median, is k x_t with k = a V / (a^2 V + s^2).
    """
    monkeypatch.setattr(Draws, "choice", lambda self, options: options[-again])
    settings = DistillSettings(**flags("pyramid"))
    scheduler = METHOD.scheduler(settings, None)
    scheduler.register_to_config(prediction_type=prediction)
    variance = 1.0
    values = variance**0.5 * torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    batch = DeviceBatch(values.expand(-1, 3, 16, 16), None, level=1)
    time = settings.jumps[again]
    a, s = scheduler.alphas_cumprod[time].sqrt(), (1 - scheduler.alphas_cumprod[time]).sqrt()
    best = (a * variance / (a**2 * variance + s**2)).item()

    def loss_of(gain: float) -> float:
        def network(noisy, timesteps, return_dict):
            assert timesteps.tolist() == [time] * len(noisy)
            clean = gain * noisy
            output = {"epsilon": (noisy - a * clean) / s, "v_prediction": (a * noisy - clean) / s, "sample": clean}
            return (output[prediction],)

        return METHOD.loss(network, scheduler, settings, batch, Draws(1, device=torch.device("cpu"))).item()

    gains = [best * factor for factor in (0.7, 0.85, 1, 1.15, 1.3)]
    losses = [loss_of(gain) for gain in gains]
    assert min(losses) == losses[2]
    expected = (2 / torch.pi * variance * s**2 / (a**2 * variance + s**2)) ** 0.5  # mean |error| of a Gaussian
    assert losses[2] == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("target", ["residual", "image"])
def test_the_best_jump_of_super_resolution_is_the_closed_form(flags, monkeypatch, target):
    """Noised is the enlarged input, so of the image only the input is known: the best estimate is its mean given it."""
    monkeypatch.setattr(Draws, "choice", lambda self, options: options[0])
    settings = DistillSettings(**flags("sr"))
    scheduler = METHOD.scheduler(settings, None)
    scheduler.register_to_config(prediction_target=target, prediction_type="sample", residual_scale=2.0)
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 4
    level = scheduler.noise_level(settings.jumps[0])

    def loss_of(share: float) -> float:
        def network(noisy, noise_level, upsampled, return_dict):
            assert torch.allclose(noise_level, level)
            base = torch.zeros_like(noisy) if target == "residual" else upsampled
            noise = (noisy - level * base) / (1 - level**2).sqrt()
            assert noise.std() == pytest.approx(1, abs=0.02)  # of what is to be found, nothing is in it
            residual = share * (images - upsampled)
            return (2 * residual if target == "residual" else upsampled + residual,)

        batch = DeviceBatch(images, None)
        return METHOD.loss(network, scheduler, settings, batch, Draws(1, device=torch.device("cpu"))).item()

    assert loss_of(1.0) == pytest.approx(0, abs=1e-6)
    enlarged = ResidualSRPipeline.upsample(sr_low(images), (16, 16))
    assert loss_of(0.0) == pytest.approx((images - enlarged).abs().mean().item(), rel=1e-4)


def sr_low(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, (8, 8), mode="bicubic", antialias=True)


def test_the_lowest_level_is_trained_as_the_teacher_was(flags):
    settings = DistillSettings(**flags("pyramid"))
    scheduler = METHOD.scheduler(settings, None)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def network(noisy, timesteps, coordinates=None, return_dict=False):
        return (noisy * timesteps.reshape(-1, 1, 1, 1) / 1000,)

    ours, its = (
        module.loss(network, scheduler, settings, DeviceBatch(images, None, 0), Draws(1, device=torch.device("cpu")))
        for module, settings in ((METHOD, settings), (pddpm.METHOD, pddpm.PyramidalSettings(train_data_dir="x")))
    )
    assert ours == its


def test_lpips_is_added_to_the_mean_difference(flags, lpips_files):
    settings = DistillSettings(**flags("pyramid", lpips_weight=0.3, lpips_weights=str(lpips_files)))
    generator = torch.Generator().manual_seed(0)
    images, estimate = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    estimate.requires_grad_(True)
    found = distill.difference(settings, estimate, images)
    twice = [
        torch.nn.functional.interpolate(one, scale_factor=2, mode="bilinear") for one in (estimate.detach(), images)
    ]
    distance = pyrdiff.metrics.lpips(*twice, data_range=(-1, 1), weights=lpips_files)
    plain = (estimate - images).abs().mean()
    assert found.item() == pytest.approx(plain.item() + 0.3 * distance.value, rel=1e-5)
    gradients = [torch.autograd.grad(value, estimate, retain_graph=True)[0] for value in (found, plain)]
    assert (gradients[0] - gradients[1]).abs().max() > 0
    small = distill.difference(settings, estimate[..., :16, :16], images[..., :16, :16])
    assert small > (estimate - images)[..., :16, :16].abs().mean(), "small images are enlarged further"


# Runs.


def sample(pipeline, plan: str) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, plan=plan, output_type="pt", generator=torch.Generator().manual_seed(0)).images


ELSEWHERE = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save([pipeline(2, plan=plan, output_type="pt", generator=torch.Generator().manual_seed(0)).images
            for plan in ("one", "two")], sys.argv[2])
"""


def test_a_pyramid_gets_two_plans_and_needs_neither_pyrdiff_nor_lpips(flags, teachers, tmp_path, lpips_files):
    folder = run(flags("pyramid", lpips_weight=0.5, lpips_weights=str(lpips_files), save_images_steps=2))
    pipeline = pyrdiff.load(folder)
    assert type(pipeline) is PyramidalPipeline and sorted(pipeline.config.plans) == ["one", "two"]
    teacher = pyrdiff.load(teachers["pyramid"])
    low = teacher.plan(plan="balanced").levels[0].timesteps
    times = {name: [level.timesteps for level in pipeline.plan(plan=name).levels] for name in ("one", "two")}
    assert times == {"one": [low, [285]], "two": [low, [285, 120]]}
    assert pipeline.config.colors == teacher.config.colors and pipeline.plan() == pipeline.plan(plan="one")
    assert pipeline(1).images[0].size == (16, 16)

    card = (folder / "README.md").read_text()
    title = teachers["pyramid"].parent.name
    assert f"| distilled from | {title} (SHA-256 " in card and "| method | distill |" in card
    assert list((folder.parent / "samples").glob("*.png"))
    assert "alexnet" not in "".join(path.read_text() for path in folder.rglob("*.json"))
    warm.run(ELSEWHERE, str(folder), str(tmp_path / "images.pt"), without=["pyrdiff"], check=True, cwd=tmp_path)
    for found, plan in zip(torch.load(tmp_path / "images.pt"), ("one", "two"), strict=True):
        expected = sample(pipeline, plan)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal((found * 255).round(), (expected * 255).round())


def test_it_begins_as_its_teacher_and_resumes(flags, teachers):
    values = flags("pyramid", max_train_steps=1, learning_rate=1e-12)
    before, after = pyrdiff.load(teachers["pyramid"]).unet, pyrdiff.load(run(values)).unet
    assert after.config.jumps == [285, 120]
    for name, value in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], value, atol=1e-6), name
    with pytest.raises(ValueError, match=r'"jumps": \[285, 120\].*"jumps": \[200, 84\]'):
        run({**values, "jump_from": 0.2})
    run({**values, "max_train_steps": 2})
    log = [json.loads(line)["step"] for line in (Path(values["output_dir"]) / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2]


def test_super_resolution_in_one_call(flags):
    folder = run(flags("sr", save_images_steps=2))
    pipeline = pyrdiff.load(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert sorted(pipeline.config.plans) == ["default", "one", "two"]
    assert pipeline.cost(8).timesteps == pipeline.cost(8, plan="one").timesteps == [250]
    assert pipeline.cost(8, plan="two").timesteps == [250, 105]
    calls = []
    pipeline.unet.register_forward_hook(lambda module, given, output: calls.append(given[0]))
    low = torch.rand(1, 3, 4, 4)
    image = pipeline(low, scale_factor=4, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 3, 16, 16) and len(calls) == 1
    level = pipeline.scheduler.noise_level(250)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(calls[0], (1 - level**2).sqrt() * noise, atol=1e-6), "of the residual, nothing but noise"
    with pytest.raises(ValueError, match=r"jumps=\[250, 105\]: this run would take 8 calls.*plan='default' or 'one'"):
        pipeline(low, num_inference_steps=8)


def test_classes_of_the_teacher_are_kept(toy, flags, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, y_train=np.arange(12) % 3)
    values = {"train_data_dir": str(tmp_path / "images.npz"), "max_train_steps": 3}
    teacher = train(pddpm.METHOD, pddpm.PyramidalSettings(**toy(**values), class_labels=True))
    pipeline = pyrdiff.load(run(flags("pyramid", **values, model=str(teacher))))
    names = list(pyrdiff.load(teacher).unet.config.class_names)
    assert list(pipeline.unet.config.class_names) == names and len(pipeline.config.colors["classes"]) == 3
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(classes=names[:2], guidance_scale=2.0).images) == 2
    np.savez(tmp_path / "others.npz", x_train=images, y_train=np.arange(12) % 2)
    with pytest.raises(ValueError, match="class_names=.*expected those of the images"):
        run(flags("pyramid", train_data_dir=str(tmp_path / "others.npz"), model=str(teacher)))


# What is refused.


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("pyramid", {"model": "nowhere"}, "model='nowhere': .*expected a folder"),
        ("pyramid", {"init_from": "other"}, "init_from='other': expected none; a distillation begins with its model"),
        ("pyramid", {"resolution": ("8",)}, r"resolution=\('8',\): expected that of the model, \('8', '16'\)"),
        ("pyramid", {"image_channels": 1}, "image_channels=1: expected that of the model, 3"),
        ("pyramid", {"lora_rank": 4}, "lora_rank=4: expected none"),
        ("pyramid", {"patch_size": 8}, "patch_size=8: expected none"),
        ("pyramid", {"jump_from": 0.4}, "jump_from=0.4: expected at most 0.35, the model's noise_window"),
        ("pyramid", {"jump_from": 0.0}, r"jump_from=0.0: expected a number in \(0, 1\)"),
        ("pyramid", {"second_jump_from": 0.3}, "second_jump_from=0.3: expected a share of less noise than jump_from"),
        ("sr", {"lpips_weight": -1.0}, "lpips_weight=-1.0: expected 0 or more"),
    ],
)
def test_bad_flags(flags, teacher, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        DistillSettings(**{**flags(teacher), **changes})
    assert "\n" not in str(caught.value)


def test_teachers_that_cannot_be_distilled(flags, tmp_path):
    distilled = run(flags("pyramid", max_train_steps=1))
    with pytest.raises(ValueError, match=r"it is distilled already, to calls at \[285, 120\]; expected the model"):
        DistillSettings(**flags("pyramid", model=str(distilled)))
    unet = pyrdiff.load(distilled).unet
    hub.export(pyrdiff.GuidedSRPipeline(unet, pyrdiff.load(distilled).scheduler), tmp_path / "guided")
    with pytest.raises(ValueError, match="a GuidedSRPipeline; expected one of .'PyramidalPipeline', 'ResidualSRPip"):
        DistillSettings(**flags("pyramid", model=str(tmp_path / "guided")))
    shape = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    single = CoordinateUNet2DModel(resolutions=(8,), layers_per_block=1, norm_num_groups=4, **shape)
    hub.export(PyramidalPipeline(single, pyrdiff.load(distilled).scheduler), tmp_path / "single")
    with pytest.raises(ValueError, match="model=.*expected a pyramid of 2 levels or more"):
        DistillSettings(**flags("pyramid", model=str(tmp_path / "single")))


def test_smaller_images_and_missing_weights_are_refused_before_work(flags, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((4, 12, 12, 3), np.uint8))
    with pytest.raises(ValueError, match="12x12 pixels, smaller than 16x16"):
        run(flags("pyramid", train_data_dir=str(tmp_path / "small.npy")))
    with pytest.raises(ValueError, match="lpips_network='alex': .*no such file.*lpips_weight=0|lpips_network='alex'"):
        run(flags("pyramid", lpips_weight=0.5, lpips_weights="no such file"))


def test_a_distilled_pyramid_says_which_calls_it_knows(flags):
    pipeline = pyrdiff.load(run(flags("pyramid", max_train_steps=1)))
    for arguments, said in (
        (dict(refine_steps=4), r"level 16x16 would take calls at \[300, 200, 100, 0\]"),
        (dict(num_inference_steps=5), "level 16x16 would take 8 calls"),
        (dict(plan={"spacing": [[500], [285, 100]]}), r"level 16x16 would take calls at \[285, 100\]"),
    ):
        with pytest.raises(ValueError, match=rf"jumps=\[285, 120\]: the {said}; .*expected plan='one' or 'two'"):
            pipeline.plan(**arguments)
    assert pipeline.plan(plan={"spacing": [[500], [285]]}).network_calls == 2
    with pytest.raises(ValueError, match=r"jumps=\[285, 120\]: the level 16x16 would take"):
        pyrdiff.GuidedSRPipeline(pipeline.unet, pipeline.scheduler)(torch.rand(1, 3, 8, 8), scale_factor=2)


# The command.


def test_the_command_takes_the_model_first(flags, teachers, capsys):
    values = flags("pyramid")
    given = [part for key, value in values.items() if key != "model" for part in (f"--{key}", str(value))]
    made = command.main([values["model"], *given])
    assert pyrdiff.load(made["pipeline"]).unet.config.jumps == [285, 120]
    for arguments, said in (
        ([], "error: missing: MODEL"),
        (["nowhere", "--train_data_dir", "x"], "error: model='nowhere'"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert capsys.readouterr().err.splitlines()[-1].startswith(said)


def test_it_is_an_installed_method():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    entries = parser["options.entry_points"]["pyrdiff.methods"].split("\n")
    assert "distill = pyrdiff.methods.distill:METHOD" in entries and METHOD.name == "distill"
    assert (ROOT / "examples" / "train_distill.py").is_file() and importlib.util.find_spec("pyrdiff.methods.distill")


def test_the_flags_of_its_page_exist():
    text = (ROOT / "docs" / "distilling.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"`[^`]*?--([a-z_]+)", text)) - {"no"}
    assert flags and flags <= set(DistillSettings.__dataclass_fields__)
