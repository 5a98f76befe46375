"""Control and admission under load: plans follow demand, prompts get what they bear, nobody is kept out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest
from relay.program import Program
from scheduler.load.admission import Admission
from scheduler.load.controller import Controller
from scheduler.load.expected import Station, Work, ends_s, room_s
from scheduler.load.settings import LoadSettings, TenantShare

OPTIONS = "match=exact/codec=fp16"
WORKS = [
    Work(Program.parse(text))
    for text in (
        f"tiny/large:20:0-20/{OPTIONS}/guidance=3/conditioning=encode",
        f"tiny/large:20:0-8/small:20:8-20/{OPTIONS}/guidance=3,3/conditioning=encode",
        f"tiny/small:20:0-20/{OPTIONS}/guidance=3/conditioning=encode",
    )
]
LARGE = {1: 0.02, 2: 0.03, 4: 0.05, 8: 0.1}
SMALL = {size: seconds / 5 for size, seconds in LARGE.items()}


def stations(edges=2, devices=2, **changes):
    made = [Station(f"edge-{i}", "edge", {"tiny": {"large": LARGE}}, 8, bytes_per_s=1e9) for i in range(edges)]
    made += [Station(f"phone-{i}", "device", {"tiny": {"small": SMALL}}, 8, bytes_per_s=1e9) for i in range(devices)]
    for station in made:
        for key, value in changes.items():
            setattr(station, key, value)
    return made


def sample(count=200, seed=0):
    """Half of the prompts lose nothing by less work, half much."""
    easy = np.random.default_rng(seed).random(count) < 0.5
    return np.where(easy[:, None], (0.9, 0.895, 0.89), (0.9, 0.8, 0.4))


HARD = np.array([0.9, 0.8, 0.4])


def controller(deadline_s=2.0, **options):
    return Controller(LoadSettings(deadline_s=deadline_s, **options), WORKS, sample(), np.random.default_rng(0))


def driven(control, per_s, fleet, seconds=12, seed=1):
    """What the last second's prompts were allowed, nodes at rest; and which of them were easy."""
    for second in range(seconds):
        asked = sample(per_s, seed + second)
        last = []
        for quality in asked:
            control.arrived(quality)
            last.append(control.allow(quality, control.settings.deadline_s, fleet))
        control.control(fleet)
    return last, asked[:, 2] > 0.5


def test_without_pressure_everything_is_allowed_and_nothing_costs():
    control = controller()
    found, _ = driven(control, 2, stations())
    assert not any(each.pressed for each in found)
    assert all(each.levels == (0, 1, 2) and each.level == 0 for each in found)
    assert max(control.prices.values()) == 0
    assert not control.pressed


def test_under_pressure_prompts_that_bear_it_get_less_work():
    control = controller()
    found, easy = driven(control, 40, stations())
    levels = np.array([each.level for each in found])
    assert all(each.pressed for each in found)
    assert levels[easy].mean() > levels[~easy].mean() + 0.5
    assert max(control.prices[name] for name in ("edge-0", "edge-1")) > 0
    assert control.shares() @ [0, 1, 2] > 0.5
    assert all(each.level in each.levels for each in found)


def test_more_than_was_planned_for_is_planned_for_within_the_period():
    control, fleet = controller(), stations()
    driven(control, 2, fleet)
    planned, count = control.demand, 0
    assert not control.pressed
    while not control.surged:
        control.arrived(HARD)
        count += 1
    assert planned < count < 2 * planned
    control.control(fleet, over=False)
    assert control.demand > count
    assert not control.surged
    for quality in sample(60):
        control.arrived(quality)
    assert control.surged
    control.control(fleet, over=False)
    assert control.pressed
    control.control(fleet)  # the period is over: what came in it counts once
    assert control.estimator.mean == count + 60


def test_time_left_is_counted_by_how_far_requests_overran_what_was_predicted():
    control, fleet = controller(), stations()
    driven(control, 60, fleet)
    predicted = control.allow(HARD, 2.0, fleet)
    brink = 1.2 * min(predicted.ends_s)
    assert control.allow(HARD, brink, fleet).level is not None
    for _ in range(20):
        control.overruns.observe(3.0, 2.0)
    assert control.allow(HARD, brink, fleet).level is None


def test_the_prompt_agnostic_form_shares_alike():
    control = controller(classes=1)
    control.arrived = lambda quality: Controller.arrived(control, sample().mean(0))
    found, easy = driven(control, 40, stations())
    assert control.quality.shape == (1, 3)
    assert len(found) == len(easy)


