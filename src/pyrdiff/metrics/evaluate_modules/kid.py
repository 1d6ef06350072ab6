"""Kernel distance: unbiased squared MMD with a polynomial kernel."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class Kid(evaluation.DistributionMetric):
    description = __doc__
    measure = staticmethod(metrics.kid)
