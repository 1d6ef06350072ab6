"""Every kind of hostile folder that we know, against `load`, `check`, `update_code` and `push`: nothing of it runs.

The process that `check` starts is a real one: a fork, or with --runslow a new interpreter.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

import pyrdiff
from pyrdiff import hub
from pyrdiff.hub import checking

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX, CONFIG, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
STOCK = "from diffusers import DDPMScheduler, DPMSolverMultistepScheduler\n"
# Files of Python code that some loader, or Python itself, might pick up.
PLANTED = (
    "scheduler/diffusers.py", "refine_scheduler/diffusers.py", "unet/diffusers.py", "scheduler/scheduling_ddpm.py",
    "unet/unet_coordinate/__init__.py", "unet/__init__.py", "unet/torch.py", "__init__.py", "torch.py", "diffusers.py",
    "sitecustomize.py", "usercustomize.py", "conftest.py", "setup.py", "pipeline.py", "pyrdiff/__init__.py",
    "diffusers_modules/local/pipeline_pyramidal.py", ".hidden/evil.py", "unet/deep/er/evil.py", "unet/UPPER.PY",
    "unet/__pycache__/unet_coordinate.cpython-311.pyc", "scheduler/torch.py", "new_component/diffusers.py",
)  # fmt: skip
# Other files, which `update_code` leaves and `check` names.
OTHERS = (
    "evil.pth", "unet/unet_coordinate.so", "unet/diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack",
    "unet/model.ckpt", "requirements.txt", "unet/adapter_config.json", "pyproject.toml", "unet/quantize_config.json",
)  # fmt: skip


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').write('ran')\n"


class Bomb:
    """A pickle that writes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return exec, (code(self.canary),)


def plant(folder: Path, name: str, canary: Path, more: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code(canary) + more)


def renamed(file: str, **entries) -> Callable[[Path, Path], None]:
    """A folder whose index or config names code of its own, which lies where it would be looked for."""

    def make(folder: Path, canary: Path) -> None:
        change(folder / file, **entries)
        own = (folder / "unet/unet_coordinate.py").read_text() + (folder / "pipeline_pyramidal.py").read_text()
        for place in (folder, folder / "unet", folder / "scheduler", folder.parent):
            (place / "evil.py").write_text(code(canary) + STOCK + own)

    return make


def written(name: str, data: bytes) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (folder / name).write_bytes(data)


def linked(name: str, target: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(outside=folder.parent, canary=canary))

    return make


def weights(change: Callable[[dict], None]) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return make


