"""The bandit: learns, says exactly what it drew with, takes no bad value in, and what it learned survives or is refused."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import vowpal_wabbit_next as vw
from worlds import ARMS, UNIFORM, Problem, actions, context, node, play, program

from relay.errors import BadRequest
from scheduler.bandit import EXPLORERS, Bandit, Logged
from scheduler.baselines import load_policy
from scheduler.features import ACTION, CONTEXT, featurise
from scheduler.policy import Replayable

OFFER = actions(ARMS)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_which_arm_suits_which_request(seed):
    value, decisions = play(Bandit(seed=seed), Problem(seed), 500)
    assert value > UNIFORM + 0.4
    assert all(decision.notes["version"].startswith("squarecb-f") for decision in decisions)


def test_it_learns_from_rewards_that_come_late_and_in_any_order():
    bandit, problem, waiting = Bandit(seed=2), Problem(2), []
    rng = np.random.default_rng(0)
    for told in problem.contexts(500):
        decision = bandit.decide(told, problem.actions)
        waiting.append((decision, problem.reward(told, decision.action)))
        if len(waiting) == 20:
            for i in rng.permutation(20):
                bandit.learn(waiting[i][0], {"reward": waiting[i][1]})
            waiting = []
    values = [problem.mean(told, bandit.decide(told, problem.actions).action) for told in problem.contexts(100)]
    assert np.mean(values) > UNIFORM + 0.4


@pytest.mark.parametrize("explore", EXPLORERS)
def test_every_exploration_gives_a_distribution_and_learns(explore):
    bandit = Bandit(explore=explore, epsilon=0.1, seed=3)
    value, decisions = play(bandit, Problem(3), 400)
    assert value > UNIFORM + 0.2
    for decision in decisions:
        assert decision.distribution is not None
        assert math.isclose(sum(decision.distribution), 1)
        assert decision.probability == decision.distribution[OFFER.index(decision.action)] > 0


def test_the_logged_probability_is_the_one_that_is_drawn_with():
    bandit, told = Bandit(seed=4), context(preference=0.0)
    play(bandit, Problem(4), 60)
    p = bandit.distribution(told, OFFER)
    drawn = Counter(str(bandit.decide(told, OFFER).action) for _ in range(4000))  # nothing is learned in between
    share = np.array([drawn[str(action)] for action in OFFER]) / 4000
    assert np.abs(share - p).max() < 4 * 0.5 / 4000**0.5
    assert p.min() > 0


def test_filled_examples_say_the_same_as_parsed_text():
    """Vowpal Wabbit's own parser, on the same numbers: predictions and what is learned from them agree."""
    bandit, problem = Bandit(seed=5, replay=0), Problem(5)
    plain = vw.Workspace(bandit.arguments)
    parser = vw.TextFormatParser(plain)

    def text(features, label=None):
        rows = ["shared |C " + " ".join(f"{n}:{v:.9g}" for n, v in zip(CONTEXT, features.context, strict=True))]
        for i, (row, names) in enumerate(zip(features.actions, features.labels, strict=True)):
            said = " ".join([*(f"{n}:{v:.9g}" for n, v in zip(ACTION, row, strict=True)), *names])
            rows.append((f"0:{label[1]:.9g}:{label[2]:.9g} " if label and label[0] == i else "") + f"|A {said}")
        return [parser.parse_line(row) for row in rows]

    for i, told in enumerate(problem.contexts(150)):
        some = OFFER[: 2 + i % 3]  # actions come and go
        features = featurise(told, some)
        expected = dict(plain.predict_one(text(features)))
        assert bandit.distribution(told, some) == pytest.approx([expected[k] for k in range(len(some))], abs=1e-4)
        decision = bandit.decide(told, some)
        reward = problem.reward(told, decision.action)
        bandit.learn(decision, {"reward": reward})
        plain.learn_one(text(features, (some.index(decision.action), -reward, decision.probability)))


def test_actions_may_change_at_every_decision():
    bandit = Bandit(seed=6)
    for count in (1, 3, 2, 40, 1):
        nodes = tuple(node(f"edge-{i}") for i in range(count))
        offer = actions([program(s=28)], edges=tuple(each.name for each in nodes))
        decision = bandit.decide(context(nodes=nodes), offer)
        assert decision.actions == count
        assert decision.action in offer
        bandit.learn(decision, {"reward": 0.1})
    assert bandit.learned == 5


def test_missing_rewards_wait_within_bounds_and_a_reward_counts_once():
    bandit = Bandit(seed=7, pending=10)
    decisions = [bandit.decide(context(f"job-{i}"), OFFER) for i in range(25)]
    assert bandit.waiting == 10
    bandit.learn(decisions[24], {"seconds": 1.0})  # no reward yet
    assert (bandit.waiting, bandit.learned) == (10, 0)
    for _ in range(2):
        bandit.learn(decisions[24], {"reward": 0.5})
    bandit.learn(decisions[0], {"reward": 0.5})  # forgotten long ago
    assert (bandit.waiting, bandit.learned) == (9, 1)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, "good"])
def test_a_reward_that_is_no_number_teaches_nothing(reward):
    bandit = Bandit(seed=8)
    decision, before = bandit.decide(context(), OFFER), bandit.distribution(context(), OFFER)
    with pytest.raises(BadRequest, match="reward"):
        bandit.learn(decision, {"reward": reward})
    assert (bandit.distribution(context(), OFFER) == before).all()
    assert bandit.waiting == 1


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"preference": math.nan}, "preference"),
        ({"notes": {"quality_relay": math.nan}}, "quality_relay"),
        ({"nodes": (node("edge-1", backlog_s=math.nan), node("phone-1"))}, "edge_backlog.*wait"),
        (
            {"nodes": (node("edge-1"), node("phone-1", bytes_per_s=math.inf, backlog_s=math.inf))},
            "device_backlog_least.*wait",
        ),
    ],
)
def test_values_that_are_no_numbers_are_refused_by_name(facts, said):
    with pytest.raises(BadRequest, match=said):
        Bandit(seed=9).decide(context(**facts), OFFER)


