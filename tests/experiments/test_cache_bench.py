"""The cache's bench through its own code at small sizes: what is near is found, nothing else is, and the bound holds."""

import pytest

from experiments.cache_bench import measured, table
from relay.errors import BadRequest


def test_it_finds_what_is_near_and_drops_what_does_not_fit(tmp_path):
    row = measured(tmp_path / "c", 2000, 32, 40)
    assert row["found"] >= 0.95
    assert row["found_by_chance"] <= 0.1
    assert row["evicted"] >= 40
    assert "| 2,000 |" in table({"2000": row}, 32, 40)
    with pytest.raises(BadRequest, match="look-ups need"):
        measured(tmp_path / "d", 50, 32, 40)
