"""Peak signal-to-noise ratio in dB, in RGB or in BT.601 luma."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class Psnr(evaluation.ImageMetric):
    description = __doc__
    measure = staticmethod(metrics.psnr)
