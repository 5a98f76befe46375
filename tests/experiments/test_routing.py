"""Routers compared: dP and savings as RouteT2I has them, budgets, the routers themselves, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.routing import delta_p as dp
from experiments.routing import paper
from experiments.routing.baselines import ROUTERS, candidates, make
from experiments.routing.baselines.base import pairwise_difference
from experiments.routing.baselines.syntax import noun_count
from experiments.routing.cells import Bench
from experiments.routing.cli import app, load_bench
from experiments.routing.config import read_comparison
from experiments.routing.data import EDGE, FULL, MODES, RELAY, RoutingData, Split
from experiments.routing.embeddings import Embeddings
from experiments.routing.evaluate import evaluate
from experiments.routing.tables import NAMES
from experiments.routing.three_way import WAYS, blend, spend
from relay.errors import BadRequest
from scheduler.outcomes import write_unit
from scheduler.router.settings import METRIC_SETS

WORDS = ("red", "blue", "heart", "circle", "star", "ring", "striped", "huge", "tiny", "plain")
_REST = "match=exact/codec=fp16/guidance=3/conditioning=encode"
PROGRAMS = {
    "full-cloud": (f"mini-sd3/large:28:0-28/{_REST}", 28, 28, 0),
    "relay": (f"mini-sd3/large:28:0-10/small:8:2-8/{_REST.replace('=3', '=3,3')}", 28, 10, 6),
    "edge-only": (f"mini-sd3/small:28:0-28/{_REST}", 28, 0, 28),
}
CONFIG = Path(__file__).parents[2] / "configs" / "experiments" / "routing.yaml"


def drawn(count: int, seed: int, metrics: int = 3) -> Split:
    """Prompts where the word "striped" makes the small member fail, but for noise; metric 0 the large member loses."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(["a", *rng.choice(WORDS, size=rng.integers(3, 8))]) for _ in range(count)]
    hard = np.array([prompt.count("striped") > 0 for prompt in prompts], dtype=float)
    noise = 0.1 * rng.standard_normal((count, 3, metrics))
    quality = np.full((count, 3, metrics), 0.8)
    quality[:, EDGE] -= 0.3 * hard[:, None]
    quality[:, RELAY] -= 0.1 * hard[:, None]
    quality[:, EDGE, 0] += 0.2
    return Split(tuple(prompts), ("",) * count, ("",) * count, (quality + noise).clip(0, 1))


@pytest.fixture(scope="module")
def data() -> RoutingData:
    names = ("large loses", "one", "two")
    programs = {"full-cloud": "", "relay": "", "edge-only": ""}
    return RoutingData("some", "clip", names, programs, drawn(240, 0), drawn(80, 1), drawn(120, 2))


