"""Images of a class: names and numbers, guidance by classes or a worse network, what it costs and what is refused."""

import re

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config

from pyrdiff import CoordinateUNet2DModel, GuidedSRPipeline, PyramidalPipeline
from pyrdiff.parts.labels import label_numbers, spread_classes

TINY = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
NAMES = ("cat", "dog", "ape")
STEPS = dict(num_inference_steps=3, refine_steps=2)


class PointMasses(ModelMixin, ConfigMixin):
    """
    Images of a class are gray of one value each, those of no class of another: the noise prediction is
    (x - a value) / s, so that every clean estimate is that value.
    """

    VALUES = (0.5, -0.25, 0.1, 0.05)  # of three classes, and of none

    @register_to_config
    def __init__(self, in_channels=1, sample_size=8, resolutions=(4, 8), class_names=NAMES, num_class_embeds=4):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, int, list[int]]] = []

    def forward(self, sample, timestep, class_labels, return_dict=True):
        self.calls.append((sample.shape[-1], int(timestep), class_labels.tolist()))
        signal = DDPMScheduler().alphas_cumprod.double()[int(timestep)].sqrt()
        values = torch.tensor(self.VALUES).double()[class_labels].reshape(-1, 1, 1, 1)
        return (((sample.double() - signal * values) / (1 - signal**2).sqrt()).float(),)


def network(**changes) -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    settings = {**TINY, "resolutions": (4, 8), "image_channels": 1, "class_names": NAMES, **changes}
    return CoordinateUNet2DModel(**settings).eval()


def quiet(unet, scheduler=None, **named) -> PyramidalPipeline:
    pipeline = PyramidalPipeline(unet, scheduler or DDIMScheduler(clip_sample=False), **named)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(pipeline, *arguments, **named) -> torch.Tensor:
    return pipeline(*arguments, **{"output_type": "latent", "generator": seeded(), **STEPS, **named}).images


# A network whose answer is known.


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DPMSolverMultistepScheduler()])
def test_images_are_those_of_guidance_in_closed_form(scheduler, scale):
    images = latents(quiet(PointMasses(), scheduler), classes=["dog", None, 0], guidance_scale=scale)
    none, dog, cat = PointMasses.VALUES[3], PointMasses.VALUES[1], PointMasses.VALUES[0]
    expected = torch.tensor([none + scale * (dog - none), none, none + scale * (cat - none)])
    assert (images - expected.reshape(-1, 1, 1, 1)).abs().max() < 2e-3  # a little noise is left at time 0


def test_guidance_within_an_interval():
    pipeline = quiet(PointMasses())
    images = latents(pipeline, classes="dog", guidance_scale=3.0, guidance_interval=(0.2, 0.6))
    assert (images + 0.25).abs().max() < 2e-3, "the last step decides, which is not guided"
    for _, time, labels in pipeline.unet.calls:
        assert labels == ([3, 1] if 200 <= time <= 600 else [1])
    plan = pipeline.plan(**STEPS, guidance_scale=3.0, guidance_interval=(0.2, 0.6))
    rows = [(size, len(labels)) for size, _, labels in pipeline.unet.calls]
    for level in plan.levels:
        assert level.network_calls == sum(count for size, count in rows if size == level.size[0])
    assert plan.network_calls == sum(count for _, count in rows)
    assert plan.nfe_eq == pytest.approx(sum(count * size**2 / 64 for size, count in rows))
    assert 5 < plan.network_calls < 10


def test_the_cost_of_guidance_everywhere_is_twice():
    pipeline = quiet(network())
    once, twice = pipeline.plan(**STEPS), pipeline.plan(**STEPS, guidance_scale=2.0)
    assert (twice.network_calls, twice.nfe_eq) == (2 * once.network_calls, 2 * once.nfe_eq)
    assert pipeline.plan(**STEPS, guidance_scale=1.0) == once
    assert f"{twice.network_calls:>5}" in str(twice).splitlines()[-1]


# A network of ours.


