"""The policies that the bandit is compared with: each as its source says, each sure of its probabilities, learners learn."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from worlds import ARMS, UNIFORM, Problem, actions, context, node, play, program

from relay.errors import BadRequest
from scheduler.baselines import NAMES, load_policy
from scheduler.baselines.linucb import LinUCB
from scheduler.baselines.thompson import chances
from scheduler.features import rise_context
from scheduler.finish_time import finish_time
from scheduler.policy import Policy, Replayable

OFFER = actions(ARMS)
WIDE = actions(ARMS, ("edge-1", "edge-2"), ("phone-1", "phone-2"))
NODES = (
    node("edge-1", backlog_s=2.0), node("edge-2"), node("phone-1", backlog_s=1.0), node("phone-2", bytes_per_s=1e5)
)  # fmt: skip
LEARNERS = ("linucb", "thompson", "ppo", "sac")
DRAWING = ("random", *LEARNERS, "bandit")


def make(name: str, **options: Any) -> Any:
    if name == "ppo":
        pytest.importorskip("stable_baselines3")
    return load_policy(name, **({"seed": 0} if name in DRAWING else {}) | options)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_says_the_probability_it_chose_with(name: str):
    policy, told = make(name), context(nodes=NODES)
    assert isinstance(policy, Policy)
    assert isinstance(policy, Replayable)
    for i in range(30):
        p = np.asarray(policy.distribution(told, WIDE))
        decision = policy.decide(told, WIDE)
        assert decision.policy == policy.name == name
        assert decision.actions == len(WIDE)
        assert p.sum() == pytest.approx(1)
        assert p.min() >= 0
        assert decision.probability == pytest.approx(p[WIDE.index(decision.action)], abs=1e-6)
        assert decision.probability > 0
        assert decision.distribution == pytest.approx(tuple(p), abs=1e-6)
        policy.learn(decision, {"reward": (-1) ** i * 0.3})


def test_names_of_decisions_are_their_own():
    made = [make(name).decide(context(nodes=NODES), WIDE).id for name in NAMES for _ in range(3)]
    assert len(set(made)) == len(made)
    assert all(made)


@pytest.mark.parametrize("name", DRAWING)
def test_draws_follow_the_distribution_that_is_logged(name: str):
    policy, told = make(name, **({"least_pulls": 0} if name == "linucb" else {})), context(preference=1.0)
    play(policy, Problem(1), 60)
    if name == "linucb":  # its counts move with every draw: hold them
        policy.decay = policy.temperature_decay = 1.0
        policy.beta = 0.0
    p = np.asarray(policy.distribution(told, OFFER))
    drawn = Counter(str(policy.decide(told, OFFER).action) for _ in range(1500))
    shares = np.array([drawn[str(action)] for action in OFFER]) / 1500
    assert np.abs(shares - p).max() < 4 * 0.5 / 1500**0.5


@pytest.mark.parametrize(("name", "count"), [("linucb", 500), ("thompson", 400), ("ppo", 700), ("sac", 500)])
def test_learners_do_far_better_than_chance(name: str, count: int):
    value, _ = play(make(name, seed=3), Problem(3), count, late=5)
    assert value > UNIFORM + 0.25, value


def test_chance_earns_what_chance_earns():
    value, _ = play(make("random"), Problem(2), 600)
    assert value == pytest.approx(UNIFORM, abs=0.1)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_reward_counts_once_and_a_wrong_one_never(name: str):
    policy, told = make(name), context()
    decision = policy.decide(told, OFFER)
    for bad in (math.nan, math.inf):
        with pytest.raises(BadRequest, match="reward"):
            policy.learn(decision, {"reward": bad})
    before = list(policy.distribution(told, OFFER))
    policy.learn(decision, {"stage": "done"})  # no reward yet
    assert list(policy.distribution(told, OFFER)) == before
    assert len(policy._pending) == 1
    policy.learn(decision, {"reward": 0.5})
    assert len(policy._pending) == 0
    once = list(policy.distribution(told, OFFER))
    policy.learn(decision, {"reward": 0.5})
    assert list(policy.distribution(told, OFFER)) == once


@pytest.mark.parametrize("name", DRAWING)
def test_same_seed_same_decisions_whatever_others_draw(name: str):
    import torch

    chosen = []
    for disturb in (False, True):
        policy, problem = make(name, seed=7), Problem(7)
        run = []
        for told in problem.contexts(70):
            if disturb:
                torch.rand(3)
                np.random.rand(2)
            decision = policy.decide(told, OFFER)
            policy.learn(decision, {"reward": problem.reward(told, decision.action)})
            run.append(str(decision.action))
        chosen.append(run)
    assert chosen[0] == chosen[1]


# --- those that do not learn ---


def test_fixed_takes_its_program_on_the_soonest_nodes():
    told = context(nodes=NODES)
    chosen = make("fixed", program=str(ARMS[1])).decide(told, WIDE).action
    assert chosen.program == ARMS[1]
    assert chosen == min((a for a in WIDE if a.program == ARMS[1]), key=lambda a: finish_time(told, a))
    with pytest.raises(BadRequest, match="not on offer"):
        make("fixed", program=str(program(s=5))).decide(told, WIDE)


def test_greedy_keeps_its_step_and_takes_the_soonest():
    told = context(nodes=NODES)
    for handoff, step in ((0.36, 10), (0.0, 0), (1.0, 28), (0.55, 10)):
        chosen = make("greedy", handoff=handoff).decide(told, WIDE).action
        assert chosen.program.steps["large"] == step
        same = [a for a in WIDE if a.program.steps["large"] == step]
        assert finish_time(told, chosen) == pytest.approx(min(finish_time(told, a) for a in same))
    with pytest.raises(BadRequest, match="share of T"):
        make("greedy", handoff=15)


def test_round_robin_takes_each_in_turn():
    policy = make("round-robin")
    first = [policy.decide(context(nodes=NODES), WIDE).action for _ in WIDE]
    assert first == WIDE
    assert policy.decide(context(nodes=NODES), WIDE).action == WIDE[0]


# --- RISE's ---


def test_linucb_scores_are_the_papers():
    """Against the formula written out, with A inverted as a matrix, after a history of pulls."""
    policy = LinUCB(
        alpha=0.7, beta=0.3, temperature=0.5, decay=0.99, temperature_decay=1.0, least_pulls=1, ridge=2.0, seed=0
    )
    problem, history = Problem(4), []
    for told in problem.contexts(40):
        decision = policy.decide(told, OFFER)
        reward = problem.reward(told, decision.action)
        policy.learn(decision, {"reward": reward})
        history.append((str(decision.action.program), rise_context(told), reward))
    told = context(preference=0.3)
    c, n = rise_context(told), len(history)
    scores = []
    for arm in map(str, ARMS):
        mine = [(x, r) for name, x, r in history if name == arm]
        a = 2.0 * np.eye(8) + sum(np.outer(x, x) for x, _ in mine)
        theta = np.linalg.solve(a, sum(r * x for x, r in mine))
        fading = 0.99**n
        bonus = 0.7 * fading * math.sqrt(c @ np.linalg.inv(a) @ c)
        scores.append(theta @ c + bonus + 0.3 * fading * math.sqrt(math.log(n + 1) / (1 + len(mine))))
    powers = np.exp(np.array(scores) / 0.5)
    assert policy.distribution(told, OFFER) == pytest.approx(powers / powers.sum(), rel=1e-6)


def test_linucb_pulls_every_arm_first():
    policy = LinUCB(least_pulls=3, seed=1)
    decisions = [policy.decide(context(f"job-{i}"), OFFER) for i in range(13)]
    assert Counter(str(d.action.program) for d in decisions[:12]) == {str(arm): 3 for arm in ARMS}
    assert [bool(d.notes.get("forced")) for d in decisions] == [True] * 12 + [False]
    assert decisions[0].probability == 0.25
    free = LinUCB(least_pulls=0, seed=1)
    assert not any(free.decide(context(), OFFER).notes.get("forced") for _ in range(5))


def test_linucb_without_context_sees_none():
    policy, problem = LinUCB(context="none", seed=2), Problem(5)
    play(policy, problem, 300)
    one, other = (policy.distribution(context(preference=p), OFFER) for p in (0.0, 1.0))
    assert list(one) == list(other)


def test_linucb_grows_less_curious():
    policy = LinUCB(least_pulls=0, temperature=1.0, temperature_decay=0.9, least_temperature=0.05, seed=3)
    _, decisions = play(policy, Problem(6), 200)
    entropy = [-sum(p * math.log(p) for p in d.distribution or () if p) for d in decisions]
    assert np.mean(entropy[-20:]) < np.mean(entropy[:20]) - 0.5


@pytest.mark.parametrize("name", LEARNERS)
def test_arms_that_come_and_go_are_masked(name: str):
    policy, told = make(name), context(nodes=NODES)
    for count in (4, 2, 3, 1, 4):
        offer = [a for a in WIDE if a.program in ARMS[:count]]
        decision = policy.decide(told, offer)
        assert decision.action in offer
        same = [a for a in offer if a.program == decision.action.program]
        assert finish_time(told, decision.action) == pytest.approx(min(finish_time(told, a) for a in same))
        policy.learn(decision, {"reward": 0.1})


# --- Thompson ---


def test_thompsons_chances_are_those_of_sampling():
    rng = np.random.default_rng(0)
    for mean, spread in (([0.0, 0.3, -0.2], [0.5, 0.1, 1.0]), ([0.1, 0.1], [0.2, 0.2]), ([1.0, 0.0], [0.01, 0.01])):
        samples = rng.normal(mean, spread, size=(200_000, len(mean))).argmax(1)
        expected = np.bincount(samples, minlength=len(mean)) / 200_000
        assert chances(np.array(mean), np.array(spread)) == pytest.approx(expected, abs=0.01)


def test_thompson_that_forgets_follows_a_change():
    def after_change(forget: float) -> float:
        policy = make("thompson", forget=forget, context="none", seed=1)
        for best, count in ((0, 250), (1, 60)):
            for i in range(count):
                decision = policy.decide(context(f"{best}-{i}"), OFFER)
                policy.learn(decision, {"reward": 0.5 if decision.action.program == ARMS[best] else 0.0})
        return float(policy.distribution(context(), OFFER)[1])

    assert after_change(0.95) > 0.8 > after_change(1.0)


# --- PPO and SAC ---


def test_ppo_trains_once_a_roll_out_of_at_most_128():
    policy, problem = make("ppo", steps=16), Problem(8)
    for i, told in enumerate(problem.contexts(50)):
        decision = policy.decide(told, OFFER)
        policy.learn(decision, {"reward": problem.reward(told, decision.action)})
        assert policy.updates == (i + 1) // 16
    for steps in (1, 129):
        with pytest.raises(BadRequest, match="2 to 128"):
            make("ppo", steps=steps)


def test_ppo_without_its_package_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "scheduler.baselines.ppo_network", raising=False)
    with pytest.raises(BadRequest, match=r"relay-inference\[rl\]"):
        load_policy("ppo")


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_more_programs_than_places_are_refused(name: str):
    with pytest.raises(BadRequest, match="option `arms`"):
        make(name, arms=3).decide(context(), OFFER)


@pytest.mark.parametrize(
    ("name", "options"),
    [("luck", {}), ("linucb", {"ridge": 0}), ("linucb", {"decay": 1.5}), ("linucb", {"context": "stars"}),
     ("thompson", {"forget": 0}), ("sac", {"entropy": 1.0}), ("fixed", {"colour": "red"}), ("random", {"program": "x"})],
)  # fmt: skip
def test_what_no_policy_knows_is_refused(name: str, options: dict[str, Any]):
    with pytest.raises(BadRequest):
        load_policy(name, **options)


def test_places_of_tables_do_not_hang_on_the_order_of_actions():
    """Actions in another order are the same actions: probabilities follow them."""
    policy, problem = make("bandit"), Problem(9)
    play(policy, problem, 80)
    told = context()
    by_action = {}
    for order in itertools.islice(itertools.permutations(OFFER), 5):
        for action, p in zip(order, policy.distribution(told, list(order)), strict=True):
            by_action.setdefault(str(action), []).append(p)
    for values in by_action.values():
        assert values == pytest.approx([values[0]] * 5, abs=1e-6)
