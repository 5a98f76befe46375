"""The router: prompts in, a mode out, with what it predicts, which tokens decided, and why.

    router = Router.load("mini-sd3")
    router.predict(["a red heart"]).quality          # per mode and metric
    router.decide("a red heart", Budget(full=0.2, relay=0.5))

With several families a mode's quality is that of the family that draws it best for this prompt, by the mean predicted
quality; D and PRS are then taken from predicted qualities, since no pair of pictures of two families taught a head.
Which program and family really serve is the bandit's choice, not the router's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from relay.errors import BadRequest
from scheduler.router import budget as budgets
from scheduler.router import promise as promises
from scheduler.router.budget import Budget, Prices
from scheduler.router.prs import superiority
from scheduler.router.settings import EDGE, FULL, MODES, RELAY, read_settings
from scheduler.router.trained import EDGE_FULL, EDGE_RELAY, RELAY_FULL, Calibration, Predicted, Trained

if TYPE_CHECKING:
    from scheduler.router.promise import Promise
    from scheduler.router.tokens import TokenReader, Tokens

Floats = NDArray[np.float64]
CHEAPEST_FIRST = (EDGE, RELAY, FULL)


@dataclass(frozen=True)
class Prediction:
    """What the router says of N prompts. Axes: prompts, modes (`MODES`), metrics, pairs (`model.PAIRS`)."""

    metrics: tuple[str, ...]
    families: tuple[str, ...]
    quality: Floats  # (N, 3, M)
    family: NDArray[np.int64]  # (N, 3): place in `families` of the one that draws this mode best
    d: Floats  # (N, M, pairs)
    prs: Floats  # (N, pairs); [:, 0] is RouteT2I's PRS of edge-only and full-cloud
    advantage: Floats  # (N, 3) over edge-only, what budgets are about
    tokens: list[list[str]]
    spans: list[list[tuple[int, int]]]  # where each token stands in its prompt
    index: NDArray[np.int64]  # (N, M, K): the tokens that each metric's expert selected, strongest first
    strength: Floats  # (N, M, K)

    def __len__(self) -> int:
        return len(self.quality)

    def selected(self, i: int, metric: str) -> list[int]:
        """Places of the tokens that this metric's expert selected of prompt i, strongest first."""
        m = self.metrics.index(metric)
        return [int(at) for at, a in zip(self.index[i, m], self.strength[i, m], strict=True) if a > 0]


class RouterDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A mode, the probability it was chosen with, and why. By mode: predicted quality, advantage and best family."""

    mode: str
    probability: float
    reason: str
    explored: bool
    prs: float  # of edge-only and full-cloud
    alpha: float  # RouteT2I's threshold on it; what counts where relay is not to be had
    prices: Prices  # the budget's; where a promise decides they only say what the budget alone would cost
    advantage: dict[str, float]
    quality: dict[str, float]
    family: dict[str, str]
    promise: str | None  # what is promised of this answer, None without a promise
    versions: dict[str, str]


class Router:
    """One trained router per family, asked together."""

    def __init__(self, trained: Sequence[Trained], readers: Sequence[TokenReader] | None = None):
        """`readers`: the text encoder of each; default: the families' own, loaded when a prompt is first read."""
        if not trained:
            raise BadRequest("a router needs the weights of at least one family")
        self.trained = tuple(trained)
        self._readers = list(readers) if readers else None
        first = self.trained[0].card
        for other in (each.card for each in self.trained[1:]):
            if other.metrics != first.metrics:
                raise BadRequest(
                    f"the routers of {first.family} and {other.family} have other metrics: train both alike"
                )
            if other.calibration != first.calibration:
                raise BadRequest(
                    f"the routers of {first.family} and {other.family} were calibrated on other prompts: train both on one run"
                )
        self._prices: dict[Budget, Prices] = {}

    @staticmethod
    def load(what: str | Path | Sequence[str | Path], metric_set: str | None = None) -> Router:
        """By family names or paths of weights, one or several; checked against the families' text encoders here."""
        from relay.family_spec import find_family
        from scheduler.router import store
        from scheduler.router.tokens import TokenReader, encoder_digest

        several = [what] if isinstance(what, str | Path) else list(what)
        metric_set = metric_set or read_settings().metrics
        trained, readers = [], {}
        for each in several:
            is_file = Path(each).suffix == ".safetensors"
            one = store.load(Path(each)) if is_file else store.load(store.shipped(str(each), metric_set), str(each))
            spec = find_family(one.card.family)
            store.check_encoder(one, encoder_digest(spec))
            if one.card.encoder not in readers:
                readers[one.card.encoder] = TokenReader.of(spec)
            trained.append(one)
        return Router(trained, [readers[one.card.encoder] for one in trained])

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.trained[0].card.metrics

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(each.card.family for each in self.trained)

    @property
    def versions(self) -> dict[str, str]:
        return {each.card.family: each.card.version for each in self.trained}

    def predict(self, prompts: Sequence[str]) -> Prediction:
        """Quality of each mode, how the modes compare, and the tokens that decided, for N prompts."""
        read: dict[str, Tokens] = {}
        for each, reader in zip(self.trained, self.readers, strict=True):
            if each.card.encoder not in read:
                read[each.card.encoder] = reader.read(prompts)
        said = [each.predict(read[each.card.encoder]) for each in self.trained]
        first = read[self.trained[0].card.encoder]
        if len(said) == 1:
            one, family = said[0], np.zeros((len(prompts), len(MODES)), dtype=np.int64)
        else:
            one, family = self._best(said)
        pairs = np.stack([one.prs(pair) for pair in (EDGE_FULL, EDGE_RELAY, RELAY_FULL)], axis=1)
        return Prediction(
            self.metrics, self.families, one.quality, family, one.d, pairs, one.advantage(),
            first.texts, first.spans, one.index, one.strength,
        )  # fmt: skip

    def decide(
        self,
        prompt: str,
        budget: Budget | None = None,
        *,
        explore: float = 0.0,
        rng: np.random.Generator | None = None,
        allowed: Sequence[str] = MODES,
        promise: Promise | None = None,
    ) -> RouterDecision:
        """The mode for one prompt: `predict`, then `choose`."""
        return self.choose(
            self.predict([prompt]), budget, explore=explore, rng=rng, allowed=allowed, promise=promise
        )  # fmt: skip

    def choose(
        self,
        said: Prediction,
        budget: Budget | None = None,
        *,
        explore: float = 0.0,
        rng: np.random.Generator | None = None,
        allowed: Sequence[str] = MODES,
        promise: Promise | None = None,
    ) -> RouterDecision:
        """The mode for the one prompt of a prediction. `budget` None: configs/router.yaml's.

        With probability `explore` it is one of the other allowed modes, evenly. With a promise the mode is the promise's,
        the best in quality that budget and promise allow; BadRequest where they cannot both be met.
        """
        if len(said) != 1:
            raise BadRequest(f"a decision is about one prompt, not {len(said)}")
        if budget is None:
            own = read_settings().budget
            budget = Budget(full=own.full, relay=own.relay)
        open_modes = [m for m in CHEAPEST_FIRST if MODES[m] in allowed]
        if not open_modes:
            raise BadRequest(f"no mode is allowed: name some of {', '.join(MODES)}")
        advantage, prices = said.advantage[0], self.prices(budget)
        if promise is not None:
            threshold = promise.threshold(budget)
            best = int(promises.serve(said.advantage, threshold, open_modes)[0])
            why = f"cheapest mode within {threshold:.3f} of full-cloud, as promised"
        else:
            net = advantage - np.array([prices.full, prices.relay, 0.0])
            best = max(open_modes, key=lambda m: net[m])  # the first, cheapest one of equals
            why = _why(best, advantage, prices, float(said.prs[0, EDGE_FULL]))
        mode, probability = _explored(best, open_modes, explore, rng)
        if mode != best:
            why = f"explored (instead of {MODES[best]}: {why})"
        return RouterDecision(
            mode=MODES[mode], probability=probability, reason=why, explored=mode != best,
            prs=float(said.prs[0, EDGE_FULL]), alpha=prices.alpha, prices=prices,
            advantage={name: float(a) for name, a in zip(MODES, advantage, strict=True)},
            quality={name: float(q) for name, q in zip(MODES, said.quality[0] @ self.weights, strict=True)},
            family={name: said.families[f] for name, f in zip(MODES, said.family[0], strict=True)},
            promise=_promised(promise, explore, open_modes),
            versions=self.versions,
        )  # fmt: skip

    def prices(self, budget: Budget) -> Prices:
        """The budget's prices on the prompts that the weights were calibrated on."""
        if budget not in self._prices:
            self._prices[budget] = budgets.calibrate(self.calibration.advantage, budget)
        return self._prices[budget]

    def promise(
        self, epsilon: float, delta: float | None = 0.1, *, explore: float = 0.0, budget: Budget | None = None
    ) -> Promise:
        """A promise from the calibration prompts; with a budget BadRequest where the two cannot both be met."""
        programs = self.trained[0].card.programs if len(self.trained) == 1 else {}
        made = promises.calibrate(self.calibration, epsilon, delta, programs=programs, explore=explore)
        if budget is not None:
            made.threshold(budget)
        return made

    def watch(self, recent: Sequence[str], level: float = 0.01) -> promises.Watch:
        """Whether recent prompts are still like those that promises and prices were calibrated on."""
        said = self.predict(recent)
        return promises.watch(self.calibration, said.advantage, said.quality, level)

    @cached_property
    def calibration(self) -> Calibration:
        """What the families' routers together said of the held-out prompts, and what the chosen families drew."""
        if len(self.trained) == 1:
            return self.trained[0].calibration
        held = [each.calibration for each in self.trained]
        best = np.stack([one.quality @ self.weights for one in held], axis=2).argmax(axis=2)
        quality = _of_best(np.stack([one.quality for one in held], axis=2), best)
        outcome = _of_best(np.stack([one.outcome for one in held], axis=2)[..., None], best)[..., 0]
        return Calibration(self._compared(quality).advantage(), quality, outcome)

    @property
    def weights(self) -> Floats:
        return np.asarray(self.trained[0].card.weights)

    def _best(self, said: list[Predicted]) -> tuple[Predicted, NDArray[np.int64]]:
        """One prediction out of several families', and whose each mode (N, 3) is."""
        best = np.stack([one.mean_quality() for one in said], axis=2).argmax(axis=2)
        made = self._compared(_of_best(np.stack([one.quality for one in said], axis=2), best))
        return Predicted(made.d, made.quality, said[0].index, said[0].strength, self.weights), best

    def _compared(self, quality: Floats) -> Predicted:
        """D of every pair from predicted qualities (N, 3, M), with the families' mean scale."""
        scale = np.mean([each.card.scale for each in self.trained], axis=0)
        gamma = float(np.mean([each.card.gamma for each in self.trained]))
        pairs = ((EDGE, FULL), (EDGE, RELAY), (RELAY, FULL))
        d = np.stack([superiority(quality[:, a], quality[:, b], scale, gamma) for a, b in pairs], axis=2)
        none = np.zeros((len(quality), len(self.metrics), 0))
        return Predicted(d, quality, none.astype(np.int64), none, self.weights)

    @property
    def readers(self) -> list[TokenReader]:
        """The text encoder of each family; loaded here, unless given."""
        if self._readers is None:
            from relay.family_spec import find_family
            from scheduler.router.tokens import TokenReader

            self._readers = [TokenReader.of(find_family(each.card.family)) for each in self.trained]
        return self._readers


