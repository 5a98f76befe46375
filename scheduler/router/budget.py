"""Modes under a budget: prices chosen on held-out prompts, so that the shares that limits speak of are kept.

RouteT2I (arXiv 2411.13787, Problem Formulation), two-way: to the cloud when PRS < alpha, where alpha is the largest
value <= 1/2 with P{PRS < alpha} <= rho_r. Here three-way: with the advantage of mode m over edge-only,

    a_m = 1/2 - PRS(edge-only, m),      a_edge = 0,

a prompt gets the mode with the largest a_m - price_m (edge-only costs nothing; a tie goes to the cheaper mode). Prices
>= 0 are the multipliers of the limits: the assignment is the best of all that keep them, but for one prompt at the edge
of each limit. Without relay this is RouteT2I's rule, alpha = 1/2 - price_full, and the cap at 1/2 is the price's being
at least 0. The paper's general form, limits on the mean fee and on the mean time, is one condition more on the shares.
Shares are exact on the prompts that prices were chosen on; on N others they vary by about sqrt(share (1 - share) / N).
"""

from __future__ import annotations

from math import inf

import msgspec
import numpy as np
from numpy.typing import NDArray

from relay.errors import BadRequest
from scheduler.router.settings import EDGE, FULL, MODES, RELAY, Share

Floats = NDArray[np.float64]
NEVER = 1.0  # above every advantage, which lies in -1/2..1/2
_CANDIDATES = 512  # prices of relay that are tried: all that differ on as many prompts, quantiles of more


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits. Fees and seconds are per request of each mode, in `MODES`' order; a limit of None does not bind."""

    full: Share = 1.0  # largest share of full-cloud: RouteT2I's rho_r
    relay: Share = 1.0
    fees: tuple[float, float, float] = (0.0, 0.0, 0.0)  # F_c; full-cloud, relay, edge-only
    fee: float | None = None  # tau_fee, mean fee of a request
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)  # D_M
    router_s: float = 0.0  # D_R
    time: float | None = None  # tau_time, mean seconds of a request

    @staticmethod
    def two_way(share: float) -> Budget:
        """RouteT2I's setting: full-cloud for at most this share, relay for none."""
        return Budget(full=share, relay=0.0)

    def kept(self, full: Floats, relay: Floats) -> NDArray[np.bool_]:
        """Whether shares (arrays alike) keep every limit."""
        tiny = 1e-9
        edge = 1 - full - relay
        fine = (full <= self.full + tiny) & (relay <= self.relay + tiny)
        if self.fee is not None:
            fine &= full * self.fees[FULL] + relay * self.fees[RELAY] + edge * self.fees[EDGE] <= self.fee + tiny
        if self.time is not None:
            mean = full * self.seconds[FULL] + relay * self.seconds[RELAY] + edge * self.seconds[EDGE]
            fine &= mean + self.router_s <= self.time + tiny
        return fine


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a mode's advantage must exceed; `NEVER`: it is not to be had."""

    full: float
    relay: float

    @property
    def alpha(self) -> float:
        """RouteT2I's threshold on PRS, the one that counts where relay is not to be had."""
        return 0.5 - self.full


def choose(advantage: Floats, prices: Prices) -> NDArray[np.int64]:
    """The mode (N,) of each prompt, as its place in `MODES`, from advantages (N, 3) over edge-only."""
    over = advantage[:, RELAY] - prices.relay
    gain = advantage[:, FULL] - np.maximum(over, 0)  # as calibrate computes it: what is equal there is equal here
    return np.where(gain > prices.full, FULL, np.where(over > 0, RELAY, EDGE))


def shares(modes: NDArray[np.int64]) -> Floats:
    """Share of each mode, (3,)."""
    return np.bincount(modes, minlength=len(MODES)) / max(len(modes), 1)


def calibrate(advantage: Floats, budget: Budget) -> Prices:
    """The prices with the largest total advantage that keep the budget on these prompts (N, 3).

    For every price of relay the prompts are ordered by what full-cloud adds to the better of relay and edge-only; giving
    it to the first k of them makes all the shares there are. BadRequest where not even one of them keeps the limits.
    """
    if not len(advantage):
        raise BadRequest("a budget needs held-out prompts to calibrate on, and there are none")
    best: tuple[float, Prices] | None = None
    for relay in _relay_prices(advantage, budget):
        found = _best_full_price(advantage, relay, budget)
        if found is not None and (best is None or found[0] > best[0] + 1e-12):
            best = found
    if best is None:
        raise BadRequest(
            "this budget cannot be kept by any choice of modes, not even by edge-only for every prompt:"
            f" fee {budget.fee}, time {budget.time}"
        )
    return best[1]


def _relay_prices(advantage: Floats, budget: Budget) -> list[float]:
    if budget.relay == 0:
        return [NEVER]
    levels = np.unique(advantage[:, RELAY].clip(min=0))
    if len(levels) > _CANDIDATES:
        levels = np.unique(np.quantile(levels, np.linspace(0, 1, _CANDIDATES)))
    return [0.0, *(float(level) for level in levels if level > 0), NEVER]


def _best_full_price(advantage: Floats, relay: float, budget: Budget) -> tuple[float, Prices] | None:
    """(total advantage, prices) of the best price of full-cloud at this price of relay; None where none keeps the budget."""
    over = advantage[:, RELAY] - relay
    to_relay = over > 0
    gain = advantage[:, FULL] - np.maximum(over, 0)
    order = np.argsort(-gain, kind="stable")
    ranked = gain[order]
    worth = np.where(to_relay, advantage[:, RELAY], 0.0)
    # full-cloud for the first k prompts, k = 0..N
    none = np.zeros(1)
    relayed = to_relay.sum() - np.concatenate([none, np.cumsum(to_relay[order])])
    total = worth.sum() + np.concatenate([none, np.cumsum((advantage[:, FULL] - worth)[order])])
    # the price that gives it to k prompts is the next one's gain; ties cannot be parted, a price is never below 0
    price = np.maximum(np.append(ranked, -inf), 0.0)
    count = np.searchsorted(-ranked, -price, side="left")  # how many really exceed it
    size = len(gain)
    fine = budget.kept(count / size, relayed[count] / size)
    if not fine.any():
        return None
    k = int(np.flatnonzero(fine)[total[count][fine].argmax()])
    return float(total[count[k]]), Prices(float(price[k]), relay)


def two_way_alpha(prs: Floats, share: float) -> float:
    """RouteT2I's alpha as it stands in the paper: the largest value <= 1/2 with P{PRS < alpha} <= share."""
    ranked = np.sort(prs)
    count = int(np.floor(share * len(ranked) + 1e-9))
    return 0.5 if count >= len(ranked) else float(min(ranked[count], 0.5))
