"""Runs that begin with the weights of a trained network: ours, a checkpoint's, or stock diffusion's."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import pyrdiff
from pyrdiff import plugins
from pyrdiff.training.checkpoints import load_checkpoint, save_checkpoint
from pyrdiff.training.loop import train
from pyrdiff.training.starting import open_start

ARCHITECTURE = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def stock_network(**changes) -> UNet2DModel:
    torch.manual_seed(3)
    return UNet2DModel(**{**ARCHITECTURE, "sample_size": 16, **changes}).eval()


def stock(folder: Path, scheduler=None, **changes) -> Path:
    """A folder as diffusers saves it."""
    DDPMPipeline(stock_network(**changes), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def run(method: str, flags: dict) -> Path:
    method = plugins.find(method)
    return train(method, method.settings(**flags))


@pytest.fixture
def barely(toy):
    """barely(**changes): flags of a run of a step that changes next to nothing."""
    return lambda **changes: toy(
        **{"max_train_steps": 1, "learning_rate": 1e-12, "block_out_channels": None, **changes}
    )


@pytest.fixture(scope="module")
def finished(toy) -> dict:
    """The flags of a finished run of ours."""
    flags = toy(max_train_steps=3)
    run("pddpm", flags)
    return flags


def output(network, side: int = 16) -> torch.Tensor:
    sample = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(sample, 500).sample


@pytest.mark.parametrize("kind", ["pipeline", "network", "ddim"])
def test_a_stock_network_becomes_a_pyramid(barely, tmp_path, kind):
    folder = stock(tmp_path / "stock")
    if kind == "network":
        folder = folder / "unet"
    if kind == "ddim":
        index = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(index.replace("DDPM", "DDIM"))
        DDIMScheduler().save_pretrained(folder / "scheduler")
    trained = pyrdiff.load(run("pddpm", barely(init_from=str(folder))))
    assert trained.unet.config.resolutions == [8, 16] and trained.unet.config.use_coordinates
    assert tuple(trained.unet.config.block_out_channels) == (8, 16)
    assert (output(trained.unet) - output(stock_network())).abs().max() < 1e-5
    assert output(trained.unet, 8).abs().max() > 0
    trained(1, plan="fast")


def test_names_that_diffusers_gave_before_are_understood(tmp_path):
    folder = stock(tmp_path / "stock")
    path = folder / "unet" / WEIGHTS
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for key, value in load_file(path).items():
        for new, before in old.items():
            key = key.replace(new, before) if ".attentions." in key else key
        tensors[key] = value
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    start = open_start(str(folder), "pddpm")
    method = plugins.find("pddpm")
    network = start.network(method, method.settings(train_data_dir="x", resolution=("8", "16")))
    start.copy_into(network)
    assert (output(network) - output(stock_network())).abs().max() < 1e-5
    assert (output(pyrdiff.load(folder).unet) - output(stock_network())).abs().max() < 1e-6


@pytest.mark.parametrize("place", ["run", "pipeline", "checkpoint"])
def test_a_finished_model_learns_on(barely, finished, tmp_path, place):
    folder = Path(finished["output_dir"])
    start = folder / {"run": "", "pipeline": "pipeline", "checkpoint": "checkpoint-3"}[place]
    more = np.random.default_rng(9).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "more.npy", more)
    flags = barely(init_from=str(start), train_data_dir=str(tmp_path / "more.npy"), preset="mini")
    trained = pyrdiff.load(run("pddpm", flags))
    before = pyrdiff.load(folder / "pipeline")
    assert (output(trained.unet) - output(before.unet)).abs().max() < 1e-5
    log = [json.loads(line) for line in (Path(flags["output_dir"]) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1]
    with pytest.raises(ValueError, match="start=null|has start="):
        run("pddpm", {**flags, "init_from": None, "preset": "tiny", "block_out_channels": [8, 16, 32]})


def test_a_model_that_comes_with_pyrdiff_can_be_the_start(barely):
    flags = barely(init_from="noto-emoji", prediction_type="v_prediction", resolution=["16", "32"])
    trained = pyrdiff.load(run("pddpm", flags))
    before = pyrdiff.load("noto-emoji")
    assert (output(trained.unet) - output(before.unet)).abs().max() < 1e-4


def test_a_stock_pipeline_is_sampled_as_it_is(tmp_path):
    pipeline = pyrdiff.load(stock(tmp_path / "stock"))
    assert type(pipeline) is pyrdiff.PyramidalPipeline
    plan = {"num_inference_steps": 5, "scheduler": ["DDIMScheduler", {}]}
    ours = pipeline(2, plan=plan, generator=torch.Generator().manual_seed(1), output_type="np").images
    theirs = DDPMPipeline(stock_network(), DDIMScheduler())
    assert ours.shape == (2, 16, 16, 3)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sample, scheduler = noise, theirs.scheduler
    scheduler.set_timesteps(5)
    for time in scheduler.timesteps:
        with torch.no_grad():
            sample = scheduler.step(theirs.unet(sample, time).sample, time, sample).prev_sample
    assert np.abs(ours - (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-5


def damaged(tmp_path, how: str) -> str:
    """A stock folder that something is wrong with."""
    options = {
        "gray": dict(in_channels=1, out_channels=1),
        "labels": dict(num_class_embeds=4),
        "variance": dict(out_channels=6),
        "v": dict(scheduler=DDPMScheduler(prediction_type="v_prediction")),
        "cosine": dict(scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    }.get(how, {})
    folder = stock(tmp_path / how, **options)
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    if how == "nan":
        tensors["conv_out.bias"][0] = float("nan")
    if how == "lacks":
        del tensors["conv_out.bias"]
    if how == "shape":
        tensors["conv_out.bias"] = torch.zeros(4)
    save_file(tensors, path, metadata={"format": "pt"})
    if how == "pickle":
        path.rename(path.with_name("diffusion_pytorch_model.bin"))
    if how == "no model":
        shutil.rmtree(folder / "unet")
        (folder / "model_index.json").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("gray", "images of 1 channels; expected image_channels=1"),
        ("labels", "takes class labels"),
        ("variance", "it predicts 6 channels of 3"),
        ("v", "it was trained with prediction_type='v_prediction', this run has 'epsilon'"),
        ("cosine", "it was trained with beta_schedule='squaredcos_cap_v2', this run has 'linear'"),
        ("nan", "conv_out.bias is not finite"),
        ("lacks", "lacks 1 tensors .* such as 'conv_out.bias'"),
        ("shape", r"conv_out.bias has the shape \(4,\); by config.json it has \(3,\)"),
        ("pickle", "diffusion_pytorch_model.bin: a pickle.*UNet2DModel.from_pretrained"),
        ("no model", r"expected a saved pipeline \(model_index.json\) or network \(config.json\)"),
    ],
)
def test_what_cannot_be_begun_with(barely, tmp_path, how, named):
    flags = barely(init_from=damaged(tmp_path, how))
    with pytest.raises(ValueError) as caught:
        run("pddpm", flags)
    message = str(caught.value)
    assert message.startswith("init_from=") and "\n" not in message
    assert re.search(named, message), message
    assert not Path(flags["output_dir"]).exists()


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("sr", {}, "a UNet2DModel; expected a ResidualSRUNet2DModel, as sr trains"),
        ("pixel_aware", {}, "expected none; pixel_aware trains two networks"),
        ("pddpm", {"init_from": "nowhere"}, "init_from='nowhere': .*expected a folder or a repository"),
        ("pddpm", {"block_out_channels": [8, 16, 32]}, r"block_out_channels=\(8, 16\); expected none beside it"),
        ("pddpm", {"resolution": ["9", "16"]}, "resolution 9x9: expected sides that are multiples of 2"),
    ],
)
def test_flags_that_do_not_go_with_it(barely, tmp_path, method, changes, named):
    flags = barely(**{"init_from": str(stock(tmp_path / "stock")), **changes})
    if method != "pddpm":
        flags.update(resolution=["16"], preset="tiny")
    if method == "pixel_aware":
        del flags["block_out_channels"]
    with pytest.raises(ValueError, match=named):
        run(method, flags)


def test_another_network_of_the_same_class_is_refused_by_its_config(barely):
    flags = barely(resolution=["16"], train_batch_size=2)
    folder = run("sr", {**flags, "preset": "tiny"})
    before = pyrdiff.load(folder)
    again = barely(resolution=["16"], train_batch_size=2, init_from=str(folder), preset="tiny", scale_factor=[2])
    scale = before.scheduler.config.residual_scale
    with pytest.raises(ValueError, match=f"it was trained with residual_scale={scale}, this run has"):
        run("sr", again)
    trained = pyrdiff.load(run("sr", {**again, "residual_scale": scale}))
    for one, other in zip(trained.unet.parameters(), before.unet.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match="low_res_injection is conv_stack there and direct here"):
        run("sr", barely(resolution=["16"], init_from=str(folder), preset="tiny", low_res_injection="direct"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors, state: tensors["ema"]["conv_in.bias"].fill_(float("nan")), "conv_in.bias is not finite"),
        (lambda tensors, state: tensors["model"].pop("conv_in.bias") + tensors["ema"].pop("conv_in.bias"), "it lacks"),
        (lambda tensors, state: state["identity"]["network"].update(block_out_channels="x"), "init_from="),
        (lambda tensors, state: state["identity"]["network"].pop("block_out_channels"), "init_from="),
        (lambda tensors, state: state.update(identity=[]), "no checkpoint that can be read"),
        (lambda tensors, state: state["identity"].update(method="sr"), "a checkpoint of 'sr'; expected one of 'pddpm'"),
    ],
)
def test_a_checkpoint_that_says_strange_things_is_no_start(barely, finished, tmp_path, change, named):
    tensors, state = load_checkpoint(Path(finished["output_dir"]) / "checkpoint-3")
    change(tensors, state)
    place = save_checkpoint(tmp_path, 3, tensors, state)
    flags = barely(init_from=str(place))
    with pytest.raises(ValueError) as caught:
        run("pddpm", flags)
    assert str(caught.value).startswith("init_from=") and re.search(named, str(caught.value)), caught.value
    assert not Path(flags["output_dir"]).exists()
