"""`relay doctor --peer`: can a node be reached from here, with this key, and how far away is it?

One line for each way in which it can go wrong: nobody there, another protocol, a key that one side does not know, another
version. Every server answers `Probe`, on its control and on its data address.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from nodes.keys import Credentials, Peer, load_public, load_secret
from nodes.messages import Message, Probe, Probed, Refused
from nodes.transport import CONNECTED, CONTROL, REFUSED, UNREACHABLE, Client
from nodes.transport.diagnosis import greeting
from nodes.transport.lanes import split_address
from relay.errors import BadRequest, RelayError

ROUND_TRIPS = 10
BULK, BULKS, BULKS_S = 1 << 20, 8, 5.0  # bytes of a large probe, there and back; so many, or for so many seconds
ANSWER_S = 10.0


@dataclass(frozen=True)
class PeerReport:
    """`bytes_per_s`: of both ways together, from how much longer a large probe took than a small one."""

    name: str
    version: str
    me: str
    round_trip_s: float
    bytes_per_s: float

    def lines(self) -> str:
        return (
            f"peer         {self.name}, version {self.version}, takes this node for {self.me}\n"
            f"round trip   {self.round_trip_s * 1000:.2f} ms, median of {ROUND_TRIPS}\n"
            f"throughput   {self.bytes_per_s / 1e6:.1f} MB/s, {BULK >> 20} MiB there and back"
        )


def check_peer(
    address: str, key: Path | None = None, peer_key: Path | None = None, *, plain: bool = False
) -> PeerReport:
    """Round trip and throughput to the node at `address`. RelayError says in one line why there are none.

    `key`: the .key file of the node that asks; `peer_key`: the .pub file of the one that answers; without both in plain
    text, on loopback or with `plain`."""
    if split_address(address)[2] == "*":
        raise BadRequest(f"{address}: name the port")
    if (key is None) != (peer_key is None):
        raise BadRequest("--key and --peer-key go together: this node's .key file and the peer's .pub file")
    me = load_secret(key) if key else Credentials.plain_text("doctor", "client")
    # Whatever is there, it may answer a probe as an edge would.
    server = load_public(peer_key) if peer_key else Peer(name="the node", role="edge")
    return asyncio.run(_check(address, me, server, plain))


async def _check(address: str, me: Credentials, server: Peer, plain: bool) -> PeerReport:
    client = Client(address, CONTROL, me, server, allow_plain_text=plain)
    await greeting(address)
    async with client:
        state = await client.until(CONNECTED, REFUSED, UNREACHABLE)
        if state.kind != CONNECTED:
            raise RelayError(state.reason)
        first = await _answer(client, Probe(sequence=0))
        small = []
        for i in range(ROUND_TRIPS):
            begin = time.perf_counter()
            await _answer(client, Probe(sequence=1 + i))
            small.append(time.perf_counter() - begin)
        payload = bytes(BULK)
        large = []
        for i in range(BULKS):
            begin = time.perf_counter()
            await _answer(client, Probe(sequence=1 + ROUND_TRIPS + i), payload)
            large.append(time.perf_counter() - begin)
            if sum(large) > BULKS_S:
                break
    trip, taken = statistics.median(small), statistics.median(large)
    who = f"{me.role} {me.name}{'' if me.secret else ' (plain text: nothing is proved)'}"
    return PeerReport(first.name, first.version, who, trip, 2 * BULK / max(taken - trip, taken / 10))


async def _answer(client: Client, probe: Probe, *payloads: bytes) -> Probed:
    """The answer to `probe`, or an error with the reason why there is none."""
    await client.send(probe, payloads, timeout_s=max(ANSWER_S, client.meter.timeout_for(BULK)))
    answered = asyncio.create_task(_until_answered(client, probe.sequence))
    ended = asyncio.create_task(client.until(REFUSED, UNREACHABLE))
    try:
        await asyncio.wait({answered, ended}, timeout=client.meter.timeout_for(2 * BULK), return_when="FIRST_COMPLETED")
        if answered.done():
            return answered.result()
        if ended.done():
            raise RelayError(ended.result().reason)
        raise RelayError(client.state.reason or f"{client.address} lets this node in but does not answer")
    finally:
        answered.cancel()
        ended.cancel()


async def _until_answered(client: Client, sequence: int) -> Probed:
    while True:
        message: Message = (await client.receive())[0]
        if isinstance(message, Refused):
            raise RelayError(f"{client.address} refused: {message.reason}")
        if isinstance(message, Probed) and message.sequence == sequence:
            return message
