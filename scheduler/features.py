"""What a learner sees of a request, of the nodes and of each action: bounded numbers with names.

Every value lies in 0..1, so that no feature outweighs another by its unit; where the table says x/(1+x), the value is
squashed by its scale and 0.5 is reached at the scale itself. What is unknown has a value that stands for it and, where
that could be mistaken, a flag beside it.

    CONTEXT   of the prompt, the wish, the router and the nodes as a whole, one vector a request
    ACTION    of a program on its nodes, one vector an action; `labels` adds names (family, mode, program, nodes)
    RISE      the eight numbers of RISE's own context (arXiv 2606.17378, scheduler), for its LinUCB

A change of meaning, order or scale raises VERSION: what was learned on other features is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.errors import BadRequest
from scheduler.finish_time import UNKNOWN_BYTES_PER_S, UNKNOWN_ROUND_TRIP_S
from scheduler.message_sizes import STANDS_FOR
from scheduler.policy import Action, Context, NodeState
from scheduler.syntax import read_prompt

if TYPE_CHECKING:
    import numpy as np

    from scheduler.action_table import ActionTable

VERSION = 1

# Of a prompt, by `scheduler.syntax`: counts over the number that a prompt of this kind seldom passes, at most 1.
_MOST = {
    "objects": 8, "attributes": 16, "relations": 8, "numbers": 4, "letters": 12, "style": 8, "words": 64, "text": 1,
}  # fmt: skip
PROMPT = tuple(_MOST)
# Given in `Context.notes` by a router: the quality, 0..1, that it expects of each mode, and its own word on complexity.
ROUTER = ("quality_full_cloud", "quality_relay", "quality_edge_only", "complexity")
_QUALITY_OF = {"full-cloud": ROUTER[0], "relay": ROUTER[1], "edge-only": ROUTER[2]}

PRICE = "price:"  # + a node's name, in `Context.notes`: the load plan's price of a second of its time, in quality
LOW_BATTERY = 0.2  # of full; RISE's low-battery flag, whose bound is not published
BATTERY_UNKNOWN = 1.0  # a node that says nothing of a battery hangs on the wall

CONTEXT = (
    *PROMPT,
    "preference",  # 0 quality .. 1 speed
    "urgency",  # 1/(1+x), x = seconds left / 10; 0 without a deadline
    "retry",  # 1 from the second attempt on
    *(f"router_{name}" for name in ROUTER),  # 0 where it is not known
    "router",  # 1 where a router spoke
    "battery",  # lowest of the devices, 1 where none is known
    "low_battery",  # 1 where that is below LOW_BATTERY
    "edge_backlog", "edge_backlog_least",  # mean and least over edge nodes, x/(1+x), x = seconds
    "device_backlog_least",  # over devices, likewise
    "edge_occupancy", "device_occupancy",  # mean over nodes of running / batch, at most 1
    "edge_queue", "device_queue",  # mean over nodes, x/(1+x), x = queued / batch
    "device_round_trip",  # least over devices, x/(1+x), x = seconds / 0.1
    "device_slowness",  # of the fastest device link, 1/(1+x), x = bytes per second / 2.5e6
)  # fmt: skip

ACTION = (
    "handoff",  # large member's steps / T of the first leg
    "small",  # small member's steps / T
    "edge_work",  # x/(1+x), x = seconds of steps on edge nodes / time scale
    "device_work",  # likewise on devices
    "transfer",  # x/(1+x), x = seconds of all transfers / (time scale / 10)
    "finish",  # min(1, x/5), x = predicted seconds to completion / time scale: linear, as time is in the reward
    "finish_log",  # log(1+x)/log(1001), x = those seconds / (time scale / 10), at most 1: far beyond the scale too
    "slower",  # 1 - best/finish, best: the least predicted time on offer
    "late",  # 1 where that is after the deadline
    "edge_step", "device_step",  # x/(1+x), x = seconds of a step at batch 1 / 0.05, dearest of its nodes
    "wait",  # x/(1+x), x = longest backlog of its nodes / time scale
    "occupancy",  # highest of its nodes, running / batch, at most 1
    "queue",  # highest of its nodes, x/(1+x), x = queued / batch
    "round_trip",  # sum over its nodes, x/(1+x), x = seconds / 0.1
    "slowness",  # of its slowest link, 1/(1+x), x = bytes per second / 2.5e6
    "battery",  # lowest of its nodes
    "drain",  # device_work where that battery is low, else 0
    "quality",  # what the router expects of its mode, 0 where it is not known
    "price",  # quality that its work would be worth elsewhere, at most 1: the load plan's prices x seconds; 0 unpressed
)  # fmt: skip

RISE = (
    "complexity", "text", "slow_network", "low_battery", "preference",
    "occupancy_vega", "occupancy_sdxl", "occupancy_sd35",
)  # fmt: skip
# Its pools: who they stand for, and the member. RISE's SD3.5 Medium pool is in its set-up but not in its context.
_POOLS = (("sdxl", "small"), ("sdxl", "large"), ("sd35", "large"))


class Features(NamedTuple):
    """Of one decision: context (C,), actions (A, F), both float32, and the labels of each action."""

    context: np.ndarray
    actions: np.ndarray
    labels: list[tuple[str, ...]]


def featurise(context: Context, actions: Sequence[Action], time_scale_s: float = 1.0) -> Features:
    """All that a learner sees of a decision. `time_scale_s`: seconds that count as one, best the reward's own scale."""
    import numpy as np

    from scheduler.action_table import table_of

    table = table_of(actions)
    vector = np.array(context_features(context), np.float32)
    return Features(vector, action_features(context, table, time_scale_s), table.labels)


