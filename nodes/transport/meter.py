"""Round trip and throughput to one peer, from its real traffic and by one clock: this side's.

A message that is acknowledged gives a sample: a heartbeat (`HeartbeatSeen`) and a small probe the round trip, a latent,
embeddings, a checkpoint or a result (`Seen`) the throughput, (bytes) / (send to seen, less the round trip). A message that
waited behind another one counts from when that one was through. Both are smoothed, the round trip as TCP does (RFC 6298).
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from nodes.messages import (
    Checkpoint,
    Embeddings,
    Heartbeat,
    HeartbeatSeen,
    Latent,
    Message,
    PeerStats,
    Probe,
    Probed,
    Result,
    Seen,
    seen_of,
)

DEFAULT_BYTES_PER_S = 125_000.0  # 1 Mbit/s, until something was measured
DEFAULT_ROUND_TRIP_S = 0.5
FACTOR, ROUND_TRIPS = 4.0, 4.0
SHORTEST_S, LONGEST_S = 2.0, 300.0
SMALLEST = 16_384  # bytes; less says nothing of a throughput
PENDING = 256  # unanswered messages that are remembered


class Meter:
    """One per peer; a control and a data client of the same peer may share one, then each profits from the other."""

    def __init__(self) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._round_trip_s: float | None = None
        self._s_per_byte: float | None = None
        self._pending: dict[Hashable, tuple[float, int]] = {}
        self._line_free = 0.0  # when the last measured message was through

    def sent(self, message: Message, size: int) -> None:
        """It was handed to ZeroMQ, `size` bytes with its payloads."""
        self.bytes_sent += size
        if (answer := _awaited(message, size)) is not None:
            self._pending[answer] = time.monotonic(), size
            while len(self._pending) > PENDING:
                del self._pending[next(iter(self._pending))]

    def received(self, message: Message, size: int) -> None:
        """It came in; if it acknowledges a message, that one is measured."""
        self.bytes_received += size
        if (started := self._pending.pop(_answer(message), None)) is None:
            return
        now, (begin, bytes_) = time.monotonic(), started
        if self._s_per_byte is not None:  # no slower than this, whatever `gave_up` took it for
            self._s_per_byte = min(self._s_per_byte, (now - begin) / max(bytes_, 1))
        if bytes_ < SMALLEST:
            self._round_trip_s = _smooth(self._round_trip_s, now - begin, 1 / 8)
            return
        trip = self._round_trip_s or 0.0
        taken = now - max(begin, self._line_free)
        # A round trip that was measured on a busier line may be longer than all this took.
        self._s_per_byte = _smooth(self._s_per_byte, max(taken - trip, taken / 10) / bytes_, 1 / 4)
        self._line_free = now - trip

    def gave_up(self, message: Message) -> None:
        """It was not acknowledged in time: the line is taken for half as fast, or no time-out would ever be long enough
        on a line that has become slow."""
        if (started := self._pending.pop(_awaited(message, SMALLEST), None)) is not None:
            waited = (time.monotonic() - started[0]) / max(started[1], 1)
            self._s_per_byte = max(waited, 2 * (self._s_per_byte or 0.0))

    def timeout_for(self, size: int) -> float:
        """Seconds that `size` bytes and their acknowledgement may take: 4 x size / throughput + 4 round trips, between
        2 s and 300 s. Taken for it before anything was measured: 125 kB/s and 0.5 s."""
        per_byte = self._s_per_byte if self._s_per_byte is not None else 1 / DEFAULT_BYTES_PER_S
        trip = self._round_trip_s if self._round_trip_s is not None else DEFAULT_ROUND_TRIP_S
        return min(LONGEST_S, max(SHORTEST_S, FACTOR * size * per_byte + ROUND_TRIPS * trip))

    def stats(self) -> PeerStats:
        rate = 1 / self._s_per_byte if self._s_per_byte else None
        return PeerStats(
            round_trip_s=self._round_trip_s, bytes_per_s=rate, bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
        )  # fmt: skip


def _smooth(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)


def _awaited(message: Message, size: int) -> Hashable:
    """What `_answer` gives for the acknowledgement of this message, None if there is none to be measured."""
    match message:
        case Heartbeat():
            return "heartbeat", message.sequence
        case Probe() if size < SMALLEST:
            return "probe", message.sequence
        case Latent() | Embeddings() | Checkpoint() | Result():
            return seen_of(message)
    return None


def _answer(message: Message) -> Hashable:
    match message:
        case HeartbeatSeen():
            return "heartbeat", message.sequence
        case Probed():
            return "probe", message.sequence
        case Seen():
            return message
    return None
