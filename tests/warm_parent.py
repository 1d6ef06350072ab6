"""The parents that `warm` has its processes forked from: run as a script with the folder for their sockets.

The first parent listens at both sockets. At its first request it imports torch and diffusers. The first request for a
process with pyrdiff makes a second parent, itself a fork, which takes that socket over and imports the toolkit on top.
Both end when their standard input does: with the process that started the first.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

IMPORTS = {  # of the parent of each kind
    "stock": """
        accelerate diffusers.models.unets.unet_2d diffusers.pipelines.pipeline_utils
        diffusers.schedulers.scheduling_ddim diffusers.schedulers.scheduling_ddpm
        diffusers.schedulers.scheduling_dpmsolver_multistep diffusers.training_utils transformers tyro
    """,
    "pyrdiff": """
        pyrdiff.cli pyrdiff.commands.sample pyrdiff.hub pyrdiff.methods.pddpm pyrdiff.methods.pixel_aware
        pyrdiff.methods.sr pyrdiff.modular pyrdiff.training.loop
    """,
}
PYTHONPATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
SYSTEM_PATH = [folder for folder in sys.path[1:] if folder not in PYTHONPATH]


class Parent:
    """Forks a process for each connection to its sockets (by kind), and says there how the process ended."""

    def __init__(self, listeners: dict[str, socket.socket]):
        self.listeners = listeners
        self.connections: dict[int, socket.socket | None] = {}  # by process; None is the second parent
        self.waked, wakes = socket.socketpair()
        for end in (self.waked, wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and their processes
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._wakes = wakes

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([sys.stdin, self.waked, *self.listeners.values()], [], [])
            if sys.stdin in ready:
                break
            if self.waked in ready:
                self.waked.recv(4096)
                self.reap(os.WNOHANG)
            for kind, listener in list(self.listeners.items()):
                if listener in ready:
                    self.accept(kind)
        for pid, connection in self.connections.items():
            if connection is not None:
                os.kill(pid, signal.SIGKILL)
        self.reap(0)

    def reap(self, flags: int) -> None:
        while self.connections:
            pid, status, usage = os.wait4(-1, flags)
            if pid == 0:
                break
            connection = self.connections.pop(pid)
            if connection is not None:
                seconds = usage.ru_utime + usage.ru_stime
                tell(connection, returncode=os.waitstatus_to_exitcode(status), cpu_seconds=seconds)
                connection.close()

    def accept(self, kind: str) -> None:
        import_all("stock")
        if kind != "stock" and "stock" in self.listeners:
            listener = self.listeners.pop(kind)
            pid = os.fork()
            if pid == 0:
                try:
                    self.forget()
                    import_all(kind)
                    Parent({kind: listener}).serve()
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            listener.close()
            self.connections[pid] = None
            return
        connection = self.listeners[kind].accept()[0]
        request, streams = receive(connection)
        pid = os.fork()
        if pid == 0:
            try:
                connection.close()
                self.forget()
                become(request, streams)
            finally:
                os._exit(1)
        for stream in streams:
            os.close(stream)
        self.connections[pid] = connection
        tell(connection, pid=pid)

    def forget(self) -> None:
        """In a fork: leaves all to the parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for end in (self.waked, self._wakes, *self.listeners.values(), *self.connections.values()):
            if end is not None:
                end.close()


def import_all(kind: str) -> None:
    for name in IMPORTS[kind].split():
        importlib.import_module(name)
    gc.freeze()


def tell(connection: socket.socket, **values) -> None:
    try:
        connection.sendall(json.dumps(values).encode() + b"\n")
    except OSError:  # nobody waits any more
        pass


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """The request and the descriptors of its standard streams. See `warm.start`."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big"))), streams


def become(request: dict, streams: list[int]) -> None:
    """Does what a new interpreter would do with the request, and ends."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(number, "rw"[number > 0], closefd=False) for number in range(3))
    sys.stderr.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code, script = request["code"], request["argv"][0]
    path = [folder for folder in request["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = ["" if code else str(Path(script).parent), *path, *SYSTEM_PATH]
    sys.argv[:] = request["argv"]
    for package in request["without"]:
        sys.modules[package] = None
    read_environment_again()
    importlib.invalidate_caches()
    os._exit(execute(code, script))


def read_environment_again() -> None:
    """The Hub's client and diffusers keep what they read at import: their constants, and copies of those."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith(("huggingface_hub", "diffusers.utils"))
    ]
    for name in ("huggingface_hub.constants", "diffusers.utils.constants"):
        constants = sys.modules[name]
        before = dict(vars(constants))
        importlib.reload(constants)
        changed = [key for key, value in before.items() if key.isupper() and vars(constants)[key] != value]
        for module in modules:
            for key in changed:
                if vars(module).get(key, None) == before[key]:
                    setattr(module, key, vars(constants)[key])
    sys.modules["huggingface_hub.hf_api"].api.endpoint = sys.modules["huggingface_hub.constants"].ENDPOINT


def execute(code: str | None, script: str) -> int:
    """Runs the code or the script as `__main__`; the return code."""
    try:
        if code:
            main = sys.modules["__main__"] = type(sys)("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        else:
            runpy.run_path(script, run_name="__main__")
        result = 0
    except SystemExit as ending:
        result = ending.code
        if result is not None and not isinstance(result, int):
            print(result, file=sys.stderr)
            result = 1
    except BaseException as error:
        traceback.print_exc()
        result = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return (result or 0) & 0xFF


def main() -> None:
    listeners = {kind: socket.socket(socket.AF_UNIX) for kind in IMPORTS}
    for kind, listener in listeners.items():
        listener.bind(str(Path(sys.argv[1]) / kind))
        listener.listen(64)
    print("listening", flush=True)
    Parent(listeners).serve()


if __name__ == "__main__":
    main()
