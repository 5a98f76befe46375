"""What similar prompts may skip: the rule, and where a family's own comes from."""

import pytest

from relay.errors import BadRequest
from scheduler.load import similarity
from scheduler.load.similarity import PAPER, Rule, read_rule, skip_of


def test_the_most_similar_skip_most_and_the_unlike_nothing():
    rule = Rule()
    assert [rule.allowed(s) for s in (1.0, 0.95, 0.94, 0.86, 0.76, 0.66, 0.6, -1.0)] == [
        0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0,
    ]  # fmt: skip
    assert rule.skips(50) == (5, 10, 15, 20, 25)
    assert rule.skips(28) == (3, 6, 8, 11, 14)
    assert rule.skips(2) == (1,)
    assert Rule(()).skips(50) == ()
    assert skip_of(0.5, 5) == 2


@pytest.mark.parametrize(
    "steps", [((0.8, 0.2), (0.95, 0.5)), ((0.95, 0.2), (0.8, 0.5)), ((2.0, 0.5),), ((0.9, 1.0),), ((0.9, 0.0),)]
)
def test_a_rule_that_makes_no_sense_is_refused(steps):
    with pytest.raises(BadRequest, match="cache rule"):
        Rule(steps)


def test_a_familys_own_rule_is_read_and_the_papers_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "CONFIGS", tmp_path)
    assert read_rule("mine").steps == PAPER
    (tmp_path / "mine.yaml").write_text("steps: [[0.9, 0.3]]\n")
    assert read_rule("mine").steps == ((0.9, 0.3),)
    (tmp_path / "mine.yaml").write_text("steps: [[0.9, 3]]\n")
    with pytest.raises(BadRequest, match=r"mine\.yaml"):
        read_rule("mine")
