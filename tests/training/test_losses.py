"""Losses against closed forms with the draws made again, and draws that do not depend on the number of processes."""

import pytest
import torch
from diffusers import DDPMScheduler

from pyrdiff.training.losses import Draws, noise_prediction_loss

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
