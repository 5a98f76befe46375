"""Why a connection does not come about, asked of the other side's ZMTP greeting (rfc.zeromq.org/spec/37).

    signature FF .. 7F (10 bytes) | version (2) | mechanism (20, padded with 0) | as-server (1) | filler (31)

libzmq says only that a handshake failed. Who greets, and with which mechanism, tells a wrong key from a peer without keys,
from a proxy whose far end is down, and from a web server.
"""

from __future__ import annotations

import asyncio
import contextlib

from nodes.transport.lanes import CONNECT_S, is_loopback, split_address
from relay.errors import RelayError

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"


class Unreachable(RelayError):
    """No relay node answers at an address; the message says what does."""


async def greeting(address: str, timeout_s: float = CONNECT_S) -> str:
    """The mechanism that who listens there speaks: CURVE (keys) or PLAIN (plain text). Unreachable otherwise."""
    kind, host, port = split_address(address)
    there = False
    try:
        async with asyncio.timeout(timeout_s):
            opened = asyncio.open_unix_connection(host) if kind == "ipc" else asyncio.open_connection(host, int(port))
            reader, writer = await opened
            there = True
            try:
                writer.write(_SIGNATURE + b"\x03\x01")  # as far as the version: nothing that would fail over there
                theirs = await reader.readexactly(64)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        what = (
            "accepts connections but does not answer: it hangs, or is a tunnel to nothing"
            if there
            else "does not answer"
        )
        raise Unreachable(f"{address} {what} (waited {timeout_s:g} s)") from None
    except (OSError, asyncio.IncompleteReadError, UnicodeError) as error:
        if there:
            raise Unreachable(
                f"{address} accepts connections and closes them: no relay node, or none behind it"
            ) from None
        raise Unreachable(f"nobody listens at {address}: {getattr(error, 'strerror', None) or error}") from None
    if theirs[0] != 0xFF or theirs[9] & 1 != 1:
        raise Unreachable(f"{address} is no relay node: it answers with another protocol")
    return theirs[12:32].rstrip(b"\0").decode("ascii", "replace")


async def why_failed(address: str, with_keys: bool, server: str) -> str:
    """Why a handshake with the node that listens at `address` failed. Unreachable if nobody does."""
    theirs = await greeting(address)
    if theirs == "CURVE" and not with_keys:
        return f"{address} wants keys and this node has none for it: relay keygen"
    if theirs != "CURVE" and with_keys:
        hint = "" if is_loopback(address) else ", which off loopback it should not"
        return f"{address} speaks plain text{hint}, and this node wants keys"
    if theirs == "CURVE":
        return f"{address} does not hold the key that this node has for {server}: give it the right .pub of {server}"
    return f"{address} broke off the handshake"
