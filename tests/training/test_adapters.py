"""Adapters (LoRA): trained over a base, kept in files of their own, loaded, weighted, added up and merged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import pyrdiff
from pyrdiff import hub, plugins
from pyrdiff.commands import merge, sample
from pyrdiff.hub.adapters import BASE, CONFIG, WEIGHTS, inject
from pyrdiff.training.checkpoints import load_checkpoint, newest_checkpoint
from pyrdiff.training.learner import trained_parameters
from pyrdiff.training.loop import train

peft = pytest.importorskip("peft", reason="adapters need peft: pip install 'pyrdiff[lora]'")


def run(method: str, flags: dict) -> Path:
    method = plugins.find(method)
    return train(method, method.settings(**flags))


@pytest.fixture(scope="module")
def base(toy) -> Path:
    """A finished pyramid."""
    return run("pddpm", toy(max_train_steps=3))


@pytest.fixture(scope="module")
def over(toy, base, tmp_path_factory):
    """over(**changes): flags of an adapter's run over it, on other images."""
    array = tmp_path_factory.mktemp("other") / "other.npy"
    np.save(array, np.random.default_rng(9).integers(128, 256, (24, 16, 16, 3), dtype=np.uint8))

    def flags(**changes) -> dict:
        own = {"train_data_dir": str(array), "init_from": str(base), "lora_rank": 2, "learning_rate": 1e-2}
        return toy(**{**own, "block_out_channels": None, "max_train_steps": 6, **changes})

    return flags


@pytest.fixture(scope="module")
def adapter(over) -> Path:
    return run("pddpm", over())


@pytest.fixture(scope="module")
def second(over) -> Path:
    return run("pddpm", over(lora_rank=3, seed=8))


def output(pipeline, side: int = 16) -> torch.Tensor:
    sample = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    with torch.no_grad():
        return pipeline.unet(sample, 500).sample


def test_a_folder_holds_the_adapter_alone(base, adapter, over):
    assert adapter.name == "adapter" and not (adapter.parent / "pipeline").exists()
    assert sorted(path.name for path in adapter.iterdir()) == sorted(["README.md", WEIGHTS, CONFIG, BASE])
    tensors = load_file(adapter / WEIGHTS)
    assert all(".lora_" in key for key in tensors) and not any("conv_in" in key for key in tensors)
    config, known = (json.loads((adapter / name).read_text()) for name in (CONFIG, BASE))
    assert config["base_model_name_or_path"] == known["name"] == base.parent.name and config["r"] == 2
    card = (adapter / "README.md").read_text()
    assert f"over the model `{base.parent.name}`" in card and "lora" in card
    groups, _ = load_checkpoint(newest_checkpoint(adapter.parent))
    for name in ("model", "ema"):
        assert groups[name] and all(".lora_" in key for key in groups[name])
    kept = sum(value.numel() for value in groups["model"].values())
    whole = sum(value.numel() for value in pyrdiff.load(base).unet.parameters())
    assert kept < whole / 4 and len(groups["optimizer"]) == 3 * len(groups["model"])


