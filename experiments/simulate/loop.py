"""A node's compute thread, as `nodes.compute` runs it, without torch and with time as a number.

One turn of the loop: encode one prompt that waits for it, then one step of each engine that holds walks; who has ended
is handed over or decoded before the next engine steps. Which walks step is `relay.batching`'s choice, by the measured
curve, probes included; in what order, the engine's: deadline, then arrival.

Turns in which nobody comes and nobody ends are all alike, so `quiet` says how many of them follow and `skip` takes them
at once: a request costs as many events as it has beginnings and ends, not as it has steps.

Not modelled: lanes (all latents of a member have one shape here), running out of memory, and a curve that heals.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache

from relay.batching import PROBE_EVERY, PROBE_STEPS, StepTimes

CACHED = 64  # prompts whose encoding a node keeps, as nodes.compute does
Member = tuple[str, str]  # family, member


class Stretch:
    """Consecutive legs of one request on one node. `legs`: (member, steps). `done(time)` is told when it has left."""

    __slots__ = ("decodes", "done", "family", "k", "left", "legs", "prompt", "ready", "state", "urgency")

    def __init__(
        self,
        prompt: str,
        family: str,
        legs: tuple[tuple[str, int], ...],
        decodes: bool,
        ready: bool,
        done: Callable[[float], object],
    ):
        self.prompt, self.family, self.legs = prompt, family, legs
        self.decodes = decodes  # its last leg is the request's
        self.ready = ready  # the latent is here, or noise can be drawn
        self.done = done
        self.k = self.left = 0
        self.state = "new"  # new | encoding | encoded | walking | gone
        self.urgency = (0.0, 0.0)  # deadline, arrival at this node

    def twin(self) -> Stretch:
        """For a loop's copy: nobody is told when it leaves."""
        other = Stretch(self.prompt, self.family, self.legs, self.decodes, self.ready, _nobody)
        other.k, other.left, other.state, other.urgency = self.k, self.left, self.state, self.urgency
        return other


