"""The simulated service: times are the curve's and the links', every request ends once, and the oracle is ahead."""

import math
import random

import msgspec
import numpy as np
import pytest

from experiments.simulate.environment import Row, Run, Shift, Simulation
from experiments.simulate.events import Clock
from experiments.simulate.links import Line, Link, send
from experiments.simulate.loop import Engine, Loop, Stretch, foresee
from experiments.simulate.nodes import SimNode
from experiments.simulate.oracle import Foresight, Oracle
from experiments.simulate.scores import Scores
from experiments.simulate.stream import Asking, stream
from experiments.simulate.world import World, WorldSpec, check_world
from experiments.workloads.prompts import Prompt
from relay.batching import FADES_S, WINDOW, StepTimes
from relay.errors import BadRequest
from relay.program import Program
from scheduler.baselines import load_policy
from scheduler.links import find_link
from scheduler.policy import Decision

CURVE = {1: 0.010, 2: 0.013, 4: 0.020, 8: 0.030}
OPTIONS = "match=exact/codec=fp16"
TEXTS = (
    f"tiny/large:10:0-10/{OPTIONS}/guidance=3/conditioning=encode",
    f"tiny/large:10:0-4/small:10:4-10/{OPTIONS}/guidance=3,3/conditioning=encode",
    f"tiny/small:10:0-10/{OPTIONS}/guidance=3/conditioning=encode",
)


def world(nodes=None, **changes):
    costs = {
        "curves": {"large": CURVE, "small": {b: s / 4 for b, s in CURVE.items()}}, "encode_s": 0.004, "decode_s": 0.003,
        "handoff_s": 0.001, "latent_bytes": 40_000, "image_bytes": 100_000,
    }  # fmt: skip
    nodes = nodes or {
        "edge-1": {"role": "edge", "families": {"tiny": ["large"]}},
        "edge-2": {"role": "edge", "families": {"tiny": ["large"]}, "pace": 2},
        "phone": {"role": "device", "families": {"tiny": ["small"]}, "link": "wifi", "battery": 0.5},
    }
    spec = msgspec.convert({"nodes": nodes, "timing": {"tiny": costs}} | changes, WorldSpec)
    return World(check_world(spec, "here"), [Program.parse(text) for text in TEXTS])


def scores(prompts=12, seeds=2):
    rng = np.random.default_rng(0)
    asked = tuple(Prompt(f"prompt {i}", str(i % 4 + 1), None, f"test/{i}") for i in range(prompts))
    worth = dict(zip(TEXTS, (0.9, 0.8, 0.4), strict=True))
    cells = {
        text: {p.text: tuple({"good": float(worth[text] + 0.2 * rng.random())} for _ in range(seeds)) for p in asked}
        for text in TEXTS
    }
    return Scores(tuple(Program.parse(t) for t in TEXTS), {"test": asked}, cells, ("good",))


def reward(known):
    return known["scores"].get("good", 0.0) - known["seconds"]


def asked(count, rate, seed=0, **changes):
    asking = msgspec.convert({"arrivals": {"arrivals": "poisson", "rate_per_s": rate}} | changes, Asking)
    return stream(asking, scores(), "test", count, seed)


class Uniform:
    """What any policy may do, each as likely."""

    name = "uniform"

    def __init__(self, seed=0):
        self.rng, self.told = random.Random(seed), []

    def decide(self, context, actions):
        self.context = context
        return Decision(
            action=self.rng.choice(actions), probability=1 / len(actions), policy=self.name, actions=len(actions)
        )

    def learn(self, decision, outcome):
        self.told.append(outcome)


def node(clock, encode_s=0.0, decode_s=0.0, batch=8, pace=1.0):
    loop = Loop({("f", "m"): Engine(tuple(CURVE.items()), batch, pace)}, {"f": encode_s}, {"f": decode_s}, {"f": 0.0})
    facts = {"name": "n", "role": "edge", "curves": {}, "pace": pace}
    return SimNode("n", loop, clock, 1000, None, None, facts)


def stretch(steps, ended, prompt="p"):
    return Stretch(prompt, "f", (("m", steps),), True, True, ended.append)


