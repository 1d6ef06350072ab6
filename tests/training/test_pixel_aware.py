"""Pixel-aware diffusion at toy size: both losses by hand, the prior, and a training whose method builds on another."""

import json
import os
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
from torch.distributions import Normal, kl_divergence

import pyrdiff
from pyrdiff.cli import parse
from pyrdiff.data import ImageLevels
from pyrdiff.methods import pixel_aware, pixel_aware_autoencoder
from pyrdiff.methods.pixel_aware import METHOD, PixelAwareSettings
from pyrdiff.methods.pixel_aware_autoencoder import AUTOENCODER
from pyrdiff.plugins import methods
from pyrdiff.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from pyrdiff.training.loop import train
from pyrdiff.training.losses import Draws
from pyrdiff.training.settings import TrainingStopped

SCRIPT = Path(pyrdiff.__file__).parents[2] / "examples" / "train_pixel_aware.py"
CPU = torch.device("cpu")
DARK = 4e-3  # epsilon
WEIGHTS = "diffusion_pytorch_model.safetensors"


def photos(count: int, height: int = 8, width: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 [N, H, W, C]: dark and bright areas with some grain."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(size=(count, 1, 2, 2)))
    shapes = torch.tanh(3 * F.interpolate(coarse, (height, width), mode="bilinear")).movedim(1, -1).numpy()
    values = 128 + 110 * shapes + random.normal(scale=5, size=(count, height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


def levels_of(array: np.ndarray) -> ImageLevels:
    return ImageLevels.build(array, [array.shape[1:3]], channels=array.shape[-1])


def to_range(array: np.ndarray) -> torch.Tensor:
    """[B, C, H, W] in [-1, 1], as the loop gives images to a loss."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def clean_of(images: torch.Tensor) -> torch.Tensor:
    """Such images in [epsilon, 1]."""
    return DARK + (1 - DARK) * (images + 1) / 2


@pytest.fixture(scope="module", autouse=True)
def few_steps_are_enough():
    """After 6 steps the means of a latent differ less than those of a trained autoencoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_aware_autoencoder, "ACTIVE", 1e-4)
        yield


@pytest.fixture(scope="module")
def toy_x(toy, tmp_path_factory):
    """toy_x(**changes): flags of a run of 6 and 6 steps on 24 gray images of 8x8 into a new folder."""
    array = tmp_path_factory.mktemp("photos") / "images.npy"
    np.save(array, photos(24))
    changes = dict(
        train_data_dir=str(array), resolution=["8"], encoder_channels=[8, 16], latent_dim=4, num_train_timesteps=20,
        gamma=20.0, image_channels=1, prior_images=24, autoencoder_steps=6, max_train_steps=6, learning_rate=1e-2,
        recon_std=0.02, lr_warmup_steps=0,
    )  # fmt: skip

    def flags(**more) -> dict:
        values = toy(**{**changes, **more})
        del values["block_out_channels"]
        return values

    return flags


def settings_of(flags: dict) -> PixelAwareSettings:
    return PixelAwareSettings(**flags)


def train_toy(flags: dict, method=METHOD) -> Path:
    folder = Path(flags["output_dir"])
    assert train(method, settings_of(flags)) == folder / "pipeline"
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    steps = {}
    for line in lines_of(folder):
        if "loss" in line:
            assert steps.setdefault(line["step"], line["loss"]) == line["loss"]
    return steps


def tensors_of(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    groups, _ = load_checkpoint(folder / f"checkpoint-{step}")
    return {f"{group}/{name}": value for group, entries in groups.items() for name, value in entries.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_training(left: Path, right: Path, step: int = 6) -> None:
    """All weights and averages of both networks bit for bit, what the first one was finished to, and what is kept."""
    stages = ("autoencoder", ".") if (right / "autoencoder").is_dir() else (".",)
    for stage in stages:
        ours, theirs = tensors_of(left / stage, step), tensors_of(right / stage, step)
        assert ours.keys() == theirs.keys() and len(ours) > 100
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert losses_of(left / stage) == losses_of(right / stage)
        assert sorted(losses_of(left / stage)) == list(range(1, step + 1))
    assert contents(left / "autoencoder" / "finished") == contents(right / "autoencoder" / "finished")
    ours, theirs = contents(left / "pipeline"), contents(right / "pipeline")
    assert ours.pop("README.md") and theirs.pop("README.md")  # they say how long it took
    assert ours == theirs


@pytest.fixture(scope="module")
def straight(toy_x) -> Path:
    """The folder of a run that nothing interrupted, with pictures of progress."""
    return train_toy(toy_x(save_images_steps=3, eval_batch_size=3))


# The loss of the network.


class Given(torch.nn.Module):
    """In place of an autoencoder: a latent for each pixel, so that what it was decoded from can be told."""

    config, device = SimpleNamespace(latent_dim=16), CPU

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.1))

    def encode(self, clean, timestep=0):
        assert timestep == 0 and DARK <= clean.min() and clean.max() <= 1
        mean = 3 * clean.flatten(1) - 1.5 + self.shift
        return mean, torch.full_like(mean, -2.0) + 0 * self.shift

    def decode(self, latents):
        return DARK + (1 - DARK) * torch.sigmoid(latents + self.shift).reshape(-1, 1, 4, 4)

    def forward(self, noisy, timesteps):
        assert timesteps.shape == (len(noisy),)
        return SimpleNamespace(structure=torch.sigmoid(noisy + self.shift + timesteps[:, None, None, None] / 20))


def column(values: torch.Tensor) -> torch.Tensor:
    return values.double()[:, None, None, None]


def is_normal(values: torch.Tensor) -> bool:
    return abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05 and (values[0] - values[1]).abs().mean() > 0.5


def mean_over_kept(errors: torch.Tensor, timesteps: torch.Tensor, steps: list[int]) -> float:
    """Of [S, B, C, H, W], twice the sum over the steps up to each image's time, over the number of all."""
    kept = [errors[s, b] for s, step in enumerate(steps) for b, time in enumerate(timesteps.tolist()) if step <= time]
    return 2 * torch.stack(kept).double().sum().item() / errors.numel()


class Loss:
    """One call of the loss, and what it should have made of the same draws, by hand and in float64."""

    def __init__(self, flags: dict, predict=lambda target: target, noises=lambda target: target, count: int = 384):
        self.settings = settings_of(flags)
        spread = {} if self.settings.mode == "paper" else {"residual_std": 0.17}
        self.scheduler = pixel_aware.build_process(self.settings, **spread)
        self.images = to_range(photos(count, 4, 4, seed=1))
        self.clean = clean_of(self.images).double()
        self.given = Given() if self.settings.use_structure else None
        self.predict, self.predict_noises = predict, noises

    def call(self, seed: int = 3) -> float:
        batch, draws = SimpleNamespace(images=self.images), Draws(seed, device=CPU)
        self.value = pixel_aware.loss(self.network, self.scheduler, self.settings, batch, draws, self.given)
        return self.value.item()

    def network(self, sample, timesteps, structure=None, steps=None):
        assert not sample.requires_grad and (structure is None or not structure.requires_grad)
        assert (structure is not None) == self.settings.use_structure
        self.sample, self.timesteps, self.structure, self.steps = sample, timesteps, structure, steps
        u, gamma = column(timesteps) / 20, 20.0
        if self.settings.mode == "paper":
            self.rate, self.power = gamma * self.clean, u
        else:
            brightness = torch.full_like(self.clean, 0.5) if structure is None else structure.double()
            uniform = structure is None or self.settings.schedule == "uniform"
            floor = 0.1 if self.settings.floor is None else self.settings.floor
            self.rate = torch.full_like(brightness, gamma / 2) if uniform else gamma * (brightness + floor)
            self.power = u ** (self.settings.ramp_power or 3)
        left = (-self.rate * self.power).exp()
        a, s = left.sqrt(), (-torch.expm1(-self.rate * self.power)).sqrt()
        noisy, prediction = sample.double(), None
        if self.settings.mode == "structure":
            spread = 0.17
            total = (a**2 * spread**2 + s**2).sqrt()  # of the noisy image about a times the structure
            noisy = a * brightness + total * sample.double()
            skip = brightness + a * spread**2 / total**2 * (noisy - a * brightness)
            self.target = (self.clean - skip) / (spread * s / total)
            prediction = self.predict(self.target).float()
        self.noise = (noisy - a * self.clean) / s
        if steps is None:
            return SimpleNamespace(sample=prediction, noises=None)
        self.tied = torch.stack([self.correlation(step, u) * self.noise for step in steps])
        return SimpleNamespace(sample=prediction, noises=self.predict_noises(self.tied).float())

    def correlation(self, step: int, u: torch.Tensor) -> torch.Tensor:
        """rho: sqrt(SNR_i / SNR_j) (section 3.2)."""
        exponent = 1 if self.settings.mode == "paper" else 3
        ratio = torch.expm1(self.rate * (step / 20) ** exponent) / torch.expm1(self.rate * u**exponent)
        return ratio.sqrt()


PROCESSES = {
    "pixel": {},
    "uniform": dict(schedule="uniform"),
    "no structure": dict(use_structure=False),
    "other rates": dict(floor=0.3, ramp_power=2.0),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_prediction_has_no_loss_and_zeros_have_its_size(toy_x, name):
    flags = toy_x(**PROCESSES[name])
    assert Loss(flags).call() < 1e-6
    nothing = Loss(flags, torch.zeros_like)
    expected = nothing.call(), nothing.target.square().clamp(max=100).mean().item()
    assert expected[0] == pytest.approx(expected[1], rel=1e-4) and expected[0] > 0.1
    assert is_normal(nothing.noise)


def test_the_network_sees_the_whitened_sample_at_times_of_all_the_process(toy_x):
    case = Loss(toy_x(), count=512)
    case.call()
    noisy = case.scheduler.add_noise(case.clean.float(), case.noise.float(), case.timesteps, case.structure)
    expected = case.scheduler.precondition(noisy, case.timesteps, case.structure)[0]
    torch.testing.assert_close(case.sample, expected, rtol=1e-3, atol=1e-4)
    assert case.timesteps.min() >= 0.2 and case.timesteps.max() <= 20 and case.timesteps.shape == (512,)
    assert torch.histc(case.timesteps, 4, 0.2, 20).min() > 90 and (case.timesteps % 1 > 0.01).float().mean() > 0.9


def test_the_structure_is_decoded_from_a_draw_of_the_posterior_and_not_trained(toy_x):
    case = Loss(toy_x(), count=512)
    weight = torch.ones((), requires_grad=True)
    case.predict = lambda target: weight * target + 0.1
    case.call()
    case.value.backward()
    assert weight.grad.isfinite() and case.given.shift.grad is None
    latents = torch.logit((case.structure.double() - DARK) / (1 - DARK)) - 0.1
    drawn = (latents.flatten(1) - (3 * case.clean.flatten(1) - 1.5 + 0.1)) / np.exp(-1)
    assert is_normal(drawn) and abs((drawn * case.noise.flatten(1)).mean()) < 0.05
    other = Loss(toy_x(), count=512)
    other.call(seed=4)
    assert (other.structure - case.structure).abs().mean() > 0.01


def test_errors_beyond_100_are_flat(toy_x):
    for offset, expected in ((5, 25), (9.95, 99.0025), (10.05, 100), (1e4, 100)):
        assert Loss(toy_x(), lambda target, by=offset: target + by).call() == pytest.approx(expected, rel=1e-4)


# The loss of the heads.


def test_noises_of_other_steps_are_trained_towards_the_tied_ones(toy_x):
    flags = toy_x(head="literal", head_steps=6)
    exact = Loss(flags)
    assert exact.call() < 1e-5 and len(exact.steps) == 6
    zero = Loss(flags, noises=torch.zeros_like)
    assert zero.call() == pytest.approx(mean_over_kept(zero.tied.square(), zero.timesteps, zero.steps), rel=1e-3)
    both = Loss(flags, torch.zeros_like, torch.zeros_like)
    alone = Loss(flags, torch.zeros_like).call()
    assert both.call() == pytest.approx(alone + zero.value.item(), rel=1e-4)
    tied = Loss(toy_x())
    tied.call()
    assert tied.steps is None


def test_noises_of_later_steps_do_not_count(toy_x):
    case = Loss(toy_x(mode="paper", head="literal"))
    case.call()

    def spoiled(tied, wrong=1e3):
        later = torch.tensor(case.steps)[:, None] > case.timesteps
        assert 0.2 < later.double().mean() < 0.8
        return torch.where(later[:, :, None, None, None], wrong, tied)

    assert Loss(toy_x(mode="paper", head="literal"), noises=spoiled).call() < 1e-5
    scheduler, some = case.scheduler, case.clean[:2].float()
    none = pixel_aware.head_loss(scheduler, torch.ones(1, *some.shape), some, some, torch.tensor([1, 2]), [3], None)
    assert none == 0


@pytest.mark.parametrize("mode", ["structure", "paper"])
def test_the_tied_target_has_the_expected_gradient_of_a_drawn_path(toy_x, mode):
    """Eq. 15's target is the noise of the path at j; ours is its expectation: less variance, the same minimiser."""
    settings = settings_of(toy_x(mode=mode, head="literal"))
    scheduler, time, steps = pixel_aware.build_process(settings), 15, [3, 8, 15, 18]
    clean = clean_of(to_range(photos(30_000, 4, 4, seed=2))[:, :, ::2, ::2])
    structure = (clean + 0.05).clamp(max=1) if mode == "structure" else None
    samples, noises = scheduler.sample_path(clean, steps[:3], structure, torch.Generator().manual_seed(0))
    noisy, timesteps = samples[-1], torch.full((len(clean),), time)
    weights = torch.linspace(-0.2, 0.7, 12).reshape(3, 4).requires_grad_()  # of the sample, the image and 1, by step

    def predicted():
        shaped = weights[:, :, None, None, None, None]
        return shaped[0] * noisy + shaped[1] * clean + shaped[2]

    ours = pixel_aware.head_loss(scheduler, predicted(), noisy, clean, timesteps, steps, structure)
    drawn = 2 * (predicted()[:3] - noises).square().sum() / (len(steps) * clean.numel())
    found, expected = (torch.autograd.grad(value, weights)[0] for value in (ours, drawn))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)
    assert expected[:, :3].abs().max() > 0.2 and (found[:, 3] == 0).all() and (expected[:, 3] == 0).all()
    assert ours < drawn - 0.1


@pytest.mark.parametrize(("total", "count"), [(20, 6), (20, 8), (200, 8), (500, 8), (5, 8), (1, 1)])
def test_the_steps_of_the_heads_differ_reach_all_and_are_those_of_every_process(toy_x, total, count):
    settings, reached = settings_of(toy_x(head="literal", head_steps=count)), set()
    for step in range(20 * (total // count + 1)):
        draws = [Draws(5, step, 0, device=CPU, num_processes=2, process_index=index) for index in range(2)]
        draws[1].normal(3)  # what was drawn before makes no difference
        steps, again = (pixel_aware.head_steps(settings, total, each) for each in draws)
        assert steps == again and len(set(steps)) == len(steps) == min(total, count)
        assert all(type(j) is int for j in steps)
        reached.update(steps)
    assert reached == set(range(1, total + 1))


def test_the_papers_network_gets_the_scale_that_the_autoencoder_estimates(toy_x):
    flags = toy_x(mode="paper", head="literal")
    case = Loss(flags, noises=lambda tied: tied.requires_grad_())
    assert case.call() < 1e-5
    case.value.backward()
    assert case.given.shift.grad is None
    assert torch.equal(case.structure, case.given(case.sample, case.timesteps).structure.detach())
    assert is_normal(case.noise)
    assert sorted(set(case.timesteps.tolist())) == list(range(1, 21)) and not case.timesteps.is_floating_point()
    zero = Loss(flags, noises=torch.zeros_like)
    assert zero.call() == pytest.approx(mean_over_kept(zero.tied.square(), zero.timesteps, zero.steps), rel=1e-3)


# The loss of the autoencoder.


class AutoencoderLoss:
    """One call of it, with a network that gives random outputs."""

    def __init__(self, flags: dict, count: int = 1200, wrap=None):
        self.settings, self.config = settings_of(flags), SimpleNamespace(latent_dim=5)
        self.images = to_range(photos(count, 4, 4, seed=1))
        self.clean = clean_of(self.images)
        generator = torch.Generator().manual_seed(1)
        self.structure = torch.rand(self.clean.shape, generator=generator)
        self.mean, self.log_variance = torch.randn(2, count, 5, generator=generator)
        scheduler, batch = pixel_aware.build_process(self.settings), SimpleNamespace(images=self.images)
        network = self if wrap is None else wrap(self)
        draws = Draws(3, device=CPU)
        self.value = pixel_aware_autoencoder.autoencoder_loss(network, scheduler, self.settings, batch, draws).item()

    def __call__(self, noisy, timesteps, posterior_noise):
        self.noisy, self.timesteps, self.posterior_noise = noisy, timesteps, posterior_noise
        return SimpleNamespace(structure=self.structure, mean=self.mean, log_variance=self.log_variance)

    def by_hand(self, target: torch.Tensor) -> float:
        reconstruction = (self.structure - target).double().square().mean() / (2 * self.settings.recon_std**2)
        posterior = Normal(self.mean.double(), (self.log_variance.double() / 2).exp())
        divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
        return (reconstruction + divergence / 16).item()


@pytest.mark.parametrize("recon_std", [0.08, 0.5])
def test_the_autoencoder_is_trained_by_the_bound_on_clean_and_noisy_images(toy_x, recon_std):
    case = AutoencoderLoss(toy_x(recon_std=recon_std))
    assert case.value == pytest.approx(case.by_hand(case.clean), rel=1e-5)
    first = case.timesteps == 0
    assert first.double().mean().item() == pytest.approx(1 - pixel_aware_autoencoder.NOISY, abs=0.05)
    torch.testing.assert_close(case.noisy[first], case.clean[first], rtol=0, atol=1e-6)
    assert sorted(set(case.timesteps.tolist())) == list(range(21))
    exponent = 20 * (case.clean.double() + 0.1) * (column(case.timesteps) / 20) ** 3
    noise = (case.noisy - (-exponent / 2).exp() * case.clean) / (-torch.expm1(-exponent)).sqrt()
    assert is_normal(noise[~first])
    assert case.posterior_noise.shape == (1200, 5) and is_normal(case.posterior_noise)


def test_the_papers_autoencoder_is_trained_to_estimate_the_scale_of_noisy_images(toy_x):
    case = AutoencoderLoss(toy_x(mode="paper", head="literal"))
    assert case.value == pytest.approx(case.by_hand((-20 * case.clean).exp()), rel=1e-5)
    assert sorted(set(case.timesteps.tolist())) == list(range(1, 21))
    exponent = 20 * case.clean.double() * column(case.timesteps) / 20
    assert is_normal((case.noisy - (-exponent / 2).exp() * case.clean) / (-torch.expm1(-exponent)).sqrt())


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_the_autoencoder_may_be_inside_what_compiles_or_distributes_it(toy_x, name):
    class Wrapped:
        def __init__(self, inside):
            setattr(self, name, inside)

        def __call__(self, *args, **arguments):
            return getattr(self, name)(*args, **arguments)

    assert (
        AutoencoderLoss(toy_x(), wrap=lambda inside: Wrapped(Wrapped(inside))).value == AutoencoderLoss(toy_x()).value
    )


# Processes.


PARTS = [
    pytest.param({}, id="tied"),
    pytest.param(dict(use_structure=False), id="no structure"),
    pytest.param(dict(head="literal"), id="literal"),
    pytest.param(dict(mode="paper", head="literal"), id="paper"),
]


def parts_of(loss, images: torch.Tensor, network, *rest, **given) -> tuple[list[float], float]:
    """The losses of two processes with half of the images each, and that of one with all."""
    with torch.no_grad():
        whole = loss(network, *rest, SimpleNamespace(images=images), Draws(7, device=CPU), **given)
        parts = [
            loss(network, *rest, SimpleNamespace(images=half), draws, **given).item()
            for index, half in enumerate(images.chunk(2))
            for draws in [Draws(7, device=CPU, num_processes=2, process_index=index)]
        ]
    return parts, whole.item()


@pytest.mark.parametrize("changes", PARTS)
def test_processes_have_the_parts_of_one_loss(toy_x, changes):
    settings, images = settings_of(toy_x(**changes)), to_range(photos(8))
    torch.manual_seed(0)
    network, given = pixel_aware.build_unet(settings, 1).eval(), None
    if settings.use_structure:
        given = pixel_aware_autoencoder.build_autoencoder(settings, 1).eval()
    scheduler = pixel_aware.build_process(settings)
    parts, whole = parts_of(pixel_aware.loss, images, network, scheduler, settings, given=given)
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5) and parts[0] != parts[1]


@pytest.mark.parametrize("changes", [{}, dict(mode="paper", head="literal")], ids=["structure", "paper"])
def test_processes_have_the_parts_of_one_loss_of_the_autoencoder(toy_x, changes):
    settings, images = settings_of(toy_x(**changes)), to_range(photos(8))
    torch.manual_seed(0)
    network, scheduler = (
        pixel_aware_autoencoder.build_autoencoder(settings, 1).eval(),
        pixel_aware.build_process(settings),
    )
    parts, whole = parts_of(pixel_aware_autoencoder.autoencoder_loss, images, network, scheduler, settings)
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5) and parts[0] != parts[1]


# The scheduler.


def test_the_residual_is_that_of_the_structures(toy_x):
    settings = settings_of(toy_x(seed=9))
    torch.manual_seed(0)
    given = pixel_aware_autoencoder.build_autoencoder(settings, 1).eval()
    clean = clean_of(to_range(photos(24)))
    with torch.no_grad():
        mean, log_variance = given.encode(clean)
        noise = torch.randn(24, 4, generator=torch.Generator().manual_seed(9))
        rms = (clean - given.decode(mean + (log_variance / 2).exp() * noise)).double().square().mean().sqrt().item()
    scheduler = pixel_aware.build_scheduler(settings, levels_of(photos(24)), given)
    assert scheduler.config.residual_std == float(f"{rms:.3g}") != float(f"{rms:.2g}")
    assert (scheduler.config.mode, scheduler.config.gamma, len(scheduler)) == ("structure", 20, 20)


def test_without_structure_the_residual_is_about_mid_gray_of_images_spread_over_all(toy_x):
    images = photos(2100)
    images[1050:] //= 2
    settings = settings_of(toy_x(use_structure=False))
    chosen = np.unique(np.linspace(0, 2099, 2048).astype(int))
    rms = (clean_of(to_range(images[chosen])) - 0.5).double().square().mean().sqrt().item()
    scheduler = pixel_aware.build_scheduler(settings, levels_of(images))
    assert scheduler.config.residual_std == float(f"{rms:.3g}") and scheduler.config.schedule == "uniform"


def test_settings_of_the_process_arrive(toy_x):
    changes = dict(floor=0.3, ramp_power=2.0, schedule="uniform", num_train_timesteps=30, gamma=None)
    config = pixel_aware.build_process(settings_of(toy_x(**changes)), 0.2).config
    found = (config.floor, config.ramp_power, config.schedule, config.num_train_timesteps, config.gamma)
    assert found == (0.3, 2, "uniform", 30, 3) and config.residual_std == 0.2
    paper = dict(mode="paper", head="literal", num_train_timesteps=None, gamma=None)
    for preset, steps in (("tiny", 200), ("paper-celeba", 500)):
        config = pixel_aware.build_process(settings_of(toy_x(**paper, preset=preset))).config
        found = (config.num_train_timesteps, config.gamma, config.floor, config.ramp_power, config.mode)
        assert found == (steps, steps / 10, 0, 1, "paper")


# The prior.


@pytest.fixture
def trained_autoencoder(toy_x, monkeypatch):
    """trained_autoencoder(**changes): settings, and an autoencoder whose means hardly differ in dimension 1."""
    monkeypatch.setattr(pixel_aware_autoencoder, "ACTIVE", 0.05)

    def build(**changes):
        settings = settings_of(toy_x(**changes))
        torch.manual_seed(0)
        network = pixel_aware_autoencoder.build_autoencoder(settings, 1).eval()
        with torch.no_grad():
            network.to_moments.weight[:4] *= 30
            network.to_moments.weight[1] /= 60
        return settings, network

    return build


def test_the_prior_is_fitted_to_draws_of_the_posterior_on_the_latents_in_use(trained_autoencoder, capsys):
    settings, network = trained_autoencoder(seed=8)
    with torch.no_grad():
        mean, log_variance = network.encode(clean_of(to_range(photos(24))))
        codes = mean + (log_variance / 2).exp() * torch.randn(24, 4, generator=torch.Generator().manual_seed(8))
    assert mean[:, [0, 2, 3]].var(0).min() > 0.1 and 1e-6 < mean[:, 1].var() < 0.01
    pixel_aware_autoencoder.fit_prior(settings, network, levels_of(photos(24)))
    assert network.prior_active.tolist() == [0, 2, 3] and network.prior_weights.tolist() == [1]
    codes = codes[:, [0, 2, 3]].double()
    torch.testing.assert_close(network.prior_means[0].double(), codes.mean(0), rtol=1e-4, atol=1e-5)
    covariance = (network.prior_cholesky[0] @ network.prior_cholesky[0].mT).double()
    torch.testing.assert_close(covariance, codes.T.cov(correction=0) + 1e-3 * torch.eye(3), rtol=1e-3, atol=1e-5)
    assert (network.config.prior_components, network.config.active_latents) == (1, 3)
    assert "prior: 1 Gaussians on 3 of 4 latents in use, 24 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "components"),
    [(dict(prior_images=300), 8), (dict(prior_images=300, prior_components=3), 3), (dict(prior_images=50), 2)],
)
def test_as_many_gaussians_as_the_images_can_tell_the_same_for_a_seed(trained_autoencoder, changes, components):
    images, priors = levels_of(photos(200)), []
    for seed in (5, 5, 6):
        settings, network = trained_autoencoder(**changes, seed=seed)
        pixel_aware_autoencoder.fit_prior(settings, network, images)
        priors.append((network.prior_weights, network.prior_means, network.prior_cholesky))
        assert len(network.prior_weights) == components and network.prior_active.tolist() == [0, 2, 3]
    assert all(torch.equal(one, same) for one, same in zip(priors[0], priors[1], strict=True))
    assert not torch.equal(priors[0][1], priors[2][1])


@pytest.mark.parametrize("changes", [dict(prior="normal"), dict(mode="paper", head="literal")], ids=str)
def test_where_no_prior_is_wanted_none_is_fitted(trained_autoencoder, changes):
    settings, network = trained_autoencoder(**changes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pixel_aware_autoencoder.fit_prior(settings, network, levels_of(photos(24)))
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert network.config.prior == settings.prior and network.config.prior_components is None


def test_an_autoencoder_that_uses_no_latent_is_refused(trained_autoencoder):
    settings, network = trained_autoencoder(recon_std=0.08)
    with torch.no_grad():
        network.to_moments.weight.zero_()
    with pytest.raises(
        ValueError,
        match="^recon_std=0.08: .* expected another output_dir with more autoencoder_steps .* prior='normal'",
    ):
        pixel_aware_autoencoder.fit_prior(settings, network, levels_of(photos(24)))
    assert network.config.prior_components is None


# What is trained.


RUNS = {
    "tied": {},
    "no structure, literal": dict(use_structure=False, head="literal"),
    "literal, colour, uniform, oblong": dict(
        head="literal", image_channels=3, random_flip=True, schedule="uniform", resolution=["8x12"]
    ),
    "normal prior": dict(prior="normal", gradient_accumulation_steps=2),
    "paper": dict(mode="paper", head="literal"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_shows_and_exports_what_generates(toy_x, straight, name):
    flags = toy_x(**{"save_images_steps": 6, "eval_batch_size": 2, **RUNS[name]})
    settings, folder = settings_of(flags), train_toy(flags) if RUNS[name] else straight
    stages = ["autoencoder", "."] if settings.use_structure else ["."]
    assert (folder / "autoencoder").exists() == settings.use_structure
    for stage in stages:
        assert list(losses_of(folder / stage)) == list(range(1, 7))
        assert np.isfinite(list(losses_of(folder / stage).values())).all()
        assert (folder / stage / "samples" / "step-0000006.png").is_file()
        assert json.loads((folder / stage / "settings.json").read_text())["max_train_steps"] == 6

    pipeline = pyrdiff.load(folder / "pipeline")
    network, scheduler = pipeline.unet.config, pipeline.scheduler.config
    height, width = settings.sizes[0]
    assert (network.head, network.use_structure) == (settings.head, settings.use_structure)
    assert network.target == ("noise" if settings.mode == "paper" else "clean")
    assert network.num_train_timesteps == scheduler.num_train_timesteps == settings.num_train_timesteps
    assert scheduler.mode == settings.mode and (scheduler.residual_std != 0.1) == (settings.mode == "structure")
    assert scheduler.schedule == (settings.schedule if settings.use_structure else "uniform")
    pipeline.set_progress_bar_config(disable=True)
    shape, generator = (2, settings.image_channels, height, width), torch.Generator().manual_seed(0)
    if settings.mode == "paper":
        assert pipeline.autoencoder.config.output == "scale"
        call = dict(image=torch.rand(shape, generator=generator), timestep=settings.num_train_timesteps)
    else:
        call = dict(batch_size=2, num_passes=2)
    images = pipeline(**call, generator=generator, output_type="pt").images
    assert images.shape == shape and images.isfinite().all()
    if not settings.use_structure:
        assert pipeline.autoencoder is None
        return
    measured = pipeline.autoencoder.config.residual_std
    assert measured is None if settings.mode == "paper" else measured > 0
    fitted = settings.mode == "structure" and settings.prior == "gmm"
    assert (pipeline.autoencoder.config.prior_components is not None) == fitted
    assert pipeline.autoencoder.config.latent_dim == 4
    finished = pyrdiff.ScaleAutoencoder.from_pretrained(folder / "autoencoder" / "finished").state_dict()
    kept = pipeline.autoencoder.state_dict()
    assert kept.keys() == finished.keys() and all(torch.equal(kept[key], value) for key, value in finished.items())


@pytest.mark.parametrize("use_ema", [True, False])
def test_what_is_built_on_has_the_averaged_weights_and_stays_as_it_is(toy_x, straight, use_ema):
    folder = straight if use_ema else train_toy(toy_x(use_ema=False))
    finished = pyrdiff.ScaleAutoencoder.from_pretrained(folder / "autoencoder" / "finished").state_dict()
    groups, _ = load_checkpoint(folder / "autoencoder" / "checkpoint-6")
    expected = groups["ema" if use_ema else "model"]
    assert finished.keys() - expected.keys() == {f"prior_{key}" for key in ("weights", "means", "cholesky", "active")}
    assert all(torch.equal(finished[name], value) for name, value in expected.items())
    if use_ema:
        assert not all(torch.equal(finished[name], value) for name, value in groups["model"].items())


def test_every_part_of_the_method_gets_the_finished_network_frozen(toy_x):
    seen = {}

    def spy(name):
        def part(*args, given=None):
            seen[name] = given
            assert given.__class__ is pyrdiff.ScaleAutoencoder and not given.training
            assert not any(parameter.requires_grad for parameter in given.parameters())
            return getattr(METHOD, name)(*args, given=given)

        return part

    parts = {name: spy(name) for name in ("scheduler", "loss", "pipeline", "preview")}
    train_toy(toy_x(save_images_steps=6, eval_batch_size=1), replace(METHOD, **parts))
    assert seen.keys() == parts.keys() and len({id(given) for given in seen.values()}) == 1
    assert METHOD.building_on("network").first is None and METHOD.building_on("network").model is METHOD.model


# Progress.


def cells_of(path: Path, columns: int, rows: int) -> list[list[np.ndarray]]:
    with Image.open(path) as grid:
        assert grid.size == (columns * 10 + 2, rows * 10 + 2) and grid.mode == "L"
        pixels = np.asarray(grid)
    return [[pixels[2 + 10 * y :][:8, 2 + 10 * x :][:, :8] for x in range(columns)] for y in range(rows)]


def test_pictures_of_progress_are_of_images_and_structures_then_of_samples(straight):
    images = photos(24)[[0, 11, 23], ..., 0]
    for step in (3, 6):
        cells = cells_of(straight / "autoencoder" / "samples" / f"step-{step:07d}.png", 3, 3)
        assert all(np.array_equal(cell, image) for cell, image in zip(cells[0], images, strict=True))
        assert not np.array_equal(cells[1][0], cells[2][0]), "of the clean and of the noisy image"
        cells_of(straight / "samples" / f"step-{step:07d}.png", 3, 5)
    lines = [line for line in lines_of(straight / "autoencoder") if "validation" in line]
    assert [line["step"] for line in lines] == [3, 6]
    network = pyrdiff.ScaleAutoencoder.from_pretrained(straight / "autoencoder" / "finished")
    clean = clean_of(to_range(images[..., None]))
    with torch.no_grad():
        error = (network(clean).structure - clean).square().mean().sqrt().item()
    assert lines[-1]["validation"].keys() == {"error_0", "error_10"}
    assert lines[-1]["validation"]["error_0"] == pytest.approx(error, rel=1e-4)
    assert 0 < lines[-1]["validation"]["error_10"] != lines[-1]["validation"]["error_0"]

    pipeline = pyrdiff.load(straight / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    cells = cells_of(straight / "samples" / "step-0000006.png", 3, 5)
    for row, passes in ((1, 1), (4, 8)):
        output = pipeline(3, num_passes=passes, generator=[torch.Generator().manual_seed(5 + k) for k in range(3)])
        assert all(np.array_equal(cells[row][k], np.asarray(image)) for k, image in enumerate(output.images))
        assert all(np.array_equal(cells[0][k], np.asarray(image)) for k, image in enumerate(output.structure))


@pytest.mark.parametrize("mode", ["structure", "paper"])
def test_a_very_short_process_and_few_images_have_pictures_too(toy_x, tmp_path, mode):
    np.save(tmp_path / "few.npy", photos(3))
    changes = dict(mode=mode, head="literal", num_train_timesteps=1, autoencoder_steps=1, max_train_steps=1)
    flags = toy_x(**changes, save_images_steps=1, eval_batch_size=5, train_data_dir=str(tmp_path / "few.npy"))
    folder = train_toy({**flags, "prior": "normal"})
    cells = cells_of(folder / "samples" / "step-0000001.png", *((3, 5) if mode == "paper" else (5, 2)))
    if mode == "paper":
        assert all(np.array_equal(cell, image[..., 0]) for cell, image in zip(cells[0], photos(3), strict=True))


# Stages: one command for both, stops, kills.


def test_the_same_command_after_the_end_changes_nothing(toy_x):
    flags = toy_x()
    folder = train_toy(flags)
    assert (folder / "autoencoder" / "finished" / WEIGHTS).is_file() and (folder / "pipeline").is_dir()
    before, written = contents(folder), (folder / "autoencoder" / "finished" / WEIGHTS).stat()
    train_toy(flags)
    after = (folder / "autoencoder" / "finished" / WEIGHTS).stat()
    assert (after.st_mtime_ns, after.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert contents(folder) == before


def with_losses(autoencoder=None, network=None):
    """The method with f(number of the call) called before each loss."""

    def counted(loss, note):
        calls = iter(range(10**6))

        def counting(*args, **given):
            note(next(calls))
            return loss(*args, **given)

        return counting if note is not None else loss

    stage = replace(AUTOENCODER, loss=counted(pixel_aware_autoencoder.autoencoder_loss, autoencoder))
    return replace(
        METHOD,
        loss=counted(pixel_aware.loss, network),
        first=lambda settings: (stage, pixel_aware.first(settings)[1]),
    )


def train_until_stopped(flags: dict, step: int, **stage) -> Path:
    """Trains; a signal comes in the first batch of a new step of a stage. Returns the stage's folder."""
    (name, done), folder = *stage.items(), Path(flags["output_dir"])
    wanted = (step - 1 - done) * flags.get("gradient_accumulation_steps", 1)

    def note(call):
        if call == wanted:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        train_toy(flags, with_losses(**{name: note}))
    folder = folder / "autoencoder" if name == "autoencoder" else folder
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{step}"
    return folder


STOPS = {
    "default": {},
    "everything": dict(head="literal", random_flip=True, gradient_accumulation_steps=2, schedule="uniform"),
    "paper": dict(mode="paper", head="literal", save_images_steps=3, eval_batch_size=1),
}


@pytest.mark.parametrize("variant", STOPS)
def test_a_run_stopped_in_both_stages_is_the_uninterrupted_one_bit_for_bit(toy_x, straight, variant):
    flags = toy_x(**STOPS[variant])
    stage = train_until_stopped(flags, 2, autoencoder=0)
    assert not (stage / "finished").exists() and [path.name for path in stage.parent.iterdir()] == ["autoencoder"]
    folder = train_until_stopped(flags, 4, network=0)
    assert (folder / "autoencoder" / "finished").is_dir() and not (folder / "pipeline").exists()
    resumed = train_toy(flags)
    whole = straight if variant == "default" else train_toy(toy_x(**STOPS[variant]))
    assert_same_training(resumed, whole)


@pytest.fixture
def copied(straight, tmp_path, toy_x):
    """copied(**changes): flags of the straight run, in a copy of its folder."""
    folder = shutil.copytree(straight, tmp_path / "run")
    return lambda **changes: toy_x(save_images_steps=3, eval_batch_size=3, output_dir=str(folder), **changes)


def refused_losses(call: int):
    raise AssertionError("trains again")


@pytest.mark.parametrize("writing", [False, True])
def test_a_kill_before_the_first_stage_was_finished_fits_the_same_prior(copied, straight, writing):
    flags = copied()
    stage = Path(flags["output_dir"]) / "autoencoder"
    shutil.rmtree(stage / "finished")
    stray = stage / f".finished.writing-1{40 * '0'}"  # of no process
    if writing:
        (stray / "deeper").mkdir(parents=True)
        for name in (WEIGHTS, "deeper/others"):
            (stray / name).write_bytes(b"half of them")
    # What the network was trained on is known by its bytes: it would be refused, were they others.
    train_toy(flags, with_losses(refused_losses, refused_losses))
    assert_same_training(stage.parent, straight)
    assert not stray.exists()


def test_an_autoencoder_that_is_finished_is_not_trained_for_a_new_network(copied, straight):
    flags = copied()
    folder = Path(flags["output_dir"])
    for path in folder.iterdir():
        if path.name != "autoencoder":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_toy(flags, with_losses(autoencoder=refused_losses))
    assert_same_training(folder, straight)


def test_strays_of_killed_saves_are_swept_in_the_first_stage_too(copied):
    flags = copied()
    stage = Path(flags["output_dir"]) / "autoencoder"
    (stage / f".checkpoint-6.writing-{os.getpid()}").mkdir()
    (stage / "checkpoint-6").rename(stage / f".checkpoint-6.replaced-{os.getpid()}")
    train_toy(flags, with_losses(refused_losses, refused_losses))
    assert not list(stage.glob(".checkpoint-*")) and (stage / "checkpoint-6").is_dir()


# Stages: what does not fit together.


def test_a_network_on_another_autoencoder_is_refused(copied):
    flags = copied()
    path = Path(flags["output_dir"]) / "autoencoder" / "finished" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    before = contents(Path(flags["output_dir"]))
    with pytest.raises(ValueError, match="run/checkpoint-6 has given=.* expected the same, or another output_dir"):
        train_toy(flags)
    assert contents(Path(flags["output_dir"])) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(latent_dim=5), "autoencoder/checkpoint-6 has network="),
        (dict(prior="normal"), "autoencoder/checkpoint-6 has network="),
        (dict(mode="paper", head="literal"), "autoencoder/checkpoint-6 has network="),
        (dict(gamma=10.0), "autoencoder/checkpoint-6 has scheduler="),
        (dict(train_batch_size=8), "autoencoder/checkpoint-6 has batch="),
        (dict(seed=6), "autoencoder/checkpoint-6 has seed=5, this run has 6"),
        (dict(encoder_channels=[16, 16]), "run/checkpoint-6 has network="),
        (dict(head="literal"), "run/checkpoint-6 has network="),
        (dict(use_structure=False), "run/checkpoint-6 has network="),
        (dict(resume_from_checkpoint="none"), "autoencoder'?: holds checkpoints"),
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_its_folder_is_refused_and_writes_nothing(copied, changes, named):
    flags = copied(**changes)
    before = contents(Path(flags["output_dir"]))
    with pytest.raises(ValueError, match=named):
        train_toy(flags)
    assert contents(Path(flags["output_dir"])) == before


def test_what_only_sets_how_the_first_stage_is_trained_may_change(copied):
    flags = copied(recon_std=0.5, prior_images=10, autoencoder_share=0.5)
    before = contents(Path(flags["output_dir"]) / "autoencoder")
    train_toy(flags, with_losses(refused_losses, refused_losses))
    after = contents(Path(flags["output_dir"]) / "autoencoder")
    assert {name for name in before if before[name] != after[name]} <= {"settings.json"}


FOREIGN = {
    "a letter": (["to_my_mother.txt"], {}, "run'"),
    "a letter in the first stage": (["autoencoder/to_my_mother.txt"], {}, "run/autoencoder'"),
    "a file in its place": (["autoencoder"], {}, "run/autoencoder'.* found a file"),
    "a letter beside a first stage": (["autoencoder/settings.json", "to_my_mother.txt"], {}, "run'"),
    "only a first stage": (["autoencoder/settings.json"], dict(use_structure=False), "run'"),
    "its checkpoints": (["autoencoder/checkpoint-1/a"], dict(resume_from_checkpoint="none"), "run/autoencoder': holds"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_something_else_is_refused(toy_x, tmp_path, name):
    files, changes, message = FOREIGN[name]
    for file in files:
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text("Dear")
    with pytest.raises(ValueError, match=f"output_dir='.*{message}.*"):
        train_toy(toy_x(output_dir=str(tmp_path / "run"), **changes))
    assert sorted(contents(tmp_path / "run")) == sorted(files)


# Stages: time.


def test_the_first_stage_has_its_share_of_the_minutes_and_its_own_steps(toy_x):
    settings = settings_of(toy_x(minutes=10.0, autoencoder_share=0.3, resume_from_checkpoint="some/checkpoint-3"))
    method, changed = pixel_aware.first(settings)
    assert method is AUTOENCODER and changed.minutes == pytest.approx(3)
    assert (changed.max_train_steps, changed.resume_from_checkpoint) == (6, "latest")
    expected = replace(settings, minutes=changed.minutes, max_train_steps=6, resume_from_checkpoint="latest")
    assert changed == expected
    _, plain = pixel_aware.first(settings_of(toy_x(resume_from_checkpoint="none", autoencoder_steps=7)))
    assert (plain.minutes, plain.max_train_steps, plain.resume_from_checkpoint) == (None, 7, "none")
    assert pixel_aware.first(settings_of(toy_x(use_structure=False))) is None


def test_when_the_time_is_up_both_stages_are_finished_with_what_they_have(toy_x):
    folder = train_toy(toy_x(minutes=0.05, prior="normal"))
    for stage in ("autoencoder", "."):
        assert list_checkpoints(folder / stage)[-1].name == "checkpoint-1"
    assert pyrdiff.load(folder / "pipeline").autoencoder is not None


def test_the_time_of_the_first_stage_counts(copied):
    flags = copied()
    folder = Path(flags["output_dir"])
    tensors, state = load_checkpoint(folder / "autoencoder" / "checkpoint-6")
    save_checkpoint(folder / "autoencoder", 6, tensors, {**state, "seconds": 1000.0})
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "log.jsonl").unlink()
    train_toy(flags)
    assert all(1000 < line["seconds"] < 1100 for line in lines_of(folder) if "seconds" in line)
    assert 1000 < load_checkpoint(folder / "checkpoint-6")[1]["seconds"] < 1100


# Flags and what is refused.


def parsed(*args: str) -> PixelAwareSettings:
    return parse(PixelAwareSettings, METHOD.summary, ["--train_data_dir", "images", *args])


def test_values_arrive():
    settings = parsed("--mode", "paper", "--head", "literal", "--resolution", "32x64", "--encoder_channels", "8", "16")
    assert (settings.mode, settings.head, settings.sizes) == ("paper", "literal", [(32, 64)])
    assert settings.encoder_channels == (8, 16) and not parsed("--use_structure", "False").use_structure
    assert parsed().sizes == [(32, 32)] and parsed().head == "tied" and parsed().minutes is None
    assert methods()["pixel_aware"] is METHOD


NOT_A_COUNT = (
    "head_steps",
    "prior_components",
    "prior_images",
    "autoencoder_steps",
    "num_train_timesteps",
    "latent_dim",
)
REFUSED = [
    *[({name: 0}, name) for name in NOT_A_COUNT],
    *[({name: value}, name) for name in ("gamma", "ramp_power") for value in (0.0, -1.0, float("inf"))],
    *[({"floor": value}, "floor") for value in (-0.1, float("inf"))],
    *[({"recon_std": value}, "recon_std") for value in (0.0, float("inf"))],
    *[({"autoencoder_share": value}, "autoencoder_share") for value in (0.0, 1.0)],
    (dict(resolution=["16", "32"]), "resolution"),
    (dict(resolution=["large"]), "resolution"),
    (dict(patch_size=8), "patch_size"),
    (dict(compile=True, head="literal"), "compile"),
    (dict(mode="paper", head="literal", schedule="uniform"), "schedule"),
    (dict(mode="paper"), "head"),
    (dict(mode="paper", head="literal", use_structure=False), "use_structure"),
    (dict(train_batch_size=0), "train_batch_size"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=str)
def test_a_bad_value_is_named(toy_x, changes, named):
    with pytest.raises(ValueError, match=f"^{named}=.*: expected "):
        settings_of(toy_x(**changes))


@pytest.mark.parametrize("args", ["--recon_std 0", "--mode paper", "--autoencoder_share 1.5"])
def test_a_bad_value_on_the_command_line_is_one_line_and_exit_code_2(capsys, args):
    with pytest.raises(SystemExit) as caught:
        parsed(*args.split())
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and "expected" in output.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=["10"]), "sample_size=10: .* multiples of 4"),
        (dict(resolution=["20"], preset="small"), "sample_size=20: .* multiples of 16"),
        (dict(resolution=["8x10"]), r"sample_size=\(8, 10\): .* multiples of 4"),
        (dict(encoder_channels=[8, 12]), r"encoder_channels=\(8, 12\): expected multiples of norm_num_groups=8"),
        (dict(encoder_channels=[]), "encoder_channels="),
        (dict(gamma=None, num_train_timesteps=1000), "gamma=100.0, floor=0.1"),
        (dict(train_data_dir="./no/such/folder"), "./no/such/folder"),
        pytest.param(dict(resolution=["9"], use_structure=False), "multiples of 2"),
        pytest.param(dict(resolution=["12"], encoder_channels=[8] * 4), "multiples of 8"),
    ],
    ids=str,
)
def test_what_no_run_can_be_made_of_is_refused_and_writes_nothing(toy_x, changes, message):
    flags = toy_x(**changes)
    flags["encoder_channels"] = tuple(flags["encoder_channels"])
    with pytest.raises(ValueError, match=message):
        train_toy(flags)
    assert not Path(flags["output_dir"]).exists()


def test_a_training_as_it_is_on_a_gpu(toy_x):
    """In bfloat16, and with the memory format of convolutions, beside which heads have weights of five dimensions."""
    changes = dict(mixed_precision="bf16", channels_last=True, head="literal")
    folder = train_toy(toy_x(max_train_steps=2, autoencoder_steps=2, prior="normal", **changes))
    assert np.isfinite(list(losses_of(folder).values())).all()
    assert pyrdiff.load(folder / "pipeline").autoencoder.config.residual_std > 0


def test_presets_are_fitted_to_the_images():
    def unet(size, **more):
        settings = PixelAwareSettings(train_data_dir="x", resolution=[size], **more)
        return pixel_aware.build_unet(settings, 1).config

    sizes = {"32": 2, "64": 4, "56": 2, "72": 3, "88": 2, "16": 1, "96x128": 4}
    assert {size: unet(size, preset="tiny").patch_size for size in sizes} == sizes
    assert unet("64", encoder_channels=(16, 32)).attention_levels in ((), [])
    assert unet("64", preset="small", encoder_channels=(32, 32, 32, 32)).attention_levels in ((3,), [3])
    assert unet("32", head="literal", preset="tiny").head_attention
    assert not unet("64", head="literal", encoder_channels=(8,)).head_attention


@pytest.mark.parametrize("good", [True, False])
def test_the_script(toy_x, monkeypatch, capsys, good):
    flags = toy_x(max_train_steps=1, autoencoder_steps=1, prior="normal", resolution=["8" if good else "10"])
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
    assert errors.splitlines()[-1].startswith("error: sample_size=10: expected")


def test_help_needs_no_torch():
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: print('code', done.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=600)
    assert result.stdout.endswith("code 0 False\n"), result.stderr
    assert all(f"--{flag} " in result.stdout for flag in ("recon_std", "use_structure", "autoencoder_steps", "prior"))
