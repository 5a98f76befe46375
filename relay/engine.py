"""The step engine: many requests, one batch, a new choice of who is in it at every step.

One engine serves one member of one family. Requests differ in handoff step, sigma, guidance and arrival, but each needs
"one more step of this member", so `step` takes one step of one batch with a sigma per sample; who has reached the end
of its sigmas leaves at once, who waits enters at the next step (continuous batching at step granularity). Euler steps
are stateless: entering, leaving, being set aside and going on elsewhere cost one row copied.

    submit    checked and queued; Busy when full
    step      whose turn is it?       deficit round robin over lanes: shapes that cannot share a batch
              who steps?              the lane's first B by deadline, then arrival; `relay.batching` chooses B
              one Euler step          rows are gathered again only where others step than before
              who has ended?          arrived, cancelled, too late, non-finite: told at the step's boundary

Why the first B of n and not all n: where throughput is the same, n t(B) / B = t(n), walks of S steps that all share the
batch all end at S t(n). B at a time, the k-th group ends at k S t(B): the last at the same time as before and every
other one earlier, so the median falls to about half.

A walk that is alone takes the very operations of `relay.sampling.walk_leg`, bit for bit. In company the kernels of
another batch size may round differently: in fp32 within 1e-4 of the latent's largest value (the embedded families, 10
steps, 8 requests that enter one by one: 8e-6 for mini-sd3, 6e-7 for mini-sdxl); in bf16 on a CPU not by a bit, in both
families. An accelerator's kernels were not at hand; there expect what one rounding of bf16 makes, 4e-3, and its growth.

Knows no thread, no socket and no clock but `time.monotonic`. One thread calls it, `cancel` included.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import insort
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from relay.batching import TRUSTED, WINDOW, StepTimes
from relay.denoisers import Denoiser
from relay.errors import BadRequest, Busy, Cancelled, DeadlinePassed, NonFiniteLatent, RelayError, StepFailed
from relay.lane import Lane, Walk
from relay.sampling import euler_step, non_finite

__all__ = ["Ended", "Load", "StepEngine", "Walk"]

MAX_LANES = 64  # shapes whose step times are remembered while nobody walks there
BOUND_GROWS_AFTER = 512  # steps without running out of memory, after which a lane dares twice the batch again


@dataclass(frozen=True)
class Ended:
    """A walk that has left, and where it stands: `latent` (1, C, h, w) float32 at `walk.sigmas[walk.done]`.

    `error` is None if and only if it walked all its sigmas; else it is Cancelled, DeadlinePassed, StepFailed or
    NonFiniteLatent. All but the last leave a latent from which another can go on.
    """

    walk: Walk
    latent: torch.Tensor | None
    error: RelayError | None = None

    @property
    def id(self) -> str:
        return self.walk.id


@dataclass(frozen=True)
class Load:
    """What an engine holds now."""

    running: int  # walks in a batch
    queued: int  # walks that wait, those set aside included
    batch: int  # images in the last step
    batch_bound: int  # most images in a step: `max_batch`, less once memory ran out
    steps_done: int  # images x steps


class StepEngine:
    """See the module.

    `curve`: seconds of a guided step over batch size, measured with latents of `curve_size` (h, w) if that is said,
    else taken for every size; None where nothing was measured. `max_batch` bounds the images of a step,
    `max_batch + max_queue` the walks held.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        member: str,
        curve: Mapping[int, float] | None,
        max_batch: int,
        max_queue: int,
        *,
        curve_size: tuple[int, int] | None = None,
    ):
        if max_batch < 1 or max_queue < 0:
            raise BadRequest(f"an engine runs at least one walk and queues none or more, not {max_batch}, {max_queue}")
        self.denoiser, self.member = denoiser, member
        self.curve, self.curve_size = curve, curve_size
        self.max_batch, self.max_queue = max_batch, max_queue
        self._profile = StepTimes(curve, max_batch)
        self._lanes: dict[Hashable, Lane] = {}
        self._ring: deque[Lane] = deque()  # lanes that hold walks, first the one whose turn it is
        self._held: dict[str, tuple[Walk, Lane]] = {}
        self._cancelled: list[Ended] = []
        self._last_batch = self._steps_done = 0
        self._ratios: deque[float] = deque(maxlen=WINDOW)  # of the latest steps: seconds / those of the curve

    @property
    def slower(self) -> float:
        """How many times as long as the curve says its latest steps took (their median); 1 before there were any."""
        return statistics.median_high(self._ratios) if self.curve and len(self._ratios) >= TRUSTED else 1.0

    def submit(self, walk: Walk) -> None:
        """Take a walk in. Busy when full; BadRequest on a walk that cannot be walked."""
        self._check(walk)
        room = self.max_batch + self.max_queue
        if len(self._held) >= room:
            wait = self._room_in_s()
            raise Busy(f"{self.member} holds {room} requests and takes no more now: retry in {wait:.2g} s", wait)
        lane = self._lane(walk)
        if not lane.walks:
            self._ring.append(lane)
        insort(lane.walks, walk, key=lambda each: each.urgency)
        self._held[walk.id] = walk, lane

    def cancel(self, id: str) -> bool:
        """Take a walk out; the next `step` tells where it stands. False where no such walk is held."""
        if id not in self._held:
            return False
        walk, _ = self._held[id]
        self._cancelled.append(self._end(walk, Cancelled(f"cancelled after {_progress(walk)}")))
        return True

    def step(self) -> list[Ended]:
        """One step of one batch. Returns who has ended since the last call; at once where there is nothing to do."""
        ended, self._cancelled = self._cancelled, []
        now = time.monotonic()
        for lane in list(self._ring):
            while lane.walks and (walk := lane.walks[0]).deadline <= now:
                ended.append(self._end(walk, DeadlinePassed(f"the deadline passed after {_progress(walk)}")))
        if self._ring:
            ended += self._advance(self._turn())
        return ended

    @property
    def load(self) -> Load:
        running = sum(self._holds(walk) for lane in self._ring for walk in lane.rows)
        bound = min((lane.bound for lane in self._lanes.values()), default=self.max_batch)
        return Load(running, len(self._held) - running, self._last_batch, bound, self._steps_done)

    @property
    def backlog_s(self) -> float:
        """Seconds until all that is held would be done, by the step times as known now."""
        return sum(sum(walk.left for walk in lane.walks) * lane.step_s / lane.size for lane in self._ring)

    def profiled_s(self, batch: int) -> float:
        """Seconds of a guided step by the curve that was given."""
        return self._profile.seconds(batch)

    # --- one step ---

    def _turn(self) -> Lane:
        """The lane that steps now: deficit round robin (Shreedhar and Varghese 1996) over seconds of computing.

        At its turn a lane is given the seconds of the dearest step in the ring, and steps while they last: the lanes
        share the time evenly, however many walks they hold and however dear their steps are.
        """
        quantum = max(lane.step_s for lane in self._ring)
        while self._ring[0].seconds < self._ring[0].step_s:
            self._ring.rotate(-1)
            self._ring[0].seconds += quantum
        lane = self._ring[0]
        lane.seconds -= lane.step_s  # what it should take: a hiccup of the machine is not held against it
        return lane

    def _advance(self, lane: Lane) -> list[Ended]:
        """One step of the lane's batch, or of a smaller one where memory runs out; who has ended with it."""
        while True:
            chosen = lane.walks[: lane.size]
            try:
                finite = self._denoise(lane, chosen)
                break
            except Exception as error:  # it must end walks, not the node
                failure = error.with_traceback(None)  # whose frames hold tensors
            full = _out_of_memory(failure)
            if full and self.denoiser.device.type == "cuda":
                torch.cuda.empty_cache()
            if not full or len(chosen) == 1:
                return [self._end(walk, _failed(self.member, walk, failure, full)) for walk in chosen]
            lane.set_bound(len(chosen) // 2)
        self._last_batch = len(chosen)
        self._steps_done += len(chosen)
        if lane.bound < self.max_batch and lane.steps_in_bound >= BOUND_GROWS_AFTER:
            lane.set_bound(min(2 * lane.bound, self.max_batch))
        rows, x = lane.rows, lane.x  # a lane that becomes empty forgets them
        return [
            ended
            for i, walk in enumerate(rows)
            if (ended := self._after_step(walk, x[i : i + 1], finite[i])) is not None
        ]

    @torch.inference_mode()
    def _denoise(self, lane: Lane, chosen: list[Walk]) -> list[bool]:
        """A step of `chosen`; which rows are finite. An error leaves every walk where it was."""
        lane.gather(chosen, self.denoiser.device, self.denoiser.dtype)
        assert lane.cond is not None
        started = time.monotonic()
        now, then = (
            torch.tensor([walk.sigmas[walk.done + k] for walk in lane.rows], dtype=torch.float32) for k in (0, 1)
        )
        x = euler_step(lane.x, self.denoiser(lane.x, now, lane.cond, lane.guidance), now, then)
        finite = torch.isfinite(x).flatten(1).all(1).tolist()  # once this is read, an accelerator has finished
        seconds = time.monotonic() - started
        lane.times.observe(len(chosen), seconds)
        self._ratios.append(seconds / lane.times.given(len(chosen)))
        lane.x = x
        lane.steps_in_bound += 1
        return finite

    def _after_step(self, walk: Walk, latent: torch.Tensor, finite: bool) -> Ended | None:
        """What a step means for one walk of the batch."""
        walk.done += 1
        if not finite:
            return self._end(walk, non_finite(self.member, walk.done, walk.sigmas, self.denoiser.dtype))
        if walk.on_step is not None:
            try:
                walk.on_step(walk.done, walk.sigmas[walk.done], latent)
            except Exception as error:  # the others of the batch have nothing to do with it
                return self._end(walk, StepFailed(f"what follows a step failed: {type(error).__name__}: {error}"))
        return None if walk.left else self._end(walk, None)

    # --- who is held ---

    def _check(self, walk: Walk) -> None:
        """BadRequest, where a walk would only fail in company."""
        sigmas = walk.sigmas
        if walk.id in self._held:
            raise BadRequest(f"a walk {walk.id!r} is already held")
        if walk.latent.ndim != 4 or len(walk.latent) != 1 or len(walk.conditioning) != 1:
            raise BadRequest(f"a walk is one image, not a latent of {tuple(walk.latent.shape)}: submit one for each")
        if not torch.isfinite(walk.latent).all():
            raise BadRequest("the latent to go on from holds non-finite values")
        if len(sigmas) < 2 or not all(a > b for a, b in pairwise(sigmas)) or sigmas[-1] < 0 or sigmas[0] == math.inf:
            raise BadRequest("a walk needs at least two sigmas, each below the one before it")
        if walk.guided and (walk.conditioning.negative_embeds is None or walk.conditioning.negative_pooled is None):
            raise BadRequest("guidance above 1 needs negative embeddings: encode the prompt with guidance")

    def _lane(self, walk: Walk) -> Lane:
        """The lane of walks like this one, with the given curve for a start."""
        key = walk.lane()
        if key not in self._lanes:
            if len(self._lanes) >= MAX_LANES and (idle := [k for k, lane in self._lanes.items() if not lane.walks]):
                del self._lanes[idle[0]]
            height, width = walk.latent.shape[2:]
            area = height * width / math.prod(self.curve_size or (height, width))
            times = StepTimes(self.curve, self.max_batch, area if walk.guided else area / 2)
            self._lanes[key] = Lane(times, self.max_batch)
        return self._lanes[key]

    def _end(self, walk: Walk, error: RelayError | None) -> Ended:
        """Take a walk out, for whatever reason."""
        _, lane = self._held.pop(walk.id)
        walk.latent = lane.latent_of(walk)
        lane.walks.remove(walk)
        if not lane.walks:
            lane.clear()
            lane.seconds = 0.0
            self._ring.remove(lane)
        return Ended(walk, None if isinstance(error, NonFiniteLatent) else walk.latent, error)

    def _holds(self, walk: Walk) -> bool:
        return walk.id in self._held and self._held[walk.id][0] is walk

    def _room_in_s(self) -> float:
        """Seconds until a walk leaves: the next one to, and no sooner than one leaves on the average."""
        soonest = min(min(walk.left for walk in lane.walks[: lane.size]) * lane.step_s for lane in self._ring)
        return max(soonest * len(self._ring), self.backlog_s / len(self._held))


def _out_of_memory(error: Exception) -> bool:
    """torch's own error on an accelerator; a RuntimeError that says so on a CPU."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("not enough memory", "can't allocate memory", "out of memory"))
    )


def _failed(member: str, walk: Walk, error: Exception, full: bool) -> RelayError:
    if isinstance(error, RelayError):
        return error
    if full:
        shape = "x".join(map(str, walk.latent.shape[1:]))
        return StepFailed(
            f"{member} ran out of memory on one latent of {shape} after {_progress(walk)}: use a smaller size, another"
            f" dtype or a device with more memory"
        )
    return StepFailed(f"{member} failed after {_progress(walk)}: {type(error).__name__}: {error}")


def _progress(walk: Walk) -> str:
    return f"{walk.done} of {len(walk.sigmas) - 1} steps"
