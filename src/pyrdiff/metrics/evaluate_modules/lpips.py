"""LPIPS, the learned perceptual distance between two images."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class Lpips(evaluation.ImageMetric):
    description = __doc__
    measure = staticmethod(metrics.lpips)
