"""The learned policy in the service: it decides, is judged, learns, survives, and is done without when it is broken."""

import signal
import sys
import time

import pytest

from nodes.cli import main
from nodes.fleet import fleet
from nodes.gateway.learning import MODEL, LearnedConfig, make_bandit
from relay.errors import BadRequest
from scheduler.bandit import SHIPPED
from scheduler.bandit_file import read_bandit
from scheduler.decision_log import read_log
from scheduler.reward import load_reward

PROMPTS = ("a large red heart at the top left", 'the word "CAT" in red', "two small blue circles and a green star")
SMALL = "mini-sd3/small:4:0-4/match=exact/codec=fp16/guidance=3/conditioning=encode"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """An edge and a phone with mini-sd3, a judge that scores everything, and the policy that learns from it."""
    nodes = {
        "edge": {"role": "edge", "families": {"mini-sd3": ["large"]}},
        "phone": {"role": "device", "families": {"mini-sd3": ["small"]}},
    }
    offer = [{"family": "mini-sd3", "steps": 4, "mode": mode} for mode in ("full-cloud", "edge-only")]
    offer.append({"family": "mini-sd3", "steps": 4, "handoff": 2})
    gateway = {"offer": offer, "policy": {"name": "learned", "seed": 1, "explore": 0.2, "warm": False}}
    gateway["heartbeat_s"] = 1.0
    with fleet(
        tmp_path_factory.mktemp("learned") / "deployment", nodes, gateway, judge={"share": 1.0, "nice": 0}
    ) as running:
        yield running


def drawn(running, count):
    async def work(asker):
        jobs = [(await asker.submit({"prompt": PROMPTS[i % 3], "seed": i})).jobs[0] for i in range(count)]
        return [await asker.wait(job, 60) for job in jobs]

    return running.ask(work, 120)


def until(running, holds, timeout_s=60):
    """The status once it is so."""
    ends = time.monotonic() + timeout_s
    while True:
        told = running.status()["decisions"]
        if holds(told):
            return told
        assert time.monotonic() < ends, told
        time.sleep(0.3)


def test_it_decides_with_reasons_and_learns_from_what_the_judge_says(running):
    ended = drawn(running, 12)
    assert {told["stage"] for told in ended} == {"done"}
    for told in ended:
        decision = told["report"]["decision"]
        assert told["report"]["policy"] == decision["policy"] == "learned"
        assert 0 < decision["probability"] < 1
        assert decision["mark"] is None
        assert decision["program"] == told["report"]["program"]
        assert "price" in decision["reason"]  # the router's: what each mode is worth to this prompt, and costs
        assert set(decision["expected_quality"]) == {"full-cloud", "relay", "edge-only"}
    told = until(running, lambda told: told["learned"] == 12)
    assert told["broken"] is None
    assert told["router"].startswith("mini-sd3:")
    entries = list(read_log(running.store / "decisions.db"))
    assert {entry.context.job for entry in entries} == {told["id"] for told in ended}
    for entry in entries:
        assert -1 < entry.reward < 1
        assert {"attributes", "term_seconds"} <= entry.terms.keys()
        assert entry.router
        assert entry.bandit
        assert not entry.marks
    lettered = [entry for entry in entries if entry.context.prompt_features["text"]]
    assert all("term_words" in entry.terms for entry in lettered)
    assert len(lettered) == 4


def test_a_pinned_decision_is_marked_and_teaches_nothing(running):
    before = running.status()["decisions"]["learned"]
    told, _ = running.draw(prompt=PROMPTS[0], seed=1, program=SMALL)
    assert told["report"]["decision"]["mark"] == "pinned"
    until(running, lambda told: told["awaiting_scores"] == 0)
    assert running.status()["decisions"]["learned"] == before


def test_the_status_shows_the_last_decision_and_its_reason(running, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["relay", "status", "--gateway", running.gateway.control])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert "policy learned" in text
    assert "learned from" in text
    assert "with probability" in text


def test_what_was_learned_survives_a_kill_and_a_damaged_file_is_done_without(running):
    learned = running.status()["decisions"]["learned"]
    ends = time.monotonic() + 30
    while not (running.store / MODEL).exists() or read_bandit(running.store / MODEL).learned < learned:
        assert time.monotonic() < ends
        time.sleep(0.2)
    running.kill("gateway", signal.SIGKILL)
    running.wait_for_nodes()
    assert running.status()["decisions"]["learned"] == learned
    model = running.store / MODEL
    kept = model.read_bytes()
    model.write_bytes(kept[: len(kept) // 2])
    running.kill("gateway", signal.SIGKILL)
    running.wait_for_nodes()
    told = running.status()["decisions"]
    assert "is damaged" in told["broken"]
    (answer,) = drawn(running, 1)
    assert answer["stage"] == "done"
    assert (answer["report"]["policy"], answer["report"]["decision"]["mark"]) == ("least-finish-time", "fallback")


def test_a_judge_that_dies_holds_nothing_up(running):
    running.kill("judge", signal.SIGKILL)
    assert {told["stage"] for told in drawn(running, 3)} == {"done"}


def test_a_bandit_begins_with_the_shipped_start_a_log_or_nothing(running, tmp_path):
    reward = load_reward(None)
    shipped = read_bandit(SHIPPED).learned
    assert shipped > 1000
    assert make_bandit(LearnedConfig(), reward, None).learned == shipped
    assert make_bandit(LearnedConfig(warm=False), reward, None).learned == 0
    assert (
        make_bandit(LearnedConfig(bandit={"explore": "softmax"}), reward, None).learned == 0
    )  # made with other options
    logged = [e for e in read_log(running.store / "decisions.db") if e.reward is not None and not e.marks]
    from_log = make_bandit(LearnedConfig(warm=str(running.store / "decisions.db")), reward, None)
    assert from_log.learned == len(logged) >= 12
    from_log.save(tmp_path / "kept.model")
    assert make_bandit(LearnedConfig(), reward, tmp_path / "kept.model").learned == len(logged)  # its own comes first
    with pytest.raises(BadRequest, match="no such file"):
        make_bandit(LearnedConfig(warm=str(tmp_path / "none.db")), reward, None)
