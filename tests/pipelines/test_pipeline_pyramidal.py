import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from oracles import GaussianNoisePredictor, octave_power

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline

LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(),
    "ddim": lambda: DDIMScheduler(),
    "dpm-solver++": lambda: DPMSolverMultistepScheduler(),
    "dpm-solver++ sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(),
    "deis": lambda: DEISMultistepScheduler(),
    "heun": lambda: HeunDiscreteScheduler(**LINEAR),
    "euler": lambda: EulerDiscreteScheduler(**LINEAR),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**LINEAR),
}
TINY = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)


def network(seed: int = 0, **changes) -> CoordinateUNet2DModel:
    torch.manual_seed(seed)
    return CoordinateUNet2DModel(**{**TINY, "resolutions": (4, 8, 16), "image_channels": 1, **changes}).eval()


def quiet(*parts, **named) -> PyramidalPipeline:
    pipeline = PyramidalPipeline(*parts, **named)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


# Oracles: Gaussian images, whose best noise prediction is a closed form.


ORACLES = {
    "ddpm": (DDPMScheduler(clip_sample=False), dict(num_inference_steps=250), dict(refine_steps=50)),
    "dpm-solver++": (DPMSolverMultistepScheduler(), dict(num_inference_steps=20), dict(refine_steps=10)),
    "heun": (HeunDiscreteScheduler(**LINEAR), dict(num_inference_steps=59), dict(refine_steps=29)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_one_level_has_the_right_spectrum(name):
    scheduler, steps, _ = ORACLES[name]
    pipeline = quiet(GaussianNoisePredictor(), scheduler)
    output = pipeline(
        400, [32], **steps, spacing="log_snr", output_type="latent", generator=torch.Generator().manual_seed(1)
    )
    assert octave_power(output.images) == pytest.approx([1] * 5, abs=0.13)


@pytest.mark.parametrize("name", ORACLES)
def test_a_pyramid_has_the_right_spectrum(name):
    scheduler, steps, refine = ORACLES[name]
    pipeline = quiet(GaussianNoisePredictor(), scheduler)
    arguments = dict(spacing="log_snr", output_type="latent", generator=torch.Generator().manual_seed(1))
    output = pipeline(300, [8, 16, 32], **steps, **refine, **arguments)
    assert octave_power(output.images) == pytest.approx([1] * 5, abs=0.17)


# Stock diffusers as the reference.


def test_one_level_is_the_stock_pipeline():
    unet = network(resolutions=(8,))
    expected = DDPMPipeline(unet, DDPMScheduler())
    expected.set_progress_bar_config(disable=True)
    expected = expected(3, num_inference_steps=7, output_type="pt", generator=torch.Generator().manual_seed(3)).images
    pipeline = quiet(unet, DDPMScheduler())
    images = pipeline(3, [8], 7, output_type="pt", generator=torch.Generator().manual_seed(3)).images
    assert torch.allclose(images, expected, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_level_is_the_stock_loop(name):
    unet, scheduler = network(), SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = unet(scheduler.scale_model_input(latents, timestep), timestep).sample
            latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
    calls = len(scheduler.timesteps)
    pipeline = quiet(unet, SCHEDULERS[name]())
    output = pipeline(2, [8], calls, output_type="latent", generator=torch.Generator().manual_seed(5))
    assert torch.allclose(output.images, latents, atol=1e-5)


# Properties that every scheduler has.


@pytest.mark.parametrize("name", SCHEDULERS)
def test_calls_per_level_and_plan(name):
    unet = network()
    sizes = []
    unet.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].shape[-1]))
    pipeline = quiet(unet, SCHEDULERS[name]())
    plan = pipeline.plan(num_inference_steps=7, refine_steps=[5, 3], refine_strength=0.4)
    pipeline(1, num_inference_steps=7, refine_steps=[5, 3], refine_strength=0.4)
    assert [sizes.count(side) for side in (4, 8, 16)] == [7, 5, 3] == [len(level.timesteps) for level in plan.levels]
    assert plan.network_calls == pipeline.num_timesteps == 15
    assert plan.nfe_eq == pytest.approx(7 / 16 + 5 / 4 + 3)
    for level in plan.levels[1:]:
        assert 100 <= level.timesteps[0] <= 400, "a refinement begins at or just below its strength"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(name):
    pipeline = quiet(network(), SCHEDULERS[name](), DPMSolverMultistepScheduler())
    together = pipeline(3, num_inference_steps=5, refine_steps=2, output_type="pt", generator=generators(3)).images
    for index in range(3):
        alone = pipeline(
            1, num_inference_steps=5, refine_steps=2, output_type="pt", generator=generators(1, index)
        ).images
        assert (together[index] - alone[0]).abs().max() <= 1 / 255


