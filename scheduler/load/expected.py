"""What a level's work takes: of a node's time when it is planned, and on the clock when it is placed now.

A node shares its steps among a batch (`relay.batching`): at batch b a request of k steps takes k t(b) seconds of the
clock and k t(b) / b of the node's time, t being the measured step-time curve. Plans choose b; a request that is placed now
meets the batch that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from relay.batching import NEARLY_BEST, StepTimes
from relay.errors import BadRequest
from relay.program import Program
from scheduler.finish_time import UNKNOWN_BYTES_PER_S, UNKNOWN_ROUND_TRIP_S
from scheduler.load.solver import Leg, LevelLoad, Pool

if TYPE_CHECKING:
    from scheduler.policy import NodeState

HALF_DONE = 0.5  # of what a node walks at a moment, on average


@dataclass(frozen=True)
class Work:
    """A level as nodes and links see it: a program, how many steps of its first leg a cached latent spares, and the bytes of
    its latent and of its picture. `rate`: the share of these steps that is spared on average, see `scheduler.load.starts`."""

    program: Program
    skipped: int = 0
    latent_bytes: float = 0.0
    image_bytes: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.skipped < self.program.legs[0].steps:
            raise BadRequest(f"{self.program} cannot skip {self.skipped} of its first leg's steps")

    @cached_property
    def legs(self) -> tuple[tuple[str, int], ...]:
        """(member, steps) of each leg, all of `skipped` spared."""
        return self._less(self.skipped)

    @cached_property
    def surest(self) -> tuple[tuple[str, int], ...]:
        """Of each leg, whatever the cache has: what a deadline is reckoned with."""
        return self.legs if self.rate >= 1 else self._less(0)

    @cached_property
    def mean(self) -> tuple[tuple[str, float], ...]:
        """Of each leg, as many spared as are on average: what a node's time is reckoned with."""
        return self.legs if self.rate >= 1 else self._less(self.rate * self.skipped)

    def _less(self, spared: Any) -> tuple[tuple[str, Any], ...]:
        legs = [(leg.member, leg.steps) for leg in self.program.legs]
        return ((legs[0][0], legs[0][1] - spared), *legs[1:])

    def __str__(self) -> str:
        return f"{self.program}" + (f" from step {self.skipped}" if self.skipped else "")