def _explored(best: int, open_modes: list[int], explore: float, rng: np.random.Generator | None) -> tuple[int, float]:
    """The mode that is taken and its probability."""
    others = [m for m in open_modes if m != best]
    if not others or explore <= 0:
        return best, 1.0
    rng = rng or np.random.default_rng()
    if rng.random() >= explore:
        return best, 1.0 - explore
    return others[int(rng.integers(len(others)))], explore / len(others)


def _of_best(values: Floats, best: NDArray[np.int64]) -> Floats:
    """(N, 3, F, M) of families F to (N, 3, M) of the best one of each mode."""
    return np.take_along_axis(values, best[:, :, None, None], axis=2)[:, :, 0]


def _why(mode: int, advantage: Floats, prices: Prices, prs: float) -> str:
    if prices.relay >= budgets.NEVER:
        sign = "<" if mode == FULL else ">="
        return f"PRS {prs:.3f} {sign} alpha {prices.alpha:.3f}"
    parts = [
        f"{MODES[m]} {advantage[m]:+.3f} at price {price:.3f}"
        for m, price in ((FULL, prices.full), (RELAY, prices.relay))
    ]
    return f"over edge-only: {', '.join(parts)}"


def _promised(promise: Promise | None, explore: float, open_modes: list[int]) -> str | None:
    """What is promised of the mean over such decisions, or why nothing is."""
    if promise is None:
        return None
    if explore > promise.explore:
        return f"not covered: {explore:g} of the decisions explore, the promise was calibrated on {promise.explore:g}"
    if len(open_modes) < len(MODES):
        return "not covered: not every mode was allowed"
    chance = "in expectation" if promise.delta is None else f"with probability {1 - promise.delta:g}"
    return f"mean loss to full-cloud <= {promise.epsilon:g} {chance}"
