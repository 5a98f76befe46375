"""When an action would be done: backlog, steps, transfers; the estimate that greedy policies choose by."""

from __future__ import annotations

from itertools import pairwise

from scheduler.policy import Action, Context, NodeState

# Before anything was measured on a link: a home's upload of 20 Mbit/s and 20 ms.
UNKNOWN_BYTES_PER_S, UNKNOWN_ROUND_TRIP_S = 2.5e6, 0.02


def finish_time(context: Context, action: Action) -> float:
    """Seconds from now until the image is with its asker, legs one after the other, no batch shared with others."""
    program, nodes = action.program, [context.nodes[name] for name in action.nodes]
    seconds, busy = nodes[0].encode_s, set()
    for leg, node in zip(program.legs, nodes, strict=True):
        if node.name not in busy:  # what waits on a node passes while earlier legs run elsewhere
            seconds = max(seconds, node.waiting_s)
            busy.add(node.name)
        seconds += leg.steps * node.step_s(program.family, leg.member)
    for before, after in pairwise(nodes):
        if before.name != after.name:
            seconds += transfer(before, after, context.latent_bytes.get(program.family, 0))
    return seconds + nodes[-1].decode_s + transfer(nodes[-1], None, context.image_bytes.get(program.family, 0))


def transfer(sender: NodeState, receiver: NodeState | None, size: int) -> float:
    """Seconds of `size` bytes between two nodes, or to the gateway: half a round trip and the bytes over the slower end."""
    ends = [sender, receiver] if receiver else [sender]
    rate = min(end.bytes_per_s or UNKNOWN_BYTES_PER_S for end in ends)
    delay = sum(UNKNOWN_ROUND_TRIP_S if end.round_trip_s is None else end.round_trip_s for end in ends) / 2
    return delay + size / rate