@pytest.fixture(scope="module")
def embeddings(data: RoutingData) -> Embeddings:
    """One vector a word, as a text encoder without context would have it; pooled is their mean."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.standard_normal(12) for word in (*WORDS, "a")}
    prompts = tuple(dict.fromkeys(data.train.prompts + data.validation.prompts + data.test.prompts))
    rows = [np.stack([vectors[word] for word in prompt.split()]) for prompt in prompts]
    pooled = np.stack([row.mean(0) for row in rows]).astype(np.float32)
    return Embeddings(prompts, np.concatenate(rows).astype(np.float16), np.cumsum([len(r) for r in rows]), pooled)


def worth_of(split: Split) -> np.ndarray:
    return dp.worth(split.quality[:, FULL], split.quality[:, EDGE], split.quality[:, FULL])


@pytest.mark.parametrize("router", list(paper.TABLE))
def test_dp_of_the_papers_printed_means_is_its_printed_dp(router: str) -> None:
    means, printed = paper.TABLE[router]
    # four decimals over gaps of 0.0019 and more: rounding alone moves dP by up to 1
    assert dp.delta_p_of_means(means, paper.SMALL, paper.LARGE) == pytest.approx(printed, abs=0.5)


def test_sending_half_by_chance_where_one_of_ten_metrics_is_lost_gives_the_papers_40() -> None:
    rng = np.random.default_rng(0)
    small = rng.random((4000, 10))
    large = small + 0.1 * np.where(np.arange(10) == 4, -1, 1)
    half = np.arange(4000) % 2 == 0
    assert dp.worth(large, small, large)[half].sum() == pytest.approx(40)
    assert dp.delta_p(large, small, large) == pytest.approx(80)


def test_worths_sum_to_dp_also_where_metrics_do_not_apply() -> None:
    rng = np.random.default_rng(1)
    small, large = rng.random((60, 4)), rng.random((60, 4)) + 0.2
    for values in (small, large):
        values[:25, 1] = np.nan
    sent = dp.send(rng.random(60), 0.3)
    routed = np.where(sent[:, None], large, small)
    expected = dp.delta_p_of_means(*(dp.column_means(v).tolist() for v in (routed, small, large)))
    assert dp.worth(large, small, large)[sent].sum() == pytest.approx(expected)
    gap = np.abs(dp.column_means(large) - dp.column_means(small))
    by_prompt = dp.worth_by(large, small, gap, (~np.isnan(small)).mean(0))
    assert 100 * by_prompt.mean() == pytest.approx(dp.delta_p(large, small, large))


def test_a_metric_without_gap_is_refused() -> None:
    same = np.ones((5, 2))
    with pytest.raises(BadRequest, match="no gap"):
        dp.delta_p(same, same, same)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 1.0])
def test_the_budget_is_spent_exactly_and_the_lowest_scores_are_sent(share: float) -> None:
    scores = np.array([3, 1, 1, 1, 2, 0, 5, 4, 1, 1], dtype=float)
    sent = dp.send(scores, share, seed=3)
    assert sent.sum() == int(share * 10 + 1e-9)
    assert not sent.any() or sent.all() or scores[sent].max() <= scores[~sent].min()
    assert len({tuple(dp.send(scores, 0.3, seed)) for seed in range(20)}) > 1  # ties are broken by chance
    assert dp.tied(scores, 0.3) == 0.5
    assert dp.tied(scores, 0.6) == 0.0


def test_savings_fall_with_the_target_and_say_never_for_what_is_out_of_reach(data: RoutingData) -> None:
    value = worth_of(data.test)
    line = dp.curve(np.random.default_rng(0).random(len(value)), value)
    found = dp.savings(line, [1, 5, 10, 20, 1000])
    reached = [s for s in found if s is not None]
    assert found[-1] is None
    assert reached == sorted(reached, reverse=True)
    share = 1 - reached[0] / 100
    at = round(share * len(value))
    assert line[at] >= 1 > line[:at].max()


def test_no_router_is_above_the_oracle_at_any_share(data: RoutingData, embeddings: Embeddings) -> None:
    value = worth_of(data.test)
    best = make("oracle-dp", embeddings, {})
    best.fit(data, 0)
    ceiling = dp.curve(best.score(data.test), value)
    for name in ("random", "noun-count", "oracle-prs"):
        router = make(name, embeddings, {})
        router.fit(data, 0)
        assert (dp.curve(router.score(data.test), value) <= ceiling + 1e-9).all()


@pytest.mark.parametrize("name", ["routellm-bert", "routellm-mf", "hybrid-llm", "zooter", "boosted-tree"])
def test_every_learner_finds_what_decides_and_repeats_with_its_seed(
    name: str, data: RoutingData, embeddings: Embeddings
) -> None:
    settings = {"routellm-mf": {"lr": 1e-2}, "boosted-tree": {}}.get(name, {"lr": 3e-3, "width": 16})
    router, again = (make(name, embeddings, settings) for _ in range(2))
    for each in (router, again):
        each.fit(data, 1)
    blind = replace(data.test, quality=np.full_like(data.test.quality, np.nan))  # a router sees prompts alone
    scores = router.score(blind)
    assert np.array_equal(scores, again.score(data.test))
    assert scores.shape == (len(data.test),)
    assert ((scores >= 0) & (scores <= 1)).all()
    hard = np.array(["striped" in prompt for prompt in data.test.prompts])
    sent = dp.send(scores, float(hard.mean()))
    assert (sent == hard).mean() > 0.9


def test_three_way_values_of_learners_put_the_relay_between(data: RoutingData, embeddings: Embeddings) -> None:
    hard = np.array(["striped" in prompt for prompt in data.test.prompts])
    for name, settings in (("zooter", {"lr": 3e-3, "width": 16}), ("boosted-tree", {})):
        router = make(name, embeddings, settings)
        router.fit(data, 0)
        full, relay, edge = router.values(data.test)[hard].mean(0)  # type: ignore[attr-defined]
        assert edge < relay < full


def test_the_soft_labels_spread_is_the_mean_over_all_pairs() -> None:
    labels = np.random.default_rng(0).random(50)
    assert pairwise_difference(labels) == pytest.approx(np.abs(labels[:, None] - labels).mean())


def test_nouns_are_counted_without_the_scene_language() -> None:
    assert noun_count("three dogs and a cat") == 4
    assert noun_count("a man holding an umbrella under a bridge at night") > noun_count("a man")


def test_candidates_begin_with_the_defaults_and_are_as_many_for_all() -> None:
    for name, router in ROUTERS.items():
        tried = candidates(name, 6)
        assert tried[0] == {}
        assert len(tried) == (6 if getattr(router, "SPACE", None) else 1)
        assert len({json.dumps(each, sort_keys=True) for each in tried}) == len(tried)
    with pytest.raises(BadRequest, match="no router is called 'best'"):
        candidates("best", 3)


@pytest.mark.parametrize("ways", list(WAYS))
def test_spending_keeps_the_budget_and_buys_no_loss(ways: str) -> None:
    rng = np.random.default_rng(0)
    values, costs = rng.standard_normal((80, 3)), np.array([1.0, 0.4, 0.2])
    before = -np.inf
    for budget in (0.2, 0.25, 0.4, 0.7, 1.0):
        modes = spend(values, costs, budget, WAYS[ways])
        assert costs[modes].mean() <= budget + 1e-9
        assert set(modes) <= set(WAYS[ways])
        chosen = values[np.arange(80), modes]
        assert (chosen >= values[:, EDGE]).all()
        assert chosen.sum() >= before
        before = chosen.sum()
    assert before == pytest.approx(values[:, WAYS[ways]].max(1).sum())  # all that is paid for is the best of all


def test_spending_is_near_the_best_of_all_assignments() -> None:
    rng = np.random.default_rng(2)
    values, costs = rng.random((6, 3)), np.array([1.0, 0.4, 0.2])
    every = np.stack(np.meshgrid(*[range(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
    for budget in (0.3, 0.5, 0.8):
        allowed = every[costs[every].mean(1) <= budget + 1e-9]
        best = values[np.arange(6), allowed].sum(1).max()
        found = values[np.arange(6), spend(values, costs, budget, WAYS["three-way"])].sum()
        assert best - found <= (values.max(1) - values.min(1)).max()  # greedy on hulls misses one upgrade at most


def test_without_a_router_the_best_mixture_of_two_modes_is_taken() -> None:
    costs, worth = np.array([1.0, 0.4, 0.2]), np.array([1.0, 0.9, 0.0])
    assert blend(worth, costs, 0.3, WAYS["three-way"]) == pytest.approx([0, 0.5, 0.5])
    assert blend(worth, costs, 0.7, WAYS["three-way"]) == pytest.approx([0.5, 0.5, 0])
    assert blend(worth, costs, 0.6, WAYS["two-way"]) == pytest.approx([0.5, 0, 0.5])
    with pytest.raises(BadRequest, match="does not pay for edge-only"):
        spend(np.zeros((4, 3)), costs, 0.1, WAYS["two-way"])


def test_cells_are_fitted_once_and_figures_read_off_them(
    data: RoutingData, embeddings: Embeddings, tmp_path: Path
) -> None:
    bench = Bench(data, embeddings, tmp_path)
    config = msgspec.structs.replace(read_comparison(CONFIG), seeds=2, three_way=[])
    names = ("random", "boosted-tree", "oracle-dp")
    cells = {name: [bench.cell(name, {}, seed) for seed in range(2)] for name in names}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = {name: [Bench(data, embeddings, tmp_path).cell(name, {}, seed) for seed in range(2)] for name in names}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert again == cells
    found = evaluate(bench, cells, config, "validation")["routers"]
    assert found["random"]["dp_clear"][0] < found["boosted-tree"]["dp_clear"][0] <= found["oracle-dp"]["dp_clear"][0]
    for row in found.values():
        assert row["sent"] == 0.5
        assert row["dp_clear"][1] <= row["dp_clear"][0] <= row["dp_clear"][2]
    other = Bench(replace(data, train=drawn(400, 5)), embeddings, tmp_path)
    assert other._digest("random", {}) != bench._digest("random", {})


def test_metrics_inside_noise_are_told_from_those_outside(data: RoutingData) -> None:
    rng = np.random.default_rng(0)
    small = rng.random((300, 2))
    large = small + np.array([0.0, 0.2]) + 0.1 * rng.standard_normal((300, 2))
    noise, gap = dp.gaps(("noise", "gap"), small, large)
    assert not noise.clear
    assert gap.clear
    assert gap.low < gap.gap < gap.high
    assert gap.wins > 0.9


def test_the_shipped_config_names_routers_that_there_are() -> None:
    config = read_comparison(CONFIG)
    assert set(config.routers) <= set(ROUTERS)
    assert set(config.three_way) <= set(config.routers)
    assert config.seeds >= 5


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "routing.yaml"
    wrong.write_text("runs: [a]\nfamilies: [b]\nrouters: [random]\nbudget: 3\n")
    with pytest.raises(BadRequest, match="budget"):
        read_comparison(wrong)


def stored(folder: Path, split: str, drawn_as: Split, seed: int) -> None:
    """Rows of the outcome store for a split: each mode's program, ten qualities out of three."""
    rows = []
    for mode, (program, steps, handoff, small) in PROGRAMS.items():
        for i, prompt in enumerate(drawn_as.prompts):
            quality = drawn_as.quality[i, MODES.index(mode)]
            rows.append({
                "family": "mini-sd3", "method": "program", "program": program, "mode": mode, "steps_total": steps,
                "handoff": handoff, "small_steps": small, "split": split, "prompt_index": i, "prompt": prompt, "scene": "",
                "complexity": "", "seed": seed,
            } | {f"score_{name}": float(quality[k % 3]) for k, name in enumerate(METRIC_SETS["clip"])})  # fmt: skip
    write_unit(folder, "outcomes", f"{split}-{seed}", rows)


