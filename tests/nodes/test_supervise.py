"""The supervisor, with real processes that really die: restarts, giving up, stopping in order, and no orphan ever."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodes.supervise import Child, NotReady, Supervisor
from nodes.tether import tethered
from relay.errors import BadRequest

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from nodes.supervise import Child, Supervisor
children = [Child(name, [sys.executable, "-IS", "-c", code]) for name, code in json.loads(sys.argv[1]).items()]
sys.exit(Supervisor(children, **json.loads(sys.argv[2])).run())
"""
STAY = "import time; print('here', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAY
FAST = {"backoff_s": [0.01, 0.05], "deaths": 3, "stop_s": 5}


class Up:
    """A supervisor in a process of its own, and what it has printed."""

    def __init__(self, children, **options):
        argv = [sys.executable, "-c", RUN, json.dumps(children), json.dumps(FAST | options)]
        self.process = subprocess.Popen(
            tethered(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, process_group=0
        )
        self.lines = []

    def until(self, pattern):
        """Read lines until one holds `pattern`; the match."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in {self.lines}, stderr: {self.process.stderr.read()}")

    def end(self, number=None):
        """Send a signal, wait for the end; the exit code. The lines are complete after this."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        self.lines += out.splitlines()
        assert "Traceback" not in err, err
        return self.process.returncode


@pytest.fixture
def up():
    made = []

    def start(children, **options):
        made.append(Up(children, **options))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.communicate()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(*pids, limit_s=5.0):
    ends = time.monotonic() + limit_s
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < ends, f"{[pid for pid in pids if alive(pid)]} still run"
        time.sleep(0.02)


def says_pid(then=STAY):
    return f"import os; print('pid', os.getpid(), flush=True); {then}"


def test_lines_carry_the_name_of_their_process_and_no_colour_off_a_terminal(up):
    running = up(
        {
            "edge": "import sys; print('one'); print('two', file=sys.stderr)",
            "gateway": "import os; os.write(1, b'3 %\\r100 %\\xff\\n')",
        }
    )
    assert running.end() == 0
    assert {"edge    | one", "edge    | two", "gateway | 100 %\ufffd", "up      | edge has ended"} <= set(running.lines)
    assert "\x1b" not in "".join(running.lines)


def test_lines_are_coloured_on_a_terminal(up):
    leader, follower = pty.openpty()
    argv = [sys.executable, "-c", RUN, json.dumps({"edge": "print('one')"}), json.dumps(FAST)]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    subprocess.run(tethered(argv), stdout=follower, cwd=ROOT, env=environment, timeout=20, check=True)
    shown = os.read(leader, 4096)
    os.close(leader)
    os.close(follower)
    assert re.search(rb"\x1b\[\d+medge \|\x1b\[0m one", shown)


def test_what_dies_is_started_again_and_the_others_do_not_notice(up):
    running = up({"a": says_pid(), "b": STAY})
    first = int(running.until(r"a  \| pid (\d+)")[1])
    os.kill(first, signal.SIGKILL)
    running.until("a died, killed by SIGKILL; it is started again in 0.01 s")
    second = int(running.until(r"a  \| pid (\d+)")[1])
    assert second != first
    assert running.end(signal.SIGINT) == 0
    assert sum("here" in line and line.startswith("b") for line in running.lines) == 1
    wait_gone(second)


def test_what_dies_again_and_again_is_given_up_on_by_name_and_the_others_go_on(up):
    running = up({"bad": "raise SystemExit(3)", "good": STAY})
    running.until("bad is given up on: died 3 times within 60 s, the last time with exit code 3")
    assert running.process.poll() is None
    assert running.end(signal.SIGTERM) == 1
    assert sum("bad died" in line for line in running.lines) == 2
    assert running.lines[-1].startswith("up   | bad failed: died 3 times")


def test_it_ends_when_all_its_children_have_ended(up):
    assert up({"bad": "raise SystemExit(3)", "good": "pass"}).end() == 1
    assert up({"good": "pass"}).end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_asks_each_child_and_waits_for_it(up, number):
    polite = (
        "import os, signal, time\n"
        "def bye(*_): time.sleep(0.3); os.write(1, b'handed on\\n'); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, bye); signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "print('here', flush=True); time.sleep(600)"
    )
    running = up({"a": polite, "b": polite})
    running.until("here")
    running.until("here")
    assert running.end(number) == 0
    assert {"a  | handed on", "b  | handed on"} <= set(running.lines)


def test_a_child_that_does_not_stop_is_killed_named_and_a_failure(up):
    running = up({"deaf": says_pid(DEAF), "b": STAY}, stop_s=0.5)
    pid = int(running.until(r"pid (\d+)")[1])
    running.until(r"deaf \| here")
    assert running.end(signal.SIGTERM) == 1
    assert re.search(r"deaf failed: killed, it still ran 0.\d s after SIGTERM", "\n".join(running.lines))
    wait_gone(pid)


def test_a_second_ctrl_c_kills_at_once_but_not_one_that_came_with_the_first(up):
    running = up({"deaf": says_pid(DEAF)}, stop_s=60)
    pid = int(running.until(r"pid (\d+)")[1])
    running.until("here")
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    running.process.send_signal(signal.SIGINT)
    time.sleep(1.1)
    assert alive(pid)
    assert running.end(signal.SIGINT) == 1
    wait_gone(pid)


def test_no_child_outlives_a_supervisor_that_is_killed(up):
    running = up({"a": says_pid(), "deaf": says_pid(DEAF)})
    pids = [int(running.until(r"pid (\d+)")[1]) for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    running.process.kill()
    wait_gone(*pids)


def test_what_a_child_left_behind_is_killed_with_it(up):
    leaves = (
        "import subprocess, sys, os\n"
        f"p = subprocess.Popen([sys.executable, '-c', {STAY!r}])\n"
        "print('pid', p.pid, flush=True); os._exit(0)"
    )
    running = up({"a": leaves, "b": STAY})
    pid = int(running.until(r"pid (\d+)")[1])
    running.until("a has ended")
    wait_gone(pid)


def test_it_stops_when_nobody_reads_its_lines(up):
    running = up({"a": says_pid("import time\nwhile True: print('more', flush=True); time.sleep(0.01)")})
    pid = int(running.until(r"pid (\d+)")[1])
    running.process.stdout.close()
    assert running.process.wait(20) == 0
    wait_gone(pid)


def child(name, code, **options):
    return Child(name, [sys.executable, "-IS", "-c", code], **options)


def test_ready_is_asked_until_it_says_yes_and_again_after_a_restart(tmp_path, capsys):
    mark = tmp_path / "mark"
    code = f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(mark)!r}).touch(); time.sleep(600)"

    def ready():
        if not mark.exists():
            raise ConnectionRefusedError("what it asks may fail")
        return True

    with Supervisor(
        [child("a", code, ready=ready), child("b", STAY)], backoff_s=(0.01, 0.1), out=sys.stdout
    ) as running:
        running.wait_ready(15)
        assert mark.exists()
        before = running.status()["a"]
        assert (before.state, before.restarts) == ("ready", 0)
        mark.unlink()
        os.kill(before.pid, signal.SIGKILL)
        wait_gone(before.pid)
        while running.status()["a"].restarts == 0:
            time.sleep(0.01)
        assert running.status()["a"].state == "starting"
        running.wait_ready(15)
        assert running.status()["a"].pid != before.pid
    assert running.status()["a"].state == "ended"
    assert re.search(r"a is ready after 0\.\d s", capsys.readouterr().out)


