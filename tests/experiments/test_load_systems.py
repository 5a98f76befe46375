"""Systems under load: levels are fitted, one run's books balance, both simulations agree, rules do what they say."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
import yaml
from tiny_load import CURVE, FAST, FULL, PLACE, RELAY, SMALL, WORTH, write_load

from experiments.load.__main__ import app
from experiments.load.bound import least_violations, most_per_s
from experiments.load.case import Cell, read_case
from experiments.load.service import DONE, LATE, REFUSED, Demand, Measured, Service, stations_of
from experiments.load.systems import systems
from experiments.simulate.environment import Simulation
from experiments.simulate.scores import Scores
from experiments.workloads import TimedRequest
from experiments.workloads.prompts import Prompt
from relay.errors import BadRequest
from scheduler.drawing import certain
from scheduler.load.controller import Controller
from scheduler.load.expected import ends_s
from scheduler.load.lag import Overruns
from scheduler.load.prediction import read_levels
from scheduler.outcomes import write_unit


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_load(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def case(config):
    return read_case(config)


def test_levels_are_predicted_for_prompts_and_their_file_is_checked(config, case):
    levels = case.levels
    assert [level.program for level in levels.levels] == [FULL, RELAY, FAST, SMALL]  # safest first
    easy, hard = levels.predict(["new one with the word 'NO'", "new a red heart and a blue ring"])
    assert easy[3] > 0.75
    assert hard[3] < 0.45
    path = config.parent / "damaged.json"
    path.write_text((config.parent / "tiny.json").read_text()[:-40])
    with pytest.raises(BadRequest, match="is damaged"):
        read_levels(path)
    with pytest.raises(BadRequest, match="no measured levels"):
        read_levels(config.parent / "none.json")
    with pytest.raises(BadRequest, match="holds the levels of tiny"):
        read_levels(config.parent / "tiny.json", "mini-sd3")


def start_rows(pairs=40):
    """Rows of cached starts: what full-cloud keeps falls with K and rises with similarity."""
    rows = []
    for split in ("validation", "test"):
        for i in range(pairs):
            similarity = 0.6 + 0.4 * i / pairs
            same = {"method": "program", "family": "tiny", "program": FULL, "mode": "full-cloud", "steps_total": 20,
                    "split": split, "prompt_index": i, "seed": i, "prompt": f"{i}", "complexity": "2", "score_strict": 0.0,
                    "score_source_attributes": 0.0}  # fmt: skip
            rows.append(same | {"score_attributes": 0.8})
            rows += [
                same | {"start_prompt": "x", "start_seed": i, "start_skipped": skip, "start_similarity": similarity,
                        "score_attributes": 0.8 - 0.02 * skip * (1 - similarity)}
                for skip in (2, 4, 10)
            ]  # fmt: skip
    return rows


def test_levels_that_start_from_cached_latents_keep_what_their_pairs_kept(config, tmp_path):
    starts, out = tmp_path / "starts", tmp_path / "tiny.json"
    write_unit(starts, "outcomes", "all", start_rows())
    asked = [
        "levels",
        "tiny",
        "--store",
        str(config.parent),
        "--out",
        str(out),
        "--report",
        str(tmp_path / "levels.md"),
    ]
    app([*asked, "--starts", str(starts)], standalone_mode=False)
    plain, found = read_levels(config.parent / "tiny.json"), read_levels(out)
    assert [(level.program, level.skipped) for level in found.levels[4:]] == [
        (FULL, 2),
        (FULL, 4),
    ]  # of K = 10: five pairs
    for level, alike in zip(found.levels[4:], (0.65, 0.75), strict=True):  # the paper's least similarities
        kept = [1 - 0.02 * level.skipped * (0.4 - 0.4 * i / 40) / 0.8 for i in range(40) if 0.6 + 0.4 * i / 40 >= alike]
        assert level.quality == pytest.approx(plain.levels[0].quality * np.mean(kept), rel=1e-4)
    easy = found.predict(["new one with the word 'NO'"])[0]
    assert easy[0] > easy[4] > easy[5]
    assert np.array(found.sample).shape == (len(plain.sample), 6)
    assert found.provenance["starts"][0]["pairs"] == 35
    assert "full-cloud from 2" in (tmp_path / "levels.md").read_text()
    write_unit(tmp_path / "none", "outcomes", "all", [row for row in start_rows() if row["prompt_index"] < 3])
    with pytest.raises(BadRequest, match="no cached start of tiny's levels has 20 validation pairs"):
        app([*asked, "--starts", str(tmp_path / "none")], standalone_mode=False)


@pytest.fixture(scope="module")
def cached(config, tmp_path_factory):
    """The case with levels that begin from cached latents; similarity is the mini family's."""
    folder = tmp_path_factory.mktemp("cached")
    write_unit(folder / "starts", "outcomes", "all", start_rows(160))
    said = yaml.safe_load(config.read_text()) | {"starts": {"store": [str(folder / "starts")], "embeds": "mini-sd3"}}
    said["systems"] |= {"with starts": {"system": "ours", "settings": {"starts": True}}}
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture
def cached_case(cached, monkeypatch):
    monkeypatch.chdir(cached.parent)  # vectors are kept under it
    return read_case(cached)


