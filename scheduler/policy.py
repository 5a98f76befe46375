"""The one interface that everything which decides plugs into, and the nouns it decides with.

    context = what is known when a job must be placed: prompt, wishes, nodes, links
    actions = every program x nodes that could serve it now
    decision = policy.decide(context, actions)      logged with its probability before it is acted on
    policy.learn(decision, outcome)                 when the outcome is known

A policy knows no socket and holds no model of diffusion; whoever asks it makes the actions, so a policy cannot choose
what cannot be done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from relay.program import Program


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the gateway knows it. `curves`: family -> member -> batch -> seconds a guided step, pace included, as the node
    measured them when it started; `slower`: how many times as long its latest steps took."""

    name: str
    role: str  # edge | device
    curves: dict[str, dict[str, dict[int, float]]]
    backlog_s: float = 0.0  # seconds of work that it has accepted and not done, by its own curve
    running: int = 0
    queued: int = 0
    batch: int = 1
    encode_s: float = 0.0
    decode_s: float = 0.0
    battery: float | None = None
    round_trip_s: float | None = None  # to the gateway
    bytes_per_s: float | None = None
    pace: float = 1.0
    slower: float = 1.0

    def step_s(self, family: str, member: str) -> float:
        """Seconds of one step at batch 1, as the node is now."""
        curve = self.curves[family][member]
        return self.slower * curve[min(curve)]

    @property
    def waiting_s(self) -> float:
        """Seconds until what it has accepted is done, as the node is now."""
        return self.slower * self.backlog_s


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job when it must be placed. `preference`: 0 asks for quality, 1 for speed."""

    job: str
    prompt: str
    nodes: Mapping[str, NodeState]
    preference: float = 0.5
    deadline_s: float | None = None  # seconds left
    latent_bytes: Mapping[str, int] = {}  # family -> bytes of a latent at 16 bit, as links are charged
    image_bytes: Mapping[str, int] = {}
    attempt: int = 1
    # What `scheduler.features` reads from the prompt; empty: it reads `prompt` itself. A log keeps these, not the text.
    prompt_features: Mapping[str, float] = {}
    notes: Mapping[str, float] = {}  # what the router adds, such as `quality_relay`; see `scheduler.features.ROUTER`


class Action(msgspec.Struct, frozen=True):
    """A program and the node of each of its legs."""

    program: Program
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.program} on {','.join(self.nodes)}"


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The action, the probability it was chosen with among `actions`, and what the policy wants remembered.

    `id` names it while its outcome is awaited; `distribution` is the probability of each action on offer, in their order,
    None where the policy cannot say it. `notes["forced"]`: exploration chose, not the policy's estimate.
    """

    action: Action
    probability: float
    policy: str
    actions: int
    notes: dict[str, Any] = {}
    id: str = ""
    distribution: tuple[float, ...] | None = None


@runtime_checkable
class Policy(Protocol):
    """See the module."""

    name: str

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        """One of `actions` (never empty)."""
        ...

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """What came of a decision: seconds, scores, degraded, error; `reward` (`scheduler.reward`) where there is one.

        It may come late, out of turn, or never. Policies that do not learn ignore it.
        """
        ...


@runtime_checkable
class Replayable(Policy, Protocol):
    """A policy that can say what it would draw from, so that a log can tell how good it would have been."""

    def distribution(self, context: Context, actions: Sequence[Action]) -> Sequence[float]:
        """The probability of each action if `decide` were called now; changes nothing."""
        ...
