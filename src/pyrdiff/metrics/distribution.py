"""How far a set of generated images is from a set of real ones, in the features of a network."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pyrdiff.parts.checks import check_generators

from .features import FeatureNetwork
from .result import DataRange, MetricResult, check_range, check_tensor

CHUNK = 1024  # rows of a matrix of distances or kernels that are held at a time
NAMES = {"inception": "FID", "dinov2": "FD-DINOv2"}  # what literature calls the distance with these networks


class FeatureStatistics:
    """Count, mean and covariance of features, gathered batch by batch in float64; the features are not kept.

    Args:
        dimension: D.
        device: Where the sums are kept.
    """

    def __init__(self, dimension: int, device: str | torch.device = "cpu"):
        if dimension < 1:
            raise ValueError(f"dimension={dimension}: expected 1 or more")
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self._root = None

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Add features [B, D]; ValueError for another shape or values that are not finite."""
        check_tensor("features", features)
        if features.ndim != 2 or features.shape[1] != len(self.mean) or not features.isfinite().all():
            raise ValueError(f"features={features.dtype} {list(features.shape)}: expected finite [B, {len(self.mean)}]")
        if len(features):
            features = features.detach().to(self.mean)
            mean = features.mean(0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Add all that `other` has seen."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"other of dimension {len(other.mean)}: expected {len(self.mean)}")
        if other.count:
            self._add(other.count, other.mean.to(self.mean), other._scatter.to(self.mean))
        return self

    def all_reduce(self) -> "FeatureStatistics":
        """Merge the statistics of all processes of `torch.distributed`, in each of them. Without processes: nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        total = self.mean * self.count
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = total / count.clamp(min=1)
        apart = self.mean - mean
        scatter = self._scatter + self.count * torch.outer(apart, apart)
        dist.all_reduce(scatter)
        self.count, self.mean, self._scatter, self._root = int(count.item()), mean, scatter, None
        return self

    @property
    def covariance(self) -> Tensor:
        """Float64 [D, D], with N - 1 in the denominator; ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"features: {self.count} of them; expected two or more")
        return self._scatter / (self.count - 1)

    def root(self) -> Tensor:
        """The symmetric square root of the covariance, float64 [D, D]."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return self._root

    def distance(self, other: "FeatureStatistics") -> float:
        """The Fréchet distance |m1 - m2|² + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½) of the Gaussians (Dowson, Landau 1982)."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"other of dimension {len(other.mean)}: expected {len(self.mean)}")
        theirs = other.covariance.to(self.mean)
        values = torch.linalg.eigvalsh(self.root() @ theirs @ self.root())
        # What is 0 comes out as rounding error, either sign; left in, its square root would be half of all digits.
        noise = len(values) * torch.finfo(values.dtype).eps * values[-1]
        cross = values.where(values > noise, 0).sqrt().sum()
        apart = (self.mean - other.mean.to(self.mean)).square().sum()
        return max(0.0, (apart + self.covariance.trace() + theirs.trace() - 2 * cross).item())

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub and LeVeque 1979: sums of squares about two means to one about the common mean."""
        total = self.count + count
        apart = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count, self._root = total, None


def frechet_distance(
    real: Tensor,
    generated: Tensor,
    *,
    features: FeatureNetwork | None = None,
    data_range: DataRange | None = None,
) -> MetricResult:
    """The Fréchet distance of two sets' features, each taken as a Gaussian (Heusel et al. 2017, eq. 6); 0 is perfect.

    It grows as either set gets smaller, so compare it at equal counts only. The result is called "FID" only with the
    network of FID; see `open_features`.

    Args:
        real: Features [N, D], or float images [N, C, H, W] when `features` is given.
        generated: The same, of M.
        features: The network; needed for images. With features it is the one they are from, and names the result.
        data_range: (low, high) of the images; None when features are given.

    Raises:
        ValueError: for wrong shapes or values, or fewer than two of either.
    """
    real, generated, conventions, label = _features_of(real, generated, features, data_range)
    ours, theirs = (FeatureStatistics(sample.shape[1], sample.device).update(sample) for sample in (real, generated))
    conventions["covariance"] = "N - 1 in the denominator"
    return MetricResult(NAMES.get(label, f"FD-{label}"), ours.distance(theirs), None, conventions)


def kid(
    real: Tensor,
    generated: Tensor,
    *,
    features: FeatureNetwork | None = None,
    data_range: DataRange | None = None,
    subsets: int | None = None,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> MetricResult:
    """The kernel distance: unbiased squared MMD of the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    Its expectation is 0 for sets from one distribution and does not depend on the counts; it may be negative, and for a
    set with itself it is a little below 0. Over the whole sets it is the same number every time. The result is called
    "KID" only with the network of FID.

    Args:
        real, generated, features, data_range: As `frechet_distance`.
        subsets: None for the whole sets; else so many random subsets without repetition, whose mean is given.
        subset_size: Images of either set in a subset, at most the smaller count.
        generator: A CPU generator for the subsets; needed with `subsets`.

    Raises:
        ValueError: for wrong shapes, values or settings, or fewer than two of either.
    """
    real, generated, conventions, label = _features_of(real, generated, features, data_range)
    conventions |= {"kernel": "(x·y / D + 1)^3", "estimator": "unbiased", "scale": 1, "subsets": subsets}
    if subsets is None:
        value = _mmd(real, generated)
    else:
        most = min(len(real), len(generated))
        if subsets < 1 or not 2 <= subset_size <= most:
            raise ValueError(f"subsets={subsets}, subset_size={subset_size}: expected 1 or more, and 2..{most}")
        check_generators(generator)
        if generator is None:
            raise ValueError("generator=None with subsets: expected a torch.Generator")
        chosen = [
            [rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in (real, generated)]
            for _ in range(subsets)
        ]
        value = sum(_mmd(*pair) for pair in chosen) / subsets
        conventions["subset_size"] = subset_size
    return MetricResult("KID" if label == "inception" else f"KD-{label}", value, None, conventions)


class KernelReference:
    """Real features for the distance of `kid` from many sets, as in a bootstrap: their own kernel is summed only once.

    Args:
        real: Features [N, D].
    """

    def __init__(self, real: Tensor):
        self.real = real.detach().double()
        self._within = None

    def distance(self, generated: Tensor) -> float:
        """What `kid(real, generated).value` is, of features [M, D]; `ValueError` for what that refuses."""
        real, generated, _, _ = _features_of(self.real, generated, None, None)
        if self._within is None:
            self._within = _mean_kernel(real)
        return _mmd(real, generated, self._within)


def precision_recall(
    real: Tensor,
    generated: Tensor,
    *,
    features: FeatureNetwork | None = None,
    data_range: DataRange | None = None,
    k: int = 3,
) -> tuple[MetricResult, MetricResult]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), each in [0, 1]; 1 is perfect.

    A set's manifold is the balls about its points with the distance to the k-th nearest other point as radius.
    Precision is the share of generated images in the manifold of the real ones, recall the share of real images in the
    manifold of the generated ones; `per_image` says it for each, as 0 or 1.

    Args:
        real, generated, features, data_range: As `frechet_distance`; more than `k` of each.
        k: Which neighbour gives the radius; the paper's is 3.

    Raises:
        ValueError: for wrong shapes, values or settings.
    """
    real, generated, conventions, _ = _features_of(real, generated, features, data_range)
    most = min(len(real), len(generated)) - 1
    if not 1 <= k <= most:
        raise ValueError(f"k={k} for {len(real)} real and {len(generated)} generated: expected 1..{most}")
    conventions["k"] = k
    results = []
    for name, manifold, points in (("precision", real, generated), ("recall", generated, real)):
        inside = torch.cat([covered.any(1) for covered in covered_by(manifold, points, k)]).double().cpu()
        results.append(MetricResult(name, inside.mean().item(), inside, dict(conventions)))
    return results[0], results[1]


