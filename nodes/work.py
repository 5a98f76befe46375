"""A stretch of a program under way on a node: what it holds, what of it is checked, and the bytes it is handed on as.

Knows no thread and no engine; the compute thread owns every `Work` and is the only one to touch its tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nodes.messages import Assign
from relay.errors import RelayError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from nodes.cache.store import Hit
    from relay.cached import CachedStart
    from relay.conditioning import Conditioning
    from relay.handoff import Handoff
    from relay.pipeline import RelayPipeline
    from relay.request import Job

log = logging.getLogger("relay.node")
Key = tuple[str, int, int]  # job, attempt, first leg: `Assign.key`


@dataclass
class Event:
    """What happened to a stretch. `kind`: stage | progress | checkpoint | preview | embeddings | look | latent | handoff |
    image | failed. `about`: what a look-up asks for (`nodes.cache.keeper.Look`), or the latent to be cached (`Kept`)."""

    kind: str
    key: Key
    stage: str = ""
    leg: int = 0
    step: int = 0
    of: int = 0
    spent_s: float = 0.0
    batch: int = 0
    data: bytes = b""
    reason: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    about: Any = None


@dataclass
class Work:
    """`k`: the leg that it stands before or walks. `received`: the handoff that it goes on from. `spent`: stage ->
    seconds."""

    assign: Assign
    pipe: RelayPipeline
    job: Job
    deadline: float
    arrived: float
    k: int
    cond: Conditioning | None = None
    received: Handoff | None = None
    begun: CachedStart | None = None  # in place of noise
    ready: bool = False  # the latent is here, or noise can be drawn
    stage: str = "queued"
    since: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    sigmas: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, assign: Assign, pipes: Mapping[str, RelayPipeline], deadline: float) -> Work:
        from relay.program import Program
        from relay.request import Job

        program, now = Program.parse(assign.program), time.monotonic()
        negatives = None if assign.negative is None else [assign.negative]
        job = Job(program, [assign.prompt], negatives, (assign.width, assign.height), [assign.seed])
        ready = assign.source.kind == "noise" and not (assign.cache is not None and assign.cache.most)
        return cls(assign, pipes[program.family], job, deadline, now, assign.first_leg, ready=ready, since=now)

    @property
    def key(self) -> Key:
        return self.assign.key

    @property
    def walk_id(self) -> str:
        """As the engine knows it; `key_of` is the way back."""
        return "#".join(map(str, self.key))

    @property
    def engine(self) -> tuple[str, str]:
        """Family and member of the leg that it walks, of the last one once all are walked."""
        program = self.job.program
        return program.family, program.legs[min(self.k, len(program.legs) - 1)].member

    @property
    def prompt_key(self) -> tuple[Any, ...]:
        """Works with equal ones have equal conditioning."""
        job = self.job
        return job.program.family, job.prompts[0], self.negative, job.guided, job.size

    @property
    def negative(self) -> str | None:
        return self.job.negatives[0] if self.job.negatives else None

    @property
    def asks_cache(self) -> bool:
        """Whether it begins from what the latent cache has, once that has answered."""
        return not self.ready and self.assign.source.kind == "noise"

    @property
    def leaves(self) -> bool:
        """Whether latents of the leg that it walks may be cached: of a first leg, all of it walked here from noise. One
        that began from another's latent is no full picture of its prompt, and its followers would stray further."""
        use, began = self.assign.cache, self.received is None and self.begun is None
        return use is not None and use.keep and self.k == 0 and began and not self.assign.degraded

    @property
    def vector(self) -> NDArray[np.float32]:
        """By which prompts are compared: the pooled embedding, (P,)."""
        assert self.cond is not None
        return self.cond.pooled[0].float().cpu().numpy()

    @property
    def ships(self) -> bool:
        """Whether another node walks on with the embeddings that are here."""
        return self.job.program.conditioning == "ship" and self.assign.last_leg + 1 < len(self.job.program.legs)

    # --- what it goes on from ---

    def receive(self, data: bytes | memoryview) -> None:
        """Take the handoff that it waits for. HandoffRefused or RelayError where it is none, or not this stretch's."""
        from relay.handoff import Handoff, accept
        from relay.pipeline import starts_of

        handoff = Handoff.from_bytes(data)
        accept(handoff, self.pipe.family)
        said = (handoff.prompts, handoff.negative_prompts, handoff.seeds, (handoff.width, handoff.height))
        ours = (self.job.prompts, self.job.negatives, self.job.seeds, self.job.size)
        if said != ours:
            raise RelayError(f"the latent that came for job {self.assign.job} was made for another request")
        if handoff.program != self.assign.program and not self.assign.degraded:
            raise RelayError(
                f"the latent that came for job {self.assign.job} was made by another program: {handoff.program}"
            )
        self.received, self.ready = self._fitted(handoff), True
        self.job.starts = starts_of(handoff)

    def begin_from(self, hit: Hit | None, space: str) -> None:
        """Take what the cache found. None, or what is no latent of this leg's: it begins from noise."""
        self.ready = True
        if hit is None:
            return
        from relay import codecs
        from relay.cached import CachedStart, check_start

        family, size = self.pipe.family, self.job.size
        shape = (family.channels, size[1] // family.factor, size[0] // family.factor)
        try:
            latent = codecs.decode(hit.payload, "fp32", (1, *shape))
            found = CachedStart(space, hit.skipped, latent, hit.source, round(hit.similarity, 6))
            check_start(found, self.job.program, space, shape)
        except RelayError as error:
            log.error("a cached latent is of no use to job %s: %s", self.assign.job, error)
            return
        self.begun, self.job.starts = found, [found.told]

    def _fitted(self, handoff: Handoff) -> Handoff:
        """What one program reached, as what another goes on from (only where an answer may be degraded).

        A leg that was cut short becomes a leg that ended there; a leg that ended early is under way again.
        """
        if handoff.leg_index == self.k:
            return handoff
        if not self.assign.degraded:
            raise RelayError(f"the latent stands before leg {handoff.leg_index}, not before leg {self.k}")
        if handoff.leg_index < self.k:
            walked = handoff.sigmas_walked[: handoff.index + 1]
        else:
            walked = self.pipe.leg_sigmas(self.job, self.k, None)
        return replace(handoff, leg_index=self.k, sigmas_walked=walked)

    def next_leg(self) -> tuple[torch.Tensor, int]:
        """The latent that leg `k` begins with, and how many of its `sigmas`, which are set, are walked already."""
        from relay.request import draw_noise

        self.sigmas = self.pipe.leg_sigmas(self.job, self.k, self.received)
        if self.received is None and self.begun is not None:
            return self.begun.latent, self.begun.skipped
        if self.received is None:
            return draw_noise(self.pipe.family, self.job, 1, None, self.job.seeds[0], None), 0
        return self.received.latent, self.received.index if self.received.under_way else 0

    # --- what goes on from it ---

    def stay(self, latent: torch.Tensor) -> None:
        """Before leg `k`, which this node walks too. Coded all the same: the bytes are part of the program."""
        self.received = self.pipe.over_the_wire(self.job, self._packed(latent))

    def hand_on(self, latent: torch.Tensor) -> bytes:
        """The handoff before leg `k`, for another node."""
        return self._as_sent(self._packed(latent))

    def checkpoint(self, index: int, x: torch.Tensor) -> bytes:
        """The latent as it is, in fp32: going on from it draws what the unbroken run draws."""
        return self._as_sent(replace(self._packed(x.clone()), index=index, codec="fp32"))

    def _packed(self, latent: torch.Tensor) -> Handoff:
        assert self.cond is not None
        return self.pipe.pack(self.job, self.k, latent, self.sigmas, self.cond)

    def _as_sent(self, handoff: Handoff) -> bytes:
        """On the network conditioning travels apart, so a handoff proves its prompts instead."""
        from relay.conditioning import prompt_digest

        digest = prompt_digest(self.job.prompts, self.job.negatives)
        return replace(
            handoff, conditioning=None, conditioning_digest=digest, conditioning_fingerprint=None
        ).to_bytes()  # fmt: skip

    def made(self) -> dict[str, Any]:
        """What it takes to make the picture again."""
        from nodes.results import version

        job = self.job
        return {
            "prompt": job.prompts[0], "negative_prompt": self.negative, "family_source": job.program.family,
            "program": str(job.program), "seed": job.seeds[0], "width": job.size[0], "height": job.size[1],
            "dtype": self.pipe.dtype, "steps": job.program.taken(job.skipped), "version": version(),
            "start": job.starts[0] if job.starts else None,
        }  # fmt: skip

    def enter(self, stage: str, step: int = 0) -> Event:
        """It enters a stage; the one that it leaves is told with the time it took."""
        now = time.monotonic()
        spent, left = now - self.since, self.stage
        self.spent[left] = self.spent.get(left, 0.0) + spent
        self.stage, self.since = stage, now
        return Event("stage", self.key, stage, self.k, step, len(self.sigmas) - 1, spent_s=spent, report={"left": left})


def key_of(walk_id: str) -> Key:
    job, attempt, leg = walk_id.rsplit("#", 2)
    return job, int(attempt), int(leg)
