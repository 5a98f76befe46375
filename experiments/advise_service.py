"""What a request pays beside its steps when it goes through the service, and how that grows with the device's link.

The asker is the device's own user, behind the link with the device (`nodes.local_user`). Four messages, one way each and one
after the other, are on the critical path of every mode: the request up, the word of its end down, and between them

    edge-only    the assignment down, the result's report up; its picture is where its asker is
    relay        the latent down, the result's report up. The device asks for the latent as soon as it has its assignment,
                 while the edge encodes and takes its steps: the edge waits for that question where its steps are done first
    full-cloud   the question for the picture up, the picture down

    time = seconds + steps + 4 delay + 8 bytes / bandwidth        relay: + max(0, 2 delay - (encode + s c_large))

`seconds` of each mode are measured on one fast link; `bytes`, what travels beside the latent's or picture's values (the
handoff's header, reports, assignments), are counted by the link.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.advise import Costs
from relay.errors import BadRequest
from relay.program import Program
from scheduler.links import LinkProfile
from scheduler.message_sizes import MessageSizes, bytes_sent

TRIPS = 4  # one-way messages on the critical path, one after the other


@dataclass(frozen=True)
class Way:
    """One mode's way: seconds without a link (encoding, decoding, gateway, ledger, sockets), and bytes beside those of
    `message_sizes`."""

    seconds: float
    bytes: float


@dataclass(frozen=True)
class Measured:
    """A program's end-to-end seconds over a link, and all bytes that the link carried for it (medians)."""

    program: Program
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Service:
    """`ways`: mode -> its way. `encode_s`: a prompt on the edge."""

    ways: Mapping[str, Way]
    encode_s: float

    def predict(self, program: Program, costs: Costs, link: LinkProfile, sizes: MessageSizes) -> float:
        """End-to-end seconds; `costs` give the steps alone."""
        fixed = self.ways[program.mode].seconds + _steps(program, costs)
        return fixed + self.network(program, costs, link, sizes)

    def network(self, program: Program, costs: Costs, link: LinkProfile, sizes: MessageSizes) -> float:
        """What the link adds to them, in seconds."""
        way = self.ways[program.mode]
        sent = way.bytes + sum(message.bytes for message in bytes_sent(program, sizes))
        waits = _waits(program, costs, link, self.encode_s)
        return TRIPS * link.delay_s + 8 * sent / link.bandwidth_bit_s + waits


def fit_service(
    measured: Sequence[Measured], costs: Costs, link: LinkProfile, sizes: MessageSizes, encode_s: float
) -> Service:
    """Each mode's way, from its programs over one link (medians)."""
    ways: dict[str, Way] = {}
    for mode in dict.fromkeys(each.program.mode for each in measured):
        own = [each for each in measured if each.program.mode == mode]
        extra = [each.bytes - sum(message.bytes for message in bytes_sent(each.program, sizes)) for each in own]
        bare = Service({mode: Way(0.0, statistics.median(extra))}, encode_s)
        seconds = [each.seconds - bare.predict(each.program, costs, link, sizes) for each in own]
        ways[mode] = Way(statistics.median(seconds), statistics.median(extra))
    return Service(ways, encode_s)


def read_service(path: Path, family: str) -> tuple[Costs, Service]:
    """What `experiments.advise_links` wrote of a family: its step costs, and its service. BadRequest where it is none."""
    import json

    try:
        said = json.loads(path.read_text())["families"][family]
        ways = {mode: Way(**way) for mode, way in said["service"]["ways"].items()}
        return Costs(**said["costs_s"]), Service(ways, said["service"]["encode_s"])
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(
            f"{path} says nothing of what a service adds to {family} ({error!r}): measure it with"
            " python -m experiments.advise_links"
        ) from None


def _steps(program: Program, costs: Costs) -> float:
    return program.steps["large"] * costs.large_s + program.steps["small"] * costs.small_s


def _waits(program: Program, costs: Costs, link: LinkProfile, encode_s: float) -> float:
    """Seconds for which an edge whose steps are done waits for the device's question."""
    if program.mode != "relay":
        return 0.0
    return max(0.0, 2 * link.delay_s - encode_s - program.legs[0].steps * costs.large_s)
