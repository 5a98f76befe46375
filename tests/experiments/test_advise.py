"""The advisor: costs are read back from times that follow the model, wishes are fulfilled, certainty means something."""

import json

import polars as pl
import pytest

from experiments.advise import Costs, advise, answer, fit_costs, held_out_errors
from relay.errors import BadRequest
from relay.family import Family
from relay.matching import plan
from scheduler.links import find_link
from scheduler.message_sizes import computed_sizes

TRUE = Costs(request_s=0.02, handoff_s=0.004, large_s=0.03, small_s=0.005)


@pytest.fixture(scope="module")
def family():
    return Family.load("mini-sd3")


@pytest.fixture(scope="module")
def programs(family):
    schedules = family.schedules((64, 64))
    guidance = {"large": 3.0, "small": 3.0}
    return [
        plan("mini-sd3", schedules, steps=28, handoff=s, guidance=guidance, matching="exact", codec="fp16",
             conditioning="encode", small_steps=n)
        for s, n in ((0, None), (7, None), (14, None), (14, 6), (21, None), (28, None))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def times(programs):
    noise = (0.99, 1.0, 1.02)
    return pl.DataFrame(
        [{"program": str(p), "method": "program", "link": "none", "end_to_end_s": TRUE.compute(p) * n,
          "encode_s": 0.005 * n, "decode_s": 0.015 * n, "handoff_s": TRUE.handoff_s * n * (len(p.legs) - 1),
          "large_s": TRUE.large_s * p.steps["large"] * n, "small_s": TRUE.small_s * p.steps["small"] * n}
         for p in programs for n in noise]
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(programs):
    """Scores that rise with s: 0.6 alone, 0.9 for the large member, and no noise at all for one prompt in two."""
    return pl.DataFrame(
        [{"program": str(p), "method": "program", "prompt": f"p{i}", "seed": 0, "complexity": "1" if i % 2 else "4",
          "score_attributes": 0.6 + 0.3 * p.steps["large"] / 28 + (0.05 if i % 2 else -0.05)}
         for p in programs for i in range(40)]
    )  # fmt: skip


def test_costs_are_read_back_from_times(times):
    found = fit_costs(times)
    for name in ("large_s", "small_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_a_program_left_out_of_the_fit_is_predicted(times):
    assert max(abs(e) for e in held_out_errors(times).values()) < 0.01


def test_a_floor_takes_the_fastest_above_it(outcomes, times, family):
    options = advise(outcomes, fit_costs(times), None, computed_sizes(family.spec), floor=0.8)
    assert options[0].steps == {"large": 14, "small": 6}
    assert options[0].of_large == pytest.approx(0.75 / 0.9)
    assert options[0].meets == 1.0
    tight = advise(outcomes, fit_costs(times), None, computed_sizes(family.spec), floor=0.99)
    assert tight[0].steps["small"] == 0


def test_a_limit_takes_the_best_score_within_it(outcomes, times, family):
    options = advise(outcomes, fit_costs(times), None, computed_sizes(family.spec), limit_s=0.5)
    assert options[0].steps["large"] == 14
    assert options[0].time_s <= 0.5
    assert all(o.meets == 0 for o in options if o.time_s > 0.5)


def test_a_slow_link_moves_the_advice(outcomes, times, family):
    slow = find_link({"name": "slow", "bandwidth_bit_s": 2e4, "delay_s": 0.5})
    options = advise(outcomes, fit_costs(times), slow, computed_sizes(family.spec), limit_s=0.6)
    assert options[0].steps["large"] == 0  # only what sends nothing is in time
    assert options[0].network_s == 0


def test_a_wish_that_nothing_fulfils_is_told_by_how_nearly(outcomes, times, family):
    options = advise(outcomes, fit_costs(times), None, computed_sizes(family.spec), floor=0.99, limit_s=0.3)
    assert options[0].meets == 0
    assert options[0].of_large == max(o.of_large for o in options)


def test_advice_needs_a_wish_a_score_and_enough_programs(outcomes, times, family):
    sizes = computed_sizes(family.spec)
    with pytest.raises(BadRequest, match="say what counts"):
        advise(outcomes, TRUE, None, sizes)
    with pytest.raises(BadRequest, match="no score 'beauty'"):
        advise(outcomes, TRUE, None, sizes, floor=0.9, score="beauty")
    with pytest.raises(BadRequest, match="the large and the small member take steps"):
        fit_costs(times.head(3))


def test_seeds_of_a_prompt_are_no_prompts_of_their_own(outcomes, times, family):
    """Three seeds with the same scores say no more than one: as sure, not surer."""
    ask = {"link": None, "sizes": computed_sizes(family.spec), "floor": 0.74}
    rough = outcomes.with_columns(
        pl.col("score_attributes") * (1 + 0.3 * (pl.col("prompt").hash(1) % 7).cast(pl.Float64) / 7)
    )
    thrice = pl.concat([rough.with_columns(seed=pl.lit(k)) for k in range(3)])
    assert advise(thrice, fit_costs(times), **ask) == advise(rough, fit_costs(times), **ask)


def test_without_a_run_the_shipped_rows_answer(monkeypatch, tmp_path):
    asked = [None, "mini-sd3", 20.0, 40.0, None, 0.95, None, "attributes", None, "50,10", True]
    found = json.loads(answer(*asked))
    assert found["costs_s"]["large_s"] == 0.05
    assert found["options"][0]["of_large"] >= 0.95
    assert "100 prompts of rise; a step: large 50.0 ms, small 10.0 ms" in answer(*asked[:-1], False)
    monkeypatch.setattr("experiments.advise.SHIPPED", tmp_path / "nothing")
    with pytest.raises(BadRequest, match="--run"):
        answer(*asked)


def test_the_check_of_the_clock_writes_its_table(tmp_path):
    from experiments.advise_check import main

    main(tmp_path / "advise.md", ["mini-sd3"], repeats=1, threads=1)
    found = json.loads((tmp_path / "advise.json").read_text())["families"]["mini-sd3"]
    assert len(found) == 7
    assert "largest error" in (tmp_path / "advise.md").read_text()
