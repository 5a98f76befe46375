"""Requests through a policy, nodes and links: the simulated service.

    arrive     actions that could serve it -> policy decides -> every node of it is told at once
    stretch    denoised in company on each node, the latent over their links between them
    end        the picture at its asker's, or too late; scores are those of a stored image
    learn      the policy is told when the outcome is known, which is after others were decided

An accepted request ends exactly once. A node that is full sends a request back, which is decided again.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np

from experiments.simulate.events import Clock
from experiments.simulate.links import Line, expected, send
from experiments.simulate.loop import Stretch
from experiments.simulate.nodes import On, SimNode
from experiments.simulate.scores import Cell, Scores
from experiments.simulate.world import Placed, World
from experiments.simulate.worth import Reward, known_of, parts_of
from experiments.workloads import TimedRequest
from experiments.workloads.prompts import generator
from scheduler.policy import Action, Context, Decision, Policy

TIMED = 16  # every so many-th decision is timed: asking for CPU time is dear itself
BUSY_MOST_S = 5.0  # a full node's word on when to try again is taken up to here (nodes.gateway.dispatcher)


class Shift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is otherwise from request number `at` on."""

    at: int
    node: str | None = None
    link: float | None = None  # times the bandwidth of that node's link; its delay as many times longer
    pace: float | None = None  # times what its steps took


class Row(msgspec.Struct):
    """One request: what was known and chosen, and what came of it. `preference`: 0 asks for quality, 1 for speed."""

    index: int
    arrival_s: float
    prompt: str
    complexity: str
    preference: float
    device: str | None
    action: Action
    probability: float
    actions: int
    attempts: int = 1
    context: Context | None = None  # where contexts are kept, as is
    decision: Decision | None = None  # whose `distribution` is over the world's actions for its device
    stage: str = "open"  # done | failed
    seconds: float = 0.0
    scores: Cell = {}
    reward: float | None = None
    terms: Mapping[str, float] = {}  # of the reward, before its tanh, where it tells them


class _Job:
    """A request under way."""

    __slots__ = ("context", "decision", "device", "late", "number", "on", "placed", "request", "row")

    def __init__(self, number: int, request: TimedRequest, device: str | None, late: float):
        self.number, self.request, self.device, self.late = number, request, device, late
        self.row: Row | None = None
        self.context: Context | None = None
        self.decision: Decision | None = None
        self.placed: Placed | None = None
        self.on: list[On] = []


class Simulation:
    """A world, what programs draw, and what that is worth. `told`: the reward that policies learn from, if another."""

    def __init__(
        self, world: World, scores: Scores, reward: Reward, told: Reward | None = None, keep_contexts: bool = False
    ):
        self.world, self.scores, self.reward, self.keep_contexts = world, scores, reward, keep_contexts
        self.told = told

    def run(
        self, policy: Policy, requests: Sequence[TimedRequest], seed: int = 0, shifts: Sequence[Shift] = ()
    ) -> list[Row]:
        """A row a request, in their order. `seed`: of links, weather, devices."""
        return Run(self, policy, requests, seed, shifts).rows()


