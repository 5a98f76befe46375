"""`relay-experiment run`: what a run holds, and that killing, sharding and changing it does what one expects."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import msgspec
import polars as pl
import pytest
import yaml
from tiny import write_family

from experiments.cli import app
from experiments.compare import compare
from experiments.grid import Experiment, read_experiment, units_of
from experiments.report import write_report
from experiments.run import prepare, run
from experiments.run_folder import merge, open_run, pack
from experiments.statistics import interval
from nodes.cli import run as run_app
from relay.deviation import intensity
from relay.errors import BadRequest
from relay.pipeline import RelayPipeline
from scheduler.outcomes import image_path, pixels_hash

PROMPTS = [f"a {a} {b}" for a in ("red", "blue", "green") for b in ("circle", "square")] + ["a circle", "a square"]
SCALED = {"real_step_s": 0.1, "stands_for": "sdxl", "source": "a test"}
VOLATILE = ["commit", "machine", "versions"]


class Brightness:
    """A metric of one's own, named in YAML as test_run:Brightness."""

    name, columns, needs_reference = "brightness", ("brightness", "apart"), True

    def missing(self):
        return None

    def score(self, images, prompts, references):
        apart = (images - references).abs().mean((1, 2, 3))
        return {"brightness": images.mean((1, 2, 3)).tolist(), "apart": apart.tolist()}


