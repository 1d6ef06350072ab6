"""The door to the same metrics as modules of Hugging Face evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

MODULES = Path(__file__).parent / "evaluate_modules"


def load(name: str, **kwargs: object) -> "evaluate.Metric":
    """One of the metrics as an `evaluate.Metric`: `evaluate.load` of a file that is installed with pyrdiff, offline.

    Several processes give one value when each loads it with the same `num_process` and `experiment_id` and its own
    `process_id`; `compute` then gives the result in process 0 and None in the others.

    Args:
        name: "psnr", "ssim", "lpips", "consistency", "frechet_distance", "kid" or "precision_recall".
        **kwargs: For `evaluate.load`: `num_process`, `process_id`, `experiment_id`, `cache_dir`, `keep_in_memory`.

    Raises:
        ValueError: for another name.
    """
    names = sorted(path.stem for path in MODULES.glob("*.py") if path.stem != "__init__")
    if name not in names:
        raise ValueError(f"name={name!r}: expected one of {', '.join(map(repr, names))}")
    import evaluate

    return evaluate.load(str(MODULES / f"{name}.py"), **kwargs)
