"""The promise: valid p-values, coverage over many calibrations, and saying so when it does not hold."""

from math import comb

import numpy as np
import pytest

from relay.errors import BadRequest
from scheduler.router.budget import Budget
from scheduler.router.promise import (
    GRID,
    betting_p_values,
    binomial_cdf,
    calibrate,
    kolmogorov_smirnov,
    losses,
    p_value,
    serve,
    served_loss,
    watch,
)
from scheduler.router.settings import EDGE, FULL, RELAY
from scheduler.router.trained import Calibration


def world(count, seed, hard=0.3):
    """Prompts of which a share is hard for cheaper modes; the router sees through noise which."""
    rng = np.random.default_rng(seed)
    difficult = rng.random(count) < hard
    full = (rng.random(count) < 0.9).astype(float)
    relay = np.where(difficult & (rng.random(count) < 0.5), 0.0, full)
    edge = np.where(difficult & (rng.random(count) < 0.9), 0.0, full)
    seen = np.where(difficult, 0.25, 0.02) + rng.normal(0, 0.08, count)
    advantage = np.stack([seen, 0.6 * seen, np.zeros(count)], axis=1).clip(-0.5, 0.5)
    quality = np.stack([0.9 - 0.1 * seen, 0.9 - 0.4 * seen, 0.9 - seen], axis=1)[:, :, None]
    return Calibration(advantage, quality, np.stack([full, relay, edge], axis=1))


def risk(held, threshold, explore=0.0):
    return served_loss(losses(held.outcome), serve(held.advantage, threshold), explore).mean()


def test_binomial_and_p_value():
    assert binomial_cdf(2, 10, 0.3) == pytest.approx(sum(comb(10, k) * 0.3**k * 0.7 ** (10 - k) for k in range(3)))
    assert p_value(0.05, 400, 0.05) == 1.0
    assert p_value(0.0, 100, 0.05) == pytest.approx(0.95**100)  # Hoeffding's form is exact there
    assert p_value(0.02, 400, 0.05) < p_value(0.03, 400, 0.05) < p_value(0.03, 100, 0.05)


def test_p_value_is_valid_at_the_boundary():
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.4):  # all or nothing, and losses within 0..0.4
        means = (rng.random((4000, 60)) < 0.1 / scale).mean(axis=1) * scale
        values = np.array([p_value(float(mean), 60, 0.1) for mean in means])
        for delta in (0.05, 0.2):
            assert (values <= delta).mean() <= delta + 3 * (delta * (1 - delta) / 4000) ** 0.5


def test_betting_is_valid_at_the_boundary_and_stronger_where_losses_vary_little():
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.4):
        values = betting_p_values((rng.random((60, 4000)) < 0.1 / scale) * scale, 0.1, 0.1)
        for delta in (0.05, 0.2):
            assert (values <= delta).mean() <= delta + 3 * (delta * (1 - delta) / 4000) ** 0.5
    steady = (rng.random((400, 1)) < 0.2) * 0.2
    assert betting_p_values(steady, 0.06, 0.1)[0] < p_value(float(steady.mean()), 400, 0.06) / 3


@pytest.mark.parametrize("method", ["betting", "hoeffding-bentkus"])
def test_coverage_of_learn_then_test(method):
    truth, epsilon, delta, rounds = world(100_000, 99), 0.08, 0.2, 120
    failed, saved = 0, []
    for seed in range(rounds):
        promise = calibrate(world(250, seed), epsilon, delta, method=method)
        threshold = promise.threshold()
        failed += risk(truth, threshold) > epsilon
        saved.append(1 - promise.held[-1].shares[FULL])
    assert failed / rounds <= delta + 3 * (delta * (1 - delta) / rounds) ** 0.5
    assert np.mean(saved) > 0.3  # it is a promise that lets something be saved


