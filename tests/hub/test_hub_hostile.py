"""Folders and repositories made by someone else (R8): no code of theirs runs, no file of theirs leaves its folder."""

import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import pyrdiff
from pyrdiff import PyramidalPipeline, hub

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
WRITES = "open({!r}, 'w').write('ran')\n"


@pytest.fixture
def canary(tmp_path) -> Path:
    """What no hostile folder may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def folder(exports, tmp_path) -> Path:
    return Path(shutil.copytree(exports["pyramidal"], tmp_path / "theirs"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bomb(canary: Path) -> bytes:
    """A pickle that writes the canary."""

    class Bomb:
        def __reduce__(self):
            return exec, (WRITES.format(str(canary)),)

    return pickle.dumps(Bomb())


def test_the_canaries_would_sing(tmp_path):
    """What the other tests rely on: this code and this pickle write, once they run."""
    for number, run in enumerate((lambda path: exec(WRITES.format(str(path))), lambda path: pickle.loads(bomb(path)))):
        run(tmp_path / str(number))
        assert (tmp_path / str(number)).read_text() == "ran"


# Code.

CODE = (
    "pipeline_pyramidal.py", "unet/unet_coordinate.py", "__init__.py", "unet/__init__.py", "scheduler/evil.py",
    "torch.py", "diffusers.py", "json.py", "sitecustomize.py", "conftest.py", "setup.py", "unet/pyrdiff.py", "evil.pth",
    "unet.py", "pyrdiff/__init__.py",
)  # fmt: skip


def test_code_in_a_folder_is_not_run(folder, canary, monkeypatch):
    monkeypatch.chdir(folder)  # where a module of the folder would be found first
    for name in CODE:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(WRITES.format(str(canary)) + (path.read_text() if path.exists() else ""))
    assert type(pyrdiff.load(folder)) is PyramidalPipeline
    found = hub.check(folder)
    assert found.loads and not found.sound and found.loads_elsewhere is None  # that would have run it
    assert {problem.split(":")[0] for problem in found.problems} == set(CODE)
    with pytest.raises(ValueError, match="is not sound"):
        hub.push(folder, "me/model", dry_run=True)
    with pytest.raises(TypeError, match="trust_remote_code"):
        pyrdiff.load(folder, trust_remote_code=True)


def test_code_beside_the_right_code_is_not_run_where_pyrdiff_is_not_installed(folder, canary, forked):
    """`check` starts a process that runs the folder's code if that is, byte for byte, the installed one."""
    for name in ("torch.py", "unet/__init__.py", "unet/torch.py", "evil.pth", "sitecustomize.py"):
        (folder / name).write_text(WRITES.format(str(canary)))
    found = hub.check(folder)
    assert found.loads_elsewhere and len(found.problems) == 5


LIBRARIES = (
    "unet/diffusers.py",
    "scheduler/diffusers.py",
    "scheduler/scheduling_ddpm.py",
    "refine_scheduler/diffusers.py",
)


def test_code_with_the_name_of_a_components_library_is_not_run(exports, tmp_path, canary, forked):
    """Diffusers runs <component>/<library>.py of a trusted folder, even if the library is diffusers itself."""
    for kind in ("stock", "pyramidal"):
        folder = Path(shutil.copytree(exports[kind], tmp_path / kind))
        planted = [folder / name for name in LIBRARIES if (folder / name).parent.is_dir()]
        for path in planted:
            path.write_text(
                WRITES.format(str(canary))
                + "from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel\n"
            )
        found = hub.check(folder)
        assert found.loads_elsewhere and not canary.exists(), found.problems
        names = {path.relative_to(folder).as_posix() for path in planted}
        assert {problem.split(":")[0] for problem in found.problems} == names
        with pytest.raises(ValueError, match="is not sound"):
            hub.push(folder, "me/model", dry_run=True)
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists(), "this is what the check keeps away"
    canary.unlink()
    assert hub.check(folder, update_code=True).sound and not [path for path in planted if path.exists()]


