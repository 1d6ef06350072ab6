"""Code in saved folders: joined to one file a class, kept from the moment that the class is made, the same re-saved."""

import importlib
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils.dynamic_modules_utils import check_imports, get_relative_imports

import pyrdiff
from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, hub, plugins
from pyrdiff.hub.checking import code_of
from pyrdiff.hub.loading import read_folder
from pyrdiff.hub.standalone import join
from pyrdiff.parts.saving import StandaloneSaving
from pyrdiff.parts.sources import Source, SourceFile, standalone_text

NETWORK = dict(
    sample_size=8,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_again(folder: Path) -> dict[str, bytes]:
    """What `save_pretrained` writes of an export: the card and the licence are the exporter's."""
    return {name: data for name, data in contents(folder).items() if name not in ("README.md", "LICENSE")}


# Joining.

LOW = '''"""Sizes."""

import math
from dataclasses import dataclass

SCALE = 2  # a comment that stays


def double(value):
    # So does this one.
    return math.floor(SCALE * value)
'''
MIDDLE = '''"""Uses sizes."""

import zlib
import json
import math
import bisect

from pkg.parts.low import SCALE, double


class Middle:
    """Doubles twice."""

    def __call__(self, value):
        return double(double(value)) + math.ceil(SCALE)
'''
TOP = '''# Of somebody.
"""The plugin."""

from dataclasses import dataclass, field

from pkg.parts.middle import Middle
from pkg.parts.low import double


@dataclass
class Plugin:
    numbers: list = field(default_factory=list)

    def run(self):
        return [Middle()(number) - double(number) for number in self.numbers]
'''


def source(**changes: str) -> Source:
    """A plugin that needs two modules, with changes to the texts."""
    texts = {"pkg.parts.low": LOW, "pkg.parts.middle": MIDDLE, "pkg.plugin": TOP}
    for name, text in changes.items():
        texts[{"top": "pkg.plugin"}.get(name, f"pkg.parts.{name}")] = text
    files = {name: SourceFile(f"/{name.replace('.', '/')}.py", text) for name, text in texts.items()}
    return Source("pkg.plugin", files)


def test_a_joined_file_does_what_its_modules_do():
    text = join(source())
    space = {"__name__": "joined"}
    exec(compile(text, "joined.py", "exec"), space)
    assert space["Plugin"]([1, 2, 3]).run() == [4, 6, 8]
    assert space["__doc__"] == "The plugin." and space["Middle"].__doc__ == "Doubles twice."


def test_a_joined_file_keeps_comments_merges_imports_and_is_the_same_each_time():
    text = join(source())
    lines = text.splitlines()
    assert lines[:2] == ["# SPDX-License-Identifier: Apache-2.0", "# Written by pyrdiff; stands alone."]
    assert {"# Of somebody.", "SCALE = 2  # a comment that stays", "    # So does this one."} <= set(lines)
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    plain = [f"import {name}" for name in ("bisect", "json", "math", "zlib")]
    assert imports == [*plain, "from dataclasses import dataclass, field"]
    order = [lines.index(line) for line in ("SCALE = 2  # a comment that stays", "class Middle:", "class Plugin:")]
    assert order == sorted(order)
    turned = Source("pkg.plugin", dict(reversed(source().files.items())))
    assert join(turned) == text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top": "from pkg.parts.low import double as twice\n"}, "plugin.py:1: expected `from pkg.parts.low import"),
        ({"top": "\nfrom pkg.parts.low import *\n"}, "plugin.py:2: expected `from pkg.parts.low import"),
        ({"top": "import pkg.parts.low\n"}, "plugin.py:1: expected `from pkg.parts.low import"),
        ({"top": "from pkg.parts import low\n"}, "/pkg/plugin.py:1: low: expected a name that pkg.parts defines"),
        ({"top": "from pkg.parts.low import half\n"}, "/pkg/plugin.py:1: half: expected a name that"),
        (
            {"top": "def run():\n    from pkg.parts.low import double\n"},
            "/pkg/plugin.py:2: expected the import of pkg.parts.low at the top level",
        ),
        ({"middle": MIDDLE + "\nif SCALE:\n    import pkg.parts.low\n"}, "middle.py:18: expected the import"),
        ({"top": "from pyrdiff.parts import files as f\n"}, "/pkg/plugin.py:1: expected `from pyrdiff.parts import"),
        ({"low": "from __future__ import annotations\n" + LOW}, "/pkg/parts/low.py:1: expected no `from __future__`"),
        ({"top": "from . import parts\n"}, "/pkg/plugin.py:1: expected the full name of the module"),
        ({"top": "from .parts.low import double\n"}, "/pkg/plugin.py:1: expected no line that looks like a relative"),
        ({"low": LOW + '\nTEXT = """\n  from .x import y\n"""\n'}, "low.py:14: expected no line that looks"),
        ({"top": TOP + "\nSCALE = 3\n"}, "plugin.py:17: SCALE: expected one meaning, /pkg/parts/low.py"),
        ({"top": TOP + "\ndef math():\n    pass\n"}, "/pkg/plugin.py:17: math: expected one meaning"),
        ({"top": TOP + "\nfor SCALE in (1, 2):\n    pass\n"}, "/pkg/plugin.py:17: SCALE: expected one meaning"),
        ({"low": LOW + "\ndef open(path):\n    pass\n"}, "low.py:13: open: expected another name than"),
        ({"low": LOW + "from pkg.parts.middle import Middle\n"}, "low.py:12: expected no circle of imports"),
        ({"low": LOW.replace("import math\n", "import math; FACTOR = 2\n")}, "low.py:3: expected it on a line"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_named_by_file_and_line(change, message):
    with pytest.raises(ValueError, match=message):
        join(source(**change))


def test_the_same_name_with_the_same_meaning_is_joined():
    both = "\nSize = int | tuple[int, int]\nPAIRS = [SCALE for SCALE in (1, 2)]\n"
    text = join(source(low=LOW + both, top=TOP + "\nSize = int | tuple[int, int]\nimport math\n"))
    exec(compile(text, "joined.py", "exec"), {"__name__": "joined"})


# The plugin classes.


@pytest.mark.parametrize("name", sorted(plugins.classes()))
def test_the_file_of_every_plugin_class_stands_alone(name, tmp_path, caplog):
    cls = plugins.classes()[name]
    path = tmp_path / "file.py"
    path.write_text(standalone_text(cls))
    assert standalone_text(cls) == path.read_text() and path.read_text().split("\n")[1].startswith("# Written by")
    with caplog.at_level(logging.WARNING, "diffusers"):
        logging.getLogger("diffusers").propagate = True
        assert get_relative_imports(path) == [] == check_imports(path)
    assert "not found in your environment" not in caplog.text
    packages = {
        line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
    }
    assert packages <= {*sys.stdlib_module_names, "torch", "diffusers", "numpy", "PIL", "huggingface_hub"}


def test_exports_work_without_pyrdiff_and_are_saved_again_byte_for_byte(
    exports, pipelines, sample, elsewhere, tmp_path
):
    """All in one process, so that the code of each is overwritten on disk by the next before any is saved."""
    code = (
        "kept = {name: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)"
        " for name, folder in folders.items()}\n"
        "for name, pipeline in kept.items():\n"
        "    pipeline.save_pretrained(f'{again}/{name}')\n"
        "    torch.save(sample(pipeline), f'{again}/{name}.pt')\n"
        "    say([name, type(pipeline).__module__])"
    )
    again = tmp_path / "again"
    again.mkdir()
    said = elsewhere(code, folders=exports, again=again)
    assert [name for name, module in said if module.startswith("diffusers_modules.local.")] == list(exports), said
    for name, folder in exports.items():
        assert torch.allclose(torch.load(again / f"{name}.pt"), sample(pipelines[name]), atol=1e-5)
        assert saved_again(again / name) == saved_again(folder)


def test_auto_model_loads_every_network(exports, pipelines, elsewhere):
    """By `subfolder` the first of a pipeline, for which diffusers asks the index; each by its own folder."""
    code = (
        "from diffusers import AutoModel\n"
        "for folder, part in wanted:\n"
        "    place = {'subfolder': part} if part == 'unet' else {}\n"
        "    path = folder if place else f'{folder}/{part}'\n"
        "    network = AutoModel.from_pretrained(path, trust_remote_code=True, **place)\n"
        "    total = sum(float(value.double().abs().sum()) for value in network.state_dict().values())\n"
        "    say([type(network).__name__, type(network).__module__, total])"
    )
    networks = {
        (name, part): module
        for name, pipeline in pipelines.items()
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module) and name != "stock"
    }
    said = elsewhere(code, wanted=[(exports[name], part) for name, part in networks])
    kinds = {"CoordinateUNet2DModel", "ParallelTrajectoryUNet2DModel", "ResidualSRUNet2DModel", "ScaleAutoencoder"}
    assert {kind for kind, _, _ in said} == kinds
    for network, (kind, module, total) in zip(networks.values(), said, strict=True):
        assert kind == type(network).__name__ and module.startswith("diffusers_modules.local.")
        expected = sum(float(value.double().abs().sum()) for value in network.state_dict().values())
        assert total == pytest.approx(expected, rel=1e-9)


def test_auto_model_needs_no_warning_with_pyrdiff(exports, caplog):
    """`auto_map` is for diffusers; the class passes over it."""
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING, "diffusers"):
        network = CoordinateUNet2DModel.from_pretrained(exports["pyramidal"] / "unet")
    assert "auto_map" not in caplog.text and "auto_map" not in network.config