def covered_by(manifold: Tensor, points: Tensor, k: int) -> Iterator[Tensor]:
    """
    Which points lie in which balls of a manifold (see `precision_recall`), in chunks.

    Args:
        manifold: Float64 features [N, D], more than `k`.
        points: Float64 features [M, D].
        k: Which neighbour gives the radius.

    Yields:
        Bool [at most CHUNK, N]: whether these points lie in ball j.
    """
    centre = manifold.mean(0)  # distances are exact to rounding about the origin
    manifold, points = manifold - centre, points - centre
    slack = 1e-12 * max(manifold.square().sum(1).max(), points.square().sum(1).max())
    radius = torch.cat(
        [distances.kthvalue(k + 1, dim=1).values for distances in _square_distances(manifold, manifold)]
    )  # the nearest is the point itself
    for distances in _square_distances(points, manifold):
        yield distances <= radius + slack


def bootstrap_interval(
    statistic: Callable[[Tensor], float | Tensor],
    sample: Tensor,
    *,
    resamples: int = 200,
    level: float = 0.95,
    target: Literal["count", "limit"] = "count",
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """An interval for a quality figure by resampling the generated images with replacement (Efron 1979).

    A resample has fewer different images than the sample. That pushes distances such as Fréchet's upward, once more
    than the finite sample itself does, so plain quantiles of the resamples would lie beside the figure. Instead:

    - "count": the spread of the resamples, put about the figure. It says how far the figure moves when another sample
      of the same size is drawn, which is what comparisons at equal counts need. In simulations of the Fréchet distance
      of Gaussians it held the expected figure in 88 to 96 % of cases, also with fewer images than features.
    - "limit": the basic interval, 2·figure - quantiles, which takes the bias off. It is for the value that endlessly
      many generated images would have, lies below the figure and may not contain it. It held that value in 87 to 97 %
      of cases with more images than features, and in 10 % with half as many: then it is not to be used.

    For means, such as that of PSNR, both are the same up to the skew.

    Args:
        statistic: The figure of a sample, such as `lambda part: real_statistics.distance(...)`.
        sample: [N, ...], features or per-image values of the generated images; two or more.
        resamples: How many, two or more.
        level: Of the interval, in (0, 1).
        target: See above.
        generator: A CPU generator; seeded with 0 when None, so that the interval belongs to the sample.
        bounds: (least, most) that the figure can be, such as (0, 1) for a share; the interval ends there.

    Returns:
        (low, high).

    Raises:
        ValueError: for settings out of range.
    """
    if len(sample) < 2:
        raise ValueError(f"sample of {len(sample)}: expected two or more")
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples}, level={level}: expected two or more, and a number in (0, 1)")
    if target not in ("count", "limit"):
        raise ValueError(f"target={target!r}: expected 'count' or 'limit'")
    check_generators(generator)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    figure = float(statistic(sample))
    values = torch.empty(resamples, dtype=torch.float64)
    for index in range(resamples):
        chosen = torch.randint(len(sample), (len(sample),), generator=generator)
        values[index] = float(statistic(sample[chosen.to(sample.device)]))
    centre = figure if target == "limit" else values.mean().item()
    low, high = (values.quantile(share).item() for share in ((1 - level) / 2, (1 + level) / 2))
    least, most = bounds
    return max(figure - (high - centre), least), min(figure + (centre - low), most)


