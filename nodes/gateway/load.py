"""The gateway under load: the control loop, who is let in, and what each job may be served with.

    read      a prompt's predicted quality at each level, in the planner's thread
    admit     503 where no level keeps the deadline, 429 where its tenant has more than its share; with when to come back
    control   every period: nodes as they are -> plan -> prices and shares (solved in a thread: the loop must not wait)
    allowed   the programs that a job may be served with now, and what the decision's context is told

`scheduler.load.controller` decides; here are only the gateway's clock, its nodes and its jobs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.gateway.registry import Registry, state_of
from nodes.requests import ImageRequest, Refusal
from nodes.stages import Stage
from relay.errors import BadRequest, RelayError
from relay.program import Program, drawn_alike
from scheduler.features import PRICE
from scheduler.load.admission import Admission
from scheduler.load.controller import Controller
from scheduler.load.expected import Station, Work, ends_s, room_s, work_s
from scheduler.load.lag import LEAST_S, Lags
from scheduler.load.prediction import Levels, read_levels, shipped
from scheduler.load.settings import LoadSettings

if TYPE_CHECKING:
    from nodes.gateway.jobs import Job
    from scheduler.router.router import Prediction

log = logging.getLogger("relay.gateway")
STATUS = {"late": 503, "share": 429}
MODES = {"full-cloud": "share_full_cloud", "relay": "share_relay"}  # the router's budgets, in a context's notes
_KEPT = 4096  # prompts that were read


@dataclass(frozen=True)
class Leave:
    """What a job may be served with. `notes` go into the decision's context, `told` into its log; both empty where nothing
    is held back. `skips`: program -> steps that it may skip from a cached latent, of levels that do."""

    programs: list[Program]
    notes: dict[str, float] = field(default_factory=dict)
    told: dict[str, Any] | None = None
    skips: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Given:
    """A job as it was placed first: when, for how long each node was expected to have it, by its own word, and how long all
    was predicted to take, as slow as the nodes were known to be."""

    job: Job
    at: float
    expected_s: dict[str, float]
    predicted_s: float


class LoadControl:
    """`settings` as in `load:`; `start` before anything else. BadRequest where a program on offer has no measured quality.
    `cached`: whether the deployment keeps latents, so that levels which start from them are of use."""

    def __init__(self, settings: LoadSettings, registry: Registry, seed: int | None = None, cached: bool = False):
        self.cached = cached
        self.settings, self.registry, self.rng = settings, registry, np.random.default_rng(seed)
        self.admission = Admission(settings)
        self.counters: Counter[str] = Counter()
        self.controller: Controller | None = None
        self.works: list[Work] = []
        # a family's, which of them are on offer, and whether the router here is the one they were fitted with
        self._levels: list[tuple[Levels, list[int], bool]] = []
        self._index: dict[tuple[str, int], int] = {}  # a program's text and the steps that it skips -> its level
        self._read: OrderedDict[str, np.ndarray] = OrderedDict()
        self._last_s = 0.0  # CPU time of the last period
        self.lags = Lags()
        self._surge = asyncio.Event()  # more has come than was planned for
        self._given: dict[str, _Given] = {}  # by job

    def start(
        self, offered: Sequence[Program], sizes: tuple[dict[str, int], dict[str, int]],
        routers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Levels are the programs on offer, and their measured starts from cached latents. `sizes`: bytes of a latent and of a
        picture, by family. `routers`: family -> version of the router that reads prompts here; another than the levels were
        fitted with is done without."""
        samples, routers = [], routers or {}
        for family in dict.fromkeys(program.family for program in offered):
            where = Path(self.settings.levels) if self.settings.levels else shipped(family)
            found = read_levels(where, family)
            known = {(drawn_alike(level.program), level.skipped): i for i, level in enumerate(found.levels)}
            alike = {program: drawn_alike(str(program)) for program in offered if program.family == family}
            for program, text in alike.items():
                if (text, 0) not in known:
                    measured = "; ".join(level.program for level in found.from_noise.levels)
                    raise BadRequest(
                        f"load: {program} is on offer and has no measured quality in {where}, which has {measured}"
                    )
            texts = {text: program for program, text in alike.items()}
            mine = [(program, 0) for program in alike]
            mine += [(texts[text], skip) for text, skip in known if self.cached and skip and text in texts]
            picked = [known[alike[program], skip] for program, skip in mine]
            for program, skip in mine:
                self._index[str(program), skip] = len(self.works)
                self.works.append(Work(program, skip, sizes[0][family], sizes[1][family]))
            fits = found.router_version is not None and found.router_version == routers.get(family)
            self._levels.append((found, picked, fits))
            samples.append(np.array(found.sample)[:, picked])
        count = min(map(len, samples))  # of the same validation prompts, in the same order
        sample = np.concatenate([each[:count] for each in samples], axis=1)
        self.controller = Controller(self.settings, self.works, sample, self.rng)

    # --- a request comes ---

    def read(self, prompt: str, said: Prediction | None = None) -> None:
        """Predict a prompt's quality at each level; any thread. `said`: what a router said of it."""
        if prompt not in self._read:
            parts = []
            for levels, picked, fits in self._levels:
                own = said if fits and said is not None and said.families == (levels.family,) else None
                parts.append(levels.predict([prompt], own)[0, picked])
            self._read[prompt] = np.concatenate(parts)
            while len(self._read) > _KEPT:
                self._read.popitem(last=False)

    def admit(self, request: ImageRequest, programs: Sequence[Program], tenant: str) -> float:
        """Seconds of work of each picture, where they are let in; Refusal where not. What says no deadline has the SLO's."""
        assert self.controller is not None
        left_s = request.deadline_ms / 1000 if request.deadline_ms else self.settings.deadline_s
        stations, now = self.stations(), time.monotonic()
        works = self._works(programs)
        factor = self.controller.overruns.factor
        soonest = factor * min(ends_s(work, stations)[0] for work in works) if stations else float("inf")
        least = min((work_s(work, stations) for work in works), default=0.0)
        self.controller.arrived(self._predicted(request.prompt), request.images)
        if self.controller.surged:
            self._surge.set()
        verdict = self.admission.admit(
            tenant, least * request.images, soonest, left_s, room_s(stations, left_s / factor), now
        )
        self.counters[verdict.kind] += 1
        if not verdict.admitted:
            raise Refusal(verdict.reason, STATUS[verdict.kind], verdict.retry_after_s)
        return least

    def taken(self, job: str, tenant: str, seconds: float) -> None:
        self.admission.taken(job, tenant, seconds)

    def ended(self, job: Job) -> None:
        """However it ended. Of one that ended at the first try, by its picture or its deadline, it is learned how far it overran
        what was predicted; of one that was done how much slower its nodes are than they said; of a start that was allowed
        from a cached latent what it spared."""
        assert self.controller is not None
        self.admission.ended(job.id)
        given = self._given.pop(job.id, None)
        if given is not None and not job.tries and (job.stage is Stage.DONE or job.left_s <= 0):
            self.controller.overruns.observe(time.monotonic() - given.at, given.predicted_s)
        if given is not None and not job.tries and job.stage is Stage.DONE:
            for node, spent in (job.report or {}).get("timings", {}).items():
                if node in given.expected_s:  # waiting for a latent is not its own time
                    own = sum(seconds for stage, seconds in spent.items() if stage != "waiting")
                    self.lags.observe(node, own, given.expected_s[node])
        level = self._index.get((str(job.program), job.skip or 0))
        if job.skip and level is not None and job.began_at is None and job.stage is Stage.DONE:
            start = (job.report or {}).get("start") or {}
            self.controller.started(level, start.get("skipped", 0) / job.skip)

    # --- a job is placed ---

    def allowed(self, job: Job, programs: list[Program], starts: bool = False) -> Leave:
        """What is left of `programs`. One level is the request's own choice, or what it began with. `starts`: whether it may
        begin from a cached latent."""
        assert self.controller is not None
        texts = {str(program) for program in programs}
        mine = [i for (text, skip), i in self._index.items() if text in texts and (starts or not skip)]
        if len(mine) < 2 or any((text, 0) not in self._index for text in texts):
            return Leave(programs)
        stations = self.stations(without=job.id)
        left_s = job.left_s if job.request.deadline_ms else self.settings.deadline_s - (time.monotonic() - job.accepted)
        found = self.controller.allow(self._predicted(job.request.prompt), left_s, stations, mine)
        if not found.pressed:
            return Leave(programs)
        # accepted, and now none is expected in time: the soonest may yet be
        left = list(found.levels) or [min(mine, key=lambda i: found.ends_s[i])]
        self.counters["pressed"] += 1
        prices = {name: round(price, 6) for name, price in self.controller.prices.items() if price > 0}
        notes = {"pressed": 1.0, **{f"{PRICE}{name}": price for name, price in prices.items()}, **self._shares()}
        skips: dict[str, int] = {}  # of a program that is left with several K: the level's own, else the safest
        for i in sorted(left, key=lambda i: (i != found.level, self.works[i].skipped)):
            skips.setdefault(str(self.works[i].program), self.works[i].skipped)
        told: dict[str, Any] = {
            "allowed": list(skips), "prices": prices,
            "level": None if found.level is None else str(self.works[found.level]),
            "wanted": None if found.wanted is None else str(self.works[found.wanted]),
        }  # fmt: skip
        skips = {text: skip for text, skip in skips.items() if skip}
        if skips:
            told["skips"] = skips
        return Leave([program for program in programs if str(program) in told["allowed"]], notes, told, skips)

    def placed(self, job: Job) -> None:
        """It goes to its nodes; they have not been given it yet."""
        if job.id in self._given or job.began_at is not None:
            return
        assert job.program is not None
        expected = {}
        for stretch in job.stretches:
            node = self.registry.nodes[stretch.node]
            station = Station.of(state_of(node), len(node.jobs))
            legs = job.program.legs[stretch.first : stretch.last + 1]
            ends = [station.ends_s(job.program.family, leg.member, leg.steps) for leg in legs]
            expected[stretch.node] = sum(ends) + station.encode_s + station.decode_s
        predicted_s, _ = ends_s(self._works([job.program])[0], self.stations())
        self._given[job.id] = _Given(job, time.monotonic(), expected, predicted_s)

    def _late(self) -> None:
        """What has not ended tells of its node as well; one on which nothing lies is not asked for ever."""
        assert self.controller is not None
        now = time.monotonic()
        for given in list(self._given.values()):
            expected = 0.0
            for stretch in given.job.stretches if not given.job.tries else ():
                expected += given.expected_s.get(stretch.node, 0.0)
                if not stretch.done:
                    if now - given.at > self.lags.of(stretch.node) * max(expected, LEAST_S):
                        self.lags.observe(stretch.node, now - given.at, expected)
                    break
        if not self._given:
            self.controller.overruns.rest()
        for node in self.registry.ready():
            if not node.jobs:
                self.lags.rest(node.name)

    def _shares(self) -> dict[str, float]:
        """The plan's share of each mode, for the router's budget: rounded up, so that few budgets are worked out."""
        assert self.controller is not None
        shares = self.controller.shares()
        if not shares.sum():
            return {}
        found = {}
        for mode, name in MODES.items():
            share = sum(s for s, work in zip(shares, self.works, strict=True) if work.program.mode == mode)
            found[name] = min(1.0, float(np.ceil(20 * share - 1e-9)) / 20)
        return found

    # --- the loop ---

    async def run(self) -> None:
        """Control, every period, and at once where more comes than was planned for."""
        assert self.controller is not None
        ends = time.monotonic() + self.settings.period_s
        while True:
            over = await self._over(ends)
            ends = time.monotonic() + self.settings.period_s if over else ends
            try:
                started = time.thread_time()
                if over:
                    self._late()
                asking = self.controller.begin(self.stations(), over)
                found = self.controller.known(asking)
                if found is None:
                    found = await asyncio.to_thread(self.controller.solved_for, asking)
                before = self.controller.why_not
                self.controller.finish(asking, found)
                self._last_s = time.thread_time() - started
                if (why := self.controller.why_not) and why != before:
                    log.warning("load: no plan: %s", why)
            except RelayError as error:
                log.error("load: %s", error)
            except Exception:  # one bad period must not end control
                log.exception("load")
                self.counters["errors"] += 1

    async def _over(self, ends: float) -> bool:
        """When the period is over, or before that when it surged."""
        left_s = ends - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await self._surge.wait()
        except TimeoutError:
            return True
        self._surge.clear()
        return left_s <= 0

    def stations(self, without: str = "") -> list[Station]:
        """The nodes that take work now, as slow as they are found to be. `without`: a job that is being placed again."""
        found = []
        for node in self.registry.ready():
            station = Station.of(state_of(node), len(node.jobs))
            if without in node.jobs:
                station.held -= 1
                station.backlog_s -= node.jobs[without]
            lag = self.lags.of(node.name)
            found.append(station.slower(lag) if lag > 1 else station)
        return found

    def _predicted(self, prompt: str) -> np.ndarray:
        self.read(prompt)
        return self._read[prompt]

    def _works(self, programs: Sequence[Program]) -> list[Work]:
        """Levels of these programs; one that a request made up has no measured quality, and its work is known all the same."""
        found = []
        for program in programs:
            index = self._index.get((str(program), 0))
            found.append(Work(program) if index is None else self.works[index])
        return found

    def told(self) -> dict[str, Any]:
        """For the status."""
        control = self.controller
        assert control is not None
        plan = control.plan
        return {
            "deadline_s": self.settings.deadline_s, "pressed": control.pressed, "demand_per_s": round(control.demand, 3),
            "shed_per_s": round(float(plan.shed.sum()), 4) if plan is not None else None,
            "shares": {
                str(work): round(float(share), 4)
                for work, share in zip(self.works, control.shares(), strict=True) if share > 0
            },
            "prices": {name: round(price, 5) for name, price in control.prices.items()},
            "batch": control.batch, "why_no_plan": control.why_not or None, "outstanding_s": self.admission.outstanding_s,
            "reads": "prompt and router" if all(fits for *_, fits in self._levels) else "prompt",
            "starts": {str(self.works[i]): round(control.starts.rate(i), 3) for i in map(int, control.starts.cached)},
            "overrun": round(control.overruns.factor, 2),
            "lags": {node.name: lag for node in self.registry.ready() if (lag := round(self.lags.of(node.name), 2)) > 1},
            "solved": control.solved, "period_cpu_s": self._last_s, "counters": dict(self.counters),
        }  # fmt: skip
