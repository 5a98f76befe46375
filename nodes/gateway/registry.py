"""Who is there: what each node holds, when it was last heard, and whether it can be trusted with work now.

A node is alive while its messages come (any message counts). One that fails again and again is benched, each time for
longer, and then tried again with what comes next. What is remembered of a node outlives its cuts, not its session.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from nodes.gateway.spaces import Claim, foreign
from nodes.messages import Heartbeat, PeerStats, Register
from scheduler.policy import NodeState

log = logging.getLogger("relay.gateway")
DEAD_AFTER = 4  # heartbeats missed
STRIKES = 3  # failures in a row until a node is benched
BENCH_S, BENCH_MOST_S = 2.0, 60.0


@dataclass
class Node:
    """`identity`: its control connection, another one after each cut; `key`: what its connections prove."""

    name: str
    role: str
    key: str
    identity: bytes
    register: Register
    heard: float
    heartbeat: Heartbeat | None = None
    leaving: bool = False
    strikes: int = 0
    benchings: int = 0
    benched_until: float = 0.0
    jobs: dict[str, float] = field(default_factory=dict)  # job -> seconds of work it was given
    round_trip_s: float | None = None
    done: int = 0
    failed: int = 0
    last_error: str | None = None
    out_of_reach: bool = False  # the last message to it did not get on its way
    foreign: dict[str, str] = field(default_factory=dict)  # family that it names -> why it is another one

    def curve(self, family: str, member: str) -> dict[int, float] | None:
        return next((h.curves.get(member) for h in self.register.holdings if h.family == family), None)

    def holds(self, family: str, member: str) -> bool:
        return family not in self.foreign and any(
            h.family == family and member in h.members for h in self.register.holdings
        )

    def decodes(self, family: str) -> bool:
        return family not in self.foreign and any(h.family == family and h.decodes for h in self.register.holdings)


class Registry:
    def __init__(self, heartbeat_s: float):
        self.heartbeat_s = heartbeat_s
        self.nodes: dict[str, Node] = {}

    def register(self, said: Register, role: str, key: str, identity: bytes) -> Node:
        """Take a node in, or again. A name belongs to the key that holds it while it is alive."""
        before = self.nodes.get(said.name)
        node = Node(said.name, role, key, identity, said, time.monotonic())
        if before is not None and before.register.session == said.session:
            node.jobs, node.strikes, node.benched_until = before.jobs, before.strikes, before.benched_until
            node.benchings, node.done, node.failed = before.benchings, before.done, before.failed
            node.last_error, node.foreign = before.last_error, before.foreign
        self.nodes[said.name] = node
        for family in {holding.family for holding in said.holdings}:
            self._compare(family)
        return node

    def _compare(self, family: str) -> None:
        """Leave out of a family who names it and holds another latent space; those that are gone still say which is whose."""
        claims = [
            Claim(node.name, node.role == "edge", holding.fingerprint)
            for node in self.nodes.values()
            for holding in node.register.holdings
            if holding.family == family
        ]
        apart = foreign(claims)
        for node in self.nodes.values():
            before = node.foreign.pop(family, None)
            if (why := apart.get(node.name)) is not None:
                node.foreign[family] = why
                node.last_error = f"{family}: {why}"
                if why != before:
                    log.error("node %s is not asked for %s: %s", node.name, family, why)

    def taken(self, name: str, key: str) -> bool:
        """Whether another key holds this name and is alive."""
        node = self.nodes.get(name)
        return node is not None and node.key != key and self.alive(node)

    def by_key(self, key: str) -> Node | None:
        return next((node for node in self.nodes.values() if node.key == key), None)

    def alive(self, node: Node) -> bool:
        return time.monotonic() - node.heard < DEAD_AFTER * self.heartbeat_s

    def usable(self, node: Node) -> bool:
        own = node.leaving or node.out_of_reach or time.monotonic() < node.benched_until
        return self.alive(node) and not own

    @property
    def alive_names(self) -> set[str]:
        return {name for name, node in self.nodes.items() if self.alive(node)}

    def ready(self) -> list[Node]:
        return [node for node in self.nodes.values() if self.usable(node)]

    def heard(self, node: Node, heartbeat: Heartbeat | None = None) -> None:
        node.heard, node.out_of_reach = time.monotonic(), False
        if heartbeat is not None:
            node.heartbeat = heartbeat

    def strike(self, node: Node, reason: str) -> None:
        node.strikes += 1
        node.failed += 1
        node.last_error = reason
        if node.strikes >= STRIKES:
            node.strikes = 0
            node.benchings += 1
            node.benched_until = time.monotonic() + min(BENCH_S * 2 ** (node.benchings - 1), BENCH_MOST_S)

    def praise(self, node: Node) -> None:
        node.strikes = node.benchings = 0
        node.done += 1

    def states(self) -> dict[str, NodeState]:
        return {node.name: state_of(node) for node in self.ready()}

    def told(self) -> list[dict[str, Any]]:
        """For `relay status`."""
        now = time.monotonic()
        rows = []
        for node in self.nodes.values():
            beat, said = node.heartbeat, node.register
            state = "lost" if not self.alive(node) else "leaving" if node.leaving else "ready"
            if state == "ready" and now < node.benched_until:
                state = f"benched {node.benched_until - now:.0f} s"
            rows.append(
                {"name": node.name, "role": node.role, "state": state, "version": said.version,
                 "holds": [f"{h.family} {'+'.join(h.members)}" for h in said.holdings], "jobs": len(node.jobs),
                 "doing": beat.doing if beat else "registered", "running": beat.running if beat else 0,
                 "queued": beat.queued if beat else 0, "battery": beat.battery if beat else None, "pace": said.pace,
                 "slower": beat.slower if beat else 1.0,
                 "emulated": said.pace > 1, "memory_bytes": beat.memory_bytes if beat else said.memory_bytes,
                 "cpu_s": beat.cpu_s if beat else 0.0,
                 "startup_s": said.startup_s, "round_trip_s": node.round_trip_s, "done": node.done, "failed": node.failed,
                 "heard_s_ago": round(now - node.heard, 2), "last_error": (beat and beat.last_error) or node.last_error,
                 "cache": beat.cache if beat else {},
                 "idle_s": beat.idle_s if beat else None, "steps_done": beat.steps_done if beat else 0}
            )  # fmt: skip
        return rows


def state_of(node: Node) -> NodeState:
    """A node as policies see it."""
    said, beat = node.register, node.heartbeat
    gateway = beat.peers.get("gateway", PeerStats()) if beat else PeerStats()
    return NodeState(
        name=node.name,
        role=node.role,
        curves={h.family: h.curves for h in said.holdings},
        backlog_s=sum(node.jobs.values()),
        running=beat.running if beat else 0,
        queued=beat.queued if beat else 0,
        batch=said.batch,
        encode_s=max((h.encode_s for h in said.holdings), default=0.0),
        decode_s=max((h.decode_s for h in said.holdings), default=0.0),
        battery=beat.battery if beat else None,
        round_trip_s=gateway.round_trip_s,
        bytes_per_s=gateway.bytes_per_s,
        pace=said.pace,
        slower=beat.slower if beat else 1.0,
    )
