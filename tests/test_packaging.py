"""The wheel and the sdist hold all that the package needs, the same in both, and work where they are unpacked."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", "runs", "build", "dist", "demo", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, place / "source", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(place / "source")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return place / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> dict[str, bytes]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_every_file_of_the_package(wheel):
    package = ROOT / "src" / "pyrdiff"
    expected = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*") if path.is_file()}
    for linked in ("pipelines", "schedulers"):
        expected |= {f"pyrdiff/{linked}/{path.name}": path for path in (ROOT / linked).glob("*.py")}
    expected = {name: path for name, path in expected.items() if "__pycache__" not in name}
    assert expected.keys() == {name for name in wheel if name.startswith("pyrdiff/")}
    assert all(wheel[name] == path.read_bytes() for name, path in expected.items())


def test_the_wheel_registers_the_command_and_the_methods(wheel):
    text = next(data.decode() for name, data in wheel.items() if name.endswith("entry_points.txt"))
    assert "pyrdiff = pyrdiff.cli:main" in text and "pddpm = pyrdiff.methods.pddpm:METHOD" in text
    assert sum(map(len, wheel.values())) < 25e6, "small enough for a package index"


def test_the_sdist_has_what_is_needed_to_build_and_to_test(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not [member.name for member in archive.getmembers() if member.issym()]
    assert {"README.md", "LICENSE", "CHANGELOG.md", "setup.cfg", "constraints.txt", "docs/training.md"} <= names
    assert {
        "examples/train_pddpm.py",
        "tests/test_packaging.py",
        "src/pyrdiff/pipelines/pipeline_pyramidal.py",
    } <= names


def test_the_unpacked_wheel_samples_the_model_that_comes_with_it(wheel, tmp_path):
    for name, data in wheel.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    code = "import pyrdiff, sys; assert pyrdiff.__file__.startswith(sys.argv[1])\n"
    code += "images = pyrdiff.load('noto-emoji')(2, num_inference_steps=4, refine_steps=2).images\n"
    code += "assert [image.size for image in images] == [(64, 64)] * 2"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    warm.run(code, tmp_path, without=[], check=True, env=environment, cwd=tmp_path)
