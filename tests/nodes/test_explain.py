"""`relay explain` with the shipped weights: offline, what a person and what a program reads."""

import json

import pytest

from nodes.commands.explain import explain
from relay.errors import BadRequest
from scheduler.router.settings import METRIC_SETS, MODES

PROMPT = "a red heart at the top left and a blue striped circle, on a yellow background"


def said(capsys, prompt=PROMPT, **options):
    asked = dict.fromkeys(("family", "metrics", "full", "relay", "epsilon", "weights"))
    explain(prompt, **(asked | {"delta": 0.1, "as_json": False} | options))
    return capsys.readouterr().out


@pytest.mark.parametrize("metrics", ["clip", "scene"])
def test_json_has_tokens_quality_threshold_and_decision(capsys, metrics):
    facts = json.loads(said(capsys, as_json=True, metrics=metrics, full=0.3, relay=0.4))
    assert tuple(facts["metrics"]) == METRIC_SETS[metrics]
    for each in facts["metrics"].values():
        assert each["tokens"]
        assert set(each["tokens"]) <= set(facts["tokens"])
        assert not {"<start>", "<end>", "<pad>"} & set(each["tokens"])
        assert all(0 <= each["quality"][mode] <= 1 for mode in MODES)
        assert all(0 <= d <= 1 for d in each["D"].values())
    assert facts["budget"]["full"] == 0.3
    decision = facts["decision"]
    assert decision["mode"] in MODES
    assert decision["alpha"] <= 0.5
    assert decision["probability"] == 1.0
    assert decision["reason"]


def test_a_person_reads_the_same(capsys):
    facts = json.loads(said(capsys, as_json=True, metrics="clip", relay=0.0, full=0.5))
    text = said(capsys, metrics="clip", relay=0.0, full=0.5)
    assert text.startswith(PROMPT)
    assert "definition" in text
    assert facts["metrics"]["q_definition"]["tokens"][0] in text
    assert f"alpha {facts['decision']['alpha']:.3f}" in text
    assert facts["decision"]["mode"] in text.split("decision")[1]


def test_budgets_decide(capsys):
    for share, modes in ((1.0, {"full-cloud", "edge-only"}), (0.0, {"edge-only"})):
        facts = json.loads(said(capsys, as_json=True, full=share, relay=0.0))
        assert facts["decision"]["mode"] in modes


def test_what_cannot_be_asked(capsys):
    with pytest.raises(BadRequest, match="empty"):
        said(capsys, "  ")
    with pytest.raises(BadRequest, match="clip, scene"):
        said(capsys, metrics="taste")
    with pytest.raises(BadRequest, match="relay-train router"):
        said(capsys, family=["sdxl-vega"])
