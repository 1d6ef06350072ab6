"""Consistency: super-resolved images in predictions, the inputs in references."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class Consistency(evaluation.ImageMetric):
    description = __doc__
    measure = staticmethod(metrics.consistency)
