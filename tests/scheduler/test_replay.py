"""Off-policy evaluation: its intervals cover the truth, and where a log says too little it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import ARMS, Problem, actions, context, program

from relay.errors import BadRequest, RelayError
from scheduler.baselines import load_policy
from scheduler.decision_log import DecisionLog, Entry, read_log
from scheduler.drawing import draw
from scheduler.replay import Weighted, bootstrap, cross_fit, effective_size, estimate, replay

OFFER = actions(ARMS)


# --- estimators, on synthetic logs with exogenous contexts ---

SHAPE = np.random.default_rng(99).normal(size=(4, 3))  # of the true reward: 4 actions x 3 features


def _mean(x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ SHAPE.T)  # (n, 4): no linear model fits it


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _logged_by(x: np.ndarray) -> np.ndarray:
    return 0.5 * _softmax(x @ SHAPE[::-1].T) + 0.5 / 4


def _wanted(x: np.ndarray) -> np.ndarray:
    return _softmax(2 * x @ SHAPE.T)


def _synthetic(rng: np.random.Generator, count: int) -> Weighted:
    x = rng.normal(size=(count, 3))
    p, pi = _logged_by(x), _wanted(x)
    a = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    rows = np.arange(count)
    reward = _mean(x)[rows, a] + 0.3 * rng.normal(size=count)
    design = np.zeros((count, 4, 1 + 4 * 4))  # a constant, and x with a constant for each action
    design[:, :, 0] = 1.0
    for k in range(4):
        design[:, k, 1 + 4 * k : 5 + 4 * k] = np.column_stack([np.ones(count), x])
    logged, expected = np.empty(count), np.empty(count)
    for part, weights in cross_fit(design[rows, a], reward):
        values = design[part] @ weights
        logged[part], expected[part] = values[np.arange(len(part)), a[part]], (values * pi[part]).sum(1)
    return Weighted(reward, pi[rows, a] / p[rows, a], logged, expected)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    many = rng.normal(size=(1_000_000, 3))
    truth = float((_mean(many) * _wanted(many)).sum(1).mean())
    hits, widths, values = np.zeros(3), np.zeros(3), []
    for _ in range(400):
        found = estimate(_synthetic(rng, 350))
        hits += [each.low <= truth <= each.high for each in found]
        widths += [each.high - each.low for each in found]
        values.append([each.value for each in found])
    # 95 % of 400 replications, give or take 3 binomial standard errors; logs of this size (effective 75) fall 1 % short
    assert np.all(np.abs(hits / 400 - 0.945) < 3 * 0.0114), hits / 400
    error = np.abs(np.mean(values, 0) - truth) / (np.std(values, 0) / 400**0.5)
    assert np.all(error < 4), error  # unbiased
    assert widths[2] < widths[0]  # the reward model makes DR the narrower one


def test_bootstrap_intervals_cover_too():
    rng = np.random.default_rng(6)
    many = rng.normal(size=(500_000, 3))
    truth = float((_mean(many) * _wanted(many)).sum(1).mean())
    hits = np.zeros(3)
    for i in range(200):
        hits += [each.low <= truth <= each.high for each in bootstrap(_synthetic(rng, 350), draws=200, seed=i)]
    assert np.all(hits / 200 > 0.945 - 3 * 0.0161), hits / 200


def test_a_log_of_the_policy_itself_gives_its_mean():
    rng = np.random.default_rng(7)
    rows = _synthetic(rng, 300)._replace(weight=np.ones(300))
    ips, snips, _ = estimate(rows)
    assert ips.value == pytest.approx(rows.reward.mean())
    assert snips.value == pytest.approx(rows.reward.mean())
    half = 1.96 * rows.reward.std(ddof=1) / 300**0.5
    assert ips.high - ips.value == pytest.approx(half, rel=1e-3)


def test_effective_size_is_that_of_equal_weights():
    assert effective_size(np.ones(80)) == pytest.approx(80)
    assert effective_size(np.array([1.0] * 40 + [0.0] * 40)) == pytest.approx(40)
    assert effective_size(np.array([1000.0] + [0.001] * 79)) == pytest.approx(1, abs=0.01)
    assert effective_size(np.zeros(5)) == 0


# --- logs, as the gateway writes them ---


def _fill(path: Path, count: int, seed: int = 0, logger: str = "random", **options: Any) -> Problem:
    if logger == "random":  # an interval misses one time in twenty: not another time at each run
        options = {"seed": 4} | options
    problem, policy = Problem(seed), load_policy(logger, **options)
    log = DecisionLog(path)
    for told in problem.contexts(count):
        decision = policy.decide(told, problem.actions)
        assert log.write(told, problem.actions, decision)
        assert log.outcome(decision.id, stage="done", reward=problem.reward(told, decision.action))
    log.close()
    return problem


def _truth(policy: Any, seed: int = 1000) -> float:
    problem = Problem(seed)
    values = [
        float(np.dot(policy.distribution(told, OFFER), [problem.mean(told, each) for each in OFFER]))
        for told in problem.contexts(600)
    ]
    return float(np.mean(values))


@pytest.mark.parametrize("interval", ["normal", "bootstrap"])
def test_a_random_log_tells_what_other_policies_would_have_earned(tmp_path: Path, interval: str):
    _fill(tmp_path / "log.db", 400, seed=3)
    entries = list(read_log(tmp_path / "log.db"))
    for policy in (
        load_policy("greedy", handoff=0.36),
        load_policy("fixed", program=str(ARMS[2])),
        load_policy("random"),
    ):
        found, truth = replay(entries, policy, interval=interval), _truth(policy)
        assert found.rows == 400
        assert found.support == pytest.approx(1)
        for each in (found.ips, found.snips, found.dr):
            assert each.low - 0.03 < truth < each.high + 0.03
            assert each.low < each.value < each.high
        assert found.dr.high - found.dr.low < found.ips.high - found.ips.low + 1e-9
    assert found.effective == pytest.approx(400)


def test_a_learned_policy_is_told_from_the_random_one(tmp_path: Path):
    _fill(tmp_path / "log.db", 500, seed=4)
    entries = list(read_log(tmp_path / "log.db"))
    bandit: Any = load_policy("bandit", seed=1)
    half = entries[:250]
    bandit.warm_start([_as_logged(each) for each in half])
    found = replay(entries[250:], bandit)
    assert found.dr.low > found.logged.high


def _as_logged(entry: Entry) -> Any:
    from scheduler.bandit import Logged

    assert entry.reward is not None
    return Logged(entry.context, entry.actions, entry.chosen, entry.probability, entry.reward)


def test_too_little_is_refused(tmp_path: Path):
    _fill(tmp_path / "log.db", 60, seed=5)
    entries = list(read_log(tmp_path / "log.db"))
    with pytest.raises(BadRequest, match="effective sample size"):
        replay(entries, load_policy("fixed", program=str(ARMS[0])))  # a quarter of 60 decisions
    assert replay(entries, load_policy("fixed", program=str(ARMS[0])), least_ess=5).rows == 60
    with pytest.raises(BadRequest, match="2 decisions with a reward"):
        replay(entries[:2], load_policy("random"))


def test_a_log_without_chance_supports_only_what_it_did(tmp_path: Path):
    _fill(tmp_path / "log.db", 120, seed=6, logger="greedy", handoff=0.36)
    entries = list(read_log(tmp_path / "log.db"))
    with pytest.raises(BadRequest, match="support 25%"):
        replay(entries, load_policy("random"))
    assert replay(entries, load_policy("greedy", handoff=0.36)).support == 1
    blind = [_without_distribution(each) for each in entries]
    with pytest.raises(BadRequest, match="support"):  # told from the weights' mean alone
        replay(blind, load_policy("random"))


def _without_distribution(entry: Entry) -> Entry:
    import msgspec

    return msgspec.structs.replace(entry, distribution=None)


def test_pinned_and_fallback_decisions_and_missing_rewards_are_left_out_and_counted(tmp_path: Path):
    problem, policy, log = Problem(7), load_policy("random", seed=7), DecisionLog(tmp_path / "log.db")
    for i, told in enumerate(problem.contexts(400)):
        decision = policy.decide(told, problem.actions)
        marks = {0: ("pinned",), 1: ("fallback",)}.get(i % 10, ())
        log.write(told, problem.actions, decision, marks=marks)
        if i % 10 != 2:
            log.outcome(decision.id, reward=-1.0 if marks else problem.reward(told, decision.action))
    found = replay(log.entries(), load_policy("random"))
    assert found.left_out == {"pinned": 40, "fallback": 40, "without a reward": 40}
    assert found.rows == 280
    assert found.logged.value > -0.5  # the pinned ones' -1 is not in it


def test_router_times_bandit_is_what_is_divided_by(tmp_path: Path):
    """A router that takes either half of the actions with probability 1/2, and chance within: each has 1/2 x 1/2."""
    problem, rng, log = Problem(8), np.random.default_rng(8), DecisionLog(tmp_path / "log.db")
    for told in problem.contexts(400):
        half = OFFER[:2] if rng.random() < 0.5 else OFFER[2:]
        _, decision = draw("two-steps", half, [0.5, 0.5], rng)
        log.write(told, OFFER, _spread(decision), probability=0.5 * decision.probability)
        log.outcome(decision.id, reward=problem.reward(told, decision.action))
    found = replay(log.entries(), load_policy("random"))
    assert found.weight_mean == pytest.approx(1.0)
    assert found.support == pytest.approx(1.0)


def _spread(decision: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(decision, distribution=(0.25,) * 4)


def test_policies_that_cannot_say_their_chances_are_refused():
    class Silent:
        name = "silent"

        def decide(self, context: Any, actions: Any) -> Any: ...

        def learn(self, decision: Any, outcome: Any) -> None: ...

    with pytest.raises(BadRequest, match="cannot say its probabilities"):
        replay([], Silent())


# --- the command ---


def _run(*words: str) -> int:
    from typer.testing import CliRunner

    from nodes.cli import app

    result = CliRunner().invoke(app, ["replay", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    _run.said = result.stdout  # type: ignore[attr-defined]
    return result.exit_code


def test_the_command_says_it_for_people_and_programs(tmp_path: Path):
    log = tmp_path / "log.db"
    _fill(log, 300, seed=9)
    assert _run(str(log), "--policy", "greedy", "--option", "handoff=0.36", "--json") == 0
    told = json.loads(_run.said)  # type: ignore[attr-defined]
    assert told["policy"] == "greedy"
    assert told["rows"] == 300
    assert told["dr"]["low"] < told["dr"]["value"] < told["dr"]["high"]
    assert _run(str(log), "--policy", "random") == 0
    said = _run.said  # type: ignore[attr-defined]
    assert "effective sample size" in said
    assert "300 of 300" in said
    assert _run(str(log), "--export", str(tmp_path / "log.dsjson")) == 0
    assert len((tmp_path / "log.dsjson").read_text().splitlines()) == 300


@pytest.mark.parametrize(
    "words",
    [["--policy", "luck"], ["--policy", "fixed", "--option", "x"], ["--policy", "fixed", "--option", "program=none"],
     ["--policy", "random", "--interval", "wide"], []],
)  # fmt: skip
def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, words: list[str]):
    _fill(tmp_path / "log.db", 30)
    with pytest.raises(BadRequest):
        _run(str(tmp_path / "log.db"), *words)
    with pytest.raises(RelayError, match="no such file"):
        _run(str(tmp_path / "none.db"), "--policy", "random")


def test_programs_and_contexts_of_the_log_are_those_of_the_decision(tmp_path: Path):
    log = DecisionLog(tmp_path / "log.db")
    told = context(prompt='the word "CAT"', preference=0.25, deadline_s=12.0, notes={"quality_relay": 0.5}, attempt=2)
    offer = actions([program(s=8, small=6), program(s=28)])
    decision = load_policy("random", seed=1).decide(told, offer)
    log.write(told, offer, decision)
    (entry,) = read_log(tmp_path / "log.db")
    assert list(entry.actions) == offer
    assert entry.context.nodes == told.nodes
    assert (entry.context.preference, entry.context.deadline_s, entry.context.attempt) == (0.25, 12.0, 2)
    assert entry.context.latent_bytes == told.latent_bytes
    for policy in (load_policy("bandit", seed=1), load_policy("linucb", least_pulls=0), load_policy("greedy")):
        assert list(policy.distribution(entry.context, entry.actions)) == pytest.approx(
            list(policy.distribution(told, offer))
        )  # type: ignore[attr-defined]