def test_a_level_that_would_be_late_is_not_allowed_and_none_is_said_so():
    control = controller()
    control.control(stations())
    busy = stations(held=20, backlog_s=8.0)
    (quality,) = sample(1)
    none = control.allow(quality, 0.5, busy)
    assert (none.level, none.levels, none.pressed) == (None, (), True)
    some = control.allow(quality, 2.5, stations(edges=2, devices=2)[:2] + busy[2:])
    assert 0 in some.levels  # edges are at rest
    other = control.allow(quality, 2.5, busy[:2] + stations()[2:])
    assert other.levels
    assert 0 not in other.levels
    assert other.pressed


def test_plans_are_remembered_and_made_anew_for_other_nodes():
    control = controller()
    fleet = stations()
    driven(control, 20, fleet, seconds=30)
    few = control.solved
    driven(control, 20, fleet, seconds=30)
    assert control.solved - few < few  # demands and mixes that were seen need no solver
    before = control.plan
    control.control(fleet[1:])
    assert control.plan is not before
    assert "edge-0" not in control.prices
    control.control([])
    assert control.plan is None
    assert control.why_not
    (quality,) = sample(1)
    assert control.allow(quality, 2.0, []).level is None


def test_a_slow_node_is_planned_for_what_it_can_do_in_time_and_does_not_slow_the_others_down():
    """The slow edge takes 1.6 s for the first level, and the deadline is 1.2 s: it may have the second one alone."""
    slow = Station("slow", "edge", {"tiny": {"large": {size: 4 * s for size, s in LARGE.items()}}}, 8, bytes_per_s=1e9)
    both, alone = controller(deadline_s=1.2), controller(deadline_s=1.2)
    for control, fleet in ((both, [*stations(), slow]), (alone, stations())):
        driven(control, 30, fleet)
    loads = both.plan.loads
    assert not any(load > 1e-9 for (level, _, name), load in loads.items() if (level, name) == (0, "slow"))
    assert both.plan.quality >= alone.plan.quality - 1e-9
    assert all(busy <= 0.95 + 1e-9 for busy in both.plan.busy.values())
    assert both.plan.shed.sum() <= alone.plan.shed.sum() + 1e-9


def test_a_node_too_slow_for_the_batch_that_suits_others_works_at_its_own():
    """Phones do most at 8 at once; the edge could do no level in time with 8 at once, and full-cloud alone."""
    from scheduler.load.planning import best_plan

    slow = {1: 0.05, 2: 0.09, 4: 0.17, 8: 0.33}  # 20 steps: 1 s alone, 6.6 s with 8 at once
    quick = dict.fromkeys((1, 2, 4, 8), 0.004)
    fleet = [
        Station("edge", "edge", {"tiny": {"large": slow}}, 8, bytes_per_s=1e9),
        Station("phone", "device", {"tiny": {"small": quick}}, 8, bytes_per_s=1e9),
    ]
    settings = LoadSettings(deadline_s=3.0)
    quality = np.array([[0.9, 0.6, 0.4]])
    plan, batch = best_plan(fleet, WORKS, quality, np.array([60.0]), settings)
    assert batch == 8  # less would leave most of this many unserved
    assert plan.busy["edge"] > 0.2
    assert plan.served[0, :2].sum() > 0.1
    assert plan.shed.sum() < 1e-6


def test_an_slo_that_nothing_keeps_is_said_in_one_line():
    control = controller(deadline_s=0.01)
    control.control(stations())
    assert control.why_not.startswith("no level keeps a deadline of 0.01 s")


def test_levels_need_qualities():
    with pytest.raises(BadRequest, match="3 levels need predicted qualities"):
        Controller(LoadSettings(deadline_s=1.0), WORKS, [[1.0, 2.0]], np.random.default_rng(0))
    with pytest.raises(BadRequest, match="no number"):
        Controller(LoadSettings(deadline_s=1.0), WORKS, [[1.0, np.nan, 0.0]], np.random.default_rng(0))
    with pytest.raises(BadRequest, match="cannot skip 20"):
        Work(WORKS[0].program, 20)


def test_expected_ends_rise_with_what_is_there_and_a_cached_start_is_sooner():
    idle, nodes = ends_s(WORKS[1], stations())
    assert nodes[0].startswith("edge")
    assert nodes[1].startswith("phone")
    assert idle == pytest.approx(8 * 0.02 + 12 * 0.004, rel=1e-3)
    assert ends_s(WORKS[1], stations(held=4, backlog_s=1.0))[0] > idle
    assert ends_s(Work(WORKS[0].program, 10), stations())[0] == pytest.approx(10 * 0.02, rel=1e-3)
    assert ends_s(WORKS[0], stations(edges=0)) == (float("inf"), ())
    assert room_s(stations(edges=1, devices=0), 2.0) == pytest.approx(2.0 * 4 * 0.02 / 0.05)