@dataclass
class Station:
    """A node as load decisions see it. `held` stretches lie on it, with `backlog_s` of work at batch 1 that was given and
    has not left. `curves`: family -> member -> batch -> seconds a step, pace included."""

    name: str
    role: str  # edge | device
    curves: Mapping[str, Mapping[str, Mapping[int, float]]]
    batch: int = 1
    encode_s: float = 0.0
    decode_s: float = 0.0
    round_trip_s: float = 0.0
    bytes_per_s: float = UNKNOWN_BYTES_PER_S
    held: int = 0
    backlog_s: float = 0.0
    _steps: dict[tuple[str, str], tuple[list[float], int]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(state: NodeState, held: int | None = None) -> Station:
        """From what a policy is told of a node; `held`: stretches that lie on it, where more is known than its heartbeat."""
        trip = UNKNOWN_ROUND_TRIP_S if state.round_trip_s is None else state.round_trip_s
        return Station(
            state.name, state.role, state.curves, state.batch, state.encode_s, state.decode_s, trip,
            state.bytes_per_s or UNKNOWN_BYTES_PER_S, state.running + state.queued if held is None else held,
            state.backlog_s,
        )  # fmt: skip

    def holds(self, family: str, member: str) -> bool:
        return bool(self.curves.get(family, {}).get(member))

    def times(self, family: str, member: str) -> tuple[list[float], int]:
        """Seconds of a step by batch size (from 0), and the smallest size of nearly the best throughput."""
        key = family, member
        if key not in self._steps:
            known = StepTimes(self.curves[family][member], self.batch)
            seconds = [0.0, *(known.seconds(size) for size in range(1, self.batch + 1))]
            most = max(size / seconds[size] for size in range(1, self.batch + 1))
            best = next(size for size in range(1, self.batch + 1) if size / seconds[size] >= NEARLY_BEST * most)
            self._steps[key] = seconds, best
        return self._steps[key]

    def slower(self, factor: float) -> Station:
        """The same node where everything on it takes `factor` times as long."""
        curves = {
            family: {member: {size: factor * s for size, s in curve.items()} for member, curve in members.items()}
            for family, members in self.curves.items()
        }
        return replace(
            self, curves=curves, encode_s=factor * self.encode_s, decode_s=factor * self.decode_s,
            backlog_s=factor * self.backlog_s, _steps={},
        )  # fmt: skip

    def rates(self) -> list[float]:
        """Of each member, how many seconds of work at batch 1 it does in one, at its best batch."""
        known = (self.times(family, member) for family, members in self.curves.items() for member in members)
        return [best * seconds[1] / seconds[best] for seconds, best in known]

    @property
    def drained_s(self) -> float:
        """Seconds until all that lies on it is done, if it were of the member that gains least by a batch."""
        return self.backlog_s / min(self.rates(), default=1.0)

    def send_s(self, size: float) -> float:
        """Seconds of a message of so many bytes through its link, one way."""
        return self.round_trip_s / 2 + size / self.bytes_per_s

    def ends_s(self, family: str, member: str, steps: int, comes_s: float = 0.0) -> float:
        """When `steps` of a new request are done that begin `comes_s` from now, if nobody came after it.

        It shares steps with what is there, and as the last one (nodes step the most urgent first) it is not done before all
        of that is, at the best throughput. Of what is held, those who walk have half of it behind them, on average; while
        its latent is on the way, so are theirs, and only the part of their stay that they walk takes the node.
        """
        seconds, best = self.times(family, member)
        own = steps * seconds[1]
        stay = own / (own + comes_s) if comes_s else 1.0
        together = min(best, 1 + round(self.held * stay))
        walking = min(self.held, best) / self.held if self.held else 0.0
        left = 1 - HALF_DONE * walking
        rate = best * seconds[1] / seconds[best]
        alone = self.encode_s + (self.decode_s if self.role == "device" else 0.0)  # of each request, and for it alone
        return max(comes_s + steps * seconds[together], (left * self.backlog_s + own) / rate + left * self.held * alone)


Holding = dict[tuple[str, str], list[Station]]  # family, member -> who would do it; of one list of stations


def ends_s(work: Work, stations: Iterable[Station], holding: Holding | None = None) -> tuple[float, tuple[str, ...]]:
    """The soonest that a level would end if it were placed now, in s, and on which nodes; inf where nobody could do it.

    Each leg takes the node that is soonest done with it. A device decodes what it finishes; a node behind a link sends it.
    `holding`: kept between calls for the same stations, where several levels are asked about.
    """
    holding = {} if holding is None else holding
    there, at, names, before = list(stations), 0.0, [], None
    for number, (member, steps) in enumerate(work.surest):
        family, last = work.program.family, number == len(work.surest) - 1
        best: tuple[float, Station] | None = None
        for station in _holders(there, family, member, holding):
            same = before is not None and before.name == station.name
            comes = (
                at
                if before is None or same
                else at + before.send_s(work.latent_bytes) + station.send_s(work.latent_bytes)
            )
            done = station.ends_s(family, member, steps, comes) + (station.encode_s if not number else 0.0)
            if last:
                # pictures leave one after the other: the line may be slower than the node
                sent = station.round_trip_s / 2 + (1 + station.held) * work.image_bytes / station.bytes_per_s
                done = max(done + station.decode_s + station.send_s(work.image_bytes), sent)
            if best is None or done < best[0]:
                best = done, station
        if best is None:
            return float("inf"), ()
        at, before = best
        names.append(before.name)
    return at, tuple(names)


def _holders(stations: Sequence[Station], family: str, member: str, holding: Holding) -> Sequence[Station]:
    """As placement has it: an edge that holds a small member is what is left when no device is there. Found once, then
    remembered in `holding`."""
    if (family, member) not in holding:
        there = [each for each in stations if each.holds(family, member)]
        devices = [each for each in there if each.role == "device"] if member == "small" else []
        holding[family, member] = devices or there
    return holding[family, member]


def pools(stations: Sequence[Station], batch: int) -> tuple[Pool, ...]:
    """Each node as the solver has it, at a batch of at most `batch`."""
    return tuple(Pool(each.name, 1, min(batch, each.batch)) for each in stations)


def level_load(work: Work, stations: Sequence[Station], batch: int, holding: Holding | None = None) -> LevelLoad:
    """What a request of this level takes of each node, at a batch of at most `batch`: of its time, and of the clock. A
    cached level's time is the mean over hits and misses, its clock a miss's.

    A node's link works beside it, so that of its time a request takes what the slower of both needs. For nodes that mix
    levels, some bound by the link and some by the node, that plans a little too little rather than too much. `holding`: as
    in `ends_s`.
    """
    holding = {} if holding is None else holding
    family, legs = work.program.family, []
    for number, ((member, steps), (_, mean)) in enumerate(zip(work.surest, work.mean, strict=True)):
        busy, latency = {}, {}
        for station in _holders(stations, family, member, holding):
            seconds, best = station.times(family, member)
            size = min(batch, best)
            ends = station.encode_s * (number == 0)
            if number == len(work.legs) - 1:
                ends += station.decode_s
                sent = station.send_s(work.image_bytes)
            else:
                sent = station.send_s(work.latent_bytes)
            received = station.send_s(work.latent_bytes) if number else 0.0
            leaves = work.image_bytes if number == len(work.legs) - 1 else work.latent_bytes
            line_s = max(leaves, work.latent_bytes if number else 0.0) / station.bytes_per_s
            busy[station.name] = max(mean * seconds[size] / size + ends, line_s)
            latency[station.name] = steps * seconds[size] + ends + sent + received
        legs.append(Leg(busy, latency))
    return LevelLoad(str(work), tuple(legs))


def room_s(stations: Iterable[Station], deadline_s: float) -> float:
    """Seconds of work at batch 1 that may lie on all nodes together and still be done within the deadline."""
    return sum(deadline_s * max(station.rates(), default=0.0) for station in stations)


def within(load: LevelLoad, seconds: float) -> LevelLoad | None:
    """The level without the nodes on which it alone would take longer than that; None where no way through it is left."""
    fastest = [min(leg.latency_s.values(), default=float("inf")) for leg in load.legs]
    legs = []
    for leg, own in zip(load.legs, fastest, strict=True):
        rest = sum(fastest) - own
        fine = {name for name, latency in leg.latency_s.items() if latency + rest <= seconds}
        if not fine:
            return None
        legs.append(Leg({n: leg.busy_s[n] for n in fine}, {n: leg.latency_s[n] for n in fine}))
    return LevelLoad(load.name, tuple(legs))


def work_s(work: Work, stations: Sequence[Station]) -> float:
    """Seconds of work at batch 1, on the mean of the nodes that could do each leg."""
    return sum(
        sum(busy.values()) / len(busy)
        for busy in (leg.busy_s for leg in level_load(work, stations, 1).legs)
        if busy
    )  # fmt: skip
