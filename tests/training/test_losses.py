"""Losses against closed forms with the draws made again, and draws that do not depend on the number of processes."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from pyrdiff.schedulers import CosineResidualScheduler
from pyrdiff.training.losses import Draws, noise_prediction_loss, variational_bound

KINDS = ["epsilon", "v_prediction", "sample"]
STEPS = 40
CPU = torch.device("cpu")


class Case:
    """Images, the draws a loss will make from the same seed, and by hand, in float64, what eq. 5 says of them."""

    def __init__(self, kind: str):
        self.scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.3, prediction_type=kind)
        self.images = torch.rand(64, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
        again = self.draws()
        self.noise = again.normal(*self.images.shape).double()
        self.timesteps = again.integers(STEPS, len(self.images))
        clean = torch.cumprod(1 - torch.linspace(1e-4, 0.3, STEPS, dtype=torch.float64), 0)[self.timesteps]
        self.snr = clean / (1 - clean)
        self.signal, self.spread = (value.sqrt()[:, None, None, None] for value in (clean, 1 - clean))
        x = self.images.double()
        self.noisy = self.signal * x + self.spread * self.noise
        velocity = self.signal * self.noise - self.spread * x
        self.target = {"epsilon": self.noise, "v_prediction": velocity, "sample": x}[kind]

    @staticmethod
    def draws() -> Draws:
        return Draws(3, 14, 15, device=CPU)

    def loss(self, prediction: torch.Tensor, snr_gamma: float | None = None) -> torch.Tensor:
        def predict(noisy, timesteps):
            torch.testing.assert_close(noisy.double(), self.noisy, rtol=1e-4, atol=1e-5)
            assert torch.equal(timesteps, self.timesteps)
            return prediction.float()

        loss = noise_prediction_loss(predict, self.scheduler, self.images, self.draws(), snr_gamma)
        assert loss.shape == () and loss.dtype == torch.float32
        return loss.double()


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_target_has_no_loss(kind, snr_gamma):
    case = Case(kind)
    assert case.loss(case.target, snr_gamma) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_of_zeros_has_the_mean_square_of_the_target(kind):
    case = Case(kind)
    torch.testing.assert_close(case.loss(torch.zeros_like(case.noise)), case.target.square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("snr_gamma", [0.5, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights(kind, snr_gamma):
    case = Case(kind)
    assert (case.snr < snr_gamma).any() and (case.snr > snr_gamma).any()
    divisor = {"epsilon": case.snr, "v_prediction": case.snr + 1, "sample": torch.ones_like(case.snr)}[kind]
    weight = torch.minimum(case.snr, torch.tensor(snr_gamma)) / divisor
    expected = (weight * case.target.square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(case.loss(torch.zeros_like(case.noise), snr_gamma), expected, rtol=1e-4, atol=0)


def test_min_snr_weighs_one_clean_estimate_alike_whatever_is_predicted():
    losses = []
    for kind in KINDS:
        case = Case(kind)
        x = 0.3 * case.images.double()
        noise = (case.noisy - case.signal * x) / case.spread
        velocity = case.signal * noise - case.spread * x
        losses.append(case.loss({"epsilon": noise, "v_prediction": velocity, "sample": x}[kind], 5.0))
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("noisiest", [None, 14])
def test_the_best_predictor_of_gaussian_data_has_the_loss_of_the_closed_form(noisiest):
    """Data N(0, v): the best noise prediction is s / (a² v + s²) x, and its error a² v / (a² v + s²) at every time."""
    scheduler, variance = Case("epsilon").scheduler, 0.25
    clean = scheduler.alphas_cumprod.double()
    error = clean * variance / (clean * variance + 1 - clean)
    seen = set()

    def predict(noisy, timesteps):
        seen.update(timesteps.tolist())
        a2 = clean[timesteps].float()[:, None, None, None]
        return (1 - a2).sqrt() / (a2 * variance + 1 - a2) * noisy

    images = variance**0.5 * torch.randn(20_000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = noise_prediction_loss(predict, scheduler, images, Case.draws(), noisiest=noisiest)
    assert seen == set(range(noisiest or STEPS))
    assert loss.item() == pytest.approx(error[:noisiest].mean().item(), abs=0.008)  # 4 standard errors
    assert error[:14].mean() > 1.3 * error.mean()  # so the two cases differ


@pytest.mark.parametrize("processes", [2, 3])
def test_draws_of_processes_are_the_parts_of_one_draw(processes):
    seed = (7, 3, 1)
    one = Draws(*seed, device=CPU)
    parts = [Draws(*seed, device=CPU, num_processes=processes, process_index=k) for k in range(processes)]
    for _ in range(2):
        whole = one.normal(4 * processes, 3, 8, 8)
        mine = [part.normal(4, 3, 8, 8) for part in parts]
        assert torch.equal(torch.cat(mine), whole) and not torch.equal(mine[0], mine[1])
        whole = one.integers(1000, 4 * processes)
        mine = [part.integers(1000, 4) for part in parts]
        assert torch.equal(torch.cat(mine), whole) and not torch.equal(mine[0], mine[1])


def test_draws_depend_on_every_part_of_the_seed_and_on_nothing_global():
    base = Draws(7, 3, 1, device=CPU).normal(2, 9)
    torch.manual_seed(0)
    assert torch.equal(Draws(7, 3, 1, device=CPU).normal(2, 9), base)
    state = torch.get_rng_state()
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 0), (3, 7, 1)):
        assert not torch.equal(Draws(*other, device=CPU).normal(2, 9), base)
    assert torch.equal(torch.get_rng_state(), state)


def test_integers_cover_their_range():
    values = Draws(1, device=CPU).integers(5, 1000)
    assert values.dtype == torch.int64 and values.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processes", [2, 3])
def test_uniform_and_shared_numbers_of_processes_are_those_of_one(processes):
    seed = (7, 3, 1)
    one = Draws(*seed, device=CPU)
    parts = [Draws(*seed, device=CPU, num_processes=processes, process_index=k) for k in range(processes)]
    for _ in range(2):
        whole = one.uniform(4 * processes, 3)
        mine = [part.uniform(4, 3) for part in parts]
        assert torch.equal(torch.cat(mine), whole) and not torch.equal(mine[0], mine[1])
        whole = one.shared_normal(4 * processes, 3, 2)
        assert whole.shape == (4 * processes, 3, 2) and torch.equal(whole, whole[:1].expand_as(whole))
        assert all(torch.equal(part.shared_normal(4, 3, 2), whole[:4]) for part in parts)


def test_uniform_numbers_are_uniform():
    values = Draws(1, device=CPU).uniform(100, 200)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 10, 0, 1)
    assert (counts / 2000 - 1).abs().max() < 0.1


def test_a_choice_is_the_same_in_every_process_and_covers_the_options():
    options, found = ("a", "b", "c"), []
    for step in range(300):
        one = Draws(5, step, device=CPU)
        found.append(one.choice(options))
        assert Draws(5, step, device=CPU, num_processes=4, process_index=1).choice(options) == found[-1]
        before = one.generator.get_state()
        assert one.choice(["only"]) == "only" and torch.equal(one.generator.get_state(), before)
    assert all(70 < found.count(option) < 130 for option in options)
    assert [Draws(6, step, device=CPU).choice(options) for step in range(300)] != found


# The variational bound. The oracle follows Nichol and Dhariwal's gaussian_diffusion.py, in float64.


def bound_by_hand(scheduler, clean, noisy, noise_prediction, place, timesteps, half_bin) -> torch.Tensor:
    gamma = scheduler.alphas_cumprod.double().numpy()
    betas = 1 - gamma / np.append(1.0, gamma[:-1])
    gamma_prev = np.append(1.0, gamma[:-1])
    posterior_variance = betas * (1 - gamma_prev) / (1 - gamma)
    posterior_log_variance_clipped = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    coef1 = betas * np.sqrt(gamma_prev) / (1 - gamma)
    coef2 = (1 - gamma_prev) * np.sqrt(1 - betas) / (1 - gamma)
    terms = []
    for row, t in enumerate(timesteps.tolist()):
        x, x_t, eps, v = (part[row].double().numpy() for part in (clean, noisy, noise_prediction, place))
        fraction = (v + 1) / 2
        model_log_variance = fraction * np.log(betas[t]) + (1 - fraction) * posterior_log_variance_clipped[t]
        pred_xstart = np.sqrt(1 / gamma[t]) * x_t - np.sqrt(1 / gamma[t] - 1) * eps
        model_mean = coef1[t] * pred_xstart + coef2[t] * x_t
        if t > 0:
            true_mean, true_log_variance = coef1[t] * x + coef2[t] * x_t, posterior_log_variance_clipped[t]
            true = torch.distributions.Normal(torch.tensor(true_mean), float(np.exp(true_log_variance / 2)))
            model = torch.distributions.Normal(torch.tensor(model_mean), torch.tensor(model_log_variance / 2).exp())
            nats = torch.distributions.kl_divergence(true, model)
        else:
            model = torch.distributions.Normal(torch.tensor(model_mean), torch.tensor(model_log_variance / 2).exp())
            centre = torch.tensor(x)
            nats = -(model.cdf(centre + half_bin) - model.cdf(centre - half_bin)).clamp(min=1e-12).log()
        terms.append(nats.mean() / math.log(2))
    return torch.stack(terms)


def bound_case(scheduler, timesteps, error: float = 0.3, seed: int = 0):
    """Clean, noisy, noise prediction, place and the true noise: 4x4 values of 8 bits, times 8."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), 2, 4, 4)
    clean = torch.randint(-20, 21, shape, generator=generator) / 127.5 * 8
    noise = torch.randn(shape, generator=generator)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    prediction = noise + error * torch.randn(shape, generator=generator)
    place = torch.rand(shape, generator=generator) * 2.4 - 1.2
    return clean, noisy, prediction, place, noise