def test_update_code_takes_hostile_code_out(folder, canary, forked):
    own = (folder / "pipeline_pyramidal.py").read_bytes()
    for name in ("pipeline_pyramidal.py", "evil.py", "unet/evil.py", "scheduler/evil.py"):
        (folder / name).write_text(WRITES.format(str(canary)))
    (folder / "evil.sh").write_text(f"touch {canary}")
    change(folder / "model_index.json", _class_name=["evil", "PyramidalPipeline"])
    found = hub.check(folder, update_code=True)
    assert (folder / "pipeline_pyramidal.py").read_bytes() == own and not list(folder.rglob("evil.py"))
    assert found.problems == ["evil.sh: is no part of the model"] and found.loads_elsewhere


# Pickles.


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_are_not_read(folder, canary, name, forked):
    (folder / "unet" / name).write_bytes(bomb(canary))
    assert not hub.check(folder).sound
    (folder / WEIGHTS).unlink()
    refused(folder, "a pickle, which can run code" if name == "diffusion_pytorch_model.bin" else "no such file")


def test_a_pickle_that_is_called_safetensors(folder, canary):
    (folder / WEIGHTS).write_bytes(bomb(canary))
    refused(folder, "expected safetensors")


def refused(folder: Path, message: str) -> None:
    """`load` raises one ValueError of one line, at once; `check` says the same."""
    before = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        pyrdiff.load(folder)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000 and time.process_time() - before < 5
    found = hub.check(folder)
    assert not found.sound and not found.loads and f"does not load: {caught.value}" in found.problems


# Links.


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", WEIGHTS, "unet", "scheduler", "unet/index"])
def test_links_out_of_the_folder_are_not_followed(folder, tmp_path, canary, name):
    away = tmp_path / "away"
    if name == "unet/index":
        name = f"{WEIGHTS}.index.json"
        (folder / WEIGHTS).unlink()
        away.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    else:
        (folder / name).rename(away)
    (folder / name).symlink_to(away)
    refused(folder, "a link that leads out of the folder")
    with pytest.raises(ValueError, match="a link that leads out of the folder"):
        hub.push(folder, "me/model", dry_run=True)


def test_links_within_the_folder_are_followed_and_others_are_found(folder, tmp_path, forked):
    (folder / WEIGHTS).rename(folder / "unet/kept.safetensors")
    (folder / WEIGHTS).symlink_to("kept.safetensors")
    assert type(pyrdiff.load(folder)) is PyramidalPipeline
    (folder / "notes.png").symlink_to("/etc/passwd")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe.png")
    problems = hub.check(folder).problems
    assert "notes.png: a link that leads out of the folder" in problems
    assert "circle: a link that leads out of the folder" in problems
    assert "pipe.png: neither a file nor a folder" in problems
    assert "unet/kept.safetensors: is no part of the model" in problems


def test_update_code_writes_through_no_link(folder, tmp_path, forked):
    away = tmp_path / "away"
    (folder / "unet").rename(away)
    (folder / "unet").symlink_to(away)
    (away / "mine.py").write_text("mine")
    assert not hub.check(folder, update_code=True).sound
    assert (away / "mine.py").exists()
    (folder / "unet").unlink()
    away.rename(folder / "unet")
    source = tmp_path / "source.py"
    source.write_text("mine")
    (folder / "pipeline_pyramidal.py").unlink()
    (folder / "pipeline_pyramidal.py").symlink_to(source)
    hub.check(folder, update_code=True)
    assert source.read_text() == "mine"


@pytest.mark.parametrize("name", ["../away.safetensors", "/away.safetensors", "a/../../b.safetensors", "x.bin"])
def test_a_shard_index_names_files_beside_it(folder, tmp_path, canary, name):
    shutil.copyfile(folder / WEIGHTS, tmp_path / "away.safetensors")
    keys = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for key in keys}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(folder, r"the file .*; expected .safetensors beside it")


