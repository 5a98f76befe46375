"""Which programs on which nodes could serve a job now, and how a program's legs become stretches on nodes."""

from __future__ import annotations

from itertools import pairwise, product

from nodes.gateway.jobs import Job, Stretch
from nodes.gateway.registry import Node
from relay.program import Program
from scheduler.policy import Action

MOST_ACTIONS = 512


def actions_for(job: Job, programs: list[Program], nodes: list[Node], first_leg: int = 0) -> list[Action]:
    """All programs x nodes that could do the legs from `first_leg` on.

    The user's own device is the only one for a request that names it. Two devices never follow each other: nobody can
    dial a device, so the latent could not get there.
    """
    found: list[Action] = []
    for program in programs:
        candidates = [_holders(job, program, leg.member, nodes) for leg in program.legs[first_leg:]]
        for chosen in product(*candidates):
            if _reachable(chosen) and _decoded(program, chosen):
                found.append(Action(program, tuple(node.name for node in chosen)))
                if len(found) == MOST_ACTIONS:
                    return found
    return found


def _holders(job: Job, program: Program, member: str, nodes: list[Node]) -> list[Node]:
    holding = [node for node in nodes if node.holds(program.family, member)]
    own = job.request.device
    if own is not None:
        holding = [node for node in holding if node.role == "edge" or node.name == own]
    if member == "small" and (devices := [node for node in holding if node.role == "device"]):
        return devices  # an edge that holds a small member is what is left when no device is there
    return holding


def _reachable(nodes: tuple[Node, ...]) -> bool:
    return not any(a is not b and a.role == "device" and b.role == "device" for a, b in pairwise(nodes))


def _decoded(program: Program, nodes: tuple[Node, ...]) -> bool:
    return not nodes or nodes[-1].decodes(program.family)


def stretches(action: Action, first_leg: int = 0) -> list[Stretch]:
    """Consecutive legs on one node become one stretch. `action.nodes` begin with the node of `first_leg`."""
    found: list[Stretch] = []
    for leg, node in enumerate(action.nodes, start=first_leg):
        if found and found[-1].node == node:
            found[-1].last = leg
        else:
            found.append(Stretch(node, leg, leg))
    return found


def work_s(program: Program, stretch: Stretch, node: Node) -> float:
    """Seconds that a stretch takes on a node, alone."""
    total = 0.0
    for leg in program.legs[stretch.first : stretch.last + 1]:
        curve = node.curve(program.family, leg.member)
        if curve:
            total += leg.steps * curve[min(curve)]
    return total