@pytest.mark.parametrize("together", [1, 2, 3, 8])
def test_equal_requests_take_what_the_curve_says(together):
    """Latents that come together to a node that has encoded their prompts step together, and end together."""
    clock, ended = Clock(), []
    simulated = node(clock)
    several = [stretch(20, ended) for _ in range(together)]
    for one in several:
        one.ready = False
        clock.at(0.0, simulated.take, one)
        clock.at(1.0, simulated.bring, one)
    clock.run()
    step = StepTimes(CURVE, 8)
    assert step.choose(together, 8) == together
    assert ended == pytest.approx([1.0 + 20 * step.seconds(together)] * together)
    assert simulated.loop.image_steps == 20 * together
    assert simulated.busy_s == pytest.approx(20 * step.seconds(together))


def test_a_node_that_became_slower_says_so_once_its_steps_have_shown_it():
    clock, known = Clock(), []
    simulated = node(clock)
    simulated.set_pace(4.0)
    clock.at(0.0, simulated.take, stretch(WINDOW, []))
    ends = 4 * WINDOW * CURVE[1]
    for at in (0.0, ends / 4, ends, ends + FADES_S):
        clock.at(at, simulated.beat)
        clock.at(at, lambda: known.append(simulated.state.slower))
    clock.run()
    assert known == [1.0, 1.0, 4.0, 2.5]  # and forgets by half where it has nothing to do


def by_steps(arrivals, encode_s, decode_s, batch):
    """The loop of nodes.compute told turn by turn, with the batches of a real StepTimes: when each ends."""
    times, steps, now, ended = StepTimes(CURVE, batch), 0, 0.0, {}
    todo, waiting, walks = sorted(arrivals), [], []
    while todo or waiting or walks:
        if not waiting and not walks:
            now = max(now, todo[0][0])
        while todo and todo[0][0] <= now + 1e-12:
            waiting.append(todo.pop(0))
        if waiting:
            at, number, left = waiting.pop(0)
            now += encode_s
            walks.append([at, number, left])
            walks.sort()
        times._steps = steps
        size = times.choose(len(walks), batch)
        now, steps = now + times.seconds(size), steps + 1
        for walk in list(walks[:size]):
            walk[2] -= 1
            if not walk[2]:
                walks.remove(walk)
                now += decode_s
                ended[walk[1]] = now
    return ended


@pytest.mark.parametrize(("rate", "batch"), [(5, 8), (12, 8), (25, 8), (25, 2)])
def test_leaping_over_quiet_turns_is_walking_them(rate, batch):
    rng = random.Random(rate)
    at, arrivals = 0.0, []
    for number in range(150):
        at += rng.expovariate(rate)
        arrivals.append((at, number, rng.randint(1, 30)))
    clock, ended = Clock(), {}
    simulated = node(clock, encode_s=0.004, decode_s=0.003, batch=batch)
    for time, number, steps in arrivals:
        one = Stretch(
            f"prompt {number}", "f", (("m", steps),), True, True, lambda now, n=number: ended.update({n: now})
        )
        clock.at(time, simulated.take, one)
    clock.run()
    expected = by_steps(arrivals, 0.004, 0.003, batch)
    assert set(ended) == set(expected)
    assert [ended[n] for n in expected] == pytest.approx(list(expected.values()))


def test_a_link_takes_what_its_profile_says():
    for name in ("lan", "wifi", "lte"):
        profile = find_link(name)
        one, other = np.random.default_rng(3), np.random.default_rng(3)
        line = Line(profile, one)
        for i in range(5):  # far apart: each finds the line idle
            assert send([line], 50_000, 100.0 * i) - 100.0 * i == pytest.approx(profile.sample(50_000, other))
        assert line.expected(50_000, 1e6) - 1e6 == pytest.approx(profile.transfer_time(50_000))


def test_messages_wait_for_the_line_and_do_not_overtake():
    profile = find_link({"name": "slow", "bandwidth_bit_s": 8e5, "delay_s": 0.1, "jitter_s": 0.08})
    link = Link(profile, (0,))
    came = [send([link.up], 10_000, 0.0) for _ in range(20)]
    assert came == sorted(came)
    assert link.up.free_at == pytest.approx(20 * 0.1)
    fast = Link(find_link("lan"), (1,))
    two = send([fast.up, Link(msgspec.structs.replace(profile, jitter_s=0.0), (2,)).down], 10_000, 50.0)
    assert two - 50.0 == pytest.approx(0.1 + 0.1, rel=0.02)  # the slower one's sending, and both delays