def test_a_shard_index_names_every_tensor(folder, forked):
    """One that it leaves out would be left at random."""
    (folder / WEIGHTS).rename(folder / "unet/all.safetensors")
    shards = dict.fromkeys(load_file(folder / "unet/all.safetensors"), "all.safetensors")
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert hub.check(folder).sound
    left_out = min(shards)
    for changed, text in (
        ({key: file for key, file in shards.items() if key != left_out}, f"weight_map lacks 1 tensors: '{left_out}'"),
        ({**shards, "evil": "all.safetensors"}, "weight_map has unknown 1 tensors: 'evil'"),
        ({}, "weight_map is no map of tensors to files"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": changed}))
        refused(folder, f"index.json: {text}")


# Names.


@pytest.mark.parametrize(
    "name",
    [
        ["os", "system"],
        ["pipeline_evil", "DiffusionPipeline"],
        ["pyrdiff.pipelines", "DiffusionPipeline"],
        ["pipeline_pyramidal", "os.system"],
        ["pipeline_pyramidal", "PyramidalPipeline", "more"],
        "os.system",
        "diffusers.StableDiffusionPipeline",
        "StableDiffusionPipeline",
        "CoordinateUNet2DModel",
        "__class__",
        {"PyramidalPipeline": 1},
        None,
    ],
)
def test_a_pipeline_is_one_of_an_installed_method(folder, name):
    change(folder / "model_index.json", _class_name=name)
    refused(folder, "model_index.json: _class_name is .*expected a pipeline of an installed method")


@pytest.mark.parametrize(
    "entry",
    [
        ["transformers", "CLIPModel"],
        ["os", "system"],
        ["builtins", "eval"],
        ["diffusers", "DiffusionPipeline"],
        ["diffusers", "StableDiffusionPipeline"],
        ["diffusers", "AutoModel"],
        ["diffusers", "DDPMScheduler"],
        ["diffusers", "utils"],
        ["diffusers", "__version__"],
        ["diffusers.models", "UNet2DModel"],
        ["evil", "UNet2DModel"],
        ["pipeline_pyramidal", "PyramidalPipeline"],
        ["unet_coordinate", "CoordinateUNet2DModel", "more"],
        [None, "CoordinateUNet2DModel"],
        "CoordinateUNet2DModel",
        {"unet_coordinate": "CoordinateUNet2DModel"},
    ],
)
def test_a_network_is_a_model_of_diffusers_or_of_an_installed_method(folder, entry):
    change(folder / "model_index.json", unet=entry)
    refused(folder, "model_index.json: unet is .*expected")


@pytest.mark.parametrize("entry", [["diffusers", "UNet2DModel"], ["diffusers", "SchedulerMixin"], ["os", "system"]])
def test_a_scheduler_is_a_scheduler(folder, entry):
    change(folder / "model_index.json", scheduler=entry)
    refused(folder, r"model_index.json|scheduler_config.json")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_keys_that_the_class_does_not_know(folder, canary, file):
    for key in ("auto_map", "quantization_config", "custom_pipeline", "trust_remote_code", "self", "kwargs"):
        before = (folder / file).read_text()
        change(folder / file, **{key: {"AutoModel": "evil.Model"}})
        (folder / "evil.py").write_text(WRITES.format(str(canary)))
        refused(folder, f"{file}: unknown key {key!r}")
        (folder / file).write_text(before)


# Plans.


@pytest.mark.parametrize("name", ["pyramidal", "residual"])
@pytest.mark.parametrize(
    "entry",
    [
        ["DiffusionPipeline", {"pretrained_model_name_or_path": "me/evil"}],
        ["AutoModel", {}],
        ["UNet2DModel", {}],
        ["utils", {}],
        ["os.system", {"command": "touch canary"}],
        ["__builtins__", {}],
        ["DDIMScheduler", {"beta_start": 1.0}],
        ["DDIMScheduler", {"trust_remote_code": True}],
        ["DPMSolverMultistepScheduler", {"algorithm_type": "os.system"}],
        "DDIMScheduler",
        {"DDIMScheduler": {}},
    ],
)
def test_a_plan_names_schedulers_only(exports, tmp_path, canary, monkeypatch, name, entry):
    """In the folder, and in a call."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(exports[name], tmp_path / "theirs"))
    pipeline = pyrdiff.load(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": torch.rand(1, 3, 4, 4)} if name == "residual" else {}
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = {"num_inference_steps": 2, "scheduler": entry}
    with pytest.raises(ValueError):
        pipeline(**image, plan=plan)
    assert not calls
    change(folder / "model_index.json", plans={"evil": plan})
    refused(folder, "model_index.json: .* cannot be built from it")


@pytest.mark.parametrize("plans", [5, "os.system", ["a"], {"a": 1}, {"a": {"box": 1}}, {"a": {"__class__": 1}}])
def test_plans_that_are_none(folder, plans):
    change(folder / "model_index.json", plans=plans)
    refused(folder, "model_index.json: .* cannot be built from it")


# Numbers, sizes and depths.


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"dropout": float("nan")}),
        ("unet/config.json", {"block_out_channels": [10**12, 8]}),
        ("unet/config.json", {"block_out_channels": [100_000, 100_000]}),
        ("unet/config.json", {"layers_per_block": 100_000}),
        ("unet/config.json", {"layers_per_block": 10**30}),
        ("unet/config.json", {"image_channels": -1}),
        ("unet/config.json", {"block_out_channels": [8] * 100_000}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}),
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "os.system"}),
        ("scheduler/scheduler_config.json", {"trained_betas": "x"}),
    ],
)
def test_settings_that_no_model_of_ours_has(folder, file, changes):
    change(folder / file, **changes)
    refused(folder, f"{file}|by config.json")


def test_json_that_is_deep_large_or_none(folder):
    path = folder / "unet/config.json"
    for text, message in (
        ("[" * 100_000, "expected JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "expected JSON"),
        ('{"dropout": ' + "9" * 10_000 + "}", "config.json"),
        ("[]", "expected a JSON object"),
        ("", "expected JSON"),
        ("\ud800", "expected JSON"),
        (" " * 100_000_000, "has 100000000 bytes"),
    ):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(folder, message)


def test_weights_that_lie(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def write(**entry) -> None:
        text = json.dumps({**header, name: {**header[name], **entry}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    for entry in (
        {"shape": [2**40]},
        {"data_offsets": [0, 2**42]},
        {"shape": [2**40], "data_offsets": [0, 2**42]},
        {"shape": [2**32, 2**32]},
        {"shape": []},
        {"dtype": "os.system"},
        {"dtype": "I32"},
        {"data_offsets": [-8, 8]},
    ):
        write(**entry)
        refused(folder, r"diffusion_pytorch_model\.safetensors")
    for size in (2**63, 2**40, 10**8, 1, 0):
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        refused(folder, "expected safetensors")
    tensors = load_file(make(path, data))
    save_file({**tensors, "evil": torch.zeros(1)}, path)
    refused(folder, "has unknown 1 tensors")
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    refused(folder, f"lacks 1 tensors .*{name}")
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, path)
    refused(folder, f"{name} has values that are not finite")


def make(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Repositories.

LOADS = """
os.chdir(cwd)
for repo, revision in asked["values"]["wanted"]:
    attempt(lambda: type(pyrdiff.load(repo, revision=revision)).__name__)
    attempt(lambda: hub.check(repo, revision=revision).problems)
"""


def test_hostile_repositories(server, client, exports, tmp_path, canary):
    good = {
        path.relative_to(exports["pyramidal"]).as_posix(): path.read_bytes()
        for path in exports["pyramidal"].rglob("*")
        if path.is_file()
    }
    code = WRITES.format(str(canary)).encode()
    names = [name for name in good if name.endswith(".py")]
    without = {name: data for name, data in good.items() if name != WEIGHTS}
    pickles = {f"unet/{name}": bomb(canary) for name in ("diffusion_pytorch_model.bin", "a.ckpt", "a.pt")}
    evil = b'{"evil": 1}'
    place = str(tmp_path / "evil.json")
    index = {**json.loads(good["model_index.json"]), "_class_name": ["evil", "EvilPipeline"]}
    deep = {**json.loads(good["unet/config.json"]), "layers_per_block": 100_000}
    cases: dict[str, tuple[dict, dict, str, str]] = {  # repository: files, listing, `load` says, `check` says
        "code": ({**good, **{name: code + good[name] for name in names}}, {}, "", "is not the code of the installed"),
        "more-code": ({**good, "torch.py": code, "unet/__init__.py": code}, {}, "", "torch.py: is no part of"),
        "foreign": ({**good, "evil.py": code, "model_index.json": json.dumps(index).encode()}, {}, "_class_name", ""),
        "pickles": ({**without, **pickles}, {}, "safetensors: no such file", "no such file"),
        "also-pickles": ({**good, **pickles}, {}, "", "diffusion_pytorch_model.bin: weights and arrays"),
        "up": ({**good, "../evil.json": evil}, {}, "expected names inside a folder", ""),
        "further-up": ({**good, "unet/../../../../evil.json": evil}, {}, "expected names inside a folder", ""),
        "absolute": ({**good, place: evil}, {}, "expected names inside a folder", ""),
        "backslash": ({**good, "..\\evil.json": evil}, {}, "expected names inside a folder", ""),
        "huge": (good, {WEIGHTS: {"size": 500 * 10**9}}, "has 500000000000 bytes of .safetensors", ""),
        "huge-beside": (
            {**good, "other/huge.safetensors": b"x", "huge.safetensors": b"x", "huge.png": b"x"},
            {name: {"size": 500 * 10**9} for name in ("other/huge.safetensors", "huge.safetensors", "huge.png")},
            "",
            "other/huge.safetensors: is no part of the model",
        ),
        "huge-json": (good, {"unet/config.json": {"size": 10**8}}, "unet/config.json: has 100000000 bytes", ""),
        "large": ({**good, "unet/config.json": json.dumps(deep).encode()}, {}, "more than 5000 modules", ""),
        "none": ({"README.md": b"nothing"}, {}, "expected an exported pipeline", "no such file"),
    }  # fmt: skip
    for name, (files, listing, _, _) in cases.items():
        server.put(f"them/{name}", files, listing=listing)
    (tmp_path / "cwd").mkdir()
    asked = [(f"them/{name}", None) for name in cases]
    asked += [("them/code", "no-such-revision"), ("them/missing", None), ("them/../up", None)]
    said = client(LOADS, cwd=str(tmp_path / "cwd"), wanted=asked)
    assert len(said) == 2 * len(asked)
    for (repo, revision), loaded, checked in zip(asked, said[::2], said[1::2], strict=True):
        _, _, refusal, problem = cases.get(repo.split("/", 1)[1], ({}, {}, repo, "")) if revision is None else "    "
        if refusal:
            assert loaded[0] == "ValueError" and refusal in loaded[1] and "\n" not in loaded[1], (repo, loaded)
            assert checked[0] == "ValueError" or refusal.split(":")[-1] in checked[1] or problem, (repo, checked)
        else:
            assert loaded == ["", "PyramidalPipeline"] or revision, (repo, loaded)
        assert problem in checked[1] and checked[1] != "[]", (repo, checked)
        if revision:
            assert loaded[0] == checked[0] == "ValueError" and "no-such-revision" in loaded[1], loaded
    # Nothing was fetched that is not loaded, and nothing lies anywhere else.
    fetched = [path for method, path in server.requests if method == "GET" and "/resolve/" in path]
    assert fetched and not [path for path in fetched if "huge.safetensors" in path or "huge.png" in path]
    assert not [path for path in fetched if path.endswith((".bin", ".ckpt", ".pt"))]
    assert not [path for path in fetched if path.startswith("/them/huge/") and path.endswith(".safetensors")]
    assert not [path for path in fetched if path.startswith(("/them/up/", "/them/absolute/", "/them/huge-json/"))]
    assert not list(tmp_path.rglob("evil.json")) and not list((tmp_path / "cwd").iterdir())
    home = Path(server.environment["HF_HOME"])
    assert not [path for path in home.rglob("*evil.json*")]


def test_load_fetches_no_code(server, client, exports):
    files = {
        path.relative_to(exports["guided"]).as_posix(): path.read_bytes()
        for path in exports["guided"].rglob("*")
        if path.is_file()
    }
    server.put("me/no-code", files)
    assert client("say(type(pyrdiff.load('me/no-code')).__name__)") == ["GuidedSRPipeline"]
    asked = [path.split("/resolve/")[1] for _, path in server.requests if path.startswith("/me/no-code/resolve/")]
    assert {path.split("/", 1)[1] for path in asked} == {
        name for name in files if name.endswith((".json", ".safetensors"))
    }
