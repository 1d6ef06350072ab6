"""The rule for outputs: what a run made is told from what others did, and only that is replaced unasked."""

import json
from pathlib import Path

import pytest

from pyrdiff.parts.outputs import RECORD, Outputs, made_by, written_by_runs


def write(outputs: Outputs, path: Path, text: str) -> Path:
    with outputs.replacing(path) as beside:
        beside.write_text(text)
    return path


@pytest.fixture
def run() -> Outputs:
    return Outputs("sample", {"model": "m", "plan": "fast"})


def test_a_run_knows_what_it_made(run, tmp_path):
    path = write(run, tmp_path / "a.png", "one")
    assert run.has(path) and made_by(path).startswith("sample ")
    assert Outputs("sample", {"plan": "fast", "model": "m"}).has(path), "the same recipe, later"
    assert not Outputs("sample", {"model": "m", "plan": "paper"}).has(path)
    assert not Outputs("upscale", {"model": "m", "plan": "fast"}).has(path)
    (tmp_path / "b.png").write_text("one")
    assert not run.has(tmp_path / "b.png") and not run.has(tmp_path / "nowhere.png")


@pytest.mark.parametrize("text", ["", "two", "longer than before"])
def test_a_file_that_was_changed_since_is_not_the_runs(run, tmp_path, text):
    path = write(run, tmp_path / "a.png", "one")
    path.write_text(text)
    assert not run.has(path) and made_by(path) is None
    with pytest.raises(ValueError, match="a.png is there and was not made by this run.*--overwrite"):
        run.check([path], "output")


def test_what_others_made_is_replaced_only_if_asked(run, tmp_path):
    others = tmp_path / "photo.png"
    others.write_text("a photo")
    other_run = write(Outputs("sample", {}), tmp_path / "b.png", "two")
    run.check([tmp_path / "new.png", write(run, tmp_path / "mine.png", "three")], "output")
    for path in (others, other_run):
        before = path.read_text()
        with pytest.raises(ValueError, match=f"^--output: {path} is there"):
            run.check([path], "output")
        with pytest.raises(ValueError, match="is there"):
            write(run, path, "replaced")
        assert path.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "b.png", "mine.png", "photo.png"]
    with pytest.raises(ValueError, match=r"b.png \(and 1 more\) is there"):
        run.check([other_run, others], "output")

    asked = Outputs("sample", {"model": "m", "plan": "fast"}, overwrite=True)
    asked.check([others], "output")
    assert run.has(write(asked, others, "replaced")) and others.read_text() == "replaced"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder.png"):
        asked.check([tmp_path / "folder.png"], "output")


def test_a_link_to_nowhere_is_a_file_of_others(run, tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="a.png is there"):
        run.check([tmp_path / "a.png"], "output")


def test_a_run_that_is_killed_before_the_rename_leaves_the_earlier_file_to_its_owner(run, tmp_path):
    """The line is on record by then, and names bytes that are not there."""
    path = tmp_path / "a.png"
    path.write_text("a photo")
    with pytest.raises(ValueError, match="is there"):
        write(run, path, "ours")
    line = {"file": "a.png", "bytes": 7, "sha256": "0" * 64, "run": run.run}
    (tmp_path / RECORD).write_text(json.dumps(line) + "\n")
    assert not run.has(path)


def test_a_record_of_any_content_says_nothing_wrong(run, tmp_path):
    path = write(run, tmp_path / "a.png", "one")
    whole = (tmp_path / RECORD).read_bytes()
    for spoilt in (
        b"",
        b"\xff\xfe",
        b"[]\n3\nnull\n",
        b'{"file": []}\n',
        b"[" * 100_000,
        b'{"file": "a.png"}\n',
        whole[:-9],
    ):
        (tmp_path / RECORD).write_bytes(spoilt)
        assert not run.has(path), spoilt[:20]
    other = write(run, tmp_path / "b.png", "two")  # after a line that was cut off
    assert run.has(other)


def test_what_a_training_keeps_is_written_by_runs(tmp_path):
    folder = tmp_path / "runs" / "mine"
    kept = [
        folder / "samples" / "step-1.png",
        folder / "first" / "samples" / "a.png",
        folder / "pipeline" / "s" / "a.png",
    ]
    others = [folder / "data" / "a.png", tmp_path / "samples" / "a.png", folder / "a.png"]
    for path in kept + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert written_by_runs(kept + others) == []
    settings = {"output_dir": "runs/mine", "train_data_dir": "x", "max_train_steps": 3}
    for place in (folder, folder / "first"):
        (place / "settings.json").write_text(json.dumps(settings))
    assert written_by_runs(kept + others) == kept
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    assert written_by_runs(others) == []
