"""Plans of sampling: what they cost on this machine, how to choose one, and how to find a model's own."""

from .clipping import CLIP, clipping
from .cost import StepCosts, bench_plans, choose, measure_costs
from .tune import Judged, Tuning, auto_plan, candidates, held_out_images, tune

__all__ = [
    "CLIP",
    "Judged",
    "StepCosts",
    "Tuning",
    "auto_plan",
    "bench_plans",
    "candidates",
    "choose",
    "clipping",
    "held_out_images",
    "measure_costs",
    "tune",
]
