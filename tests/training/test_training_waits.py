"""No training step makes the host wait for a GPU, but for the one late read of its loss."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from watches import WATCHES, PresentDevice

from pyrdiff import plugins
from pyrdiff.training.accelerating import accelerator_for
from pyrdiff.training.loop import Run, Surroundings
from pyrdiff.training.opening import batches_of, network_of, source_of, stages_of
from pyrdiff.training.stopping import Stopwatch

# What a step may wait for: the numbers of the step before.
ALLOWED = "training/outcomes.py:outcome"
# JPEG has to be on the CPU, and what a chain does to each image is read there; `degrade` says so.
JPEG = {"data/degradations.py:_jpeg", "data/degradations.py:degrade"}
PIXELS = dict(resolution=("8",), preset="tiny", num_train_timesteps=20, encoder_channels=(8, 16), latent_dim=4)
SMALL = dict(resolution=("16",), preset="mini", block_out_channels=(32, 32), ddpm_num_steps=20)
ONE_CALL = dict(resolution=("16",), preset="tiny", scale_factor=(2, 4), perceptual_weight=0.0)
PYRAMID = dict(resolution=("8", "16"), preset="tiny", block_out_channels=(8, 16, 32), level_share=(1, 1))
MORE = dict(prediction_type="v_prediction", snr_gamma=5.0, patch_size=8, gradient_accumulation_steps=2)
RUNS = {
    "pddpm": ("pddpm", PYRAMID),
    "pddpm weighted, of patches, accumulated": ("pddpm", {**PYRAMID, **MORE}),
    "sr": ("sr", {**SMALL, "prediction_type": "v_prediction"}),
    "sr learned variance": ("sr", {**SMALL, "variance_type": "learned_range", "input_fusion": "attention"}),
    "sr realistic": ("sr", {**SMALL, "degradation": "realistic", "scale_factor": (2, 4)}),
    "sr_one_call": ("sr_one_call", {**ONE_CALL, "degradation": "bicubic"}),
    "sr_one_call realistic": ("sr_one_call", {**ONE_CALL, "degradation": "realistic"}),
    "autoencoder": ("pixel_aware", PIXELS),
    "pixel_aware": ("pixel_aware", PIXELS),
    "pixel_aware literal": ("pixel_aware", {**PIXELS, "head": "literal"}),
    "pixel_aware paper": ("pixel_aware", {**PIXELS, "mode": "paper", "head": "literal"}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    return str(path)


def run_on_device(name: str, images: str, folder, device: torch.device) -> Run:
    """A run as `prepare` makes it, whose network, optimiser and average are on the device."""
    kind, flags = RUNS[name]
    method = plugins.find(kind)
    settings = method.settings(
        train_data_dir=images, output_dir=str(folder), train_batch_size=4, mixed_precision="no", **flags
    )
    accelerator = accelerator_for(settings)
    source, stages = source_of(settings, accelerator), stages_of(method, settings)
    stage = stages[0] if name == "autoencoder" else stages[-1]
    if kind == "pixel_aware" and name != "autoencoder" and settings.use_structure:
        given = network_of(stages[0], source)
        given.register_to_config(residual_std=0.1)  # measured at the end of its training
        stage = stage._replace(method=method.building_on(given.to(device).eval().requires_grad_(False)))
    surroundings = Surroundings(accelerator, batches_of(settings, source, accelerator), Stopwatch(), None, {})
    return Run(stage, network_of(stage, source), surroundings)


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_nothing_but_its_late_read(name, watch, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "device", watch.device)
    run = run_on_device(name, images, tmp_path, watch.device)
    levels = len(run.images.sizes)
    with watch() as device:
        for _ in range(2 * levels):  # by then each level was visited, and its tables are on the device
            run.checked(run.optimise())
        device.waits.clear()
        for _ in range(levels):
            run.checked(run.optimise())
    late = 0 if watch is PresentDevice else levels  # a GPU sends its numbers off, and is asked for an event
    places = [wait.place for wait in device.waits]
    assert [each for each in places if each not in JPEG] == late * [ALLOWED]
    assert ("realistic" in name) == any(each in JPEG for each in places)