def test_noise_per_generator_is_bit_for_bit():
    """A network that predicts nothing leaves only the noise."""
    unet = network()
    for parameter in unet.conv_out.parameters():
        parameter.data.zero_()
    pipeline = quiet(unet, DDPMScheduler())
    arguments = dict(num_inference_steps=3, refine_steps=2, output_type="latent")
    together = pipeline(2, generator=generators(2), **arguments).images
    assert torch.equal(together[1], pipeline(1, generator=generators(1, 1), **arguments).images[0])


def test_the_jump_is_enlarging_and_eq_2():
    """One refinement step from a known image: undo the step's input by hand."""
    seen = []
    unet = network(resolutions=(4, 8))
    unet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = quiet(unet, scheduler)
    low = {}

    def keep(pipe, step, timestep, tensors):
        low.setdefault(step, tensors["latents"])

    plan = pipeline.plan(num_inference_steps=2, refine_steps=3)
    assert plan.levels[1].timesteps[0] > 100
    pipeline(1, num_inference_steps=2, refine_steps=3, generator=generators(1), callback_on_step_end=keep)
    alpha = scheduler.alphas_cumprod[int(plan.levels[1].timesteps[0])]
    enlarged = F.interpolate(low[1], (8, 8), mode="bicubic", align_corners=False)
    noise = torch.Generator().manual_seed(0)
    torch.randn(1, 1, 4, 4, generator=noise)
    noise = torch.randn(1, 1, 8, 8, generator=noise)
    assert torch.allclose(seen[2], alpha.sqrt() * enlarged + (1 - alpha).sqrt() * noise, atol=1e-6)


# What a user asks for.


def test_the_network_is_told_the_window():
    boxes = []
    unet = network()
    forward = unet.forward
    unet.forward = lambda sample, t, coordinates=None, **kw: (
        boxes.append(coordinates) or forward(sample, t, coordinates, **kw)
    )
    quiet(unet, DDIMScheduler())(2, num_inference_steps=1, refine_steps=2, box=(0.25, 0.5, 0.75, 1.0))
    assert len(boxes) == 5
    for grid, size in zip(boxes[::2], (4, 8, 16), strict=True):
        expected = CoordinateUNet2DModel.coordinate_grid(size, size, (0.25, 0.5, 0.75, 1.0))
        assert grid.shape == (2, 2, size, size) and torch.equal(grid[1], expected)


