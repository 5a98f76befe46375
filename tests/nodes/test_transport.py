"""Who a peer is: what its key proves, what its role may send, what plain text is, and why a connection fails."""

import asyncio
import functools

import pytest
from wires import ANY, LIMIT_S, While, answer, beat, eventually, in_loop, latent, raw_dealer

from nodes import messages
from nodes.keys import Credentials, Peer
from nodes.messages import (
    Ask,
    Assign,
    Embeddings,
    Fetch,
    HeartbeatSeen,
    Probe,
    Probed,
    Refused,
    Source,
    encode,
    seen_of,
)
from nodes.transport import (
    CONNECTED,
    CONTROL,
    DATA,
    REFUSED,
    UNREACHABLE,
    Client,
    PeerGone,
    Server,
)
from nodes.transport.diagnosis import Unreachable, greeting
from nodes.transport.lanes import is_loopback
from nodes.transport.server import DIGEST
from relay.errors import BadRequest, RelayError

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
        assert (await answer(While(server, client), Refused)).status == 401
        assert server.complaints.counts["key"] == 1
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
        refused = await answer(While(server, device), Refused)
        assert (refused.status, refused.what, refused.job) == (403, "embeddings", "j")
        assert "device phone" in refused.reason
        source = Source(kind="noise")
        assign = Assign(
            job="j", attempt=0, program="p", prompt="", negative=None, seed=0, width=8, height=8, first_leg=0,
            last_leg=0, source=source,
        )  # fmt: skip
        await device.send(assign)  # the gateway's
        assert (await answer(While(server, device), Refused)).status == 403
        await device.send(latent(), [b"x"])
        assert (await server.receive(LIMIT_S)).peer.role == "device"
        assert server.complaints.counts["role"] == 2


@in_loop
async def test_a_client_takes_from_a_server_only_what_its_role_may_send(keys):
    async with keys.server(name="edge-9", role="edge") as server, keys.client(server, "edge-1") as client:
        await client.send(Probe(sequence=1))
        await answer(While(server, client), Probed)
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
        assert (await answer(While(server, client), Refused)).status == 403
        await client.send(latent(), [b"x"])
        got = await server.receive(LIMIT_S)
        assert (got.peer.name, got.peer.role, got.peer.tenant) == ("phone", "device", None)
        await server.send(got.identity, seen_of(got.message))
        await answer(client, messages.Seen)
        nobody = Credentials(name="x", role="king")
        async with Client(server.address, DATA, nobody, gateway) as king:
            assert (await king.until(REFUSED, CONNECTED, UNREACHABLE)).kind == REFUSED
    await server.close()


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
