"""What users of diffusers expect of any pipeline, network and scheduler."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

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
    ShuffledSRModel,
)

BLOCKS = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed))


def coordinate_network(**changes) -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    return CoordinateUNet2DModel(**{**BLOCKS, "image_channels": 1, "resolutions": (4, 8), **changes}).eval()


def residual_network(**changes) -> ResidualSRUNet2DModel:
    torch.manual_seed(0)
    settings = dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    return ResidualSRUNet2DModel(**{**settings, "image_channels": 1, "scale_factors": (2,), **changes}).eval()


def shuffled_network(**changes) -> ShuffledSRModel:
    torch.manual_seed(0)
    settings = dict(block_out_channels=(8, 12), layers_per_block=(1, 1), embedding_dim=8, image_channels=1)
    network = ShuffledSRModel(**{**settings, "scale_factors": (2,), **changes}).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=seeded())
    return network


def trajectory_network(**changes) -> ParallelTrajectoryUNet2DModel:
    torch.manual_seed(0)
    settings = dict(encoder_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, attention_head_dim=8)
    settings |= dict(image_channels=1, time_embedding_dim=16, num_train_timesteps=10, head="literal")
    network = ParallelTrajectoryUNet2DModel(**{**settings, **changes}).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=seeded())
    return network


def autoencoder(**changes) -> ScaleAutoencoder:
    torch.manual_seed(0)
    settings = dict(sample_size=8, block_out_channels=(8, 16), attention_sizes=(4,), norm_num_groups=4, latent_dim=4)
    settings |= dict(image_channels=1, time_embedding_dim=16, num_train_timesteps=10, prior="normal")
    return ScaleAutoencoder(**{**settings, **changes}).eval()


NETWORKS = {
    "coordinates": (coordinate_network, dict(sample=draw(2, 1, 8, 8), timestep=5, coordinates=draw(2, 2, 8, 8))),
    "residual": (residual_network, dict(sample=draw(2, 1, 8, 8), noise_level=0.5, low_res=draw(2, 1, 8, 8, seed=1))),
    "shuffled": (shuffled_network, dict(sample=draw(2, 1, 8, 8), noise_level=0.5, low_res=draw(2, 1, 8, 8, seed=1))),
    "trajectory": (
        trajectory_network,
        dict(sample=draw(2, 1, 8, 8), timestep=5, structure=draw(2, 1, 8, 8, seed=1), steps=[1, 4]),
    ),
    "autoencoder": (autoencoder, dict(sample=draw(2, 1, 8, 8).clamp(min=0.1), timestep=3)),
}


def outputs_of(network: torch.nn.Module, arguments: dict) -> list[torch.Tensor]:
    return [output for output in network(**arguments, return_dict=False) if output is not None]


def pyramidal() -> PyramidalPipeline:
    return quiet(PyramidalPipeline(coordinate_network(), DDPMScheduler()))


def residual() -> ResidualSRPipeline:
    return quiet(ResidualSRPipeline(residual_network(), CosineResidualScheduler(num_train_timesteps=50)))


def trajectory() -> ParallelTrajectoryPipeline:
    scheduler = PixelAwareScheduler(num_train_timesteps=10)
    return quiet(ParallelTrajectoryPipeline(trajectory_network(), autoencoder(), scheduler))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {
    "pyramidal": (
        pyramidal,
        lambda pipeline: pipeline(2, num_inference_steps=3, refine_steps=2, generator=seeded(), output_type="latent"),
    ),
    "guided": (
        lambda: quiet(GuidedSRPipeline(coordinate_network(), DDPMScheduler())),
        lambda pipeline: pipeline(draw(1, 1, 4, 4), 2, refine_steps=2, generator=seeded(), output_type="latent"),
    ),
    "residual": (
        residual,
        lambda pipeline: pipeline(draw(1, 1, 4, 4), num_inference_steps=3, generator=seeded(), output_type="latent"),
    ),
    "trajectory": (
        trajectory,
        lambda pipeline: pipeline(2, num_passes=2, generator=seeded(), output_type="latent"),
    ),
}


# A pipeline of another's parts.


@pytest.mark.parametrize("name", PIPELINES)
def test_from_pipe_and_components_make_the_same_pipeline(name):
    make, call = PIPELINES[name]
    pipeline = make()
    expected = call(pipeline).images
    others = [type(pipeline).from_pipe(pipeline), type(pipeline)(**pipeline.components)]
    for other in map(quiet, others):
        assert all(other.components[key] is value for key, value in pipeline.components.items())
        assert torch.equal(call(other).images, expected)


def test_from_pipe_goes_from_generating_to_enlarging_and_back():
    plans = {"fast": {"num_inference_steps": 3}}
    pipeline = PyramidalPipeline(coordinate_network(), DDPMScheduler(), plans=plans)
    enlarging = GuidedSRPipeline.from_pipe(pipeline)
    assert enlarging.unet is pipeline.unet
    assert PIPELINES["guided"][1](quiet(enlarging)).images.shape == (1, 1, 8, 8)
    assert GuidedSRPipeline(**pipeline.components).unet is pipeline.unet
    back = PyramidalPipeline.from_pipe(enlarging)
    assert back.unet is pipeline.unet and back.config.plans == plans
    refining = PyramidalPipeline(coordinate_network(), DDPMScheduler(), DDPMScheduler())
    assert GuidedSRPipeline.from_pipe(refining).unet is refining.unet
    other = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **BLOCKS)
    assert PyramidalPipeline.from_pipe(pipeline, unet=other).unet is other


# Wrapped networks.


class Wrapper(torch.nn.Module):
    """As what adapters, compiling and parallel training put around a network: it passes on what it is given."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.inside = torch.nn.Sequential(network)

    def forward(self, *args, **kwargs):
        return self.inside[0](*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.inside[0].device


@pytest.mark.parametrize("name", PIPELINES)
def test_a_wrapped_network_gives_the_same_images(name):
    make, call = PIPELINES[name]
    pipeline = make()
    expected = call(pipeline).images
    wrapped = type(pipeline)(**{**pipeline.components, "unet": Wrapper(Wrapper(pipeline.unet))})
    assert torch.equal(call(quiet(wrapped)).images, expected)


def with_adapters(network: torch.nn.Module) -> torch.nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = dict(r=2, target_modules=["conv1", "conv2"])  # adapters of rank 2 start as nothing
    return peft.get_peft_model(network, peft.LoraConfig(**settings)).eval()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_network_with_adapters_gives_the_same_images(name):
    make, call = PIPELINES[name]
    pipeline = make()
    expected = call(pipeline).images
    pipeline.unet = with_adapters(pipeline.unet)
    assert torch.equal(call(pipeline).images, expected)


def test_a_network_with_adapters_sees_the_window_that_is_asked_for():
    box, arguments = (0.0, 0.5, 0.5, 1.0), dict(num_inference_steps=3, refine_steps=2, output_type="latent")
    pipeline = pyramidal()
    whole = pipeline(1, **arguments, generator=seeded()).images
    window = pipeline(1, **arguments, box=box, generator=seeded()).images
    assert not torch.allclose(whole, window, atol=1e-3)
    pipeline.unet = with_adapters(pipeline.unet)
    assert torch.equal(pipeline(1, **arguments, box=box, generator=seeded()).images, window)


def test_a_network_with_adapters_is_saved_only_when_they_are_merged(tmp_path):
    pipeline = pyramidal()
    pipeline.unet = with_adapters(pipeline.unet)
    with pytest.raises(ValueError, match="unet=PeftModel: expected .*merge_and_unload"):
        pipeline.save_pretrained(tmp_path / "with")
    assert not (tmp_path / "with").exists()
    pipeline.unet = pipeline.unet.merge_and_unload()
    pipeline.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "unet" / "unet_coordinate.py").is_file()