def test_both_predictions_in_one_batch_are_those_of_two_calls():
    unet = network()
    pipeline, sample, time = quiet(unet), torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor(400)
    where = pipeline.coordinate_grid(8, 8, (0, 0.5, 0.5, 1))[None].expand(2, -1, -1, -1)
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        told, without = (unet(sample, time, where, each).sample for each in (labels, torch.tensor([3, 3])))
        for scale, expected in ((1.0, told), (0.0, without), (2.5, without + 2.5 * (told - without))):
            assert (pipeline._guided(sample, time, where, labels, scale) - expected).abs().max() < 1e-6 * max(
                1, 2 * scale
            )
    assert (told - without).abs().max() > 1e-2


def test_scale_0_is_any_class_and_1_is_the_class():
    pipeline = quiet(network())
    told = latents(pipeline, 2, classes="dog")
    assert (latents(pipeline, 2, classes=[1, 1], guidance_scale=1.0) - told).abs().max() < 1e-6
    any_class = latents(pipeline, 2)
    assert (latents(pipeline, 2, classes="dog", guidance_scale=0.0) - any_class).abs().max() < 1e-5
    assert (told - any_class).abs().max() > 1e-3
    almost = latents(pipeline, 2, classes="dog", guidance_scale=1 + 1e-6)
    assert (almost - told).abs().max() < 1e-4


def test_an_image_does_not_depend_on_the_classes_of_others():
    pipeline = quiet(network())
    together = latents(
        pipeline, classes=["cat", None, "ape"], guidance_scale=2.0, generator=[seeded(k) for k in range(3)]
    )
    for index, name in enumerate(("cat", "ape")):
        alone = latents(pipeline, classes=name, guidance_scale=2.0, generator=[seeded(2 * index)])
        assert (together[2 * index] - alone[0]).abs().max() < 1e-5


def test_as_many_images_as_classes():
    pipeline = quiet(network())
    assert len(latents(pipeline)) == 1
    assert len(latents(pipeline, classes=["cat", "dog", 2])) == 3
    assert len(latents(pipeline, 4, classes=["cat"])) == len(latents(pipeline, 4, classes="cat")) == 4


def test_a_network_without_classes_is_as_it_was():
    torch.manual_seed(0)
    before = CoordinateUNet2DModel(**{**TINY, "resolutions": (4, 8), "image_channels": 1})
    assert before.config.class_names is None and before.config.num_class_embeds is None
    assert before.class_embedding is None
    config = {key: value for key, value in before.config.items() if key != "class_names"}
    assert CoordinateUNet2DModel.from_config(config).config.class_names is None
    images = latents(quiet(before.eval()), 2)
    assert torch.equal(images, latents(quiet(before), 2, classes=None, guidance_scale=1.0))
    assert torch.equal(images, latents(quiet(before), 2, classes=[None, None]))


def test_enlarging_is_told_the_class():
    unet = network()
    pipeline, image = GuidedSRPipeline(unet, DDPMScheduler()), torch.rand(1, 1, 4, 4, generator=seeded())
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(scale_factor=2, refine_steps=2, output_type="latent")
    seen = []
    unet.register_forward_pre_hook(lambda _, args, named: seen.append(named["class_labels"].tolist()), with_kwargs=True)
    images = {name: pipeline(image, **arguments, generator=seeded(), classes=name).images for name in (*NAMES, None)}
    assert seen == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert (images["cat"] - images["dog"]).abs().max() > 1e-4
    pipeline(image, **arguments, classes="dog", guidance="gradient", tile=4)
    with pytest.raises(ValueError, match="classes='cow': expected one of cat, dog, ape"):
        pipeline(image, **arguments, classes="cow")


# Plans.


def test_plans_may_guide_and_guidance_goes_beside_those_that_do_not():
    plans = {"short": dict(STEPS), "guided": {**STEPS, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.5]}}
    pipeline = quiet(network(), plans=plans)
    expected = latents(pipeline, classes="cat", guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    planned = dict(classes="cat", output_type="latent", generator=seeded())
    assert torch.equal(pipeline(plan="guided", **planned).images, expected)
    planned["generator"] = seeded()
    beside = pipeline(plan="short", guidance_scale=2.0, guidance_interval=(0, 0.5), **planned).images
    assert torch.equal(beside, expected)
    assert pipeline.plan(plan="guided").network_calls > pipeline.plan(plan="short").network_calls
    with pytest.raises(ValueError, match="with guidance_scale=3.0: expected one or the other"):
        pipeline(plan="guided", classes="cat", guidance_scale=3.0)
    with pytest.raises(ValueError, match="with num_inference_steps=7: expected one or the other"):
        pipeline(plan="short", classes="cat", num_inference_steps=7)
    with pytest.raises(ValueError, match="guidance_scale=2: expected classes beside it"):
        pipeline(plan="guided")


# Refusals.


def plain_network() -> UNet2DModel:
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3, **TINY).eval()


