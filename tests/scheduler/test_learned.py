"""Router and bandit as one policy: what is logged is what was drawn with, and one goes on where the other cannot."""

import numpy as np
import pytest
from worlds import PROMPTS, actions, context, node, program

from relay.family_spec import find_family
from scheduler.bandit import Bandit
from scheduler.learned import Learned
from scheduler.router.budget import Budget
from scheduler.router.router import Router
from scheduler.router.tokens import TokenReader

NODES = tuple(node(name) for name in ("edge-1", "edge-2", "phone-1"))
TOLD = context(prompt=PROMPTS[2], nodes=NODES)
ACTIONS = actions([program(s=s) for s in (0, 8, 10, 28)], edges=("edge-1", "edge-2"))
EXPLORE = 0.3


@pytest.fixture(scope="module")
def router():
    return Router.load("mini-sd3")


def learned(router, **options):
    rng = np.random.default_rng(0)
    return Learned(Bandit(seed=0), router, budget=Budget(full=0.3, relay=0.4), explore=EXPLORE, rng=rng, **options)


def test_the_logged_probability_is_the_one_of_the_whole_draw(router):
    policy, told = learned(router), TOLD
    p = policy.distribution(told, ACTIONS)
    assert p.sum() == pytest.approx(1)
    drawn = np.zeros(len(ACTIONS))
    for _ in range(3000):
        decision = policy.decide(told, ACTIONS)
        index = ACTIONS.index(decision.action)
        assert decision.probability == pytest.approx(p[index], rel=1e-5)
        drawn[index] += 1
    assert np.abs(drawn / 3000 - p).max() < 0.03
    assert decision.actions == len(ACTIONS)


def test_the_router_picks_the_mode_and_says_so(router):
    policy, told = learned(router), TOLD
    best = router.decide(told.prompt, policy.budget).mode
    modes = []
    for _ in range(300):
        decision = policy.decide(told, ACTIONS)
        said = decision.notes["router"]
        assert said["mode"] == decision.action.program.mode
        assert said["explored"] == (said["mode"] != best)
        assert {f"quality_{m}" for m in ("full_cloud", "relay", "edge_only")} == decision.notes["features"].keys()
        modes.append(said["mode"])
    assert modes.count(best) / 300 == pytest.approx(1 - EXPLORE, abs=0.1)


def test_only_modes_that_can_be_served_are_chosen(router):
    policy = learned(router)
    relays = [action for action in ACTIONS if action.program.mode == "relay"]
    decision = policy.decide(TOLD, relays)
    assert decision.notes["router"]["probability"] == 1.0
    assert decision.action in relays


def test_the_bandit_learns_what_it_chose_and_nothing_twice(router):
    policy = learned(router)
    decision = policy.decide(TOLD, ACTIONS)
    policy.learn(decision, {"reward": 0.5})
    policy.learn(decision, {"reward": 0.5})
    assert policy.bandit.learned == 1


def test_without_a_router_the_bandit_has_all_actions():
    decision = learned(None).decide(TOLD, ACTIONS)
    assert decision.policy == "learned"
    assert decision.notes["router"] is None
    assert decision.probability == pytest.approx(1 / len(ACTIONS), rel=1e-3)


def test_a_router_that_fails_is_done_without_and_said(router):
    """Its encoder gives states of another width than the network was trained on."""
    real = TokenReader.of(find_family("mini-sd3"))
    reader = TokenReader(real.tokenizer, lambda ids: real.states(ids)[..., :-1], real.width, 77, real.digest)
    policy = learned(Router(router.trained, [reader]))
    decision = policy.decide(TOLD, ACTIONS)
    assert "RuntimeError" in decision.notes["router"]["error"]
    assert decision.notes["router"]["error"] == policy.router_error
    assert decision.probability == pytest.approx(1 / len(ACTIONS), rel=1e-3)
