"""Plans of sampling: what they cost on this machine, what they do to Gaussian images, and how to choose one."""

from .clipping import CLIP, clipping
from .cost import StepCosts, bench_plans, choose, measure_costs
from .fit import FittedPlan, fit, level_steps, octave_shares
from .gaussian import LevelSteps, delivered
from .spectra import Spectra

__all__ = [
    "CLIP",
    "FittedPlan",
    "LevelSteps",
    "Spectra",
    "StepCosts",
    "bench_plans",
    "choose",
    "clipping",
    "delivered",
    "fit",
    "level_steps",
    "measure_costs",
    "octave_shares",
]
