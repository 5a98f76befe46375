"""One direction of an emulated link: the line that all connections share, and each connection's pipe through it.

A byte read at time t waits until the line has sent what was read before it, on whichever connection, takes 8 bits /
bandwidth to be sent, and comes out a delay later. So a message of N bytes on an idle line takes
`LinkProfile.sample(N)`, and two connections that send at once share the bandwidth, first come, first served.

Jitter: a byte stream knows no messages. A *burst* begins when a pipe holds nothing, and its delay is drawn then, with
`LinkProfile.sample`; all that enters while something of it is still under way has the same delay. A message that is
sent alone therefore has one draw, as in the simulator, and nothing overtakes inside a connection, as TCP keeps it. A
connection that never falls idle keeps its draw until the profile is changed. Connections draw independently.

Bounded: a pipe stops reading when `buffer` bytes wait for the line (`QUEUE_S` of its bandwidth), or when bandwidth x
delay and two buffers are under way because the receiver does not read. What the sender's and the receiver's kernels
hold in their socket buffers is not the line's.

Nothing here polls: every wait is a timer set to the moment at which something happens.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from scheduler.links import LinkProfile

QUEUE_S = 0.02  # what may wait for the line, so that it does not run dry when this process is woken late
BUFFER = (4096, 2 << 20)  # bytes, at least and at most
CHUNK = (1024, 256 << 10)  # bytes of one read, at least and at most


class LineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One direction, as `status` answers. `late_*`: how long after they were due bytes were handed on, since the last
    change: the emulator's own error, from a busy machine or a line that is faster than this process."""

    profile: LinkProfile
    bytes: int  # handed on to the receiver
    under_way: int
    late_mean_s: float
    late_max_s: float


class Line:
    """What all connections share in one direction: the profile, the time at which the line is free, and the counts."""

    def __init__(self, profile: LinkProfile, rng: np.random.Generator):
        self.profile = profile
        self.stalled_at: float | None = None
        self.pipes: set[Pipe] = set()
        self._rng = rng
        self._free_at = 0.0
        self._bytes = self._handed_on = 0
        self._late_s = self._late_max_s = 0.0

    @property
    def buffer(self) -> int:
        return _clamp(QUEUE_S * self.profile.bandwidth_bit_s / 8, BUFFER)

    @property
    def chunk(self) -> int:
        return _clamp(self.buffer / 8, CHUNK)

    def draw_delay(self) -> float:
        """Seconds."""
        return self.profile.sample(0, self._rng)

    def send(self, size: int, now: float) -> float:
        """Take `size` bytes at loop time `now`; the time at which the last of them is sent."""
        self._free_at = max(self._free_at, now) + 8 * size / self.profile.bandwidth_bit_s
        return self._free_at

    def count(self, size: int, late: float | None) -> None:
        """`size` bytes were handed on, `late` seconds after they were due; None where the receiver made them wait."""
        self._bytes += size
        if late is not None:
            self._handed_on += 1
            self._late_s += late
            self._late_max_s = max(self._late_max_s, late)

    def change(self, profile: LinkProfile, now: float) -> None:
        """From now on. What has not been sent yet is sent at the new bandwidth; what was sent arrives when it would have."""
        now = now if self.stalled_at is None else self.stalled_at
        ratio = self.profile.bandwidth_bit_s / profile.bandwidth_bit_s
        self.profile = profile
        self._late_s, self._late_max_s, self._handed_on = 0.0, 0.0, 0
        self._move(lambda t: now + (t - now) * ratio if t > now else t, now)
        for pipe in list(self.pipes):
            pipe.delay = self.draw_delay()
            pipe.pump()

    def stall(self, now: float) -> None:
        """Nothing moves until `resume`."""
        self.stalled_at = now
        for pipe in list(self.pipes):
            pipe.pump()

    def resume(self, now: float) -> None:
        """Everything goes on where it stood."""
        stood, self.stalled_at = self.stalled_at, None
        if stood is None:
            return
        self._move(lambda t: t + now - stood if t > stood else t, stood, flying=True)
        for pipe in list(self.pipes):
            pipe.pump()

    def status(self) -> LineStatus:
        return LineStatus(
            profile=self.profile,
            bytes=self._bytes,
            under_way=sum(pipe.under_way for pipe in self.pipes),
            late_mean_s=self._late_s / max(1, self._handed_on),
            late_max_s=self._late_max_s,
        )

    def _move(self, moved: Callable[[float], float], now: float, flying: bool = False) -> None:
        self._free_at = moved(self._free_at)
        for pipe in self.pipes:
            pipe.move(moved, now, flying)


