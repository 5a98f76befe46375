"""The decision log: whole decisions before they are acted on, no text that was not asked for, bounded, and no disk stops it."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import vowpal_wabbit_next as vw
from worlds import ARMS, PROMPTS, Problem, actions, context, node, program

from relay.errors import BadRequest, RelayError
from scheduler.bandit import Bandit, Logged
from scheduler.baselines import load_policy
from scheduler.decision_export import as_dsjson, export
from scheduler.decision_log import DecisionLog, read_log
from scheduler.features import ACTION, CONTEXT, PROMPT
from scheduler.policy import Decision

OFFER = actions(ARMS)


def _decide(log: DecisionLog, count: int = 1, **facts: Any) -> list[Decision]:
    policy, made = load_policy("random", seed=0), []
    for i in range(count):
        told = context(f"job-{i}", **facts)
        made.append(policy.decide(told, OFFER))
        assert log.write(told, OFFER, made[-1])
    return made


def test_a_decision_comes_back_as_it_was_made(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.db")
    told = context(
        "job-7", PROMPTS[1], nodes=(node("edge-1", backlog_s=0.4), node("phone-1", battery=0.3)), preference=0.25
    )
    bandit = Bandit(seed=0)
    decision = bandit.decide(told, OFFER)
    assert log.write(told, OFFER, decision, marks=("degraded",), router="r3", bandit=bandit.version)
    (entry,) = log.entries()
    assert (entry.id, entry.policy, entry.router, entry.bandit) == (decision.id, "bandit", "r3", bandit.version)
    assert list(entry.actions) == OFFER
    assert entry.actions[entry.chosen] == decision.action
    assert (entry.probability, entry.distribution) == (decision.probability, decision.distribution)
    assert entry.context.nodes == told.nodes
    assert (entry.context.job, entry.context.preference) == ("job-7", 0.25)
    assert entry.marks == ("degraded",)
    assert (entry.reward, entry.terms, entry.stage) == (None, {}, None)
    assert list(bandit.distribution(entry.context, entry.actions)) == pytest.approx(list(decision.distribution or ()))


def test_outcomes_are_added_as_they_come(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.db")
    first, second = _decide(log, 2)
    assert log.outcome(first.id, stage="done", seconds=0.5, terms={"scene": 0.9}, missing=("clip_own",))
    assert log.outcome(first.id, terms={"user_rating": 4.0}, reward=0.3)
    assert log.outcome(second.id, stage="failed", error="no node could", reward=-1.0)
    assert not log.outcome("unheard-of", reward=0.0)
    one, two = log.entries()
    assert one.terms == {"scene": 0.9, "user_rating": 4.0}
    assert (one.stage, one.seconds, one.reward, one.missing) == ("done", 0.5, 0.3, ("clip_own",))
    assert (two.stage, two.error, two.reward) == ("failed", "no node could", -1.0)


@pytest.mark.parametrize("told", [{"reward": math.nan}, {"seconds": math.inf}, {"terms": {"scene": math.nan}}])
def test_numbers_that_are_none_are_refused(tmp_path: Path, told: dict[str, Any]):
    log = DecisionLog(tmp_path / "decisions.db")
    (decision,) = _decide(log)
    with pytest.raises(BadRequest, match="leave out"):
        log.outcome(decision.id, **told)
    assert next(log.entries()).reward is None


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, math.nan])
def test_a_probability_that_is_none_is_refused(tmp_path: Path, probability: float):
    log = DecisionLog(tmp_path / "decisions.db")
    decision = load_policy("random", seed=0).decide(context(), OFFER)
    with pytest.raises(BadRequest, match="probability"):
        log.write(context(), OFFER, decision, probability=probability)
    with pytest.raises(BadRequest, match="mark"):
        log.write(context(), OFFER, decision, marks=("lucky",))
    assert len(log) == 0


def test_prompts_stay_out_unless_asked_for(tmp_path: Path):
    secret = "my unmistakable secret prompt of two cats"
    for kind in ("off", "hash", "on"):
        path = tmp_path / f"{kind}.db"
        log = DecisionLog(path, prompts=kind)  # type: ignore[arg-type]
        _decide(log, prompt=secret)
        log.close()
        written = b"".join(each.read_bytes() for each in tmp_path.glob(f"{kind}.db*"))
        assert (b"unmistakable" in written) == (kind == "on")
        (entry,) = read_log(path)
        assert entry.context.prompt == (secret if kind == "on" else "")
        assert tuple(entry.context.prompt_features) == PROMPT
        assert entry.context.prompt_features["objects"] > 0
    with pytest.raises(BadRequest, match="prompts"):
        DecisionLog(tmp_path / "x.db", prompts="maybe")  # type: ignore[arg-type]


def test_forced_exploration_is_marked(tmp_path: Path):
    log, policy = DecisionLog(tmp_path / "decisions.db"), load_policy("linucb", seed=0, least_pulls=1)
    for i in range(5):
        told = context(f"job-{i}")
        log.write(told, OFFER, policy.decide(told, OFFER))
    assert [entry.marks for entry in log.entries()] == [("forced",)] * 4 + [()]


def test_it_keeps_the_latest_and_what_they_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scheduler.decision_log._TIDY_EVERY", 10)
    log = DecisionLog(tmp_path / "decisions.db", keep=25)
    policy = load_policy("random", seed=0)
    for i in range(100):
        offer = actions([program(s=1 + i % 27)])  # ever new lists
        told = context(
            f"job-{i}",
            nodes=(node("edge-1", curves={"mini-sd3": {"large": {1: 0.01 + i}, "small": {1: 1.0}}}), node("phone-1")),
        )
        log.write(told, offer, policy.decide(told, offer))
    assert [entry.context.job for entry in log.entries()] == [f"job-{i}" for i in range(75, 100)]
    shared = sqlite3.connect(tmp_path / "decisions.db").execute("SELECT count(*) FROM shared").fetchone()[0]
    assert shared <= 2 * (25 + 10)


def test_a_killed_process_loses_no_decision(tmp_path: Path):
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from worlds import ARMS, actions, context
from scheduler.baselines import load_policy
from scheduler.decision_log import DecisionLog
log, policy, offer = DecisionLog(sys.argv[1]), load_policy("random", seed=0), actions(ARMS)
for i in range(50):
    told = context(f"job-{i}")
    decision = policy.decide(told, offer)
    log.write(told, offer, decision)
    log.outcome(decision.id, reward=0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "decisions.db"
    subprocess.run(
        [sys.executable, "-c", code, path, Path(__file__).parent], check=False, cwd=Path(__file__).parents[2]
    )
    assert [entry.reward for entry in read_log(path)] == [0.5] * 50
    log = DecisionLog(path)
    _decide(log)
    assert len(log) == 51


def test_a_disk_that_takes_nothing_more_is_counted_and_stops_nobody(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.db")
    (kept,) = _decide(log)
    pages = log._db.execute("PRAGMA page_count").fetchone()[0]
    log._db.execute(f"PRAGMA max_page_count = {pages}")  # the file can grow no more
    policy, lost = load_policy("random", seed=0), 0
    for i in range(60):
        told = context(f"more-{i}", prompt=PROMPTS[2])
        lost += not log.write(told, OFFER, policy.decide(told, OFFER))
    assert lost == log.lost > 0
    assert not log.outcome("unheard-of", reward=0.1)
    log._db.execute("PRAGMA max_page_count = 1000000")
    assert _decide(log)
    assert next(log.entries()).id == kept.id


def test_foreign_and_damaged_files_are_refused_in_one_line(tmp_path: Path):
    text, other, newer, cut = (tmp_path / name for name in ("text", "other.db", "newer.db", "cut.db"))
    text.write_text("decisions\n" * 200)
    sqlite3.connect(other).execute("CREATE TABLE songs (title TEXT)")
    DecisionLog(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    log = DecisionLog(cut)
    _decide(log, 50)
    log.close()
    cut.write_bytes(cut.read_bytes()[:20_000])
    for path, said in ((text, "decision log"), (other, "is no decision log"), (newer, "another version")):
        for opened in (DecisionLog, lambda p: list(read_log(p))):
            with pytest.raises(RelayError, match=said) as refusal:
                opened(path)
            assert "\n" not in str(refusal.value)
    with pytest.raises(RelayError, match=r"damaged|decision log"):
        list(read_log(cut))
    with pytest.raises(BadRequest, match="no such file"):
        list(read_log(tmp_path / "none.db"))


def test_a_log_is_read_while_it_is_written(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.db")
    _decide(log, 3)
    reading = read_log(tmp_path / "decisions.db")
    assert next(reading).context.job == "job-0"
    assert _decide(log, 3)
    assert len(list(reading)) >= 2
    assert len(list(read_log(tmp_path / "decisions.db"))) == 6


def _judged(path: Path, count: int = 30) -> DecisionLog:
    log, problem, policy = DecisionLog(path), Problem(1), load_policy("random", seed=1)
    for i, told in enumerate(problem.contexts(count)):
        decision = policy.decide(told, OFFER)
        log.write(told, OFFER, decision)
        if i % 3:
            log.outcome(
                decision.id,
                stage="done",
                seconds=0.4,
                terms={"scene": 0.5},
                reward=problem.reward(told, decision.action),
            )
    return log


def test_parquet_has_a_row_a_decision(tmp_path: Path):
    log = _judged(tmp_path / "decisions.db")
    assert export(log.entries(), tmp_path / "log.parquet") == 30
    frame = pl.read_parquet(tmp_path / "log.parquet")
    assert frame.height == 30
    assert {f"c_{name}" for name in CONTEXT} | {f"a_{name}" for name in ACTION} <= set(frame.columns)
    assert frame["reward"].null_count() == frame["term_scene"].null_count() == 10
    assert frame["probability"].to_list() == [0.25] * 30
    assert not any("prompt" in name for name in frame.columns)
    with pytest.raises(BadRequest, match="exported as"):
        export(log.entries(), tmp_path / "log.csv")


def test_dsjson_teaches_vowpal_wabbit_what_the_log_teaches_the_bandit(tmp_path: Path):
    log = _judged(tmp_path / "decisions.db", 60)
    assert export(log.entries(), tmp_path / "log.dsjson") == 60
    bandit = Bandit(seed=0, replay=0)
    plain = vw.Workspace(bandit.arguments)
    parser = vw.DSJsonFormatParser(plain)
    entries, lines = list(log.entries()), (tmp_path / "log.dsjson").read_text().splitlines()
    for line, entry in zip(lines, entries, strict=True):
        assert ("_label_cost" in json.loads(line)) == (entry.reward is not None)
        if entry.reward is not None:
            plain.learn_one(parser.parse_json(line))
    bandit.warm_start(
        Logged(e.context, e.actions, e.chosen, e.probability, e.reward) for e in entries if e.reward is not None
    )
    for entry in entries[:10]:
        told = as_dsjson(entry)
        assert told["a"][0] == entry.chosen + 1
        assert sum(told["p"]) == pytest.approx(1)
        predicted = dict(plain.predict_one(parser.parse_json(json.dumps(told))))
        expected = bandit.distribution(entry.context, entry.actions)
        assert [predicted[i] for i in range(4)] == pytest.approx(list(expected), abs=2e-3)
