"""Start a deployment's processes from one that has imported what they all import: seconds saved each time, memory shared.

Torch, diffusers and transformers take some six seconds of a core to import, as often as a node is started. So a process
of its own imports them once and forks a child for each node. It must be one process, with one thread, that opens no
socket and touches no accelerator: that is all that can be forked. Where there is an accelerator nothing is forked.

    this process --- argv, environment, where to write ---> forker --- fork ---> python -m MODULE ...
                 <-- its process id; later, how it ended ---

No orphans: the forker ends when its socket closes, as it does when this process dies in whatever way, and the kernel kills
its children with it (`nodes.tether`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nodes.own_process import has_accelerator, ready_for_libraries
from nodes.tether import die_with

LARGEST = 1 << 17  # bytes of a message: an environment and some words
START_S = 120.0  # until a child has started, the imports before the first one included
GONE = -signal.SIGKILL  # how a child ended whose forker has: the kernel killed it


class Forked:
    """A child of the forker, with what of `subprocess.Popen` a supervisor needs. Its output, both streams, is `stdout`."""

    def __init__(self, stdout: Any):
        self.stdout = stdout
        self.pid = 0
        self.returncode: int | None = None
        self.started, self.ended = threading.Event(), threading.Event()
        self.given_up = False

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """subprocess.TimeoutExpired when it still runs."""
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def give_up(self) -> None:
        """Nobody waits for it to start: killed when it does, or now."""
        self.given_up = True
        self._send(signal.SIGKILL)

    def begin(self, pid: int) -> None:
        self.pid = pid
        self.started.set()
        if self.given_up:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.pid and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, code: int) -> None:
        self.returncode = code
        self.ended.set()
        self.started.set()


def forks(environment: Mapping[str, str]) -> bool:
    """Whether such a process may be forked rather than started anew: what the loader is told, it must be told first."""
    return sys.platform == "linux" and not has_accelerator() and not any(name.startswith("LD_") for name in environment)


def fork(name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """Start `python -m MODULE ...` in a process group of its own. `name`: how `top` shows it. OSError where it cannot be."""
    with _lock:
        for _ in range(2):  # a forker that was killed is replaced
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                return _forker().start(name, argv, environment)
            _forker.cache_clear()
    raise ProcessLookupError(errno.ESRCH, "the process that starts others was killed twice")


_lock = threading.Lock()


class _Forker:
    """This process's end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}  # a node sets its own
        with theirs:
            argv = [sys.executable, "-m", "nodes.forker", str(theirs.fileno())]
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, process_group=0
            )
        self._children: dict[int, Forked] = {}
        self._count = 0
        threading.Thread(target=self._listen, name="forker", daemon=True).start()

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Forked:
        reads, writes = os.pipe()
        child = Forked(os.fdopen(reads, "rb"))
        self._count += 1
        self._children[self._count] = child
        said = {
            "number": self._count, "name": name, "argv": list(argv), "environment": dict(environment),
            "folder": str(Path.cwd()),
        }  # fmt: skip
        try:
            socket.send_fds(self._socket, [json.dumps(said).encode()], [writes])
        finally:
            os.close(writes)
        if not child.started.wait(START_S):
            child.give_up()
            raise TimeoutError(errno.ETIMEDOUT, f"the process that starts others did not within {START_S:g} s")
        if not child.pid:
            raise BrokenPipeError
        return child

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(LARGEST)
            except OSError:
                data = b""
            if not data:
                break
            told = json.loads(data)
            child = self._children[told["number"]]
            if "code" in told:
                del self._children[told["number"]]
                child.end(told["code"])
            else:
                child.begin(told["pid"])
        self._process.wait()
        for child in list(self._children.values()):
            child.end(GONE)


@functools.cache
def _forker() -> _Forker:
    """One for all deployments of this process."""
    return _Forker()


# --- the forker itself ---


def preload() -> None:
    """What a node has imported when it has drawn its first picture."""
    ready_for_libraries()
    import diffusers
    import transformers

    for name in ("accelerate", "torch", "nodes.exchange", "nodes.node", "relay.denoisers.sd3", "relay.denoisers.sdxl",
                 "relay.pipeline"):  # fmt: skip
        importlib.import_module(name)
    for name in ("AutoencoderKL", "SD3Transformer2DModel", "UNet2DConditionModel", "EulerDiscreteScheduler",
                 "FlowMatchEulerDiscreteScheduler"):  # fmt: skip
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "T5EncoderModel"):
        getattr(transformers, name)


def serve(asking: socket.socket) -> None:
    """Fork what is asked for, tell of each child's end, until nobody is at the other side."""
    preload()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page that it shares
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    numbers: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([asking.fileno(), woken], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        if asking.fileno() in ready:
            data, files, _, _ = socket.recv_fds(asking, LARGEST, 1)
            if not data:
                os._exit(0)
            said = json.loads(data)
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (asking.detach(), woken, wakes):
                    os.close(each)
                _be(said, files[0])
            os.close(files[0])
            with contextlib.suppress(OSError):  # it did so first, or has ended
                os.setpgid(pid, pid)
            numbers[pid] = said["number"]
            _tell(asking, {"number": said["number"], "pid": pid})
        while numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            _tell(asking, {"number": numbers.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _tell(asking: socket.socket, told: dict[str, int]) -> None:
    try:
        asking.send(json.dumps(told).encode())
    except OSError:
        os._exit(0)


def _be(said: dict[str, Any], output: int) -> None:
    """This child becomes `python -m MODULE ...`; never returns."""
    code = 1
    try:
        die_with(os.getppid())
        os.setpgid(0, 0)
        with contextlib.suppress(OSError):  # a name for `top`, no more
            Path("/proc/self/comm").write_text(f"relay {said['name']}"[:15])
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        os.environ.clear()
        os.environ.update(said["environment"])
        os.chdir(said["folder"])
        _, _, module, *words = said["argv"]
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