def _features_of(
    real: Tensor, generated: Tensor, network: FeatureNetwork | None, data_range: DataRange | None
) -> tuple[Tensor, Tensor, dict, str]:
    """Float64 features [N, D] and [M, D], the conventions so far, and the network's name."""
    conventions, label = {}, "features"
    check_tensor("real", real)
    check_tensor("generated", generated)
    images = any(given.ndim == 4 for given in (real, generated))
    if (data_range is not None) != images or (images and network is None):
        raise ValueError(
            f"features, data_range={getattr(network, 'name', None)} and {data_range!r} for {list(real.shape)} and "
            f"{list(generated.shape)}: expected both for images [N, C, H, W], and no range for features [N, D]"
        )
    if network is not None:
        label = network.name
        conventions["features"] = dict(network.conventions)
    if images:
        sizes = [tuple(given.shape[-2:]) for given in (real, generated)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"real, generated of sizes {sizes[0]} and {sizes[1]}: expected one size")
        conventions |= {"data_range": list(check_range(data_range)), "image_size": list(sizes[0])}
        real, generated = (network(given, data_range=data_range) for given in (real, generated))
    for name, given in (("real", real), ("generated", generated)):
        shaped = given.ndim == 2 and given.is_floating_point() and given.shape[1] > 0
        if not shaped or len(given) < 2 or not given.isfinite().all():
            raise ValueError(
                f"{name}={given.dtype} {list(given.shape)}: expected two or more finite float features [N, D], "
                "or images with features="
            )
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"generated with {generated.shape[1]} features: expected {real.shape[1]}, as in real")
    conventions = {"count": len(generated), "count_real": len(real), "dimension": real.shape[1], **conventions}
    return real.detach().double(), generated.detach().double(), conventions, label


def _mmd(real: Tensor, generated: Tensor, within_real: Tensor | None = None) -> float:
    within_real = _mean_kernel(real) if within_real is None else within_real
    between = _kernel_sum(real, generated) / (len(real) * len(generated))
    return (within_real + _mean_kernel(generated) - 2 * between).item()


def _mean_kernel(a: Tensor) -> Tensor:
    """Mean kernel of different members of a set."""
    alone = (a.square().sum(1) / a.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(a, a) - alone) / (len(a) * (len(a) - 1))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    result = 0.0
    for rows in a.split(CHUNK):
        kernel = rows @ b.T / b.shape[1] + 1
        result += (kernel * kernel * kernel).sum()
    return result


def _square_distances(a: Tensor, b: Tensor):
    """|a_i - b_j|² in chunks of rows of a, [at most CHUNK, len(b)] each."""
    norms = b.square().sum(1)
    for rows in a.split(CHUNK):
        yield (rows.square().sum(1, keepdim=True) + norms - 2 * rows @ b.T).clamp(min=0)
