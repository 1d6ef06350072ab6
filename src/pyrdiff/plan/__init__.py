"""Plans of sampling: what they cost on this machine, and how to choose one."""

from .clipping import CLIP, clipping
from .cost import StepCosts, bench_plans, choose, measure_costs

__all__ = ["CLIP", "StepCosts", "bench_plans", "choose", "clipping", "measure_costs"]
