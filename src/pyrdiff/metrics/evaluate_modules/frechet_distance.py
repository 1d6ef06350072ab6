"""Fréchet distance between two sets' features, taken as Gaussians."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class FrechetDistance(evaluation.DistributionMetric):
    description = __doc__
    measure = staticmethod(metrics.frechet_distance)