def test_with_a_cache_full_quality_takes_less_and_what_it_costs_is_what_was_measured(cached_case, case):
    works = cached_case.works
    assert [work.skipped for work in works] == [0, 0, 0, 0, 2, 4, 10]
    outcomes = {name: cached_case.run(name, PLACE, 3, "test", 400, {}) for name in ("nirvana", "clipper-ha")}
    busy = {name: sum(each.busy_s.values()) / (each.stage == DONE).sum() for name, each in outcomes.items()}
    done = {name: each.stage == DONE for name, each in outcomes.items()}
    assert done["nirvana"].sum() > done["clipper-ha"].sum()
    assert busy["nirvana"] < busy["clipper-ha"]
    nirvana = outcomes["nirvana"]
    assert set(nirvana.level[done["nirvana"]]) == {6}
    from_noise = cached_case.measured("test").quality[nirvana.prompt, 0][done["nirvana"]]
    share = nirvana.quality[done["nirvana"]] / from_noise
    assert (share == 1).any()  # misses
    assert ((share >= 1 - 10 * 0.02 * 0.4 / 0.8) & (share <= 1)).all()
    assert (share < 1).any()
    assert set(cached_case.run("nirvana", PLACE, 3, "test", 100, {"most": 0.1}).level) <= {-1, 4}
    same = case.run("ours", PLACE, 3, "test", 200, {})
    other = cached_case.run("ours", PLACE, 3, "test", 200, {})
    assert (same.seconds == other.seconds).all()  # a system without a cache is not touched by one
    assert cached_case.digest("ours", PLACE, {}, 9, "test") == case.digest("ours", PLACE, {}, 9, "test")


def test_ours_uses_cached_starts_by_what_they_spare(cached_case):
    roomy = Cell(fleet="three", trace="poisson", load=1.3, deadline=8.0)  # a miss must keep it too
    outcome = cached_case.run("with starts", roomy, 3, "test", 400, {})
    levels = outcome.level[outcome.stage == DONE]
    assert (levels >= 4).any()
    assert (levels < 4).any()