def test_names_that_would_break_its_language_are_refused():
    nodes = (node("edge-1"), node("phone|1"))
    with pytest.raises(BadRequest, match=r"phone\|1"):
        Bandit(seed=9).decide(context(nodes=nodes), actions(ARMS, phones=("phone|1",)))


def test_prompts_of_any_text_are_decided_on():
    bandit = Bandit(seed=10)
    for prompt in ("", "a | b", "a:1 b:nan", "x\n|C y\n\n", "0:1:0.5 |A z", "\x00\x01", "日本語 " * 500):
        decision = bandit.decide(context(prompt=prompt), OFFER)
        bandit.learn(decision, {"reward": 0.0})
        assert math.isclose(sum(decision.distribution or ()), 1)


def test_a_warm_start_is_worth_what_was_logged():
    problem, cold, warm = Problem(11), Bandit(seed=11), Bandit(seed=11)
    logger = load_policy("random", seed=11)
    rows = []
    for told in problem.contexts(400):
        decision = logger.decide(told, problem.actions)
        reward = problem.reward(told, decision.action)
        rows.append(Logged(told, problem.actions, problem.actions.index(decision.action), decision.probability, reward))
    assert warm.warm_start(iter(rows)) == warm.learned == 400
    best = [problem.mean(told, warm.decide(told, problem.actions).action) for told in problem.contexts(100)]
    first = [problem.mean(told, cold.decide(told, problem.actions).action) for told in problem.contexts(100)]
    assert np.mean(best) > np.mean(first) + 0.3
    with pytest.raises(BadRequest, match="probability"):
        warm.warm_start([rows[0]._replace(probability=0.0)])


def test_a_lesson_gone_over_again_says_more():
    told, believed = context(), []
    for replay in (0, 2, 8):
        bandit = Bandit(seed=17, replay=replay)
        bandit.warm_start([Logged(told, OFFER, 1, 0.25, 0.9)])
        assert bandit.learned == 1
        believed.append(bandit.distribution(told, OFFER).max())
    assert 0.25 < believed[0] < believed[1] < believed[2]  # how sure it is of the action that this speaks for
    with pytest.raises(BadRequest, match="replay"):
        Bandit(replay=-1)


def test_what_was_learned_survives_and_goes_on_as_if_never_stopped(tmp_path: Path):
    problem, first = Problem(12), Bandit(seed=12, replay=0)  # what it goes over again is not kept
    play(first, problem, 120)
    first.save(tmp_path / "bandit.vw")
    second = Bandit(path=tmp_path / "bandit.vw", seed=12, replay=0)
    assert second.learned == first.learned == 120
    rows = [
        Logged(told, OFFER, i % 4, 0.25, problem.reward(told, OFFER[i % 4]))
        for i, told in enumerate(problem.contexts(60))
    ]
    for bandit in (first, second):
        bandit.warm_start(rows)
    for told in problem.contexts(30):
        assert second.distribution(told, OFFER) == pytest.approx(first.distribution(told, OFFER), abs=1e-6)
    assert Bandit(path=tmp_path / "none.vw").learned == 0


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "bandit.vw"
    Bandit(seed=13).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BadRequest, match="damaged") as refusal:
        Bandit(path=path)
    assert "\n" not in str(refusal.value)
    for cut in (0, 5, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadRequest, match=r"damaged|no bandit's file"):
            Bandit(path=path)
    path.write_bytes(whole.replace(b'"learned":0', b'"learned":9'))
    with pytest.raises(BadRequest, match="damaged"):
        Bandit(path=path)
    path.write_bytes(whole.replace(b"relay-bandit 1", b"relay-bandit 7"))
    with pytest.raises(BadRequest, match="another version"):
        Bandit(path=path)
    path.write_bytes(b"\x89PNG and so on")
    with pytest.raises(BadRequest, match="no bandit's file"):
        Bandit(path=path)


def test_a_file_of_other_features_or_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "bandit.vw"
    Bandit(seed=14).save(path)
    with pytest.raises(BadRequest, match="other options"):
        Bandit(path=path, epsilon=0.5)
    with pytest.raises(BadRequest, match="other options"):
        Bandit(path=path, time_scale_s=7.0)
    monkeypatch.setattr("scheduler.bandit.VERSION", 99)
    with pytest.raises(BadRequest, match="features 1, these are 99"):
        Bandit(path=path)


def test_a_save_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "bandit.vw"
    Bandit(seed=15).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Bandit(seed=15).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "options",
    [{"explore": "luck"}, {"epsilon": 2.0}, {"settings": {"x y": 1}}, {"settings": {"gamma_scale": "1 --daemon"}},
     {"settings": {"no_such_option": 1}}, {"policies": 0}, {"colour": "red"}],
)  # fmt: skip
def test_options_it_does_not_know_are_refused(options):
    with pytest.raises(BadRequest):
        load_policy("bandit", **options)


def test_same_seed_same_decisions():
    chosen = [[str(d.action) for d in play(Bandit(seed=seed), Problem(16), 80)[1]] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert isinstance(Bandit(), Replayable)
