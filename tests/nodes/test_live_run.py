"""The live run in short form, through the same code: a link degrades under a service that learns."""

import numpy as np

from experiments.live_run import blocks, draw, live, table


def test_the_service_learns_while_it_serves_and_is_set_beside_what_it_knew(tmp_path):
    found = live(tmp_path / "live", requests=16, gap_s=0.1, link="wifi", delay_s=0.4, seed=0)
    rows = found["rows"]
    assert [row["request"] for row in rows] == list(range(16))
    assert all(-1 < row["reward"] < 1 and 0 <= row["frozen_far"] <= 1 for row in rows)
    assert all(row["far"] == ("far" in row["nodes"]) for row in rows)
    slow = [row["seconds"] for row in rows[8:] if row["far"]]
    assert all(seconds > 0.5 for seconds in slow)  # there and back, each some 0.4 s with its jitter
    halves = blocks(found, 8)
    assert [(half["phase"], half["count"]) for half in halves] == [(0, 8), (1, 8)]
    assert np.isclose(halves[0]["far"], np.mean([row["far"] for row in rows[:8]]))
    draw(found, tmp_path / "live.png", size=4)
    assert (tmp_path / "live.png").stat().st_size > 5000
    assert "Within 100 requests after the change" in table(found, "live.png")