def test_the_base_is_as_it_was_and_the_adapter_changes_it(base, adapter):
    before = output(pyrdiff.load(base))
    with_it = output(pyrdiff.load(base, adapters=[str(adapter)]))
    assert (with_it - before).abs().max() > 1e-3
    assert torch.equal(output(pyrdiff.load(base)), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_weight_of_zero_is_the_base_to_the_bit(base, adapter, merged):
    expected, state = pyrdiff.load(base), torch.get_rng_state()
    pipeline = pyrdiff.load(base, adapters={str(adapter): 0.0})
    assert torch.equal(torch.get_rng_state(), state)
    if merged:
        hub.merge_adapters(pipeline)
    assert torch.equal(output(pipeline), output(expected))
    assert pipeline.config.colors == expected.config.colors


def test_merged_is_loaded(base, adapter, second, tmp_path):
    weights = {str(adapter): 0.7, str(second): -0.4}
    exact = pyrdiff.load(base, adapters=weights, dtype=torch.float64)
    expected = output(exact)
    hub.merge_adapters(exact)
    assert (output(exact) - expected).abs().max() < 1e-12
    pipeline = pyrdiff.load(base, adapters=weights)
    with pytest.raises(ValueError, match="unet: expected it without adapters.*merge_adapters"):
        pipeline.save_pretrained(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    hub.merge_adapters(pipeline)
    folder = hub.export(pipeline, tmp_path / "merged")
    assert (output(pyrdiff.load(folder)) - expected).abs().max() < 1e-5
    assert hub.check(folder).sound
    again = pyrdiff.load(folder, adapters={str(adapter): -0.7, str(second): 0.4})  # over the merged one: taken out
    assert (output(again) - output(pyrdiff.load(base))).abs().max() < 1e-5


def test_two_adapters_add_up(base, adapter, second):
    def change(adapters) -> dict[str, torch.Tensor]:
        pipeline = pyrdiff.load(base, adapters=adapters)
        hub.merge_adapters(pipeline)
        before = pyrdiff.load(base).unet.state_dict()
        return {key: value - before[key] for key, value in pipeline.unet.state_dict().items()}

    one, other = change({adapter.parent: 0.5}), change({second.parent: 2.0})
    both = change({adapter.parent: 0.5, second.parent: 2.0})
    assert max(value.abs().max() for value in one.values()) > 1e-4
    for key, value in both.items():
        torch.testing.assert_close(value, one[key] + other[key], atol=1e-6, rtol=1e-4)
    rank = torch.linalg.matrix_rank(one["conv_out.weight"].flatten(1).double(), rtol=1e-3)
    assert rank == 2


def test_weights_are_changed_by_diffusers_own_calls(base, adapter):
    pipeline = pyrdiff.load(base, adapters={str(adapter): 1.0})
    (name,) = pipeline.unet.peft_config
    expected = output(pyrdiff.load(base, adapters={str(adapter): 0.3}))
    pipeline.unet.set_adapters([name], [0.3])
    torch.testing.assert_close(output(pipeline), expected)
    pipeline.unet.disable_lora()
    assert torch.equal(output(pipeline), output(pyrdiff.load(base)))


def test_diffusers_and_peft_load_what_was_saved(base, adapter):
    expected = output(pyrdiff.load(base, adapters=[str(adapter)]))
    pipeline = pyrdiff.load(base)
    pipeline.unet.load_lora_adapter(str(adapter), prefix=None, use_safetensors=True)
    torch.testing.assert_close(output(pipeline), expected)
    pipeline = pyrdiff.load(base)
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(adapter), pipeline.unet)
    peft.set_peft_model_state_dict(pipeline.unet, load_file(adapter / WEIGHTS))
    torch.testing.assert_close(output(pipeline), expected)


def test_the_command_line_samples_and_merges(base, adapter, second, tmp_path):
    given = ["--adapter", f"{adapter.parent}:0.7", str(second)]
    one_image = ["--num_images", "1", "--plan", "fast", "--output"]

    def sampled(name: str, *flags: str) -> np.ndarray:
        report = sample.main([*flags, *one_image, str(tmp_path / name)])
        assert report["counts"]["done"] == 1
        return np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int)

    found = merge.main([str(base), *given, "--output", str(tmp_path / "merged")])
    assert found["adapters"] == ["run:0.7", "run:1"]
    with_them, merged, without = (
        sampled("a", str(base), *given),
        sampled("b", found["pipeline"]),
        sampled("c", str(base)),
    )
    assert np.abs(with_them - merged).max() <= 1 < np.abs(with_them - without).max()
    with pytest.raises(ValueError, match="holds 1 images of other models, settings or origin|made by"):
        sample.main([str(base), "--adapter", str(second), *one_image, str(tmp_path / "a")])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert (
        "with adapters merged into it" in card and "| adapters | run:0.7, run:1 |" in card and str(tmp_path) not in card
    )


def test_adapters_as_users_write_them():
    texts = ["a", "runs/b:0.5", "c:-1", "x:y", "d:1e-2"]
    assert hub.parse_adapters(texts) == {"a": 1.0, "runs/b": 0.5, "c": -1.0, "x:y": 1.0, "d": 0.01}


