"""The service itself under a case's load: real processes of a fleet, requests at a trace's moments, what became of each.

    with deployed(case, fleet, folder, load) as running:     gateway and nodes, paced as the fleet says
        case = measured(case, fleet, running)                the same case with what these nodes measured of themselves
        run = running.ask(lambda asker: drive(...))          every request's end

A system decides where the real one would: ours in the gateway (`load:`), another at the asker, which then names the program
of its level; that needs a rule that looks at arrivals and curves alone (Clipper's and Proteus's do).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.load.case import Case, Cell
from experiments.load.service import CONTROL_S, DONE, LATE, REFUSED, Asked, Demand, stations_of
from experiments.load.systems import Plain
from experiments.simulate.registered import registered_costs
from nodes.asker import RefusedByGateway
from nodes.session import progress_bar
from relay.errors import RelayError

if TYPE_CHECKING:
    from nodes.asker import Asker
    from nodes.fleet import Fleet

IDLE = 5  # requests on idle nodes, by which the service's own share of a request is known
FAILED = 3  # beside DONE, LATE, REFUSED: it ended in another error


@dataclass
class Run:
    """Arrays over requests, as `experiments.load.service.Outcome`; `asked_s`, `ended_s`: from the first one's moment.
    `refusals`: seconds until each refusal was told; `errors`: of those that FAILED; `nodes`: who had it."""

    asked_s: NDArray[np.float64]
    stage: NDArray[np.int64]
    seconds: NDArray[np.float64]
    level: NDArray[np.int64]
    ended_s: NDArray[np.float64]
    errors: list[str] = field(default_factory=list)
    nodes: list[tuple[str, ...]] = field(default_factory=list)


@contextmanager
def deployed(case: Case, fleet: str, folder: Path, load: Mapping[str, Any] | None) -> Iterator[Fleet]:
    """The fleet as processes on this machine. `load`: what its gateway's `load:` says; None: nothing, and a request's
    program is its asker's word. BadRequest where it cannot be."""
    from nodes.fleet import fleet as start

    config = case.config
    works = [work for work in case.works if not work.skipped]
    nodes = {name: msgspec.to_builtins(node) for name, node in config.fleets[fleet].nodes.items()}
    gateway: dict[str, Any] = {
        "offer": [{"family": config.family, "program": str(work.program)} for work in works],
        "policy": "fixed",  # the safest that is allowed: the level, while there is pressure
        "queue": 10_000,
    }
    if load is not None:
        own = {"levels": str(Path(config.levels).resolve())} if config.levels else {}
        gateway["load"] = {"tolerance": 0.0, **own, **load}
    with start(folder, nodes, gateway, cache="off") as running:  # as the systems that it is compared with
        yield running


def measured(case: Case, fleet: str, running: Fleet) -> Case:
    """The case with the curves that these nodes registered (means over those of a member, pace taken out) and what the
    service adds to a request that is alone. Draws some pictures."""
    family, spec = case.config.family, case.config.fleets[fleet]
    full = next(str(work.program) for work in case.works if work.program.mode == "full-cloud" and not work.skipped)
    prompts = case.measured("test").prompts
    alone = [
        running.draw(prompt=prompts[i % len(prompts)], program=full, timeout_s=300.0)[0] for i in range(IDLE)
    ]  # fmt: skip
    costs = registered_costs(running, family, {name: node.pace for name, node in spec.nodes.items()})

    def of(overhead_s: float) -> Case:
        own = msgspec.structs.replace(spec, timing={family: costs}, overhead_s=overhead_s)
        return Case(msgspec.structs.replace(case.config, fleets={fleet: own}))

    real = statistics.median(told["report"]["seconds"] for told in alone)
    return of(max(0.0, real - of(0.0).capacity(fleet)[1]))