@pytest.fixture(scope="module")
def config(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("experiment")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    families = [
        write_family(root / f"tiny-{name}.yaml", folder, name, small={"scheduler": "scheduler_small"} if name == "sdxl" else {})
        for name, folder in checkpoints.items()
    ]  # fmt: skip
    body = {
        "name": "tiny",
        "workload": {"name": "file", "path": str(root / "prompts.txt"), "split": "all", "count": 8},
        "families": [str(f) for f in families],
        "programs": [{"mode": "full-cloud"}, {"mode": "relay", "handoff": [0.5, 1], "small_steps": [None, 4]},
                     {"mode": "edge-only"}],
        "codec": ["fp16", "int8"],
        "matching": ["exact"],
        "seeds": [0, 1],
        "metrics": ["test_run:Brightness"],
        "deviation": 2,
        "links": ["wifi", {"name": "far", "like": "lte", "scaled": SCALED}],
        "times": {"repeats": 1, "curve": [1, 2]},
        "batch": 4,
    }  # fmt: skip
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(prepare(read_experiment(config), str(config)), folder)
    return open_run(folder)


def rows(folder: Path) -> pl.DataFrame:
    return open_run(folder).outcomes.drop(VOLATILE)


def changed(config: Path, tmp_path: Path, **change) -> Path:
    body = {k: v for k, v in (yaml.safe_load(config.read_text()) | change).items() if v != "drop"}
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_each_row_is_one_program_prompt_and_seed(whole):
    frame = whole.outcomes
    assert frame.height == frame.select("family", "program", "prompt", "seed").unique().height
    # full-cloud and edge-only once, a relay once a handoff step, small steps and codec
    assert set(frame.group_by("family").agg(pl.col("program").n_unique())["program"]) == {2 + 2 * 2 * 2}
    assert set(frame["prompt"]) == set(PROMPTS)
    assert frame["seed"].n_unique() == 16
    assert frame["config_hash"].unique().to_list() == [whole.config_hash]
    assert all(table["dtype"].unique().to_list() == ["fp32"] for table in (frame, whole.times, whole.curves))
    relays = frame.filter(pl.col("mode") == "relay")
    assert (relays["latent_bytes"] > 0).all()
    assert (frame.filter(pl.col("mode") == "full-cloud")["latent_bytes"] == 0).all()
    assert set(frame["handoff"]) == {0, 1, 2, 4}


def test_the_reference_is_the_full_cloud_image_of_the_same_prompt_and_seed(whole):
    frame = whole.outcomes
    assert (frame.filter(pl.col("mode") == "full-cloud")["score_apart"] == 0).all()
    assert (frame.filter(pl.col("mode") == "edge-only")["score_apart"] > 0).all()


def test_images_are_stored_once_under_their_content(whole):
    import numpy as np

    digests = whole.outcomes["image"].unique().to_list()
    files = list((whole.folder / "images").rglob("*.png"))
    assert len(files) == len(digests)
    for digest in digests[:5]:
        pixels = np.asarray(whole.image(digest))
        assert pixels_hash(pixels.tobytes(), pixels.shape) == digest


def test_the_intensity_of_the_first_prompts_of_a_unit_is_watched(whole):
    relays = whole.outcomes.filter(pl.col("mode") == "relay")
    watched = relays.filter(pl.col("deviation_mean").is_not_null())
    assert set(watched["prompt_index"]) == {0, 1, 4, 5}
    assert (watched["intensity"].list.len() == watched["small_steps"]).all()
    assert (watched["deviation_max"] >= watched["deviation_mean"]).all()


def test_the_intensity_is_recorded_over_the_whole_way(config, whole):
    """Up to the handoff it is that of the latent which a pipeline of one's own hands over at every step."""
    relays = whole.outcomes.filter(
        pl.col("deviation_mean").is_not_null(), pl.col("family") == "tiny-sdxl", codec="fp16"
    )
    assert (relays["intensity_prefix"].list.len() == relays["handoff"]).all()
    assert whole.outcomes.filter(pl.col("mode") != "relay")["intensity_prefix"].is_null().all()
    pipe = RelayPipeline.from_pretrained(config.parent / "tiny-sdxl.yaml")
    row = relays.filter(handoff=2).row(0, named=True)
    for s, recorded in enumerate(row["intensity_prefix"], 1):
        handed = pipe.start(
            row["prompt"], num_inference_steps=4, handoff=s, matching="exact", codec="fp32", seed=row["seed"]
        )
        assert intensity(handed.latent).item() == pytest.approx(recorded, rel=1e-4)
    earlier = relays.filter(handoff=1, prompt=row["prompt"], seed=row["seed"])
    assert earlier["intensity_prefix"].to_list() == [row["intensity_prefix"][:1]] * 2  # both numbers of small steps


def test_the_codecs_error_of_each_handoff_is_stored(whole):
    frame = whole.outcomes
    assert frame.filter(pl.col("mode") != "relay")["codec_error"].is_null().all()
    errors = {codec: frame.filter(mode="relay", codec=codec)["codec_error"] for codec in ("fp16", "int8")}
    # to nearest, fp16 is off by at most 2^-11 of a value, int8 by half a 255th of its channel's range
    assert 0 < errors["fp16"].min() <= errors["fp16"].max() <= 2**-11
    assert 1e-3 < errors["int8"].min() <= errors["int8"].max() < 2e-2
    assert errors["int8"].n_unique() > 16  # each prompt its own


def test_times_say_their_measure_and_pay_for_what_is_sent(whole):
    times = whole.times
    assert times["measure"].unique().to_list() == ["latency, batch 1"]
    assert set(times["link_kind"]) == {"none", "as given", "scaled"}
    assert times["link"].n_unique() == 1 + 1 + 2  # the scaled link's lambda is each family's own
    sent = times.filter(pl.col("link_kind") != "none").with_columns(
        pl.col("program").str.contains("large:4:0-4").alias("full")
    )
    assert (sent.filter(pl.col("full"))["return_s"] > 0).all()
    assert (sent.filter(pl.col("full"))["transfer_s"] == 0).all()
    relays = sent.filter(pl.col("program").str.contains("/small:") & pl.col("program").str.contains("/large:"))
    assert (relays["transfer_s"] > 0).all()
    assert set(whole.curves["batch"]) == {1, 2}


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once: processes forked from it start at once, and are as real as any."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run", "experiments.timing", "tiny"])
    here = Path(__file__)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here.parents[1]), str(here.parents[2])])
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def command(words: list[str], said: Path, largest_file: int | None) -> None:
    """`relay-experiment WORDS` as a process of its own, with what it says in the file `said`."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["relay-experiment", *words]
    run_app(app)


def start_process(processes, config: Path, folder: Path, said: Path, largest_file: int | None = None):
    words = ["run", str(config), "--out", str(folder), "--threads", "1"]
    process = processes.Process(target=command, args=(words, said, largest_file))
    process.start()
    return process


def test_a_run_killed_three_times_ends_as_an_undisturbed_one(config, whole, processes, tmp_path):
    folder, said = tmp_path / "killed", tmp_path / "said.txt"
    dice = random.Random(5)
    for _ in range(3):
        done = len(list(folder.glob("outcomes/*.parquet")))
        work = start_process(processes, config, folder, said)
        while work.is_alive() and len(list(folder.glob("outcomes/*.parquet"))) <= done:
            time.sleep(0.005)
        assert work.is_alive(), said.read_text()
        time.sleep(dice.random() * 0.1)
        work.kill()
        work.join()
    assert 3 <= len(list(folder.glob("outcomes/*.parquet"))) < len(list(whole.folder.glob("outcomes/*.parquet")))
    last = start_process(processes, config, folder, said)
    last.join(300)
    assert last.exitcode == 0, said.read_text()
    assert rows(folder).equals(rows(whole.folder))
    for digest in whole.outcomes["image"].unique():
        assert image_path(folder, digest).read_bytes() == image_path(whole.folder, digest).read_bytes()


def test_a_finished_run_is_not_done_again(config, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*.parquet")}
    run(prepare(read_experiment(config), str(config)), whole.folder)
    assert {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*.parquet")} == before


def test_shards_merge_into_the_rows_of_an_unsharded_run(config, whole, tmp_path):
    """The first shard's times are taken before its scores, each pass by itself."""
    for i in (1, 2):
        short = prepare(read_experiment(config), str(config))
        if i == 1:
            run(short, tmp_path / "shard1", (1, 2), only="times")
            assert open_run(tmp_path / "shard1").outcomes.is_empty()
        run(short, tmp_path / f"shard{i}", (i, 2), only="scores")
        assert open_run(tmp_path / f"shard{i}").times.is_empty() == (i == 2)
    with pytest.raises(SystemExit) as end:
        run_command("merge", tmp_path / "merged", tmp_path / "shard1", tmp_path / "shard2")
    assert end.value.code == 0
    assert rows(tmp_path / "merged").equals(rows(whole.folder))
    for digest in whole.outcomes["image"].unique():
        assert image_path(tmp_path / "merged", digest).exists()


