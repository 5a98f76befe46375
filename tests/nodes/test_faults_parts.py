"""What the fault suite stands on: its schedule, clocks, disks and strangers do what they say, and what they found is mended."""

import asyncio
import os
import random
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest

from experiments.faults import clock, strangers
from experiments.faults.clock import MISSING, Clocks
from experiments.faults.deck import DECK, schedule
from experiments.faults.disk import SmallDisk
from nodes.exchange import Exchange
from nodes.gateway import ledger as ledger_module
from nodes.gateway.ledger import Ledger
from nodes.gateway.registry import Registry
from nodes.gateway.retention import _remove
from nodes.gateway.spaces import Claim, foreign
from nodes.keys import Credentials, Peer
from nodes.messages import MessageRefused, Refused, Register, Result, Seen, decode
from nodes.transport import DATA, Client, Meter, Server

NODES, CLOCKS = ("edge-1", "edge-2", "phone"), ("gateway", "phone")


def test_a_seed_fixes_the_faults_and_every_round_has_all_kinds():
    first = list(islice(schedule(3, 2.0, NODES, CLOCKS), 2 * len(DECK)))
    assert first == list(islice(schedule(3, 2.0, NODES, CLOCKS), 2 * len(DECK)))
    assert first != list(islice(schedule(4, 2.0, NODES, CLOCKS), 2 * len(DECK)))
    for of_a_round in (first[: len(DECK)], first[len(DECK) :]):
        assert sorted(fault.kind for fault in of_a_round) == sorted(DECK)


# --- clocks ---


@pytest.mark.skipif(clock.library() is None, reason=MISSING)
def test_a_clock_jumps_in_its_own_process_and_the_monotonic_one_does_not(tmp_path):
    clocks = Clocks(tmp_path / "clocks", ("gateway", "phone"))
    script = "import sys, time\nwhile sys.stdin.readline(): print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | clocks.environment()["phone"],
    ) as child:  # fmt: skip

        def look():
            child.stdin.write("\n")
            child.stdin.flush()
            wall, monotonic = map(float, child.stdout.readline().split())
            return wall - time.time(), monotonic - time.monotonic()

        before = look()
        clocks.jump("gateway", 5000)
        clocks.jump("phone", -7200)
        time.sleep(2.2)  # it looks once a second
        look()
        after = look()
        child.stdin.close()
    clocks.close()
    assert abs(before[0]) < 60
    assert after[0] == pytest.approx(-7200, abs=60)
    assert after[1] == pytest.approx(before[1], abs=60)


def accepted(path):
    """A ledger that has taken one request and was closed; opened again by the test."""
    ledger = Ledger(path)

    async def work():
        await ledger.accept("req_1", "local", None, {"prompt": "a red circle"}, [("job_1", 1)])

    asyncio.run(work())
    ledger.close()


@pytest.mark.parametrize("jump", [-36_000.0, 36_000.0])
def test_a_wall_clock_that_jumps_moves_no_deadline_of_a_restarted_gateway(tmp_path, monkeypatch, jump):
    accepted(tmp_path / "ledger.db")
    real = time.time
    monkeypatch.setattr(ledger_module.time, "time", lambda: real() + jump)
    assert 0 <= Ledger(tmp_path / "ledger.db").open_jobs()[0].waited_s < 600
    monkeypatch.setattr(ledger_module, "_machine_boot", lambda: "another boot: its monotonic clock began anew")
    waited = Ledger(tmp_path / "ledger.db").open_jobs()[0].waited_s
    assert waited == pytest.approx(max(jump, 0.0), abs=600)  # never below 0, which would give it time


def test_a_ledger_of_before_is_taken_up(tmp_path):
    import sqlite3

    accepted(tmp_path / "ledger.db")
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("ALTER TABLE requests DROP COLUMN machine_boot")
        db.execute("ALTER TABLE requests DROP COLUMN monotonic_s")
    assert 0 <= Ledger(tmp_path / "ledger.db").open_jobs()[0].waited_s < 600


# --- what was found ---


@asynccontextmanager
async def posting():
    """A gateway's data socket, and the exchange of a device that posts to it: (server, exchange, its task)."""
    async with Server("tcp://127.0.0.1:*", DATA, Credentials.plain_text("gateway", "gateway")) as server:
        peer = Peer(name="gateway", role="gateway")
        async with Client(server.address, DATA, Credentials.plain_text("phone", "device"), peer) as client:
            exchange = Exchange(client, server.address, lambda *_: client, None)
            task = asyncio.ensure_future(exchange.post())
            yield server, exchange, task
            assert not task.done()
            task.cancel()
            await exchange.close()


def picture(job):
    return Result(job=job, attempt=1, width=8, height=8, report={}), [bytes(4000)]


def test_a_result_that_is_called_off_while_it_is_sent_ends_no_node():
    async def work():
        async with posting() as (server, exchange, _):
            exchange.deliver(*picture("job_1"))
            assert (await server.receive(10)).message.job == "job_1"  # which never says that it has it
            exchange.release("job_1")
            exchange.deliver(*picture("job_2"))
            assert (await server.receive(10)).message.job == "job_2"

    asyncio.run(work())


