"""The supervisor: several processes as one command. What `relay up` runs.

One thread a child starts it, waits for its end and starts it again; another reads its lines. A child that dies (by a
signal, or with a code other than 0) is started again after a pause that doubles; one that dies `deaths` times within
`window_s` is given up on and named, and the others go on. A child that ends with 0 has ended of itself and stays ended.

No orphans: a child leads a process group, so that Ctrl-C reaches only the supervisor, which then stops them in order,
and so that what a child left behind is killed with its group. When the supervisor itself is killed with SIGKILL, the
kernel kills the children (`nodes.tether`): a thread that starts a child lives as long as the child.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TextIO

from nodes.forker import Forked, fork, forks
from nodes.tether import tethered
from relay.errors import BadRequest, RelayError

Process = subprocess.Popen[bytes] | Forked
State = Literal["starting", "ready", "pausing", "ended", "failed"]
LINE = 1 << 16  # bytes; a longer line is shown in pieces
READY_EVERY_S = 0.1
SECOND_S = 1.0  # a Ctrl-C that comes later than this after the first kills at once
STOPPED = (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # how a stopped process ends
COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    argv: the program and its arguments. env: on top of this process's. ready: says whether it can be used, asked every
    `READY_EVERY_S` from its start until it says yes; an error of its own means no; None: it is ready once started.
    forked: argv is `python -m MODULE ...` of a process that runs members, which start faster from `nodes.forker`.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    restart: bool = True
    forked: bool = False


class ChildStatus(NamedTuple):
    """How a child is: its state, its process id while it runs, and how often it was started again."""

    state: State
    pid: int | None
    restarts: int


class NotReady(RelayError):
    """Children that cannot be used, and why."""


class Supervisor:
    """Keeps children running: `run()` in the foreground until Ctrl-C or SIGTERM, or `with Supervisor(...) as up:`.

    stop_s: how long a child may take to end after SIGTERM before it is killed. backoff_s: the first pause and the
    longest. BadRequest if two children have one name or a program does not exist.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        out: TextIO | None = None,
        stop_s: float = 15.0,
        deaths: int = 5,
        window_s: float = 60.0,
        backoff_s: tuple[float, float] = (0.25, 10.0),
    ):
        names = [child.name for child in children]
        if twice := {name for name in names if names.count(name) > 1}:
            raise BadRequest(f"two children are called {', '.join(sorted(twice))}")
        for child in children:
            if not shutil.which(child.argv[0]):
                raise BadRequest(f"{child.name}: there is no program {child.argv[0]!r}")
        self._stop_s = stop_s
        # SimpleQueue: the one queue whose put() may be called in a signal handler
        self._events: queue.SimpleQueue[Literal["stop", "over"]] = queue.SimpleQueue()
        log = _Log(out or sys.stdout, ["up", *names], lambda: self._events.put("stop"))
        self._say = partial(log.line, "up")
        self._shared = _Shared(log, deaths, window_s, backoff_s, lambda: self._events.put("over"))
        self._keepers = [_Keeper(child, self._shared) for child in children]

    def start(self) -> None:
        """Start all of them."""
        for keeper in self._keepers:
            keeper.start()

    def run(self) -> int:
        """Start, keep running until SIGTERM, Ctrl-C or the end of all, stop; the exit code, 1 if something failed.

        A second Ctrl-C kills at once. In the main thread only: that is where signals arrive.
        """
        before = {number: signal.signal(number, self._asked_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start()
            while self._alive() and self._events.get() != "stop":
                pass
            return self.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> int:
        """SIGTERM to each, SIGKILL to those that still run after `stop_s`; 1 if something failed, else 0."""
        began = time.monotonic()
        self._shared.stopping.set()
        for keeper in self._keepers:
            keeper.terminate()
        while self._alive() and (left := began + self._stop_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                # wrappers pass a Ctrl-C on that reached us already: only a later one is a person's second
                if self._events.get(timeout=left) == "stop" and time.monotonic() > began + SECOND_S:
                    break
        for keeper in self._alive():
            keeper.kill(f"killed, it still ran {time.monotonic() - began:.1f} s after SIGTERM")
        for keeper in self._keepers:
            keeper.join()
        failed = [keeper for keeper in self._keepers if keeper.state == "failed"]
        for keeper in failed:
            self._say(f"{keeper.child.name} failed: {keeper.reason}")
        return int(bool(failed))

    def wait_ready(self, timeout_s: float) -> None:
        """Until all are ready; NotReady, with each one's last line, if one fails or time is up."""
        ends = time.monotonic() + timeout_s
        with self._shared.changed:
            while waiting := [keeper for keeper in self._keepers if keeper.state != "ready"]:
                gone = [keeper for keeper in waiting if keeper.state in ("ended", "failed")]
                left = ends - time.monotonic()
                if gone or left <= 0:
                    why = "; ".join(keeper.describe() for keeper in gone or waiting)
                    raise NotReady(why if gone else f"not ready after {timeout_s:g} s: {why}")
                self._shared.changed.wait(left)

    def status(self) -> dict[str, ChildStatus]:
        """How each child is, by name."""
        return {keeper.child.name: keeper.status() for keeper in self._keepers}

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _alive(self) -> list[_Keeper]:
        return [keeper for keeper in self._keepers if not keeper.over]

    def _asked_to_stop(self, number: int, frame: Any) -> None:
        self._events.put("stop")


class _Shared:
    """What the keepers of one supervisor share."""

    def __init__(
        self, log: _Log, deaths: int, window_s: float, backoff_s: tuple[float, float], over: Callable[[], None]
    ):
        self.log, self.deaths, self.window_s, self.backoff_s, self.over = log, deaths, window_s, backoff_s, over
        self.stopping = threading.Event()
        self.changed = threading.Condition()  # some child's state


class _Keeper(threading.Thread):
    """Keeps one child running."""

    def __init__(self, child: Child, shared: _Shared):
        super().__init__(name=f"keep {child.name}", daemon=True)
        self.child = child
        self.state: State = "starting"
        self.reason = self.last_line = ""
        self.over = False
        self._shared = shared
        self._say = partial(shared.log.line, "up")
        self._starts = 0
        self._deaths: deque[float] = deque()
        self._lock = threading.Lock()  # held while it is started, so that no start slips past `terminate`
        self._process: Process | None = None

    def run(self) -> None:
        try:
            while self._start() and self._again(self._live()):
                pass
        finally:
            self.over = True
            self._shared.over()

    def terminate(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.terminate()

    def kill(self, reason: str) -> None:
        self.reason = reason
        if self._process is not None:
            _kill_group(self._process.pid)

    def status(self) -> ChildStatus:
        pid = self._process.pid if self._process is not None and self._process.returncode is None else None
        return ChildStatus(self.state, pid, max(0, self._starts - 1))

    def describe(self) -> str:
        """One line for an error."""
        said = f", last line: {self.last_line}" if self.last_line else ""
        return f"{self.child.name} {self.state}" + (f" ({self.reason})" if self.reason else "") + said

    def _start(self) -> bool:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.child.env)
        with self._lock:
            if self._shared.stopping.is_set():
                self._become("ended")
                return False
            try:
                self._process = _begin(self.child, environment)
            except OSError as error:  # no memory or no process to be had
                self.reason = f"cannot be started: {error.strerror}"
                self._become("failed")
                return False
        self._starts += 1
        self._become("starting")
        return True

    def _live(self) -> int:
        """From the start of the process to its end; its exit code."""
        assert self._process is not None
        reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        reader.start()
        self._wait_ready(self._process)
        code = self._process.wait()
        _kill_group(self._process.pid)  # what it left behind, which also holds its output open
        reader.join(1.0)  # one that left the group may hold the output for ever
        return code

    def _wait_ready(self, process: Process) -> None:
        began = time.monotonic()
        while self.child.ready is not None and process.poll() is None:
            with contextlib.suppress(Exception):  # whatever it asked did not answer
                if self.child.ready():
                    self._say(f"{self.child.name} is ready after {time.monotonic() - began:.1f} s")
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(READY_EVERY_S)
        if process.poll() is None:
            self._become("ready")

    def _again(self, code: int) -> bool:
        """Whether to start it again, after the pause that is due."""
        name, (first_s, longest_s) = self.child.name, self._shared.backoff_s
        if self._shared.stopping.is_set():
            clean = code in STOPPED and not self.reason.startswith("killed")
            self.reason = "" if clean else self.reason or f"{_describe(code)} while it was stopped"
            self._become("ended" if clean else "failed")
            return False
        if code == 0:
            self._say(f"{name} has ended")
            self._become("ended")
            return False
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._shared.window_s:
            self._deaths.popleft()
        count = len(self._deaths)
        if not self.child.restart or count >= self._shared.deaths:
            self.reason = _describe(code)
            if self.child.restart:
                self.reason = f"died {count} times within {self._shared.window_s:g} s, the last time {_describe(code)}"
            self._say(f"{name} is given up on: {self.reason}")
            self._become("failed")
            return False
        pause = min(longest_s, first_s * 2 ** (count - 1))
        self._say(f"{name} died, {_describe(code)}; it is started again in {pause:g} s")
        self._become("pausing")
        self._shared.stopping.wait(pause)
        return True

    def _read(self, lines: Any) -> None:
        with lines:
            while line := lines.readline(LINE):
                # of a line that was drawn over again and again, what a terminal would show at last
                self.last_line = line.decode(errors="replace").rstrip().rpartition("\r")[2]
                self._shared.log.line(self.child.name, self.last_line)

    def _become(self, state: State) -> None:
        with self._shared.changed:
            self.state = state
            self._shared.changed.notify_all()


def _begin(child: Child, environment: Mapping[str, str]) -> Process:
    if child.forked and forks(environment):
        return fork(child.name, child.argv, environment)
    return subprocess.Popen(
        tethered(child.argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment, process_group=0,
    )  # fmt: skip


class _Log:
    """Whole lines of several processes on one stream, each with its name before it, coloured on a terminal."""

    def __init__(self, out: TextIO, names: Sequence[str], gone: Callable[[], None]):
        self._out, self._gone = out, gone
        self._lock = threading.Lock()
        width = max(len(name) for name in names)
        colour = out.isatty() and "NO_COLOR" not in os.environ
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        self._prefix = {
            name: f"\033[{colours[name]}m{name:<{width}} |\033[0m " if colour else f"{name:<{width}} | "
            for name in names
        }

    def line(self, name: str, text: str) -> None:
        """One line; when nobody reads the stream any more, that is said once and the line is dropped."""
        try:
            with self._lock:
                self._out.write(f"{self._prefix[name]}{text}\n")
                self._out.flush()
        except (OSError, ValueError):
            self._gone()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _describe(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    names = [each.name for each in signal.Signals if each == -code]
    return f"killed by {names[0] if names else f'signal {-code}'}"
