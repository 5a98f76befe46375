"""When requests come: arrival times in s from the start, ascending, as float64 arrays.

Every process draws by inversion or thinning from unit streams, so the same seed gives the same times, and a longer
horizon only adds to them. `rate_per_s` is always the long-run mean rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.workloads.prompts import generator
from experiments.workloads.registry import build, named
from experiments.workloads.tables import read_numbers
from relay.errors import BadRequest
from relay.plugins import make

Times = NDArray[np.float64]
Positive = Annotated[float, msgspec.Meta(gt=0)]
MOST = 50_000_000  # expected arrivals in one call: a rate in the wrong unit is refused before memory is gone


@runtime_checkable
class Arrivals(Protocol):
    """An arrival process."""

    def times(self, horizon_s: float, seed: int) -> Times:
        """Arrival times in [0, horizon_s)."""
        ...


class Poisson(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Independent arrivals at a constant rate. RISE: a mean gap of 9 s, so rate_per_s = 1/9."""

    rate_per_s: Positive

    def times(self, horizon_s: float, seed: int) -> Times:
        return _unit(_expected(self.rate_per_s, horizon_s), generator(seed, "arrivals")) / self.rate_per_s


class Bursty(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Markov-modulated Poisson: calm and burst states in turn, each of exponential length; Poisson within each.

    `burst_factor`: rate in a burst / rate in a calm. The start state is drawn from the long-run shares.
    """

    rate_per_s: Positive
    burst_factor: Annotated[float, msgspec.Meta(ge=1)] = 8.0
    burst_s: Positive = 20.0
    calm_s: Positive = 100.0

    def times(self, horizon_s: float, seed: int) -> Times:
        _expected(self.rate_per_s, horizon_s)
        calm_rate = self.rate_per_s * (self.calm_s + self.burst_s) / (self.calm_s + self.burst_factor * self.burst_s)
        rates = np.array([calm_rate, calm_rate * self.burst_factor])
        states = generator(seed, "states")
        state = int(states.random() < self.burst_s / (self.calm_s + self.burst_s))
        ends, integral = [0.0], [0.0]  # the integrated rate is piecewise linear, so its inverse is an interpolation
        while ends[-1] < horizon_s:
            length = float(states.exponential((self.calm_s, self.burst_s)[state]))
            ends.append(ends[-1] + length)
            integral.append(integral[-1] + length * float(rates[state]))
            state = 1 - state
        unit = _unit(integral[-1], generator(seed, "arrivals"))
        times = np.interp(unit, integral, ends)
        return times[times < horizon_s]


class Diurnal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rate rate_per_s * (1 + amplitude * sin(2 pi (t - shift_s) / period_s)), by thinning a Poisson stream."""

    rate_per_s: Positive
    amplitude: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    period_s: Positive = 86_400.0
    shift_s: float = 0.0

    def times(self, horizon_s: float, seed: int) -> Times:
        peak = self.rate_per_s * (1 + self.amplitude)
        candidates = _unit(_expected(peak, horizon_s), generator(seed, "arrivals")) / peak
        share = (1 + self.amplitude * np.sin(2 * np.pi * (candidates - self.shift_s) / self.period_s)) / (
            1 + self.amplitude
        )
        return candidates[generator(seed, "thinning").random(len(candidates)) < share]


class Flash(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flash crowds: every `every_s` the rate climbs to `factor` times the calm one within `rise_s`, stays so for `crowd_s` in
    all, and is calm again at once. Poisson at the rate of the moment; the first crowd comes at half of `every_s`."""

    rate_per_s: Positive
    factor: Annotated[float, msgspec.Meta(ge=1)] = 10.0
    rise_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    crowd_s: Positive = 5.0
    every_s: Positive = 60.0

    def __post_init__(self) -> None:
        if not self.rise_s < self.crowd_s < self.every_s:
            raise BadRequest("arrivals flash: a crowd rises (rise_s) within crowd_s, and ends within every_s")

    def times(self, horizon_s: float, seed: int) -> Times:
        _expected(self.rate_per_s, horizon_s)
        # one period's integrated rate in calm rates, at the corners of its piecewise linear rate; between them, where the
        # rate climbs, the integral is a parabola, which 32 pieces stand for
        start = self.every_s / 2
        climb = np.linspace(0.0, 1.0, 33)
        corners = np.concatenate([[0.0], start + self.rise_s * climb, [start + self.crowd_s, self.every_s]])
        risen = start + self.rise_s * climb + (self.factor - 1) * self.rise_s * climb**2 / 2
        top = risen[-1] + self.factor * (self.crowd_s - self.rise_s)
        integral = np.concatenate([[0.0], risen, [top, top + self.every_s - start - self.crowd_s]])
        calm = self.rate_per_s * self.every_s / integral[-1]
        count = math.ceil(horizon_s / self.every_s)
        unit = _unit(count * self.rate_per_s * self.every_s, generator(seed, "arrivals")) / calm
        period, inside = np.divmod(unit, integral[-1])
        times = period * self.every_s + np.interp(inside, integral, corners)
        return times[times < horizon_s]


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times in s from a CSV with a header, sorted and counted from the first. `speed` 2 replays it twice as fast.
    `gaps`: the column holds seconds since the arrival before, in their order; none may be negative."""

    path: str
    column: str | None = None  # default: the first
    speed: Positive = 1.0
    gaps: bool = False

    def times(self, horizon_s: float, seed: int = 0) -> Times:  # a trace is what it is, whatever the seed
        if not horizon_s > 0:
            raise BadRequest(f"horizon_s must be above 0, not {horizon_s}")
        path = Path(self.path).expanduser()
        found = np.array(read_numbers(path, self.column), dtype=np.float64)
        if not len(found):
            raise BadRequest(f"{path} holds no arrival")
        if not np.isfinite(found).all():
            raise BadRequest(f"{path}: column {self.column or 'first'} holds a time that is not finite")
        if self.gaps and (found < 0).any():
            line = 2 + int(np.flatnonzero(found < 0)[0])  # line 1 is the header
            raise BadRequest(
                f"{path}: line {line}: a gap of {found[line - 2]:g} s: nothing arrives before what came before it"
            )
        found = np.cumsum(found) if self.gaps else np.sort(found)
        times = (found - found[0]) / self.speed
        return times[times < horizon_s]


ARRIVALS: dict[str, tuple[type, dict[str, Any]]] = {
    "poisson": (Poisson, {}),
    "bursty": (Bursty, {}),
    "diurnal": (Diurnal, {}),
    "flash": (Flash, {}),
    "trace": (Trace, {}),
}


def load_arrivals(name_or_spec: str | Mapping[str, Any] | Arrivals, **options: Any) -> Arrivals:
    """A process by name with its options, as a mapping with `arrivals: NAME`, or as `package.module:Class`."""
    if isinstance(name_or_spec, Arrivals):
        return name_or_spec
    name, options = named(name_or_spec, "arrivals", options)
    if ":" in name:
        return make("arrival process", name, Arrivals, options)
    return build(ARRIVALS, name, "arrivals", options)


def _expected(rate_per_s: float, horizon_s: float) -> float:
    if not (math.isfinite(horizon_s) and horizon_s > 0):
        raise BadRequest(f"horizon_s must be above 0, not {horizon_s}")
    if rate_per_s * horizon_s > MOST:
        raise BadRequest(
            f"{rate_per_s:g} arrivals per s over {horizon_s:g} s are more than {MOST:,}: is the unit right?"
        )
    return rate_per_s * horizon_s


def _unit(end: float, rng: np.random.Generator) -> Times:
    """A Poisson stream of rate 1 on [0, end), by its gaps."""
    parts, last = [], 0.0
    while last < end:
        size = int(end - last + 4 * math.sqrt(end - last)) + 16
        parts.append(last + np.cumsum(rng.exponential(size=size)))
        last = float(parts[-1][-1])
    stream = np.concatenate(parts) if parts else np.empty(0)
    return stream[stream < end]
