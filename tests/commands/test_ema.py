"""pyrdiff ema: models with averages of other lengths, with a guide, and compared with images that were held out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image

import pyrdiff
from pyrdiff import hub
from pyrdiff.commands import ema, evaluate, sample
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.metrics import train_classifier
from pyrdiff.training.loop import train
from pyrdiff.training.snapshots import average, list_snapshots

ELSEWHERE = """
import sys, torch
from diffusers import DiffusionPipeline
folder, target = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
arguments = dict(num_inference_steps=4, refine_steps=2, output_type="pt", guidance_scale=2.0)
generator = torch.Generator().manual_seed(0)
torch.save(pipeline(classes=["dark", None], generator=generator, **arguments).images, target)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Gray images: 24 dark ones and 12 light ones, in a folder each."""
    folder = tmp_path_factory.mktemp("grays")
    generator = np.random.default_rng(0)
    for name, level, count in (("dark", 60, 24), ("light", 190, 12)):
        (folder / name).mkdir()
        for index in range(count):
            pixels = np.clip(level + generator.integers(-20, 20, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """The folder of a run of 64 steps that kept averages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = dict(
        train_data_dir=str(images), output_dir=str(folder), resolution=("4", "8"), image_channels=1, preset="tiny",
        block_out_channels=(8, 16, 32), train_batch_size=8, max_train_steps=64, learning_rate=3e-3, lr_warmup_steps=4,
        mixed_precision="no", save_images_steps=0, class_labels=True, keep_averages=True, level_share=(1, 1),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(METHOD, PyramidalSettings(**flags))
    return folder


@pytest.fixture(scope="module")
def classifier(images, tmp_path_factory) -> str:
    pixels = [np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))]
    labels = torch.tensor([0] * 24 + [1] * 12)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    train_classifier(torch.from_numpy(np.stack(pixels)), labels, epochs=3, batch_size=6).save(path)
    return str(path)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> Path:
    """What the command makes of it: two lengths, both with a guide."""
    folder = tmp_path_factory.mktemp("made")
    flags = ["--length", "0.05", "0.2", "--guide_at", "0.3", "--guide_length", "0.15"]
    result = ema.main([str(run), *flags, "--output", str(folder)])
    assert result["step"] == 64 and sorted(result["folders"]) == ["0.05", "0.2"]
    return folder


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def test_the_models_have_the_averages(run, made):
    assert [snapshot.step for snapshot in list_snapshots(run)] == [16, 32, 48, 64]
    trained = weights_of(pyrdiff.load(run / "pipeline").unet)
    for length in (0.05, 0.2):
        pipeline, expected = pyrdiff.load(made / f"{length:g}"), average(run, length, trained)
        guide = average(run, 0.15, trained, 19)
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(pipeline.unet).items())
        assert all(torch.equal(value, guide[name]) for name, value in weights_of(pipeline.guide).items())
        card = (made / f"{length:g}" / "README.md").read_text()
        assert f"| weights | average of length {length:g} up to step 64 |" in card
        assert "| guide | average of length 0.15 up to step 19 |" in card and "| classes | dark, light |" in card
    assert any(not torch.equal(expected[name], value) for name, value in trained.items())


def test_they_are_sound_and_give_the_same_pixels_without_pyrdiff(made, tmp_path):
    folder = made / "0.2"
    found = hub.check(folder)
    assert found.sound and found.loads_elsewhere, found.problems
    assert {"guide/unet_coordinate.py", "guide/diffusion_pytorch_model.safetensors"} <= set(found.files)
    warm.run(ELSEWHERE, str(folder), str(tmp_path / "images.pt"), without=["pyrdiff"], check=True, cwd=tmp_path)
    pipeline = pyrdiff.load(folder)
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=4, refine_steps=2, output_type="pt", guidance_scale=2.0)
    generator = torch.Generator().manual_seed(0)
    ours = pipeline(classes=["dark", None], generator=generator, **arguments).images
    theirs = torch.load(tmp_path / "images.pt")
    assert torch.allclose(ours, theirs, atol=1e-5) and torch.equal((255 * ours).round(), (255 * theirs).round())


def test_sample_guides_without_classes(made, tmp_path):
    flags = ["--model", str(made / "0.05"), "--plan", "fast", "--num_images", "2", "--guidance_scale", "2"]
    assert sample.main([*flags, "--output_dir", str(tmp_path / "a")])["counts"]["done"] == 2


