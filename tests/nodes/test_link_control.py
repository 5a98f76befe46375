"""How a link emulator is told: requests, addresses, the command line, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from test_supervise import ROOT, wait_gone

from nodes import cli
from nodes.link import Change, format_address, parse_address
from nodes.link_control import LinkControl, LinkProcess, LinkUnreachable
from relay.errors import BadRequest
from scheduler.links import LINKS


@pytest.fixture(scope="module")
def control():
    with LinkProcess(["127.0.0.1:9"], "wifi") as link:
        yield link.control


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"GET / HTTP/1.1", "malformed"),
        (b"{}", "`do`"),
        (b'{"do": "explode"}', "explode"),
        (b'{"do": "set", "change": {"bandwidth_bit_s": -1}}', "above 0"),
        (b'{"do": "set", "change": {"delay_s": 0.0, "jitter_s": 0.1}}', "jitter_s"),
        (b'{"do": "set", "change": {"colour": 1}}', "colour"),
        (b'{"do": "set", "change": {"direction": "sideways"}}', "sideways"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_a_bad_request_changes_nothing_and_is_answered(control, line, named):
    before = control.status().up.profile
    with socket.create_connection(parse_address(control.address), timeout=5) as sock:
        sock.sendall(line + b"\n")
        answer = json.loads(sock.makefile().readline())
    assert named in answer["error"]
    assert control.status().up.profile == before


def test_a_line_without_end_is_not_read_for_ever(control):
    with socket.create_connection(parse_address(control.address), timeout=5) as sock:
        with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012
            while True:
                sock.sendall(bytes(1 << 16))
        assert control.status().state == "open"


def test_a_change_is_all_or_nothing():
    change = Change(direction="both", bandwidth_bit_s=1.0, delay_s=-1.0)
    with pytest.raises(BadRequest, match="delay_s"):
        change.of(LINKS["wifi"])


def test_nobody_there_is_said_in_one_line():
    with pytest.raises(LinkUnreachable, match=r"no link answers at 127\.0\.0\.1:1: "):
        LinkControl("127.0.0.1:1").status()


@pytest.mark.parametrize("text", ["", "host", "host:", ":5", "host:x", "host:70000", "host:-1", "host:٣"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(BadRequest, match="is not HOST:PORT"):
        parse_address(text)


def test_addresses_are_read_as_they_are_written():
    assert parse_address("tcp://127.0.0.1:5555") == parse_address("127.0.0.1:5555") == ("127.0.0.1", 5555)
    assert parse_address("[::1]:80") == ("::1", 80)
    assert format_address(("::1", 80)) == "[::1]:80"


@pytest.fixture
def relay(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["relay", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_line_changes_a_link_over_a_unix_socket(relay, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("like: dsl\nscaled: {real_step_s: 0.3, mini_step_s: 0.01, source: a test}\n")
    argv = ["link", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", "--profile", profile, "--profile-up", "5g"]
    argv += ["--control", tmp_path / "control.sock"]
    running = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", *map(str, argv)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        said = [running.stdout.readline() for _ in range(5)]
        assert said[-1] == f"control {tmp_path / 'control.sock'}\n"
        assert "scaled, lambda = 30" in said[3]
        assert "5g: 50 Mbit/s" in said[2]
        code, out, _ = relay("link-set", tmp_path / "control.sock", "--stall", "--delay", 0.2, "--direction", "up")
        assert code == 0
        assert out.startswith("link stalled")
        assert "200 ms one way" in out
        status = json.loads(relay("link-set", tmp_path / "control.sock", "--json")[1])
        assert status["state"] == "stalled"
        assert status["up"]["profile"]["delay_s"] == 0.2
        assert (tmp_path / "control.sock").stat().st_mode & 0o077 == 0
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        assert not (tmp_path / "control.sock").exists()
    finally:
        running.kill()
        running.communicate()


BAD = [
    (["link", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", "--profile", "carrier-pigeon"], "unknown link"),
    (["link", "--listen", "127.0.0.1:0", "--profile", "wifi"], "--to"),
    (["link", "--listen", "a:1", "--listen", "b:2", "--to", "c:3", "--profile", "wifi"], "they go in pairs"),
    (["link", "--listen", "nowhere", "--to", "c:3", "--profile", "wifi"], "is not HOST:PORT"),
    (["link", "--listen", "192.0.2.1:5", "--to", "c:3", "--profile", "wifi"], "cannot listen on 192.0.2.1:5"),
    (
        ["link", "--listen", "127.0.0.1:0", "--to", "c:3", "--profile", "wifi", "--control", "0.0.0.0:0"],
        "loopback only",
    ),
    (["link", "--listen", "127.0.0.1:0", "--to", "c:3", "--profile", "wifi", "--control", "/proc/x/s"], "/proc/x/s"),
    (["link", "--listen", "127.0.0.1:0", "--to", "c:3", "--profile", "wifi", "--seed", "-1"], "--seed"),
    (["link-set", "127.0.0.1:1", "--stall"], "no link answers"),
    (["link-set", "127.0.0.1:1", "--stall", "--cut"], "exclude each other"),
    (["link-set", "127.0.0.1:1", "--profile", "pigeon"], "pigeon"),
    (["link-set", "127.0.0.1:1", "--delay", "soon"], "--delay"),
    (["link-set", "127.0.0.1:1", "--direction", "sideways"], "sideways"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(w)[:70] for w, _ in BAD])
def test_bad_input_gets_one_clear_line_and_a_non_zero_exit(relay, words, named):
    code, _, err = relay(*words)
    assert code == (1 if named == "no link answers" else 2)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_a_link_dies_with_the_process_that_started_it():
    code = (
        "from nodes.link_control import LinkProcess; import time\n"
        "print(LinkProcess(['127.0.0.1:9'], 'wifi').pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(owner.stdout.readline())
    os.kill(pid, 0)
    owner.kill()
    owner.communicate()
    wait_gone(pid)
