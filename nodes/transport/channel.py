"""A ZeroMQ socket in an event loop: what can be done now is done now, and who must wait waits for the socket's descriptor.

`zmq.asyncio` does the same with a future for each call and a poller for each wait; a message cost two to three times as long
through it. The descriptor is ZeroMQ's, with its rule (zmq_getsockopt, ZMQ_FD): it signals that something changed, once, and
any call on the socket may take the signal, so after each call those who wait are looked after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import zmq


class Channel:
    """Belongs to the event loop that it was made in."""

    def __init__(self, socket: zmq.Socket[bytes]):
        self.socket = socket
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self.look)

    def close(self, linger: int | None = None) -> None:
        """`linger`: milliseconds that what was sent and is not out yet still has; None: as the socket's option says."""
        if not self.socket.closed:
            self._loop.remove_reader(self._descriptor)
            self.socket.close(linger)

    def take(self) -> list[zmq.Frame] | None:
        """The frames of the next message without waiting or copying, None if there is none."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        finally:
            self.look()

    def put(self, frames: Sequence[bytes | memoryview]) -> bool:
        """Hand frames to ZeroMQ without waiting or copying; False if the queue is full. ZMQError as ZeroMQ has it."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        finally:
            self.look()
        return True

    @property
    def _descriptor(self) -> int:
        return int(self.socket.getsockopt(zmq.FD))

    async def until(self, event: int) -> None:
        """Wait for zmq.POLLIN or zmq.POLLOUT."""
        if self._events() & event:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((event, future))
        try:
            await future
        finally:
            self._waiting = [each for each in self._waiting if each[1] is not future]

    def _events(self) -> int:
        return int(self.socket.getsockopt(zmq.EVENTS))

    def look(self) -> None:
        """Wake whom the socket's state concerns; let ZeroMQ do what it has put off."""
        events = self._events()  # asked also where nobody waits: asking is what resets the descriptor
        for event, future in self._waiting:
            if events & event and not future.done():
                future.set_result(None)
