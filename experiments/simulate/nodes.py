"""A simulated node: the loop on the clock, its link, its battery, and what the gateway knows of it.

The gateway knows what it does in life: curves as registered, the work that it gave and that has not left (`backlog_s`), and
from the last heartbeat how many run and wait, the battery, the link, and how many times as long as registered its latest
steps took (`relay.engine`'s running median turns once more than half of the steps that it looks back on are new; it fades
where the node has nothing to do).
"""

from __future__ import annotations

from typing import Any

from experiments.simulate.events import Clock
from experiments.simulate.links import Link
from experiments.simulate.loop import Loop, Stretch, turns_until
from relay.batching import WINDOW, faded
from scheduler.policy import NodeState


class Battery:
    """A level in 0..1 that falls with each image-step and rises with time."""

    __slots__ = ("_charge", "_drain", "_steps", "_then", "level")

    def __init__(self, level: float, drain_per_step: float, charge_per_s: float):
        self.level, self._drain, self._charge = level, drain_per_step, charge_per_s
        self._then, self._steps = 0.0, 0

    def read(self, now: float, steps: int) -> float:
        """At `now`, after so many image-steps in all."""
        gained = self._charge * (now - self._then) - self._drain * (steps - self._steps)
        self.level = min(1.0, max(0.0, self.level + gained))
        self._then, self._steps = now, steps
        return self.level


class SimNode:
    """`queue`: stretches that it holds at most. `facts`: the fields of its NodeState that never change."""

    def __init__(
        self, name: str, loop: Loop, clock: Clock, queue: int, link: Link | None, battery: Battery | None,
        facts: dict[str, Any],
    ):  # fmt: skip
        self.name, self.loop, self.clock, self.queue, self.link, self.battery = name, loop, clock, queue, link, battery
        self.facts = facts
        self.held = 0
        self.backlog_s = 0.0  # what the gateway gave and has not seen leave
        self.busy_s = 0.0
        self._inbox: list[tuple[str, Stretch]] = []
        self._plan = 0  # number of the plan that holds; a boundary of an earlier one is void
        self._since, self._turn_s, self._quiet = 0.0, 0.0, 0
        self._until: float | None = None  # the next boundary; None: idle
        self._state: NodeState | None = None
        self._beat: dict[str, Any] = {}
        self._factor, self._slower, self._turns = 1.0, 1.0, 0  # times its registered steps; as it knows; steps before
        self.beat()

    # --- the loop on the clock ---

    def take(self, stretch: Stretch) -> None:
        stretch.urgency = (stretch.urgency[0], self.clock.now)
        self._hear("take", stretch)

    def bring(self, stretch: Stretch) -> None:
        self._hear("bring", stretch)

    def drop(self, stretch: Stretch) -> None:
        """Its request has ended otherwise."""
        if stretch.state != "gone":
            self._hear("drop", stretch)

    def set_pace(self, factor: float) -> None:
        """Every step takes `factor` times what it took at the start; it finds out by its steps."""
        turns = self._turns_now()
        if turns is not None:
            self.loop.skip(turns)
            self._quiet = 0
            self._next(self._since + turns * self._turn_s)
        for engine in self.loop.engines.values():
            engine.set_pace(self.facts["pace"] * factor)
        self._factor, self._turns = factor, self._turns_taken()

    def _turns_taken(self) -> int:
        return sum(engine.steps for engine in self.loop.engines.values())

    def _hear(self, what: str, stretch: Stretch) -> None:
        self._inbox.append((what, stretch))
        if self._until is None:
            self._since = self.clock.now
            self._next(self.clock.now)  # after all else that happens now, so that who comes at once starts at once
        elif self._quiet and (turns := self._turns_now()) is not None and turns < self._quiet:
            self._quiet = turns
            self._next(self._since + turns * self._turn_s)

    def _turns_now(self) -> int | None:
        """Quiet turns that have begun; None where there are none."""
        return min(turns_until(self.clock.now - self._since, self._turn_s), self._quiet) if self._quiet else None

    def _next(self, time: float) -> None:
        self._until = time
        self._plan += 1
        self.clock.at(time, self._boundary, self._plan)

    def _boundary(self, plan: int) -> None:
        if plan != self._plan:
            return
        loop, now = self.loop, self.clock.now
        self.busy_s += now - self._since
        self._since = now
        if self._quiet:
            loop.skip(self._quiet)
            self._quiet = 0
        for what, stretch in self._inbox:
            if stretch.state != "gone":
                (loop.take if what == "take" else loop.bring if what == "bring" else loop.drop)(stretch)
        self._inbox.clear()
        if loop.idle:
            self._until = None
            return
        turns, seconds = loop.quiet()
        if turns:
            self._quiet, self._turn_s = turns, seconds
            self._next(now + turns * seconds)
            return
        until, gone = loop.turn(now)
        for time, stretch in gone:
            self.clock.at(time, stretch.done, time)
        self._next(until)

    def outlook(self) -> tuple[float, Loop]:
        """A copy of the loop and the boundary at which it stands so, now or soon."""
        copy, boundary = self.loop.copy(), self.clock.now if self._until is None else self._until
        if (turns := self._turns_now()) is not None:
            copy.skip(turns)
            boundary = self._since + turns * self._turn_s
        for what, stretch in self._inbox:  # who has come and is taken in there; who leaves is a rare one and stays
            if what == "take" and stretch.ready:
                copy.take(stretch.twin())
            elif what == "bring" and stretch.state == "encoded":
                copy.bring(stretch.twin())
        return boundary, copy

    # --- what the gateway knows ---

    def beat(self) -> None:
        """A heartbeat."""
        running = sum([len(engine.walks) for engine in self.loop.engines.values()])
        battery = self.battery.read(self.clock.now, self.loop.image_steps) if self.battery else None
        link = self.link
        if self._slower != self._factor and self._turns_taken() - self._turns > WINDOW // 2:
            self._slower = self._factor
        beat = {
            "running": running, "queued": self.held - running, "battery": battery,
            "slower": round(faded(self._slower, self.clock.now - self._since if self._until is None else 0.0), 3),
            "round_trip_s": link.round_trip_s if link else 0.0, "bytes_per_s": link.bytes_per_s if link else FREE,
        }  # fmt: skip
        if beat != self._beat:
            self._beat, self._state = beat, None

    def give(self, work_s: float) -> None:
        """Work was given to it, or has left it (below 0)."""
        self.backlog_s = max(0.0, self.backlog_s + work_s)
        self._state = None

    @property
    def state(self) -> NodeState:
        if self._state is None:
            self._state = NodeState(backlog_s=self.backlog_s, **self._beat, **self.facts)
        return self._state


FREE = 1e12  # bytes a second where there is no link: what comes of them is no time


class On:
    """A request's stretch on a node, which is held there until the gateway hears that it left."""

    __slots__ = ("held", "node", "stretch", "work_s")

    def __init__(self, node: SimNode, stretch: Stretch, work_s: float):
        self.node, self.stretch, self.work_s, self.held = node, stretch, work_s, True
        node.give(work_s)
        node.held += 1

    def leave(self) -> None:
        if self.held:
            self.held = False
            self.node.give(-self.work_s)
            self.node.held -= 1
