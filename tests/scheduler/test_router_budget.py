"""Budgets: shares are kept, the choice is the best one, and two ways are RouteT2I's rule."""

from itertools import product

import numpy as np
import pytest

from relay.errors import BadRequest
from scheduler.router.budget import NEVER, Budget, calibrate, choose, shares, two_way_alpha
from scheduler.router.settings import EDGE, FULL, RELAY

FEES, SECONDS = (1.0, 0.4, 0.0), (2.0, 1.2, 1.0)


def advantages(seed, count=101, digits=None):
    rng = np.random.default_rng(seed)
    full = rng.normal(0.05, 0.1, count)
    found = np.stack([full, 0.7 * full + rng.normal(0, 0.05, count), np.zeros(count)], axis=1).clip(-0.5, 0.5)
    return found if digits is None else found.round(digits)  # rounded: many ties


@pytest.mark.parametrize("digits", [None, 2])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_two_way_is_the_papers_threshold(share, digits):
    for seed in range(5):
        advantage = advantages(seed, digits=digits)
        prs = 0.5 - advantage[:, FULL]
        prices = calibrate(advantage, Budget.two_way(share))
        alpha = two_way_alpha(prs, share)
        assert prices.relay == NEVER
        assert prices.alpha == pytest.approx(alpha)
        assert alpha <= 0.5
        chosen = choose(advantage, prices)
        assert ((chosen == FULL) == (prs < alpha)).all()
        assert shares(chosen)[FULL] <= share + 1e-9
        assert shares(chosen)[RELAY] == 0


def test_alpha_is_the_largest_that_keeps_the_share():
    prs = np.array([0.1, 0.2, 0.2, 0.3, 0.4, 0.7])
    for share in (0.2, 0.4, 0.5, 0.6):
        alpha = two_way_alpha(prs, share)
        assert (prs < alpha).mean() <= share
        assert (prs < alpha + 1e-6).mean() > share
    assert two_way_alpha(prs, 1.0) == 0.5  # edge-only is better for the last one, whatever may be spent


@pytest.mark.parametrize("digits", [None, 2])
def test_shares_are_kept_and_used(digits):
    for seed, full, relay in product(range(4), (0.0, 0.2, 0.6), (0.1, 0.5, 1.0)):
        advantage = advantages(seed, digits=digits)
        spent = shares(choose(advantage, calibrate(advantage, Budget(full=full, relay=relay))))
        assert spent[FULL] <= full + 1e-9
        assert spent[RELAY] <= relay + 1e-9
    free = choose(advantages(0), calibrate(advantages(0), Budget()))
    assert (free == advantages(0)[:, [0, 1, 2]].argmax(axis=1)).all()


def test_fee_and_time_are_kept():
    advantage = advantages(1)
    for fee, time in ((0.3, None), (None, 1.4), (0.5, 1.5), (0.0, None)):
        budget = Budget(fees=FEES, fee=fee, seconds=SECONDS, router_s=0.005, time=time)
        spent = shares(choose(advantage, calibrate(advantage, budget)))
        assert fee is None or spent @ FEES <= fee + 1e-9
        assert time is None or spent @ SECONDS + 0.005 <= time + 1e-9
    tight = shares(choose(advantage, calibrate(advantage, Budget(fees=FEES, fee=0.3))))
    loose = shares(choose(advantage, calibrate(advantage, Budget(fees=FEES, fee=0.5))))
    assert tight @ FEES < loose @ FEES


def test_a_limit_below_edge_only_is_refused():
    with pytest.raises(BadRequest, match="not even by edge-only"):
        calibrate(advantages(0), Budget(seconds=SECONDS, time=0.5))
    with pytest.raises(BadRequest, match="held-out"):
        calibrate(np.zeros((0, 3)), Budget())


def test_no_assignment_that_keeps_the_shares_is_better():
    for seed in range(6):
        advantage = advantages(seed, count=7)
        budget = Budget(full=2 / 7 + 1e-6, relay=3 / 7 + 1e-6)
        chosen = choose(advantage, calibrate(advantage, budget))
        rows = np.arange(7)
        best = max(
            advantage[rows, list(modes)].sum()
            for modes in product((FULL, RELAY, EDGE), repeat=7)
            if modes.count(FULL) <= 2 and modes.count(RELAY) <= 3
        )
        # prices part prompts one by one: at most one a limit is left over
        assert advantage[rows, chosen].sum() >= best - 2 * advantage.max()
        assert advantage[rows, chosen].sum() <= best + 1e-9
