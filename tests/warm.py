"""Python processes of their own, at the price of a fork.

A new interpreter that imports torch, diffusers and pyrdiff works for six seconds before its first line. Here one
process imports them once; each request is a fork of it, with the standard streams, folder, arguments and environment
that the request asks for. What it does and leaves behind stays its own.

    done = warm.run(CODE, folder, without=["pyrdiff"])     # like subprocess.run([sys.executable, "-c", CODE, folder])
    done = warm.run(Path("examples/train_pddpm.py"), "--minutes", "1")             # a script
    done = warm.pyrdiff("plugins", "--json")                                        # the command line
    process = warm.start(CODE)                                                      # like subprocess.Popen

The forks are of two kinds. With `without` the parent has never imported pyrdiff, and the packages that are named cannot
be imported. Otherwise the parent has imported the toolkit already.

A fork is not a new interpreter, so the tests that are about the difference start a real one: modules are there already
(whether `--help` imports torch cannot be asked here), and what torch read from the environment when it was imported has
the values of the test session. The Hub's client and diffusers do read theirs again. Nothing in the parents has started
a thread, drawn a number or run a network.

The processes of pytest-xdist share one parent: the first process of the session calls `serve`, the others find its
address in the environment.
"""

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ADDRESS = "PYRDIFF_TEST_WARM"
PARENT = Path(__file__).with_name("warm_parent.py")
_server: subprocess.Popen | None = None


# What tests call.


class Process:
    """A fork at work. `returncode` is None until it is known to have ended; then as in `subprocess`."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.pid: int = self._answer()["pid"]
        self.returncode: int | None = None
        self.cpu_seconds: float | None = None

    def _answer(self) -> dict:
        data = b""
        while not data.endswith(b"\n"):
            if not (more := self._connection.recv(4096)):
                raise RuntimeError(f"the parent of the test processes has ended: {_said()}")
            data += more
        answer = json.loads(data)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            return self.wait()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The return code. After `timeout` seconds the process is killed: it hangs."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            answer = self._answer()
            self.returncode, self.cpu_seconds = answer["returncode"], answer["cpu_seconds"]
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    code: str | Path,
    *arguments,
    without: Iterable[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
) -> Process:
    """Starts code in a process of its own.

    Args:
        code: Python text as after `python -c`, or the path of a script.
        arguments: what is in `sys.argv` after it; anything that `str` takes.
        without: packages that cannot be imported, as where they are not installed. If it is given, even empty, pyrdiff
            has not been imported yet.
        env: the whole environment; by default that of this process.
        cwd: the folder to work in.
        stdin, stdout, stderr: open files, file descriptors or `subprocess.DEVNULL`.
    """
    kind = "pyrdiff" if without is None else "stock"
    script = str(code.resolve()) if isinstance(code, Path) else None
    request = {
        "code": None if script else code,
        "argv": [script or "-c", *map(str, arguments)],
        "without": list(without or ()),
        "env": dict(os.environ if env is None else env),
        "cwd": os.path.abspath(cwd or os.curdir),
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(serve() / kind))
    except ConnectionRefusedError:
        raise RuntimeError(f"the parent of the test processes has ended: {_said()}") from None
    with open(os.devnull, "r+b") as nothing:
        streams = [nothing if stream == subprocess.DEVNULL else stream for stream in (stdin, stdout, stderr)]
        descriptors = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        text = json.dumps(request).encode()
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], descriptors)
        connection.sendall(text)
        return Process(connection)


def run(
    code: str | Path, *arguments, check: bool = False, timeout: float = 600, **options
) -> subprocess.CompletedProcess:
    """Runs code to its end, as `subprocess.run(..., capture_output=True, text=True)` does.

    Args:
        check: raise `subprocess.CalledProcessError` unless the return code is 0.
        timeout: seconds after which the process is killed and `subprocess.TimeoutExpired` raised.
        code, arguments, options: as for `start`.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(code, *arguments, stdout=stdout, stderr=stderr, **options)
        code = process.wait(timeout)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
    if check and code:
        sys.stderr.write(said[1])
        raise subprocess.CalledProcessError(code, "warm process", *said)
    return subprocess.CompletedProcess(process.pid, code, *said)


class Forks:
    """In place of the module `subprocess`, where code starts `python -c CODE ARGUMENTS` without some packages."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def run(command: list[str], *, env: dict, cwd: str, timeout: float, **_) -> subprocess.CompletedProcess:
        """The last arguments are the packages; see `pyrdiff.hub.checking.load_elsewhere`."""
        python, option, code, folder, *packages = command
        if (python, option) != (sys.executable, "-c"):
            raise ValueError(f"command={command}: expected [{sys.executable!r}, '-c', ...]")
        return run(code, folder, *packages, without=packages, env=env, cwd=cwd, timeout=timeout)


def pyrdiff(*arguments, **options) -> subprocess.CompletedProcess:
    """The command line: what `pyrdiff ARGUMENTS` prints and how it ends."""
    return run("from pyrdiff.cli import main; main()", *arguments, **options)


def serve() -> Path:
    """The folder with the sockets of the parents, which are started unless they are there already."""
    global _server
    if ADDRESS not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="pyrdiff-warm-"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with open(folder / "said.txt", "wb") as said:
            _server = subprocess.Popen(
                [sys.executable, PARENT, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                env=environment,
            )  # fmt: skip
        _server.stdout.readline()  # it listens
        os.environ[ADDRESS] = str(folder)
        atexit.register(close)
    return Path(os.environ[ADDRESS])


def close() -> None:
    """Ends the parents, if this process has started them."""
    global _server
    if _server is not None:
        _server.stdin.close()
        _server.wait()
        _server.stdout.close()
        _server = None
        shutil.rmtree(os.environ.pop(ADDRESS), ignore_errors=True)


def _said() -> str:
    return (Path(os.environ[ADDRESS]) / "said.txt").read_text()[-3000:]