def test_a_request_finds_the_nearest_of_others_that_left_a_latent_so_deep(cached_case):
    caches = cached_case.measured("test").caches
    full, relay = (cached_case.works[i].program for i in (0, 1))
    found, near = caches.begin(), int(np.argsort(caches.alike[0])[-2])
    assert found.find("edge-1", 0, full, 4) == (0, 0.0)
    found.leave("edge-1", 0, full)
    assert found.find("edge-1", 0, full, 4) == (0, 0.0)  # never its own
    found.leave("edge-1", near, full)
    skipped, alike = found.find("edge-1", 0, full, 4)
    assert alike == pytest.approx(float(caches.alike[0, near]))
    assert skipped == (4 if alike >= 0.75 else 2)
    assert found.find("edge-1", 0, full, 2)[0] == 2
    assert found.find("edge-2", 0, full, 4) == (0, 0.0)  # each edge has its own
    assert found.find("edge-1", 0, relay, 4) == (0, 0.0)  # nothing was measured of a relay's starts
    for prompt in range(caches.prompts + 5):
        found.leave("edge-3", prompt, full)
    assert len(found._there["edge-3"]) == caches.prompts
    assert 0 < found.quality(0.8, cached_case.works[5], 4, 0.9) <= 0.8
    assert found.quality(0.8, cached_case.works[5], 0, 0.0) == 0.8


def test_capacity_is_what_the_curves_say(case):
    per_s, alone = case.capacity("three")
    most = 8 / CURVE[8] / 20
    assert per_s == pytest.approx(1.5 * most, rel=0.1)  # edge-2 is half as fast
    assert alone == pytest.approx(20 * CURVE[1], rel=0.15)


@pytest.mark.parametrize("name", ["ours", "agnostic", "clipper-ha", "clipper-ht", "proteus", "sommelier", "diffserve"])
def test_every_request_has_one_end_and_the_books_balance(case, name):
    outcome = case.run(name, PLACE, 3, "test", 200, {})
    assert set(np.unique(outcome.stage)) <= {DONE, LATE, REFUSED}
    done = outcome.stage == DONE
    deadline = PLACE.deadline * case.capacity("three")[1]
    assert (outcome.seconds[done] <= deadline + 1e-9).all()
    assert (outcome.seconds[outcome.stage == REFUSED] == 0).all()
    assert outcome.seconds[outcome.stage == LATE] == pytest.approx(deadline)
    quality = case.measured("test").quality
    assert (outcome.quality[done] == quality[outcome.prompt[done], outcome.level[done]]).all()
    assert all(0 <= busy <= outcome.ended_s for busy in outcome.busy_s.values())
    again = case.run(name, PLACE, 3, "test", 200, {})
    assert (again.seconds == outcome.seconds).all()  # same arguments, same run
    if name == "clipper-ha":
        assert set(outcome.level[done]) == {0}
    if name == "clipper-ht":
        assert len(set(outcome.level[done])) == 1
    if name in ("proteus", "sommelier", "clipper-ha", "clipper-ht", "diffserve"):
        assert not (outcome.stage == REFUSED).any()


def test_ours_serves_easy_prompts_with_less_work_and_keeps_more_than_full_quality_does(case):
    ours, full = (case.run(name, PLACE, 5, "test", 600, {}) for name in ("ours", "clipper-ha"))
    assert (ours.stage == DONE).mean() > (full.stage == DONE).mean() + 0.1
    done = ours.stage == DONE
    easy = ours.prompt[done] % 2 == 0
    assert ours.level[done][easy].mean() > ours.level[done][~easy].mean()


def test_both_simulations_say_the_same_of_the_same_requests(case):
    """One level, the nodes that `ends_s` names at each arrival: the other simulation is given the very nodes."""
    world, works = case.world("three"), case.works_of("three")
    times = np.cumsum(np.random.default_rng(1).exponential(0.1, 60))
    measured = Measured(["p"] * 60, np.ones((60, 4)), np.ones((60, 4)))

    class Relay:
        placed: list = []  # noqa: RUF012

        def control(self, stations):
            pass

        def choose(self, asked, stations):
            self.placed.append(ends_s(works[1], stations)[1])
            return 1

        def again(self, *_):
            return None

        def ended(self, *_):
            pass

    ours = Service(world, works, measured, Relay(), Demand(times, np.arange(60), 100.0)).run()

    class Same:
        name = "same"

        def decide(self, context, actions):
            wanted = RELAY, Relay.placed[int(context.job.removeprefix("job-"))]
            return certain(self.name, actions, [(str(a.program), a.nodes) for a in actions].index(wanted))

        def learn(self, decision, outcome):
            pass

    prompts = [Prompt(str(i), "?", None, str(i)) for i in range(60)]
    cells = {t: {p.text: ({},) for p in prompts} for t in WORTH}
    scores = Scores(tuple(w.program for w in works), {"test": tuple(prompts)}, cells, ())
    asked = [TimedRequest(i, float(t), prompts[i], 0.5, 100.0, i) for i, t in enumerate(times)]
    theirs = Simulation(world, scores, lambda known: 0.0).run(Same(), asked)
    assert [row.seconds for row in theirs] == pytest.approx(ours.seconds.tolist(), rel=1e-6)


