"""How many step at once follows from the step-time curve, and a wrong curve heals."""

import pytest

from relay.batching import StepTimes
from relay.errors import BadRequest

FLAT, LINEAR = dict.fromkeys((1, 8, 32), 0.02), {batch: 0.01 * batch for batch in (1, 8, 32)}
TWO_CORES = {1: 19.2, 2: 28.1, 4: 47.9, 8: 91.4, 16: 180.2, 32: 419.8}  # ms, mini-sd3's large member


@pytest.mark.parametrize(
    ("curve", "waiting", "chosen"),
    [
        (FLAT, 32, 32),
        (FLAT, 5, 5),
        (None, 32, 32),
        (LINEAR, 32, 1),
        (LINEAR, 1, 1),
        (TWO_CORES, 2, 2),
        (TWO_CORES, 6, 5),  # 85/s, as good as 6 at once
        (TWO_CORES, 8, 6),  # not 5, which leave more than half of 8 for a second round
        (TWO_CORES, 32, 10),  # the middle one waits 3 rounds of 114 ms; all 32 would make a sixth less
    ],
)
def test_of_the_batches_of_nearly_the_best_throughput_the_middle_one_waits_least(curve, waiting, chosen):
    assert StepTimes(curve, 32).choose(waiting, 32) == chosen


def test_the_bound_holds_whatever_the_curve_says():
    times = StepTimes(FLAT, 32)
    for _ in range(200):
        chosen = times.choose(32, 7)
        assert chosen <= 7
        times.observe(chosen, 0.02)


def test_between_measured_sizes_it_interpolates_and_beyond_them_it_expects_no_gain():
    times = StepTimes({2: 2.0, 4: 3.0}, 8)
    assert [times.seconds(batch) for batch in (1, 2, 3, 4, 8)] == [1.5, 2.0, 2.5, 3.0, 6.0]
    unguided = StepTimes({2: 2.0, 4: 3.0}, 8, weight=0.5)  # two of these cost what one of the curve's images costs
    assert [unguided.seconds(batch) for batch in (2, 4, 6, 8)] == [1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize("given", [FLAT, LINEAR, TWO_CORES, None])
@pytest.mark.parametrize("truth", [lambda b: 0.05, lambda b: 0.003 * b, lambda b: 0.01 + 0.011 * max(b, b * b / 12)])
def test_a_wrong_curve_heals_whatever_it_was(given, truth):
    times = StepTimes(given, 32)
    for _ in range(900):
        batch = times.choose(32, 32)
        times.observe(batch, truth(batch))
    known = StepTimes({b: truth(b) for b in range(1, 33)}, 32).choose(32, 32)
    chosen = times.choose(32, 32)
    assert chosen / truth(chosen) >= 0.95 * known / truth(known)
    assert known / 2 <= chosen <= known * 2
    assert times.seconds(chosen) == pytest.approx(truth(chosen))


def test_a_machine_that_slows_down_all_over_keeps_the_shape_of_its_curve():
    times = StepTimes(TWO_CORES, 32)
    for _ in range(3):
        times.observe(8, 3 * TWO_CORES[8])
    assert [times.seconds(batch) for batch in TWO_CORES] == pytest.approx([3 * ms for ms in TWO_CORES.values()])
    assert times.choose(32, 32) == StepTimes(TWO_CORES, 32).choose(32, 32)


def test_a_hiccup_changes_nothing():
    times = StepTimes(TWO_CORES, 32)
    for i in range(61):  # the last one is a hiccup
        times.observe(8, TWO_CORES[8] * (40 if i % 3 == 0 else 1))
    assert times.seconds(8) == pytest.approx(TWO_CORES[8])
    assert times.choose(32, 32) == StepTimes(TWO_CORES, 32).choose(32, 32)


@pytest.mark.parametrize("curve", [{1: 0.0}, {0: 1.0}, {1: float("nan")}])
def test_a_curve_that_is_no_times_is_refused(curve):
    with pytest.raises(BadRequest, match="step-time curve"):
        StepTimes(curve, 8)