def asked_for(case: Case, cell: Cell, seed: int, seconds: float) -> Demand:
    """The cell's requests of about so many seconds."""
    per_s, _ = case.capacity(cell.fleet)
    found = case.demand(cell, seed, "test", max(10, round(1.5 * cell.load * per_s * seconds)))
    count = max(1, int(np.searchsorted(found.arrival_s, seconds)))
    return Demand(found.arrival_s[:count], found.prompt[:count], found.deadline_s)


async def drive(
    asker: Asker, case: Case, demand: Demand, *, system: Plain | None = None, fleet: str = "", deadline: bool = True,
    at: Sequence[tuple[float, Callable[[], None]]] = (), said: str = "requests",
) -> Run:  # fmt: skip
    """Every request at its moment; returns when all have ended. `system`: what names each one's level here; None: the
    gateway decides. `deadline`: whether requests say theirs. `at`: what else happens, by the second. `said`: before the
    bar."""
    count, prompts = len(demand.arrival_s), case.measured("test").prompts
    index = {str(work.program): i for i, work in reversed(list(enumerate(case.works))) if not work.skipped}
    run = Run(
        np.full(count, np.nan), np.full(count, -1), np.full(count, np.nan), np.full(count, -1), np.full(count, np.nan),
        nodes=[()] * count,
    )  # fmt: skip
    stations = stations_of(case.world(fleet)) if system is not None else []
    bar = progress_bar()
    task = bar.add_task(said, total=count)
    began = time.monotonic() + 0.5

    async def until(moment: float) -> None:
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))

    async def one(i: int) -> None:
        await until(float(demand.arrival_s[i]))
        run.asked_s[i] = asked = time.monotonic() - began
        words: dict[str, Any] = {"prompt": prompts[demand.prompt[i]]}
        if deadline:
            words["deadline_ms"] = max(1, round(1000 * demand.deadline_s))
        if system is not None:
            row = int(demand.prompt[i])
            level = system.choose(Asked(i, row, case.measured("test").predicted[row], demand.deadline_s), stations)
            assert level is not None, f"{system.name} refuses, which an asker cannot"
            words["program"] = str(case.works[level].program)
        try:
            job = (await asker.submit(words, timeout_s=120.0)).jobs[0]
            told = await asker.wait(job, 900.0)
        except RefusedByGateway as error:
            told = {"stage": "refused" if error.status in (429, 503) else "failed", "error": str(error)}
        run.ended_s[i] = time.monotonic() - began
        bar.advance(task)
        _note(run, i, told, run.ended_s[i] - asked, demand.deadline_s if deadline else None, index)

    async def act(moment: float, what: Callable[[], None]) -> None:
        await until(moment)
        what()

    async def control() -> None:
        assert system is not None
        for period in range(1, 1_000_000):
            await until(CONTROL_S * period)
            system.control(stations)

    controlled = asyncio.ensure_future(control()) if system is not None else None
    bar.start()
    try:
        await asyncio.gather(*(one(i) for i in range(count)), *(act(*each) for each in at))
    finally:
        bar.stop()
        if controlled is not None:
            controlled.cancel()
    if not (run.stage >= 0).all():
        raise RelayError("a request has no outcome")
    return run


def _note(
    run: Run, i: int, told: Mapping[str, Any], seconds: float, deadline_s: float | None, index: Mapping[str, int]
) -> None:
    """What became of request `i`, after so many seconds as its asker has them."""
    report, error = told.get("report") or {}, str(told.get("error") or "")
    run.seconds[i], run.nodes[i] = report.get("seconds", seconds), tuple(report.get("nodes") or ())
    if told["stage"] == "refused":
        run.stage[i] = REFUSED
    elif told["stage"] == "done":
        run.stage[i] = LATE if deadline_s is not None and run.seconds[i] > deadline_s else DONE
        run.level[i] = index.get(str(report.get("program")), -1)
    elif deadline_s is not None and "deadline" in error:
        run.stage[i] = LATE
    else:
        run.stage[i] = FAILED
        run.errors.append(error)
