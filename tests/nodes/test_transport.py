"""Servers and clients over real sockets on loopback, with real keys."""

import asyncio
import contextlib
import functools
import gc
import shutil
import struct

import pytest
import zmq
import zmq.asyncio

from nodes import messages
from nodes.keys import AllowList, Credentials, Peer, load_public, load_secret, write_keys
from nodes.messages import (
    Ask,
    Assign,
    Checkpoint,
    Embeddings,
    Fetch,
    Heartbeat,
    HeartbeatSeen,
    Latent,
    MessageRefused,
    Probe,
    Probed,
    Refused,
    Result,
    Source,
    Told,
    encode,
    seen_of,
)
from nodes.transport import (
    CONNECTED,
    CONNECTING,
    CONTROL,
    DATA,
    REFUSED,
    UNREACHABLE,
    Client,
    Meter,
    PeerGone,
    PeerSlow,
    Server,
)
from nodes.transport.diagnosis import Unreachable, greeting
from nodes.transport.lanes import is_loopback
from nodes.transport.server import DIGEST
from relay.errors import BadRequest, RelayError

ANY = "tcp://127.0.0.1:*"
LIMIT_S = 10.0  # nothing here takes long unless it hangs


def in_loop(test):
    """Run a coroutine test; what hangs fails."""

    @functools.wraps(test)
    def run(*given, **named):
        asyncio.run(asyncio.wait_for(test(*given, **named), 2 * LIMIT_S))

    return run


class Keys:
    """Keys in a folder, and those of them that are listed in another."""

    def __init__(self, folder):
        self.all, self.listed = folder / "all", folder / "listed"
        self.listed.mkdir()

    def make(self, name, role, listed=True):
        write_keys(name, role, self.all)
        if listed:
            self.list(name)
        return load_secret(self.all / f"{name}.key")

    def list(self, name):
        shutil.copy(self.all / f"{name}.pub", self.listed)

    def revoke(self, name):
        (self.listed / f"{name}.pub").unlink()

    def public(self, name):
        return load_public(self.all / f"{name}.pub")

    def server(self, lane=CONTROL, name="gw", role="gateway", address=ANY):
        if not (self.all / f"{name}.key").exists():
            self.make(name, role)
        return Server(address, lane, load_secret(self.all / f"{name}.key"), AllowList(self.listed))

    def client(self, server, name, role="edge", listed=True):
        path = self.all / f"{name}.key"
        me = load_secret(path) if path.exists() else self.make(name, role, listed)
        return Client(server.address, server.lane, me, self.public(server.me.name))


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setattr("nodes.keys.LOOK_EVERY_S", 0.05)
    return Keys(tmp_path)


def beat(sequence=0):
    return Heartbeat(sequence=sequence, doing="idle", running=0, queued=0, steps_done=0, idle_s=0.0)


def latent(job="j", leg=1):
    return Latent(job=job, attempt=0, leg=leg)


async def answer(client, kind):
    message, _ = await client.receive(LIMIT_S)
    assert isinstance(message, kind), message
    return message