REFUSED = {
    "unknown name": (network, dict(classes="cow"), "classes='cow': expected one of cat, dog, ape, or a number from 0"),
    "unknown number": (network, dict(classes=3), "classes=3: expected one of cat, dog, ape, or a number from 0 to 2"),
    "negative": (network, dict(classes=-1), "classes=-1: expected one of"),
    "neither": (network, dict(classes=1.0), "classes=1.0: expected one of"),
    "too many": (network, dict(batch_size=3, classes=["cat", "dog"]), "expected one, or one for each of 3 images"),
    "none at all": (network, dict(classes=[]), "expected one, or one for each of 1 images"),
    "guidance alone": (network, dict(guidance_scale=2.0), "guidance_scale=2: expected classes beside it"),
    "guidance of none": (network, dict(classes=[None], guidance_scale=0.5), "guidance_scale=0.5: expected classes"),
    "negative scale": (network, dict(classes="cat", guidance_scale=-1), "guidance_scale=-1: expected a number from 0"),
    "scale nan": (network, dict(classes="cat", guidance_scale=float("nan")), "guidance_scale=nan: expected a number"),
    "interval": (network, dict(classes="cat", guidance_interval=(0.6, 0.2)), "expected (low, high) within [0, 1]"),
    "interval beyond": (network, dict(classes="cat", guidance_interval=(0, 300)), "expected (low, high) within [0, 1]"),
    "no classes": (
        lambda: network(class_names=None),
        dict(classes="cat"),
        "classes='cat': expected None, since this network knows no classes",
    ),
    "no classes to guide by": (
        lambda: network(class_names=None),
        dict(guidance_scale=2.0),
        "guidance_scale=2.0: expected 1.0, since this network knows no classes",
    ),
    "stock, any class": (plain_network, {}, "classes=None: expected one of 0, 1, 2 for each image"),
    "stock, unknown": (plain_network, dict(classes=3), "classes=3: expected one of 0, 1, 2"),
    "stock, guided": (plain_network, dict(classes=1, guidance_scale=2.0), "has no label for images of no class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_classes_are_refused_before_the_network_runs(case):
    make, arguments, message = REFUSED[case]
    unet = make()
    unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=re.escape(message)):
        latents(quiet(unet), **arguments)


def test_a_stock_network_with_classes():
    pipeline = quiet(plain_network())
    images = [latents(pipeline, 1, [8], num_inference_steps=3, refine_steps=8, classes=k) for k in (0, 2, "2")]
    assert (images[0] - images[1]).abs().max() > 1e-4 and torch.equal(images[1], images[2])


def test_where_the_names_are_numbers_a_number_is_a_name():
    config = {"class_names": ["1", "5", "-3"], "num_class_embeds": 4}
    assert label_numbers([1, "5", -3, None], 4, config) == [0, 1, 2, 3]
    for value in (0, "0", 2):
        with pytest.raises(ValueError, match=f"classes={value!r}: expected one of 1, 5, -3$"):
            label_numbers(value, 1, config)
    mixed = {"class_names": ["7", "cat"], "num_class_embeds": 3}
    assert label_numbers([7, 1, "0"], 3, mixed) == [0, 1, 0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(class_names=[]), "class_names=[]: expected different names"),
        (dict(class_names="cat"), "class_names='cat': expected different names"),
        (dict(class_names=["a", "a"]), "expected different names"),
        (dict(class_names=["a", 3]), "expected different names"),
        (dict(class_names=["a", ""]), "expected different names"),
        (dict(class_names=["a", "b\n"]), "expected different names"),
        (dict(num_class_embeds=3), "num_class_embeds=3, class_embed_type=None: expected 4 and None"),
        (dict(class_embed_type="timestep"), "class_embed_type='timestep': expected 4 and None"),
    ],
)
def test_networks_with_bad_names(settings, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        network(**settings)


def test_names_are_kept_in_the_config(tmp_path):
    unet = network()
    unet.save_pretrained(tmp_path)
    loaded = CoordinateUNet2DModel.from_pretrained(tmp_path)
    assert list(loaded.config.class_names) == list(NAMES) and loaded.config.num_class_embeds == 4
    sample, labels = torch.randn(1, 1, 8, 8, generator=seeded()), torch.tensor([2])
    with torch.no_grad():
        outputs = [each.eval()(sample, 5, None, labels).sample for each in (unet, loaded)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6


# A worse network as the guide.


class PlainMasses(PointMasses):
    """The same of images without classes: one value, `value`."""

    @register_to_config
    def __init__(self, in_channels=1, sample_size=8, resolutions=(4, 8), value=0.5):
        ModelMixin.__init__(self)
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, int]] = []

    def forward(self, sample, timestep, return_dict=True):
        self.calls.append((sample.shape[-1], int(timestep)))
        signal = DDPMScheduler().alphas_cumprod.double()[int(timestep)].sqrt()
        return (((sample.double() - signal * self.config.value) / (1 - signal**2).sqrt()).float(),)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_images_are_those_of_autoguidance_in_closed_form(scale):
    better, worse = PlainMasses(value=0.2), PlainMasses(value=0.1)
    images = latents(quiet(better, guide=worse), 2, guidance_scale=scale)
    assert (images - (0.1 + scale * 0.1)).abs().max() < 2e-3
    assert worse.calls == ([] if scale == 1 else better.calls)


