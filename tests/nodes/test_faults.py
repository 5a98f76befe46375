"""N accepted = N answered, none twice: the short form of `python -m experiments.fault_suite`, through the same code."""

import pytest
from tiny import build_sd3, write_family

from experiments.fault_suite import run, table

REQUESTS = 500


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("fire")
    family = write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3")
    return run(root / "deployment", str(family), REQUESTS, every=2.5, window=24, rate=7.0, seed=5)


def test_every_accepted_request_ends_once_with_a_picture_or_a_reason(outcome):
    assert outcome.lost == []
    assert outcome.twice == []
    assert outcome.unreadable == []
    assert outcome.unexplained == []
    assert sum(outcome.stages.values()) == REQUESTS


def test_there_were_faults_and_work_was_done_again(outcome):
    assert sum(outcome.faults.values()) >= 5
    assert outcome.attempts > REQUESTS
    assert outcome.stages["done"] > 0.9 * REQUESTS  # deadlines are long, nodes come back


def test_the_table_names_what_was_counted(outcome):
    said = table(outcome)
    assert f"| accepted | {REQUESTS} |" in said
    assert "| accepted and never ended | 0 |" in said
