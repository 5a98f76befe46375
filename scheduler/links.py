"""Link profile: the network between two nodes as bandwidth, delay and jitter, as given or *scaled*.

Why scale: a mini family's latent is some kilobytes and its step some milliseconds, so on a real link's figures the
network would decide either nothing or everything. Scaled by lambda = real step time / mini step time (large member,
batch 1), with bandwidth times lambda, delay and jitter divided by lambda, and every data message charged the *real*
family's size of its kind (`scheduler.message_sizes`), transfer time / step time is the real family's. `describe()` says
which kind a link is, and goes with every figure.

In YAML, or as a mapping in a config (unknown keys refused):

    name: backhaul                 # default: the name of `like`, or of the file
    like: lte                      # a built-in profile that fills what is not said; without it bandwidth is needed
    bandwidth_bit_s: 40e6
    delay_s: 0.02
    jitter_s: 0.004
    scaled: {real_step_s: 0.31, mini_step_s: 0.012, source: "docs/results/latency.md, H100"}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from relay.errors import BadRequest
from relay.files import read_yaml

Kind = Literal["as given", "scaled"]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two measured step times of the large member at batch 1, and where the real one was read."""

    real_step_s: Positive
    mini_step_s: Positive
    source: Annotated[str, msgspec.Meta(min_length=1)]

    @property
    def factor(self) -> float:
        """lambda, without unit."""
        return self.real_step_s / self.mini_step_s


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link, towards the receiver. The figures are the ones that hold: scaled already if `scaling` is set.

    `delay_s` is the mean one-way delay, `jitter_s` its standard deviation.
    """

    name: str
    bandwidth_bit_s: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bandwidth_bit_s) and self.bandwidth_bit_s > 0):
            raise BadRequest(f"link {self.name}: bandwidth_bit_s must be above 0, not {self.bandwidth_bit_s}")
        for key in ("delay_s", "jitter_s"):
            if not (math.isfinite(value := getattr(self, key)) and value >= 0):
                raise BadRequest(f"link {self.name}: {key} must be at least 0, not {value}")
        if self.jitter_s and not self.delay_s:
            raise BadRequest(f"link {self.name}: jitter_s {self.jitter_s} needs a delay_s above 0 that can vary")

    @property
    def kind(self) -> Kind:
        return "scaled" if self.scaling else "as given"

    def transfer_time(self, size: float) -> float:
        """Mean seconds from the first byte sent to the last received, for a message of `size` bytes on an idle link."""
        return self.delay_s + self._serialisation(size)

    def sample(self, size: float, rng: np.random.Generator) -> float:
        """One random transfer time in seconds; its mean is `transfer_time(size)`, its standard deviation `jitter_s`.

        The delay is gamma distributed: never negative, with the long right tail of queueing. It takes one standard draw,
        so a link and its scaled form draw in proportion from the same generator state.
        """
        if not self.jitter_s:
            return self.transfer_time(size)
        shape = (self.delay_s / self.jitter_s) ** 2
        return self._serialisation(size) + float(rng.standard_gamma(shape)) * self.delay_s / shape

    def scaled(self, real_step_s: float, mini_step_s: float, source: str) -> LinkProfile:
        """This link for a mini family. `source` names where the real step time comes from; BadRequest if scaled before."""
        if self.scaling:
            raise BadRequest(f"link {self.name} is scaled already, by lambda = {self.scaling.factor:.4g}")
        for key, value in (("real_step_s", real_step_s), ("mini_step_s", mini_step_s)):
            if not (math.isfinite(value) and value > 0):
                raise BadRequest(f"link {self.name}: {key} must be above 0, not {value}")
        if not source:
            raise BadRequest(f"link {self.name}: scaling needs the source of the real step time")
        scaling = Scaling(real_step_s=real_step_s, mini_step_s=mini_step_s, source=source)
        return LinkProfile(
            name=self.name,
            bandwidth_bit_s=self.bandwidth_bit_s * scaling.factor,
            delay_s=self.delay_s / scaling.factor,
            jitter_s=self.jitter_s / scaling.factor,
            scaling=scaling,
        )

    def describe(self) -> str:
        """One line for reports: the figures, the kind, and for a scaled link lambda and its source."""
        figures = (
            f"{self.name}: {_rate(self.bandwidth_bit_s)}, {_time(self.delay_s)} one way, jitter {_time(self.jitter_s)}"
        )
        if not self.scaling:
            return f"{figures} (as given)"
        steps = f"{_time(self.scaling.real_step_s)} / {_time(self.scaling.mini_step_s)}"
        return (
            f"{figures} (scaled, lambda = {self.scaling.factor:.4g} = real / mini step {steps}; {self.scaling.source})"
        )

    def _serialisation(self, size: float) -> float:
        if not size >= 0:
            raise BadRequest(f"a message has at least 0 bytes, not {size}")
        return 8 * size / self.bandwidth_bit_s


def _link(name: str, megabit_s: float, delay_ms: float, jitter_ms: float) -> LinkProfile:
    return LinkProfile(name=name, bandwidth_bit_s=megabit_s * 1e6, delay_s=delay_ms / 1e3, jitter_s=jitter_ms / 1e3)


# Downlinks to a device. Delay is half of the round trip. Where no source is named, figure and jitter are this project's
# round numbers of the usual order, not measurements.
LINKS = {
    link.name: link
    for link in (
        _link("loopback", 12_000, 0.05, 0.0),  # 512 KiB in about 0.4 ms, as measured on one machine
        _link("lan", 1_000, 0.2, 0.05),
        _link("wifi", 100, 3.0, 2.0),
        _link(
            "5g", 50, 15.0, 5.0
        ),  # arXiv 2507.18834: some 60 % of users see less; below 20 ms round trip for 5 % only
        _link("lte", 12, 35.0, 10.0),  # WebPageTest's preset: 12 Mbit/s, 70 ms round trip
        _link("dsl", 1.5, 25.0, 5.0),  # WebPageTest's preset: 1.5 Mbit/s down, 50 ms round trip
    )
}


class _LinkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str | None = None
    like: str | None = None
    bandwidth_bit_s: float | None = None
    delay_s: float | None = None
    jitter_s: float | None = None
    scaled: Scaling | None = None


def list_links() -> list[str]:
    """Names of the built-in profiles, fastest first."""
    return list(LINKS)


def find_link(link: str | Path | Mapping[str, Any] | LinkProfile) -> LinkProfile:
    """A link by built-in name, by the path of a YAML, or as a mapping. BadRequest names the file and the key."""
    if isinstance(link, LinkProfile):
        return link
    if isinstance(link, Mapping):
        return _from_spec(link, "link", "unnamed")
    if str(link) in LINKS:
        return LINKS[str(link)]
    path = Path(link).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise BadRequest(f"unknown link {str(link)!r}: choose one of {', '.join(LINKS)}, or give the path of a YAML")
    return _from_spec(read_yaml(path, dict[str, Any]), str(path), path.stem)


def _from_spec(values: Any, where: str, default_name: str) -> LinkProfile:
    try:
        # YAML 1.1 reads 40e6 as text; a number in text is a number
        spec = msgspec.convert(values, _LinkSpec, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{where}: {error}") from None
    if spec.like is not None and spec.like not in LINKS:
        raise BadRequest(f"{where}: like: unknown link {spec.like!r}, choose one of {', '.join(LINKS)}")
    if spec.like is None and spec.bandwidth_bit_s is None:
        raise BadRequest(f"{where}: a link needs bandwidth_bit_s, or `like: NAME` of {', '.join(LINKS)}")
    base = msgspec.structs.asdict(LINKS[spec.like]) if spec.like else {}
    said = {key: value for key, value in msgspec.structs.asdict(spec).items() if value is not None}
    name = spec.name or spec.like or default_name
    scaling = said.pop("scaled", None)
    said.pop("like", None)
    try:
        link = LinkProfile(**(base | said | {"name": name}))
        return link.scaled(scaling.real_step_s, scaling.mini_step_s, scaling.source) if scaling else link
    except BadRequest as error:
        raise BadRequest(f"{where}: {error}") from None


def _rate(bit_s: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bit_s >= size:
            return f"{bit_s / size:.4g} {unit}"
    return f"{bit_s:.4g} bit/s"


def _time(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"
