"""Many actions at once: what a list of actions fixes as index arrays, made once, and their predicted times as arrays.

A decision looks at each of its actions within half a millisecond; one by one in Python that would take several. Between
two decisions programs and nodes are mostly the same, and only the nodes' states have changed: so the table of a list is
kept, and `times` is arithmetic over it. The times are those of `scheduler.finish_time`, which says them one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from relay.program import Program
from scheduler.finish_time import UNKNOWN_BYTES_PER_S, UNKNOWN_ROUND_TRIP_S
from scheduler.policy import Action, Context

_MOST_TABLES = 512


class Times(NamedTuple):
    """Seconds of each action (A,): until its image is with its asker, of steps on edge nodes and on devices, of transfers."""

    finish: np.ndarray
    edge: np.ndarray
    device: np.ndarray
    transfer: np.ndarray


class NodeTable(NamedTuple):
    """The nodes of an ActionTable as they stand, each (N,); unknown links by the constants of `scheduler.finish_time`."""

    device: np.ndarray  # bool
    backlog_s: np.ndarray
    running: np.ndarray
    queued: np.ndarray
    batch: np.ndarray
    encode_s: np.ndarray
    decode_s: np.ndarray
    battery: np.ndarray  # nan where unknown
    round_trip_s: np.ndarray
    bytes_per_s: np.ndarray


class ActionTable:
    """Arrays over A actions of at most L legs on N nodes. `step` (A, L) and so on index the lists beside them."""

    def __init__(self, actions: Sequence[Action]):
        self.actions = tuple(actions)
        count, most = len(self.actions), max(len(action.nodes) for action in self.actions)
        self.nodes = list(dict.fromkeys(name for action in self.actions for name in action.nodes))
        self.families = list(dict.fromkeys(action.program.family for action in self.actions))
        self.costs: dict[tuple[str, str, str], int] = {}  # node, family, member -> index of its step time
        order = {name: i for i, name in enumerate(self.nodes)}
        self.leg_node = np.zeros((count, most), np.intp)
        self.leg_cost = np.zeros((count, most), np.intp)
        self.leg_steps = np.zeros((count, most))  # 0 where there is no such leg
        self.moves = np.zeros((count, most - 1))  # 1 where the latent changes node after a leg
        self.family = np.array([self.families.index(action.program.family) for action in self.actions])
        for i, action in enumerate(self.actions):
            program = action.program
            for k, (leg, name) in enumerate(zip(program.legs, action.nodes, strict=True)):
                self.leg_node[i, k] = order[name]
                self.leg_cost[i, k] = self.costs.setdefault((name, program.family, leg.member), len(self.costs))
                self.leg_steps[i, k] = leg.steps
            self.leg_node[i, len(action.nodes) :] = order[action.nodes[-1]]
            self.leg_cost[i, len(action.nodes) :] = self.leg_cost[i, len(action.nodes) - 1]
            for k, (before, after) in enumerate(zip(action.nodes, action.nodes[1:], strict=False)):
                self.moves[i, k] = before != after
        self.last = self.leg_node[:, -1]

    @cached_property
    def member_steps(self) -> np.ndarray:
        """Steps of the large and of the small member over T of the first leg, at most 1, (A, 2)."""
        steps = [
            [a.program.steps[member] / a.program.legs[0].steps_total for member in ("large", "small")]
            for a in self.actions
        ]
        return np.minimum(steps, 1.0)

    @cached_property
    def modes(self) -> list[str]:
        """Each program's mode; "rest": of a job that goes on, the legs that are left."""
        return ["rest" if action.program.legs[0].first else action.program.mode for action in self.actions]

    @cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """The names of each action: family, mode, program (a short hash of its text), nodes with their place in the program."""
        digests = {program: short_hash(program) for program in {action.program for action in self.actions}}
        return [
            (
                f"family={action.program.family}", f"mode={mode}", f"program={digests[action.program]}",
                *(f"node{place}={name}" for place, name in enumerate(action.nodes)),
            )
            for action, mode in zip(self.actions, self.modes, strict=True)
        ]  # fmt: skip

    @cached_property
    def arms(self) -> list[tuple[str, np.ndarray]]:
        """The programs on offer, as text, and the indices of each one's actions."""
        found: dict[str, list[int]] = {}
        for i, action in enumerate(self.actions):
            found.setdefault(str(action.program), []).append(i)
        return [(text, np.array(indices)) for text, indices in found.items()]

    @cached_property
    def text(self) -> str:
        """The actions as JSON: [[program, [node, ...]], ...]."""
        return json.dumps([[str(action.program), action.nodes] for action in self.actions], separators=(",", ":"))

    def node_table(self, context: Context) -> NodeTable:
        nan = float("nan")
        rows = [
            (
                n.role == "device", n.waiting_s, n.running, n.queued, n.batch, n.encode_s, n.decode_s,
                nan if n.battery is None else n.battery,
                UNKNOWN_ROUND_TRIP_S if n.round_trip_s is None else n.round_trip_s,
                n.bytes_per_s or UNKNOWN_BYTES_PER_S,
            )
            for n in (context.nodes[name] for name in self.nodes)
        ]  # fmt: skip
        return NodeTable(*np.array(rows).T)

    def step_s(self, context: Context) -> np.ndarray:
        """Seconds of a step at batch 1 of each leg, (A, L)."""
        costs = [context.nodes[name].step_s(family, member) for name, family, member in self.costs]
        return np.array(costs)[self.leg_cost]

    def finish_s(self, context: Context) -> np.ndarray:
        """Predicted seconds to completion of each action, (A,)."""
        return self.times(context, self.node_table(context), self.step_s(context)).finish

    def times(self, context: Context, nodes: NodeTable, step_s: np.ndarray) -> Times:
        """What `scheduler.finish_time.finish_time` says of each action, and its parts."""
        work = self.leg_steps * step_s
        backlog = nodes.backlog_s[self.leg_node]
        finish = np.maximum(nodes.encode_s[self.leg_node[:, 0]], backlog[:, 0]) + work[:, 0]
        for k in range(1, work.shape[1]):  # a node's backlog counts once: it has passed when a later leg comes to it
            finish = np.maximum(finish, backlog[:, k]) + work[:, k]
        latent, image = (
            np.array([sizes.get(family, 0) for family in self.families], float)[self.family]
            for sizes in (context.latent_bytes, context.image_bytes)
        )
        trip, rate = nodes.round_trip_s, nodes.bytes_per_s
        sent = trip[self.last] / 2 + image / rate[self.last]
        for k in range(work.shape[1] - 1):
            before, after = self.leg_node[:, k], self.leg_node[:, k + 1]
            way = (trip[before] + trip[after]) / 2 + latent / np.minimum(rate[before], rate[after])
            sent = sent + self.moves[:, k] * way
        device = (work * nodes.device[self.leg_node]).sum(1)
        return Times(finish + nodes.decode_s[self.last] + sent, work.sum(1) - device, device, sent)


def short_hash(program: Program) -> str:
    """12 hex digits that stand for a program's text where a name must be short and plain."""
    return hashlib.blake2b(str(program).encode(), digest_size=6).hexdigest()


_TABLES: dict[tuple[tuple[int, tuple[str, ...]], ...], ActionTable] = {}


def table_of(actions: Sequence[Action]) -> ActionTable:
    """The table of these actions, kept by the identity of their programs: to compare programs costs more than to decide."""
    key = tuple([(id(action.program), action.nodes) for action in actions])
    table = _TABLES.get(key)
    if table is None:
        if len(_TABLES) >= _MOST_TABLES:
            _TABLES.clear()
        table = _TABLES[key] = ActionTable(actions)  # it holds the programs, so that their ids stay their own
    return table