def test_what_does_not_get_ready_is_named_with_its_last_words():
    bad = child("bad", "raise SystemExit('no weights at /there')", restart=False, ready=lambda: False)
    with (
        Supervisor([bad, child("b", STAY)]) as running,
        pytest.raises(NotReady, match=r"bad failed .*no weights at /there"),
    ):
        running.wait_ready(15)
    with (
        Supervisor([child("slow", STAY, ready=lambda: False)]) as running,
        pytest.raises(NotReady, match=r"not ready after 0\.5 s: slow starting"),
    ):
        running.wait_ready(0.5)


def test_environment_is_on_top_of_ours(capsys, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    code = "import os; print(os.environ['OURS'], os.environ['THEIRS'])"
    running = Supervisor([child("a", code, env={"THEIRS": "2"})], out=sys.stdout)
    assert running.run() == 0
    assert "a  | 1 2" in capsys.readouterr().out


def test_bad_children_are_refused_before_anything_is_started():
    with pytest.raises(BadRequest, match="two children are called a"):
        Supervisor([child("a", STAY), child("a", STAY)])
    with pytest.raises(BadRequest, match="a: there is no program 'frobnicate'"):
        Supervisor([Child("a", ["frobnicate"])])


def test_a_tethered_command_that_cannot_be_run_says_so_in_one_line():
    done = subprocess.run(tethered(["/nowhere/at/all"]), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 127
    assert done.stderr == "error: /nowhere/at/all: No such file or directory\n"