def test_an_adapter_of_rank_r_fits_a_change_of_rank_r():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False))
    change = torch.randn(10, 3) @ torch.randn(3, 12)
    wanted = network[0].weight.detach() + change
    inject(network, rank=3)
    before = network[0].base_layer.weight.clone()
    optimizer = torch.optim.LBFGS(trained_parameters(network).values(), max_iter=500, line_search_fn="strong_wolfe")
    images = torch.randn(64, 12)

    def loss():
        optimizer.zero_grad()
        value = (network(images) - images @ wanted.T).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.equal(network[0].base_layer.weight, before)
    found = network[0].get_delta_weight("default").detach()
    assert (found - change).abs().max() < 1e-3 * change.abs().max()


def test_a_killed_run_goes_on_to_the_bit(over):
    expected = load_file(run("pddpm", over(max_train_steps=6)) / WEIGHTS)
    flags = over(max_train_steps=6, checkpointing_steps=2)
    code = (
        "import json, os, signal, sys\n"
        "from pyrdiff import plugins\n"
        "from pyrdiff.training import loop\n"
        "method = plugins.find('pddpm')\n"
        "run = loop.prepare(method, method.settings(**json.loads(sys.argv[1])))\n"
        "step = run.optimise\n"
        "run.optimise = lambda: os.kill(os.getpid(), signal.SIGKILL) if run.step == 5 else step()\n"
        "run.fit()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, json.dumps(flags)], env={**os.environ}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest_checkpoint(Path(flags["output_dir"])).name == "checkpoint-4"
    found = load_file(run("pddpm", flags) / WEIGHTS)
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="has lora_rank=2, this run has 4; expected the same"):
        run("pddpm", {**flags, "lora_rank": 4})


def test_images_start_from_the_colours_of_both(base, adapter):
    of_base, of_adapter = pyrdiff.load(base).config.colors, json.loads((adapter / BASE).read_text())["colors"]
    assert np.abs(np.subtract(of_base["mean"], of_adapter["mean"])).min() > 0.3
    for weight, share in ((1.0, 1.0), (0.25, 0.25), (2.0, 1.0), (-1.0, 0.0)):
        mixed = pyrdiff.load(base, adapters={str(adapter): weight}).config.colors
        for key in ("mean", "covariance"):
            expected = (1 - share) * np.array(of_base[key]) + share * np.array(of_adapter[key])
            np.testing.assert_allclose(mixed[key], expected, atol=1e-7)


