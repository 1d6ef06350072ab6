"""Precision and recall by nearest neighbours in feature space."""

from pyrdiff import metrics
from pyrdiff.metrics import evaluation


class PrecisionRecall(evaluation.DistributionMetric):
    description = __doc__
    measure = staticmethod(metrics.precision_recall)
