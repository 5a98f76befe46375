"""The compute thread of a node: everything that touches torch, and nothing that touches a socket.

    take every command that waits: new stretches, latents that arrived, cancellations
    encode one prompt that waits for it
    one step of one engine; those whose leg has ended go on, hand over or decode
    tell the event loop what happened

The event loop never waits for this thread and this thread never for the network: commands come through a queue, events
go out through `emit`, which must not block.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nodes.messages import Assign, Holding
from nodes.work import Event, Key, Work, key_of
from relay.errors import BadRequest, HandoffRefused, RelayError

if TYPE_CHECKING:
    import torch

    from nodes.cache.store import Hit
    from relay.conditioning import Conditioning
    from relay.engine import StepEngine
    from relay.pipeline import RelayPipeline
    from scheduler.load.similarity import Rule

__all__ = ["Compute", "Event", "Key"]
CURVE = (1, 2, 4, 8)  # batch sizes whose step time is measured at the start
ENCODED = 64  # prompts whose conditioning is kept


class Compute(threading.Thread):
    """Holds the members of some families and does stretches of programs with them."""

    def __init__(
        self,
        families: Mapping[str, tuple[str, ...]],
        emit: Callable[[Event], None],
        *,
        threads: int = 1,
        dtype: str | None = None,
        device: str | None = None,
        batch: int = 8,
        pace: float = 1.0,
    ):
        super().__init__(name="compute", daemon=True)
        self.families, self.emit = dict(families), emit
        self.threads, self.dtype, self.device = threads, dtype, device
        self.batch, self.pace = batch, pace
        self.commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.pipes: dict[str, RelayPipeline] = {}
        self.engines: dict[tuple[str, str], StepEngine] = {}
        self.holdings: tuple[Holding, ...] = ()
        self.works: dict[Key, Work] = {}
        self.waiting: deque[Key] = deque()  # for their prompt to be encoded
        self.encoded: dict[tuple[Any, ...], Conditioning] = {}
        self.rules: dict[str, Rule] = {}  # of families, for starts from the latent cache
        self.spaces: dict[tuple[Any, ...], str] = {}
        self.doing = "starting"
        self.last_busy = time.monotonic()
        self.steps_done = 0
        self.slower = 1.0  # times as long as registered, as the engine that stepped last finds
        self.last_error: str | None = None
        self.failed: BaseException | None = None
        self.ready = threading.Event()

    # --- from the event loop ---

    def take(self, assign: Assign, deadline: float) -> None:
        self.commands.put(("take", (assign, deadline)))

    def bring(self, key: Key, handoff: bytes | memoryview) -> None:
        """The latent that a stretch waits for."""
        self.commands.put(("bring", (key, handoff)))

    def bring_embeddings(self, key: Key, data: bytes | memoryview) -> None:
        self.commands.put(("embeddings", (key, data)))

    def begin_from(self, key: Key, hit: Hit | None) -> None:
        """What the latent cache has for a stretch that asked it; None: nothing."""
        self.commands.put(("begin", (key, hit)))

    def cancel(self, job: str, attempt: int) -> None:
        """This attempt and every earlier one."""
        self.commands.put(("cancel", (job, attempt)))

    def stop(self) -> None:
        self.commands.put(("stop", None))

    @property
    def batch_bound(self) -> int:
        return min((engine.load.batch_bound for engine in self.engines.values()), default=self.batch)

    # --- the thread ---

    def run(self) -> None:
        import torch

        try:
            torch.set_num_threads(self.threads)
            with torch.inference_mode():
                self._load()
                self.ready.set()
                self._loop()
        except BaseException as error:  # the process must say so and end, not live on as a node that does nothing
            self.failed = error
            self.last_error = f"{type(error).__name__}: {error}"
        finally:
            self.doing = "stopped"
            self.ready.set()

    def _load(self) -> None:
        """Load, take one real step of every member and one decode: only then is the node what it says it is."""
        import msgspec

        from nodes.pace import Paced
        from nodes.session import quiet_libraries
        from relay.engine import StepEngine
        from relay.pipeline import RelayPipeline
        from relay.step_times import ends, step_curve
        from scheduler.load.similarity import read_rule

        quiet_libraries()
        holdings = []
        for family, members in self.families.items():
            self.doing = f"loading {family}"
            pipe = RelayPipeline.from_pretrained(family, torch_dtype=self.dtype, device=self.device)
            name = pipe.family.name
            self.pipes[name], self.rules[name] = pipe, read_rule(name)
            curves = {}
            for member in members:
                self.doing = f"measuring {name} {member}"
                measured = step_curve(pipe.family, member, [b for b in CURVE if b <= self.batch], repeats=3)
                curve = curves[member] = {batch: seconds * self.pace for batch, seconds in measured.items()}
                denoiser = pipe.family.denoiser(member)
                if self.pace > 1:
                    denoiser = Paced(denoiser, curve, self.batch)
                self.engines[name, member] = StepEngine(
                    denoiser, member, curve, max_batch=self.batch, max_queue=1 << 20
                )
            encode_s, decode_s = ends(pipe.family)
            holdings.append(
                Holding(
                    family=name, members=tuple(members), decodes=True, curves=curves, encode_s=encode_s, decode_s=decode_s,
                    fingerprint=msgspec.to_builtins(pipe.family.fingerprint),
                )
            )  # fmt: skip
        self.holdings = tuple(holdings)

    def _loop(self) -> None:
        while True:
            busy = any(engine.load.running or engine.load.queued for engine in self.engines.values())
            if not self._commands(block=not (busy or self.waiting)):
                return
            if self.waiting:
                self._encode(self.works.get(self.waiting.popleft()))
            for engine in self.engines.values():
                if engine.load.running or engine.load.queued:
                    self._step(engine)
            self.doing = self._describe()

    def _describe(self) -> str:
        running = {f"{f} {m}": e.load.running for (f, m), e in self.engines.items() if e.load.running}
        if running:
            return "denoising " + ", ".join(f"{n} on {name}" for name, n in running.items())
        return f"{len(self.works)} waiting for a latent" if self.works else "idle"

    def _commands(self, block: bool) -> bool:
        """Take what waits; False when told to stop."""
        while True:
            try:
                what, value = self.commands.get(block=block, timeout=0.5 if block else None)
            except queue.Empty:
                if block and not self.works:
                    self.doing = "idle"
                    continue
                return True
            block = False
            if what == "stop":
                return False
            if what == "cancel":
                self._cancel(*value)
                continue
            key = value[0].key if what == "take" else value[0]
            act: Any = {
                "take": self._take, "bring": self._bring, "embeddings": self._embeddings, "begin": self._begin_from,
            }[what]  # fmt: skip
            try:
                act(*value)
            except Exception as error:
                self._fail(key, error)

    def _take(self, assign: Assign, deadline: float) -> None:
        if assign.key in self.works:
            return
        self._cancel(assign.job, assign.attempt - 1)
        work = self.works[assign.key] = Work.of(assign, self.pipes, deadline)
        if not assign.embeddings_come:
            self.waiting.append(work.key)

    def _encode(self, work: Work | None) -> None:
        if work is None:
            return
        self.emit(work.enter("encoding"))
        try:
            what = work.prompt_key
            if what not in self.encoded:
                self.encoded[what] = work.pipe.encode(work.job)
                while len(self.encoded) > ENCODED:
                    self.encoded.pop(next(iter(self.encoded)))
            work.cond = self.encoded[what]
            if work.ships:
                from nodes.embeddings import pack

                self.emit(Event("embeddings", work.key, data=pack(work.cond, work.pipe.family, work.job)))
            if work.asks_cache:
                self._look(work)
            self._begin(work)
        except Exception as error:
            self._fail(work.key, error)

    def _embeddings(self, key: Key, data: bytes | memoryview) -> None:
        if (work := self.works.get(key)) is not None:
            from nodes.embeddings import unpack

            work.cond = unpack(data, work.pipe.family, work.job)
            if work.ships:  # whoever walks on asks its predecessor, which is this node
                self.emit(Event("embeddings", key, data=bytes(data)))
            self._begin(work)

    def _bring(self, key: Key, data: bytes | memoryview) -> None:
        work = self.works.get(key)
        if work is not None and not work.ready:
            work.receive(data)
            self._begin(work)

    def _look(self, work: Work) -> None:
        """Ask the latent cache; the stretch waits for `begin_from`."""
        from nodes.cache.keeper import Look

        use, rule = work.assign.cache, self.rules[work.job.program.family]
        assert use is not None
        below = min(work.job.program.legs[0].last, use.most + 1)
        look = Look(use.owner, self._space(work), work.vector, below, use.nth, rule)
        self.emit(Event("look", work.key, about=look))

    def _begin_from(self, key: Key, hit: Hit | None) -> None:
        work = self.works.get(key)
        if work is not None and not work.ready:
            work.begin_from(hit, self._space(work))
            self._begin(work)

    def _space(self, work: Work) -> str:
        """Of its first leg; reading a schedule for every request would cost a step's time."""
        from relay.cached import first_leg_space

        program = work.job.program
        leg = program.legs[0]
        key = program.family, leg.member, leg.steps_total, program.guidance[0], work.negative, work.job.size
        if key not in self.spaces:
            if len(self.spaces) >= ENCODED:
                self.spaces.clear()
            self.spaces[key] = first_leg_space(work.pipe.family, program, work.negative, work.job.size)
        return self.spaces[key]

    def _leave(self, work: Work, step: int, x: torch.Tensor) -> Event:
        """A latent of the first leg on its way to the cache."""
        from nodes.cache.keeper import Kept
        from relay import codecs

        use, job = work.assign.cache, work.job
        assert use is not None
        kept = Kept(
            work.assign.job, use.owner, self._space(work), job.prompts[0], work.assign.seed, work.vector, step,
            job.program.legs[0].steps_total, codecs.encode(x, "fp32"),
        )  # fmt: skip
        return Event("latent", work.key, about=kept)

    def _begin(self, work: Work) -> None:
        """Start the stretch's first leg once both latent and conditioning are there."""
        if work.cond is None:
            return
        if work.ready:
            self._walk(work)
        else:
            self.emit(work.enter("waiting"))

    def _walk(self, work: Work) -> None:
        from relay.engine import Walk

        latent, done = work.next_leg()
        self.emit(work.enter("denoising", step=done))
        each, previews = work.assign.checkpoint_every, work.assign.preview_every
        engine = self.engines[work.engine]
        left_at = self.rules[work.job.program.family].skips(work.job.program.legs[0].steps_total) if work.leaves else ()

        def on_step(i: int, sigma: float, x: torch.Tensor) -> None:
            at, last = done + i, len(work.sigmas) - 1
            self.emit(Event("progress", work.key, "denoising", work.k, at, last, batch=engine.load.batch))
            if at < last and each and at % each == 0:
                self.emit(Event("checkpoint", work.key, leg=work.k, step=at, data=work.checkpoint(at, x)))
            if at < last and previews and at % previews == 0:
                self.emit(Event("preview", work.key, leg=work.k, step=at, data=self._preview(work, x)))
            if at < last and at in left_at:
                self.emit(self._leave(work, at, x))

        assert work.cond is not None
        engine.submit(
            Walk(
                id=work.walk_id, latent=latent, sigmas=work.sigmas[done:], conditioning=work.cond,
                guidance=work.job.program.guidance[work.k], deadline=work.deadline, arrived=work.arrived, on_step=on_step,
            )
        )  # fmt: skip

    def _preview(self, work: Work, x: torch.Tensor) -> bytes:
        from nodes.images import png_bytes, to_image

        return png_bytes(to_image(work.pipe.family.decode(x)[0]), {})

    def _step(self, engine: StepEngine) -> None:
        self.last_busy = time.monotonic()
        ended = engine.step()
        self.steps_done += 1
        self.slower = engine.slower
        for each in ended:
            work = self.works.get(key_of(each.id))
            if work is None:
                continue
            try:
                if each.error is not None:
                    raise each.error
                if each.latent is not None:
                    self._leg_ended(work, each.latent)
            except Exception as error:
                self._fail(work.key, error)

    def _leg_ended(self, work: Work, latent: torch.Tensor) -> None:
        work.k += 1
        if work.k == len(work.job.program.legs):
            self._decode(work, latent)
        elif work.k <= work.assign.last_leg:
            work.stay(latent)
            self._walk(work)
        else:
            self.emit(work.enter("sending"))
            data = work.hand_on(latent)
            self.works.pop(work.key, None)
            self.emit(Event("handoff", work.key, leg=work.k, data=data, report={"spent_s": work.spent}))

    def _decode(self, work: Work, latent: torch.Tensor) -> None:
        from nodes.images import png_bytes, to_image

        self.emit(work.enter("decoding"))
        made = work.made()
        data = png_bytes(to_image(work.pipe.family.decode(latent)[0]), made)
        self.emit(work.enter("done"))
        self.works.pop(work.key, None)
        self.emit(Event("image", work.key, data=data, report=made | {"spent_s": work.spent}))

    def _cancel(self, job: str, attempt: int) -> None:
        for key in [k for k in self.works if k[0] == job and k[1] <= attempt]:
            work = self.works.pop(key)
            if engine := self.engines.get(work.engine):
                engine.cancel(work.walk_id)

    def _fail(self, key: Key, error: Exception) -> None:
        self.works.pop(key, None)
        self.last_error = f"{type(error).__name__}: {error}"
        kind = "refused" if isinstance(error, BadRequest) else "lost" if isinstance(error, HandoffRefused) else "broken"
        said = str(error) if isinstance(error, RelayError) else self.last_error
        self.emit(Event("failed", key, stage=kind, reason=" ".join(said.split())))