class Engine:
    """The walks of one member, the most urgent first."""

    __slots__ = ("_best", "bound", "curve", "pace", "seconds", "steps", "walks")

    def __init__(self, curve: tuple[tuple[int, float], ...], bound: int, pace: float):
        self.curve, self.bound = curve, bound
        self.walks: list[Stretch] = []
        self.steps = 0
        self.set_pace(pace)

    def set_pace(self, pace: float) -> None:
        """How many times its measured time a step takes; which batch is best does not depend on it."""
        self.pace = pace
        table, self._best = _table(self.curve, self.bound)
        self.seconds = [pace * each for each in table]

    def twin(self) -> Engine:
        other = Engine.__new__(Engine)
        other.curve, other.bound, other.pace, other.seconds = self.curve, self.bound, self.pace, self.seconds
        other._best, other.steps, other.walks = self._best, self.steps, [walk.twin() for walk in self.walks]
        return other

    def size(self) -> int:
        """How many step next: `relay.batching.StepTimes.choose` of as many steps."""
        n = len(self.walks)
        if n == 1:
            return 1
        best = self._best(n)
        turn, step = divmod(self.steps, PROBE_EVERY)
        if not turn or step >= PROBE_STEPS:
            return best
        return min(2 * best, n, self.bound) if turn % 2 else max(best // 2, 1)

    def alike(self) -> int:
        """How many steps from now on choose as the next one does, as far as probes go."""
        if len(self.walks) == 1:
            return 1 << 30
        turn, step = divmod(self.steps, PROBE_EVERY)
        return PROBE_STEPS - step if turn and step < PROBE_STEPS else PROBE_EVERY - step


class Loop:
    """Engines by (family, member) in the order in which they step, and what a request costs beside its steps."""

    __slots__ = ("cached", "decode_s", "encode_s", "engines", "handoff_s", "image_steps", "waiting")

    def __init__(
        self,
        engines: dict[Member, Engine],
        encode_s: Mapping[str, float],
        decode_s: Mapping[str, float],
        handoff_s: Mapping[str, float],
    ):
        self.engines = engines
        self.encode_s, self.decode_s, self.handoff_s = encode_s, decode_s, handoff_s
        self.waiting: deque[Stretch] = deque()  # for their prompt to be encoded
        self.cached: dict[tuple[str, str], None] = {}
        self.image_steps = 0

    def take(self, stretch: Stretch) -> None:
        stretch.state = "encoding"
        self.waiting.append(stretch)

    def bring(self, stretch: Stretch) -> None:
        """The latent that it waits for."""
        stretch.ready = True
        if stretch.state == "encoded":
            self._walk(stretch)

    def drop(self, stretch: Stretch) -> None:
        """Take it out, wherever it stands."""
        if stretch.state == "encoding":
            self.waiting.remove(stretch)
        elif stretch.state == "walking":
            self.engines[stretch.family, stretch.legs[stretch.k][0]].walks.remove(stretch)
        stretch.state = "gone"

    @property
    def idle(self) -> bool:
        return not self.waiting and not any(engine.walks for engine in self.engines.values())

    def quiet(self) -> tuple[int, float]:
        """How many turns follow in which nobody ends and the same walks step, and the seconds of one."""
        if self.waiting:
            return 0, 0.0
        turns, seconds = 1 << 30, 0.0
        for engine in self.engines.values():
            if walks := engine.walks:
                size = engine.size()
                seconds += engine.seconds[size]
                left = walks[0].left if size == 1 else min([walk.left for walk in walks[:size]])
                turns = min(turns, left - 1, engine.alike())
        return turns, seconds

    def skip(self, turns: int) -> None:
        """That many quiet turns."""
        for engine in self.engines.values():
            if engine.walks:
                size = engine.size()
                engine.steps += turns
                self.image_steps += turns * size
                for walk in engine.walks[:size]:
                    walk.left -= turns

    def turn(self, now: float) -> tuple[float, list[tuple[float, Stretch]]]:
        """One turn: when it is over, and who left at which time."""
        gone: list[tuple[float, Stretch]] = []
        if self.waiting:
            now += self._encode(self.waiting.popleft())
        for engine in self.engines.values():
            if not engine.walks:
                continue
            size = engine.size()
            now += engine.seconds[size]
            engine.steps += 1
            self.image_steps += size
            stepped = engine.walks[:size]
            for walk in stepped:
                walk.left -= 1
            for walk in stepped:
                if not walk.left:
                    engine.walks.remove(walk)
                    now += self._after_leg(walk)
                    if walk.state == "gone":
                        gone.append((now, walk))
        return now, gone

    def _encode(self, stretch: Stretch) -> float:
        what = stretch.family, stretch.prompt
        seconds = 0.0
        if what not in self.cached:
            seconds = self.encode_s[stretch.family]
            self.cached[what] = None
            if len(self.cached) > CACHED:
                del self.cached[next(iter(self.cached))]
        stretch.state = "encoded"
        if stretch.ready:
            self._walk(stretch)
        return seconds

    def _walk(self, stretch: Stretch) -> None:
        member, stretch.left = stretch.legs[stretch.k]
        stretch.state = "walking"
        insort(self.engines[stretch.family, member].walks, stretch, key=_urgency)

    def _after_leg(self, stretch: Stretch) -> float:
        """Seconds of what follows a leg: the next one here, a handoff, or the image."""
        stretch.k += 1
        if stretch.k < len(stretch.legs):
            self._walk(stretch)
            return self.handoff_s[stretch.family]
        stretch.state = "gone"
        return (self.decode_s if stretch.decodes else self.handoff_s)[stretch.family]

    # --- what if ---

    def copy(self) -> Loop:
        """One that goes on from here by itself, without those who wait for a latent: nobody knows when it comes."""
        engines = {key: engine.twin() for key, engine in self.engines.items()}
        other = Loop(engines, self.encode_s, self.decode_s, self.handoff_s)
        other.waiting = deque(stretch.twin() for stretch in self.waiting)
        other.cached = dict(self.cached)
        return other


def foresee(loop: Loop, now: float, stretch: Stretch, comes: float, latent: float | None = None) -> float:
    """When a stretch that comes at `comes` would leave a loop that is at a boundary at `now`, if nobody else came.

    `latent`: when its latent arrives; None where it starts from noise. Changes the loop: give it a copy.
    """
    todo = sorted([(comes, 0), *([(latent, 1)] if latent is not None else [])])
    stretch.ready = latent is None
    while True:
        while todo and (todo[0][0] <= now or loop.idle):
            at, what = todo.pop(0)
            now = max(now, at)
            if what:
                loop.bring(stretch)
            else:
                stretch.urgency = (stretch.urgency[0], at)
                loop.take(stretch)
        turns, seconds = loop.quiet()
        if todo and turns:
            turns = min(turns, turns_until(todo[0][0] - now, seconds))
        if turns:
            loop.skip(turns)
            now += turns * seconds
            continue
        now, gone = loop.turn(now)
        for at, walk in gone:
            if walk is stretch:
                return at


def turns_until(wait: float, seconds: float) -> int:
    """How many turns begin before `wait` seconds are over: whoever comes then is taken in at the end of the last."""
    return max(0, -int(-(wait / seconds - 1e-9) // 1))


def _nobody(time: float) -> None:
    """Is told."""


def _urgency(stretch: Stretch) -> tuple[float, float]:
    return stretch.urgency


@lru_cache(maxsize=256)
def _table(curve: tuple[tuple[int, float], ...], bound: int) -> tuple[list[float], Callable[[int], int]]:
    """Seconds of a step by batch size (from 0), and the best batch size for so many walks."""
    times = StepTimes(dict(curve), bound)  # fresh: it has probed nothing, and its curve is what was given

    @lru_cache(maxsize=4096)
    def best(n: int) -> int:
        return times.choose(n, bound)

    return [0.0, *(times.seconds(size) for size in range(1, bound + 1))], best
