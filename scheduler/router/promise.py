"""A promise on top of the router: how far what is served may fall short of full-cloud, in the mean over prompts.

    loss = max(0, q_full - q_served) in 0..1, q the mean over the metrics that apply to the prompt
    with probability >= 1 - delta over the calibration prompts:  E[loss] <= epsilon

The rule has one threshold t: a prompt gets the cheapest mode whose advantage falls short of full-cloud's by at most t.
At t = -1 everything is full-cloud and the loss is 0. Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052)
with fixed-sequence testing: "E[loss at t] > epsilon" is tested for t on a grid fixed beforehand, from the safest up, each
at level delta, until one cannot be rejected; all before it hold together. Two p-values, both valid for any loss in 0..1:
Hoeffding-Bentkus (Bates et al. 2021, arXiv 2101.02703), which knows the mean alone, and betting (Waudby-Smith and Ramdas
2020, arXiv 2010.09686), which also gains from losses that vary little, as ours do; it is the default. The variant in
expectation, without delta, is conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814): E[loss] <= epsilon
over calibration and prompt together, made to hold for losses that do not grow with t by each prompt's running maximum.

It holds for prompts like those that it was calibrated on: `Promise.watch` tests that, and for what it was calibrated to
serve: exploration is counted in, and `Promise.covers` says which programs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, e, exp, inf, lgamma, log
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from relay.errors import BadRequest
from scheduler.router.budget import Budget, shares
from scheduler.router.settings import EDGE, FULL, MODES, RELAY
from scheduler.router.trained import Calibration

Floats = NDArray[np.float64]
Modes = NDArray[np.int64]
Method = Literal["betting", "hoeffding-bentkus", "conformal"]

# Advantages lie in -1/2..1/2, so that -1 means everything full-cloud; it comes first. Densest at 0, where prompts are.
GRID: tuple[float, ...] = (-1.0, *(0.5 * u * abs(u) for u in np.linspace(-1, 1, 501).tolist()))


def serve(advantage: Floats, threshold: float, modes: Sequence[int] = (FULL, RELAY, EDGE)) -> Modes:
    """The cheapest of `modes` that falls short of full-cloud's advantage by at most `threshold`, (N,).

    Where none does it is the one with the largest advantage: full-cloud itself, if it is among them.
    """
    order = [mode for mode in (FULL, RELAY, EDGE) if mode in modes]
    short = advantage[:, [FULL]] - advantage
    short[:, FULL] = -2.0 if FULL in modes else 2.0  # nothing falls short of itself
    chosen = np.array(order)[short[:, order].argmin(axis=1)]
    for mode in order:  # the cheapest one last, so that it wins
        if mode != FULL:
            chosen[short[:, mode] <= threshold] = mode
    return chosen


def losses(outcome: Floats) -> Floats:
    """max(0, q_full - q_mode), (N, 3), of mean qualities (N, 3) in 0..1."""
    return np.asarray(np.maximum(0.0, outcome[:, [FULL]] - outcome))


def served_loss(loss: Floats, modes: Modes, explore: float = 0.0) -> Floats:
    """Expected loss (N,) of what is really served: with probability `explore` one of the other modes, evenly."""
    own = loss[np.arange(len(loss)), modes]
    others = (loss.sum(axis=1) - own) / (loss.shape[1] - 1)
    return (1 - explore) * own + explore * others


def p_value(mean: float, count: int, epsilon: float) -> float:
    """Hoeffding-Bentkus p-value of "E[loss] > epsilon" for `count` losses in 0..1 with this mean."""
    if mean >= epsilon:
        return 1.0
    divergence = (mean * log(mean / epsilon) if mean > 0 else 0.0) + (1 - mean) * log((1 - mean) / (1 - epsilon))
    return min(1.0, exp(-count * divergence), e * binomial_cdf(ceil(count * mean - 1e-9), count, epsilon))


def betting_p_values(loss: Floats, epsilon: float, delta: float) -> Floats:
    """P-values (G,) of "E[loss] > epsilon" for losses (N, G) in 0..1, by betting against it prompt by prompt.

    The capital prod_i (1 - b_i (loss_i - epsilon)), with bets 0 <= b_i <= 1 that only know the prompts before, is a
    supermartingale if the mean exceeds epsilon: it reaches 1/p with probability p at most (Ville). The bets are the
    predictable plug-in ones, for level delta. The prompts are taken in an order drawn once, not in the run's, which goes
    class by class.
    """
    count = len(loss)
    x = loss[np.random.default_rng(0).permutation(count)]
    i = np.arange(1, count + 1)[:, None]
    mean = (0.5 + x.cumsum(axis=0)) / (i + 1)
    variance = (0.25 + np.square(x - mean).cumsum(axis=0)) / (i + 1)
    before = np.concatenate([np.full((1, x.shape[1]), 0.25), variance[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * log(1 / delta) / (count * before)))
    capital = np.log1p(-bets * (x - epsilon)).cumsum(axis=0)
    return np.asarray(np.exp(-np.maximum(capital.max(axis=0), 0.0)))


def binomial_cdf(most: int, count: int, share: float) -> float:
    """P{Binomial(count, share) <= most}."""
    k = np.arange(min(most, count) + 1)
    choose = np.array([lgamma(count + 1) - lgamma(i + 1) - lgamma(count - i + 1) for i in k])
    return float(min(1.0, np.exp(choose + k * log(share) + (count - k) * log(1 - share)).sum()))


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A threshold at which the promise holds, and what the calibration prompts got there."""

    threshold: float
    shares: tuple[float, float, float]
    loss: float


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether prompts are still like the calibration's. `p_value`: of the mix being the same, over all tests together."""

    shifted: bool
    p_value: float
    prompts: int
    said: str