def test_a_plain_unet_works():
    """It answers as a network does whose weights for the coordinates are zero."""
    blind = network(image_channels=3)
    blind.conv_in.weight.data[:, 3:] = 0
    plain = UNet2DModel(in_channels=3, out_channels=3, sample_size=16, **TINY).eval()
    plain.load_state_dict({**blind.state_dict(), "conv_in.weight": blind.conv_in.weight[:, :3]})
    arguments = dict(output_type="latent", return_levels=True)
    ours, theirs = (
        quiet(unet, DDIMScheduler())(1, [(4, 6), (8, 12)], 2, 2, generator=generators(1), **arguments).levels
        for unet in (plain, blind)
    )
    assert [tuple(level.shape) for level in ours] == [(1, 3, 4, 6), (1, 3, 8, 12)]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert quiet(plain, DDIMScheduler())(1, num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_any_size_and_any_increase():
    pipeline = quiet(network(), DDIMScheduler())
    plan = pipeline.plan([5, (9, 11), (16, 20)], 2, 2)
    assert [level.network_size for level in plan.levels] == [(6, 6), (10, 12), (16, 20)]
    output = pipeline(1, [5, (9, 11), (16, 20)], 2, 2, output_type="pt", return_levels=True)
    assert [tuple(level.shape[-2:]) for level in output.levels] == [(5, 5), (9, 11), (16, 20)]


def test_output_types():
    pipeline = quiet(network(), DDIMScheduler())
    outputs = {
        kind: pipeline(2, num_inference_steps=2, refine_steps=2, generator=generators(2), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert torch.equal(outputs["pt"], (outputs["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert outputs["pil"][0].size == (16, 16) and outputs["pil"][0].mode == "L"
    assert np.array_equal(np.asarray(outputs["pil"][1]), (outputs["np"][1, :, :, 0] * 255).round().astype(np.uint8))
    images, levels = pipeline(2, num_inference_steps=2, refine_steps=2, output_type="pt", return_dict=False)
    assert images.shape == (2, 1, 16, 16) and levels is None


def test_callback_changes_latents_and_interrupt_ends_the_run():
    pipeline, steps = quiet(network(), DDIMScheduler()), []

    def zero(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = pipeline(1, num_inference_steps=2, refine_steps=2, callback_on_step_end=zero, output_type="latent")
    assert steps == [0, 1, 2, 3, 4, 5] and not output.images.any()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = dict(output_type="latent", num_inference_steps=2)
    stopped = pipeline(
        1, refine_steps=2, generator=generators(1), callback_on_step_end=stop, return_levels=True, **arguments
    )
    assert len(calls) == 2 and len(stopped.levels) == 1
    low = pipeline(1, [4], generator=generators(1), **arguments).images
    enlarged = F.interpolate(low, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    assert torch.allclose(stopped.images, enlarged, atol=1e-6), "the level that was reached, enlarged; no noise"


def test_one_progress_bar_over_all_levels(capfd):
    PyramidalPipeline(network(), DDIMScheduler())(1, num_inference_steps=3, refine_steps=2)
    assert "7/7" in capfd.readouterr().err


def test_the_schedulers_are_used_where_they_belong():
    times = []
    unet = network()
    unet.register_forward_pre_hook(lambda module, arguments: times.append(int(arguments[1])))
    quiet(unet, DDPMScheduler(), DPMSolverMultistepScheduler())(
        1, num_inference_steps=4, refine_steps=2, spacing=[[900, 500, 100, 0], [300, 20], [200, 10]]
    )
    assert times == [900, 500, 100, 0, 300, 20, 200, 10]


PLANS = {
    "fast": {
        "num_inference_steps": 4,
        "refine_steps": [2, 1],
        "scheduler": ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}],
    },
    "placed": {"resolutions": [8, 16], "spacing": [[900, 500, 0], [200, 10]]},
    "mixed": {"scheduler": ["DDPMScheduler", {}], "refine_scheduler": ["UniPCMultistepScheduler", {}]},
}


def test_a_plan_is_the_call_that_it_says():
    unet = network()
    pipeline = quiet(unet, DDIMScheduler(), plans=PLANS)
    arguments = dict(output_type="pt", generator=generators(2))
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    expected = quiet(unet, sde)(
        2, num_inference_steps=4, refine_steps=[2, 1], output_type="pt", generator=generators(2)
    )
    assert torch.equal(pipeline(2, plan="fast", **arguments).images, expected.images)
    assert [len(level.timesteps) for level in pipeline.plan(plan="fast").levels] == [4, 2, 1]
    ddpm = quiet(unet, DDPMScheduler())
    placed = dict(spacing=[[900, 500, 0], [200, 10]], resolutions=[8, 16])
    given = {**PLANS["placed"], "scheduler": ["DDPMScheduler", {}]}
    expected = ddpm(2, output_type="pt", generator=generators(2), **placed).images
    assert torch.equal(pipeline(2, plan=given, output_type="pt", generator=generators(2)).images, expected)
    assert [level.timesteps for level in ddpm.plan(plan=PLANS["placed"]).levels] == [[900, 500, 0], [200, 10]]
    mixed = pipeline.lay_out("mixed")
    assert [type(stage.steps.scheduler).__name__ for stage in mixed] == [
        "DDPMScheduler",
        "UniPCMultistepScheduler",
        "UniPCMultistepScheduler",
    ]
    assert type(pipeline.scheduler) is DDIMScheduler, "a plan changes nothing of the pipeline"


def test_plans_travel_with_the_folder(tmp_path):
    """A folder's scheduler says every setting, one in memory only those given: a plan depends on neither."""
    pipeline = quiet(network(), DDIMScheduler(), plans=PLANS)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = PyramidalPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    images = [one(1, plan="fast", output_type="latent", generator=generators(1)).images for one in (pipeline, loaded)]
    assert torch.allclose(*images, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(plan="best"), r"plan='best': expected one of \['fast', 'mixed', 'placed'\]"),
        (dict(plan="fast", refine_steps=3), "plan='fast' with refine_steps=3: expected one or the other"),
        (dict(plan="fast", resolutions=[4]), "plan='fast' with resolutions="),
        (dict(plan={"steps": 3}), "plan has 'steps': expected"),
        (dict(plan={"scheduler": ["UNet2DModel", {}]}), "scheduler of the plan is 'UNet2DModel'"),
        (dict(plan={"scheduler": ["Nothing", {}]}), "scheduler of the plan is 'Nothing'"),
        (dict(plan={"scheduler": "DDPMScheduler"}), "scheduler of the plan is 'DDPMScheduler': expected"),
        (dict(plan={"scheduler": ["DDPMScheduler", {"steps": 3}]}), "scheduler of the plan sets 'steps'"),
        (dict(plan={"scheduler": ["DDPMScheduler", {"beta_end": 0.1}]}), "scheduler of the plan sets 'beta_end'"),
        (dict(plan={"refine_scheduler": ["EDMEulerScheduler", {}]}), "refine_scheduler=EDMEulerScheduler: expected"),
        (dict(plan=3), "plan=3: expected a name or a dict"),
        (dict(plan={"spacing": [900, 500, 20]}), r"spacing=\[900, 500, 20\]: expected one list"),
        (dict(plan={"spacing": [[900.5], [5], [5]]}), "spacing=.*: expected one list of whole numbers"),
    ],
)
def test_bad_plans_are_named_before_any_work(arguments, message):
    unet, calls = network(), []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline = quiet(unet, DDPMScheduler(), plans=PLANS)
    with pytest.raises(ValueError, match=message):
        pipeline(1, **arguments)
    with pytest.raises(ValueError, match=message):
        pipeline.plan(**arguments)
    assert not calls


def test_no_step_waits_for_a_device():
    """The scheduler's times are on the CPU, the network's beside its sample, and no value is read back in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if "_local_scalar_dense" in str(operation) and arguments[0].dtype.is_floating_point:
                reads.append(operation)
            return operation(*arguments, **(keywords or {}))

    unet, inside = network(), []
    unet.register_forward_pre_hook(lambda module, arguments: inside.append(len(reads)))
    pipeline = quiet(unet, DDPMScheduler(), DDIMScheduler())
    with Reads():
        pipeline(1, num_inference_steps=5, refine_steps=4, output_type="latent", generator=generators(1))
    assert len(inside) == 13 and len(set(inside)) == 1, "as many reads before the first call as before the last"


def test_a_question_changes_nothing():
    """A plan can be asked for in the middle of a run, and the run goes on as it would have."""
    pipeline = quiet(network(), DPMSolverMultistepScheduler(), plans=PLANS)
    arguments = dict(num_inference_steps=4, refine_steps=2, output_type="latent")
    expected = pipeline(1, generator=generators(1), **arguments).images
    before = dict(vars(pipeline.scheduler))

    def ask(pipe, step, timestep, tensors):
        pipe.plan(num_inference_steps=7)
        pipe.plan(plan="fast")

    asked = pipeline(1, generator=generators(1), callback_on_step_end=ask, **arguments).images
    assert torch.equal(asked, expected)
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(pipeline.scheduler).items())


def test_plans_of_older_folders_may_name_the_white_jump():
    pipeline = quiet(network(), DDIMScheduler(), plans={"old": {"num_inference_steps": 3, "stage_jump": "white"}})
    assert len(pipeline.plan(plan="old").levels[0].timesteps) == 3
    with pytest.raises(ValueError, match="plan has 'stage_jump'"):
        pipeline.plan(plan={"stage_jump": "matched"})


def test_log_snr_spacing_is_even():
    pipeline = quiet(network(), DPMSolverMultistepScheduler())
    times = np.array(pipeline.plan([16], 10, spacing="log_snr").levels[0].timesteps).astype(int)
    alphas = DDPMScheduler().alphas_cumprod.numpy()
    log_snr = np.log(alphas / (1 - alphas))[times]
    assert times[0] == 999 and times[-1] == 0
    assert np.diff(log_snr)[:-1] == pytest.approx(np.diff(log_snr).mean(), rel=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(resolutions=[]), "resolutions="),
        (dict(resolutions=[8, 4]), "larger than the one before"),
        (dict(resolutions=[8, 8]), "larger than the one before"),
        (dict(resolutions=[1, 8]), "at least 2"),
        (dict(resolutions=[8.5]), "resolutions=8.5: expected a whole number"),
        (dict(num_inference_steps=0), "num_inference_steps=0"),
        (dict(num_inference_steps=1001), "num_inference_steps=1001: expected at most 1000"),
        (dict(refine_steps=[1]), "one for each of the 2 higher levels"),
        (dict(refine_steps=301), "refine_steps=301: expected at most 300"),
        (dict(refine_strength=0), r"refine_strength=0: expected a number in \(0, 1\]"),
        (dict(refine_strength=1.5), "refine_strength=1.5"),
        (dict(box=(0, 0, 1, 2)), "box="),
        (dict(box=(0.5, 0, 0.5, 1)), "box="),
        (dict(spacing="even"), "spacing='even'"),
        (dict(spacing=[[9], [5]]), "one list for each of 3"),
        (dict(spacing=[[9, 12], [5], [5]]), "descending"),
        (dict(generator=generators(3)), "generator has 3 entries"),
        (dict(output_type="jpg"), "output_type='jpg'"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_input_is_named_before_any_work(arguments, message):
    unet, calls = network(), []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline = quiet(unet, DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match=message):
        pipeline(**{"num_inference_steps": 2, "refine_steps": 1, **arguments})
    assert not calls


def test_bad_schedulers():
    class NoNoise(DDPMScheduler):
        add_noise = property()

    with pytest.raises(ValueError, match="scheduler=NoNoise: expected a scheduler with `add_noise`"):
        PyramidalPipeline(network(), NoNoise())
    with pytest.raises(ValueError, match="scheduler=EDMEulerScheduler: expected"):
        PyramidalPipeline(network(), EDMEulerScheduler())
    with pytest.raises(ValueError, match="LCMScheduler does not take .* steps"):
        quiet(network(), LCMScheduler())(1, num_inference_steps=8)
    with pytest.raises(ValueError, match="scheduler of the plan is 'Nothing'"):
        quiet(network(), DDPMScheduler(), plans={"wrong": {"scheduler": ["Nothing", {}]}})
    with pytest.raises(ValueError, match="PNDMScheduler does not take as many steps"):
        quiet(network(), PNDMScheduler())(1, num_inference_steps=8)
    with pytest.raises(ValueError, match="refine_steps=1: DDIMScheduler would start at time 0"):
        quiet(network(), DDIMScheduler())(1, num_inference_steps=8, refine_steps=1)
    with pytest.raises(ValueError, match="DDIMScheduler places its steps itself"):
        quiet(network(), DDIMScheduler())(1, num_inference_steps=2, spacing="log_snr")
