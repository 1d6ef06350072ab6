"""Tiny, untrained pipelines of every kind, and their exports."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import warm
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from hub_server import Hub, hub_server

from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    GuidedSRPipeline,
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    PyramidalPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
    ScaleAutoencoder,
    hub,
)
from pyrdiff.hub import checking

BLOCKS = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)


def pyramidal() -> PyramidalPipeline:
    unet = CoordinateUNet2DModel(image_channels=1, resolutions=(4, 8), **BLOCKS)
    plans = {"quick": {"num_inference_steps": 3, "refine_steps": 2, "scheduler": ["DDIMScheduler", {}]}}
    return PyramidalPipeline(unet, DDPMScheduler(), DPMSolverMultistepScheduler(), plans=plans)


def stock() -> PyramidalPipeline:
    """Diffusers' own network and scheduler."""
    return PyramidalPipeline(UNet2DModel(in_channels=1, out_channels=1, sample_size=8, **BLOCKS), DDPMScheduler())


def guided() -> GuidedSRPipeline:
    return GuidedSRPipeline(CoordinateUNet2DModel(image_channels=3, resolutions=(4, 8), **BLOCKS), DDPMScheduler())


def residual() -> ResidualSRPipeline:
    unet = ResidualSRUNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, scale_factors=(2, 3)
    )  # fmt: skip
    plans = {"default": {"num_inference_steps": 3}, "short": {"num_inference_steps": 2, "eta": 0.0}}
    return ResidualSRPipeline(unet, CosineResidualScheduler(100), plans)


def parallel() -> ParallelTrajectoryPipeline:
    common = dict(image_channels=1, norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=20)
    unet = ParallelTrajectoryUNet2DModel(encoder_channels=(4, 8), layers_per_block=1, **common)
    vae = ScaleAutoencoder(
        sample_size=8, block_out_channels=(8,), latent_dim=3, bottleneck_channels=4, prior="normal", **common
    )  # fmt: skip
    with torch.no_grad():  # untrained, both would answer 0
        unet.conv_out.weight.normal_(std=0.3)
        vae.conv_out.weight *= 10
    return ParallelTrajectoryPipeline(unet, vae, PixelAwareScheduler(num_train_timesteps=20))


PIPELINES = {"pyramidal": pyramidal, "stock": stock, "guided": guided, "residual": residual, "parallel": parallel}
CALLS = {  # as arguments that JSON can hold; "image" is the side of one
    "PyramidalPipeline": {"batch_size": 2, "num_inference_steps": 4, "resolutions": [4, 8], "refine_steps": 2},
    "GuidedSRPipeline": {"image": 4, "scale_factor": 2, "refine_steps": 3},
    "ResidualSRPipeline": {"image": 4, "scale_factor": 2},
    "ParallelTrajectoryPipeline": {"batch_size": 2, "num_passes": 2},
}

CLIENT = """
import json, os, sys, time, traceback
answers, sys.stdout = sys.stdout, sys.stderr
said = []
say = said.append
def attempt(call, *arguments, **keywords):
    try:
        say(["", str(call(*arguments, **keywords))])
    except Exception as error:
        say([type(error).__name__, str(error)])
%s
for line in sys.stdin:
    said.clear()
    asked = json.loads(line)
    globals().update(asked["values"])
    try:
        exec(asked["code"], globals())
    except Exception:
        say(traceback.format_exc())
    answers.write(json.dumps(said, default=str) + "\\n")
    answers.flush()
"""
HERE = f"""
sys.path.insert(0, {str(Path(warm.__file__).parent)!r})
import pyrdiff
import warm
from pyrdiff import hub
from pyrdiff.hub import checking, publishing
checking.subprocess = warm.Forks  # for the process without pyrdiff
"""
ELSEWHERE = """
from diffusers import DiffusionPipeline
"""
SAMPLE = """
import torch
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    call = dict(CALLS[type(pipeline).__name__])
    if "image" in call:
        call["image"] = torch.rand(1, 3, call["image"], call["image"], generator=torch.Generator().manual_seed(1))
    return pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
"""


@pytest.fixture(scope="session")
def pipelines() -> dict[str, DiffusionPipeline]:
    made = {}
    for name, make in PIPELINES.items():
        torch.manual_seed(0)
        made[name] = make()
    return made


@pytest.fixture(scope="session")
def exports(pipelines, tmp_path_factory) -> dict[str, Path]:
    """Exports of the tiny pipelines; tests copy what they change."""
    folder = tmp_path_factory.mktemp("exports")
    return {name: hub.export(pipeline, folder / name, license="mit") for name, pipeline in pipelines.items()}


@pytest.fixture(scope="session")
def sample() -> Callable[[DiffusionPipeline], torch.Tensor]:
    """sample(pipeline): [B, C, H, W] in [0, 1] of a short call with fixed seeds."""
    space = {"CALLS": CALLS}
    exec(SAMPLE, space)
    return space["sample"]


@pytest.fixture
def forked(monkeypatch) -> None:
    """`hub.check` starts its process without pyrdiff as a fork, where it would wait for a new interpreter."""
    monkeypatch.setattr(checking, "subprocess", warm.Forks)


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    """Shared, since a client takes seconds to start: every test has repositories of its own."""
    with hub_server(token="hf_test") as running:
        yield running


@contextmanager
def client_of(server: Hub, prelude: str, home: Path, without: list[str] | None = None) -> Iterator[Callable[..., list]]:
    """A process of its own that answers for as long as the context lasts. `without`: see `warm.start`."""
    text = CLIENT % f"CALLS = {CALLS!r}\n{prelude}\n{SAMPLE}"
    environment = {**server.environment, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(home / "modules")}
    environment[warm.ADDRESS] = str(warm.serve())
    (question, ask), (hear, answer) = os.pipe(), os.pipe()
    with (home / "said.txt").open("w") as log, open(ask, "w") as asking, open(hear) as hearing:
        process = warm.start(
            text, without=without, stdin=question, stdout=answer, stderr=log, env=environment, cwd=home
        )  # fmt: skip
        os.close(question), os.close(answer)

        def run(code: str, **values) -> list:
            asking.write(json.dumps({"code": code, "values": values}, default=str) + "\n")
            asking.flush()
            said = hearing.readline()
            assert said, (home / "said.txt").read_text()
            return json.loads(said)

        try:
            yield run
        finally:
            asking.close()
            process.wait(60)


@pytest.fixture(scope="session")
def client(server, tmp_path_factory) -> Iterator[Callable[..., list]]:
    """client(code, **values): what the code said, in a process with the real client of the Hub and pyrdiff."""
    with client_of(server, HERE, tmp_path_factory.mktemp("client")) as run:
        yield run


@pytest.fixture(scope="session")
def elsewhere(server, tmp_path_factory) -> Iterator[Callable[..., list]]:
    """Such a client where pyrdiff is not installed."""
    with client_of(server, ELSEWHERE, tmp_path_factory.mktemp("elsewhere"), without=["pyrdiff"]) as run:
        yield run