def test_lengths_are_compared_with_images_held_out(run, images, classifier, tmp_path, capsys):
    flags = ["--length", "0.1", "0.25", "--reference", str(images), "--features", "classifier", "--weights", classifier]
    flags += ["--num_images", "32", "--plan", "fast", "--output", str(tmp_path / "out"), "--seed", "3"]
    result = ema.main([str(run / "pipeline"), *flags])
    judged = result["judged"]
    assert list(judged) == ["as trained", "0.1", "0.25"]
    assert len({found["distance"] for found in judged.values()}) == 3
    assert all(found["samples"] == 32 and found["plan"] == "fast" for found in judged.values())
    nearest = min(judged, key=lambda name: judged[name]["distance"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.endswith("nearest"))
    assert line.startswith(nearest)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--length", "0.3"], "--length=(0.3,): expected different numbers from 0.01 to 0.28"),
        (["--length", "0.1", "0.1"], "--length=(0.1, 0.1): expected different numbers"),
        (["--guide_at", "0"], "--guide_at=0.0: expected a share before --at"),
        (["--guide_at", "0.1"], "step=6: expected one from 16 up, the first that was kept"),
        (["--reference", "nowhere"], "--reference='nowhere': expected a folder of images"),
    ],
)
def test_what_is_refused(run, tmp_path, capsys, flags, said):
    with pytest.raises((SystemExit, ValueError)) as caught:
        ema.main([str(run), *flags, "--output", str(tmp_path / "out")])
    assert said in f"{caught.value} {capsys.readouterr().err}" and not (tmp_path / "out").exists()


def test_a_training_without_averages_is_refused(run, tmp_path):
    shutil.copytree(run / "pipeline", tmp_path / "run" / "pipeline")
    for place in ("run", "run/pipeline"):
        with pytest.raises(ValueError, match="expected the folder of a finished training with --keep_averages"):
            ema.main([str(tmp_path / place), "--output", str(tmp_path / "out")])


# Evaluations of a model with classes.


def evaluated(model: Path, reference: Path, classifier: str, *flags: str) -> dict:
    features = ["--features", "classifier", "--weights", classifier, "--num_images", "36", "--resamples", "0"]
    steps = ["--num_inference_steps", "4", "--refine_steps", "2"]
    return evaluate.main(["--model", str(model), "--reference", str(reference), *features, *steps, *flags])


def test_a_model_is_evaluated_by_class(run, images, classifier):
    results = evaluated(run / "pipeline", images, classifier, "--per_class")["results"]
    rows = {row["name"]: row for row in results}
    counts = {}
    for name in ("dark", "light"):
        row = next(row for key, row in rows.items() if key.endswith(f", {name}") and key.startswith("FD"))
        counts[name] = row["conventions"]["count"], row["conventions"]["count_real"]
    assert counts == {"dark": (23, 24), "light": (13, 12)}  # about twice as many, as in training
    assert len(results) == 3 * 4


def test_measured_images_are_of_the_classes_of_training(run):
    pipeline = pyrdiff.load(run / "pipeline")
    shares = [each["share"] for each in pipeline.config.colors["classes"]]
    assert shares == pytest.approx([2 / 3, 1 / 3], abs=1e-5)
    told = sample.classes_for(pipeline, range(300))["classes"]
    assert abs(told.count("dark") - 200) <= 2 and set(told) == {"dark", "light"}
    assert sample.classes_for(pyrdiff.load("noto-emoji"), range(3)) == {}


def test_one_class_of_another_name_is_refused_before_sampling(run, images, classifier, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "light").rename(tmp_path / "images" / "pale")
    with pytest.raises(ValueError, match="--per_class: only the generated images have the class 'light'"):
        evaluated(run / "pipeline", tmp_path / "images", classifier, "--per_class")
    with pytest.raises(ValueError, match="--per_class: 'light' has 2 images in --num_images"):
        evaluated(run / "pipeline", images, classifier, "--per_class", "--num_images", "9")


def test_generated_folders_are_compared_by_class(images, classifier):
    flags = ["--features", "classifier", "--weights", classifier, "--resamples", "0", "--metrics", "frechet_distance"]
    result = evaluate.main(["--generated", str(images), "--reference", str(images), "--per_class", *flags])
    assert len(result["results"]) == 3 and all(abs(row["value"]) < 1e-3 for row in result["results"])