def test_one_request_alone_takes_the_sum_of_its_stages():
    here, link = world(overhead_s=0.02), find_link("wifi")
    policy = load_policy("fixed", program=TEXTS[1])
    row = Simulation(here, scores(), reward).run(policy, asked(1, 1.0))[0]
    sent = sum(find_link("wifi").transfer_time(size) for size in (40_000, 100_000))
    compute = 0.004 + 4 * 0.010 + 0.001 + 6 * 0.0025 + 0.003
    assert row.seconds == pytest.approx(0.02 + compute + sent, abs=6 * link.jitter_s)
    assert row.action.nodes == ("edge-1", "phone")
    still = world(
        here.spec.nodes | {"phone": msgspec.structs.replace(here.spec.nodes["phone"], link=None)}, overhead_s=0.02
    )
    row = Simulation(still, scores(), reward).run(policy, asked(1, 1.0))[0]
    assert row.seconds == pytest.approx(0.02 + compute)


WINDY = {"weather": {"phone": {"factors": [1, 0.1], "mean_s": [3, 1]}}}


@pytest.mark.parametrize("changes", [{}, {"asker": "device"}, {"deadline_s": 0.3}, WINDY])
def test_every_request_ends_once_and_is_learned_once(changes):
    nodes = {
        "edge-1": {"role": "edge", "families": {"tiny": ["large"]}, "queue": 3},
        "phone": {"role": "device", "families": {"tiny": ["small", "large"]}, "link": "wifi", "queue": 4},
    }
    policy = Uniform()
    requests = asked(200, 20.0)
    shifts = [Shift(at=100, node="phone", link=0.3), Shift(at=100, node="edge-1", pace=3.0)]
    run = Run(Simulation(world(nodes, **changes), scores(), reward), policy, requests, 5, shifts)
    rows = run.rows()
    assert [row.index for row in rows] == list(range(200))
    assert len(policy.told) == 200
    assert {row.stage for row in rows} <= {"done", "failed"}
    assert all(row.scores for row in rows if row.stage == "done")
    assert any(row.attempts > 1 for row in rows)  # some were sent back by a full node
    assert any(row.stage == "failed" for row in rows) == ("deadline_s" in changes)
    for simulated in run.nodes.values():
        assert simulated.held == 0
        assert simulated.backlog_s == pytest.approx(0.0, abs=1e-6)
        assert simulated.loop.idle


def test_the_same_seed_gives_the_same_rows():
    def told(seed):
        rows = Simulation(world(), scores(), reward).run(Uniform(), asked(80, 10.0), seed)
        return [msgspec.structs.replace(row, action=None) for row in rows]

    assert told(1) == told(1)
    assert [row.seconds for row in told(1)] != [row.seconds for row in told(2)]


def test_outcomes_are_learned_after_they_are_known():
    class Watching(Uniform):
        def attach(self, run):
            self.clock, self.at = run.clock, []

        def learn(self, decision, outcome):
            super().learn(decision, outcome)
            self.at.append(self.clock.now)

    policy = Watching()
    requests = asked(50, 20.0)
    rows = Simulation(world(judge_s=0.5), scores(), reward).run(policy, requests)
    assert sorted(policy.at) == pytest.approx(sorted(row.arrival_s + row.seconds + 0.5 for row in rows))
    assert all(told["reward"] == pytest.approx(reward(told)) for told in policy.told)
    assert {str(row.action.program) for row in rows} == {told["program"] for told in policy.told}


