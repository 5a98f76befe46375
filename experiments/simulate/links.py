"""A node's link in the simulation: two lines, first come, first served, as `nodes.link_line` makes them of sockets.

A message waits until the line is free, takes 8 bits / bandwidth to be sent, and comes out a delay later, drawn with the
link's jitter; on an idle line that is `LinkProfile.sample`. Nothing overtakes. A message between two nodes that both
have a link goes through both, piece by piece: as long as over the slower one, and both delays.

What the gateway knows of a link is what traffic told, smoothed as `nodes.transport.meter` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from scheduler.links import LinkProfile

Direction = Literal["up", "down"]
SMALLEST = 16_384  # bytes; a message below says nothing of a throughput (nodes.transport.meter)


class Line:
    """One direction."""

    __slots__ = ("_last", "_rng", "_shape", "free_at", "profile")

    def __init__(self, profile: LinkProfile, rng: np.random.Generator):
        self._rng = rng
        self.free_at = self._last = 0.0
        self.change(profile)

    def change(self, profile: LinkProfile) -> None:
        """For what is sent from now on."""
        self.profile = profile
        self._shape = (profile.delay_s / profile.jitter_s) ** 2 if profile.jitter_s else 0.0

    def draw_delay(self) -> float:
        """Seconds, as `LinkProfile.sample(0)` draws them."""
        delay = self.profile.delay_s
        return float(self._rng.standard_gamma(self._shape)) * delay / self._shape if self._shape else delay

    def sent(self, size: float, now: float) -> float:
        """When the last of `size` bytes has been sent."""
        self.free_at = max(self.free_at, now) + 8 * size / self.profile.bandwidth_bit_s
        return self.free_at

    def comes(self, time: float) -> float:
        """When what would come out at `time` does: nothing overtakes."""
        self._last = max(self._last, time)
        return self._last

    def expected(self, size: float, now: float) -> float:
        """Mean arrival of `size` bytes sent at `now`, nothing else being sent before."""
        return max(self.free_at, now) + self.profile.transfer_time(size)


class Link:
    """A node's lines (`up` from it, `down` to it) and what was measured of them."""

    __slots__ = ("bytes_per_s", "down", "given", "up")

    def __init__(self, profile: LinkProfile, seed: Sequence[int]):
        rng_up, rng_down = np.random.default_rng(seed).spawn(2)
        self.given = profile
        self.up, self.down = Line(profile, rng_up), Line(profile, rng_down)
        self.bytes_per_s: float | None = None

    def degrade(self, factor: float) -> None:
        """`factor` times the bandwidth that was given, and as many times less delay: 0.1 is ten times slower."""
        import msgspec

        given = self.given
        changed = msgspec.structs.replace(
            given, bandwidth_bit_s=given.bandwidth_bit_s * factor, delay_s=given.delay_s / factor,
            jitter_s=given.jitter_s / factor,
        )  # fmt: skip
        self.up.change(changed)
        self.down.change(changed)

    @property
    def round_trip_s(self) -> float:
        return self.up.profile.delay_s + self.down.profile.delay_s

    def measure(self, size: float, taken_s: float) -> None:
        """A message's bytes and the seconds from its sending to its acknowledgement."""
        if size < SMALLEST:
            return
        per_byte = max(taken_s - self.round_trip_s, taken_s / 10) / size
        old = 1 / self.bytes_per_s if self.bytes_per_s else per_byte
        self.bytes_per_s = 1 / (old + (per_byte - old) / 4)


def send(lines: Sequence[Line], size: float, now: float) -> float:
    """When a message that is sent at `now` through these lines comes out."""
    if not lines:
        return now
    last = max([line.sent(size, now) for line in lines])
    time = last + sum([line.draw_delay() for line in lines])
    for line in lines:
        time = line.comes(time)
    return time


def expected(lines: Sequence[Line], size: float, now: float) -> float:
    """The mean of `send`, nothing being sent."""
    if not lines:
        return now
    last = max([line.expected(size, now) - line.profile.delay_s for line in lines])
    return last + sum([line.profile.delay_s for line in lines])