# The code is that of the class, whatever is on disk now.


def test_two_folders_in_one_process_keep_each_its_own_code(exports, elsewhere, tmp_path):
    first, second = exports["pyramidal"], tmp_path / "second"
    shutil.copytree(first, second)
    for name in ("pipeline_pyramidal.py", "unet/unet_coordinate.py"):
        path = second / name
        path.write_text(path.read_text() + "\n\nSECOND = True\n")
    code = (
        "one, two = (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in folders)\n"
        "for pipeline, target in zip((one, two), targets):\n"
        "    pipeline.save_pretrained(target)\n"
        "say(one.unet.__module__ == two.unet.__module__)"
    )
    targets = [tmp_path / "one", tmp_path / "two"]
    assert elsewhere(code, folders=[first, second], targets=targets) == [True]
    for folder, target in zip((first, second), targets, strict=True):
        assert saved_again(folder) == saved_again(target)


def package(folder: Path, name: str, **files: str) -> None:
    """A package of somebody's, imported from `folder`."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    for stem, text in files.items():
        (folder / name / f"{stem}.py").write_text(text)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder that modules are imported from, and forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("their"):
            del sys.modules[name]


def test_a_package_that_is_updated_while_a_process_runs(importable):
    """The file of the class, and the modules that it imports, are those that the process runs."""
    text = "from diffusers import UNet2DModel\nfrom pyrdiff.parts.sources import KeepsSource\n"
    text += "from their_updated.helper import SCALE\n"
    text += "class TheirUNet(KeepsSource, UNet2DModel):\n    scale = SCALE\n"
    package(importable, "their_updated", unet_theirs=text, helper="SCALE = 1\n")
    cls = importlib.import_module("their_updated.unet_theirs").TheirUNet
    (importable / "their_updated" / "helper.py").write_text("SCALE = 2\n")
    (importable / "their_updated" / "unet_theirs.py").write_text("nothing")
    kept = standalone_text(cls)
    assert "SCALE = 1" in kept and "scale = SCALE" in kept
    PyramidalPipeline(cls(**NETWORK), DDPMScheduler()).save_pretrained(importable / "saved")
    assert (importable / "saved" / "unet" / "unet_theirs.py").read_text() == kept


def test_a_component_that_keeps_no_code_is_read_when_the_pipeline_is_built(importable):
    text = "from diffusers import UNet2DModel\n\n\nclass TheirUNet(UNet2DModel):\n    pass\n"
    (importable / "their_plain.py").write_text(text)
    cls = importlib.import_module("their_plain").TheirUNet
    pipeline = PyramidalPipeline(cls(**NETWORK), DDPMScheduler())
    (importable / "their_plain.py").write_text("nothing")
    pipeline.save_pretrained(importable / "saved")
    assert (importable / "saved" / "unet" / "their_plain.py").read_text() == text
    index = json.loads((importable / "saved" / "model_index.json").read_text())
    assert index["unet"] == ["their_plain", "TheirUNet"] and index["_class_name"][0] == "pipeline_pyramidal"
    config = json.loads((importable / "saved" / "unet" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "their_plain.TheirUNet"}


SCRIPT = """
import sys
from pathlib import Path
from diffusers import DDPMScheduler, UNet2DModel
from pyrdiff import PyramidalPipeline
from pyrdiff.parts.sources import KeepsSource
PASSWORD = "secret"
NETWORK = %r
class Plain(UNet2DModel):
    pass