def test_batteries_fall_with_work_or_go_by_themselves():
    levels = {"batteries": {"levels": [0.9, 0.5, 0.1], "mean_s": [1.0, 1.0, 1.0]}}
    drained = {"batteries": {"drain_per_step": 0.001}}
    seen = {}
    for name, changes in (("levels", levels), ("drained", drained)):
        for text in (TEXTS[0], TEXTS[2]):  # full-cloud, edge-only
            rows = Simulation(world(**changes), scores(), reward, keep_contexts=True).run(
                load_policy("fixed", program=text), asked(80, 4.0)
            )
            seen[name, text] = [row.context.nodes["phone"].battery for row in rows]
    assert seen["levels", TEXTS[0]] == seen["levels", TEXTS[2]]
    assert set(seen["levels", TEXTS[0]]) == {0.9, 0.5, 0.1}
    assert set(seen["drained", TEXTS[0]]) == {0.5}
    assert seen["drained", TEXTS[2]] == sorted(seen["drained", TEXTS[2]], reverse=True)
    assert seen["drained", TEXTS[2]][-1] == pytest.approx(max(0.0, 0.5 - 80 * 10 * 0.001), abs=0.06)


def test_what_is_not_judged_has_no_reward_to_learn_from():
    policy = Uniform()
    rows = Simulation(world(judged=0.5), scores(), reward).run(policy, asked(200, 20.0))
    learned = [told["reward"] for told in policy.told]
    assert 60 < sum(value is not None for value in learned) < 140
    assert all(row.reward is not None for row in rows)


def test_a_policy_may_learn_another_reward_than_it_is_judged_by():
    policy = Uniform()
    rows = Simulation(world(), scores(), reward, told=lambda known: 7.0).run(policy, asked(20, 5.0))
    assert {told["reward"] for told in policy.told} == {7.0}
    assert all(row.reward < 1 for row in rows)


def test_policies_see_quality_as_0_and_speed_as_1():
    policy = Uniform()
    rows = Simulation(world(), scores(), reward, keep_contexts=True).run(
        policy, asked(5, 1.0, demands={"preference": [0.9, 1.0]})
    )
    assert all(row.context.preference >= 0.9 for row in rows)
    node = rows[-1].context.nodes["phone"]
    assert node.battery == 0.5
    assert node.bytes_per_s == pytest.approx(find_link("wifi").bandwidth_bit_s / 8, rel=0.5)


class _Checks(Uniform):
    """What an oracle foresees of the action that is then taken."""

    def attach(self, run):
        self.run, self.foreseen = run, []

    def decide(self, context, actions):
        decision = super().decide(context, actions)
        self.foreseen.append(Foresight(self.run, context).seconds(self.run.world.placed(decision.action)))
        return decision


@pytest.mark.parametrize("rate", [0.5, 4.0])
def test_foresight_is_what_happens_if_nobody_else_comes(rate):
    nodes = {
        "edge-1": {"role": "edge", "families": {"tiny": ["large"]}},
        "phone": {"role": "device", "families": {"tiny": ["small"]}, "link": {"like": "lte", "jitter_s": 0}},
    }
    policy, requests = _Checks(), asked(60, rate)
    rows = Simulation(world(nodes), scores(), reward).run(policy, requests)
    alone = [
        i for i, row in enumerate(rows)
        if all(other.arrival_s >= row.arrival_s + row.seconds or other.arrival_s + other.seconds <= row.arrival_s
               for other in rows if other is not row)
    ]  # fmt: skip
    assert len(alone) > 5
    assert [policy.foreseen[i] for i in alone] == pytest.approx([rows[i].seconds for i in alone])


def test_foresight_counts_those_who_are_there():
    loop = Loop({("f", "m"): Engine(tuple(CURVE.items()), 8, 1.0)}, {"f": 0.0}, {"f": 0.0}, {"f": 0.0})
    alone = foresee(loop.copy(), 0.0, stretch(20, []), 0.0)
    for _ in range(7):
        loop.take(stretch(20, []))
    for _ in range(7):
        loop.turn(0.0)
    assert alone == pytest.approx(0.2)
    assert foresee(loop.copy(), 0.0, stretch(20, []), 0.0) > 2 * alone
    assert foresee(loop.copy(), 0.0, stretch(20, []), 10.0) == pytest.approx(10.2)


def test_the_oracle_is_ahead_of_every_policy():
    """Where time is dear, so that the best program is another one from prompt to prompt and from queue to queue."""
    simulation = Simulation(world(), scores(seeds=2), lambda known: known["scores"]["good"] - 3 * known["seconds"])

    def mean(policy):
        return np.mean([
            row.reward for seed in range(2) for row in simulation.run(policy, asked(200, 2.0, seed=seed), seed)
        ])  # fmt: skip

    best = mean(Oracle())
    fixed = [load_policy("fixed", program=text) for text in TEXTS]
    for policy in (
        Oracle(knows="class"),
        *fixed,
        load_policy("round-robin"),
        load_policy("least-finish-time"),
        Uniform(),
    ):
        assert best > mean(policy), policy.name