End = Literal["eof", "reset"]


@dataclass(slots=True)
class _Item:
    data: bytes | End
    sent: float  # loop time at which the line has sent it
    due: float  # and at which it comes out

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else 0


class Pipe:
    """One direction of one connection: what its source sent, on the way to its sink.

    `ended` is called when the source's end of stream, or its death, comes out at the sink.
    """

    def __init__(self, line: Line, source: asyncio.Transport, sink: asyncio.Transport, ended: Callable[[End], None]):
        self.delay = 0.0  # seconds, of this burst
        self.under_way = 0  # bytes
        self._line, self._source, self._sink, self._ended = line, source, sink, ended
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Item] = deque()  # not sent yet, as far as was looked
        self._flying: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._last_due = 0.0
        self._writable, self._writable_since = True, 0.0
        self._open = True
        self._timer: asyncio.TimerHandle | None = None
        line.pipes.add(self)

    @property
    def room(self) -> int:
        """Bytes to read next, at least 1: where a whole chunk has no room, reading is paused."""
        return max(1, min(self._line.chunk, self._room()))

    def put(self, data: bytes | End) -> None:
        """What the source sent just now, or that it sends no more."""
        if self not in self._line.pipes:
            return
        now = self._loop.time()
        if not self._waiting and not self._flying:
            self.delay = self._line.draw_delay()
        item = _Item(data, 0.0, 0.0)
        item.sent = self._line.send(item.size, now)
        item.due = item.sent + self.delay
        self._waiting.append(item)
        self._waiting_bytes += item.size
        self.under_way += item.size
        self._open = self._open and isinstance(data, bytes)
        self.pump()

    def pump(self) -> None:
        """Hand on what is due, read on or pause, and sleep until there is more to do."""
        if self not in self._line.pipes:
            return
        now = self._loop.time()
        if self._line.stalled_at is not None:
            self._source.pause_reading()
            self._sleep_until(None)
            return
        self._settle(now)
        while self._flying and self._writable and self._flying[0].due <= now:
            self._hand_on(self._flying.popleft(), now)
        wake = None
        if self._writable and (ahead := self._flying or self._waiting):
            wake = ahead[0].due
        if self._open and self._room() >= self._line.chunk:
            self._source.resume_reading()
        else:
            self._source.pause_reading()
            if self._open and self._waiting:  # there is more room when the line has sent this
                wake = min(self._waiting[0].sent, wake or math.inf)
        self._sleep_until(wake)

    def writable(self, yes: bool) -> None:
        """Whether the sink takes more now."""
        self._writable = yes
        if yes:
            self._writable_since = self._loop.time()
            self.pump()

    def move(self, moved: Callable[[float], float], now: float, flying: bool) -> None:
        """Other times for what has not been sent by `now`; with `flying`, for what was sent as well."""
        self._settle(now)
        for item in self._waiting:
            sent = moved(item.sent)
            item.sent, item.due = sent, item.due + sent - item.sent
        if flying:
            for item in self._flying:
                item.due = moved(item.due)

    def discard(self) -> None:
        """Drop what is under way, for good."""
        self._sleep_until(None)
        self._waiting.clear()
        self._flying.clear()
        self._source.pause_reading()
        self._line.pipes.discard(self)

    def _room(self) -> int:
        line = self._line
        window = line.profile.bandwidth_bit_s * self.delay / 8 + 2 * line.buffer
        return min(line.buffer - self._waiting_bytes, int(window) - self.under_way)

    def _settle(self, now: float) -> None:
        while self._waiting and self._waiting[0].sent <= now:
            item = self._waiting.popleft()
            self._waiting_bytes -= item.size
            self._flying.append(item)

    def _hand_on(self, item: _Item, now: float) -> None:
        self._last_due = max(self._last_due, item.due)  # behind one with a longer delay, it is due with that one
        self.under_way -= item.size
        if isinstance(item.data, bytes):
            self._line.count(item.size, now - self._last_due if self._last_due >= self._writable_since else None)
            self._sink.write(item.data)  # may call writable(False)
        else:
            self._ended(item.data)

    def _sleep_until(self, when: float | None) -> None:
        if self._timer is not None:
            if self._timer.when() == when and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()


def _clamp(value: float, bounds: tuple[int, int]) -> int:
    return int(min(max(value, bounds[0]), bounds[1]))