def first(value: float) -> Callable[[Path, Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].view(-1)[0] = value

    return weights(change)


def shards(index: object) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return make


def card(text: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (folder / "README.md").write_text(text.format(canary=canary))


def prepended(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: plant(folder, name, canary, (folder / name).read_text())


def as_folder(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        plant(folder, f"{name}/__init__.py", canary)

    return make


def as_pipe(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


DEEP = "[" * 3000 + "]" * 3000
EVIL_MAP = {"AutoModel": "evil.CoordinateUNet2DModel"}


def all_of(kinds: dict) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        for kind in kinds.values():
            kind(folder, canary)

    return make


CODE = {name: lambda folder, canary, name=name: plant(folder, name, canary, STOCK) for name in PLANTED}
FILES = {
    name: lambda folder, canary, name=name: (folder / name).write_bytes(pickle.dumps(Bomb(canary))) for name in OTHERS
}
# Kinds that `update_code` makes sound.
MENDED: dict[str, Callable[[Path, Path], None]] = {
    **CODE,
    "all code": all_of(CODE),
    "changed pipeline": prepended("pipeline_pyramidal.py"),
    "changed network": prepended("unet/unet_coordinate.py"),
    "code is a pipe": as_pipe("unet/unet_coordinate.py"),
    "code is a link out": linked("unet/unet_coordinate.py", "{outside}/evil.py"),
    "another class name": renamed(INDEX, _class_name=["evil", "PyramidalPipeline"]),
    "class name with a path": renamed(INDEX, _class_name=["../evil", "PyramidalPipeline"]),
    "class name with dots": renamed(INDEX, _class_name=["..evil", "PyramidalPipeline"]),
    "another network": renamed(INDEX, unet=["evil", "CoordinateUNet2DModel"]),
    "network with a path": renamed(INDEX, unet=["../evil", "CoordinateUNet2DModel"]),
    "_custom_pipeline": renamed(INDEX, _custom_pipeline="evil"),
    "_module": renamed(INDEX, _module="evil", _name_or_path="me/evil"),
    "_ignore_files": renamed(INDEX, _ignore_files=["pipeline_pyramidal.py"], _pre_quantization_dtype="evil"),
    "class of the network's config": renamed(CONFIG, _class_name="evil.Evil", _name_or_path="me/evil"),
    "class of the scheduler's config": renamed(SCHEDULER, _class_name=["evil", "Evil"]),
}
REFUSED: dict[str, Callable[[Path, Path], None]] = {
    **FILES,
    "all files": all_of(FILES),
    "code is a folder": as_folder("unet/unet_coordinate.py"),
    "another scheduler": renamed(INDEX, scheduler=["evil", "DDPMScheduler"]),
    "custom_pipeline": renamed(INDEX, custom_pipeline="evil"),
    "another component": renamed(INDEX, evil=["evil", "Evil"]),
    "auto_map of the index": renamed(INDEX, auto_map=EVIL_MAP),
    "auto_map of the network": renamed(CONFIG, auto_map=EVIL_MAP),
    "quantization": renamed(CONFIG, quantization_config={"quant_method": "evil", "load_in_8bit": True}),
    "pickle for safetensors": lambda folder, canary: (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(canary))),
    "weights that are nan": first(float("nan")),
    "weights that are inf": first(float("inf")),
    "weights of a run that diverged": first(1e37),
    "shards outside": shards({"weight_map": {"a": "../../evil.safetensors"}}),
    "shards beside one file": shards({"weight_map": {}}),
    "shards as a list": shards([]),
    "index of variants": written(f"{WEIGHTS}.index.fp16.json", b"[]"),
    "index of variants, empty": written(f"{WEIGHTS}.index.fp16.json", b""),
    "index of variants, a pipe": as_pipe(f"{WEIGHTS}.index.fp16.json"),
    "empty index": written(INDEX, b""),
    "index as a list": written(INDEX, b"[]"),
    "index without entries": written(INDEX, b"{}"),
    "deep index": written(INDEX, f'{{"plans": {DEEP}}}'.encode()),
    "deep config": written(CONFIG, f'{{"resolutions": {DEEP}}}'.encode()),
    "deep private key": written(SCHEDULER, f'{{"_private": {DEEP}}}'.encode()),
    "huge number": lambda folder, canary: change(folder / CONFIG, norm_eps=10**400),
    "size of many sides": lambda folder, canary: change(folder / CONFIG, resolutions=[8, [100_000] * 99]),
    "huge levels": lambda folder, canary: change(folder / CONFIG, resolutions=[16, 60000]),
    "huge plan": lambda folder, canary: change(folder / INDEX, plans={"a": {"resolutions": [16, [60000, 50000]]}}),
    "licence is a link out": linked("LICENSE", "{canary}"),
    "card is a link out": linked("README.md", "/etc/passwd"),
    "picture is a link out": linked("samples.png", "/etc/passwd"),
    "network's folder is a link out": linked("unet", "{outside}"),
    "name of two lines": written("a\nproblem: b", b""),
    "name that is no text": written(os.fsdecode(b"\xff\x1b[2J.txt"), b""),
    "a circle": linked("circle.png", "circle.png"),
    "card that builds objects": card("---\ntags: !!python/object/apply:builtins.open ['{canary}', 'w']\n---\n"),
    "card that is deep": card(f"---\ntags: {DEEP}\n---\n"),
    "card that is no text": written("README.md", b"---\nlicense: \xff\n---\n"),
    "card that is no mapping": card("---\n- a\n---\n"),
    "card that is huge": lambda folder, canary: os.truncate(folder / "README.md", 10**10),
}


def outcome(call: Callable, *arguments, **options) -> str:
    """What a call says when it refuses: a `ValueError` of one line and bounded length."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        text = str(error)
        assert type(error) is ValueError and "\n" not in text and len(text) < 6000, text[:300]
        return text
    return ""


EACH = [
    pytest.param(kind, marks=pytest.mark.slow if kind in CODE or kind in FILES else ()) for kind in MENDED | REFUSED
]


@pytest.mark.parametrize("kind", EACH)
def test_hostile_folders(exports, tmp_path, kind, monkeypatch, runslow):
    if not runslow:
        monkeypatch.setattr(checking, "subprocess", warm.Forks)
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    shutil.copytree(exports["pyramidal"], folder)
    (tmp_path / "evil.py").write_text(code(canary))
    (MENDED | REFUSED)[kind](folder, canary)
    before = contents(tmp_path, folder)
    refused = outcome(pyrdiff.load, folder)
    found = hub.check(folder)
    assert not found.sound and found.loads == (not refused)
    assert all("\n" not in problem and len(problem) < 2000 for problem in found.problems)
    if kind in REFUSED or runslow:
        assert outcome(hub.push, folder, "me/model", pictures=[], dry_run=True), "it would be published"
    if kind in MENDED or "link" in kind or runslow:
        mended = hub.check(folder, update_code=True)
        assert mended.sound == (kind in MENDED), mended.problems
        if mended.loads:
            python = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if ".py" in path.name.lower()}
            assert python - {"pyproject.toml"} == {"pipeline_pyramidal.py", "unet/unet_coordinate.py"}
    assert not canary.exists() and contents(tmp_path, folder) == before


def test_trust_is_for_the_code_that_the_index_names(exports, tmp_path, forked):
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    shutil.copytree(exports["pyramidal"], folder)
    MENDED["all code"](folder, canary)
    with (folder / "pipeline_pyramidal.py").open("a") as file:
        file.write("# changed\n")
    found = hub.check(folder, trust_remote_code=True)
    assert found.loads_elsewhere and not found.sound and not canary.exists(), found.problems
    MENDED["changed network"](folder, canary)
    assert hub.check(folder, trust_remote_code=True).loads_elsewhere and canary.read_text() == "ran"


def contents(place: Path, without: Path) -> dict[Path, bytes | None]:
    """{path: content} of all that lies in a place, but for what is in a folder of it."""
    paths = [path for path in place.rglob("*") if not path.is_relative_to(without)]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def test_the_canaries_would_sing(exports, tmp_path):
    """What the test relies on: trusting loaders do run what the kinds plant."""
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    for name in ("scheduler/diffusers.py", "changed pipeline", "changed network", "another class name"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exports["pyramidal"], folder)
        MENDED[name](folder, canary)
        code = "import sys, diffusers; diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)"
        warm.run(code, folder, without=["pyrdiff"])
        assert canary.read_text() == "ran"
        canary.unlink()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.read_text() == "ran"
