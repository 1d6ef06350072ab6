"""Files and folders are whole or absent, and what killed processes left is swept."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import warm

from pyrdiff.parts import files
from pyrdiff.parts.files import MACHINE, remove_folder, replacing, replacing_folder, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_folder(beside: Path, text: str) -> None:
    beside.mkdir()
    (beside / "a").write_text(text)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "pipeline") as beside:
            make_folder(beside, text)
        assert names(tmp_path) == ["pipeline"] and (tmp_path / "pipeline" / "a").read_text() == text
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "pipeline") as beside:
        make_folder(beside, "three")
        raise ZeroDivisionError
    assert names(tmp_path) == ["pipeline"] and (tmp_path / "pipeline" / "a").read_text() == "two"


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges names as Linux can")
def test_there_is_no_moment_without_the_folder(tmp_path, monkeypatch):
    with replacing_folder(tmp_path / "pipeline") as beside:
        make_folder(beside, "one")
    seen, real = [], {name: getattr(os, name) for name in ("rename", "replace", "rmdir", "unlink")}

    def watched(name):
        def call(*arguments, **options):
            seen.append((tmp_path / "pipeline" / "a").read_text())
            result = real[name](*arguments, **options)
            seen.append((tmp_path / "pipeline" / "a").read_text())
            return result

        return call

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    with replacing_folder(tmp_path / "pipeline") as beside:
        make_folder(beside, "two")
    assert seen and set(seen) == {"two"}, "only after the exchange is anything removed or renamed"


def test_sweep_removes_strays_of_dead_processes_and_nothing_else(tmp_path, dead):
    alive, other = os.getppid(), "0" * 6 if MACHINE != "0" * 6 else "1" * 6
    strays = [
        f".checkpoint-3.writing-{dead}",
        f".checkpoint-2.replaced-{dead}",
        ".checkpoint-0.removing-1" + 40 * "0",
        f".pipeline.writing-{dead}-{MACHINE}-0",
        f".8x8.npy.writing-{os.getpid()}-{MACHINE}-0",  # of an earlier process of this number
        f".line\nbreak.writing-{dead}-{MACHINE}-12",
    ]
    others = [
        f".checkpoint-3.writing-{alive}",
        f".a.png.writing-{dead}-{other}-0",  # of another machine: whether it lives cannot be told
        ".checkpoint-3.writing-",
        ".checkpoint-3.writing-0",
        f"checkpoint-3.writing-{dead}",
        f".checkpoint-3.keeping-{dead}",
        f".a.writing-{dead}-",
        "checkpoint-2",
    ]
    for number, name in enumerate(strays + others):
        if number % 2:
            (tmp_path / name).mkdir()
            (tmp_path / name / "state.json").write_text("{}")
        else:
            (tmp_path / name).write_text("a file")
    (tmp_path / f".link.writing-{dead}").symlink_to(tmp_path / "checkpoint-2")
    kept = sorted({*names(tmp_path)} - {*strays})
    assert sorted(path.name for path in sweep(tmp_path)) == sorted(strays)
    assert names(tmp_path) == kept
    assert sweep(tmp_path / "nowhere") == []


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path, dead):
    make_folder(tmp_path / f".pipeline.replaced-{dead}-{MACHINE}-3", "one")
    make_folder(tmp_path / f".pipeline.writing-{dead}-{MACHINE}-2", "two")
    sweep(tmp_path)
    assert names(tmp_path) == ["pipeline"] and (tmp_path / "pipeline" / "a").read_text() == "one"


def test_whoever_writes_sweeps_first(tmp_path, dead):
    (tmp_path / f".grid.png.writing-{dead}-{MACHINE}-0").write_text("half")
    with replacing(tmp_path / "other.json") as beside:
        assert names(tmp_path) == []
        beside.write_text("{}")
    assert names(tmp_path) == ["other.json"]


def test_a_folder_is_removed_whole(tmp_path):
    make_folder(tmp_path / "checkpoint-1", "one")
    remove_folder(tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


def test_threads_that_write_one_file(tmp_path):
    def write(number: int) -> None:
        with replacing(tmp_path / "file") as beside:
            beside.write_text(str(number) * 10_000)
        with replacing_folder(tmp_path / f"folder {number}") as beside:
            make_folder(beside, str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert names(tmp_path) == ["file", *(f"folder {number}" for number in range(8))]
    text = (tmp_path / "file").read_text()
    assert len(text) == 10_000 and len(set(text)) == 1


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 244 + ".png"])
def test_the_longest_names(tmp_path, name):
    for text in ("one", "two"):
        with replacing(tmp_path / name) as beside:
            beside.write_text(text)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "two"


LIMITED = """
import resource, sys
from pathlib import Path
from pyrdiff.parts.files import replacing, replacing_folder
folder, kind = Path(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if kind == "file":
        with replacing(folder / "a.png") as beside:
            beside.write_bytes(bytes(10_000))
    else:
        import safetensors.torch, torch
        with replacing_folder(folder / "model") as beside:
            beside.mkdir()
            (beside / "config.json").write_text("{}" * 100)
            safetensors.torch.save_file({"w": torch.zeros(10_000)}, beside / "model.safetensors")
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files as POSIX can")
@pytest.mark.parametrize("kind, name, least", [("file", "a.png", 0), ("folder of safetensors", "model", 200)])
def test_a_disk_that_refuses_is_named_with_path_and_bytes(tmp_path, kind, name, least):
    (tmp_path / "earlier").write_text("stays")
    said = warm.run(LIMITED, tmp_path, kind, check=True).stdout
    assert said.startswith("27 [Errno 27] File too large (") and f"'{tmp_path / name}'" in said, said
    written, free = (int(text) for text in said.split("(")[1].split() if text.isdecimal())
    assert least <= written <= 8192 and free > 0
    assert names(tmp_path) == ["earlier"]


def test_errors_about_other_files_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.png"):
        (tmp_path / "input.png").read_bytes()
    assert caught.value.filename == str(tmp_path / "input.png") and "bytes" not in str(caught.value)
    with pytest.raises(ValueError, match="^no number$"), replacing(tmp_path / "a.png"):
        raise ValueError("no number")
