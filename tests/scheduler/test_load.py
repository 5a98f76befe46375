"""The pieces of serving under load: waits, estimates, the plan and the shift."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest
from scheduler.load.estimator import LoadEstimator
from scheduler.load.queueing import mean_wait, most_busy, wait_quantile
from scheduler.load.shift import shift
from scheduler.load.solver import Leg, LevelLoad, Pool, Problem, solve


def simulated_waits(busy: float, servers: int, requests: int = 200_000) -> np.ndarray:
    """Waits in an M/D/c queue with service of one second."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / (busy * servers), requests))
    free = [0.0] * servers
    waits = np.empty(requests)
    for i, at in enumerate(arrivals):
        start = max(at, heapq.heappop(free))
        waits[i] = start - at
        heapq.heappush(free, start + 1.0)
    return waits[requests // 10 :]


@pytest.mark.parametrize(("busy", "servers"), [(0.6, 1), (0.8, 2), (0.9, 4)])
def test_waits_are_those_of_a_simulated_queue(busy, servers):
    waits = simulated_waits(busy, servers)
    assert mean_wait(busy, servers, 1.0) == pytest.approx(waits.mean(), rel=0.15)
    assert wait_quantile(0.99, busy, servers, 1.0) == pytest.approx(np.quantile(waits, 0.99), rel=0.25)


def test_what_may_be_planned_leaves_the_slack_that_was_asked_for():
    busy = most_busy(3.0, 2, 1.0)
    assert wait_quantile(0.99, busy, 2, 1.0) == pytest.approx(3.0, rel=1e-3)
    assert most_busy(0.0, 2, 1.0) == 0.0
    assert mean_wait(1.0, 2, 1.0) == float("inf")


def test_the_estimator_rises_at_once_falls_slowly_and_stays_above_the_mean():
    load = LoadEstimator(quantile=0.9)
    for _ in range(50):
        load.observe(10)
    assert load.mean == pytest.approx(10)
    assert 13 <= load.demand <= 15  # the 0.9 quantile of Poisson(10) is 14
    load.observe(100)
    assert load.mean > 70
    load.observe(10)
    assert load.mean > 60
    load.surge(200)  # so many already, and the period is not over
    assert load.mean == 200
    load.surge(20)
    assert load.mean == 200


def problem(demand, deadline_s=10.0, pools=None, quality=(1.0, 0.8, 0.5)):
    """Three levels of 4, 2 and 1 seconds of an edge, each with a second of a device; a slower edge takes twice as long."""
    pools = pools or (Pool("fast", 1), Pool("slow", 1), Pool("phones", 4))
    edge = {"fast": 1.0, "slow": 2.0}
    levels = tuple(
        LevelLoad(
            str(work),
            (
                Leg({n: work * s for n, s in edge.items()}, {n: work * s for n, s in edge.items()}),
                Leg({"phones": 1.0}, {"phones": 1.0}),
            ),
        )
        for work in (4.0, 2.0, 1.0)
    )
    return Problem(pools, levels, np.array([quality]), np.array([demand]), deadline_s, variation=0.0)


def test_little_load_is_served_best_and_more_of_it_at_lower_levels():
    light, heavy = solve(problem(0.2)), solve(problem(0.7))
    assert light.quality == pytest.approx(1.0)
    assert light.shed.sum() == pytest.approx(0.0, abs=1e-9)
    assert 0.5 < heavy.quality < light.quality
    assert heavy.prices["fast"] > heavy.prices["slow"] > light.prices["fast"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("demand", [0.3, 0.6, 1.0, 1.6])
def test_the_plan_is_as_good_as_the_best_of_all_splits(demand):
    """Against trying every split of the load over levels and edges in fourteenths."""
    plan = solve(problem(demand))
    worth = (plan.served * np.array([1.0, 0.8, 0.5])).sum() - 2 * plan.shed.sum()
    best, parts = -np.inf, 14
    work, quality = (4.0, 2.0, 1.0), (1.0, 0.8, 0.5)
    for split in product(range(parts + 1), repeat=6):  # level x edge
        if sum(split) > parts:
            continue
        x = np.array(split).reshape(3, 2) * demand / parts
        if (x[:, 0] @ work) > 0.95 or (2 * x[:, 1] @ work) > 0.95 or x.sum() > 4 * 0.95:
            continue
        best = max(best, (x.sum(1) @ quality) - 2 * (demand - x.sum()))
    assert worth >= best - 1e-9
    assert worth <= best + 2 * (0.5 + 2) * demand / parts  # on each edge the grid may leave one part unserved


def test_what_is_served_adds_up_and_no_pool_does_more_than_it_can():
    asked = problem(1.0)
    plan = solve(asked)
    assert plan.served.sum() + plan.shed.sum() == pytest.approx(1.0)
    for level in range(3):
        for leg in range(2):
            walked = sum(load for (i, m, _), load in plan.loads.items() if (i, m) == (level, leg))
            assert walked == pytest.approx(plan.served[:, level].sum(), abs=1e-9)
    assert all(0 <= busy <= 0.95 + 1e-9 for busy in plan.busy.values())


def test_caps_that_are_given_are_kept_and_pools_of_other_caps_are_not_one():
    asked = problem(1.0)
    plan = solve(replace(asked, caps={"fast": 0.5, "slow": 0.3, "phones": 1.0}))
    assert plan.busy["fast"] == pytest.approx(0.5)
    assert plan.busy["slow"] == pytest.approx(0.3)
    assert plan.served.sum() + plan.shed.sum() == pytest.approx(1.0)
    alike = (Pool("fast", 1), Pool("slow", 1), Pool("phones", 2), Pool("more", 2))
    levels = tuple(
        LevelLoad(v.name, (v.legs[0], Leg({"phones": 1.0, "more": 1.0}, {"phones": 1.0, "more": 1.0})))
        for v in asked.levels
    )
    apart = replace(asked, pools=alike, levels=levels, caps={"fast": 0.9, "slow": 0.9, "phones": 0.05, "more": 0.2})
    found = solve(apart)
    assert found.busy["phones"] <= 0.05 + 1e-9
    assert found.busy["more"] <= 0.2 + 1e-9


def test_pools_alike_are_one_and_share_its_load():
    one = solve(problem(1.0, pools=(Pool("fast", 1), Pool("slow", 1), Pool("phones", 4))))
    asked = problem(1.0, pools=(Pool("fast", 1), Pool("slow", 1), Pool("a", 1), Pool("b", 3)))
    legs = [LevelLoad(v.name, (v.legs[0], Leg({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}))) for v in asked.levels]
    two = solve(Problem(asked.pools, tuple(legs), asked.quality, asked.demand, asked.deadline_s, variation=0.0))
    assert two.quality == pytest.approx(one.quality)
    a = sum(load for (_, _, pool), load in two.loads.items() if pool == "a")
    b = sum(load for (_, _, pool), load in two.loads.items() if pool == "b")
    assert b == pytest.approx(3 * a)


def test_a_deadline_leaves_out_what_cannot_keep_it_and_room_for_waits():
    tight = solve(problem(0.2, deadline_s=3.5))
    assert 0 not in tight.allowed
    asked = Problem(*[getattr(problem(0.24, deadline_s=6.0), k) for k in ("pools", "levels", "quality", "demand")], 6.0)
    roomy = solve(asked)
    assert all(seconds <= 6.0 for seconds in roomy.latency_s.values())
    assert roomy.busy["fast"] < 0.95


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deadline_s": 0.5}, "no level keeps a deadline of 0.5 s"),
        ({"pools": (Pool("fast", 0),)}, "zero capacity"),
        ({"demand": -1.0}, "no demand is negative"),
        ({"quality": (1.0, float("nan"), 0.5)}, "finite"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(change, said):
    with pytest.raises(BadRequest, match=said):
        solve(problem(**({"demand": 0.5} | change)))


def test_excess_moves_to_the_next_safer_level_and_a_deficit_pulls_from_it():
    moves = shift([0.2, 0.3, 0.5], [0.2, 0.5, 0.3])
    assert moves[2].tolist() == pytest.approx([0.0, 0.4, 0.6])
    assert moves[1].tolist() == pytest.approx([0.0, 1.0, 0.0])
    pulled = shift([0.6, 0.3, 0.1], [0.2, 0.3, 0.5])
    assert pulled[2].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert pulled[1].tolist() == pytest.approx([0.0, 0.0, 1.0])  # the nearest safer one gives first
    assert pulled[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])


shares = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda v: sum(v) > 0.1)


@settings(max_examples=200, deadline=None)
@given(shares, shares)
def test_the_shift_serves_everyone_and_meets_the_plan(wanted, planned):
    want, plan = np.array(wanted) / sum(wanted), np.array(planned) / sum(planned)
    moves = shift(want, plan)
    assert moves.sum(axis=1) == pytest.approx(np.ones(4))
    assert (moves >= -1e-12).all()
    assert want @ moves == pytest.approx(plan, abs=1e-9)


# --- the plan: which batch, how much of the deadline for work ---


def fleet_of(nodes, rng):
    from scheduler.load.expected import Station

    found = []
    for i in range(nodes):
        member, pace = ("large", rng.choice([1.0, 1.5, 2.0])) if i % 2 == 0 else ("small", rng.choice([0.2, 0.4]))
        curve = {1: 0.02 * pace, 2: 0.03 * pace, 4: 0.05 * pace}
        role = "edge" if i % 2 == 0 else "device"
        found.append(Station(f"n{i}", role, {"f": {member: curve}}, 4, 0.002, 0.002, 0.005, 1e7))
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 3.0), st.sampled_from([1.5, 4.0]))
def test_a_plan_is_as_good_as_the_best_of_all_its_trials(seed, share, deadline_s):
    """Trials that are not solved are those that cannot be better: against solving every one."""
    from scheduler.load import planning
    from scheduler.load.expected import Work
    from scheduler.load.settings import LoadSettings

    rng = np.random.default_rng(seed)
    options = "match=exact/codec=fp16/guidance=3,3/conditioning=encode"
    from relay.program import Program

    works = [Work(Program.parse(f"f/large:20:0-{s}/small:20:{s}-20/{options}"), 0, 1e4, 1e4) for s in (18, 12, 6, 2)]
    stations, quality = fleet_of(8, rng), np.sort(rng.random((3, 4)), axis=1)[:, ::-1]
    demand, given_ = rng.uniform(0.5, 1.5, 3) * share * 20, LoadSettings(deadline_s=deadline_s)
    plan, batch = planning.best_plan(stations, works, quality, demand, given_)

    def worth(plan):
        return float((plan.served * quality).sum() - 2 * plan.shed.sum())

    everything = planning._Fleet(stations, [1] * len(stations), stations)
    found = []
    for trial in planning._trials(stations, works, given_):
        caps = planning._caps(trial, everything, given_, planning._guess(trial, stations))
        solved = planning._solved(trial, everything, quality, demand, given_, caps)
        found.append((worth(solved), trial, solved))
        prices = np.array([solved.prices[each.name] for each in stations])
        bound = planning._bound(trial, everything, quality, demand, caps, prices)
        assert bound == pytest.approx(worth(solved), abs=1e-6)  # its own prices say exactly what it is worth
        assert planning._bound(trial, everything, quality, demand, caps, 0.7 * prices) >= bound - 1e-6
    best = max(value for value, *_ in found)
    _, trial, solved = next(each for each in found if each[0] >= best - 1e-9)
    caps = planning._caps(trial, everything, given_, planning._served(solved, trial, everything))
    again = planning._solved(trial, everything, quality, demand, given_, caps)
    assert batch == trial.batch
    # what serves a request of the plan may differ where several plans are the best
    assert worth(plan) == pytest.approx(worth(again), abs=0.05 * demand.sum())
    for begun in (1, 2, 4):  # wherever the search begins
        other, other_batch = planning.best_plan(stations, works, quality, demand, given_, begun)
        assert other_batch == batch
        assert worth(other) == pytest.approx(worth(plan), abs=1e-6)
    assert set(plan.prices) == {each.name for each in stations}
    assert plan.served.sum() + plan.shed.sum() == pytest.approx(demand.sum())


def test_many_nodes_at_once_are_planned_as_busy_as_each_alone():
    servers, service = np.array([1, 2, 8, 40]), np.array([0.5, 1.0, 2.0, 0.1])
    each = [float(most_busy(1.2, int(c), float(s), 0.95, 2.0)) for c, s in zip(servers, service, strict=True)]
    assert most_busy(1.2, servers, service, 0.95, 2.0) == pytest.approx(each, abs=1e-9)
    assert (most_busy(0.0, servers, service) == 0).all()
    waits = [wait_quantile(0.95, b, int(c), float(s), 2.0) for b, c, s in zip(each, servers, service, strict=True)]
    assert waits == pytest.approx([1.2] * 4, rel=1e-3)