def test_a_guide_is_told_the_class_and_costs_a_call():
    better, worse = PointMasses(), PointMasses()
    worse.VALUES = (0.4, -0.2, 0.1, 0.05)
    pipeline = quiet(better, guide=worse)
    images = latents(pipeline, classes=["cat", "dog", None], guidance_scale=2.0)
    assert (images - torch.tensor([0.6, -0.3, 0.05]).reshape(-1, 1, 1, 1)).abs().max() < 2e-3
    assert [labels for *_, labels in better.calls] == [labels for *_, labels in worse.calls] == [[0, 1, 3]] * 5
    assert pipeline.plan(**STEPS, guidance_scale=2.0).network_calls == 10
    worse.calls.clear()
    latents(pipeline, classes="cat", guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    assert 0 < len(worse.calls) < 5 and all(200 <= time <= 600 for _, time, _ in worse.calls)
    assert pipeline.plan(**STEPS, guidance_scale=2.0, guidance_interval=(0.2, 0.6)).network_calls == 5 + len(
        worse.calls
    )


def test_a_guide_that_cannot_be_called_so_is_refused():
    for guide, said in (
        (network(image_channels=3), "guide has image_channels=3: expected 1, as the network has"),
        (network(class_names=("cat", "dog", "cow")), r"guide has class_names=.*cow.*: expected .*ape"),
        (network(class_names=None), "guide has class_names=None: expected"),
        (network(noise_window=0.3), "guide has noise_window=0.3: expected 1.0 or more"),
        (
            network(
                block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3
            ),
            "guide has 3 levels of channels: expected at most 2",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            quiet(network(), guide=guide)
    with pytest.raises(ValueError, match="this network knows no classes, and no `guide` comes with it"):
        latents(quiet(network(class_names=None)), guidance_scale=2.0)


def test_classes_are_spread_as_in_training():
    config = {"class_names": list(NAMES), "num_class_embeds": 4}
    colors = {"classes": [{"share": share} for share in (0.7, 0.25, 0.05)]}
    told = spread_classes(config, colors, range(1000))
    assert all(abs(told.count(name) - 1000 * share) <= 3 for name, share in zip(NAMES, (0.7, 0.25, 0.05), strict=True))
    assert spread_classes(config, colors, range(500, 700)) == told[500:700]
    for without in (None, {}, {"classes": [{}, {}, {}]}):
        told = spread_classes(config, without, range(300))
        assert all(abs(told.count(name) - 100) <= 2 for name in NAMES)
    assert spread_classes({"num_class_embeds": None}, colors, range(3)) is None
    assert set(spread_classes({"num_class_embeds": 2}, None, range(9))) == {"0", "1"}
