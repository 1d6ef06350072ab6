"""Structural similarity with an 11×11 Gaussian window."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class Ssim(evaluation.ImageMetric):
    description = __doc__
    measure = staticmethod(metrics.ssim)
