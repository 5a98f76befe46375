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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nodes.messages import Assign, Holding
from relay.errors import RelayError

if TYPE_CHECKING:
    import torch

    from relay.conditioning import Conditioning
    from relay.engine import StepEngine
    from relay.handoff import Handoff
    from relay.pipeline import RelayPipeline
    from relay.request import Job

CURVE = (1, 2, 4, 8)  # batch sizes whose step time is measured at the start
Key = tuple[str, int, int]  # job, attempt, first leg: `Assign.key`


@dataclass
class Event:
    """What happened to a stretch. `kind`: stage | progress | checkpoint | preview | handoff | image | failed."""

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


@dataclass
class _Work:
    """One stretch under way."""

    assign: Assign
    pipe: RelayPipeline
    job: Job
    deadline: float
    arrived: float
    k: int
    cond: Conditioning | None = None
    received: Handoff | None = None
    ready: bool = False  # the latent is here, or noise can be drawn
    stage: str = "queued"
    since: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    sigmas: list[float] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.assign.key


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
        self.works: dict[Key, _Work] = {}
        self.waiting: deque[Key] = deque()  # for their prompt to be encoded
        self.encoded: dict[tuple[str, str, str | None, bool, tuple[int, int]], Conditioning] = {}
        self.doing = "starting"
        self.last_busy = time.monotonic()
        self.steps_done = 0
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

        from nodes.session import quiet_libraries
        from relay.engine import StepEngine
        from relay.pipeline import RelayPipeline
        from relay.step_times import ends, step_curve

        quiet_libraries()
        holdings = []
        for family, members in self.families.items():
            self.doing = f"loading {family}"
            pipe = RelayPipeline.from_pretrained(family, torch_dtype=self.dtype, device=self.device)
            name = pipe.family.name
            self.pipes[name] = pipe
            curves = {}
            for member in members:
                self.doing = f"measuring {name} {member}"
                curve = step_curve(pipe.family, member, [b for b in CURVE if b <= self.batch], repeats=3)
                self.engines[name, member] = StepEngine(
                    pipe.family.denoiser(member), member, curve, max_batch=self.batch, max_queue=1 << 20
                )
                curves[member] = {batch: seconds * self.pace for batch, seconds in curve.items()}
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
            for name, engine in self.engines.items():
                if engine.load.running or engine.load.queued:
                    self._step(name, engine)
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
            act: Any = {"take": self._take, "bring": self._bring, "embeddings": self._embeddings}[what]
            try:
                act(*value)
            except Exception as error:
                self._fail(key, error)

    def _take(self, assign: Assign, deadline: float) -> None:
        from relay.program import Program
        from relay.request import Job

        key = assign.key
        if key in self.works:
            return
        self._cancel(assign.job, assign.attempt - 1)
        program = Program.parse(assign.program)
        negatives = None if assign.negative is None else [assign.negative]
        job = Job(program, [assign.prompt], negatives, (assign.width, assign.height), [assign.seed])
        work = _Work(
            assign, self.pipes[program.family], job, deadline, time.monotonic(), assign.first_leg, since=time.monotonic()
        )  # fmt: skip
        work.ready = assign.source.kind == "noise"
        self.works[key] = work
        if not assign.embeddings_come:
            self.waiting.append(key)

    def _encode(self, work: _Work | None) -> None:
        if work is None:
            return
        job = work.job
        what = (job.program.family, job.prompts[0], _negative(job), job.guided, job.size)
        self._enter(work, "encoding")
        try:
            if what not in self.encoded:
                self.encoded[what] = work.pipe.encode(job)
                while len(self.encoded) > 64:
                    self.encoded.pop(next(iter(self.encoded)))
            work.cond = self.encoded[what]
            if self._ships(work):
                from nodes.embeddings import pack

                self.emit(Event("embeddings", work.key, data=pack(work.cond, work.pipe.family, job)))
            self._begin(work)
        except Exception as error:
            self._fail(work.key, error)

    def _embeddings(self, key: Key, data: bytes | memoryview) -> None:
        if (work := self.works.get(key)) is not None:
            from nodes.embeddings import unpack

            work.cond = unpack(data, work.pipe.family, work.job)
            if self._ships(work):  # whoever walks on asks its predecessor, which is this node
                self.emit(Event("embeddings", key, data=bytes(data)))
            self._begin(work)

    @staticmethod
    def _ships(work: _Work) -> bool:
        """Whether another node walks on with the embeddings that are here."""
        return work.job.program.conditioning == "ship" and work.assign.last_leg + 1 < len(work.job.program.legs)

    def _bring(self, key: Key, data: bytes | memoryview) -> None:
        from relay.handoff import Handoff, accept

        work = self.works.get(key)
        if work is None or work.ready:
            return
        handoff = Handoff.from_bytes(data)
        accept(handoff, work.pipe.family)
        assign = work.assign
        said = (handoff.prompts, handoff.negative_prompts, handoff.seeds, (handoff.width, handoff.height))
        ours = (work.job.prompts, work.job.negatives, work.job.seeds, work.job.size)
        if said != ours:
            raise RelayError(f"the latent that came for job {assign.job} was made for another request")
        if handoff.program != assign.program and not assign.degraded:
            raise RelayError(
                f"the latent that came for job {assign.job} was made by another program: {handoff.program}"
            )
        if handoff.leg_index != work.k:
            handoff = _fitted(handoff, work)
        work.received, work.ready = handoff, True
        self._begin(work)

    def _begin(self, work: _Work) -> None:
        """Start the stretch's first leg once both latent and conditioning are there."""
        if work.cond is None:
            return
        if not work.ready:
            self._enter(work, "waiting")
            return
        if work.received is None:
            from relay.request import draw_noise

            latent = draw_noise(work.pipe.family, work.job, 1, None, work.job.seeds[0], None)
            self._walk(work, latent)
        else:
            self._walk(work, work.received.latent)

    def _walk(self, work: _Work, latent: torch.Tensor) -> None:
        from relay.engine import Walk

        program = work.job.program
        leg, received = program.legs[work.k], work.received
        work.sigmas = work.pipe.leg_sigmas(work.job, work.k, received)
        done = received.index if received is not None and received.under_way else 0
        self._enter(work, "denoising", step=done)
        each, previews = work.assign.checkpoint_every, work.assign.preview_every
        engine = self.engines[program.family, leg.member]

        def on_step(i: int, sigma: float, x: torch.Tensor) -> None:
            at, last = done + i, len(work.sigmas) - 1
            self.emit(Event("progress", work.key, "denoising", work.k, at, last, batch=engine.load.batch))
            if at < last and each and at % each == 0:
                self.emit(Event("checkpoint", work.key, leg=work.k, step=at, data=self._checkpoint(work, at, x)))
            if at < last and previews and at % previews == 0:
                self.emit(Event("preview", work.key, leg=work.k, step=at, data=self._preview(work, x)))

        assert work.cond is not None
        engine.submit(
            Walk(
                id=_walk_id(work.key), latent=latent, sigmas=work.sigmas[done:], conditioning=work.cond,
                guidance=program.guidance[work.k], deadline=work.deadline, arrived=work.arrived, on_step=on_step,
            )
        )  # fmt: skip

    def _checkpoint(self, work: _Work, index: int, x: torch.Tensor) -> bytes:
        """The latent as it is, in fp32: going on from it draws what the unbroken run draws."""
        assert work.cond is not None
        handoff = work.pipe.pack(work.job, work.k, x.clone(), work.sigmas, work.cond)
        return replace(handoff, index=index, codec="fp32", conditioning=None, **_plain(work.job)).to_bytes()

    def _preview(self, work: _Work, x: torch.Tensor) -> bytes:
        from nodes.images import png_bytes, to_image

        return png_bytes(to_image(work.pipe.family.decode(x)[0]), {})

    def _step(self, name: tuple[str, str], engine: StepEngine) -> None:
        self.last_busy = started = time.monotonic()
        running = engine.load.running
        ended = engine.step()
        self.steps_done += 1
        self._hold_pace(engine, started, running)
        for each in ended:
            work = self.works.get(_key(each.id))
            if work is None:
                continue
            try:
                if each.error is not None:
                    raise each.error
                if each.latent is not None:
                    self._leg_ended(work, each.latent)
            except Exception as error:
                self._fail(work.key, error)

    def _hold_pace(self, engine: StepEngine, started: float, running: int) -> None:
        """A step ends no earlier than `pace` times its profiled time, which makes a slow machine of a fast one."""
        if self.pace > 1:
            batch = max(1, min(running, engine.load.batch_bound))
            rest = self.pace * engine.profiled_s(batch) - (time.monotonic() - started)
            if rest > 0:
                time.sleep(rest)

    def _leg_ended(self, work: _Work, latent: torch.Tensor) -> None:
        program = work.job.program
        assert work.cond is not None
        work.k += 1
        if work.k == len(program.legs):
            self._decode(work, latent)
            return
        handoff = work.pipe.pack(work.job, work.k, latent, work.sigmas, work.cond)
        if work.k <= work.assign.last_leg:  # stays here, and is coded all the same: the bytes are part of the program
            work.received = work.pipe.over_the_wire(work.job, handoff)
            self._walk(work, work.received.latent)
            return
        self._enter(work, "sending")
        data = replace(handoff, conditioning=None, **_plain(work.job)).to_bytes()
        self._drop(work)
        self.emit(Event("handoff", work.key, leg=work.k, data=data, report={"spent_s": work.spent}))

    def _decode(self, work: _Work, latent: torch.Tensor) -> None:
        from nodes.images import png_bytes, to_image
        from nodes.results import version

        self._enter(work, "decoding")
        image = to_image(work.pipe.family.decode(latent)[0])
        job = work.job
        made = {
            "prompt": job.prompts[0], "negative_prompt": _negative(job), "family_source": job.program.family,
            "program": str(job.program), "seed": job.seeds[0], "width": job.size[0], "height": job.size[1],
            "dtype": work.pipe.dtype, "steps": job.program.steps, "version": version(),
        }  # fmt: skip
        data = png_bytes(image, made)
        self._enter(work, "done")
        self._drop(work)
        self.emit(Event("image", work.key, data=data, report=made | {"spent_s": work.spent}))

    def _enter(self, work: _Work, stage: str, step: int = 0) -> None:
        """The stretch enters a stage; the one it leaves is told with the time it took."""
        now = time.monotonic()
        spent, left = now - work.since, work.stage
        work.spent[left] = work.spent.get(left, 0.0) + spent
        work.stage, work.since = stage, now
        self.emit(
            Event("stage", work.key, stage, work.k, step, len(work.sigmas) - 1, spent_s=spent, report={"left": left})
        )

    def _drop(self, work: _Work) -> None:
        self.works.pop(work.key, None)

    def _cancel(self, job: str, attempt: int) -> None:
        for key in [k for k in self.works if k[0] == job and k[1] <= attempt]:
            work = self.works.pop(key)
            leg = work.job.program.legs[min(work.k, len(work.job.program.legs) - 1)]
            if engine := self.engines.get((work.job.program.family, leg.member)):
                engine.cancel(_walk_id(key))

    def _fail(self, key: Key, error: Exception) -> None:
        from relay.errors import BadRequest, HandoffRefused

        self.works.pop(key, None)
        self.last_error = f"{type(error).__name__}: {error}"
        kind = "refused" if isinstance(error, BadRequest) else "lost" if isinstance(error, HandoffRefused) else "broken"
        said = str(error) if isinstance(error, RelayError) else self.last_error
        self.emit(Event("failed", key, stage=kind, reason=" ".join(said.split())))


def _fitted(handoff: Handoff, work: _Work) -> Handoff:
    """What one program reached, as what another goes on from (only where an answer may be degraded).

    A leg that was cut short becomes a leg that ended there; a leg that ended early is under way again.
    """
    if not work.assign.degraded:
        raise RelayError(f"the latent stands before leg {handoff.leg_index}, not before leg {work.k}")
    if handoff.leg_index < work.k:
        walked = handoff.sigmas_walked[: handoff.index + 1]
    else:
        walked = work.pipe.leg_sigmas(work.job, work.k, None)
    return replace(handoff, leg_index=work.k, sigmas_walked=walked)


def _walk_id(key: Key) -> str:
    return "#".join(map(str, key))


def _key(walk_id: str) -> Key:
    job, attempt, leg = walk_id.rsplit("#", 2)
    return job, int(attempt), int(leg)


def _negative(job: Job) -> str | None:
    return job.negatives[0] if job.negatives else None


def _plain(job: Job) -> dict[str, Any]:
    """On the network conditioning travels apart, so a handoff proves its prompts instead."""
    from relay.conditioning import prompt_digest

    digest = prompt_digest(job.prompts, job.negatives)
    return {"conditioning_digest": digest, "conditioning_fingerprint": None}
