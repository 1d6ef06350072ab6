"""Shared settings: real components at toy size, on the CPU, offline, one thread a process."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy sizes: more threads only wait for each other
# diffusers copies the code of loaded folders here; a test must neither see nor leave any. Each process of
# pytest-xdist has its own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="pyrdiff-test-modules-")
sys.path.insert(0, str(Path(__file__).parent))

import warm  # noqa: E402

# What trains, publishes, packs or measures, by folder, file or test: marked `long` and left out of `make test-fast`.
LONG = (
    "tests/benchmarks/",
    "tests/commands/test_bench_command.py",
    "tests/commands/test_sample.py",
    "tests/hub/",
    "tests/models/test_autoencoder_scale.py::test_it_learns",
    "tests/pipelines/test_pipeline_parallel_trajectory.py::test_it_loads_where_pyrdiff_is_not_installed",
    "tests/pipelines/test_pipeline_pyramidal.py::test_a_pyramid_has_the_right_spectrum",
    "tests/pipelines/test_pipeline_pyramidal.py::test_one_level_has_the_right_spectrum",
    "tests/pipelines/test_pipeline_residual_sr.py::test_it_loads_where_pyrdiff_is_not_installed",
    "tests/pipelines/test_pipeline_waits.py",
    "tests/pipelines/test_upscale_example.py",
    "tests/plan/test_plan_example.py",
    "tests/plan/test_plan_tune.py",
    "tests/test_examples.py",
    "tests/test_packaging.py",
    "tests/test_plugin_example.py",
    "tests/test_warm.py",
    "tests/training/test_checkpoints.py",
    "tests/training/test_loop.py",
    "tests/training/test_pixel_aware.py",
    "tests/training/test_sr.py",
    "tests/training/test_training_waits.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, and all kills of a training")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        warm.serve()  # one for all processes of pytest-xdist


def pytest_unconfigure(config: pytest.Config) -> None:
    warm.close()
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The cores that this process may use, at most 8: each process imports for six seconds and holds 0.7 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--runslow"):
        reasons["slow"] = "slow: runs with --runslow"
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            reasons["gpu"] = "needs a GPU"
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker("long")
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def runslow(pytestconfig: pytest.Config) -> bool:
    """True if the tests are to take their time (`--runslow`)."""
    return pytestconfig.getoption("--runslow")
