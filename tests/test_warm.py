"""The forks that tests start in place of interpreters behave as those do."""

import json
import os
import signal
import subprocess
import sys

import pytest
import warm

LOOK = """
import json, os, sys
from pathlib import Path
import helper
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), helper.__file__, __name__, sys.stdin.read()]))
print("said", file=sys.stderr)
"""

INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("kind", ["code", "script"])
def test_a_fork_sees_what_an_interpreter_sees(tmp_path, kind):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "look.py").write_text(LOOK)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "ONLY_HERE": "1"}
    source = LOOK if kind == "code" else tmp_path / "look.py"
    done = warm.run(source, "a b", 1, env=env, cwd=tmp_path)
    command = [sys.executable, *(["-c", LOOK] if kind == "code" else [str(source)]), "a b", "1"]
    expected = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert json.loads(done.stdout) == json.loads(expected.stdout)
    assert (done.returncode, done.stderr) == (expected.returncode, expected.stderr) == (0, "said\n")


@pytest.mark.parametrize(
    "code, said",
    [
        ("import sys; sys.exit(3)", ""),
        ("import sys; sys.exit('no luck')", "no luck\n"),
        ("import sys; sys.exit()", ""),
        ("1 / 0", "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", ""),
        (INTERRUPTED, "KeyboardInterrupt\n"),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", "last\n"),
    ],
)
def test_a_fork_ends_as_an_interpreter_does(code, said):
    expected = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    done = warm.run(code)
    assert done.returncode == expected.returncode
    assert done.stderr.endswith(said) and expected.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_forks_leave_nothing_to_each_other(tmp_path):
    warm.run("import os, sys; os.environ['LEFT'] = '1'; sys.left = 1; os.chdir('/')", check=True)
    done = warm.run("import os, sys; print('LEFT' in os.environ, hasattr(sys, 'left'), os.getcwd())", cwd=tmp_path)
    assert done.stdout == f"False False {tmp_path}\n"


def test_without_a_package():
    done = warm.run("import diffusers, sys; print([name for name in sys.modules if 'pyrdiff' in name])", without=[])
    assert done.stdout == "[]\n"
    assert "ModuleNotFoundError" in warm.run("import pyrdiff.hub", without=["pyrdiff"]).stderr
    assert warm.run("import pyrdiff.hub").returncode == 0


def test_a_fork_can_be_talked_to_and_stopped():
    (question, ask), (hear, answer) = os.pipe(), os.pipe()
    process = warm.start("print(input(), flush=True); input()", stdin=question, stdout=answer)
    os.close(question), os.close(answer)
    with open(ask, "w") as asking, open(hear) as hearing:
        print("hello", file=asking, flush=True)
        assert hearing.readline() == "hello\n" and process.poll() is None
        process.terminate()
        assert process.wait() == process.poll() == -signal.SIGTERM and hearing.read() == ""


def test_a_fork_that_hangs_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run("import time; time.sleep(600)", timeout=0.1)