class Promise(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A calibrated promise. `held`: from the safest threshold to the cheapest that holds, never empty."""

    epsilon: float
    delta: float | None  # None: in expectation
    method: Method
    explore: float
    prompts: int
    held: tuple[Held, ...]
    programs: dict[str, str]  # mode -> the program it was calibrated on

    def threshold(self, budget: Budget | None = None) -> float:
        """The cheapest threshold; with a budget the best in quality among those that keep it.

        BadRequest where budget and epsilon cannot both be met, with what the promise needs.
        """
        if budget is None:
            return self.held[-1].threshold
        for each in self.held:  # quality falls from one to the next
            if budget.kept(np.array(each.shares[FULL]), np.array(each.shares[RELAY])):
                return each.threshold
        need = min(each.shares[FULL] for each in self.held)
        raise BadRequest(
            f"the budget (full-cloud <= {budget.full:.0%}, relay <= {budget.relay:.0%}) and the promise (mean loss <="
            f" {self.epsilon:g}{'' if self.delta is None else f' with probability {1 - self.delta:g}'}) cannot both be met:"
            f" the promise needs full-cloud for {need:.0%} of the prompts; raise the budget or epsilon"
        )

    def covers(self, mode: str, program: str, loss: Mapping[str, float] | None = None) -> str | None:
        """None where the promise covers an answer of this program, else the reason why not.

        `loss`: measured mean loss to full-cloud per program, over all prompts; one that is not above the mode's reference
        is taken to be covered. That bounds a bandit's choice as long as it does not pick such a program just for those
        prompts that it draws worse than the reference does.
        """
        reference = self.programs.get(mode, "")
        if program == reference:
            return None
        if loss and reference in loss and loss.get(program, inf) <= loss[reference]:
            return None
        return f"the promise was calibrated on {reference} for {mode}, and {program} is not known to be as good"


def calibrate(
    calibration: Calibration,
    epsilon: float,
    delta: float | None = 0.1,
    *,
    programs: Mapping[str, str] | None = None,
    explore: float = 0.0,
    modes: Sequence[int] = (FULL, RELAY, EDGE),
    method: Method = "betting",
) -> Promise:
    """The promise that these prompts allow. `delta` None: conformal risk control, in expectation.

    BadRequest where even full-cloud for every prompt cannot be shown to hold it: too few prompts, or exploration that
    costs more than epsilon.
    """
    if not 0 < epsilon < 1 or (delta is not None and not 0 < delta < 1):
        raise BadRequest(f"epsilon and delta lie between 0 and 1, not {epsilon} and {delta}")
    count, grid = len(calibration.outcome), np.array(GRID)
    chosen = _served_along(calibration.advantage, grid, modes)
    loss = _loss_along(losses(calibration.outcome), chosen, explore)
    means = loss.mean(axis=0)
    if delta is None:
        method = "conformal"
        fine = (np.maximum.accumulate(loss, axis=1).sum(axis=0) + 1.0) / (count + 1) <= epsilon
    elif method == "betting":
        fine = betting_p_values(loss, epsilon, delta) <= delta
    else:
        fine = np.array([p_value(float(mean), count, epsilon) <= delta for mean in means])
    last = len(GRID) if fine.all() else int(fine.argmin())  # the first that fails ends the sequence
    held: list[Held] = []
    for g, threshold in enumerate(GRID[:last]):
        share = shares(chosen[:, g])
        held.append(Held(threshold, (float(share[0]), float(share[1]), float(share[2])), float(means[g])))
    if not held:
        raise BadRequest(
            f"mean loss <= {epsilon:g} cannot be promised from {count} prompts with exploration {explore:g}, not even with"
            " full-cloud for every prompt: calibrate on more prompts, explore less, or raise epsilon"
        )
    return Promise(
        epsilon=epsilon, delta=delta, method=method, explore=explore, prompts=count,
        held=tuple(_without_repeats(held)), programs=dict(programs or {}),
    )  # fmt: skip


def _without_repeats(held: list[Held]) -> list[Held]:
    """Of thresholds with the same shares the last one."""
    return [
        each
        for each, after in zip(held, [*held[1:], None], strict=True)
        if after is None or after.shares != each.shares
    ]


def _served_along(advantage: Floats, grid: Floats, modes: Sequence[int]) -> Modes:
    """`serve` at every threshold of the grid, (N, G)."""
    chosen = np.full((len(advantage), len(grid)), FULL)
    short = advantage[:, [FULL]] - advantage
    for mode in (RELAY, EDGE):
        if mode in modes:
            chosen[short[:, mode, None] <= grid] = mode
    return chosen


def _loss_along(loss: Floats, chosen: Modes, explore: float) -> Floats:
    """`served_loss` at every threshold, (N, G)."""
    own = np.take_along_axis(loss, chosen, axis=1)
    return np.asarray((1 - explore) * own + explore * (loss.sum(axis=1, keepdims=True) - own) / (loss.shape[1] - 1))


# -- are prompts still like those it was calibrated on? --------------------------------------------------------------


def watch(calibration: Calibration, advantage: Floats, quality: Floats, level: float = 0.01) -> Watch:
    """Test recent prompts against the calibration's by what the router predicts of both.

    Two-sample Kolmogorov-Smirnov on each predicted advantage (full-cloud, relay) and on each mode's predicted quality, with
    Bonferroni's correction: of unshifted windows at most `level` are called shifted. It sees what moves the router's
    predictions; a shift that leaves them as they are is not seen.
    """
    mean = calibration.quality.mean(axis=2), quality.mean(axis=2)
    tested = [(calibration.advantage[:, m], advantage[:, m]) for m in (FULL, RELAY)]
    tested += [(mean[0][:, m], mean[1][:, m]) for m in range(len(MODES))]
    worst = min(kolmogorov_smirnov(a, b) for a, b in tested)
    together = min(1.0, worst * len(tested))
    shifted = together < level
    said = (
        f"these {len(advantage)} prompts are not like the {len(calibration.advantage)} it was calibrated on"
        f" (p = {together:.2g}): the promise does not hold for them"
        if shifted
        else f"no shift seen in {len(advantage)} prompts (p = {together:.2g}, level {level:g})"
    )
    return Watch(shifted, together, len(advantage), said)


def kolmogorov_smirnov(a: Floats, b: Floats) -> float:
    """Two-sample p-value, asymptotic with Stephens' correction (1970); ties make it cautious."""
    if not len(a) or not len(b):
        return 1.0
    both = np.sort(np.concatenate([a, b]))
    apart = np.abs(
        np.searchsorted(np.sort(a), both, side="right") / len(a)
        - np.searchsorted(np.sort(b), both, side="right") / len(b)
    ).max()
    root = (len(a) * len(b) / (len(a) + len(b))) ** 0.5
    x = (root + 0.12 + 0.11 / root) * apart
    if x < 0.2:
        return 1.0
    k = np.arange(1, 101)
    return float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * k**2 * x**2)).sum(), 0.0, 1.0))
