"""`relay doctor --peer` against real servers: what is wrong is said in one line, each cause by itself."""

import asyncio
import contextlib
import struct
import sys
import threading

import pytest
import zmq

from nodes import cli, messages
from nodes.keys import AllowList, Credentials, load_secret, write_keys
from nodes.messages import encode
from nodes.transport import CONTROL, DATA, Server


@pytest.fixture
def keys(tmp_path):
    for name, role in (("gw", "gateway"), ("edge-1", "edge"), ("other", "gateway")):
        write_keys(name, role, tmp_path)
    return tmp_path


@pytest.fixture
def doctor(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["relay", "doctor", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@contextlib.contextmanager
def serving(server):
    """A server in a thread and loop of its own; gives its address."""
    started, loop = threading.Event(), asyncio.new_event_loop()

    async def serve():
        async with server:
            started.set()
            with contextlib.suppress(asyncio.CancelledError):
                await server.receive()

    task = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_until_complete, args=[task])
    thread.start()
    assert started.wait(10)
    try:
        yield server.address
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def with_keys(keys, lane=CONTROL):
    return Server("tcp://127.0.0.1:*", lane, load_secret(keys / "gw.key"), AllowList(keys))


@pytest.mark.parametrize("lane", [CONTROL, DATA], ids=lambda lane: lane.name)
def test_a_good_peer_shows_name_version_round_trip_and_throughput(doctor, keys, lane):
    with serving(with_keys(keys, lane)) as address:
        code, out, err = doctor("--peer", address, "--key", keys / "edge-1.key", "--peer-key", keys / "gw.pub")
    assert (code, err) == (0, "")
    peer, trip, throughput = out.splitlines()
    assert peer.startswith("peer ")
    assert "gw, version" in peer
    assert "edge edge-1" in peer
    assert " ms, median of 10" in trip
    assert "MB/s, 1 MiB there and back" in throughput


def test_plain_text_on_loopback_needs_no_key(doctor):
    with serving(Server("tcp://127.0.0.1:*", CONTROL, Credentials.plain_text("gw", "gateway"))) as address:
        code, out, _ = doctor("--peer", address)
    assert code == 0
    assert "nothing is proved" in out


def test_each_cause_has_its_own_line_and_exit_code_1(doctor, keys):
    how = ["--key", keys / "edge-1.key", "--peer-key"]
    with serving(with_keys(keys)) as address:
        wrong_key = doctor("--peer", address, *how, keys / "other.pub")
        no_key = doctor("--peer", address)
        (keys / "edge-1.pub").rename(keys / "edge-1.was")
        unknown = doctor("--peer", address, *how, keys / "gw.pub")
    nobody = doctor("--peer", address, *how, keys / "gw.pub")
    with foreign(keys) as address:
        version = doctor("--peer", address, *how, keys / "gw.pub")
    causes = {
        "does not hold the key that this node has for other": wrong_key,
        "wants keys and this node has none": no_key,
        "does not let the key": unknown,
        "nobody listens": nobody,
        "speaks version 2.0": version,
    }
    for words, (code, out, err) in causes.items():
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert words in err
        assert sum(other in err for other in causes) == 1


@contextlib.contextmanager
def foreign(keys):
    """A node of the next major version."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger, socket.rcvtimeo = 0, 100
    socket.curve_server, socket.curve_secretkey = True, load_secret(keys / "gw.key").secret.encode()
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    over = threading.Event()
    head = struct.pack("<5sHH", messages.MAGIC, messages.MAJOR + 1, 0)

    def serve():
        while not over.is_set():
            with contextlib.suppress(zmq.Again):
                routing_id, *_ = socket.recv_multipart()
                probed = messages.Probed(sequence=0, name="gw", version="2")
                socket.send_multipart([routing_id, head, *encode(probed)[1:]])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        over.set()
        thread.join()
        socket.close()
        context.term()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--peer", "tcp://127.0.0.1:5", "--key", "x"], "go together"),
        (["--peer", "127.0.0.1:5"], "no address"),
        (["--peer", "tcp://10.1.2.3:5"], "not on loopback"),
        (["--peer", "tcp://127.0.0.1:5", "--family", "mini-sd3"], "one at a time"),
        (["--peer-key", "x"], "--peer"),
    ],
)
def test_what_cannot_be_asked_is_refused(doctor, words, complaint):
    code, _, err = doctor(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert complaint in err
