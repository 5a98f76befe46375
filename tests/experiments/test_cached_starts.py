"""Cached starts measured: pairs over all similarities, pictures as the pipeline draws them, thresholds that keep a target."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from experiments.cached_starts.calibrate import PAPER, isotonic, rule_of, threshold
from experiments.cached_starts.draw import SOURCE_SEEDS, draw, rows_of
from experiments.cached_starts.pairs import BINS, edited, make_pairs
from experiments.cached_starts.report import text_and_data, write_rules
from experiments.run_folder import open_run
from relay.pipeline import RelayPipeline
from relay.scenes.language import parse
from relay.scenes.sampling import held_out, split_of
from scheduler.load.similarity import PAPER as PAPER_RULE
from scheduler.load.similarity import skip_of
from scheduler.outcomes import write_unit


@pytest.fixture(scope="module")
def pipe():
    return RelayPipeline.from_pretrained("mini-sd3", device="cpu", torch_dtype="fp32")


@pytest.fixture(scope="module")
def pairs(pipe):
    return make_pairs(pipe.family, "validation", 16)


def test_pairs_cover_the_range_of_similarity_and_are_the_same_every_time(pipe, pairs):
    assert make_pairs(pipe.family, "validation", 16) == pairs
    assert all(split_of(pair.scene) == "validation" for pair in pairs)
    inside = [BINS[i % 8] <= pair.similarity < BINS[i % 8 + 1] for i, pair in enumerate(pairs)]
    assert sum(inside) >= 11  # a scene of one object has few sources that are nearly alike
    assert {pair.kind for pair in pairs} == {"wording", "edit", "other"}
    for pair in pairs:
        assert parse(pair.source).text() in orders(pair.source_scene)
        assert (pair.scene == pair.source_scene) == (pair.kind == "wording")


def orders(scene):
    """A scene in the orders in which its groups may be said."""
    return {replace(scene, groups=groups).text() for groups in permutations(scene.groups)}


@pytest.mark.parametrize("changes", [1, 3])
def test_an_edited_scene_is_another_of_its_class(changes):
    rng = np.random.default_rng(0)
    for scene in held_out(25, "train"):
        other = edited(scene, changes, rng)
        assert other != scene
        assert other.complexity == scene.complexity


def test_pictures_are_those_of_the_pipeline(pipe, pairs):
    two, words = pairs[4:6], {"num_inference_steps": 5}
    full, relay = pipe.plan(mode="full-cloud", **words), pipe.plan(handoff=2, **words)
    images = draw(pipe.family, two, [full, relay])
    assert {k for text, k in images if text == str(full)} == {0, 1, 2}
    assert {k for text, k in images if text == str(relay)} == {0, 1}  # at its handoff nothing would be left
    for i, pair in enumerate(two):
        seed = pair.index + SOURCE_SEEDS
        kept = pipe(pair.source, seed=seed, keep=[1], program=full, output_type="latent").kept[1][0]
        for program in (full, relay):
            alone = pipe(pair.prompt, seed=pair.index, cached=kept, program=program, output_type="pt").images[0]
            assert torch.allclose(images[str(program), 1][i], alone, atol=1e-3)
        noise = pipe(pair.prompt, seed=pair.index, program=full, output_type="pt").images[0]
        assert torch.allclose(images[str(full), 0][i], noise, atol=1e-3)
    rows = rows_of(two, [full, relay], images, {"family": "mini-sd3"})
    assert len(rows) == 2 * 5
    assert {row.get("start_skipped") for row in rows} == {None, 1, 2}


def test_the_closest_list_that_does_not_fall():
    assert isotonic(np.array([1.0, 3, 2, 2, 5])).tolist() == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert isotonic(np.array([3.0, 2, 1])).tolist() == [2, 2, 2]


def test_a_threshold_is_the_least_similarity_that_keeps_the_target():
    alike = np.linspace(0, 1, 101)
    loss = np.where(alike < 0.7, -0.5, 0.0)
    none = np.zeros(101, bool)
    assert threshold(alike, loss, 0.8, 0.95, none) == pytest.approx(0.7)
    assert threshold(alike, np.full(101, -0.5), 0.8, 0.95, none) is None
    assert threshold(alike, np.where(alike < 0.95, -0.5, 0.0), 0.8, 0.99, none) is None  # too few are left to say so
    assert threshold(alike, loss, 0.8, 0.95, alike < 0.8) == pytest.approx(0.79)  # one in twenty is borne
    assert threshold(alike, loss, 0.8, 0.95, np.arange(101) % 4 == 0) is None


FULL = "mini-sd3/large:28:0-28/match=direct/codec=fp16/guidance=3/conditioning=encode"
RELAY = "mini-sd3/large:28:0-14/small:28:14-28/match=direct/codec=fp16/guidance=3,3/conditioning=encode"


def rows(split, steps=28, worth=lambda similarity, share: 0.9, program=FULL):
    """Made up: what a start costs depends on similarity and share as `worth` says; from noise a score of 0.9."""
    made = []
    for i, similarity in enumerate(np.linspace(0, 0.99, 100)):
        for share in PAPER:
            start = {"start_similarity": similarity, "start_skipped": skip_of(share, steps)} if share else {}
            score = worth(similarity, share) if share else 0.9
            made.append(
                {"family": "mini-sd3", "program": program, "split": split, "prompt_index": i, "seed": i,
                 "score_attributes": score, "score_strict": 0.0, "score_source_attributes": 0.3} | start
            )  # fmt: skip
    return made


def test_a_report_tells_levels_beside_the_papers_and_writes_what_nodes_read(tmp_path, monkeypatch):
    def worth(similarity, share):
        return 0.9 if similarity >= 2 * share - 0.2 else 0.2

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"config": {"name": "x"}, "config_hash": "0", "dtypes": {"mini-sd3": "bf16"}})
    )
    for split in ("validation", "test"):
        relays = rows(
            split, worth=lambda similarity, share: 0.1, program=RELAY
        )  # its text sorts before the large member's
        write_unit(folder, "outcomes", split, relays + rows(split, worth=worth))
    text, data = text_and_data(open_run(folder))
    found = [value for pair in data["mini-sd3"]["rule"] for value in pair]
    assert found == pytest.approx([0.8, 0.5, 0.6, 0.4, 0.4, 0.3, 0.2, 0.2, 0.0, 0.1], abs=0.011)  # pairs lie 0.01 apart
    assert "| 25 | 14 | 91.5% | ≥ 0.800 | 20 of 100 | 100.0% [100.0%, 100.0%] |" in text
    assert text.index("### the large member alone") < text.index("### relay, 14 large + 14 small")
    assert "| 25 | 14 | 91.5% | ≥ 0.800 | 20 of 100 | 11.1%" in text  # the relay by the same rule
    write_rules(tmp_path / "configs", data)
    from scheduler.load import similarity

    monkeypatch.setattr(similarity, "CONFIGS", tmp_path / "configs")
    assert similarity.read_rule("mini-sd3").allowed(0.65) == 0.4
    assert similarity.read_rule("other").steps == PAPER_RULE


def test_a_family_that_bears_nothing_gets_a_rule_that_allows_nothing():
    import polars as pl

    from experiments.cached_starts.calibrate import paired

    made = rows("validation", worth=lambda similarity, share: 0.1)
    frame = paired(pl.DataFrame(made, infer_schema_length=None))
    assert rule_of(frame, 28) == []