def test_a_crowd_is_planned_for_before_its_first_second_is_over(case, monkeypatch):
    """Ours beside itself, told of its crowds by the second and not of how far requests overran."""
    crowd = Cell(fleet="three", trace="flash", load=1.3, deadline=2.0)
    quick = case.run("ours", crowd, 0, "test", 400, {})
    monkeypatch.setattr(Controller, "surged", False)
    monkeypatch.setattr(Overruns, "observe", lambda *_: None)
    slow = case.run("ours", crowd, 0, "test", 400, {})
    assert (quick.stage == DONE).mean() > (slow.stage == DONE).mean()
    assert (quick.stage == LATE).sum() < (slow.stage == LATE).sum()


def test_a_cascade_draws_again_what_the_judge_finds_worst(case):
    roomy = Cell(fleet="three", trace="poisson", load=1.3, deadline=8.0)
    outcome = case.run("diffserve", roomy, 0, "test", 300, {})
    done = outcome.stage == DONE
    heavy = outcome.level[done] == 0
    assert 0 < heavy.mean() < 1
    assert outcome.seconds[done][heavy].mean() > outcome.seconds[done][~heavy].mean()
    hard = outcome.prompt[done] % 2 == 1
    assert heavy[hard].mean() > heavy[~hard].mean()


def test_what_is_left_to_any_system_is_the_fewest_that_one_server_must_turn_away():
    rng = np.random.default_rng(3)
    for _ in range(30):
        comes = np.sort(rng.uniform(0, 3, 8))
        fewest = next(
            late
            for late in range(9)
            if any(in_time(comes[list(kept)], 1.0, 2.0) for kept in itertools.combinations(range(8), 8 - late))
        )
        assert least_violations(comes, 1.0, 2.0) == fewest / 8
    assert least_violations(np.arange(1000) / 2.0, 1.0, 2.0) == 0.0
    assert least_violations(np.arange(1000) / 4.0, 1.0, 2.0) == pytest.approx(0.5, abs=0.01)


def in_time(comes, deadline_s, per_s):
    """Whether all of these are, one after the other."""
    ends = 0.0
    for each in comes:
        ends = max(ends, each) + 1 / per_s
        if ends > each + deadline_s:
            return False
    return True


def test_no_system_does_more_than_the_most_and_none_has_less_than_what_is_left(case):
    flood = Cell(fleet="three", trace="poisson", load=30.0, deadline=2.0)
    works, stations = case.works_of("three"), stations_of(case.world("three"))
    most = most_per_s(works, stations)
    assert case.capacity("three")[0] < most < 10 * case.capacity("three")[0]
    for name in ("ours", "clipper-ht", "proteus"):
        outcome = case.run(name, flood, 0, "test", 400, {})
        done = outcome.stage == DONE
        assert done.sum() / outcome.ended_s < most
        demand = case.demand(flood, 0, "test", 400)
        assert 1 - done.mean() >= least_violations(demand.arrival_s, demand.deadline_s, most) > 0.5


def test_every_system_states_its_rule():
    for name, kind in systems().items():
        assert kind.rule, name
        assert kind.name, name
        assert msgspec.json.encode(list(kind.space)), name
