"""The advisor over the service: what it adds is read back, and the short form measures real processes over one link."""

import json

import polars as pl
import pytest
from tiny import write_family

from experiments import advise_links
from experiments.advise import Costs, advise
from experiments.advise_links import FITTED, HELD_OUT, judged, measure, table
from experiments.advise_service import Measured, Service, Way, fit_service, read_service
from relay.errors import BadRequest
from relay.family import Family
from relay.pipeline import RelayPipeline
from scheduler.links import LinkProfile
from scheduler.message_sizes import bytes_sent, computed_sizes

COSTS = Costs(0.0, 0.0, large_s=0.03, small_s=0.005)
TRUE = Service({"full-cloud": Way(0.02, 900.0), "relay": Way(0.025, 3000.0), "edge-only": Way(0.02, 1500.0)}, 0.01)


@pytest.fixture(scope="module")
def family(checkpoints, tmp_path_factory):
    return str(write_family(tmp_path_factory.mktemp("advised") / "tiny-sd3.yaml", checkpoints["sd3"], "sd3"))


@pytest.fixture(scope="module")
def programs(family):
    pipe = RelayPipeline.from_pretrained(family)
    return [pipe.plan(num_inference_steps=6, handoff=s) for s in (0, 2, 4, 6)]


@pytest.fixture(scope="module")
def outcomes(programs):
    return pl.DataFrame(
        [{"family": "tiny-sd3", "program": str(p), "method": "program", "prompt": "a red circle", "seed": seed,
          "complexity": "1", "score_attributes": 0.6 + 0.3 * p.steps["large"] / 6}
         for p in programs for seed in range(2)]
    )  # fmt: skip


def test_what_the_service_adds_is_read_back_and_predicts_links_it_has_not_seen(family, programs):
    sizes = computed_sizes(Family.load(family).spec)
    measured = []
    for p in programs:
        carried = TRUE.ways[p.mode].bytes + sum(message.bytes for message in bytes_sent(p, sizes))
        measured.append(Measured(p, TRUE.predict(p, COSTS, FITTED, sizes), carried))
    found = fit_service(measured, COSTS, FITTED, sizes, 0.01)
    for link in HELD_OUT:
        for p in programs:
            assert found.predict(p, COSTS, link, sizes) == pytest.approx(TRUE.predict(p, COSTS, link, sizes), rel=1e-6)


def test_an_edge_waits_for_the_devices_question_where_its_steps_are_done_first(family, programs):
    sizes = computed_sizes(Family.load(family).spec)
    near, far = (LinkProfile(name="x", bandwidth_bit_s=1e9, delay_s=delay) for delay in (0.01, 1.0))
    few, more = programs[1], programs[2]  # 2 and 4 large steps

    def apart(link):
        return TRUE.predict(more, COSTS, link, sizes) - TRUE.predict(few, COSTS, link, sizes)

    assert apart(near) == pytest.approx(2 * 0.03 - 2 * 0.005)
    assert apart(far) == pytest.approx(-2 * 0.005)  # both wait, and the first has more small steps to take


def test_a_choice_is_judged_by_what_was_measured(family, programs, outcomes):
    sizes = computed_sizes(Family.load(family).spec)
    link = HELD_OUT[0]
    medians = {str(p): TRUE.predict(p, COSTS, link, sizes) for p in programs}
    right = judged(outcomes, programs, COSTS, COSTS, TRUE, link, sizes, medians)
    assert all(choice["gap"] == 0 for choice in right["choices"])
    assert all(abs(error) < 1e-9 for error in right["errors"].values())
    slow = medians | {str(programs[0]): 10.0}  # the one it takes for the fastest is the slowest
    wrong = judged(outcomes, programs, COSTS, COSTS, TRUE, link, sizes, slow)["choices"][0]
    assert wrong["chosen"] == str(programs[0])
    assert wrong["gap"] == pytest.approx(10.0 / min(medians[str(p)] for p in programs[1:]) - 1)
    with pytest.raises(BadRequest, match="over a link"):
        advise(outcomes, COSTS, None, sizes, floor=0.5, service=TRUE)


def test_the_short_form_measures_real_processes_over_a_link(family, programs, outcomes, tmp_path):
    times = pl.DataFrame(
        [{"program": str(p), "method": "program", "link": "none", "end_to_end_s": COSTS.compute(p), "encode_s": 0.001,
          "decode_s": 0.001, "handoff_s": 0.0, "large_s": COSTS.large_s * p.steps["large"],
          "small_s": COSTS.small_s * p.steps["small"]} for p in programs]
    )  # fmt: skip
    held_out = (advise_links._link("slow", 20, 150),)
    result = measure(tmp_path, family, outcomes, times, 1, 1, FITTED, held_out)
    assert set(result["medians_s"]) == {link.name for link in (FITTED, *held_out)}
    for text, seconds in result["medians_s"]["slow"].items():
        # two of the link's delays at least: up with the question, down with the end
        assert seconds > 0.3, text
    assert len(result["held_out"][0]["choices"]) == len(advise_links.FLOORS)
    said = table("tiny-sd3", result)
    (tmp_path / "links.json").write_text(json.dumps({"families": {"tiny-sd3": result}}))
    costs, service = read_service(tmp_path / "links.json", "tiny-sd3")
    sizes = computed_sizes(Family.load(family).spec)
    first = result["held_out"][0]["choices"][0]
    assert advise(outcomes, costs, held_out[0], sizes, floor=0.0, service=service)[0].program == first["chosen"]
    with pytest.raises(BadRequest, match=r"links.json says nothing of what a service adds to mini-sd3"):
        read_service(tmp_path / "links.json", "mini-sd3")
    assert "slow: 20 Mbit/s, 150 ms one way" in said
    assert all(f"| {mode} | " in said for mode in ("full-cloud", "relay", "edge-only"))
