"""ZAP (rfc.zeromq.org/spec/27): who is let in, and whose every frame of a connection then is.

libzmq asks it at each handshake. The answer's User-Id comes with every frame of that connection (`frame.get("User-Id")`):
that, and nothing which a peer writes itself, says who sent a message. One per context, and a `Server` has a context of its
own, so that two servers of one process may have two lists.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq

from nodes.transport.channel import Channel

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"relay"  # a server that sets it lets nobody in while no authenticator answers

Admit = Callable[[bytes, list[bytes], str], str | None]


class Authenticator:
    """`admit(mechanism, credentials, the peer's IP address)` gives the User-Id, or None: refused."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], admit: Admit):
        self._admit = admit
        socket = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(ENDPOINT)
        self._channel = Channel(socket)

    async def run(self) -> None:
        """Answers until it is cancelled. Status 400 tells the peer that it is refused; 300 would leave it guessing."""
        while True:
            await self._channel.until(zmq.POLLIN)
            if (frames := self._channel.take()) is None:
                continue
            version, request_id, _, address, _, mechanism, *credentials = (frame.bytes for frame in frames)
            user = self._admit(mechanism, credentials, address.decode("ascii", "replace"))
            code, text = (b"400", b"not on the allow list") if user is None else (b"200", b"OK")
            self._channel.put([version, request_id, code, text, (user or "").encode(), b""])

    def close(self) -> None:
        self._channel.close(0)
