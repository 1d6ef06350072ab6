"""Trainings of images with classes: what the network learns of them, what a folder of such a model can do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

import pyrdiff
from pyrdiff.commands import sample
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.loop import DeviceBatch, train
from pyrdiff.training.losses import Draws

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


def run(flags: dict) -> Path:
    return train(METHOD, PyramidalSettings(**flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six plain images of each of two colours."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir()
        for index in range(6):
            shade = tuple(int(value) for value in np.clip(color + generator.integers(-15, 15, 3), 0, 255))
            Image.new("RGB", (8, 8), shade).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def flags(toy, folder) -> dict:
    """The flags of a run that was done, of the two colours."""
    values = toy(
        train_data_dir=str(folder),
        resolution=["4", "8"],
        class_labels=True,
        train_batch_size=16,
        max_train_steps=80,
        learning_rate=3e-3,
        level_share=[1, 1],
        ema_max_decay=0.9,
        prediction_type="sample",  # learns what is plain soonest
        save_images_steps=80,
        eval_batch_size=4,
    )
    run(values)
    return values


@pytest.fixture(scope="module")
def model(flags) -> Path:
    return Path(flags["output_dir"]) / "pipeline"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def names_of(images: np.ndarray) -> list[str]:
    """The nearest colour of each image [B, H, W, C] in [0, 1]."""
    means = 255 * images.mean((1, 2))
    return [min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum()) for mean in means]


def test_a_few_steps_tell_the_classes_apart(model):
    pipeline = pyrdiff.load(model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.class_names == ["blue", "red"]
    wanted, images = ["red", "blue"] * 8, {}
    for scale in (1.0, 2.0):
        arguments = dict(output_type="np", num_inference_steps=10, refine_steps=4, generator=seeded())
        images[scale] = pipeline(classes=wanted, guidance_scale=scale, **arguments).images
        assert names_of(images[scale]) == wanted
    red, blue = ({scale: each[k::2].mean((0, 1, 2)) for scale, each in images.items()} for k in (0, 1))
    differences = [(red[scale] - blue[scale])[0] + (blue[scale] - red[scale])[2] for scale in images]
    assert differences[1] > differences[0] > 0.5, "guidance makes them more different"


def test_plans_start_in_the_colours_of_the_class(model):
    pipeline = pyrdiff.load(model)
    found = [255 * (np.array(each["mean"]) + 1) / 2 for each in pipeline.config.colors["classes"]]
    assert np.abs(np.array(found) - [COLORS["blue"], COLORS["red"]]).max() < 15
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.forward = lambda sample, *_, **__: (torch.zeros_like(sample),)  # all that is seen is the start
    start = dict(resolutions=[4], spacing=[[20]], start_strength=0.02, scheduler=["DPMSolverMultistepScheduler", {}])
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    images = pipeline(classes=["red", "blue", "red"], plan=start, output_type="np", generator=seeded()).images
    assert names_of(images) == ["red", "blue", "red"]
    anything = pipeline(40, plan=start, output_type="np", generator=seeded()).images
    assert anything.mean((1, 2))[:, 0].std() > 2 * images[[0, 2]].mean((1, 2))[:, 0].std()


def test_a_folder_with_classes_loads_without_pyrdiff(model):
    ours, theirs = pyrdiff.load(model), DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
    assert type(theirs).__module__.startswith("diffusers_modules")
    images = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        arguments = dict(plan="fast", classes=["red", None], guidance_scale=2.0, output_type="pt")
        images.append(pipeline(**arguments, generator=seeded()).images)
    assert (images[0] - images[1]).abs().max() < 1e-6


def test_the_card_lists_the_classes(model):
    card = (model / "README.md").read_text()
    assert "| classes | blue, red |" in card
    assert "pipeline(classes=['blue', 'red'], guidance_scale=2.0)" in card


def test_previews_show_the_classes_in_turn(flags):
    grid = Image.open(Path(flags["output_dir"]) / "samples" / "step-0000080.png").convert("RGB")
    pixels = np.asarray(grid)[12:20]  # the upper level, below four of the lower
    cells = [pixels[:, 2 + 10 * k : 10 + 10 * k] for k in range(4)]
    assert names_of(np.stack(cells) / 255) == ["blue", "red", "blue", "red"]


def test_a_run_goes_on_only_with_the_same_classes(flags, folder, tmp_path):
    renamed = tmp_path / "images"
    for name, other in (("red", "blue"), ("blue", "red")):
        (renamed / other).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (renamed / other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="is of other images, .* with other pixels or classes"):
        run({**flags, "train_data_dir": str(renamed)})
    with pytest.raises(ValueError, match="has network=.*class_names"):
        run({**flags, "class_labels": False})


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_share_that_is_not_told(share):
    seen = []

    def network(noisy, timesteps, coordinates, class_labels, return_dict):
        seen.append(class_labels)
        return (noisy,)

    network.modules = lambda: iter(())
    network.config = pyrdiff.CoordinateUNet2DModel.from_preset("tiny", class_names=("a", "b")).config
    settings = PyramidalSettings(train_data_dir="x", class_labels=True, label_dropout=share)
    labels = torch.tensor([0, 1]).repeat(500)
    for index in range(4):
        batch = DeviceBatch(torch.zeros(1000, 1, 1, 2), None, 0, labels)
        METHOD.loss(network, METHOD.scheduler(settings, None), settings, batch, Draws(index, device="cpu"))
    told = torch.stack(seen)
    assert ((told == labels) | (told == 2)).all()
    assert (told == 2).float().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_shares_that_are_refused(share):
    with pytest.raises(ValueError, match="label_dropout=.*expected a number in"):
        PyramidalSettings(train_data_dir="x", label_dropout=share)


def test_a_class_without_images_is_refused_before_work(toy, tmp_path):
    (tmp_path / "images" / "empty").mkdir(parents=True)
    (tmp_path / "images" / "full").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "full" / "0.png")
    flags = toy(train_data_dir=str(tmp_path / "images"), class_labels=True)
    with pytest.raises(ValueError, match="class_labels: .*empty' has no image"):
        run(flags)
    assert not Path(flags["output_dir"]).exists()


# Runs that begin with a trained network.


def output(network, side: int = 8, **labels) -> torch.Tensor:
    image = torch.randn(2, 3, side, side, generator=seeded())
    with torch.no_grad():
        return network.eval()(image, 500, **labels).sample


@pytest.fixture
def barely(toy, flags):
    """barely(**changes): flags of a run of a step that changes next to nothing."""
    same = {name: flags[name] for name in ("train_data_dir", "resolution", "class_labels")}
    return lambda **changes: toy(
        **{**same, "max_train_steps": 1, "learning_rate": 1e-12, "block_out_channels": None, **changes}
    )


@pytest.mark.parametrize("start", ["ours", "stock", "checkpoint"])
def test_a_network_without_classes_learns_some(barely, tmp_path, start):
    if start == "stock":
        torch.manual_seed(3)
        blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        before = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
        DDPMPipeline(before, DDPMScheduler()).save_pretrained(tmp_path / "stock")
        place = tmp_path / "stock"
    else:
        flags = barely(class_labels=False, block_out_channels=[8, 16, 32])
        before = pyrdiff.load(run(flags)).unet
        place = Path(flags["output_dir"]) / ("checkpoint-1" if start == "checkpoint" else "")
    after = pyrdiff.load(run(barely(init_from=str(place)))).unet
    assert after.config.class_names == ["blue", "red"] and after.config.num_class_embeds == 3
    for label in range(3):
        told = output(after, class_labels=torch.tensor([label, label]))
        assert (told - output(before)).abs().max() < 1e-5, "until it has learnt them"


def test_a_network_with_classes_goes_on_with_the_same(barely, model, folder, tmp_path):
    same = {"init_from": str(model), "prediction_type": "sample"}
    before, after = pyrdiff.load(model).unet, pyrdiff.load(run(barely(**same))).unet
    labels = torch.tensor([0, 2])
    assert (output(after, class_labels=labels) - output(before, class_labels=labels)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="a network that takes class labels; expected one without, or class_labels"):
        run(barely(**same, class_labels=False))
    other = tmp_path / "images"
    for name in ("red", "green"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / name / "0.png")
    with pytest.raises(
        ValueError, match=re.escape("class_names=['blue', 'red']; expected those of the images, ['green', 'red']")
    ):
        run(barely(**same, train_data_dir=str(other)))


# The command line.


def test_sample_draws_classes_in_turn(model, tmp_path):
    command = ["--model", str(model), "--output_dir", str(tmp_path), "--batch_size", "3", "--plan", "fast"]
    command += ["--classes", "red", "blue", "--guidance_scale", "1.5", "--seed", "1"]
    report = sample.main([*command, "--num_images", "5"])
    wanted = ["blue", "red", "blue", "red", "blue"]
    assert [file["class"] for file in report["files"]] == wanted
    images = [np.asarray(Image.open(tmp_path / file["file"])) / 255 for file in report["files"]]
    assert names_of(np.stack(images)) == wanted
    more = sample.main([*command, "--num_images", "6", "--skip_existing"])
    assert more["counts"] == {"done": 1, "skipped": 5, "not reached": 0}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--classes", "green"], "classes='green': expected one of blue, red, or a number from 0 to 1"),
        (["--classes", "red", "7"], "classes='7': expected one of blue, red"),
        (["--guidance_scale", "2"], "guidance without --classes: expected both"),
        (["--classes", "red", "--guidance_scale", "-1"], "guidance_scale=-1.0: expected a number from 0 up"),
    ],
)
def test_sample_refuses_before_anything_is_written(model, tmp_path, arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        sample.main(["--model", str(model), "--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_the_settings_say_it(flags):
    settings = json.loads((Path(flags["output_dir"]) / "settings.json").read_text())
    assert settings["class_labels"] is True and settings["label_dropout"] == 0.1
