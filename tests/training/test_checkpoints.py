"""Checkpoints: round trip, every kind of damage, a full disk at every write, SIGKILL at random moments, pruning."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import warm

from pyrdiff.parts import files
from pyrdiff.parts.files import sweep
from pyrdiff.training import checkpoints
from pyrdiff.training.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)

FILES = ["ema.safetensors", "model.safetensors", "state.json", "manifest.json"]


def small_content(step: int) -> tuple[checkpoints.Tensors, dict]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(4, 3, generator=generator)
    return {"model": {"weight": weights}, "ema": {"weight": weights.half()}}, {"step": step, "loss": 0.1 + step}


def save_small(folder: Path, *steps: int) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, *small_content(step))
    return path


def assert_loads(path: Path, step: int) -> None:
    tensors, state = load_checkpoint(path)
    expected_tensors, expected_state = small_content(step)
    assert state == expected_state
    assert same_bits(tensors, expected_tensors)


def same_bits(left: checkpoints.Tensors, right: checkpoints.Tensors) -> bool:
    def described(tensors):
        return {
            group: {
                name: (t.dtype, tuple(t.shape), t.detach().contiguous().flatten().view(torch.uint8).tolist())
                for name, t in entries.items()
            }
            for group, entries in tensors.items()
        }

    return described(left) == described(right)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_round_trip_is_bit_for_bit(tmp_path):
    base = torch.randn(6, 5)
    tensors = {
        "model.unet": {
            "weight": torch.nn.Parameter(base),
            "same_memory": base,
            "part_of_it": base[1:3],
            "transposed": base.t(),
            "expanded": torch.ones(1).expand(7),
            "bf16": torch.randn(9).bfloat16(),
            "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        },
        "random-states": {"bytes": torch.randint(0, 256, (300,), dtype=torch.uint8), "flag": torch.tensor([True])},
        "sizes": {"scalar": torch.tensor(2**53 + 1), "none": torch.zeros(0, 3), "double": torch.tensor([0.1]).double()},
        "empty": {},
    }
    state = {"loss": 0.1, "big": 2**70, "text": "é\n\0", "nested": {"list": [1, None, True, 1e-300]}, "nothing": {}}
    path = save_checkpoint(tmp_path / "new" / "run", 12, tensors, state)
    assert path == tmp_path / "new" / "run" / "checkpoint-12"
    loaded, loaded_state = load_checkpoint(path)
    assert same_bits(loaded, tensors)
    assert loaded_state == state
    assert names(tmp_path / "new" / "run") == ["checkpoint-12"]
    manifest = verify_checkpoint(path)
    assert manifest["step"] == 12
    assert manifest["files"].keys() == set(names(path)) - {"manifest.json"}


def test_nothing_at_all_round_trips(tmp_path):
    assert load_checkpoint(save_checkpoint(tmp_path, 0, {}, {})) == ({}, {})


def test_files_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", 1000)
    tensors = {"model": {"weight": torch.arange(12345)}}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert same_bits(loaded, tensors)


@pytest.mark.parametrize(
    ("step", "tensors", "state", "message"),
    [
        (-1, {}, {}, "step=-1: expected"),
        (True, {}, {}, "step=True: expected"),
        (1.0, {}, {}, "step=1.0: expected"),
        (1, {"../model": {}}, {}, "tensors.*'../model'"),
        (1, {"": {}}, {}, "tensors.*''"),
        (1, {"model": {"w": 3}}, {}, r"tensors\['model'\]: expected"),
        (1, {"model": {3: torch.ones(1)}}, {}, r"tensors\['model'\]: expected"),
        (1, {"model": {"w": torch.ones(2).to_sparse()}}, {}, r"tensors\['model'\]: expected"),
        (1, {"model": {"w": torch.ones(2, device="meta")}}, {}, r"tensors\['model'\]: expected.*meta"),
        (1, {"model": {"w": torch.ones(2, dtype=torch.complex128)}}, {}, r"tensors\['model'\].*complex128"),
        (1, {}, [], "state: expected a dict"),
        (1, {}, {"loss": float("nan")}, "state: expected .*strict JSON"),
        (1, {}, {"loss": torch.ones(1)}, "state: expected .*strict JSON"),
        (1, {}, {"a": [{1: 2}]}, "state: expected .*string keys"),
        (1, {}, {"a": [(1, 2)]}, "state: expected .*tuples"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path, step, tensors, state, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, step, tensors, state)
    assert names(tmp_path) == []


def test_oldest_first_and_only_exact_names(tmp_path):
    save_small(tmp_path, 10, 9, 100)
    for name in ("checkpoint-007", "checkpoint-", "checkpoint-1x", "checkpoint--1", "xcheckpoint-1", ".checkpoint-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert sweep(tmp_path / "nowhere") == []


def damages(path: Path):
    """Every damage to one file: (what, a callable that does it)."""
    size = path.stat().st_size
    yield "missing", path.unlink
    yield "empty", lambda: os.truncate(path, 0)
    yield "one byte short", lambda: os.truncate(path, size - 1)
    yield "one byte long", lambda: path.write_bytes(path.read_bytes() + b"\n")
    for position in range(size):
        yield f"byte {position} flipped", lambda position=position: flip(path, position)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found_named_and_stepped_over(tmp_path, name):
    save_small(tmp_path, 1, 2)
    file = tmp_path / "checkpoint-2" / name
    whole = file.read_bytes()
    said_of = {"missing": "missing", "empty": "truncated", "one byte short": "truncated", "one byte long": "too long"}
    heard = []

    def hear(path, message):
        heard.append((path, message))

    for what, damage in list(damages(file)):
        damage()
        for reader in (verify_checkpoint, load_checkpoint):
            with pytest.raises(CheckpointError) as caught:
                reader(file.parent)
            assert str(file) in str(caught.value), what
            if name != "manifest.json":
                assert said_of.get(what, "damaged") in str(caught.value), what
        heard.clear()
        assert newest_checkpoint(tmp_path, hear) == tmp_path / "checkpoint-1", what
        assert [path for path, _ in heard] == [file.parent] and str(file) in heard[0][1], what
        file.write_bytes(whole)
    assert_loads(newest_checkpoint(tmp_path), 2)


def test_manifests_that_are_not_ours_or_of_another_version(tmp_path):
    path = save_small(tmp_path, 3)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for change, message in [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a manifest of ours"),
        ({"files": {"../secret": manifest["files"]["state.json"], **manifest["files"]}}, "'../secret'"),
        ({"files": {"state.json": {"bytes": -1}}}, "sha256"),
        ({"step": "3"}, "'step'"),
    ]:
        file.write_text(json.dumps({**manifest, **change}, indent=1))
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(path)
    for text in ("[]", "null", "[" * 100_000, "\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match="manifest.json"):
            verify_checkpoint(path)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    path = save_small(tmp_path, 3)
    shutil.copytree(path, tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError, match="step 3"):
        verify_checkpoint(tmp_path / "checkpoint-9")
    assert newest_checkpoint(tmp_path) == path
    shutil.copytree(path, tmp_path / "best")
    assert_loads(tmp_path / "best", 3)


def test_saving_a_step_again(tmp_path):
    path = save_small(tmp_path, 4)
    flip(path / "model.safetensors", -1)
    save_small(tmp_path, 4)
    assert_loads(path, 4)

    save_checkpoint(tmp_path, 4, {}, {"other": True})
    assert load_checkpoint(path) == ({}, {"other": True})
    assert names(tmp_path) == ["checkpoint-4"]


def test_disk_full_at_each_of_the_first_100_writes(tmp_path, monkeypatch):
    save_small(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", 16)
    tensors = {"model": {"weight": torch.randn(500)}, "ema": {"weight": torch.randn(20)}}
    state = {"loss": 0.5}
    payload = 520 * 4 + len(json.dumps(state, indent=1))
    write, calls, failing = checkpoints._write, 0, 0

    def write_until_full(handle, data):
        nonlocal calls
        calls += 1
        if calls == failing:
            write(handle, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle, data)

    monkeypatch.setattr(checkpoints, "_write", write_until_full)
    for n in range(1, 101):
        calls, failing = 0, n
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, 2, tensors, state)
        message = str(caught.value)
        assert str(tmp_path / "checkpoint-2") in message and f"{payload} bytes" in message
        assert os.strerror(errno.ENOSPC) in message
        assert isinstance(caught.value.__cause__, OSError)
        assert names(tmp_path) == ["checkpoint-1"]
        assert_loads(newest_checkpoint(tmp_path), 1)
    calls, failing = 0, -1
    save_checkpoint(tmp_path, 2, tensors, state)
    assert calls > 100


@pytest.mark.parametrize("primitive", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("earlier", [(1,), (1, 2)], ids=["new", "replacing"])
def test_io_error_at_every_other_call(tmp_path, monkeypatch, primitive, earlier):
    real, calls, failing, reported = getattr(os, primitive), 0, 0, 0

    def refuse(*arguments):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*arguments)

    while calls >= failing:
        failing += 1
        folder = tmp_path / str(failing)
        save_small(folder, *earlier)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, primitive, refuse)
            patch.setattr(files, "_exchanged", lambda *_: False)  # so that an earlier one is replaced in two steps
            try:
                save_checkpoint(folder, 2, *small_content(22))
            except CheckpointError as error:
                reported += 1
                assert str(folder / "checkpoint-2") in str(error) and " bytes " in str(error)
                in_place = (folder / "checkpoint-2").exists() and load_checkpoint(folder / "checkpoint-2")[1][
                    "step"
                ] == 22
                assert not in_place or primitive == "fsync", "reported an error for a checkpoint that is in place"
            else:
                in_place = True
        if not in_place:
            assert names(folder) == [f"checkpoint-{step}" for step in earlier]
        sweep(folder)
        assert names(folder) == [f"checkpoint-{step}" for step in ((1, 2) if in_place else earlier)]
        assert_loads(folder / "checkpoint-1", 1)
        assert_loads(newest_checkpoint(folder), 22 if in_place else earlier[-1])
    assert reported > 0


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "run").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="checkpoint-1.* bytes"):
        save_small(tmp_path / "run", 1)
    assert (tmp_path / "run").read_text() == "a file is in the way"


def test_what_the_disk_gives_back_is_compared_before_the_rename(tmp_path, monkeypatch):
    save_small(tmp_path, 1)

    def write_other_bytes(handle, data):
        handle.write(bytes(data[:-1]) + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(checkpoints, "_write", write_other_bytes)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        save_small(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_ctrl_c_while_writing_leaves_no_stray(tmp_path, monkeypatch):
    def interrupt(handle, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_small(tmp_path, 1)
    assert names(tmp_path) == []


def test_prune_keeps_the_newest(tmp_path):
    save_small(tmp_path, 1, 2, 3, 10)
    prune_checkpoints(tmp_path, keep=5)
    assert len(names(tmp_path)) == 4
    prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-10"]
    assert_loads(newest_checkpoint(tmp_path), 10)
    for keep in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="keep=.*expected"):
            prune_checkpoints(tmp_path, keep)


def test_prune_never_removes_the_last_good_one(tmp_path):
    save_small(tmp_path, 1, 2, 3)
    flip(tmp_path / "checkpoint-2" / "state.json", 0)
    flip(tmp_path / "checkpoint-3" / "model.safetensors", -1)
    prune_checkpoints(tmp_path, keep=1)
    assert_loads(newest_checkpoint(tmp_path), 1)


def test_prune_stopped_half_way_leaves_a_stray_and_no_half_checkpoint(tmp_path, monkeypatch):
    save_small(tmp_path, 1, 2)

    def die(path, **_):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert len(sweep(tmp_path)) == 1
    assert names(tmp_path) == ["checkpoint-2"]

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    save_small(tmp_path, 3)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


KILLS = """
import json, os, random, select, signal, sys, time
from pathlib import Path
import torch
from pyrdiff.parts.files import sweep
from pyrdiff.training import checkpoints

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
chance = random.Random(0)

