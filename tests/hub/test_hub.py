import json
from pathlib import Path

import pytest
import torch
import warm
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

import pyrdiff
from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, hub

ELSEWHERE = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
images = pipeline(2, num_inference_steps=4, refine_steps=2, output_type="pt", generator=generator).images
torch.save(images, sys.argv[2])
pipeline.save_pretrained(sys.argv[3])
"""


@pytest.fixture
def pipeline() -> PyramidalPipeline:
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(
        image_channels=1,
        resolutions=(4, 8),
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = PyramidalPipeline(unet, DDPMScheduler(), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline) -> torch.Tensor:
    arguments = dict(num_inference_steps=4, refine_steps=2, output_type="pt")
    return pipeline(2, generator=torch.Generator().manual_seed(0), **arguments).images


def same_pixels(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Weights at another place in memory may change the last bit of a convolution, never a pixel."""
    return torch.allclose(first, second, atol=1e-5) and torch.equal((first * 255).round(), (second * 255).round())


def test_a_process_without_pyrdiff_loads_an_export_and_gives_the_same_pixels(pipeline, tmp_path):
    folder = hub.export(pipeline, tmp_path / "model")
    arguments = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "again")]
    warm.run(ELSEWHERE, *arguments, without=["pyrdiff"], check=True, cwd=tmp_path)
    expected = sample(pipeline)
    assert same_pixels(torch.load(tmp_path / "images.pt"), expected)
    # What that process saved loads here too, and names no place it came from.
    assert same_pixels(sample(pyrdiff.load(tmp_path / "again")), expected)
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_no_code_runs_where_pyrdiff_is_installed(pipeline, tmp_path):
    folder = hub.export(pipeline, tmp_path / "model")
    canary = tmp_path / "canary"
    for source in folder.rglob("*.py"):
        source.write_text(f"open({str(canary)!r}, 'w')\n" + source.read_text())
    expected = sample(pipeline)
    for loaded in (pyrdiff.load(folder), PyramidalPipeline.from_pretrained(folder)):
        assert type(loaded) is PyramidalPipeline and type(loaded.unet) is CoordinateUNet2DModel
        loaded.set_progress_bar_config(disable=True)
        assert same_pixels(sample(loaded), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    assert not canary.exists()


def test_an_export_is_safetensors_config_code_and_card(pipeline, tmp_path):
    folder = hub.export(pipeline, tmp_path / "model", max_shard_size="10KB")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert {Path(name).suffix or name for name in names} == {".json", ".safetensors", ".py", ".md", "LICENSE"}
    assert {"pipeline_pyramidal.py", "unet/unet_coordinate.py", "README.md", "model_index.json"} <= set(names)
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_pyramidal", "PyramidalPipeline"]
    assert index["unet"] == ["unet_coordinate", "CoordinateUNet2DModel"]
    assert same_pixels(sample(pyrdiff.load(folder)), sample(pipeline))


def test_export_replaces_an_export_and_nothing_else(pipeline, tmp_path):
    folder = hub.export(pipeline, tmp_path / "model")
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    hub.export(pipeline, folder)
    assert torch.equal(pyrdiff.load(folder).unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="other.*expected a new, an empty or an earlier exported folder"):
        hub.export(pipeline, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_the_earlier_one(pipeline, tmp_path, monkeypatch):
    folder = hub.export(pipeline, tmp_path / "model")
    before = pyrdiff.load(folder).unet.conv_in.weight.clone()

    def torn(*_):
        raise RuntimeError("read back different")

    monkeypatch.setattr("pyrdiff.hub.folders._verify", torn)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    with pytest.raises(RuntimeError, match="read back different"):
        hub.export(pipeline, folder)
    assert torch.equal(pyrdiff.load(folder).unet.conv_in.weight, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_reads_back_different_is_refused(pipeline, tmp_path, monkeypatch):
    save = PyramidalPipeline.save_pretrained

    def damaged(self, folder, **arguments):
        save(self, folder, **arguments)
        self.unet.conv_in.weight.data.add_(1)

    monkeypatch.setattr(PyramidalPipeline, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match="unet.conv_in.weight was read back different"):
        hub.export(pipeline, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="expected a folder or a repository"):
        pyrdiff.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a folder nor a repository that can be read"):
        pyrdiff.load("nobody/nothing", local_files_only=True)
    with pytest.raises(ValueError, match="expected an exported pipeline, with model_index.json"):
        pyrdiff.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline.*PyramidalPipeline"):
        pyrdiff.load(tmp_path)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("unet/config.json", lambda config: config.update(use_cordinates=False), "unknown key 'use_cordinates'"),
        ("unet/config.json", lambda config: config.update(dropout=float("nan")), "NaN is not a value"),
        ("scheduler/scheduler_config.json", lambda config: config.update(bata_start=1), "unknown key 'bata_start'"),
        ("model_index.json", lambda config: config.update(vae=["diffusers", "AutoencoderKL"]), "unknown key 'vae'"),
        (
            "model_index.json",
            lambda config: config.update(unet=["os", "system"]),
            "expected a class of diffusers or of",
        ),
        ("model_index.json", lambda config: config.update(unet="UNet"), r"expected \[module, class\]"),
    ],
)
def test_load_names_the_file_and_the_key(pipeline, tmp_path, file, change, message):
    folder = hub.export(pipeline, tmp_path / "model")
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        pyrdiff.load(folder)
    assert (file.split("/")[0] if "expected" in message else file) in str(caught.value) or "unet" in str(caught.value)


def test_publishing_sends_the_whole_export_as_asked(pipeline, tmp_path, monkeypatch):
    sent = {}

    def create(repo_id, **arguments):
        return type("Repo", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, **arguments):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        sent.update(files=files, repo_id=repo_id, **arguments)

    monkeypatch.setattr("pyrdiff.parts.saving.create_repo", create)
    monkeypatch.setattr(PyramidalPipeline, "_upload_folder", upload)
    pipeline.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/faces", create_pr=True, variant="fp16")
    assert sent["repo_id"] == "me/faces" and sent["create_pr"] is True
    expected = {"model_index.json", "pipeline_pyramidal.py", "unet/unet_coordinate.py"}
    assert expected | {"unet/diffusion_pytorch_model.fp16.safetensors"} <= sent["files"]


def test_load_names_torn_weights(pipeline, tmp_path):
    folder = hub.export(pipeline, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model"):
        pyrdiff.load(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        pyrdiff.load(folder)
