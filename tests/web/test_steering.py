"""What the page has a model draw: its classes, and how strongly they guide."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from test_session import PLANS, enlarger, pixel_aware, pyramid

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline
from pyrdiff.web.events import Level
from pyrdiff.web.session import Session
from pyrdiff.web.steering import class_names, is_guided


def with_classes() -> Session:
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(
        resolutions=(6, 8), block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        class_names=("cat", "dog"),
    )  # fmt: skip
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    return Session(PyramidalPipeline(unet, DDPMScheduler(100), plans=PLANS))


def test_classes_and_guidance_are_those_of_the_call():
    session = with_classes()
    assert class_names(session.pipeline) == ["cat", "dog"] and is_guided(session.pipeline)
    *events, result = session.generate(3, 5, "fast", classes=["dog", "cat"], guidance=2.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    said = dict(classes=["dog", "cat", "dog"], guidance_scale=2.5)
    expected = session.pipeline(3, plan="fast", generator=generators, **said).images
    assert [np.array_equal(*map(np.asarray, pair)) for pair in zip(result.images, expected, strict=True)] == [True] * 3
    levels = [event for event in events if isinstance(event, Level)]
    plan = session.pipeline.plan(plan="fast", guidance_scale=2.5)
    planned = plan.levels
    assert [level.calls for level in levels] == [level.network_calls for level in planned] == [4, 4]
    assert result.calls == plan.network_calls and result.nfe_eq == pytest.approx(plan.nfe_eq)
    *_, plain = session.generate(3, 5, "fast")
    assert not np.array_equal(np.asarray(plain.images[0]), np.asarray(result.images[0]))


def test_models_without_classes_are_told_nothing():
    for session in (pyramid(), pixel_aware(), enlarger()):
        assert class_names(session.pipeline) == [] and not is_guided(session.pipeline)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"classes": ["bird"]}, "Classes: got 'bird'; expected some of cat, dog."),
        ({"guidance": 2.0}, "Guidance: choose classes first"),
        ({"classes": ["cat"], "guidance": 9.0}, "Guidance: got 9.0; expected a number from 0 to 5."),
        ({"classes": ["cat"], "guidance": None}, "Guidance: got None"),
    ],
)
def test_classes_and_guidance_that_a_model_cannot_follow(arguments, said):
    with pytest.raises(ValueError, match=said):
        list(with_classes().generate(1, 0, "fast", **arguments))