def save_for_ever(step, pipe):
    while True:
        step += 1
        tensors = {n: {"w": torch.full((1000,), float(step))} for n in ("model", "ema", "optimizer")}
        checkpoints.save_checkpoint(folder, step, tensors, {"step": step})
        os.write(pipe, f"{step}\\n".encode())
        checkpoints.prune_checkpoints(folder, keep=2)

reports, step = [], 0
for _ in range(kills):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            save_for_ever(step, writer)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    os.close(writer)
    assert select.select([reader], [], [], 30)[0], "no step was saved in 30 s"
    time.sleep(chance.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    completed = int(open(reader).read().split()[-1])
    damaged = []
    newest = checkpoints.newest_checkpoint(folder, lambda *said: damaged.append(str(said)))
    tensors, state = checkpoints.load_checkpoint(newest)
    resumed = state["step"]
    right = all((group["w"] == resumed).all().item() for group in tensors.values()) and len(tensors) == 3
    strays = [p.name for p in sweep(folder)]
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-"))
    killed = os.WIFSIGNALED(status)
    reports.append(dict(killed=killed, before=step, completed=completed, resumed=resumed, right=right, damaged=damaged,
                        strays=strays, left=left))
    step = resumed
print(json.dumps(reports))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_sigkill_at_random_moments_of_saving(tmp_path, runslow):
    kills = 20 if runslow else 8
    reports = json.loads(warm.run(KILLS, tmp_path, kills, check=True).stdout)
    assert len(reports) == kills
    for report in reports:
        assert report["killed"] and report["right"], report
        assert report["damaged"] == [] and report["left"] == [], report
        assert report["completed"] > report["before"]
        assert report["completed"] <= report["resumed"] <= report["completed"] + 1, report
    assert sum(bool(report["strays"]) for report in reports) >= kills // 4, "the kills did not land inside a save"
