"""Distances of sets against closed forms and brute force; statistics in parts and in processes; intervals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyrdiff.metrics import (
    FeatureStatistics,
    KernelReference,
    SetComparison,
    bootstrap_interval,
    frechet_distance,
    kid,
    precision_recall,
)

F64 = torch.float64


def normal(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=F64)


def whitened(sample: torch.Tensor) -> torch.Tensor:
    """The sample, moved so that its mean is exactly 0 and its covariance exactly 1."""
    sample = sample - sample.mean(0)
    values, vectors = torch.linalg.eigh(sample.T @ sample / (len(sample) - 1))
    return sample @ (vectors * values.rsqrt()) @ vectors.T


def rotation(dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(dimension, dimension, seed)).Q


@pytest.mark.parametrize("dimension", [1, 8, 64])
def test_frechet_closed_form(dimension):
    """Covariances with common axes: |m1 - m2|² + sum of (s1 - s2)², s the standard deviations."""
    base, axes = whitened(normal(3 * dimension + 20, dimension)), rotation(dimension, 1)
    s1 = torch.linspace(0.1, 3, dimension, dtype=F64)
    s2 = torch.linspace(2, 0.01, dimension, dtype=F64)
    m1, m2 = normal(2, dimension, 2)
    real, fake = (base @ (axes * s) @ axes.T + m for s, m in ((s1, m1), (s2, m2)))
    expected = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(real, fake).value == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(fake, real).value == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    """tr (C1^½ C2 C1^½)^½ is the sum of the roots of the eigenvalues of C1 C2."""
    real, fake = normal(200, 10) @ normal(10, 10, 1), normal(150, 10, 2) @ normal(10, 10, 3)
    c1, c2 = torch.cov(real.T), torch.cov(fake.T)
    cross = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross
    assert frechet_distance(real, fake).value == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count, dimension, decades, slack", [(20, 256, 0, 1e-9), (300, 64, 6, 1e-6)])
def test_a_set_is_at_no_distance_from_itself(count, dimension, decades, slack):
    """Fewer features than dimensions, and variances over twelve orders of magnitude: no roots of rounding errors."""
    real = normal(count, dimension) @ torch.diag(torch.logspace(0, -decades, dimension, dtype=F64)) + 5
    spread = torch.cov(real.T).trace()
    assert 0 <= frechet_distance(real, real.flip(0)).value < slack * spread
    shift = (1e-5 * spread / dimension).sqrt()  # what is left out would show below this distance, not below 0
    assert frechet_distance(real, real + shift).value == pytest.approx(1e-5 * spread.item(), abs=slack * spread.item())


def test_statistics_in_parts_are_those_of_the_whole():
    sample = (100 + normal(50, 6)).float()
    whole = FeatureStatistics(6).update(sample)
    parts = FeatureStatistics(6)
    for part in sample.split((1, 0, 30, 19)):
        parts.merge(FeatureStatistics(6).update(part))
    for statistics in (whole, parts):
        assert statistics.count == 50
        assert torch.allclose(statistics.mean, sample.double().mean(0), rtol=1e-13)
        assert torch.allclose(statistics.covariance, torch.cov(sample.double().T), rtol=1e-9, atol=1e-12)
    other = FeatureStatistics(6).update(normal(40, 6, 1))
    assert other.distance(whole) == pytest.approx(frechet_distance(normal(40, 6, 1), sample).value, rel=1e-9)
    root = whole.root()
    assert torch.allclose(root @ root, whole.covariance) and torch.allclose(root, root.T)


def test_statistics_refuse():
    with pytest.raises(ValueError, match="^dimension=0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="^features: 1 of them; expected two or more"):
        FeatureStatistics(3).update(torch.zeros(1, 3)).root()
    for features in (torch.zeros(2, 4), torch.zeros(3), torch.full((2, 3), torch.inf)):
        with pytest.raises(ValueError, match=r"^features=.* expected finite \[B, 3\]"):
            FeatureStatistics(3).update(features)
    for wrong in (FeatureStatistics(3).merge, FeatureStatistics(3).distance):
        with pytest.raises(ValueError, match="^other of dimension 4"):
            wrong(FeatureStatistics(4))


def reduce(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    sample = normal(64, 8) + 3
    ours = FeatureStatistics(8).update(sample[:40] if rank == 0 else sample[40:]).all_reduce()
    torch.save((ours.count, ours.distance(FeatureStatistics(8).update(normal(50, 8, 1)))), f"{place}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_numbers_of_one(tmp_path):
    mp.start_processes(reduce, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = frechet_distance(normal(64, 8) + 3, normal(50, 8, 1)).value
    for rank in range(2):
        count, value = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert count == 64 and value == pytest.approx(expected, rel=1e-12)
    alone = FeatureStatistics(8).update(normal(64, 8)).all_reduce()
    assert alone.count == 64


def test_a_reference_has_the_numbers_of_kid():
    real = normal(30, 4)
    reference = KernelReference(real)
    for part in (normal(20, 4, 1), 2 * normal(25, 4, 2), real):
        assert reference.distance(part) == kid(real, part).value
    with pytest.raises(ValueError, match="^generated with 5 features: expected 4"):
        reference.distance(normal(20, 5))
    with pytest.raises(ValueError, match="^real="):
        KernelReference(real[:1]).distance(normal(20, 4))


def test_kid_is_the_unbiased_sum():
    real, fake = normal(7, 3), 2 * normal(5, 3, 1)

    def kernel(a, b):
        return (sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1) ** 3

    def within(sample):
        pairs = [(a, b) for i, a in enumerate(sample) for j, b in enumerate(sample) if i != j]
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = sum(kernel(a, b) for a in real for b in fake) / 35
    assert kid(real, fake).value == pytest.approx(within(real) + within(fake) - 2 * between, rel=1e-9)


def test_kid_of_one_distribution_is_0_on_average():
    values = torch.tensor([kid(normal(40, 4, 2 * seed), normal(30, 4, 2 * seed + 1)).value for seed in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert values.min() < 0 < values.max()


def test_kid_over_subsets():
    real, fake = normal(60, 4), normal(50, 4, 1) + 1
    settings = dict(subsets=20, subset_size=30)
    first, again, other = (
        kid(real, fake, generator=torch.Generator().manual_seed(seed), **settings).value for seed in (0, 0, 1)
    )
    assert first == again != other and first == pytest.approx(kid(real, fake).value, rel=0.2)
    everything = kid(real, fake[:50], subsets=1, subset_size=50, generator=torch.Generator().manual_seed(0))
    assert everything.conventions["subset_size"] == 50
    with pytest.raises(ValueError, match="^generator=None"):
        kid(real, fake, **settings)
    with pytest.raises(ValueError, match=r"^subsets=3, subset_size=51: expected 1 or more, and 2..50"):
        kid(real, fake, subsets=3, subset_size=51, generator=torch.Generator())


def test_precision_and_recall_of_a_dropped_mode():
    """Real images in two far groups, generated ones in one of them and half of them nowhere."""
    real = torch.cat((normal(100, 2), normal(100, 2, 1) + 100))
    fake = torch.cat((real[:100] + 1e-3, normal(100, 2, 2) - 100))
    precision, recall = precision_recall(real, fake)
    assert (precision.name, recall.name) == ("precision", "recall")
    assert precision.value == 0.5 and precision.per_image.tolist() == [1] * 100 + [0] * 100
    assert recall.value == 0.5 and recall.per_image.tolist() == [1] * 100 + [0] * 100


def test_intervals_of_shares_and_distances_end_where_the_figures_do():
    real, fake = normal(40, 3), torch.cat((normal(1, 3, 1), 50 + 0.1 * normal(39, 3, 2)))
    network = SimpleNamespace(name="toy", conventions={}, device="cpu")
    distance, precision, recall = SetComparison(real, network).scores(fake, ["frechet_distance", "precision_recall"])
    assert precision.result.value == 1 / 40 and precision.interval[0] == 0 < precision.interval[1] < 0.2
    assert recall.result.value == recall.interval[1] == 1  # the one has a ball that reaches to the others
    half = torch.cat((normal(20, 3, 1), 50 + normal(20, 3, 2)))
    _, recall = SetComparison(real, network).scores(half, ["precision_recall"])
    assert 0.7 < recall.interval[0] < recall.result.value == 0.875 < recall.interval[1] == 1
    sure = SetComparison(real, network).scores(real[:30], ["precision_recall"])
    assert [score.result.value for score in sure] == [1, pytest.approx(1, abs=0.1)]
    assert sure[0].interval == (1, 1) and sure[1].interval[1] == 1
    near = torch.cat((real, real))  # nothing apart, so that half of the spread lies below 0
    assert SetComparison(real, network).scores(near, ["frechet_distance"])[0].interval[0] == 0


def test_the_interval_of_recall_covers_that_of_other_generated_sets():
    """Real images about two centres, of which a generated image shows the second one time in eight."""
    real = torch.cat((normal(30, 2), normal(30, 2, 1) + 30))

    def generated(seed: int) -> torch.Tensor:
        rare = torch.rand(40, 1, generator=torch.Generator().manual_seed(seed)) < 1 / 8
        return normal(40, 2, seed) + 30 * rare

    recalls = torch.tensor([precision_recall(real, generated(seed))[1].value for seed in range(60)])
    network = SimpleNamespace(name="toy", conventions={}, device="cpu")
    comparison, held = SetComparison(real, network, resamples=60), 0
    for seed in range(20):
        _, score = comparison.scores(generated(seed), ["precision_recall"])
        held += score.interval[0] <= recalls.mean() <= score.interval[1]
    assert held >= 14


@pytest.mark.parametrize("k", [1, 3])
def test_precision_against_brute_force(k, monkeypatch):
    monkeypatch.setattr("pyrdiff.metrics.distribution.CHUNK", 7)
    real, fake = normal(30, 3), 1.3 * normal(25, 3, 1)
    radii = [sorted((a - b).norm().item() for b in real)[k] for a in real]
    inside = [float(any((f - a).norm() <= r for a, r in zip(real, radii, strict=True))) for f in fake]
    assert 0 < sum(inside) < 25
    precision, _ = precision_recall(real, fake, k=k)
    assert precision.per_image.tolist() == inside
    with pytest.raises(ValueError, match=r"^k=25 for 30 real and 25 generated: expected 1\.\.24"):
        precision_recall(real, fake, k=25)


def test_the_interval_of_a_mean_is_the_usual_one():
    sample = normal(400, 1).flatten() + 5
    low, high = bootstrap_interval(lambda part: part.mean(), sample, resamples=1000)
    half = 1.96 * sample.std().item() / 20
    assert (low, high) == pytest.approx((sample.mean().item() - half, sample.mean().item() + half), abs=0.02)
    assert bootstrap_interval(lambda part: part.mean(), sample, resamples=50, level=0.5)[1] < high


def test_intervals_of_a_biased_figure():
    """Fréchet with 200 images of 32 features: the figure lies in the one interval, the limit below it in the other."""
    dimension, count = 32, 200
    real = FeatureStatistics(dimension).update(whitened(normal(500, dimension)))
    truth = 1.0 + dimension * (1.2 - 1) ** 2
    hits = {"count": 0, "limit": 0}
    samples = [1.2 * normal(count, dimension, 10 + seed) for seed in range(60)]
    for sample in samples:
        sample[:, 0] += 1

    def distance(part):
        return real.distance(FeatureStatistics(dimension).update(part))

    expected = sum(map(distance, samples)) / len(samples)
    assert expected > truth + 0.4
    for sample in samples[:20]:
        for target, aim in (("count", expected), ("limit", truth)):
            low, high = bootstrap_interval(distance, sample, resamples=40, target=target)
            hits[target] += low <= aim <= high
            assert (low < distance(sample) < high) or target == "limit"
    assert min(hits.values()) >= 16, hits


def test_bad_intervals():
    for settings, message in (
        (dict(resamples=1), "^resamples=1, level=0.95"),
        (dict(level=1), "^resamples=200, level=1"),
        (dict(target="figure"), "^target='figure': expected 'count' or 'limit'"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(lambda part: part.mean(), torch.zeros(4), **settings)
    with pytest.raises(ValueError, match="^sample of 1"):
        bootstrap_interval(lambda part: part.mean(), torch.zeros(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda rows: frechet_distance(rows, rows),
        lambda rows: kid(normal(4, 2), rows),
        lambda rows: precision_recall(rows, normal(4, 2)),
        lambda rows: FeatureStatistics(2).update(rows),
    ],
)
@pytest.mark.parametrize("rows", [np.zeros((4, 2)), [[0.0, 1.0]] * 4, None], ids=["numpy", "list", "None"])
def test_what_is_no_tensor_is_refused(call, rows):
    with pytest.raises(ValueError, match=f"={type(rows).__name__}: expected a float tensor"):
        call(rows)


def test_a_seed_is_no_generator():
    with pytest.raises(ValueError, match="generator=5: expected a torch.Generator"):
        bootstrap_interval(lambda part: part.mean(), torch.zeros(4), generator=5)
    with pytest.raises(ValueError, match="generator=5: expected a torch.Generator"):
        kid(normal(4, 2), normal(4, 2), subsets=2, subset_size=2, generator=5)