def test_conformal_risk_control_holds_in_expectation():
    truth, epsilon = world(100_000, 98), 0.08
    found = [risk(truth, calibrate(world(250, seed), epsilon, None).threshold()) for seed in range(80)]
    assert np.mean(found) <= epsilon + 2 * np.std(found) / len(found) ** 0.5


def test_exploration_counts():
    held = world(2000, 1)
    careful, exploring = calibrate(held, 0.08, explore=0.0), calibrate(held, 0.08, explore=0.1)
    assert exploring.held[-1].shares[FULL] > careful.held[-1].shares[FULL]
    with pytest.raises(BadRequest, match="cannot be promised"):
        calibrate(held, 0.01, explore=0.5)
    with pytest.raises(BadRequest, match="between 0 and 1"):
        calibrate(held, 0.0)


def test_served_loss_is_the_mean_over_what_is_served():
    loss = np.array([[0.0, 0.2, 0.6]])
    assert served_loss(loss, np.array([RELAY]), 0.1) == pytest.approx(0.9 * 0.2 + 0.1 * (0.0 + 0.6) / 2)
    assert losses(np.array([[0.5, 0.7, 0.1]])) == pytest.approx(np.array([[0.0, 0.0, 0.4]]))


def test_serve_takes_the_cheapest_within_the_threshold():
    advantage = np.array([[0.3, 0.25, 0.0], [0.05, 0.04, 0.0], [-0.2, 0.1, 0.0]])
    assert (serve(advantage, GRID[0]) == FULL).all()
    assert serve(advantage, 0.06).tolist() == [RELAY, EDGE, EDGE]
    assert serve(advantage, 1.0).tolist() == [EDGE] * 3
    assert serve(advantage, 0.06, (FULL, EDGE)).tolist() == [FULL, EDGE, EDGE]
    assert serve(advantage, -0.3, (RELAY, EDGE)).tolist() == [RELAY] * 3  # none is within: the best there is
    assert serve(advantage, 0.06, (RELAY, EDGE)).tolist() == [RELAY, EDGE, EDGE]


def test_budget_and_promise_against_each_other():
    promise = calibrate(world(2000, 3), 0.05)
    assert promise.threshold(Budget()) == promise.held[0].threshold  # nothing to save: the best in quality
    need = promise.held[-1].shares[FULL]
    within = Budget(full=need + 0.01)
    assert promise.threshold(within) <= promise.threshold()
    with pytest.raises(BadRequest, match="cannot both be met"):
        promise.threshold(Budget(full=need / 2, relay=1.0))


def test_which_programs_are_covered():
    promise = calibrate(world(500, 3), 0.1, programs={"relay": "r", "edge-only": "e", "full-cloud": "f"})
    assert promise.covers("relay", "r") is None
    assert "not known to be as good" in promise.covers("relay", "other")
    assert promise.covers("relay", "other", {"r": 0.05, "other": 0.05}) is None
    assert promise.covers("relay", "other", {"r": 0.05, "other": 0.06}) is not None


def test_a_shift_is_seen_and_none_is_not():
    held = world(400, 5)
    level, rounds = 0.05, 200
    alarms = 0
    for seed in range(rounds):
        same = world(100, 1000 + seed)
        alarms += watch(held, same.advantage, same.quality, level).shifted
    assert alarms / rounds <= level + 3 * (level / rounds) ** 0.5
    shifted = world(100, 7, hard=0.9)
    said = watch(held, shifted.advantage, shifted.quality, level)
    assert said.shifted
    assert "does not hold" in said.said


def test_kolmogorov_smirnov_level():
    rng = np.random.default_rng(1)
    values = np.array([kolmogorov_smirnov(rng.random(80), rng.random(50)) for _ in range(1000)])
    assert 0.02 < (values <= 0.1).mean() <= 0.1 + 3 * (0.09 / 1000) ** 0.5
    assert kolmogorov_smirnov(rng.random(80), rng.random(50) + 0.5) < 1e-3
