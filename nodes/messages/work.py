"""Work: what the gateway assigns, and what becomes of it."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from nodes.messages.base import Message, Numbered


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stretch's first latent comes from.

    noise     drawn from the seed
    fetch     asked for at the data socket `address` of the edge `node`, or of the gateway
    put       the node `node` with key `key` dials this edge and puts it there
    held      this very node has it
    """

    kind: str  # noise | fetch | put | held
    node: str = ""
    address: str = ""
    key: str = ""  # CURVE public key of `address`, empty in plain text
    checkpoint: bool = False  # not the handoff before the stretch, but the newest checkpoint of the job


class CacheUse(msgspec.Struct, frozen=True, kw_only=True):
    """What an assignment says of the edge's latent cache. The gateway decides whether and how far a request may start
    from it; which latent that is follows from what the edge has, by its family's rule.

    owner    whose latents it may start from, and whose its own become: a tenant, as a digest
    most     steps that it may skip; 0: it starts from noise
    nth      which picture of its request it is: each starts from another source
    keep     whether latents of its walk may be kept
    """

    owner: str
    most: int = 0
    nth: int = 0
    keep: bool = True


class Assign(Message, frozen=True, kw_only=True, tag="assign"):
    """Gateway -> node: walk the legs first..last of a program (and decode after the last leg).

    `attempt` counts placements of the job: an answer to an older one is stale. `put_to`: dial that edge and put the
    latent there, for a device, which nobody can dial.
    """

    senders: ClassVar = ("gateway",)
    job: str
    attempt: int
    program: str
    prompt: str
    negative: str | None
    seed: int
    width: int
    height: int
    first_leg: int
    last_leg: int
    source: Source
    put_to: Source | None = None
    next_key: str = ""  # whose connection may fetch the latent that this stretch ends with
    deadline_s: float | None = None  # left when this was sent
    checkpoint_every: int = 0  # steps; 0: never
    checkpoint_to: Source | None = None  # the edge that keeps them; None, or it does not take one: the gateway
    preview_every: int = 0
    degraded: bool = False  # another program finishes what the first one began: its latent may name that one
    cache: CacheUse | None = None  # of the edge that starts from noise; None: it is left alone
    keep_image: bool = False  # the asker sits on this node: the picture stays there, the report travels

    @property
    def key(self) -> tuple[str, int, int]:
        """Which stretch it is: a node may have two of one attempt, before and after another node's."""
        return self.job, self.attempt, self.first_leg

    @property
    def embeddings_come(self) -> bool:
        """Whether the conditioning is fetched where the first latent is: the node that had the leg before encoded it.
        A checkpoint comes without, and a device, which puts its latent, can be dialled by nobody."""
        ships = self.program.endswith("conditioning=ship")
        return ships and self.first_leg > 0 and self.source.kind == "fetch" and not self.source.checkpoint


class Taken(Message, frozen=True, kw_only=True, tag="taken"):
    """Node -> gateway: accepted into its queue."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int


class Busy(Message, frozen=True, kw_only=True, tag="busy"):
    """Node -> gateway: its queue is full."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    retry_after_s: float


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Node -> gateway: a stage was entered, or `step` of `of` steps of leg `leg` are done; `kept`: the edge that keeps
    checkpoints has the one of that step.

    `spent_s`: seconds that the stage which has ended took, by the node's own clock.
    """

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    stage: str  # queued | encoding | waiting | denoising | kept | sending | ready | sent | decoding | done
    left: str = ""  # the stage that has ended
    leg: int = 0
    step: int = 0
    of: int = 0
    spent_s: float = 0.0
    batch: int = 0
    bytes: int = 0


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """Node -> gateway: it cannot go on. `kind`: refused (the request's fault), broken (the node's), or lost (a peer's)."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    kind: str
    reason: str


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Gateway -> node: stop working on it at the next step boundary. Handoffs that are kept stay until `Release`."""

    senders: ClassVar = ("gateway",)
    job: str
    attempt: int  # this one and every earlier one
    reason: str = ""


class Release(Message, frozen=True, kw_only=True, tag="release"):
    """Gateway -> node: the job has ended, kept handoffs may go."""

    senders: ClassVar = ("gateway",)
    job: str


class Allow(Message, frozen=True, kw_only=True, tag="allow"):
    """Gateway -> edge: the kept latent before leg `leg` may be fetched by the node with this key. `leg` -2: it may bring
    its checkpoints of the job, and fetch the newest."""

    senders: ClassVar = ("gateway",)
    job: str
    leg: int
    key: str


class Drain(Numbered, frozen=True, kw_only=True, tag="drain"):
    """Gateway or client -> node, client -> gateway: finish or hand on what runs within `limit_s`, then stop."""

    senders: ClassVar = ("gateway", "client")
    node: str
    limit_s: float