ONE_BLOCK = {  # all of a forward but few blocks, since tracing them takes long
    "coordinates": dict(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False
    ),
    "residual": dict(attention="16x16"),
    "shuffled": {},
    "trajectory": dict(encoder_channels=(8,), attention_levels=(), layers_per_block=1, head_attention=False),
    "autoencoder": dict(block_out_channels=(8,), attention_sizes=()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_compiles_as_one_graph(name):
    make, arguments = NETWORKS[name]
    network = make(**ONE_BLOCK[name])
    expected = outputs_of(network, arguments)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ours, theirs in zip(outputs_of(compiled, arguments), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    make, arguments = NETWORKS[name]

    def gradients(network: torch.nn.Module) -> tuple[list[torch.Tensor], int]:
        calls = []
        for module in network.modules():
            if type(module).__name__ in ("ResnetBlock2D", "ConditionedBlock"):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        sum(output.square().sum() for output in outputs_of(network.train(), arguments)).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None], len(calls)

    expected, calls = gradients(make())
    network = make()
    network.enable_gradient_checkpointing()
    found, recomputed = gradients(network)
    assert len(found) == len(expected) and recomputed > calls
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# Weights that are elsewhere until they are used.


@pytest.fixture
def empty_memory_is_not_a_number():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["coordinates", "residual", "shuffled", "trajectory"])
def test_group_offloading_gives_the_same_outputs(name, kind, tmp_path, empty_memory_is_not_a_number):
    make, arguments = NETWORKS[name]
    network = make()
    with torch.no_grad():
        expected = outputs_of(network, arguments)
        network.enable_group_offload(
            torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            offload_to_disk_path=str(tmp_path),
        )
        assert any(parameter.isnan().any() for parameter in network.parameters())
        for ours, theirs in zip(outputs_of(network, arguments), expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=1e-6
            )  # where weights lie decides how sums are rounded


def test_an_autoencoder_refuses_group_offloading_and_the_others_go_on_without_it(tmp_path):
    pipeline, arguments = trajectory(), dict(num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    expected = PIPELINES["trajectory"][1](pipeline).images
    with pytest.raises(ValueError, match="ScaleAutoencoder does not support group offloading"):
        pipeline.autoencoder.enable_group_offload(torch.device("cpu"), **arguments)
    pipeline.enable_group_offload(torch.device("cpu"), exclude_modules="autoencoder", **arguments)
    assert torch.equal(PIPELINES["trajectory"][1](pipeline).images, expected)


# Numbers and generators.


def test_numbers_may_be_those_of_numpy():
    expected = pyramidal()(2, [4, 8], 3, 2, 0.3, generator=seeded(), output_type="latent").images
    count, share = np.int64, np.float32(0.3)
    pipeline = pyramidal()
    sizes, steps = [count(4), (count(8), count(8))], (count(3), count(2))
    found = pipeline(count(2), sizes, *steps, share, generator=seeded(), output_type="latent").images
    assert torch.equal(found, expected)
    times = [[count(999), count(0)], [count(100), count(0)]]
    solver = PyramidalPipeline(coordinate_network(), DPMSolverMultistepScheduler())
    assert solver.plan([4, 8], spacing=times).network_calls == 4
    assert torch.equal(
        trajectory()(count(2), count(2), generator=seeded(), output_type="latent").images,
        trajectory()(2, 2, generator=seeded(), output_type="latent").images,
    )
    for scheduler in (CosineResidualScheduler(count(20)), PixelAwareScheduler(count(20))):
        scheduler.set_timesteps(count(4))
        assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_numbers_of_numpy_is_saved_and_loaded(name, tmp_path):
    make, arguments = NETWORKS[name]
    network = make()
    settings = {key: in_numpy(value) for key, value in network.config.items() if not key.startswith("_")}
    again = type(network)(**settings)
    again.load_state_dict(network.state_dict())
    again.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path).eval()
    for ours, theirs in zip(outputs_of(loaded, arguments), outputs_of(network, arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def in_numpy(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(in_numpy, value))
    return np.int64(value) if type(value) is int else value


@pytest.mark.parametrize(
    "call",
    [
        lambda generator: pyramidal()(1, generator=generator),
        lambda generator: residual()(draw(1, 1, 4, 4), generator=generator),
        lambda generator: trajectory()(1, generator=generator),
        lambda generator: autoencoder().sample_prior(1, generator=generator),
        lambda generator: autoencoder().sample_prior(1, generator=[generator]),
        lambda generator: autoencoder().sample_latents(draw(1, 4), draw(1, 4), generator=generator),
        lambda generator: CosineResidualScheduler().sample_noise_level(torch.tensor([3]), generator=generator),
        lambda generator: CosineResidualScheduler().step(draw(1, 1, 4, 4), 3, draw(1, 1, 4, 4), generator=generator),
        lambda generator: PixelAwareScheduler().prior_sample(draw(1, 1, 4, 4), generator=generator),
        lambda generator: PixelAwareScheduler().sample_path(draw(1, 1, 4, 4) + 0.1, [3], generator=generator),
    ],
)
def test_a_seed_is_no_generator(call):
    with pytest.raises(ValueError, match=r"generator=5: expected a torch.Generator.*manual_seed"):
        call(5)