def prompt_features(context: Context) -> Mapping[str, float]:
    """Name -> value of PROMPT: what the context brings along, else read from its prompt."""
    if context.prompt_features:
        missing = [name for name in PROMPT if name not in context.prompt_features]
        if missing:
            raise BadRequest(f"prompt features lack {', '.join(missing)}; leave them out to have the prompt read")
        return context.prompt_features
    return read_features(context.prompt)


def read_features(prompt: str) -> dict[str, float]:
    """PROMPT's values of a prompt: what may be logged in its place."""
    found = read_prompt(prompt)
    return {name: min(1.0, getattr(found, name) / most) for name, most in _MOST.items()}


def complexity(prompt: Mapping[str, float]) -> float:
    """RISE's prompt complexity as one number, 0..1; how it counts is not published, this is ours: three parts what is to
    be drawn, two what is said of it, one how it stands to each other."""
    return (3 * prompt["objects"] + 2 * prompt["attributes"] + prompt["relations"]) / 6


def context_features(context: Context) -> list[float]:
    """The values of CONTEXT."""
    prompt = prompt_features(context)
    notes = context.notes
    devices = [node for node in context.nodes.values() if node.role == "device"]
    edges = [node for node in context.nodes.values() if node.role != "device"]
    battery = min((_battery(node) for node in devices), default=BATTERY_UNKNOWN)
    left = context.deadline_s
    return [
        *(prompt[name] for name in PROMPT),
        _bounded(context.preference),
        0.0 if left is None else 1 / (1 + max(left, 0.0) / 10),
        float(context.attempt > 1),
        *(_bounded(notes.get(name, 0.0)) for name in ROUTER),
        float(any(name in notes for name in ROUTER)),
        battery,
        float(battery < LOW_BATTERY),
        _mean([_squash(node.waiting_s, 1.0) for node in edges]),
        min((_squash(node.waiting_s, 1.0) for node in edges), default=0.0),
        min((_squash(node.waiting_s, 1.0) for node in devices), default=0.0),
        _mean([_occupancy(node) for node in edges]),
        _mean([_occupancy(node) for node in devices]),
        _mean([_squash(node.queued, node.batch) for node in edges]),
        _mean([_squash(node.queued, node.batch) for node in devices]),
        min((_squash(_round_trip(node), 0.1) for node in devices), default=0.0),
        min((_slowness(node) for node in devices), default=0.0),
    ]


