"""What a run says of its progress: a measured time once, and nothing else where there is no terminal."""

import pytest

from pyrdiff.upscaling.telling import Progress, duration


@pytest.mark.parametrize("seconds, said", [
    (0.2, "1 s"), (80, "80 s"), (95, "2 min"), (89 * 60, "89 min"), (2 * 3600, "2 h"), (2 * 3600 + 300, "2 h 5 min"),
])  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_the_time_is_that_of_windows_after_the_first(capsys):
    times = iter([100.0, 103.0])  # the first window took 100 s, since it set things up
    progress = Progress(total=21, pictures=1, clock=lambda: next(times))
    for _ in range(21):
        progress.windows(1)
    progress.close()
    out, err = capsys.readouterr()
    assert out == "3 s a window: about 57 s\n" and err == ""


def test_few_windows_are_over_before_their_time_is_known(capsys):
    progress = Progress(total=3, pictures=1)
    progress.start("a.png", 1)
    progress.windows(3)
    progress.finish(3)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(total=10, pictures=3)
    progress.start("b\n.png", 2)
    progress.windows(5)
    progress.finish(7)
    progress.close()
    err = capsys.readouterr().err
    assert "b .png (2 of 3):  70%" in err and "7/10 windows" in err
