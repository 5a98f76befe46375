"""Who is there: registering, heartbeats, leaving."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from nodes.messages.base import Message


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A family on a node: its members, what proves the latent space, and each member's step-time curve."""

    family: str
    members: tuple[str, ...]
    decodes: bool
    fingerprint: dict[str, Any]
    curves: dict[str, dict[int, float]]  # member -> batch size -> seconds of one guided step, pace included
    encode_s: float = 0.0
    decode_s: float = 0.0


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """Node -> gateway, first and after every cut: what it holds and where its data socket is (edges only)."""

    senders: ClassVar = ("edge", "device")
    name: str
    session: str  # new at every start of the process
    holdings: tuple[Holding, ...]
    batch: int
    queue: int
    data_address: str | None = None  # what others dial; None: it is dialled by nobody
    pace: float = 1.0
    version: str = ""
    startup_s: float = 0.0
    memory_bytes: int = 0
    running: tuple[tuple[str, int], ...] = ()  # (job, attempt) it still works on
    checkpoints: bool = True  # whether it may send them (a device only if its config asks)
    pad: dict[str, int] = msgspec.field(
        default_factory=dict
    )  # what it brings data messages to: kind -> bytes, as links are charged
    judge: str = "off"  # off | local | share: what a device does about judging


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """Gateway -> node: taken in. Jobs that it works on and that are not wanted any more are cancelled after this."""

    senders: ClassVar = ("gateway",)
    gateway: str
    session: str  # of the gateway; another one: it was restarted
    heartbeat_s: float


class PeerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What real traffic to one peer took; None until something was measured."""

    round_trip_s: float | None = None
    bytes_per_s: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Node -> gateway, from a loop of its own: what the compute loop really does now."""

    senders: ClassVar = ("edge", "device")
    sequence: int
    doing: str
    running: int
    queued: int
    steps_done: int
    idle_s: float  # since the compute loop last did anything
    last_error: str | None = None
    battery: float | None = None  # 0..1, None without one
    memory_bytes: int = 0
    cpu_s: float = 0.0  # since its process started
    batch_bound: int = 0
    slower: float = 1.0  # times as long as the registered curves say, as its latest steps took
    peers: dict[str, PeerStats] = msgspec.field(default_factory=dict)
    cache: dict[str, Any] = msgspec.field(
        default_factory=dict
    )  # of an edge: scope, latents, bytes, hits, misses, ...; `broken` where it has none


class HeartbeatSeen(Message, frozen=True, kw_only=True, tag="heartbeat-seen"):
    """Gateway -> node: gives the node its round trip, by its own clock."""

    senders: ClassVar = ("gateway",)
    sequence: int


class Leaving(Message, frozen=True, kw_only=True, tag="leaving"):
    """Node -> gateway: no new work, please; sent when it drains. `done`: nothing is left, it goes."""

    senders: ClassVar = ("edge", "device")
    reason: str
    done: bool = False