def action_features(context: Context, table: ActionTable, time_scale_s: float = 1.0) -> np.ndarray:
    """The values of ACTION, (A, F) float32."""
    import numpy as np

    nodes, step_s = table.node_table(context), table.step_s(context)
    times = table.times(context, nodes, step_s)
    battery = np.where(np.isnan(nodes.battery), BATTERY_UNKNOWN, nodes.battery)
    each = np.stack(  # of nodes: each feature is the highest of an action's nodes
        [
            nodes.backlog_s / (nodes.backlog_s + time_scale_s),
            np.minimum(1.0, nodes.running / nodes.batch),
            nodes.queued / (nodes.queued + nodes.batch),
            UNKNOWN_BYTES_PER_S / (UNKNOWN_BYTES_PER_S + nodes.bytes_per_s),
            1 - battery,
        ],
        axis=1,
    )
    highest = each[table.leg_node].max(1)  # (A, 5)
    on_device = nodes.device[table.leg_node]
    trip = nodes.round_trip_s[table.leg_node[:, 0]]
    if table.leg_node.shape[1] > 1:
        trip = trip + (table.moves * nodes.round_trip_s[table.leg_node[:, 1:]]).sum(1)
    best, left = times.finish.min(), np.inf if context.deadline_s is None else context.deadline_s
    device_work = times.device / (times.device + time_scale_s)
    found = np.empty((len(table.actions), len(ACTION)), np.float32)
    columns = (
        table.member_steps[:, 0],
        table.member_steps[:, 1],
        times.edge / (times.edge + time_scale_s),
        device_work,
        times.transfer / (times.transfer + time_scale_s / 10),
        np.minimum(1.0, times.finish / (5 * time_scale_s)),
        np.minimum(1.0, np.log1p(10 / time_scale_s * times.finish) / _LOG),
        1 - best / np.maximum(times.finish, 1e-9),
        times.finish > left,
        _most(step_s * (1 - on_device), 0.05),
        _most(step_s * on_device, 0.05),
        highest[:, 0],
        highest[:, 1],
        highest[:, 2],
        trip / (trip + 0.1),
        highest[:, 3],
        1 - highest[:, 4],
        device_work * (highest[:, 4] > 1 - LOW_BATTERY),
        _expected(context, table),
        _price(context, table, step_s),
    )
    for i, column in enumerate(columns):
        found[:, i] = column
    return found


def _most(seconds: np.ndarray, scale: float) -> np.ndarray:
    most = seconds.max(1)
    return most / (most + scale)


def _expected(context: Context, table: ActionTable) -> Any:
    """What the router expects of each action's mode, (A,); 0 where it said nothing."""
    if not context.notes:
        return 0.0
    return [_bounded(context.notes.get(_QUALITY_OF.get(mode, ""), 0.0)) for mode in table.modes]


def _price(context: Context, table: ActionTable, step_s: np.ndarray) -> Any:
    """Of each action's work at its nodes' prices, (A,); 0 where the context tells none."""
    prices = [context.notes.get(f"{PRICE}{name}", 0.0) for name in table.nodes]
    if not any(prices):
        return 0.0
    import numpy as np

    return np.clip((table.leg_steps * step_s * np.array(prices)[table.leg_node]).sum(1), 0.0, 1.0)


def rise_context(context: Context) -> np.ndarray:
    """RISE's eight numbers, (8,) float64, each 0..1.

    "Inverse network quality" is the slowness of the devices' fastest link; a pool's occupancy is the mean over the nodes
    that hold its member, 0 where there is none; pools go by the family that an embedded one stands for.
    """
    import numpy as np

    prompt = prompt_features(context)
    devices = [node for node in context.nodes.values() if node.role == "device"]
    battery = min((_battery(node) for node in devices), default=BATTERY_UNKNOWN)
    pools = [
        _mean([_occupancy(node) for node in context.nodes.values() if _holds(node, stands_for, member)])
        for stands_for, member in _POOLS
    ]
    slow = min((_slowness(node) for node in devices), default=0.0)
    return np.array(
        [complexity(prompt), prompt["text"], slow, float(battery < LOW_BATTERY), _bounded(context.preference), *pools]
    )


def _holds(node: NodeState, stands_for: str, member: str) -> bool:
    return any(STANDS_FOR.get(family) == stands_for and member in curves for family, curves in node.curves.items())


_LOG = math.log(1001)


def _squash(value: float, scale: float) -> float:
    return 0.0 if value <= 0 else value / (value + scale)


def _bounded(value: float) -> float:
    return value if not (value < 0 or value > 1) else float(value > 1)  # nan stays nan, and is refused where it is used


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _occupancy(node: NodeState) -> float:
    return min(1.0, node.running / node.batch)


def _battery(node: NodeState) -> float:
    return BATTERY_UNKNOWN if node.battery is None else _bounded(node.battery)


def _round_trip(node: NodeState) -> float:
    return UNKNOWN_ROUND_TRIP_S if node.round_trip_s is None else node.round_trip_s


def _slowness(node: NodeState) -> float:
    return UNKNOWN_BYTES_PER_S / (UNKNOWN_BYTES_PER_S + (node.bytes_per_s or UNKNOWN_BYTES_PER_S))
