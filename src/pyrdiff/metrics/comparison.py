"""Sets of generated images beside one set of real ones: every distance with the interval that it is known to."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .distribution import (
    FeatureStatistics,
    KernelReference,
    bootstrap_interval,
    covered_by,
    frechet_distance,
    kid,
    precision_recall,
)
from .features import FeatureNetwork
from .result import MetricResult

SetMetric = Literal["frechet_distance", "kid", "precision_recall"]
ANY, DISTANCE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)  # the least and the most of a figure
BOUNDS = {"ssim": (-1.0, 1.0), "lpips": DISTANCE, "consistency": DISTANCE, "precision": SHARE}
SET_METRICS: tuple[SetMetric, ...] = ("frechet_distance", "kid", "precision_recall")


class Score(NamedTuple):
    """A result, its 95 % interval over the generated images (None where there is none), and which way is better."""

    result: MetricResult
    interval: tuple[float, float] | None
    higher_is_better: bool


class SetComparison:
    """
    Real images, to compare sets of generated ones with. What does not depend on the generated set is computed once.

    Args:
        real: Features [N, D] of the real images.
        network: The network that they are from.
        resamples: Of each interval; 0 for no intervals.
    """

    def __init__(self, real: Tensor, network: FeatureNetwork, resamples: int = 100):
        self.real, self.network, self.resamples = real, network, resamples
        device = getattr(network, "device", real.device)
        self._statistics = FeatureStatistics(real.shape[1], device).update(real)
        self._kernel = KernelReference(real)

    def scores(self, generated: Tensor, metrics: Sequence[SetMetric] = SET_METRICS) -> list[Score]:
        """
        The scores of a set; precision and recall are two.

        Args:
            generated: Features [M, D], two or more.
            metrics: Which, in this order.
        """
        scores = []
        for name in metrics:
            if name == "frechet_distance":
                result = frechet_distance(self.real, generated, features=self.network)
                statistic, sample = distance_statistic(self._statistics, generated)
                interval = interval_of(statistic, sample, self.resamples, DISTANCE)
                scores.append(Score(result, interval, False))
            elif name == "kid":
                result = kid(self.real, generated, features=self.network)
                scores.append(Score(result, interval_of(self._kernel.distance, generated, self.resamples), False))
            else:
                precision, recall = precision_recall(self.real, generated, features=self.network)
                scores.append(score_of_mean(precision, self.resamples, True))
                interval = interval_of(*recall_statistic(self.real, generated), self.resamples, SHARE)
                scores.append(Score(recall, interval, True))
        return scores


def score_of_mean(result: MetricResult, resamples: int, higher_is_better: bool) -> Score:
    """The score of a metric of single images."""
    bounds = BOUNDS.get(result.name.partition("_")[0], ANY)
    return Score(result, interval_of(torch.mean, result.per_image, resamples, bounds), higher_is_better)


def interval_of(
    statistic: Callable[[Tensor], float | Tensor],
    sample: Tensor,
    resamples: int,
    bounds: tuple[float, float] = ANY,
) -> tuple[float, float] | None:
    """`bootstrap_interval`; None for no resamples, fewer than two images, or values that are not finite."""
    if resamples == 0 or len(sample) < 2 or not sample.isfinite().all():
        return None
    return bootstrap_interval(statistic, sample, resamples=resamples, bounds=bounds)


def recall_statistic(real: Tensor, generated: Tensor, k: int = 3) -> tuple[Callable[[Tensor], float | Tensor], Tensor]:
    """
    Recall as (statistic, sample) for a bootstrap over the generated images: of a resample, the share of real images in
    its balls, whose radii stay those of the whole set. Images that are drawn twice would otherwise have a radius of 0.
    """
    covered = torch.cat([inside.cpu() for inside in covered_by(generated.double(), real.double(), k)])
    return lambda balls: balls.any(0).double().mean(), covered.T.contiguous()  # a row for each generated image


def distance_statistic(
    reference: FeatureStatistics, features: Tensor
) -> tuple[Callable[[Tensor], float | Tensor], Tensor]:
    """
    The Fréchet distance to a reference as (statistic, sample) for a bootstrap over features [M, D].

    With fewer images than features, the product of covariances C1^½ C2 C1^½ has the same eigenvalues as an [M, M]
    product of the centred features times C1^½, which are found much sooner.
    """
    count, dimension = features.shape
    features = features.to(reference.mean)
    if count > dimension:
        return lambda rows: reference.distance(FeatureStatistics(dimension, rows.device).update(rows)), features
    trace = reference.covariance.trace()

    def distance(rows: Tensor) -> float:
        mean = rows.mean(0)
        plain, rooted = (rows - mean).chunk(2, 1)
        values = torch.linalg.eigvalsh(rooted @ rooted.T)
        noise = len(values) * torch.finfo(values.dtype).eps * values[-1]
        cross = (values.where(values > noise, 0) / (count - 1)).sqrt().sum()
        apart = (reference.mean - mean[:dimension]).square().sum()
        return (apart + trace + plain.square().sum() / (count - 1) - 2 * cross).item()

    return distance, torch.cat([features, features @ reference.root()], 1)