def test_networks_that_enlarge_take_adapters(toy):
    flags = toy(resolution=["16"], train_batch_size=2, preset="tiny", max_train_steps=2, block_out_channels=None)
    base = run("sr", flags)
    scale = pyrdiff.load(base).scheduler.config.residual_scale
    adapter = run("sr", {**flags, "output_dir": flags["output_dir"] + "_adapter", "init_from": str(base),
                         "lora_rank": 2, "residual_scale": scale, "learning_rate": 1e-2})  # fmt: skip
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def larger(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipeline(image, scale_factor=4, num_inference_steps=2, generator=generator, output_type="pt").images

    before, after = larger(pyrdiff.load(base)), larger(pyrdiff.load(base, adapters=[adapter]))
    assert (before - after).abs().max() > 1e-4
    assert torch.equal(larger(pyrdiff.load(base, adapters={str(adapter): 0})), before)


def test_a_stock_network_takes_the_adapter_of_its_training(toy, tmp_path):
    torch.manual_seed(3)
    network = UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    flags = toy(init_from=str(tmp_path / "stock"), lora_rank=2, resolution=["16"], block_out_channels=None)
    adapter = run("pddpm", {**flags, "max_train_steps": 2, "learning_rate": 1e-2})
    pipeline = pyrdiff.load(tmp_path / "stock", adapters=[adapter])
    assert type(pipeline.unet) is UNet2DModel
    before = output(pyrdiff.load(tmp_path / "stock"))
    assert (output(pipeline) - before).abs().max() > 1e-3
    hub.merge_adapters(pipeline)
    hub.export(pipeline, tmp_path / "merged")


def damaged(adapter: Path, folder: Path, how: str) -> str:
    """A copy of an adapter that something is wrong with."""
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / WEIGHTS)
    first = min(tensors)
    change = {
        "shape": lambda: tensors.update({first: tensors[first][..., :-1].contiguous()}),
        "unknown": lambda: tensors.update({"down_blocks.9.conv.lora_A.weight": torch.zeros(2, 4)}),
        "alone": lambda: tensors.pop(first),
        "nan": lambda: tensors[first].fill_(float("nan")),
    }.get(how)
    if change is not None:
        change()
        save_file(tensors, folder / WEIGHTS)
    config, known = json.loads((folder / CONFIG).read_text()), json.loads((folder / BASE).read_text())
    config |= {"rank": {"r": 10**9}, "dora": {"use_dora": True}, "alpha": {"lora_alpha": "x"}}.get(how, {})
    known |= {"other": {"digest": "0" * 64}, "colors": {"colors": {"mean": [0]}}, "no name": {"name": 3}}.get(how, {})
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / BASE).write_text(json.dumps(known))
    if how == "no weights":
        (folder / WEIGHTS).unlink()
    if how == "text":
        (folder / WEIGHTS).write_text("no tensors")
    return str(folder)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("shape", r"conv_out.lora_A.weight has the shape .*; for this network it has .*was trained over 'run'"),
        ("unknown", "'down_blocks.9.conv.lora_A.weight' is for a layer that this network has not: .*over 'run'"),
        ("alone", "has 'conv_out.lora_A.weight' alone|lora_A.weight and lora_B.weight of each layer"),
        ("nan", "conv_out.lora_A.weight is not finite"),
        ("rank", "r=1000000000, lora_alpha=2; expected numbers"),
        ("alpha", "lora_alpha='x'; expected numbers"),
        ("dora", "expected peft_type LORA without bias and use_dora"),
        ("other", "was trained over 'run', of other weights than this base"),
        ("colors", r"colors=.*expected the mean \[3\]"),
        ("no name", "expected the name and digest of a base"),
        ("no weights", f"has no {WEIGHTS}"),
        ("text", "expected safetensors"),
    ],
)
def test_what_is_no_adapter_for_this_base(base, adapter, tmp_path, how, named):
    place = damaged(adapter, tmp_path / "adapter_of_someone", how)
    with pytest.raises(ValueError, match=named) as caught:
        pyrdiff.load(base, adapters=[place])
    assert str(caught.value).startswith(f"adapter {place!r}: ") and "\n" not in str(caught.value)


def test_weights_that_are_none(base, adapter):
    with pytest.raises(ValueError, match="has the weight nan; expected a number"):
        pyrdiff.load(base, adapters={str(adapter): float("nan")})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_from": None}, "init_from=None: expected the model that the adapter is for, with lora_rank"),
        ({"lora_rank": 0}, "lora_rank=0: expected 1 or more"),
        ({"push_to_hub": True}, "push_to_hub=True: expected False with lora_rank"),
        ({"resolution": ["8"]}, r"resolution: the network of init_from=.* was trained with \[8, 16\], this run has"),
        ({"held_out_dir": "glyphs", "tune_minutes": 1.0}, "tune_minutes=1.0: expected none with lora_rank"),
    ],
)
def test_flags_that_do_not_go_with_an_adapter(over, changes, named):
    flags = over(**changes)
    with pytest.raises(ValueError, match=named):
        run("pddpm", flags)
    assert not Path(flags["output_dir"]).exists()


def test_a_checkpoint_of_an_adapter_is_no_start(adapter, over):
    flags = over(init_from=str(newest_checkpoint(adapter.parent)))
    with pytest.raises(ValueError, match="init_from=.*: a checkpoint of an adapter alone; expected one of a whole"):
        run("pddpm", flags)


def test_without_peft_a_line_says_how_to_get_it(base, adapter, over, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    flags = over()
    for call in (lambda: pyrdiff.load(base, adapters=[adapter]), lambda: run("pddpm", flags)):
        with pytest.raises(ImportError, match=r"^adapters need peft: pip install 'pyrdiff\[lora\]'"):
            call()
    assert not Path(flags["output_dir"]).exists()