async def eventually(condition):
    while not condition():
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def raw_dealer(address, me=None, server=None, routing_id=None):
    """A peer that keeps to no rule of ours; with keys, or in plain text."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if routing_id:
        socket.routing_id = routing_id
    if me is not None and me.secret:
        socket.curve_serverkey = server.public.encode()
        socket.curve_publickey, socket.curve_secretkey = me.public.encode(), me.secret.encode()
    else:
        socket.plain_username, socket.plain_password = f"{me.role}/{me.name}".encode(), b"none"
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


# --- who is who ---


@in_loop
async def test_a_message_comes_with_the_peer_that_its_key_proves(keys):
    async with keys.server() as server, keys.client(server, "edge-1") as client:
        await client.send(beat(7))
        identity, peer, message, payloads = await server.receive(LIMIT_S)
        assert (peer, message, payloads) == (keys.public("edge-1"), beat(7), [])
        assert server.peer(identity) == peer
        await server.send(identity, HeartbeatSeen(sequence=7))
        assert await answer(client, HeartbeatSeen) == HeartbeatSeen(sequence=7)
        assert client.state.kind == CONNECTED


@in_loop
async def test_an_unknown_key_is_refused_named_on_both_sides_and_let_in_once_it_is_listed(keys):
    async with keys.server() as server, keys.client(server, "edge-1", listed=False) as client:
        state = await client.until(REFUSED, UNREACHABLE, CONNECTED)
        assert state.kind == REFUSED
        assert client.me.public in state.reason
        assert "gw" in state.reason
        assert server.complaints.counts["unknown"] >= 1
        with pytest.raises(PeerGone, match="does not let"):
            await client.send(beat(), timeout_s=0.01)
        keys.list("edge-1")
        await client.connected()
        await client.send(beat())
        assert (await server.receive(LIMIT_S)).peer.name == "edge-1"


@in_loop
async def test_a_wrong_server_key_is_refused_and_named_on_both_sides(keys):
    other = keys.make("other", "gateway")
    async with keys.server() as server:
        me = keys.make("edge-1", "edge")
        async with Client(server.address, CONTROL, me, Peer(name="gw", role="gateway", key=other.public)) as client:
            state = await client.until(REFUSED, UNREACHABLE, CONNECTED)
            assert state.kind == REFUSED
            assert "right .pub of gw" in state.reason
            await eventually(lambda: server.complaints.counts["handshake"])  # by the next attempt, if not by this one
            assert not server.complaints.counts["unknown"]


@in_loop
async def test_nobody_there_is_unreachable_until_somebody_is(keys):
    async with keys.server() as server:
        address = server.address
    async with keys.client(server, "edge-1") as client:
        state = await client.until(REFUSED, UNREACHABLE, CONNECTED)
        assert state.kind == UNREACHABLE
        assert "nobody listens" in state.reason
        async with keys.server(address=address) as later:
            await client.connected()
            await client.send(beat())
            assert (await later.receive(LIMIT_S)).peer.name == "edge-1"


@in_loop
async def test_keys_and_plain_text_do_not_mix_and_say_so(keys):
    me = keys.make("edge-1", "edge")
    plain = Credentials.plain_text("edge-1", "edge")
    async with keys.server() as server, Client(server.address, CONTROL, plain, keys.public("gw")) as client:
        state = await client.until(REFUSED, UNREACHABLE, CONNECTED)
        assert (state.kind, "wants keys" in state.reason) == (REFUSED, True)
    async with (
        Server(ANY, CONTROL, Credentials.plain_text("gw", "gateway")) as server,
        Client(server.address, CONTROL, me, keys.public("gw")) as client,
    ):
        state = await client.until(REFUSED, UNREACHABLE, CONNECTED)
        assert (state.kind, "speaks plain text" in state.reason) == (REFUSED, True)
        await eventually(lambda: server.complaints.counts["handshake"])


@in_loop
async def test_a_revoked_keys_next_message_is_refused_on_a_connection_that_stands(keys):
    async with keys.server() as server, keys.client(server, "edge-1") as client, keys.client(server, "edge-2") as other:
        await client.send(beat(1))
        identity = (await server.receive(LIMIT_S)).identity
        await other.connected()
        keys.revoke("edge-1")
        await asyncio.sleep(0.06)
        await client.send(beat(2))
        await other.send(beat(3))
        assert (await server.receive(LIMIT_S)).message.sequence == 3
        assert server.complaints.counts["key"] == 1
        assert (await answer(client, Refused)).status == 401
        with pytest.raises(PeerGone):
            await server.send(identity, HeartbeatSeen(sequence=1))
        assert (await client.until(REFUSED, UNREACHABLE)).kind == REFUSED  # it has learned it from the handshake too
        keys.list("edge-1")
        await client.connected()
        await client.send(beat(4))
        assert (await server.receive(LIMIT_S)).message.sequence == 4


@in_loop
async def test_a_role_sends_only_what_it_may(keys):
    async with keys.server(DATA) as server, keys.client(server, "phone", "device") as device:
        await device.send(Embeddings(job="j", attempt=2), [b"x"])  # an edge's
        refused = await answer(asyncio_receive(server, device), Refused)
        assert (refused.status, refused.what, refused.job) == (403, "embeddings", "j")
        assert "device phone" in refused.reason
        source = Source(kind="noise")
        assign = Assign(
            job="j", attempt=0, program="p", prompt="", negative=None, seed=0, width=8, height=8, first_leg=0,
            last_leg=0, source=source,
        )  # fmt: skip
        await device.send(assign)  # the gateway's
        assert (await answer(asyncio_receive(server, device), Refused)).status == 403
        await device.send(latent(), [b"x"])
        assert (await server.receive(LIMIT_S)).peer.role == "device"
        assert server.complaints.counts["role"] == 2


class asyncio_receive:  # noqa: N801  # receives from a client while the server is served, too
    def __init__(self, server, client):
        self.server, self.client = server, client

    async def receive(self, timeout_s):
        served = asyncio.create_task(self.server.receive())
        try:
            return await self.client.receive(timeout_s)
        finally:
            served.cancel()


@in_loop
async def test_a_client_takes_from_a_server_only_what_its_role_may_send(keys):
    async with keys.server(name="edge-9", role="edge") as server, keys.client(server, "edge-1") as client:
        await client.send(Probe(sequence=1))
        await answer(asyncio_receive(server, client), Probed)
        await client.send(Fetch(job="j", attempt=0, leg=0))
        identity = (await server.receive(LIMIT_S)).identity
        await server.send(identity, HeartbeatSeen(sequence=1))  # a gateway's
        await server.send(identity, Refused(reason="no"))
        assert (await answer(client, Refused)).reason == "no"
        assert client.complaints.counts["role"] == 1


@in_loop
async def test_a_spoofed_routing_id_gets_nothing(keys):
    server_keys = keys.make("gw", "gateway")
    thief = keys.make("thief", "device")
    async with keys.server() as server:
        async with keys.client(server, "edge-1") as victim:
            await victim.send(beat(1))
            identity = (await server.receive(LIMIT_S)).identity
            routing_id = identity[DIGEST:]
            # While the victim is there, nobody can take its routing id.
            with raw_dealer(server.address, thief, server_keys, routing_id) as spoof:
                await spoof.send_multipart(encode(beat(2)))
                await spoof.send_multipart(encode(beat(3)))
                await victim.send(beat(4))
                seen = []
                while beat(4) not in [message for _, message in seen]:
                    got = await server.receive(LIMIT_S)
                    assert (got.identity == identity) == (got.peer.name == "edge-1")
                    seen.append((got.peer.name, got.message))
                await server.send(identity, HeartbeatSeen(sequence=4))
                assert (await answer(victim, HeartbeatSeen)).sequence == 4
                assert not await got_anything_but_refusals(spoof)
        # It is gone now: whoever takes its routing id has another identity, silent or not.
        for _ in range(20):
            with raw_dealer(server.address, thief, server_keys, routing_id) as spoof:
                await asyncio.sleep(0.1)
                with pytest.raises(PeerGone):
                    await server.send(identity, HeartbeatSeen(sequence=5))
                await spoof.send_multipart(encode(Ask(what="jobs")))
                try:
                    got = await server.receive(0.5)
                except TimeoutError:  # libzmq had not let go of the routing id yet
                    continue
                assert (got.peer.name, got.identity == identity) == ("thief", False)
                assert got.identity[DIGEST:] == routing_id
                with pytest.raises(PeerGone):
                    await server.send(identity, HeartbeatSeen(sequence=5))
                assert server.peer(identity) is None
                assert not await got_anything_but_refusals(spoof)
                return
        pytest.fail("nobody could take the routing id of a connection that is gone")


async def got_anything_but_refusals(socket):
    while await socket.poll(100):
        if not isinstance(messages.decode(await socket.recv_multipart())[0], Refused):
            return True
    return False


# --- what is no message ---


@in_loop
async def test_another_version_is_told_on_both_sides(keys):
    other = struct.pack("<5sHH", messages.MAGIC, messages.MAJOR + 1, 0)
    me, server_keys = keys.make("edge-1", "edge"), keys.make("gw", "gateway")
    async with keys.server() as server:
        with raw_dealer(server.address, me, server_keys) as socket:
            served = asyncio.create_task(server.receive())
            await socket.send_multipart([other, *encode(beat())[1:]])
            refused, _ = messages.decode(await socket.recv_multipart())
            assert refused.status == 505
            assert "version 2.0" in refused.reason
            served.cancel()
    assert server.complaints.counts["version"] == 1
    context = zmq.asyncio.Context()
    foreign = context.socket(zmq.ROUTER)
    foreign.curve_server, foreign.curve_secretkey = True, server_keys.secret.encode()
    port = foreign.bind_to_random_port("tcp://127.0.0.1")
    async with Client(f"tcp://127.0.0.1:{port}", CONTROL, me, keys.public("gw")) as client:
        await client.send(beat())
        routing_id, *frames = await foreign.recv_multipart()
        reading = asyncio.create_task(client.receive())
        await foreign.send_multipart([routing_id, other, *frames[1:]])
        state = await client.until(REFUSED, UNREACHABLE)
        assert (state.kind, "version 2.0" in state.reason) == (REFUSED, True)
        reading.cancel()
    foreign.close(0)
    context.term()


@in_loop
async def test_what_is_no_message_is_refused_and_the_server_goes_on(keys):
    me, server_keys = keys.make("edge-1", "edge"), keys.make("gw", "gateway")
    head, header = encode(beat())
    bad = [
        [b""],
        [b"x"] * 9,
        [head],
        [head, b"\xc1"],
        [head, header[:-1]],
        [b"RELAX" + head[5:], header],
        [head, header, b"more"],
    ]
    async with keys.server() as server:
        with raw_dealer(server.address, me, server_keys) as socket:
            for frames in bad:
                await socket.send_multipart(frames)
            await socket.send_multipart([head, header])
            assert (await server.receive(LIMIT_S)).message == beat()
            assert server.complaints.counts["malformed"] == len(bad)
            for _ in bad:
                refused, _ = messages.decode(await socket.recv_multipart())
                assert refused.status == 400


@in_loop
async def test_too_long_is_refused_before_it_is_sent_and_cut_before_it_is_read(keys):
    me, server_keys = keys.make("edge-1", "edge"), keys.make("gw", "gateway")
    async with keys.server() as server, keys.client(server, "edge-2") as client:
        with pytest.raises(MessageRefused, match="control lane"):
            await client.send(Probe(sequence=0), [bytes(CONTROL.max_frame + 1)])
        with raw_dealer(server.address, me, server_keys) as socket:
            socket.reconnect_ivl = -1
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            head, header = encode(Probe(sequence=1))
            await socket.send_multipart([head, header, bytes(CONTROL.max_frame + 1000)])
            await asyncio.wait_for(monitor.recv_multipart(), LIMIT_S)
            socket.disable_monitor()
            monitor.close(0)
        await client.send(Probe(sequence=2), [bytes(CONTROL.max_frame)])
        assert (await answer(asyncio_receive(server, client), Probed)).sequence == 2
        with pytest.raises(TimeoutError):
            await server.receive(0.05)


# --- plain text ---


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:5", True), ("tcp://127.8.9.1:*", True), ("tcp://[::1]:5", True), ("tcp://localhost:5", True),
        ("ipc:///tmp/x", True), ("tcp://10.0.0.1:5", False), ("tcp://0.0.0.0:5", False), ("tcp://*:5", False),
        ("tcp://[::]:5", False), ("tcp://eth0:5", False), ("tcp://127.0.0.1.evil.org:5", False), ("tcp://2130706433:5", False),
    ],
)  # fmt: skip
def test_plain_text_stays_on_loopback_unless_told_otherwise(keys, address, loopback):
    me, gateway = Credentials.plain_text("gw", "gateway"), Peer(name="gw", role="gateway")
    assert is_loopback(address) == loopback
    for make in (
        functools.partial(Server, address, CONTROL, me),
        functools.partial(Client, address, CONTROL, me, gateway),
    ):
        if not loopback:
            with pytest.raises(BadRequest, match="relay keygen"):
                make()
        make(allow_plain_text=True)
    with pytest.raises(BadRequest, match="allow list"):
        Server(address, CONTROL, keys.make("gw", "gateway"))


@pytest.mark.parametrize(
    "address", ["tcp://x", "http://127.0.0.1:5", "127.0.0.1:5", "tcp://a b:5", "tcp://h:65536", "", "ipc://"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(BadRequest, match="no address"):
        Server(address, CONTROL, Credentials.plain_text("gw", "gateway"))


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "ipc"])
@in_loop
async def test_in_plain_text_the_role_is_what_the_handshake_says_and_its_rules_hold(tmp_path, kind):
    address = {"tcp": ANY, "tcp6": "tcp://[::1]:*", "ipc": f"ipc://{tmp_path}/s"}[kind]
    gateway, device = Peer(name="gw", role="gateway"), Credentials.plain_text("phone", "device")
    server = Server(address, DATA, Credentials.plain_text("gw", "gateway"))
    try:
        await server.open()
    except RelayError:
        assert kind == "tcp6"
        pytest.skip("no IPv6 here")
    async with Client(server.address, DATA, device, gateway) as client:
        await client.send(Embeddings(job="j", attempt=0), [b"x"])
        assert (await answer(asyncio_receive(server, client), Refused)).status == 403
        await client.send(latent(), [b"x"])
        got = await server.receive(LIMIT_S)
        assert (got.peer.name, got.peer.role, got.peer.tenant) == ("phone", "device", None)
        await server.send(got.identity, seen_of(got.message))
        await answer(client, messages.Seen)
        nobody = Credentials(name="x", role="king")
        async with Client(server.address, DATA, nobody, gateway) as king:
            assert (await king.until(REFUSED, CONNECTED, UNREACHABLE)).kind == REFUSED
    await server.close()


# --- being slow, being gone ---


@in_loop
async def test_a_slow_reader_blocks_its_sender_for_a_while_and_others_not_at_all(keys):
    me, server_keys = keys.make("slow", "edge"), keys.make("gw", "gateway")
    payload = bytes(4 << 20)
    async with keys.server(DATA) as server, keys.client(server, "edge-1") as other:
        with raw_dealer(server.address, me, server_keys) as slow:
            slow.rcvhwm = 1
            await slow.send_multipart(encode(Fetch(job="j", attempt=0, leg=0)))
            identity = (await server.receive(LIMIT_S)).identity
            await other.send(Fetch(job="j", attempt=0, leg=0))
            there = (await server.receive(LIMIT_S)).identity

            async def flood():
                for _ in range(1000):
                    await server.send(identity, latent(), [payload], timeout_s=0.5)

            flooding = asyncio.create_task(flood())
            while not flooding.done():
                await server.send(there, latent(), [b"small"])
                await answer(other, Latent)
                await asyncio.sleep(0.01)
            with pytest.raises(PeerSlow, match="slow took nothing"):
                await flooding


@in_loop
async def test_a_server_that_does_not_read_blocks_its_clients_for_a_while(keys):
    async with keys.server(DATA) as server, keys.client(server, "edge-1") as client:

        async def flood():
            for _ in range(1000):
                await client.send(latent(), [bytes(4 << 20)], timeout_s=0.3)

        with pytest.raises(PeerSlow, match="gw at"):
            await flood()


@in_loop
async def test_a_peer_that_left_is_gone_at_once_and_comes_back_as_another_connection(keys):
    async with keys.server() as server:
        async with keys.client(server, "edge-1") as client:
            await client.send(beat(1))
            before = (await server.receive(LIMIT_S)).identity
            client.reconnect("a test")
            assert client.state.kind == CONNECTING
            assert await client.connected(after=1) == 2
            with pytest.raises(PeerGone):
                await server.send(before, HeartbeatSeen(sequence=1))
            await client.send(beat(2))
            again = (await server.receive(LIMIT_S)).identity
            assert again != before
            await server.send(again, HeartbeatSeen(sequence=2))
            assert (await answer(client, HeartbeatSeen)).sequence == 2
        await asyncio.sleep(0.05)
        with pytest.raises(PeerGone):
            await server.send(again, HeartbeatSeen(sequence=2))


@in_loop
async def test_a_restarted_server_is_found_again(keys):
    async with keys.server() as server:
        client = keys.client(server, "edge-1")
        await client.connect()
        await client.connected()
    async with keys.server(address=server.address) as server:
        assert await client.connected(after=1) == 2
        await client.send(beat())
        assert (await server.receive(LIMIT_S)).message == beat()
        with pytest.raises(RelayError, match="cannot bind"):
            await keys.server(address=server.address).open()
    await client.close()


@in_loop
async def test_a_heartbeat_is_not_behind_50_mb(keys):
    async with keys.server(CONTROL) as control, keys.server(DATA) as data, throttled(data.address, 40e6) as address:
        me = keys.make("edge-1", "edge")
        async with (
            Client(control.address, CONTROL, me, keys.public("gw")) as beats,
            Client(address, DATA, me, keys.public("gw")) as bulk,
        ):
            await beats.connected()
            await bulk.send(latent(), [bytes(50_000_000)])
            arrived = asyncio.create_task(data.receive())
            for i in range(20):
                await beats.send(beat(i))
                got = await control.receive(LIMIT_S)
                await control.send(got.identity, HeartbeatSeen(sequence=got.message.sequence))
                assert (await answer(beats, HeartbeatSeen)).sequence == i
            assert not arrived.done()
            assert len((await arrived).payloads[0]) == 50_000_000


@contextlib.asynccontextmanager
async def throttled(address, bytes_per_s):
    """A TCP proxy to `address` of that speed from its client to it."""
    port = int(address.rsplit(":", 1)[1])
    tasks = []

    async def pass_on(reader, writer, speed):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
            if speed:
                await asyncio.sleep(len(data) / speed)
        writer.close()

    async def accept(reader, writer):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        tasks.append(asyncio.create_task(pass_on(reader, far_writer, bytes_per_s)))
        tasks.append(asyncio.create_task(pass_on(far_reader, writer, None)))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- payloads, time ---


@in_loop
async def test_payloads_are_views_that_outlive_their_message_and_their_sockets(keys):
    sent = [bytes([i]) * 500_000 for i in range(4)]
    async with keys.server(DATA) as server, keys.client(server, "edge-1") as client:
        for i, payload in enumerate(sent):
            await client.send(latent(leg=i), [memoryview(payload)])
        got = [await server.receive(LIMIT_S) for _ in sent]
        await server.send(got[0].identity, latent(), got[1].payloads)  # passed on as it came
        back = (await client.receive(LIMIT_S))[1]
    gc.collect()
    assert all(isinstance(each.payloads[0], memoryview) for each in got)
    assert [bytes(each.payloads[0]) for each in got] == sent
    assert back[0] == sent[1]


@in_loop
async def test_a_receive_that_is_given_up_loses_nothing_and_keeps_the_order(keys):
    async with keys.server() as server, keys.client(server, "edge-1") as client:

        async def send():
            for i in range(300):
                await client.send(beat(i))
                await asyncio.sleep(0.0005)

        sending = asyncio.create_task(send())
        got = []
        while len(got) < 300:
            with contextlib.suppress(TimeoutError):
                got.append((await server.receive(0.001)).message.sequence)
        await sending
        assert got == list(range(300))


@in_loop
async def test_round_trip_and_throughput_come_from_acknowledged_traffic(keys):
    async with keys.server(DATA) as server, keys.client(server, "edge-1") as client:
        assert client.meter.stats().round_trip_s is None
        assert client.meter.timeout_for(125_000) == pytest.approx(4 * 1.0 + 4 * 0.5)  # the stated defaults

        async def serve():
            while True:
                got = await server.receive()
                if isinstance(got.message, Heartbeat):
                    await server.send(got.identity, HeartbeatSeen(sequence=got.message.sequence))
                else:
                    await server.send(got.identity, seen_of(got.message))

        serving = asyncio.create_task(serve())
        for i in range(5):
            await client.send(beat(i))
            await client.receive(LIMIT_S)
        bulk = [
            latent(), Checkpoint(job="j", attempt=0, leg=0, index=3), Result(job="j", attempt=0, width=8, height=8, report={}),
        ]  # fmt: skip
        for message in bulk:
            await client.send(message, [bytes(1 << 20)])
            await client.receive(LIMIT_S)
        serving.cancel()
        stats = client.meter.stats()
        assert 0 < stats.round_trip_s < 1
        assert stats.bytes_per_s > 1e6
        assert stats.bytes_sent > 3 << 20
        assert stats.bytes_received > 0
        before = client.meter.timeout_for(100 << 20)
        assert before < DEFAULT_LONGEST
        await client.send(latent(), [bytes(1 << 20)])
        client.meter.gave_up(latent())  # as if no acknowledgement had come
        assert client.meter.stats().bytes_per_s <= stats.bytes_per_s / 2
        assert client.meter.timeout_for(100 << 20) >= before


DEFAULT_LONGEST = Meter().timeout_for(1 << 40)


def test_a_timeout_is_bounded_on_both_sides():
    assert Meter().timeout_for(0) == 2.0
    assert DEFAULT_LONGEST == 300.0


@in_loop
async def test_a_client_asks_and_is_told(keys):
    async with keys.server() as server, keys.client(server, "me", "client") as client:
        await client.send(Ask(what="status"))
        got = await server.receive(LIMIT_S)
        await server.send(got.identity, Told(what="status", value={"nodes": [1, 2]}))
        assert (await answer(client, Told)).value == {"nodes": [1, 2]}


# --- why a connection does not come about ---


@in_loop
async def test_the_greeting_tells_who_listens(keys):
    async with keys.server() as server:
        assert await greeting(server.address) == "CURVE"
    with pytest.raises(Unreachable, match="nobody listens"):
        await greeting(server.address)

    async def say(words, reader, writer):
        writer.write(words)
        if words:
            writer.close()

    async def close(reader, writer):
        writer.close()

    cases = [
        (functools.partial(say, b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 64), "another protocol"),
        (functools.partial(say, b""), "does not answer"),
        (close, "closes them"),
    ]
    for listen, reason in cases:
        listening = await asyncio.start_server(listen, "127.0.0.1", 0)
        with pytest.raises(Unreachable, match=reason):
            await greeting(f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}", timeout_s=0.2)
        listening.close()
