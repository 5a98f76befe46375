"""N accepted = N answered, none twice, none late: the short form of `python -m experiments.fault_suite`, the same code."""

import json
from datetime import datetime

import pytest

from experiments.fault_suite import run
from experiments.faults.deck import DECK
from experiments.faults.outcome import table

REQUESTS = 500
GRACE_S = 20.0  # a time-out: this machine may be anything; the long form says how late the latest was


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fire")


@pytest.fixture(scope="module")
def outcome(folder):
    return run(folder, REQUESTS, every=1.5, window=24, rate=7.0, seed=5, grace_s=GRACE_S)


def test_every_accepted_request_ends_once_and_in_time_with_its_picture_or_a_reason(outcome):
    assert outcome.lost == outcome.hanging == []
    assert outcome.twice == []
    assert outcome.late == outcome.told_late == []
    assert outcome.unreadable == outcome.unexplained == []
    assert sum(outcome.stages.values()) == REQUESTS
    assert outcome.stages["done"] > 0.8 * REQUESTS  # one in ten may be too late, nodes come back


def test_pictures_of_disturbed_requests_are_the_undisturbed_ones_and_of_this_latent_space(outcome):
    assert outcome.redrawn > 0
    assert outcome.wrong == []
    assert outcome.foreign == []


def test_every_kind_of_fault_came_and_jobs_were_placed_again(outcome):
    assert set(outcome.faults) == set(DECK) - set(outcome.left_out)
    assert outcome.attempts > REQUESTS
    assert outcome.steps_paid >= outcome.steps_asked  # more where no checkpoint had come yet; by chance none
    assert outcome.strangers["full disk: told 507"] > 0  # and there is room again: all of them end


def test_strangers_are_refused_and_what_they_asked_ends_too(outcome):
    assert outcome.let_in == []
    assert outcome.others_open == 0
    for kind in ("unknown key: refused", "another version: refused", "corrupted frames: stood", "never reads: stood"):
        assert outcome.strangers[kind] > 0


def test_clocks_jumped_by_hours(outcome, folder):
    if "clock" in outcome.left_out:
        pytest.skip(outcome.left_out["clock"])
    said: dict[str, list[float]] = {"gateway": [], "phone": [], "tablet": []}
    for line in (folder / "deployment" / "log.txt").read_text(errors="replace").splitlines():
        name, _, text = line.partition(" | ")
        if name.strip() in said and text.startswith("{"):
            said[name.strip()].append(datetime.fromisoformat(json.loads(text)["at"]).timestamp())
    spread = {name: max(times) - min(times) for name, times in said.items()}
    assert max(spread["gateway"], spread["phone"]) > 3000
    assert spread["tablet"] < 3000


def test_the_table_names_what_was_counted(outcome):
    said = table(outcome)
    assert f"| accepted | {REQUESTS} |" in said
    assert "| accepted and never ended, or never told | 0, 0 |" in said
    assert all(f"| {kind} | " in said for kind in outcome.faults)
