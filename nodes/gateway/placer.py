"""The placer: what could serve a waiting job now, which of it the policy takes, and telling every node of it at once.

    place       actions that could serve it now -> policy decides -> logged -> nodes are told
    degrade     nothing can run its program: another program finishes, where the asker allowed it

Knows no socket: `send` puts a message on its way to a node and says whether it could.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from nodes.deployment import CacheConfig, GatewayConfig
from nodes.depot import CHECKPOINT
from nodes.gateway.assignments import assignments, may_start
from nodes.gateway.deciding import Decider
from nodes.gateway.jobs import Job, Point
from nodes.gateway.load import Leave, LoadControl
from nodes.gateway.placement import actions_for, stretches, work_s
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Node, Registry
from nodes.gateway.timeline import Timeline
from nodes.messages import Allow, Assign, Message, Source
from relay.program import Program
from scheduler.policy import Action, Context

Send = Callable[[str, Message], Awaitable[bool]]
Telling = Coroutine[Any, Any, str | None]  # gives why a node could not be told
BOOT = 100_000  # attempts are numbered from boot x BOOT, so that no attempt of an earlier process is newer


class Placer:
    def __init__(
        self, config: GatewayConfig, registry: Registry, planner: Planner, decider: Decider,
        timeline: Timeline, send: Send, boot: int, cache: CacheConfig,
    ):  # fmt: skip
        self.cache = cache
        self.config, self.registry, self.planner, self.decider = config, registry, planner, decider
        self.timeline, self.send = timeline, send
        self.gateway = Source(kind="fetch", node="gateway", address=config.data_address, checkpoint=True)
        self._attempts = boot * BOOT
        self.load: LoadControl | None = None

    def next_attempt(self) -> int:
        self._attempts += 1
        return self._attempts

    async def place(self, job: Job) -> Telling | None:
        """Place a job where somebody is there for it; what is left is to tell its nodes, which the caller begins at once and
        waits for elsewhere: a node that is stopped takes half a second to give up on."""
        point = job.best_point(self.registry.alive_names) if job.program else None
        programs = [job.program] if job.program and (point or job.request.fixes) else job.programs
        first = point.leg if point else 0
        leave = Leave(programs)
        if self.load is not None and point is None:
            leave = self.load.allowed(job, programs, may_start(job.request, self.cache))
        actions = actions_for(job, leave.programs, self.registry.ready(), first)
        if not actions and leave.told:  # what is left cannot be placed, a device that is gone, say: all of it may
            leave = Leave(programs)
            actions = actions_for(job, programs, self.registry.ready(), first)
        if actions:
            return await self._act(job, actions, point, first, leave)
        if job.request.may_degrade and time.monotonic() - job.moved > self.config.degrade_after_s:
            return await self._degrade(job, point)
        return None

    async def _degrade(self, job: Job, point: Point | None) -> Telling | None:
        """Another program finishes; what was done counts where the large member's first leg reached a step."""
        done = None
        before = job.program or job.programs[0]
        if point and before.legs[0].member == "large" and (point.leg, point.index) <= (1, 0):
            done = point.index if point.leg == 0 else before.legs[0].last
        ready = self.registry.ready()
        for kept, handoff in ((point, done), (None, None)) if done else ((None, None),):
            programs = await self.planner.others(job.request, before, handoff)
            found = []
            for program in programs:
                first = 1 if kept and len(program.legs) > 1 else 0
                found += [(action, first) for action in actions_for(job, [program], ready, first)]
            if found:
                first = found[0][1]
                job.degraded = True
                job.history.append(f"no node could go on with {before}")
                return await self._act(job, [action for action, at in found if at == first], kept, first)
        return None

    async def _act(
        self, job: Job, actions: list[Action], point: Point | None, first: int, leave: Leave | None = None
    ) -> Telling | None:
        """Decide among actions that begin with leg `first`, log it, tell every node."""
        left_over = [_left(action, first) for action in actions]
        latents, images = self.planner.sizes(job.size)
        context = Context(
            job=job.id, prompt=job.request.prompt, nodes=self.registry.states(), preference=job.request.preference,
            deadline_s=job.left_s, attempt=job.tries + 1, latent_bytes=self._charged("latent", latents),
            image_bytes=self._charged("image", images), notes=leave.notes if leave else {},
        )  # fmt: skip
        decided = job.program is not None and (point is not None or job.request.fixes)
        chosen = self.decider.decide(job, context, left_over, resumed=decided, load=leave.told if leave else None)
        action = actions[left_over.index(chosen.action)]
        job.skip = leave.skips.get(str(action.program)) if leave else None
        left, waited = str(job.stage), time.monotonic() - job.moved
        job.place(self.next_attempt(), action.program, chosen, stretches(action, first), point)
        if self.load is not None:
            self.load.placed(job)
        self.timeline.placed(job, left, waited)
        job.tell("placed")
        return self._telling(job, action.program, point)

    def _keeper(self) -> Node | None:
        """The edge that keeps checkpoints, if the config names one and it is there."""
        keeper = self.registry.nodes.get(self.config.checkpoints_to or "")
        return keeper if keeper is not None and self.registry.alive(keeper) and not keeper.leaving else None

    def _charged(self, kind: str, sizes: dict[str, int]) -> dict[str, int]:
        """As they travel: on a scaled link nodes bring each message to a real family's size."""
        least = max((node.register.pad.get(kind, 0) for node in self.registry.ready()), default=0)
        return {family: max(size, least) for family, size in sizes.items()}

    def _telling(self, job: Job, program: Program, point: Point | None) -> Telling:
        """What its nodes are told of a placement; begun before anything else happens to the job."""
        allows = []
        if point and point.holder not in ("gateway", job.stretches[0].node):
            key = self.registry.nodes[job.stretches[0].node].key
            leg = CHECKPOINT if point.checkpoint else point.leg
            allows.append((point.holder, Allow(job=job.id, leg=leg, key=key)))
        keeper = self._keeper()
        if keeper is not None:
            for key in {self.registry.nodes[name].key for name in job.nodes()} - {keeper.key}:
                allows.append((keeper.name, Allow(job=job.id, leg=CHECKPOINT, key=key)))
        messages = assignments(
            job, point, self.registry, self.gateway, self.config.checkpoint_every, keeper, self.cache
        )
        assigns = []
        for stretch, message in zip(job.stretches, messages, strict=True):
            node = self.registry.nodes[stretch.node]
            node.jobs[job.id] = node.jobs.get(job.id, 0.0) + work_s(program, stretch, node)
            assigns.append((stretch.node, message))
        return self._tell(allows, assigns)

    async def _tell(self, allows: list[tuple[str, Allow]], assigns: list[tuple[str, Assign]]) -> str | None:
        """Why the job must be placed again where a node could not be told."""
        for name, allow in allows:
            await self.send(name, allow)
        for name, assign in assigns:
            if not await self.send(name, assign):
                return f"node {name} could not be told"
        return None


def _left(action: Action, first: int) -> Action:
    """As policies see it: of a job that goes on, the legs that are left."""
    if not first:
        return action
    program = action.program
    return Action(replace(program, legs=program.legs[first:], guidance=program.guidance[first:]), action.nodes)
