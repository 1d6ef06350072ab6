"""
Averages of the weights whose length is chosen after the run (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C).

An average has a power function as its profile: at step t, the weights of step s count as s**gamma, for s up to t. Its
length is the standard deviation of that profile, as a share of t ("sigma_rel" there). A run keeps two of them, and
copies of both along the way; any other average is, nearly, a weighted sum of these copies.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .settings import LONGEST_AVERAGE, SHORTEST_AVERAGE

LENGTHS = (0.05, 0.15)  # of the averages that a run keeps: sums of their copies come near to all lengths up to 0.25


def exponent(length: float) -> float:
    """
    gamma of the profile with this length: length**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)) (eq. 5 there).

    Args:
        length: Share of the steps, from SHORTEST_AVERAGE to LONGEST_AVERAGE.

    Raises:
        ValueError: for another length.
    """
    if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
        raise ValueError(f"length={length}: expected a number from {SHORTEST_AVERAGE} to {LONGEST_AVERAGE}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


class PowerAverages:
    """
    Averages of parameters over all steps of a run.

    Args:
        parameters: To be averaged, on their device.
        lengths: Of the averages.

    Attributes:
        values: {length: tensors}, in the order of the parameters. They are nothing yet before the first step.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], lengths: Sequence[float] = LENGTHS):
        self._exponents = {length: exponent(length) for length in lengths}
        self.values = {length: [value.detach().clone() for value in parameters] for length in lengths}

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.Tensor], step: int) -> None:
        """
        Takes in the weights after a step (eq. 4 there). With weights that stay between steps, it is exact.

        Args:
            parameters: As they are now.
            step: Of the run, from 1.
        """
        for length, values in self.values.items():
            kept = (1 - 1 / step) ** (self._exponents[length] + 1)
            torch._foreach_lerp_(values, list(parameters), 1 - kept)


def inner_product(
    step_a: np.ndarray | float, gamma_a: np.ndarray | float, step_b: np.ndarray | float, gamma_b: np.ndarray | float
) -> np.ndarray:
    """
    Integral of the product of two profiles (appendix C there, eq. 126), each with integral 1 over [0, step].

    Args:
        step_a, step_b: Where the averages end, above 0.
        gamma_a, gamma_b: Their exponents, 0 or more.
    """
    end = np.minimum(step_a, step_b)
    height = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return height * (end / step_a) ** gamma_a * (end / step_b) ** gamma_b * end / (step_a * step_b)


def coefficients(copies: Sequence[tuple[int, float]], length: float, step: int) -> np.ndarray:
    """
    Weights of a sum of copies that comes nearest to an average, by least squares between their profiles.

    The weights add up to 1, which plain least squares misses by a few hundredths where copies are few: all that does
    not change from step to step is kept so.

    Args:
        copies: (step, length) of each average that there is a copy of.
        length: Of the average that is wanted.
        step: Where it ends; copies of later steps are not used.

    Returns:
        [len(copies)], float64.

    Raises:
        ValueError: for a length out of range, or if no copy is of that step or before.
    """
    gamma = exponent(length)
    used = [index for index, (at, _) in enumerate(copies) if at <= step]
    if not used:
        raise ValueError(f"step={step}: expected one from {min(at for at, _ in copies)} up, the first that was kept")
    steps = np.array([copies[index][0] for index in used], dtype=np.float64)
    gammas = np.array([exponent(copies[index][1]) for index in used])
    products = inner_product(steps[:, None], gammas[:, None], steps[None], gammas[None]) * step
    wanted = inner_product(steps, gammas, float(step), gamma) * step
    ones = np.ones((1, len(used)))
    system = np.block([[products, ones.T], [ones, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-12)[0][:-1]
    weights = np.zeros(len(copies))
    weights[used] = found
    return weights