class Run:
    """One run; oracles look into it (`attach`)."""

    def __init__(
        self,
        simulation: Simulation,
        policy: Policy,
        requests: Sequence[TimedRequest],
        seed: int,
        shifts: Sequence[Shift],
    ):
        self.simulation, self.world, self.scores = simulation, simulation.world, simulation.scores
        self.policy, self.requests, self.shifts = policy, requests, shifts
        self.spec = self.world.spec
        self.clock = Clock()
        self.nodes = self.world.build(self.clock, seed)
        self.jobs: dict[str, _Job] = {}  # open ones
        self.decide_s: list[float] = []  # CPU time of the policy's decisions, of some of them
        self._weather_rng, self._retry_rng = generator(seed, "weather"), generator(seed, "retries")
        self._battery_rng = generator(seed, "batteries")
        self._judged = generator(seed, "judged").random(len(requests)) < self.spec.judged
        self._factors: dict[tuple[str, str], float] = {}  # node, why -> times its link's bandwidth
        self._latents = {family: round(latent) for family, (latent, _) in self.world.sizes.items()}
        self._images = {family: round(image) for family, (_, image) in self.world.sizes.items()}
        self._rows: list[Row | None] = [None] * len(requests)
        self._left = len(requests)  # requests whose outcome the policy does not know yet
        devices = self.world.devices
        self._device_of: list[str | None] = [None] * len(requests)
        if self.spec.asker == "device":
            drawn = generator(seed, "devices").integers(len(devices), size=len(requests))
            self._device_of = [devices[i] for i in drawn.tolist()]
        if hasattr(policy, "attach"):
            policy.attach(self)

    def rows(self) -> list[Row]:
        clock = self.clock
        for shift in self.shifts:
            clock.at(self.requests[shift.at].arrival_s, self._shift, shift)
        for number, request in enumerate(self.requests):
            clock.at(request.arrival_s, self._arrive, number)
        clock.at(self.spec.heartbeat_s, self._beat)
        for name, weather in self.spec.weather.items():
            clock.at(self._weather_rng.exponential(weather.mean_s[0]), self._weather, name, 0)
        if batteries := self.spec.batteries.levels:
            for name, node in self.nodes.items():
                if node.battery is not None:
                    apart = [abs(level - node.battery.level) for level in batteries]
                    self._charged(name, apart.index(min(apart)))
        with _rarely_collected():
            clock.run()
        rows = [row for row in self._rows if row is not None]
        assert len(rows) == len(self.requests), "a request was never decided"
        assert not self.jobs, "a request did not end"
        assert not self._left, "an outcome was not told"
        return rows

    # --- what happens by itself ---

    def _beat(self) -> None:
        for node in self.nodes.values():
            node.beat()
        if self._left:
            self.clock.at(self.clock.now + self.spec.heartbeat_s, self._beat)

    def _weather(self, name: str, state: int) -> None:
        """The link leaves `state`, for another that is drawn."""
        weather = self.spec.weather[name]
        count = len(weather.factors)
        state = (state + 1 + int(self._weather_rng.integers(count - 1))) % count
        self._set_link(name, "weather", weather.factors[state])
        if self._left:
            stays = self._weather_rng.exponential(weather.mean_s[state])
            self.clock.at(self.clock.now + stays, self._weather, name, state)

    def _charged(self, name: str, state: int) -> None:
        """A battery is at its level number `state`, and for how long."""
        own, battery = self.spec.batteries, self.nodes[name].battery
        assert battery is not None
        battery.level = own.levels[state]
        if self._left:
            stays = self._battery_rng.exponential(own.mean_s[state])
            count = len(own.levels)
            after = (state + 1 + int(self._battery_rng.integers(count - 1))) % count
            self.clock.at(self.clock.now + stays, self._charged, name, after)

    def _shift(self, shift: Shift) -> None:
        assert shift.node is not None
        if shift.link is not None:
            self._set_link(shift.node, "shift", shift.link)
        if shift.pace is not None:
            self.nodes[shift.node].set_pace(shift.pace)

    def _set_link(self, name: str, why: str, factor: float) -> None:
        link = self.nodes[name].link
        assert link is not None
        self._factors[name, why] = factor
        link.degrade(math.prod(f for (node, _), f in self._factors.items() if node == name))

    # --- a request's way ---

    def _arrive(self, number: int) -> None:
        request = self.requests[number]
        late = request.arrival_s + (request.deadline_s or self.spec.deadline_s)
        job = _Job(number, request, self._device_of[number], late)
        self.jobs[_name(request)] = job
        self.clock.at(late, self._too_late, job)
        self._place(job, 1)

    def _place(self, job: _Job, attempt: int) -> None:
        """Decide, and tell every node of it at once."""
        request, now = job.request, self.clock.now
        if _name(request) not in self.jobs:  # too late meanwhile
            return
        actions = self.world.actions(job.device)
        context = Context(
            job=_name(request), prompt=request.prompt.text, nodes={n: node.state for n, node in self.nodes.items()},
            preference=request.preference,
            deadline_s=job.late - now, latent_bytes=self._latents, image_bytes=self._images, attempt=attempt,
        )  # fmt: skip
        if job.number % TIMED:
            decision = self.policy.decide(context, actions)
        else:
            started = time.thread_time()
            decision = self.policy.decide(context, actions)
            self.decide_s.append(time.thread_time() - started)
        placed = self.world.placed(decision.action)
        job.context, job.decision, job.placed = context, decision, placed
        job.row = self._rows[job.number] = Row(
            request.index, request.arrival_s, request.prompt.text, request.prompt.complexity, context.preference,
            job.device, decision.action, decision.probability, len(actions), attempt,
            *((context, decision) if self.simulation.keep_contexts else ()),
        )  # fmt: skip
        if any(self.nodes[name].held >= self.nodes[name].queue for name, _, _ in placed.stretches):
            pause = min(max(self.nodes[name].backlog_s for name, _, _ in placed.stretches), BUSY_MOST_S)
            again = now + max(pause, 0.05) * self._retry_rng.uniform(0.5, 1.5)
            self.clock.at(again, self._place, job, attempt + 1)
            return
        last = len(placed.stretches) - 1
        for i, (name, legs, work_s) in enumerate(placed.stretches):
            node = self.nodes[name]
            stretch = Stretch(context.prompt, placed.family, legs, i == last, i == 0, _told(self._left_node, job, i))
            stretch.urgency = (job.late, now)
            job.on.append(On(node, stretch, work_s))
            delay = node.link.down.profile.delay_s if node.link else 0.0
            self.clock.at(now + self.spec.overhead_s + delay, node.take, stretch)

    def _left_node(self, job: _Job, i: int, now: float) -> None:
        """A stretch has ended: its latent, or the picture, goes on."""
        if _name(job.request) not in self.jobs:
            return
        here, node, placed = job.on[i], job.on[i].node, job.placed
        assert placed is not None
        if i + 1 < len(job.on):
            after, stretch = job.on[i + 1].node, job.on[i + 1].stretch
            lines = self.lines(node, after)
            comes = send(lines, placed.latent_bytes, now)
            self._measure(node, after, placed.latent_bytes, comes - now)
            self.clock.at(comes, after.bring, stretch)
            self.clock.at(now + (node.link.up.profile.delay_s if node.link else 0.0), here.leave)
            return
        lines = self.lines_home(node, job.device)
        comes = send(lines, placed.image_bytes, now)
        self._measure(node, None, placed.image_bytes, comes - now)
        self.clock.at(comes, self._end, job, "done")

    def lines(self, sender: SimNode, receiver: SimNode) -> list[Line]:
        """What a latent goes through."""
        return ([sender.link.up] if sender.link else []) + ([receiver.link.down] if receiver.link else [])

    def lines_home(self, sender: SimNode, device: str | None) -> list[Line]:
        """What a picture goes through: to the gateway, or to its asker's own device."""
        if device is None:
            return [sender.link.up] if sender.link else []
        return [] if device == sender.name else self.lines(sender, self.nodes[device])

    def _measure(self, sender: SimNode, receiver: SimNode | None, size: float, taken: float) -> None:
        """What traffic tells of the links it went through."""
        for node in (sender, receiver):
            if node is not None and node.link is not None:
                node.link.measure(size, taken + node.link.round_trip_s / 2)

    def _too_late(self, job: _Job) -> None:
        if _name(job.request) in self.jobs:
            for on in job.on:
                on.node.drop(on.stretch)
            self._end(job, "failed")

    def _end(self, job: _Job, stage: str) -> None:
        """The one end of a request; the nodes forget it, and the policy learns when the scores are there."""
        if self.jobs.pop(_name(job.request), None) is None:
            return
        now, row, context, placed = self.clock.now, job.row, job.context, job.placed
        assert row is not None
        assert context is not None
        assert placed is not None
        for on in job.on:
            on.leave()
        job.on = []  # its stretches hold the job: without this only the collector would free them
        row.stage, row.seconds = stage, now - job.request.arrival_s
        if stage == "done":
            row.scores = self.scores.cell(placed.text_program, row.prompt, job.request.seed)
        known = known_of(context, placed, row.seconds, row.scores, stage)
        row.reward, row.terms = parts_of(self.simulation.reward, known)
        judged = stage == "done" and bool(self._judged[job.number])
        told = row.reward
        if stage == "done" and not judged:
            told, known = None, known | {"scores": {}}
        elif self.simulation.told is not None:
            told = self.simulation.told(known)
        error = None if stage == "done" else "its deadline passed"
        outcome = known | {"reward": told, "error": error, "degraded": False, "program": placed.text_program}
        self.clock.at(now + (self.spec.judge_s if judged else 0.0), self._learn, job.decision, outcome)

    def _learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        self._left -= 1
        self.policy.learn(decision, outcome)

    # --- for oracles ---

    def transfer_end(self, lines: Sequence[Line], size: float, now: float) -> float:
        """When a message sent at `now` would come, by the links as they are."""
        return expected(lines, size, now)


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Python's collector looks through all rows again and again; a run makes hardly any cycles."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _told(act: Callable[..., object], job: _Job, i: int) -> Callable[[float], object]:
    return lambda now: act(job, i, now)


def _name(request: TimedRequest) -> str:
    return f"job-{request.index}"


def seconds_of(rows: Sequence[Row]) -> np.ndarray:
    """Seconds of each request."""
    return np.array([row.seconds for row in rows])