def test_prices_are_a_feature_and_shares_a_budget_only_under_pressure():
    from scheduler.features import ACTION, featurise
    from scheduler.learned import budget_of
    from scheduler.policy import Action, Context, NodeState

    nodes = {
        each.name: NodeState(name=each.name, role=each.role, curves={"tiny": dict(each.curves["tiny"])}, batch=8)
        for each in stations()
    }
    actions = [Action(WORKS[0].program, ("edge-0",)), Action(WORKS[1].program, ("edge-1", "phone-0"))]
    at_rest = Context(job="j", prompt="a red heart", nodes=nodes)
    pressed = Context(job="j", prompt="a red heart", nodes=nodes, notes={"pressed": 1.0, "price:edge-0": 0.5})
    free, priced = (featurise(context, actions) for context in (at_rest, pressed))
    column = ACTION.index("price")
    assert not free.actions[:, column].any()
    assert priced.actions[:, column].tolist() == pytest.approx([0.5 * 20 * 0.02, 0.0])
    assert (np.delete(priced.actions, column, 1) == np.delete(free.actions, column, 1)).all()
    assert (priced.context == free.context).all()
    assert budget_of(at_rest.notes) is None
    budget = budget_of({"share_full_cloud": 0.25, "share_relay": 0.5})
    assert (budget.full, budget.relay) == (0.25, 0.5)


# --- starts from cached latents ---


def with_cached(keeps=0.98, **options):
    """The levels, and full-cloud from step 15 of 20, which keeps so much."""
    works = [*WORKS, Work(WORKS[0].program, 15)]
    known = sample()
    known = np.concatenate([known, known[:, :1] * keeps], axis=1)
    return Controller(LoadSettings(deadline_s=2.0, **options), works, known, np.random.default_rng(0)), known


def under_load(control, known, per_s=40, seconds=25, spared=None, among=None):
    """The last second's allowed; `spared`: the share of K that each start at the cached level turned out to spare."""
    rng = np.random.default_rng(1)
    for _ in range(seconds):
        last = []
        for quality in known[rng.integers(len(known), size=per_s)]:
            control.arrived(quality)
            last.append(control.allow(quality, 2.0, stations(), among))
            if spared is not None and last[-1].level == 3:
                control.started(3, spared)
        control.control(stations())
    return last


def test_cached_starts_that_spare_work_are_used_and_those_that_miss_give_way_to_other_levels():
    from scheduler.load.planning import best_plan

    control, known = with_cached()
    hits = np.array([each.level for each in under_load(control, known, spared=1.0)])
    assert control.starts.rate(3) > 0.9
    assert (hits == 3).any()
    missing, _ = with_cached()
    under_load(missing, known, spared=0.0)
    assert missing.starts.rate(3) < 0.4
    asked = np.full(control.classes, 20 / control.classes)
    plans = [best_plan(stations(), each.works, each.quality, asked, each.settings)[0] for each in (control, missing)]
    shares = [plan.served[:, 3].sum() / plan.served.sum() for plan in plans]
    assert shares[0] > 0.05
    assert plans[0].quality > plans[1].quality + 0.005


def test_what_is_expected_of_a_cached_level_lies_between_a_hit_and_a_miss_and_its_clock_is_a_misss():
    from scheduler.load.expected import level_load

    cold, warm = WORKS[0], Work(WORKS[0].program, 10)
    half = Work(WORKS[0].program, 10, rate=0.5)
    fleet = stations(devices=0)
    loads = {each: level_load(each, fleet, 4).legs[0] for each in (cold, half, warm)}
    busy = [leg.busy_s["edge-0"] for leg in loads.values()]
    assert busy[1] == pytest.approx((busy[0] + busy[2]) / 2)
    assert loads[half].latency_s == loads[cold].latency_s
    assert ends_s(half, fleet)[0] == ends_s(cold, fleet)[0] > ends_s(warm, fleet)[0]
    control, _ = with_cached(keeps=0.8)
    assert control.quality[:, 3] == pytest.approx(control.quality[:, 0] * 0.9)  # nothing is known yet: every second one
    better, _ = with_cached(keeps=1.3)
    assert (better.quality[:, 3] == better.quality[:, 0]).all()  # never better than from noise
    assert better.safest_first[0] == 0


def test_without_pressure_no_start_from_the_cache_is_assigned():
    control, known = with_cached()
    assert {each.level for each in under_load(control, known, per_s=2)} == {0}


