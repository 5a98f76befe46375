"""A run's baselines: for every T beside the full-cloud of that T, and charged for what they send."""

from __future__ import annotations

import polars as pl
import pytest
import yaml
from tiny import write_family

from experiments.baselines.base import Setting, as_result, call, full_cloud
from experiments.grid import read_experiment
from experiments.report.data import read_groups
from experiments.report.sections import all_sections
from experiments.run import prepare, run
from experiments.run_folder import open_run


class Apart:
    """How far an image is from the full-cloud one that it is compared with."""

    name, columns, needs_reference = "apart", ("apart",), True

    def missing(self):
        return None

    def score(self, images, prompts, references):
        return {"apart": (images - references).abs().mean((1, 2, 3)).tolist()}


class Same:
    """A baseline of one's own that is full-cloud itself: what it is compared with must be full-cloud of the same T."""

    name, paper, note = "same", "none", ""

    def applies(self, family):
        return None

    def settings(self, family, steps=None):
        return [Setting("as it is", {"program": str(full_cloud(family, steps))})]

    def run(self, family, prompts, seeds, setting):
        return as_result(call(family, prompts, seeds, setting.values["program"]))


@pytest.fixture(scope="module")
def two_lengths(checkpoints, tmp_path_factory):
    """One family, T = 3 and 4, with baselines that end on either member."""
    root = tmp_path_factory.mktemp("baselines")
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    family = write_family(root / "tiny-sdxl.yaml", checkpoints["sdxl"], "sdxl", small={"scheduler": "scheduler_small"})
    body = {
        "name": "two-lengths",
        "workload": {"name": "file", "path": str(root / "prompts.txt"), "split": "all", "count": 2},
        "families": [str(family)],
        "steps": [3, 4],
        "programs": [{"mode": "full-cloud"}, {"mode": "relay", "handoff": [2]}],
        "metrics": ["test_run_baselines:Apart"],
        "baselines": ["test_run_baselines:Same", "fewer-steps", "small-first", "img2img", "taylorseer", "relay+taylorseer"],
        "links": ["wifi"],
        "times": {"repeats": 1, "curve": [1]},
    }  # fmt: skip
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(body))
    run(prepare(read_experiment(path), str(path)), root / "run")
    return open_run(root / "run")


def test_baselines_are_run_for_every_t_and_compared_with_full_cloud_of_that_t(two_lengths):
    frame = two_lengths.outcomes.filter(pl.col("method") != "program")
    assert frame.group_by("method").agg(pl.col("steps_total").unique().sort())["steps_total"].to_list() == [[3, 4]] * 6
    assert (frame.group_by("program").agg(pl.col("steps_total").n_unique())["steps_total"] == 1).all()
    same = frame.filter(method="same")
    assert set(same["program"]) == {"same[as it is, T = 3]", "same[as it is, T = 4]"}
    assert same["score_apart"].to_list() == [0.0] * 4
    assert "fewer-steps[2 of 3 steps]" in set(frame["program"])


def test_the_report_sets_each_baseline_beside_full_cloud_of_its_t(two_lengths):
    groups = {group.steps_total: group for group in read_groups([two_lengths])}
    assert set(groups) == {3, 4}
    for total, group in groups.items():
        mine = two_lengths.outcomes.filter(pl.col("steps_total") == total)
        assert {e.program for e in group.entries} == set(mine["program"])
        assert all(e.latency for e in group.entries)


def test_a_baseline_is_held_against_the_best_relay_that_takes_no_longer(two_lengths):
    groups = read_groups([two_lengths])
    (section,) = (each for each in all_sections(groups) if each.id == "baselines")
    compared = 0
    for group, table in zip(groups, section.tables[1:], strict=True):
        named = {e.label: e for e in group.entries}
        for label, *_, best, difference in table.rows:
            mine = named[label]
            relays = [
                e for e in group.entries
                if e.latency <= mine.latency
                and (e.mode == "relay" or (e.method == "relay+taylorseer" and mine.method != "relay+taylorseer"))
            ]  # fmt: skip
            if not relays:
                assert (best, difference) == ("none is as fast", "")
                continue
            score = max(e.score[0] for e in relays)
            assert best.startswith(f"{score:.3f}: ")
            assert difference.split()[0] == f"{score - mine.score[0]:+.3f}"
            compared += 1
    assert compared


def test_a_baseline_pays_for_what_it_sends(two_lengths):
    over = two_lengths.times.filter(pl.col("link_kind") == "as given")
    ways = {row["program"]: (row["transfer_s"], row["return_s"]) for row in over.iter_rows(named=True)}

    def ways_of(start: str) -> set[tuple[float, float]]:
        return {way for text, way in ways.items() if text.startswith(start)}

    ((relay_transfer, relay_return),) = {way for text, way in ways.items() if "/large:4:0-2/small" in text}
    ((full_transfer, full_return),) = {way for text, way in ways.items() if "/large:4:0-4/" in text}
    assert relay_return == 0 == full_transfer
    assert ways_of("fewer-steps[") == ways_of("taylorseer[") == ways_of("same[") == {(0.0, full_return)}
    assert ways_of("relay+taylorseer[") == {(relay_transfer, 0.0)}
    for ended_on_large in ("small-first[", "img2img["):
        assert all(up == relay_transfer and back > 0 for up, back in ways_of(ended_on_large))
    assert (over["end_to_end_s"] > over["transfer_s"] + over["return_s"]).all()
