"""Toy trainings: 24 random images, two resolutions, a network of 0.2M parameters, on the CPU and one thread."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(scope="module", autouse=True)
def one_cpu_thread():
    """So that the bits are the same whatever machine, accelerator and settings there are, in child processes too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def new_accelerate_state():
    """accelerate keeps its state for the whole process; each test starts as a new one would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """toy(**changes): flags of a run of 12 steps into a new folder, as a dict that JSON can hold."""
    array = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(array, np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))

    def flags(**changes) -> dict:
        values = {
            "train_data_dir": str(array),
            "output_dir": str(tmp_path_factory.mktemp("toy") / "run"),
            "resolution": ["8", "16"],
            "preset": "tiny",
            "block_out_channels": [8, 16, 32],
            "train_batch_size": 4,
            "max_train_steps": 12,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 4,
            "mixed_precision": "no",
            "save_images_steps": 0,
            "logging_steps": 1,
            "seed": 5,
            **changes,
        }
        assert json.loads(json.dumps(values)) == values
        return values

    return flags