SCHEDULES = {
    "cosine 500": dict(num_train_timesteps=500),
    "cosine 12": dict(num_train_timesteps=12),
    "linear 2000": dict(num_train_timesteps=2000, beta_schedule="linear", beta_start=1e-6, beta_end=1e-2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_is_nichol_and_dhariwals_at_every_kind_of_time(schedule):
    scheduler = CosineResidualScheduler(**SCHEDULES[schedule])
    last = len(scheduler) - 1
    timesteps = torch.tensor([0, 0, 1, 2, last // 2, last - 1, last])
    case = bound_case(scheduler, timesteps)[:4]
    found = variational_bound(scheduler, *case, timesteps, half_bin=8 / 255)
    assert found.shape == (7,) and found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), bound_by_hand(scheduler, *case, timesteps, 8 / 255), rtol=1e-3, atol=1e-5
    )
    assert (found[2:] > 0).all()


def test_the_true_posterior_has_no_divergence_and_another_variance_has_the_closed_form():
    scheduler = CosineResidualScheduler()
    timesteps = torch.tensor([1, 10, 250, 499])
    clean, noisy, _, _, noise = bound_case(scheduler, timesteps)
    lowest = torch.full_like(clean, -1)
    assert variational_bound(scheduler, clean, noisy, noise, lowest, timesteps, 8 / 255).abs().max() < 1e-5
    gamma = scheduler.alphas_cumprod.double()
    ratio = (1 - gamma[timesteps - 1]) / (1 - gamma[timesteps])  # beta~ / beta
    expected = 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    found = variational_bound(scheduler, clean, noisy, noise, -lowest, timesteps, 8 / 255)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_code_length_is_right_far_out_on_both_sides(sign):
    """Where float32 has no numbers left between a cdf and 1."""
    scheduler = CosineResidualScheduler()
    timesteps = torch.zeros(1, dtype=torch.long)
    clean, noisy, _, place, noise = bound_case(scheduler, timesteps)
    noisy = noisy - scheduler.alphas_cumprod[0].sqrt() * sign * 0.045  # 5 spreads and more
    half_bin = 0.002
    found = variational_bound(scheduler, clean, noisy, noise, place, timesteps, half_bin).double()
    expected = bound_by_hand(scheduler, clean, noisy, noise, place, timesteps, half_bin)
    assert 20 < expected < 35
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_the_codes_of_all_values_are_one_distribution():
    """2 ** -length summed over the values of all bins is 1."""
    scheduler = CosineResidualScheduler(num_train_timesteps=12)
    step = 2 / 255 * 8
    clean = (torch.arange(-300, 301) * step).reshape(-1, 1, 1, 1)
    timesteps = torch.zeros(len(clean), dtype=torch.long)
    noisy, noise = torch.full_like(clean, 0.7), torch.full_like(clean, 0.4)
    lengths = variational_bound(scheduler, clean, noisy, noise, torch.zeros_like(clean), timesteps, step / 2)
    assert (2.0**-lengths).sum().item() == pytest.approx(1, abs=1e-4)


def test_only_the_variance_is_told_of_a_detached_prediction_and_no_gradient_is_lost():
    scheduler = CosineResidualScheduler()
    timesteps = torch.tensor([0, 0, 1, 100, 499])
    clean, noisy, prediction, place, _ = bound_case(scheduler, timesteps, error=1.0)
    place = (3 * place).requires_grad_()
    bound = variational_bound(scheduler, clean, noisy, prediction.detach(), place, timesteps, 8 / 255)
    (gradient,) = torch.autograd.grad(bound.sum(), place)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().sum(1) > 0).all()
