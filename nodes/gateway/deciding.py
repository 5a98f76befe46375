"""Deciding in the service: the policy's word, or the fallback's; the log before anything is acted on; learning afterwards.

    prepare   the router reads a prompt while its request is being accepted, in a thread of its own
    decide    policy -> decision, logged with its probability; whatever breaks, the fallback serves and the status says so
    ended     what is known of a job at its end waits for its scores, as long as its judge may take
    scored    reward, term by term, into the log, and to the learner: a thread that no request waits for, which also
              saves what was learned, so that a kill of the gateway costs some seconds of it at most

A request that names its program leaves nothing to decide but nodes: it is `pinned`, served where it is done soonest, and
nothing is learned from it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from relay.errors import RelayError
from scheduler.baselines.least_finish_time import LeastFinishTime
from scheduler.decision_log import DecisionLog
from scheduler.policy import Action, Context, Decision, Policy

if TYPE_CHECKING:
    from nodes.gateway.jobs import Job
    from scheduler.reward import Reward, Rewarded

log = logging.getLogger("relay.gateway")
SAVE_S = 2.0  # between two savings of what was learned
SHOWN = 8  # decisions that the status shows
MOST_AWAITED = 10_000


@dataclass
class _Awaited:
    decision: Decision
    known: dict[str, Any]
    learns: bool


@dataclass
class Decider:
    """`policy` None: not loaded, or `broken` says why; the fallback decides."""

    decisions: DecisionLog
    policy: Policy | None = None
    reward: Reward | None = None
    broken: str = ""
    model: Path | None = None  # where what is learned is kept
    save_s: float = SAVE_S
    fallback: Policy = field(default_factory=LeastFinishTime)

    def __post_init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.shown: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self._awaited: OrderedDict[str, _Awaited] = OrderedDict()  # by job
        self._learns: OrderedDict[str, bool] = OrderedDict()  # decision -> whether the policy made it
        self._settled: OrderedDict[str, str] = OrderedDict()  # job -> decision, for ratings that come later
        self._lock = threading.Lock()  # a learner is asked and taught one at a time
        self._lessons: queue.SimpleQueue[tuple[Decision, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._teach, name="learner", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.policy.name if self.policy is not None else self.fallback.name

    def prepare(self, prompt: str) -> None:
        """Some milliseconds, in a thread that is not the event loop's."""
        reads = getattr(self.policy, "prepare", None)
        if reads is not None:
            reads(prompt)

    def reading(self, prompt: str) -> Any:
        """What the router said of a prompt that it has read; None without one."""
        reading = getattr(self.policy, "reading", None)
        return reading(prompt) if reading is not None else None

    def decide(
        self, job: Job, context: Context, actions: Sequence[Action], resumed: bool = False,
        load: Mapping[str, Any] | None = None,
    ) -> Decision:  # fmt: skip
        """One of the actions, marked where the policy had no say, and logged. `resumed`: its program was decided before.
        `load`: which levels were allowed at which prices, where anything was held back."""
        mark = "pinned" if job.request.pins else "degraded" if job.degraded else "resumed" if resumed else ""
        decision: Decision | None = None
        if self.policy is not None and not mark:
            try:
                with self._lock:
                    decision = self.policy.decide(context, actions)
            except Exception as error:
                self.broken = f"{type(error).__name__}: {error}"
                log.exception("policy %s", self.policy.name)
        if decision is None:
            decision = self.fallback.decide(context, actions)
            mark = mark or "fallback"
        if said := decision.notes.get("features"):  # the router's, which the bandit chose by
            context = msgspec.structs.replace(context, notes=said)
        if mark:
            decision = msgspec.structs.replace(decision, notes={**decision.notes, "mark": mark})
        if load is not None:
            decision = msgspec.structs.replace(decision, notes={**decision.notes, "load": dict(load)})
        self.counters[mark or "chosen"] += 1
        self.decisions.write(
            context, actions, decision, marks=(mark,) if mark else (), router=self._router_version,
            bandit=getattr(self._learner, "version", None),
        )  # fmt: skip
        self._learns[decision.id] = not mark
        while len(self._learns) > MOST_AWAITED:
            self._learns.popitem(last=False)
        self.shown.append({"job": job.id} | told_of(decision))
        return decision

    @property
    def _learner(self) -> Any:
        return getattr(self.policy, "bandit", self.policy)

    @property
    def router_versions(self) -> dict[str, str]:
        """Family -> version of the router that reads prompts; empty without one."""
        return getattr(getattr(self.policy, "router", None), "versions", None) or {}

    @property
    def _router_version(self) -> str | None:
        versions = self.router_versions
        return ",".join(f"{family}:{version}" for family, version in versions.items()) if versions else None

    # --- what came of it ---

    def ended(self, job: Job) -> None:
        """Every end of a job. A picture waits for its scores; a failure teaches at once; what was called off, nothing."""
        if job.decision is None:
            return
        report = job.report or {}
        known: dict[str, Any] = {
            "stage": str(job.stage), "seconds": report.get("seconds"), "program": str(job.program), "error": job.error,
            "prompt": job.request.prompt, "preference": job.request.preference, "scores": {},
        }  # fmt: skip
        learns = self._learns.pop(job.decision.id, False) and not job.degraded
        learns = learns and not report.get("start")  # what begins with another's latent says nothing of its program
        self._awaited[job.id] = _Awaited(job.decision, known, learns)
        if str(job.stage) != "done":
            self._settle(job.id)
        while len(self._awaited) > MOST_AWAITED:
            self._settle(next(iter(self._awaited)))

    def scored(self, job: str, scores: Mapping[str, float]) -> None:
        """A judge's scores, or a user's rating, which may come before them, after them or alone."""
        if (awaited := self._awaited.get(job)) is not None:
            awaited.known["scores"] |= dict(scores)
            if set(scores) - {"user_rating"}:
                self._settle(job)
        elif (decision := self._settled.get(job)) is not None:
            self.decisions.outcome(decision, terms=dict(scores))

    def unjudged(self, job: str) -> None:
        """No scores will come: it is logged as it is, its reward missing."""
        if job in self._awaited:
            self.counters["unscored"] += 1
            self._settle(job)

    def _settle(self, job: str) -> None:
        awaited = self._awaited.pop(job)
        known, decision = awaited.known, awaited.decision
        self._settled[job] = decision.id
        while len(self._settled) > MOST_AWAITED:
            self._settled.popitem(last=False)
        rewarded = self._rewarded(known)
        raw = {name: value for name, value in known["scores"].items() if value is not None}
        self.decisions.outcome(
            decision.id, stage=known["stage"], seconds=known["seconds"], error=known["error"],
            terms=raw | {f"term_{name}": value for name, value in rewarded.terms.items()} if rewarded else raw,
            missing=rewarded.missing if rewarded else None, reward=rewarded.value if rewarded else None,
        )  # fmt: skip
        if rewarded is not None and rewarded.value is not None and awaited.learns:
            self.counters["rewarded"] += 1
            self._lessons.put((decision, known | {"reward": rewarded.value}))

    def _rewarded(self, known: Mapping[str, Any]) -> Rewarded | None:
        """None where the reward's table does not know the family, say, or a score is no number: it is said, and no more."""
        if self.reward is None:
            return None
        try:
            return self.reward.of(known)
        except RelayError as error:
            self.counters["unrewarded"] += 1
            self.broken = f"no reward: {error}"
            return None

    # --- the learner's thread ---

    def _teach(self) -> None:
        saved, due = time.monotonic(), False
        while True:
            try:
                lesson = self._lessons.get(timeout=self.save_s)
            except queue.Empty:
                lesson = ()  # type: ignore[assignment]  # nothing came
            if lesson and self.policy is not None:
                try:
                    with self._lock:
                        self.policy.learn(*lesson)
                    due = True
                except Exception as error:
                    self.broken = f"learning: {type(error).__name__}: {error}"
                    log.exception("policy %s", self.policy.name)
            if due and (lesson is None or time.monotonic() - saved > self.save_s):
                self._save()
                saved, due = time.monotonic(), False
            if lesson is None:
                return

    def _save(self) -> None:
        if self.model is None or not hasattr(self._learner, "save"):
            return
        try:
            with self._lock:
                self._learner.save(self.model)
        except OSError as error:
            self.counters["unsaved"] += 1
            log.warning("what was learned cannot be saved: %s", error)

    def close(self) -> None:
        """What waits to be learned is learned and saved first."""
        self._lessons.put(None)
        self._thread.join(timeout=10)
        self.decisions.close()

    def status(self) -> dict[str, Any]:
        return {
            "policy": self.name, "broken": self.broken or getattr(self.policy, "router_error", "") or None,
            "router": self._router_version,
            "learner": getattr(self._learner, "version", None), "learned": getattr(self._learner, "learned", None),
            "awaiting_scores": len(self._awaited), "counters": dict(self.counters), "latest": list(self.shown),
        }  # fmt: skip


def told_of(decision: Decision) -> dict[str, Any]:
    """A decision and its reasons, for a job's report and the status."""
    router = decision.notes.get("router") or {}
    return {
        "program": str(decision.action.program), "nodes": list(decision.action.nodes), "policy": decision.policy,
        "mode": decision.action.program.mode, "probability": round(decision.probability, 5),
        "among": decision.actions, "mark": decision.notes.get("mark"),
        "reason": router.get("reason") or router.get("error"), "expected_quality": router.get("quality"),
        "explored": router.get("explored"), "promise": router.get("promise"), "load": decision.notes.get("load"),
    }  # fmt: skip


def open_log(path: Path, prompts: Literal["on", "hash", "off"]) -> DecisionLog:
    """The decision log; one that is damaged or foreign is set aside, and a new one begun."""
    try:
        return DecisionLog(path, prompts=prompts)
    except RelayError as error:
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        log.error("%s; it is set aside as %s", error, aside.name)
        path.rename(aside)
        return DecisionLog(path, prompts=prompts)