def test_a_request_that_may_not_start_from_the_cache_gets_another_level_and_counts_as_a_miss():
    control, known = with_cached()
    under_load(control, known, spared=1.0)
    before = control.starts.rate(3)
    found = under_load(control, known, seconds=20, among=[0, 1, 2])
    assert all(each.level in (0, 1, 2) and 3 not in each.levels for each in found)
    assert control.starts.rate(3) < before


def test_a_cached_level_without_its_program_from_noise_is_refused():
    with pytest.raises(BadRequest, match="from noise beside it"):
        Controller(LoadSettings(deadline_s=1.0), [Work(WORKS[0].program, 3)], [[1.0]], np.random.default_rng(0))


def test_rates_are_learned_and_forgotten():
    from scheduler.load.starts import GUESS, Starts

    starts = Starts([WORKS[0], Work(WORKS[0].program, 10)])
    assert starts.rate(1) == GUESS
    for _ in range(2000):
        starts.observe(1, 0.8)
    assert starts.rate(1) == pytest.approx(0.8, abs=0.02)
    for _ in range(2000):
        starts.observe(1, 0.2)
    assert starts.rate(1) == pytest.approx(0.2, abs=0.02)
    assert Starts(WORKS).rates() == ()


# --- admission ---


def admission(**options):
    return Admission(LoadSettings(deadline_s=2.0, **options))


def test_who_asks_alone_may_have_everything_and_a_late_one_is_told_when():
    asked = admission()
    for i in range(100):
        assert asked.admit("a", 1.0, 1.0, 2.0, 4.0, now=i / 100).admitted
        asked.taken(f"j{i}", "a", 1.0)
    verdict = asked.admit("a", 1.0, 7.0, 2.0, 4.0, now=1.0)
    assert (verdict.kind, verdict.retry_after_s) == ("late", 5.0)
    assert "cannot be done within 2 s" in verdict.reason
    for i in range(100):
        asked.ended(f"j{i}")
    assert asked.outstanding_s == 0
    for job, work in (("none", 0.0), ("some", 0.3), ("more", 0.6)):
        asked.taken(job, "a", work)
    for job in ("some", "more", "none", "never taken"):
        asked.ended(job)
    assert asked.outstanding_s == 0


def flood(asked, rates, seconds=60.0, speed=2.0, room=4.0, seed=0):
    """Tenants asking at `rates` a second each for a second of work, of which `speed` are done a second: how many were let
    in, by tenant. What was let in first ends first."""
    rng, now, count, queue, done_at = np.random.default_rng(seed), 0.0, 0, [], 0.0
    let_in, total = dict.fromkeys(rates, 0), sum(rates.values())
    names, p = list(rates), np.array(list(rates.values())) / total
    while now < seconds:
        now += rng.exponential(1 / total)
        while queue and queue[0][0] <= now:
            asked.ended(queue.pop(0)[1])
        tenant = names[rng.choice(len(names), p=p)]
        waits = max(0.0, done_at - now)
        if asked.admit(tenant, 1.0, waits + 1 / speed, room / speed, room, now).admitted:
            done_at = max(done_at, now) + 1 / speed
            asked.taken(str(count), tenant, 1.0)
            queue.append((done_at, str(count)))
            let_in[tenant] += 1
            count += 1
    return let_in


def test_a_flood_of_one_tenant_does_not_starve_another():
    let_in = flood(admission(), {"flood": 50.0, "modest": 0.5})
    assert let_in["modest"] > 0.7 * 0.5 * 60
    alone = flood(admission(), {"flood": 50.0})
    assert alone["flood"] > 0.9 * 2.0 * 60  # and alone it loses nothing


def test_shares_are_by_weight_and_higher_priorities_find_room():
    weighted = admission(tenants={"gold": TenantShare(share=3.0)})
    let_in = flood(weighted, {"gold": 20.0, "plain": 20.0}, room=16.0)
    assert 1.5 < let_in["gold"] / let_in["plain"] < 5
    ranked = admission(tenants={"first": TenantShare(priority=1)}, reserve=0.5)
    alike = flood(admission(), {"first": 1.0, "second": 30.0}, room=4.0)
    first = flood(ranked, {"first": 1.0, "second": 30.0}, room=4.0)
    assert first["first"] >= alike["first"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 3.0)), max_size=60), st.floats(1.0, 10.0))
def test_what_is_outstanding_is_bounded_while_several_ask(asks, room):
    asked = admission()
    for tenant in "abc":
        asked.admit(tenant, 0.1, 0.0, 1.0, room, 0.0)
    for i, (tenant, work) in enumerate(asks):
        if asked.admit(tenant, work, 0.0, 1.0, room, 0.0).admitted:
            asked.taken(str(i), tenant, work)
    assert asked.outstanding_s <= 2 * room + 9.0  # a first request is everybody's, however small the room
