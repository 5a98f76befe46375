"""The scheduling table: cells are run once, settings are searched alike, figures are what the rows say."""

import json
import re

import msgspec
import numpy as np
import polars as pl
import pytest
import yaml

from experiments.simulate import off_policy, warm
from experiments.simulate.cells import read_cells, run_cells
from experiments.simulate.charts import draw_charts
from experiments.simulate.check import Asked, compare, nodes_of, simulate
from experiments.simulate.report import report
from experiments.simulate.scheduling import Bench, Contender, Range, Scheduling, read_scheduling
from experiments.simulate.search import drawn, search, write_tuned
from experiments.simulate.summary import moving, over_seeds, ratio, recovery, rows_of
from experiments.simulate.views import Blind
from experiments.simulate.world import Costs, read_timing
from relay.errors import BadRequest
from scheduler.bandit_file import read_bandit
from scheduler.outcomes import write_unit

CURVE = {1: 0.010, 2: 0.013, 4: 0.020, 8: 0.030}
OPTIONS = "match=exact/codec=fp16"
PROGRAMS = {
    "full-cloud": f"tiny/large:10:0-10/{OPTIONS}/guidance=3/conditioning=encode",
    "relay": f"tiny/large:10:0-4/small:10:4-10/{OPTIONS}/guidance=3,3/conditioning=encode",
    "fast": f"tiny/large:10:0-4/small:4:2-4/{OPTIONS}/guidance=3,3/conditioning=encode",
    "edge-only": f"tiny/small:10:0-10/{OPTIONS}/guidance=3/conditioning=encode",
}
WORTH = {"full-cloud": 0.9, "relay": 0.85, "fast": 0.8, "edge-only": 0.3}
CLASSES = ("1", "4", "letters")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An outcome store of four programs; letters are drawn right by the large member alone."""
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    rows = []
    for split in ("train", "validation", "test"):
        for i in range(30):
            complexity = CLASSES[i % 3]
            for name, text in PROGRAMS.items():
                right = {"score_letters": float(name == "full-cloud")} if complexity == "letters" else {}
                rows.append(
                    {"method": "program", "family": "tiny", "program": text, "split": split, "prompt_index": i,
                     "prompt": f"{split} {i}" + (" with the word 'HI'" if right else ""), "complexity": complexity,
                     "seed": i, "score_attributes": WORTH[name] + 0.05 * rng.random(), **right}
                )  # fmt: skip
    write_unit(folder, "outcomes", "all", rows)
    return folder


@pytest.fixture(scope="module")
def config(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    reward = {
        "scales": {"scene": 1, "words": 1, "seconds": 0.3, "memory_mb": 10, "device_steps": 10},
        "tasks": {"general": {"scene": 1}, "text": {"scene": 0.5, "words": 0.5}}, "time": {"quality": 0.2, "speed": 0.8},
        "memory": 0.05, "device": {"normal": 0.0, "low_battery": 0.1}, "memory_mb": {"tiny": {"large": 8, "small": 2}},
    }  # fmt: skip
    (folder / "reward.yaml").write_text(yaml.safe_dump(reward))
    curves = {"large": CURVE, "small": {batch: s / 4 for batch, s in CURVE.items()}}
    said = {
        "name": "tiny", "store": [str(store)], "reward": str(folder / "reward.yaml"), "description": "For tests.",
        "requests": 220, "learn": 40, "seeds": 2, "tuned": str(folder / "tuned.yaml"),
        "world": {
            "nodes": {
                "edge": {"role": "edge", "families": {"tiny": ["large"]}},
                "phone": {"role": "device", "families": {"tiny": ["small"]}, "link": "wifi"},
            },
            "timing": {"tiny": {"curves": curves, "latent_bytes": 10_000, "image_bytes": 20_000}},
        },
        "asking": {"arrivals": {"arrivals": "poisson", "rate_per_s": 4.0}},
        "search": {"configurations": 3, "learn": 30, "requests": 40, "seeds": [7]},
        "arms": {"whole": [{"whole": True}]},
        "contenders": {
            "oracle": {"policy": "oracle"},
            "random": {"policy": "random"},
            "full": {"policy": "fixed", "options": {"program": PROGRAMS["full-cloud"]}, "scenarios": ["plain"]},
            "linucb": {"policy": "linucb", "space": {"alpha": {"low": 0.01, "high": 1, "log": True}, "least_pulls": [1, 2]}},
            "blind": {"policy": "linucb", "of": "linucb", "blind": True, "scenarios": ["plain"]},
            "static": {
                "policy": "linucb", "of": "linucb", "options": {"least_pulls": None}, "static_reward": True, "frozen": True,
                "scenarios": ["plain"],
            },
            "served": {
                "policy": "learned", "options": {"router": False, "epsilon": 0.05, "settings.power_t": 0},
                "scenarios": ["plain"],
            },
            "whole": {"policy": "random", "arms": "whole", "scenarios": ["plain"]},
        },
        "shifts": {"slow": {"node": "edge", "pace": 4, "says": "a slow edge"}, "mix": {"classes": ["letters"]}},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture(scope="module")
def ran(config, tmp_path_factory):
    """The table, searched and run once."""
    folder, said = tmp_path_factory.mktemp("run"), []
    bench = Bench(read_scheduling(config))
    write_tuned(bench, search(bench, folder, None, said.append), config.parent / "tuned.yaml")
    bench = Bench(read_scheduling(config))
    run_cells(bench, folder, None, said.append)
    return bench, folder, said


def test_every_cell_is_run_once(ran):
    bench, folder, said = ran
    cells = read_cells(bench, folder)
    assert set(cells) == {(s, n) for n in bench.config.contenders for s in bench.scenarios(n)}
    assert all(len(frames) == 2 for frames in cells.values())
    before = len(said)
    run_cells(bench, folder, None, said.append)
    assert len(said) == before  # nothing was run again
    for frames in cells.values():
        for frame in frames:
            assert frame.filter(pl.col("phase") == "learn").height == 40
            assert frame.filter(pl.col("phase") == "test")["index"].to_list() == list(range(220))


def test_policies_meet_the_same_requests(ran):
    bench, folder, _ = ran
    cells = read_cells(bench, folder)
    for scenario in ("plain", "mix"):
        asked = [cells[scenario, name][1].select("complexity", "preference") for name in ("oracle", "random", "linucb")]
        assert asked[0].equals(asked[1])
        assert asked[0].equals(asked[2])
    mixed = cells["mix", "random"][0].filter(pl.col("phase") == "test")
    assert set(mixed["complexity"][110:]) == {"letters"}
    assert set(mixed["complexity"][:110]) == set(CLASSES)


def test_arms_and_settings_are_those_asked_for(ran):
    bench, folder, _ = ran
    cells = read_cells(bench, folder)
    assert PROGRAMS["fast"] not in set(cells["plain", "whole"][0]["program"])
    assert PROGRAMS["fast"] in set(cells["plain", "random"][0]["program"])
    assert set(cells["plain", "full"][0]["mode"]) == {"full-cloud"}
    assert bench.options("blind") == bench.options("linucb") == bench.tuned["linucb"]
    assert bench.options("static") == {k: v for k, v in bench.tuned["linucb"].items() if k != "least_pulls"}
    assert isinstance(bench.policy("blind", 0), Blind)
    served = bench.policy("served", 0)
    assert served.name == "learned"
    assert served.bandit.arguments[:3] == ["--cb_explore_adf", "--epsilon", "0.05"]
    assert served.bandit.arguments[-2:] == ["--power_t", "0"]
    assert served.bandit.time_scale_s == bench.reward.scales["seconds"]


def test_search_tries_each_configuration_on_validation(ran):
    bench, _, said = ran
    kept = msgspec.yaml.decode((bench.config.tuned and open(bench.config.tuned, "rb").read()) or b"")  # noqa: PTH123, SIM115
    found = kept["contenders"]["linucb"]
    assert len(found["tried"]) == 3
    assert found["tried"][0]["options"] == {}
    assert found["reward"] == max(np.mean(each["reward"]) for each in found["tried"])
    assert kept["searched"]["split"] == "validation"
    assert len([line for line in said if re.match(r"linucb \d/3", line)]) == 3
    space = Contender(policy="linucb", space={"a": Range(low=0.1, high=10, log=True), "b": [1, 2]})
    many = drawn(space, 200, 0)
    assert all(0.1 <= each["a"] <= 10 and each["b"] in (1, 2) for each in many[1:])
    assert 0.3 < np.median([each["a"] for each in many[1:]]) < 3
    assert many == drawn(space, 200, 0)


def test_rewards_are_the_rows(ran):
    bench, folder, _ = ran
    cells = read_cells(bench, folder)
    rows = {row["contender"]: row for row in rows_of(bench, cells, "plain")}
    test = [frame.filter(pl.col("phase") == "test") for frame in cells["plain", "linucb"]]
    assert rows["linucb"]["reward"][0] == pytest.approx(np.mean([frame["reward"].mean() for frame in test]))
    assert np.allclose(
        np.tanh(test[0]["quality"] + test[0]["time"]), test[0]["reward"], atol=0.15
    )  # the rest is memory
    assert rows["oracle"]["way"][0] == pytest.approx(1.0)
    assert rows["random"]["way"][0] == pytest.approx(0.0)
    assert rows["random"]["way"][0] < rows["linucb"]["way"][0] < 1.0
    assert "way" not in rows["whole"]  # no oracle over those arms is there


def test_the_report_says_what_was_run(ran, tmp_path):
    bench, folder, _ = ran
    cells = read_cells(bench, folder)
    charts = draw_charts(bench, cells, tmp_path, "scheduling")
    assert sorted(path.name for path in charts) == [
        f"scheduling-{n}.png" for n in ("ablations", "mix", "plain", "slow")
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in charts)
    text, data = report(bench, cells, charts)
    json.dumps(data)
    for said in ("luck", "## Ablations", "## Shift: slow", "a slow edge", "![scheduling: plain]"):
        assert said in text, said
    assert data["shifts"]["slow"]["recovery"]["oracle"]["requests"] == 0


def test_a_stale_cell_is_not_read(ran, config, tmp_path):
    _, folder, _ = ran
    other = msgspec.structs.replace(read_scheduling(config), requests=100)
    assert not any(read_cells(Bench(other), folder).values())


def recovering(config, at, took):
    """A bench whose linucb loses its way for `took` requests after a shift."""
    count = 1000
    said = read_scheduling(config)
    shifts = {"slow": msgspec.structs.replace(said.shifts["slow"], at=at / count)}
    bench = Bench(msgspec.structs.replace(said, requests=count, shifts=shifts))
    rng = np.random.default_rng(1)

    def frames(level):
        return [
            pl.DataFrame(
                {"reward": level(np.arange(count)) + 0.02 * rng.standard_normal(count), "phase": ["test"] * count}
            )
            for _ in range(10)
        ]

    lost = lambda i: np.where((i >= at) & (i < at + took), 0.3, 0.75)  # noqa: E731
    cells = {
        ("slow", "oracle"): frames(lambda i: 0.8 + 0 * i), ("slow", "random"): frames(lambda i: 0.2 + 0 * i),
        ("slow", "linucb"): frames(lost),
    }  # fmt: skip
    return bench, cells


@pytest.mark.parametrize("took", [0, 150, 300])
def test_recovery_is_when_the_regret_is_what_it_was(config, took):
    bench, cells = recovering(config, 500, took)
    found = recovery(bench, cells, "slow", "linucb")
    # A window of 100 is good while at most some 13 of its requests are not.
    assert found["requests"] == pytest.approx(max(took - 13, 0), abs=4)
    assert found["low"] <= found["requests"] <= found["high"]
    bench, cells = recovering(config, 500, 500)
    assert recovery(bench, cells, "slow", "linucb")["requests"] is None


def test_intervals_hold_the_mean():
    values = np.random.default_rng(0).normal(1.0, 0.1, 10)
    mean, low, high = over_seeds(values)
    assert low < mean < high
    assert mean == pytest.approx(values.mean())
    assert ratio(2 * values, values) == pytest.approx((2.0, 2.0, 2.0))
    assert moving(np.arange(10.0)[None], 4)[0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contenders": {"a": {"policy": "random", "of": "b"}}}, "no contender 'b'"),
        ({"contenders": {"a": {"policy": "random", "arms": "b"}}}, "`arms` has no 'b'"),
        ({"contenders": {"a": {"policy": "random", "scenarios": ["b"]}}}, "unknown scenario b"),
        ({"shifts": {"a": {"node": "edge"}}}, "needs one of the two"),
        ({"shifts": {"a": {}}}, "changes a node"),
        ({"requestss": 3}, "requestss"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, tmp_path, change, said):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    with pytest.raises(BadRequest, match=said):
        read_scheduling(path)


def test_timing_of_a_run(tmp_path):
    curve = [{"family": "tiny", "member": "large", "batch": b, "step_s": s} for b, s in CURVE.items()]
    write_unit(tmp_path, "curves", "all", curve)
    with pytest.raises(BadRequest, match="no step-time curves or no times"):
        read_timing(str(tmp_path))
    times = [
        {
            "family": "tiny",
            "method": "program",
            "program": "p",
            "link": "none",
            "encode_s": e,
            "decode_s": 0.02,
            "handoff_s": h,
        }
        for e, h in ((0.01, 0.0), (0.03, 0.001), (0.02, 0.003))
    ]
    write_unit(tmp_path, "times", "all", times)
    assert read_timing(str(tmp_path)) == {
        "tiny": Costs(curves={"large": CURVE}, encode_s=0.02, decode_s=0.02, handoff_s=0.002)
    }


def test_the_checks_own_simulation():
    """Requests one after another take what their stages take; a table says how far off."""
    costs = Costs(
        curves={"large": CURVE, "small": CURVE},
        encode_s=0.004,
        decode_s=0.003,
        handoff_s=0.001,
        latent_bytes=1,
        image_bytes=1,
    )
    real = [
        Asked(10.0 * i, f"prompt {i}", PROGRAMS[name], 0.1)
        for i, name in enumerate(("full-cloud", "relay", "edge-only"))
    ]
    found = simulate("tiny", costs, real, 0.02, nodes_of("tiny", None, 8, 1.0))
    assert found == pytest.approx(
        [0.02 + 0.004 + 0.1 + 0.003, 0.02 + 0.004 + 0.1 + 0.001 + 0.003, 0.02 + 0.004 + 0.1 + 0.003]
    )
    text, data = compare(real, found)
    assert data["programs"]["all"]["off"] == pytest.approx(np.mean(found) / 0.1 - 1)
    assert "| all | 3 |" in text


def test_the_shipped_config_is_one():
    from pathlib import Path

    for path in Path("configs/experiments").glob("scheduling*.yaml"):
        if "contenders:" in path.read_text() and "tuned" not in path.name:
            assert isinstance(read_scheduling(path), Scheduling)


def test_a_warm_start_is_learned_in_one_world_and_judged_in_another(config, tmp_path):
    bench = Bench(read_scheduling(config))
    nodes = {
        "far": {"role": "edge", "families": {"tiny": ["large"]}, "data": "tcp://127.0.0.1:1", "pace": 3},
        "tablet": {"role": "device", "families": {"tiny": ["small"]}, "link": "lte"},
    }
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump({"nodes": nodes}))
    options, model, said = {"router": False}, tmp_path / "bandit.model", []
    assert warm.learn(bench, model, 300, options) == read_bandit(model).learned > 250
    found = warm.check(bench, model, tmp_path / "elsewhere.yaml", 2, options, said.append)
    assert {name: np.shape(rows) for name, rows in found.items()} == dict.fromkeys(found, (2, len(warm.SPANS)))
    first = {name: np.mean(rows, 0)[0] for name, rows in found.items()}
    assert first["warm"] > first["random"]
    text = warm.table(found, 300, tmp_path / "elsewhere.yaml")
    assert text.count("±") == 4 * len(warm.SPANS)


def test_off_policy_estimates_stand_beside_the_truth(config):
    bench, said = Bench(read_scheduling(config)), []
    found = off_policy.measure(bench, "whole", "tiny", 6, 150, said.append)
    assert set(found) == {
        f"{world}, {policy}" for world in ("rare", "loaded") for policy in ("greedy", "bandit, frozen")
    }
    for row in found.values():
        assert row["actions"] == 3  # full-cloud, relay and edge-only on the nodes that there are
        for name in off_policy.ESTIMATORS:
            assert 0 <= row[name]["coverage"] <= 1
    rare = found["rare, greedy"]
    assert abs(rare["snips"]["mean"] - rare["truth"]) < 4 * (rare["snips"]["error"] + rare["truth_error"])
    assert len(said) == 4
    assert off_policy.table(found).count("%") >= 12
    with pytest.raises(BadRequest, match="needs a choice"):
        off_policy.measure(bench, "whole", "none", 2, 20, said.append)