def test_a_result_that_is_refused_for_now_comes_again_without_its_time_out():
    async def work():
        async with posting() as (server, exchange, _):
            exchange.gateway.meter._s_per_byte = 1.0  # a time-out of hours
            exchange.deliver(*picture("job_1"))
            for _ in range(2):
                identity, _, message, _ = await server.receive(10)
                full = Refused(what="result", job=message.job, reason="the disk is full", status=507)
                await server.send(identity, full)
            identity, _, message, _ = await server.receive(10)
            await server.send(identity, Seen(job=message.job, attempt=1, what="result"))
            while exchange.results:
                await asyncio.sleep(0.01)

    asyncio.run(work())


def test_a_result_that_went_with_its_connection_is_sent_again_on_the_next_one():
    async def work():
        async with posting() as (server, exchange, _):
            exchange.gateway.meter._s_per_byte = 1.0
            exchange.deliver(*picture("job_1"))
            await server.receive(10)
            exchange.gateway.reconnect("as if it had been cut")
            assert (await server.receive(10)).message.job == "job_1"

    asyncio.run(work())


def test_a_line_that_was_given_up_on_is_not_slow_for_ever():
    meter, (result, _) = Meter(), picture("job_1")
    before = meter.timeout_for(4000)
    for _ in range(3):
        meter.sent(result, 4000)
        meter._pending = {key: (begun - 60, size) for key, (begun, size) in meter._pending.items()}
        meter.gave_up(result)
    assert meter.timeout_for(4000) > 100
    meter.sent(result, 4000)
    meter.received(
        Seen(job="job_1", attempt=1, what="result"), 50
    )  # at once; so small that it says little of a throughput
    assert meter.timeout_for(4000) <= before


def test_a_picture_whose_end_is_written_while_strays_are_swept_stays_whatever_the_clock_says(tmp_path, monkeypatch):
    accepted(tmp_path / "ledger.db")
    ledger = Ledger(tmp_path / "ledger.db")
    (tmp_path / "images").mkdir()
    for name in ("job_1.png", "stray.png"):
        (tmp_path / "images" / name).write_bytes(b"png")
        os.utime(tmp_path / "images" / name, (0, 0))  # as a clock that jumped ahead sees them
    real = Path.iterdir

    async def end():
        await ledger.end("job_1", "done", image="images/job_1.png")

    def meanwhile(folder):
        asyncio.run(end())
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    _remove(ledger, tmp_path, [])
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["job_1.png"]


def test_a_node_that_could_not_be_told_gets_nothing_until_it_is_heard_again():
    registry = Registry(heartbeat_s=60.0)
    node = registry.register(Register(name="phone", session="s", holdings=(), batch=1, queue=1), "device", "k", b"id")
    assert registry.ready() == [node]
    node.out_of_reach = True
    assert registry.ready() == []
    assert registry.alive(node)  # what it works on may yet come
    registry.heard(node)
    assert registry.ready() == [node]


# --- disks ---


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_takes_nothing_until_there_is_room(tmp_path, kind):
    try:
        disk = SmallDisk(tmp_path / "small", size=1 << 20, kind=kind).__enter__()
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    script = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        with open(sys.argv[1], 'ab', buffering=0) as file: print(file.write(bytes(8192)), flush=True)\n"
        "    except OSError as error: print(error.strerror, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "small" / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:  # fmt: skip

        def write():
            child.stdin.write("\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        try:
            assert write() == "8192"
            disk.fill(child.pid)
            assert write() == {"tmpfs": "No space left on device", "limit": "File too large"}[kind]
            disk.empty()
            assert write() == "8192"
        finally:
            child.stdin.close()
            child.wait()
            disk.__exit__()
    assert not (tmp_path / "small" / "f").exists() or kind == "limit"


# --- strangers ---


def test_corrupted_messages_are_refused_or_harmless_and_most_are_refused():
    refused = 0
    for frames in strangers.corruptions(random.Random(0), 500):
        try:
            decode(frames)
        except MessageRefused:
            refused += 1
    assert refused > 250


FINGERPRINT = {
    "channels": 4, "factor": 2, "scaling": 1.0, "shift": 0.0, "parameterisation": "flow", "thumbnail": (0.5,) * 192,
}  # fmt: skip
OTHER = FINGERPRINT | {"thumbnail": (-0.5,) * 192}


def test_of_two_latent_spaces_under_one_name_the_edges_is_the_familys():
    near = FINGERPRINT | {"thumbnail": (0.5001,) * 192}  # the same VAE on another machine
    claims = [Claim("impostor", False, OTHER), Claim("phone", False, near), Claim("edge", True, FINGERPRINT)]
    assert foreign(claims[1:]) == {}
    assert list(foreign(claims)) == ["impostor"]
    assert "another VAE" in foreign(claims)["impostor"]
    assert list(foreign([*claims, Claim("tablet", False, OTHER)])) == ["impostor", "tablet"]
    assert list(foreign([*claims, Claim("nothing", False, {})])) == ["impostor", "nothing"]