def test_the_command_writes_tables_data_and_pictures_and_goes_on_where_it_was(
    data: RoutingData, tmp_path: Path
) -> None:
    run, seeds, folder = tmp_path / "run", tmp_path / "seeds", tmp_path / "cells"
    for split in ("train", "validation", "test"):
        stored(run, split, getattr(data, split), 0)
    stored(seeds, "test", replace(data.test, quality=drawn(120, 2).quality), 1)
    config = tmp_path / "routing.yaml"
    config.write_bytes(msgspec.yaml.encode({
        "runs": [str(run)], "families": ["mini-sd3"], "metrics": ["clip"], "folder": str(folder), "seeds": 2, "tries": 2,
        "routers": ["random", "boosted-tree", "oracle-dp"], "three_way": ["boosted-tree"], "budgets": [0.3, 0.6],
        "other_seeds": [str(seeds)], "curves": str(Path(__file__).parents[2] / "docs" / "results" / "rise"),
    }))  # fmt: skip
    said = CliRunner().invoke(app, ["table", str(config), "--out", str(tmp_path / "routing.md")])
    assert said.exit_code == 0, said.output
    text, found = (tmp_path / "routing.md").read_text(), json.loads((tmp_path / "routing.json").read_text())
    figures = found["families"]["mini-sd3, clip"]
    for name in ("random", "boosted-tree", "oracle-dp", "oracle-seeds"):
        assert f"| {NAMES[name]} |" in text
        assert figures["routers"][name]["sent"] == 0.5
    dp_of = {name: row["dp_clear"][0] for name, row in figures["routers"].items()}
    assert dp_of["random"] < dp_of["oracle-seeds"] <= dp_of["oracle-dp"]
    assert {row["router"] for row in figures["three_way"]["rows"]} == {"no router", "oracle-dp", "boosted-tree"}
    assert all(row["cost"] <= row["budget"] + 1e-9 for row in figures["three_way"]["rows"])
    assert (
        (tmp_path / "routing-dp.png").read_bytes()[:4] == (tmp_path / "routing-cost.png").read_bytes()[:4] == b"\x89PNG"
    )
    cells = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert len(cells) == 2 + 3 + 2  # two seeds; two settings with seed 0 and the better one with seed 1; two seeds
    assert CliRunner().invoke(app, ["table", str(config), "--out", str(tmp_path / "again.md")]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == cells


def test_a_run_without_test_prompts_is_refused(data: RoutingData, tmp_path: Path) -> None:
    stored(tmp_path / "run", "train", data.train, 0)
    config = msgspec.structs.replace(read_comparison(CONFIG), runs=[str(tmp_path / "run")])
    with pytest.raises(BadRequest, match="no validation and no test prompts of mini-sd3"):
        load_bench(config, "mini-sd3", "clip", "test")
