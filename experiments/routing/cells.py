"""The work of a comparison in pieces that are done once: one router, one setting, one seed, one family's data.

A cell is a file with what the router scored on validation and on test prompts; outcomes of test prompts are not in it
and not used in making it. A killed run goes on where it was; other data, settings or code version make other cells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.routing.baselines import candidates, make, meaning
from experiments.routing.baselines.base import asked, pair
from experiments.routing.data import RoutingData, load
from experiments.routing.delta_p import curve, gaps, worth_by
from experiments.routing.embeddings import Embeddings
from relay.errors import RelayError
from relay.files import write_atomically

VERSION = 1  # raise where a router's code changes what it scores
Floats = NDArray[np.float64]
Say = Callable[[str], None]


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one fitted router said. `values`: what each mode is worth on the test prompts, where it can say so."""

    router: str
    settings: dict[str, Any]
    seed: int
    validation: list[float]
    test: list[float]
    seconds: float
    capped: bool
    values: list[list[float]] | None = None
    objective: float  # on validation prompts, see `objective`


@dataclass(frozen=True)
class Bench:
    """One family's data and embeddings, and where its cells lie."""

    data: RoutingData
    embeddings: Embeddings
    folder: Path

    @cached_property
    def clear(self) -> list[str]:
        """The metrics whose gap between the members is outside noise on the train and validation prompts."""
        both = [np.concatenate(sides) for sides in zip(pair(self.data.train), pair(self.data.validation), strict=True)]
        return [gap.metric for gap in gaps(self.data.metrics, both[0], both[1]) if gap.clear]

    def cell(self, router: str, settings: Mapping[str, Any], seed: int) -> Cell:
        """The cell out of its file, or computed into it."""
        path = self.folder / f"{router}-{self._digest(router, settings)}-s{seed}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=Cell)
        started = time.perf_counter()
        fitted = make(router, self.embeddings, settings)
        fitted.fit(self.data, seed)
        validation, test = (np.asarray(fitted.score(s)) for s in (self.data.validation, self.data.test))
        if not (np.isfinite(validation).all() and np.isfinite(test).all()):
            raise RelayError(f"{router} gave scores that are no numbers, with {json.dumps(dict(settings))}")
        values = fitted.values(self.data.test).tolist() if hasattr(fitted, "values") else None
        cell = Cell(
            router=router, settings=dict(settings), seed=seed, validation=validation.tolist(), test=test.tolist(),
            seconds=round(time.perf_counter() - started, 2), capped=fitted.capped, values=values,
            objective=objective(self.data, self.clear, validation),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(cell))
        return cell

    def _digest(self, router: str, settings: Mapping[str, Any]) -> str:
        said = json.dumps(
            [VERSION, self.data.digest, router, meaning(router, settings), dict(settings)], sort_keys=True
        )
        return blake2b(said.encode(), digest_size=6).hexdigest()


def objective(data: RoutingData, clear: Sequence[str], scores: Floats) -> float:
    """What settings are chosen by: mean dP over all shares, on validation prompts, over the metrics outside noise.

    The gaps are those of the train prompts, which are more; all shares, because both the table at one budget and the
    cost savings are read off this curve, and one point of it is a noisier judge.
    """
    chosen = data.only(clear or data.metrics)
    small, large = pair(chosen.validation)
    value = 100 * worth_by(large, small, chosen.gap(), asked(chosen)) / len(chosen.validation)
    return float(np.mean([curve(scores, value, tie).mean() for tie in range(5)]))


def other_seeds(bench: Bench, runs: Sequence[str]) -> Cell | None:
    """The best order that knowing other seeds' pictures of the test prompts gives: about what a prompt can tell at most.

    None where the runs do not hold every test prompt yet.
    """
    if not any((Path(run) / "outcomes").is_dir() for run in runs):
        return None
    found = load(runs, bench.data.family, bench.data.metric_set).test
    where = {prompt: i for i, prompt in enumerate(found.prompts)}
    test = bench.data.test.prompts
    if not all(prompt in where for prompt in test):
        return None
    small, large = pair(found.take([where[prompt] for prompt in test]))
    columns = [bench.data.metrics.index(metric) for metric in bench.clear or bench.data.metrics]
    gap = bench.data.only(bench.clear or bench.data.metrics).gap()
    weights = asked(bench.data)[columns]
    scores = -worth_by(large[:, columns], small[:, columns], gap, weights)
    nothing = [0.0] * len(bench.data.validation)
    return Cell(
        router="oracle-seeds", settings={}, seed=0, validation=nothing, test=scores.tolist(), seconds=0.0, capped=False,
        objective=0.0,
    )  # fmt: skip


def chosen_cells(bench: Bench, router: str, tries: int, seeds: int, say: Say) -> list[Cell]:
    """Search the router's settings on validation with seed 0, then fit the best with every seed."""
    tried = []
    for i, settings in enumerate(some := candidates(router, tries), 1):
        tried.append(bench.cell(router, settings, 0))
        if len(some) > 1:
            say(f"{router}: setting {i} of {len(some)}, objective {tried[-1].objective:.1f}, {tried[-1].seconds:.0f} s")
    best = max(tried, key=lambda cell: cell.objective)
    return fitted(bench, router, best.settings, range(seeds), say)


def fitted(bench: Bench, router: str, settings: Mapping[str, Any], seeds: Sequence[int], say: Say) -> list[Cell]:
    """The router with one setting and several seeds."""
    cells = []
    for seed in seeds:
        cells.append(bench.cell(router, settings, seed))
        say(f"{router}: seed {seed} of {seeds[-1]}, objective {cells[-1].objective:.1f}")
    return cells