def test_a_slower_node_and_a_slower_link_are_slower():
    policy, requests = load_policy("fixed", program=TEXTS[1]), asked(60, 0.2)
    nodes = {
        "edge-1": {"role": "edge", "families": {"tiny": ["large"]}},
        "phone": {"role": "device", "families": {"tiny": ["small"]}, "link": {"like": "lte", "jitter_s": 0}},
    }
    plain = Simulation(world(nodes), scores(), reward).run(policy, requests)
    for shift, more in (
        (Shift(at=30, node="edge-1", pace=3.0), 2 * 4 * 0.010),
        (Shift(at=30, node="phone", link=0.5), find_link("lte").transfer_time(140_000) + find_link("lte").delay_s),
    ):
        rows = Simulation(world(nodes), scores(), reward).run(policy, requests, 0, [shift])
        longer = [b.seconds - a.seconds for a, b in zip(plain, rows, strict=True)]
        assert longer[:30] == pytest.approx([0.0] * 30)
        assert np.median(longer[31:]) == pytest.approx(more, rel=0.05)


def test_weather_does_not_mend_a_link_that_a_shift_broke():
    requests = asked(200, 4.0)
    seen = {}
    for broken in (False, True):
        shifts = [Shift(at=0, node="phone", link=0.01)] if broken else []
        run = Run(Simulation(world(**WINDY), scores(), reward), Uniform(), requests, 0, shifts)
        run.rows()
        seen[broken] = run.nodes["phone"].link.up.profile.bandwidth_bit_s
    assert seen[True] == pytest.approx(0.01 * seen[False])  # the same weather, whatever the links


def test_scores_are_those_of_a_prompt_and_seed_or_means_of_its_class():
    here = scores(seeds=3)
    assert [here.cell(TEXTS[0], "prompt 3", drawn) for drawn in (0, 1, 2, 3)] == [
        *here.of(TEXTS[0], "prompt 3"), here.of(TEXTS[0], "prompt 3")[0]
    ]  # fmt: skip
    alike = [
        here.cell(TEXTS[0], p.text, s)["good"] for p in here.prompts["test"] if p.complexity == "2" for s in range(3)
    ]
    assert here.of_class(TEXTS[0], "prompt 1")["good"] == pytest.approx(np.mean(alike))


def test_a_mix_of_prompts_that_changes():
    asking = msgspec.convert({"arrivals": {"arrivals": "poisson", "rate_per_s": 2.0}}, Asking)
    plain = stream(asking, scores(), "test", 60, 3)
    mixed = stream(asking, scores(), "test", 60, 3, then=(30, ("4",)))
    assert mixed[:30] == plain[:30]
    assert [r.arrival_s for r in mixed] == [r.arrival_s for r in plain]
    assert {r.prompt.complexity for r in mixed[30:]} == {"4"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weather": {"edge-1": {"factors": [1, 2], "mean_s": [1, 1]}}}, "edge-1 is no node with a link"),
        ({"nodes": {"edge-1": {"role": "edge", "families": {"other": ["large"]}}}}, "no step times of other"),
        ({"nodes": {"edge-1": {"role": "edge", "families": {"tiny": ["large"]}}}, "asker": "device"}, "needs a device"),
    ],
)
def test_a_world_that_cannot_be_is_refused(changes, said):
    with pytest.raises(BadRequest, match=said):
        world(**changes)


def test_prompts_that_are_not_there_are_refused():
    with pytest.raises(BadRequest, match="0 train prompts"):
        stream(Asking(arrivals={"arrivals": "poisson", "rate_per_s": 1.0}), scores(), "train", 10, 0)


def test_rows_are_numbers():
    rows = Simulation(world(), scores(), reward).run(Uniform(), asked(20, 5.0))
    assert isinstance(rows[0], Row)
    assert all(math.isfinite(row.reward) and row.seconds > 0 and 0 < row.probability <= 1 for row in rows)
