"""One job: a picture that was accepted and will end, and what is known of it while it runs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nodes.requests import ImageRequest
from nodes.stages import Stage, advance
from relay.program import Program
from scheduler.policy import Decision


@dataclass(frozen=True)
class Point:
    """Where a job can go on: before leg `leg`, `index` steps into it (0: at its start), and who has the latent there."""

    leg: int
    index: int
    holder: str  # a node's name, or "gateway"
    checkpoint: bool = False  # else the handoff that the holder's stretch ended with

    @property
    def reached(self) -> tuple[int, int]:
        return self.leg, self.index

    def __str__(self) -> str:
        return f"leg {self.leg}, step {self.index}, {'checkpoint' if self.checkpoint else 'handoff'} at {self.holder}"


@dataclass
class Stretch:
    """Consecutive legs on one node."""

    node: str
    first: int
    last: int
    done: bool = False


@dataclass
class Job:
    """Times are monotonic seconds of this process."""

    id: str
    request_id: str
    number: int
    tenant: str
    seed: int
    request: ImageRequest
    accepted: float
    deadline: float
    programs: list[Program]  # what it may be served with, in the order of preference; one if it was fixed
    attempt: int
    stage: Stage = Stage.ACCEPTED
    program: Program | None = None  # of the attempt under way
    decision: Decision | None = None
    stretches: list[Stretch] = field(default_factory=list)
    points: set[Point] = field(default_factory=set)  # of the program under way, one of each kind and holder
    began_at: Point | None = None  # of the attempt under way
    placed_on: dict[int, set[str]] = field(default_factory=dict)  # attempt -> nodes: whose results count
    tries: int = 0
    not_before: float = 0.0  # of the next try
    moved: float = 0.0  # when anything was last heard of it
    degraded: bool = False
    skip: int | None = None  # steps that its level skips from a cached latent, at most; None: no level was assigned
    leg: int = 0
    step: int = 0
    of: int = 0
    steps_paid: int = 0  # steps that nodes took for it, more than the program's where work was done twice
    error: str | None = None
    status: int = 200  # HTTP's, of the error
    report: dict[str, Any] | None = None
    image: str | None = None
    preview: bytes | None = None
    history: list[str] = field(default_factory=list)  # what went wrong on the way, for the report
    spent: dict[str, dict[str, float]] = field(default_factory=dict)  # node -> stage -> seconds, by its own clock
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: set[asyncio.Queue[dict[str, Any]]] = field(default_factory=set)

    def place(
        self, attempt: int, program: Program, decision: Decision, stretches: list[Stretch], point: Point | None
    ) -> None:
        """It goes to these nodes; what they answer to this attempt counts from now on."""
        self.attempt, self.program, self.decision, self.stretches = attempt, program, decision, stretches
        self.began_at = point
        self.placed_on[attempt] = self.nodes()
        self.enter(Stage.PLACED)

    def enter(self, stage: Stage) -> None:
        self.stage = advance(self.stage, stage)
        self.moved = time.monotonic()

    @property
    def size(self) -> tuple[int, int]:
        return self.request.width or 0, self.request.height or 0  # filled in when it was planned

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def reach(self, point: Point) -> None:
        """It could go on from there; in place of what that holder had."""
        self.points = {p for p in self.points if (p.holder, p.checkpoint) != (point.holder, point.checkpoint)} | {point}

    def forget(self, holder: str) -> None:
        self.points = {p for p in self.points if p.holder != holder}

    def forget_lost(self, node: str) -> None:
        """The latent that a stretch of this node begins with was not where it should be."""
        before = {a.node for a, b in pairwise(self.stretches) if b.node == node}
        gone = {p for p in self.points if p.holder in before and not p.checkpoint}
        if self.began_at is not None and self.stretches[0].node == node:
            gone.add(self.began_at)
        self.points -= gone

    def best_point(self, alive: set[str]) -> Point | None:
        """The farthest point whose holder is there."""
        here = [p for p in self.points if p.holder == "gateway" or p.holder in alive]
        return max(here, key=lambda p: (p.reached, p.holder), default=None)

    def nodes(self) -> set[str]:
        return {stretch.node for stretch in self.stretches}

    @property
    def where(self) -> dict[str, Any]:
        """Where it stands while it is open."""
        return {
            "attempt": self.attempt, "nodes": sorted(self.nodes()), "leg": self.leg, "step": self.step, "of": self.of,
        }  # fmt: skip

    def tell(self, event: str, **values: Any) -> None:
        """To whoever watches; one who does not read loses the oldest."""
        if not self.watchers:
            return
        program = str(self.program) if self.program else None
        told = {
            "event": event, "id": self.id, "number": self.number, "stage": str(self.stage), "program": program,
            "degraded": self.degraded, **self.where, **values,
        }  # fmt: skip
        for watcher in self.watchers:
            if watcher.full():
                watcher.get_nowait()
            watcher.put_nowait(told)
