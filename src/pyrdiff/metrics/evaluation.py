"""What the modules of `evaluate_modules` have in common. They import this module, never a class of it: evaluate takes
the first metric class that it finds in a file's namespace.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from .result import MetricResult, combine

CITATION = "See the paper named in the docstring of the function of the same name in pyrdiff.metrics."
PIXELS = "images [C, H, W], float arrays, C 1 or 3; each pair may have its own size"


class ImageMetric(evaluate.Metric, ABC):
    """Images in `predictions` and `references`; `compute` takes what the function of the same name takes."""

    description = ""

    @staticmethod
    @abstractmethod
    def measure(prediction: Tensor, reference: Tensor, **settings) -> MetricResult:
        """The metric of one pair, each [1, C, H, W]."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.description, f"predictions, references: {PIXELS}", 3)

    def _compute(self, predictions: Sequence, references: Sequence, **settings: object) -> dict:
        _needs(settings, "data_range")
        pairs = zip(predictions, references, strict=True)
        results = [self.measure(*(_tensor(image)[None] for image in pair), **settings) for pair in pairs]
        return _report(combine(results))


class DistributionMetric(evaluate.Metric, ABC):
    """Features in `predictions` (generated) and `references` (real), or images with the configuration "images".

    evaluate wants as many of both: where one set is smaller, fill it up with empty lists, which are left out.
    """

    description = ""

    @staticmethod
    @abstractmethod
    def measure(real: Tensor, generated: Tensor, **settings) -> MetricResult | tuple[MetricResult, ...]:
        """The metric of two sets, features [N, D] and [M, D] or images [N, C, H, W] and [M, C, H, W]."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "images"):
            raise ValueError(f"config_name={self.config_name!r}: expected None (features) or 'images'")
        images = self.config_name == "images"
        what = "images of one size [C, H, W] with features= and data_range= in compute" if images else "features [D]"
        what = f"predictions (generated), references (real): {what}, floats; empty lists are left out"
        return _info(self.description, what, 3 if images else 1)

    def _compute(self, predictions: Sequence, references: Sequence, **settings: object) -> dict:
        if self.config_name == "images":
            _needs(settings, "data_range", "features")
        sets = [torch.stack([_tensor(row) for row in rows if len(row)]) for rows in (references, predictions)]
        result = self.measure(*sets, **settings)
        return _report(*result) if isinstance(result, tuple) else _report(result)


def _info(description: str, inputs: str, depth: int) -> evaluate.MetricInfo:
    row = datasets.Value("float32")
    for _ in range(depth):
        row = datasets.Sequence(row)
    features = datasets.Features({"predictions": row, "references": row})
    return evaluate.MetricInfo(description=description, citation=CITATION, inputs_description=inputs, features=features)


def _needs(settings: dict, *names: str) -> None:
    for name in names:
        if settings.get(name) is None:
            raise ValueError(f"{name}=None: expected compute({name}=...), as pyrdiff.metrics takes it")


def _tensor(row: Sequence) -> Tensor:
    return torch.from_numpy(np.asarray(row, dtype=np.float32))


def _report(*results: MetricResult) -> dict:
    report = {}
    for result in results:
        report |= {result.name: result.value}
        if result.per_image is not None:
            report[f"{result.name}_per_image"] = result.per_image.tolist()
    return report | {"conventions": results[0].conventions}
