"""Processes forked from one that has imported torch: they run, end, are killed and leave no orphan like any other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodes import forker
from nodes.forker import GONE, fork, forks
from nodes.supervise import Child, Supervisor
from nodes.tether import tethered

ROOT = Path(__file__).parents[2]
RELAY = [sys.executable, "-m", "nodes.cli"]
LINK = [*RELAY, "link", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", "--profile", "wifi"]  # runs until it is told

pytestmark = pytest.mark.skipif(not forks({}), reason="nothing is forked where there is an accelerator")


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def until(what, timeout_s=20.0):
    ends = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.02)


def test_it_runs_the_command_and_says_how_it_ended():
    families = fork("test", [*RELAY, "families"], os.environ)
    said = families.stdout.read().decode()
    assert families.wait(20) == families.poll() == 0
    assert "mini-sd3" in said
    nobody = fork("test", [*RELAY, "show", "nothing.png"], os.environ)
    lines = nobody.stdout.read().decode().splitlines()
    assert nobody.wait(20) == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "nothing.png" in lines[0]


def test_it_has_its_own_environment_group_and_one_thread():
    environment = {key: value for key, value in os.environ.items() if key != "HOME"} | {"NO_COLOR": "1"}
    child = fork("link", LINK, environment)
    said = child.stdout.readline()
    assert said, "it has said where it listens"
    assert os.getpgid(child.pid) == child.pid
    assert Path(f"/proc/{child.pid}/comm").read_text() == "relay link\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    assert "libtorch" in Path(f"/proc/{child.pid}/maps").read_text()  # it was there before the command was
    child.terminate()
    assert child.wait(20) in (0, -signal.SIGTERM)
    assert not alive(child.pid)


def test_a_signal_that_kills_it_is_told_and_a_supervisor_starts_it_again():
    with Supervisor([Child("link", LINK, forked=True)], out=Path(os.devnull).open("w"), backoff_s=(0.01, 0.1)) as up:
        until(lambda: up.status()["link"].state == "ready")
        first = up.status()["link"].pid
        os.kill(first, signal.SIGKILL)
        until(lambda: up.status()["link"].restarts == 1 and up.status()["link"].pid not in (None, first))
        second = up.status()["link"].pid
        assert alive(second)
    assert not alive(second)


def test_none_outlives_the_process_that_asked_for_it():
    script = f"""
import os, time
from nodes.forker import fork
child = fork('link', {LINK!r}, os.environ)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
    asker = subprocess.Popen(tethered([sys.executable, "-c", script]), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(asker.stdout.readline())
    assert alive(pid)
    asker.kill()
    asker.communicate()
    until(lambda: not alive(pid))


def test_a_forker_that_is_killed_takes_its_children_along_and_is_replaced():
    child = fork("link", LINK, os.environ)
    child.stdout.readline()
    parent = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    os.kill(parent, signal.SIGKILL)
    assert child.wait(20) == GONE
    until(lambda: not alive(child.pid))
    again = fork("test", [*RELAY, "families"], os.environ)
    assert again.wait(60) == 0


def test_a_child_that_starts_after_all_when_nobody_waits_any_more_is_killed(monkeypatch):
    with Supervisor([Child("link", LINK, forked=True)], out=Path(os.devnull).open("w")) as up:
        until(lambda: up.status()["link"].state == "ready")
        parent = int(Path(f"/proc/{up.status()['link'].pid}/stat").read_text().rpartition(")")[2].split()[1])
        monkeypatch.setattr(forker, "START_S", 0.2)
        os.kill(parent, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError, match=r"0\.2 s"):
                fork("late", LINK, os.environ)
            [late] = [child for child in forker._forker()._children.values() if child.given_up]
        finally:
            os.kill(parent, signal.SIGCONT)
        assert late.wait(20) == -signal.SIGKILL
        assert late.pid
        assert not alive(late.pid)
        assert alive(up.status()["link"].pid)


def test_what_the_loader_is_told_cannot_be_told_to_a_fork():
    assert not forks({"LD_PRELOAD": "libfaketime.so.1"})
    assert forks({"RELAY_LOGS": "text"})