class Keeping(KeepsSource, UNet2DModel):
    pass
class Pipeline(PyramidalPipeline):
    pass
space = {"__name__": "nowhere", "UNet2DModel": UNet2DModel}
exec("class Fileless(UNet2DModel): pass", space)
for pipeline, unet in ((PyramidalPipeline, Plain), (PyramidalPipeline, Keeping), (Pipeline, UNet2DModel),
                       (PyramidalPipeline, space["Fileless"])):
    try:
        pipeline(unet(**NETWORK), DDPMScheduler()).save_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)
print(Path(sys.argv[1]).exists())
"""


@pytest.mark.parametrize("kind", ["code", "script"])
def test_classes_of_a_script_are_refused_before_anything_is_written(tmp_path, kind):
    (tmp_path / "script.py").write_text(SCRIPT % NETWORK)
    source = tmp_path / "script.py" if kind == "script" else SCRIPT % NETWORK
    done = warm.run(source, tmp_path / "saved", check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["Plain", "Keeping", "Pipeline", "Fileless"], done.stdout
    assert all("expected a class of a module with a file" in line for line in lines[:-1]) and lines[-1] == "False"


# Folders of earlier versions.


@pytest.fixture
def older(exports, tmp_path) -> Path:
    """A folder as an earlier version saved it: other code, no `auto_map`, no licence, settings that are gone."""
    folder = Path(shutil.copytree(exports["pyramidal"], tmp_path / "older"))
    (folder / "LICENSE").unlink()
    for name in ("pipeline_pyramidal.py", "unet/unet_coordinate.py"):
        (folder / name).write_text("raise RuntimeError('of an earlier version')\n")
    for name in ("model_index.json", "unet/config.json"):
        config = json.loads((folder / name).read_text())
        del config["auto_map"]
        (folder / name).write_text(json.dumps(config))
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "cls, file", [(PyramidalPipeline, "model_index.json"), (CoordinateUNet2DModel, "unet/config.json")]
)
def test_settings_that_are_gone_are_passed_over(older, pipelines, sample, monkeypatch, caplog, cls, file):
    change(older / file, gone={"16x16": [1.0, 2.0]})
    with pytest.raises(ValueError, match=f"{file}: unknown key 'gone' for {cls.__name__}"):
        pyrdiff.load(older)
    monkeypatch.setattr(cls, "RETIRED", (*cls.RETIRED, "gone"))
    logging.getLogger("diffusers").propagate = True
    for load in (pyrdiff.load, PyramidalPipeline.from_pretrained):
        loaded = load(older)
        loaded.set_progress_bar_config(disable=True)
        assert torch.allclose(sample(loaded), sample(pipelines["pyramidal"]), atol=1e-5)
        assert "gone" not in loaded.config and "gone" not in loaded.unet.config
    assert "gone" not in caplog.text
    change(older / file, gone=[float("nan")])
    with pytest.raises(ValueError, match="NaN"):
        pyrdiff.load(older)


def test_update_code_makes_an_older_folder_sound(older, exports, forked):
    found = hub.check(older)
    assert found.loads and found.loads_elsewhere is None and len(found.problems) == 4, found.problems
    found = hub.check(older, update_code=True)
    assert found.sound and found.loads_elsewhere, found.problems
    assert contents(older) == contents(exports["pyramidal"])


def test_a_check_changes_nothing(exports, older, forked):
    for folder in (exports["residual"], older):
        before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
        hub.check(folder)
        after = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
        assert after == before


@pytest.mark.parametrize("name", sorted(path.parent.name for path in hub.BUNDLED.glob("*/model_index.json")))
def test_the_models_of_the_package_are_kept_without_code_and_exported_with_it(name, tmp_path, forked):
    assert not [*(hub.BUNDLED / name).rglob("*.py")], "an export writes it"
    for place in (name, hub.BUNDLED / name, hub.export(pyrdiff.load(name), tmp_path / "model")):
        found = hub.check(place)
        assert found.sound and found.loads_elsewhere, found.problems
        code = code_of(read_folder(hub.BUNDLED / name)).texts
        assert {path for path in found.files if path.endswith(".py")} == {*code}
    assert not [*(hub.BUNDLED / name).rglob("*.py")], "a check writes nothing there"
    with pytest.raises(ValueError, match=f"comes with pyrdiff.*hub.export.*'{name}'"):
        hub.push(hub.BUNDLED / name, "me/mine", dry_run=True)


def test_every_pipeline_saves_its_code():
    ours = [cls for cls in plugins.classes().values() if issubclass(cls, DiffusionPipeline)]
    assert len(ours) >= 4 and all(issubclass(cls, StandaloneSaving) for cls in ours)
    assert "save_pretrained" in vars(StandaloneSaving) and not [cls for cls in ours if "save_pretrained" in vars(cls)]
    assert UNet2DModel not in plugins.classes().values()
