"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted([*ROOT.glob("pipelines/*.py"), *ROOT.glob("schedulers/*.py"), *ROOT.glob("src/pyrdiff/models/*.py")])
PLUGINS = [path for path in PLUGINS if path.name != "__init__.py"]
PARTS = sorted(path for path in ROOT.glob("src/pyrdiff/parts/*.py") if path.name != "__init__.py")
# Room: packages of pyrdiff that it may import, beside `parts`, which all may.
ROOMS = {
    "parts": set(),
    "data": {"data"},
    "metrics": {"metrics", "data"},
    "plan": {"plan", "data", "machine", "metrics"},
    "machine.py": set(),
    "plugins.py": set(),
    "training": {"training", "plugins", "data", "models", "schedulers", "pipelines", "hub", "machine"},
    "methods": {
        "methods",
        "plugins",
        "training",
        "data",
        "models",
        "schedulers",
        "pipelines",
        "plan",
        "metrics",
        "hub",
    },
    "hub": {"hub", "plugins", "machine"},
    "upscaling": {"upscaling", "data", "hub", "machine"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT / "src").parts[:-1] if path.is_relative_to(ROOT / "src") else ()
            base = ".".join(parts[: len(parts) - node.level + 1]) + "." if node.level else ""
            found |= {(base + (node.module or alias.name)).strip(".") for alias in node.names}
            if node.module == "pyrdiff":
                found |= {f"pyrdiff.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [*PLUGINS, *PARTS], ids=lambda path: path.name)
def test_plugin_files_import_parts_and_what_diffusers_needs(path):
    allowed = {*sys.stdlib_module_names, "torch", "diffusers", "numpy", "PIL", "huggingface_hub", "pyrdiff"}
    names = imports(path)
    assert {name.split(".")[0] for name in names} <= allowed
    assert all(name.startswith("pyrdiff.parts.") for name in names if name.split(".")[0] == "pyrdiff")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip().startswith(("from .", "import ."))]


def test_plugin_stems_are_unique():
    stems = [path.stem for path in PLUGINS]
    assert len(stems) == len(set(stems)) and all("_" in stem for stem in stems)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms(room):
    place = ROOT / "src" / "pyrdiff" / room
    for path in [place] if place.is_file() else place.rglob("*.py"):
        packages = {name.split(".")[1] for name in imports(path) if name.startswith("pyrdiff.")}
        assert packages <= {"parts", *ROOMS[room]}, path


def test_the_loop_knows_no_method_by_name():
    for path in (ROOT / "src" / "pyrdiff" / "training").glob("*.py"):
        text = path.read_text(encoding="utf-8").lower()
        assert "pddpm" not in text and "pyramidal" not in text, path


def test_listing_methods_does_not_import_torch():
    code = "import sys; from pyrdiff.plugins import methods; assert methods()['pddpm']; assert 'torch' not in "
    code += "sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