def test_two_runs_are_compared_pair_by_pair(whole, capsys):
    with pytest.raises(SystemExit):
        run_command("compare", whole.folder, whole.folder, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {row["score"] for row in found} == {"brightness", "apart"}
    assert all(row["difference"] == 0 == row["low"] == row["high"] for row in found)
    assert all(row["pairs"] == 16 for row in found)


def test_a_comparison_resamples_prompts_and_not_their_seeds(whole, tmp_path):
    apart = pl.col("prompt").hash(3) % 11 / 11  # as far apart for every seed of a prompt
    for path in (whole.folder / "outcomes").glob("*.parquet"):
        own = tmp_path / "b" / "outcomes" / path.name
        own.parent.mkdir(parents=True, exist_ok=True)
        pl.read_parquet(path).with_columns(pl.col("score_brightness") + apart).write_parquet(own)
    shutil.copyfile(whole.folder / "run.json", tmp_path / "b" / "run.json")
    row = next(row for row in compare(whole, open_run(tmp_path / "b")) if row["score"] == "brightness")
    some = whole.outcomes.filter(family=row["family"], program=row["program"])
    assert row["pairs"] == some.height > row["prompts"] == some["prompt"].n_unique()
    each = some.select("prompt").unique(maintain_order=True).select(apart.alias("apart"))["apart"].to_list()
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(interval(each), abs=1e-6)


def test_a_dry_run_prints_the_grid_and_an_estimate_and_draws_nothing(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command("run", config, "--dry-run", "--out", tmp_path / "dry")
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "10 programs" in out
    assert "units of work; about" in out
    assert not (tmp_path / "dry").exists()


BAD = [
    ({"sedes": [1]}, "sedes"),
    ({"load": [2]}, "`$.load`"),
    ({"seeds": []}, "$.seeds"),
    ({"programs": [{"mode": "relay"}]}, "`$.programs[0]`"),
    ({"programs": [{"mode": "relay", "handoff": [5]}]}, "`$.programs[0]`"),
    ({"programs": [{"mode": "relay", "handoff": [1.5]}]}, "`$.programs[0]`"),
    ({"metrics": ["taste"]}, "`$.metrics[0]`"),
    ({"metrics": ["test_run:Nothing"]}, "`$.metrics[0]`"),
    ({"metrics": ["lpips"]}, "`$.metrics[0]`"),
    ({"baselines": ["magic"]}, "`$.baselines[0]`"),
    ({"links": ["pigeon"]}, "`$.links[0]`"),
    ({"workload": {"name": "file", "path": "nothing.txt"}}, "nothing.txt"),
    ({"workload": {"name": "scenes", "count": 0}}, "workload"),
    ({"families": ["maxi"]}, "maxi"),
    ({"codec": ["jpeg"]}, "$.codec"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[n for _, n in BAD])
def test_a_wrong_config_is_one_line_that_names_file_and_key(config, tmp_path, capsys, change, named):
    path = changed(config, tmp_path, **change)
    with pytest.raises(SystemExit) as end:
        run_command("run", path, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert err.count("\n") == 1
    assert named in err
    if "families" not in change:
        assert str(path) in err or "nothing.txt" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_file_is_refused(config, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    path = changed(config, tmp_path, workload={"name": "file", "path": str(tmp_path / "empty.txt")})
    with pytest.raises(SystemExit):
        run_command("run", path, "--out", tmp_path / "out")
    assert "empty.txt" in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused_and_kept(config, whole, tmp_path):
    path = changed(config, tmp_path, seeds=[7])
    before = whole.outcomes.height
    with pytest.raises(BadRequest, match="run of another config"):
        run(prepare(read_experiment(path), str(path)), whole.folder)
    assert open_run(whole.folder).outcomes.height == before


def test_rows_of_two_dtypes_are_not_mixed(config, whole, tmp_path):
    with pytest.raises(BadRequest, match="holds a run in fp32, this one is in bf16: say the same --dtype"):
        run(prepare(read_experiment(config), str(config), dtype="bf16"), whole.folder)
    other = tmp_path / "other"
    other.mkdir()
    facts = whole.facts | {"dtypes": dict.fromkeys(whole.dtypes, "bf16")}
    (other / "run.json").write_text(json.dumps(facts))
    with pytest.raises(BadRequest, match=r"not computed alike.*whole in fp32; .*other in bf16"):
        merge(tmp_path / "merged", [whole.folder, other])


def test_the_first_units_hold_something_of_every_family_and_workload():
    said = {"name": "x", "workload": {}, "families": ["a", "b"], "programs": [], "seeds": [0, 1], "batch": 10}
    units = units_of(msgspec.convert(said | {"programs": [{"mode": "full-cloud"}]}, Experiment), [25, 10])
    assert {(u.family, u.workload) for u in units[:4]} == {(f, w) for f in "ab" for w in (0, 1)}
    assert [u.seed for u in units] == [0] * 8 + [1] * 8
    assert sorted({(u.first, u.last) for u in units if u.workload == 0}) == [(0, 10), (10, 20), (20, 25)]
    assert len({u.name for u in units}) == len(units)
    for shard in (units[::2], units[1::2]):
        assert {u.family for u in shard if u.workload == 0} == {"a", "b"}


def test_a_full_disk_is_one_line_and_loses_no_row(config, processes, tmp_path):
    """A limit on the size of files stands for a disk that fills up: the kernel refuses the write either way."""
    said = tmp_path / "said.txt"
    work = start_process(processes, config, tmp_path / "full", said, largest_file=9000)
    work.join(300)
    assert work.exitcode == 1
    assert said.read_text().strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said.read_text()
    assert not list((tmp_path / "full").rglob("*.part"))


def run_command(*words) -> None:
    kept, sys.argv = sys.argv, ["relay-experiment", *map(str, words)]
    try:
        run_app(app)
    finally:
        sys.argv = kept


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in CONFIGS if "\nprograms:" in p.read_text()], ids=lambda p: p.stem)
def test_every_config_that_is_shipped_can_be_prepared(path):
    prepared = prepare(read_experiment(path), str(path))
    assert prepared.units
    assert all(len(programs) > 2 for programs in prepared.programs.values())


def test_the_example_in_the_docs_runs_as_written(tmp_path, monkeypatch):
    import re

    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    python, config = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "my_metrics.py").write_text(python)
    (tmp_path / "contrast.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command("run", tmp_path / "contrast.yaml", "--out", tmp_path / "run")
    assert end.value.code == 0
    frame = open_run(tmp_path / "run").outcomes
    assert frame["score_contrast"].min() > 0
    assert frame.filter(pl.col("mode") == "full-cloud")["score_contrast_lost"].abs().max() == 0


def test_packed_rows_are_the_runs_and_a_report_can_be_drawn_from_them(whole, tmp_path):
    size = pack(whole, tmp_path / "packed")
    packed = open_run(tmp_path / "packed")
    assert packed.outcomes.equals(whole.outcomes)
    assert packed.times.equals(whole.times)
    assert not (tmp_path / "packed" / "images").exists()
    assert size < 200_000
    assert write_report([tmp_path / "packed"], tmp_path / "report").exists()


def test_an_unfinished_run_that_was_packed_goes_on_from_a_copy(config, whole, tmp_path):
    """What one machine did is shipped as rows; another does the rest, and the rows are those of a run in one place."""
    prepared = prepare(read_experiment(config), str(config))
    run(prepared, tmp_path / "here", (1, 2), only="scores")
    pack(open_run(tmp_path / "here"), tmp_path / "there")
    with pytest.raises(BadRequest, match="the run itself"):
        pack(open_run(tmp_path / "there"), tmp_path / "there")
    done = len(list((tmp_path / "here" / "outcomes").iterdir()))
    run(prepared, tmp_path / "there")
    files = {path.stem for path in (tmp_path / "there" / "outcomes").iterdir()}
    assert len(files - {"all"}) == len(prepared.units) - done
    assert rows(tmp_path / "there").equals(rows(whole.folder))
    assert write_report([tmp_path / "there"], tmp_path / "report").exists()

    pack(open_run(tmp_path / "there"), tmp_path / "again")
    assert rows(tmp_path / "again").equals(rows(whole.folder))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.parquet")}
    run(prepared, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.parquet")} == before

    merged = merge(tmp_path / "merged", [tmp_path / "here", tmp_path / "again"])
    assert rows(merged.folder).equals(rows(whole.folder))  # what both have is there once
    with pytest.raises(BadRequest, match="merge before"):
        merge(tmp_path / "both", [tmp_path / "there", tmp_path / "again"])
    facts = json.loads((tmp_path / "again" / "run.json").read_text())
    (tmp_path / "again" / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "packed"}))
    with pytest.raises(BadRequest, match="for reading alone"):  # packed before units were named
        run(prepared, tmp_path / "again")
