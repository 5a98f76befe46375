"""What travels: bytes that are no message, peers that are slow or gone, payloads, and what traffic takes."""

import asyncio
import contextlib
import gc
import struct

import pytest
import zmq
import zmq.asyncio
from wires import LIMIT_S, While, answer, beat, in_loop, latent, raw_dealer

from nodes import messages
from nodes.messages import (
    Ask,
    Checkpoint,
    Fetch,
    Heartbeat,
    HeartbeatSeen,
    Latent,
    MessageRefused,
    Probe,
    Probed,
    Result,
    Told,
    encode,
    seen_of,
)
from nodes.transport import (
    CONNECTING,
    CONTROL,
    DATA,
    REFUSED,
    UNREACHABLE,
    Client,
    Meter,
    PeerGone,
    PeerSlow,
)
from relay.errors import RelayError

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
        assert (await answer(While(server, client), Probed)).sequence == 2
        with pytest.raises(TimeoutError):
            await server.receive(0.05)


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
