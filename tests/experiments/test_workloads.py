"""Workloads: splits that never mix, the same seed the same requests, rates that hold, and refusals that name file and key."""

import json
import subprocess
import sys
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.workloads import SPLITS, Demands, Prompt, Workload, load_arrivals, load_workload, requests
from experiments.workloads.prompts import normalised, split_of_text
from relay.errors import BadRequest
from relay.scenes.language import parse
from relay.scenes.sampling import COMPLEXITIES, held_out, split_of
from relay.scenes.vocabulary import RELATIONS

CAPTIONS = [
    f"a photo of {n} {thing} in the {place}"
    for n in range(20)
    for thing in ("cats", "cars")
    for place in ("sun", "rain")
]


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n\n  \n" + CAPTIONS[0].upper() + ".\n")
    return path


def all_of(workload, split, seed=0):
    """As many prompts of a split as there are."""
    with pytest.raises(BadRequest) as refusal:
        workload.prompts(split, 10**6, seed)
    count = int(str(refusal.value).split(" has ")[1].split()[0])
    return workload.prompts(split, count, seed)


# -- scenes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_those_of_held_out_evenly_spread_and_say_what_they_mean(split):
    prompts = load_workload("scenes").prompts(split, 40, 3)
    assert [p.scene for p in prompts] == [s.text() for s in held_out(40, split, 3)]
    assert [p.complexity for p in prompts] == [c for c in COMPLEXITIES for _ in range(8)]
    for prompt in prompts:
        scene = parse(prompt.text)
        assert split_of(parse(prompt.scene)) == split
        assert sorted(map(repr, scene.groups)) == sorted(map(repr, parse(prompt.scene).groups))


@given(st.integers(0, 2**32), st.integers(1, 15))
@settings(max_examples=10)
def test_scene_splits_are_disjoint_and_the_seed_decides(seed, count):
    workload = load_workload("scenes")
    found = {split: workload.prompts(split, count, seed) for split in SPLITS}
    scenes = [{p.scene for p in prompts} for prompts in found.values()]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == 3 * count
    assert workload.prompts("train", count, seed) == found["train"]


def test_narrow_classes_hold_what_they_promise():
    attributes = load_workload("scenes", classes=["attributes"]).prompts("validation", 8, 0)
    for prompt in attributes:
        one, two = parse(prompt.scene).groups
        assert all(
            getattr(one, k) and getattr(one, k) != getattr(two, k) for k in ("size", "colour", "texture", "shape")
        )
    relations = load_workload("scenes", classes=["relations"]).prompts("validation", 8, 0)
    assert all(any(word in p.text.lower() for word in RELATIONS) for p in relations)
    both = load_workload("scenes", classes=["objects", "letters", "attributes"]).prompts("test", 12, 0)
    assert len({p.scene for p in both}) == 12
    assert {p.complexity for p in load_workload("letters").prompts("test", 5, 0)} == {"letters"}


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_split_without_overlap_and_without_loss(captions):
    workload = load_workload("file", path=captions)
    parts = [{p.text for p in all_of(workload, split)} for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(CAPTIONS)  # one line is another in capitals
    assert all(parts)
    assert {normalised(p.text) for p in workload.prompts("all", len(CAPTIONS), 5)} == set(map(normalised, CAPTIONS))
    assert {p.complexity for p in workload.prompts("all", 9, 5)} == {"?"}


def test_file_prompts_are_a_function_of_the_seed_and_keep_their_line(captions):
    workload = load_workload({"workload": "file", "path": str(captions)})
    first = workload.prompts("test", 5, 1)
    assert first == workload.prompts("test", 5, 1) == workload.prompts("test", 9, 1)[:5]
    assert first != workload.prompts("test", 5, 2)
    lines = captions.read_text().splitlines()
    assert all(lines[int(p.key.removeprefix("prompts.txt:")) - 1] == p.text for p in first)


def test_a_scene_in_a_file_keeps_the_split_of_the_scene(tmp_path):
    path = tmp_path / "scenes.txt"
    test, train = held_out(5, "test"), held_out(5, "train")
    path.write_text("\n".join(s.text() for s in test + train))
    prompts = all_of(load_workload("file", path=path), "test")
    assert {p.scene for p in prompts} == {s.text() for s in test}
    assert sorted(p.complexity for p in prompts) == sorted(COMPLEXITIES)


@given(st.text(min_size=1, max_size=60), st.sampled_from(["  {} ", "{}.", "{}\n"]))
def test_the_split_of_a_text_does_not_hang_on_its_writing(text, form):
    assert split_of_text(form.format(text)) == split_of_text(text)


def test_shares_of_text_splits():
    shares = [sum(split_of_text(f"prompt {i}") == split for i in range(8000)) / 8000 for split in SPLITS]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


def write(path, frame):
    writers = {
        ".csv": frame.write_csv, ".parquet": frame.write_parquet, ".json": frame.write_json,
        ".jsonl": frame.write_ndjson, ".arrow": frame.write_ipc_stream, ".tsv": lambda p: frame.write_csv(p, separator="\t"),
    }  # fmt: skip
    writers[path.suffix](path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl", ".arrow"])
def test_a_column_of_every_kind_of_table_is_read(tmp_path, suffix):
    texts = ["2001", 'a "quoted", long one', "ümläut", None, "  "]
    path = write(tmp_path / f"table{suffix}", pl.DataFrame({"n": range(5), "text": texts}))
    workload = load_workload("file", path=str(path), column="text")
    assert {p.text for p in workload.prompts("all", 3, 0)} == set(texts[:3])
    with pytest.raises(BadRequest, match=r"'prompt'.*n, text") as refusal:
        load_workload("file", path=str(path)).prompts("all", 1, 0)
    assert str(path) in str(refusal.value)


# -- data sets on disk ---------------------------------------------------------------------------------------------


def test_presets_read_the_files_as_they_are_published(tmp_path):
    coco, diffusion, drawtext = (tmp_path / name for name in ("coco", "diffusiondb", "drawtext"))
    for folder in (coco / "annotations", diffusion, drawtext / "DrawTextCreative"):
        folder.mkdir(parents=True)
    rows = [{"image_id": i, "id": i, "caption": f"A man with {i} dogs."} for i in range(40)]
    (coco / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"info": {"year": 2014}, "annotations": rows})
    )
    pl.DataFrame({"image_name": ["a", "b"], "prompt": ["a castle", "a ship"]}).write_parquet(
        diffusion / "metadata.parquet"
    )
    (drawtext / "DrawTextCreative" / "DrawTextCreative.txt").write_text(
        "a sign that says 'stop'\na mug that says 'go'\n"
    )
    captions = load_workload("coco", folder=str(coco)).prompts("all", 40, 0)
    assert {p.text for p in captions} == {row["caption"] for row in rows}
    assert all(rows[int(p.key.removeprefix("coco:")) - 1]["caption"] == p.text for p in captions)
    assert {p.text for p in load_workload("diffusiondb", folder=diffusion).prompts("all", 2, 0)} == {
        "a castle",
        "a ship",
    }
    assert {p.complexity for p in load_workload("drawtext", folder=drawtext).prompts("all", 2, 0)} == {"letters"}


def test_shards_of_a_data_set_are_one(tmp_path):
    for i in range(3):
        pl.DataFrame({"captions": [[f"shard {i} row {k}", "another"] for k in range(4)]}).write_parquet(
            tmp_path / f"test-{i:05}.parquet"
        )
    pl.DataFrame({"captions": [["of the other split"]]}).write_parquet(tmp_path / "train-00000.parquet")
    workload = load_workload("dataset", folder=str(tmp_path), column="captions", files="test-*.parquet", name="mine")
    prompts = workload.prompts("all", 12, 0)
    assert {p.text for p in prompts} == {f"shard {i} row {k}" for i in range(3) for k in range(4)}
    assert {p.key for p in prompts} == {f"mine:{i}" for i in range(1, 13)}


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "data", "options", "named"),
    [
        ("empty.txt", b"", {}, "no prompt"),
        ("blank.txt", b"\n  \n", {}, "no prompt"),
        ("latin.txt", "ein\nschöner\n".encode("latin-1"), {}, "line 2"),
        ("t.txt", b"a\n", {"column": "prompt"}, "column 'prompt'"),
        ("empty.csv", b"", {}, "empty"),
        ("head.csv", b"prompt\n", {}, "no prompt"),
        ("latin.csv", "prompt\nschön\n".encode("latin-1"), {}, "utf-8"),
        ("bad.parquet", b"PAR1 not", {}, "parquet"),
        ("bad.json", b"[{", {}, "json"),
        ("bad.json", b"[1", {"root": "annotations"}, "json"),
        ("root.json", b'{"a": []}', {"root": "annotations"}, "'annotations'"),
        ("rows.json", b'{"a": [{"b": "x"}]}', {"root": "a"}, "'prompt'"),
        ("numbers.json", b'[{"prompt": 1}]', {}, "'prompt'"),
        ("few.txt", b"one prompt\n", {}, "not 3"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, file, data, options, named):
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(BadRequest) as refusal:
        load_workload("file", path=str(path), **options).prompts("all", 3, 0)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("scene", {}, "'scene'"),
        ("scenes", {"clases": ["1"]}, "clases"),
        ("scenes", {"classes": ["5"]}, "'5'"),
        ("scenes", {"classes": []}, "classes"),
        ("file", {}, "path"),
        ("file", {"path": "/no/such.txt"}, "/no/such.txt"),
        ("file", {"path": "/no/such.csv"}, "/no/such.csv"),
        ("dataset", {"folder": "/no/such"}, "column"),
        ("dataset", {"folder": "/no/such", "preset": "laion"}, "laion"),
        ("coco", {"folder": "/no/such"}, "captions_val2014.json"),
        ("diffusiondb", {"folder": "/no/such"}, "hf download"),
        ("no.such.module:Class", {}, "no.such"),
        ("test_workloads:Missing", {}, "Missing"),
        ("collections:OrderedDict", {}, "prompts"),
    ],
)
def test_a_bad_workload_is_refused_in_one_line(name, options, named):
    with pytest.raises(BadRequest) as refusal:
        load_workload(name, **options).prompts("test", 1, 0)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("split", "count"), [("dev", 1), ("all", 1), ("test", 0), ("test", 10**6)])
def test_what_a_scene_workload_cannot_give_is_refused(split, count):
    with pytest.raises(BadRequest, match="scenes"):
        load_workload("scenes").prompts(split, count, 0)


class Fixed:
    """A workload of one's own, as a user writes it."""

    name = "fixed"
    found: ClassVar = {"train": "a", "validation": "b", "test": "c"}

    def __init__(self, word: str):
        self.word = word

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return [Prompt(f"{self.word} {self.found[split]} {i}", "?", None, f"fixed:{i}") for i in range(count)]


def test_a_workload_of_ones_own_is_named_by_module_and_class():
    workload = load_workload(f"{__name__}:Fixed", word="hello")
    assert isinstance(workload, Workload)
    assert workload.prompts("test", 1, 0)[0].text == "hello c 0"
    assert load_workload(workload) is workload
    with pytest.raises(BadRequest, match="wrd"):
        load_workload(f"{__name__}:Fixed", wrd="hello")


# -- arrivals ------------------------------------------------------------------------------------------------------

PROCESSES = [
    {"arrivals": "poisson", "rate_per_s": 2.0},
    {"arrivals": "bursty", "rate_per_s": 2.0},
    {"arrivals": "bursty", "rate_per_s": 0.5, "burst_factor": 30, "burst_s": 5, "calm_s": 20},
    {"arrivals": "diurnal", "rate_per_s": 2.0, "period_s": 1000.0},
    {"arrivals": "flash", "rate_per_s": 2.0},
]


@pytest.mark.parametrize("spec", PROCESSES)
def test_the_mean_rate_is_the_one_asked_for(spec):
    horizon = 40_000.0
    counts = [len(load_arrivals(spec).times(horizon, seed)) / horizon for seed in range(8)]
    spread = np.std(counts, ddof=1) / len(counts) ** 0.5
    assert np.mean(counts) == pytest.approx(spec["rate_per_s"], abs=5 * spread)
    assert spread < 0.05 * spec["rate_per_s"]


@given(st.sampled_from(PROCESSES), st.integers(0, 2**40), st.floats(0.01, 500), st.floats(1, 4))
def test_times_are_ascending_within_the_horizon_repeatable_and_only_added_to(spec, seed, horizon, longer):
    process = load_arrivals(spec)
    times = process.times(horizon, seed)
    assert times.dtype == np.float64
    assert (np.diff(times) >= 0).all()
    assert not len(times) or (times[0] >= 0 and times[-1] < horizon)
    assert np.array_equal(times, process.times(horizon, seed))
    more = process.times(longer * horizon, seed)
    assert np.allclose(more[more < horizon], times, rtol=1e-12, atol=0)


def dispersion(times, window_s):
    counts = np.bincount((times / window_s).astype(int))
    return counts.var() / counts.mean()


def test_poisson_is_poisson_and_bursts_are_burstier():
    poisson, bursty = (load_arrivals(PROCESSES[i]).times(40_000, 1) for i in (0, 1))
    assert dispersion(poisson, 10) == pytest.approx(1, abs=0.1)
    assert dispersion(bursty, 10) > 3
    gaps = np.diff(poisson)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)


def test_a_day_has_its_peak_and_its_night():
    times = load_arrivals("diurnal", rate_per_s=2.0, amplitude=0.8, period_s=1000, shift_s=100).times(100_000, 0)
    by_tenth = np.bincount(((times - 100) % 1000 // 100).astype(int), minlength=10) / 10_000
    middle = (np.arange(10) + 0.5) / 10
    assert by_tenth == pytest.approx(2 * (1 + 0.8 * np.sin(2 * np.pi * middle)), abs=0.12)


def test_a_trace_is_replayed(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("user,time_s\na,105.5\nb,100\nc,103\nd,900\n")
    trace = load_arrivals("trace", path=str(path), column="time_s", speed=2)
    assert trace.times(100, 0).tolist() == [0, 1.5, 2.75]
    assert trace.times(1e6, 1).tolist() == [0, 1.5, 2.75, 400]


def test_a_trace_of_gaps_is_replayed_and_a_negative_one_refused(tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text("gap_s\n5\n0\n2.5\n1\n")
    assert load_arrivals("trace", path=str(path), gaps=True).times(100, 0).tolist() == [0, 0, 2.5, 3.5]
    path.write_text("gap_s\n5\n-2.5\n1\n")
    with pytest.raises(BadRequest, match=r"gaps\.csv: line 3: a gap of -2\.5 s"):
        load_arrivals("trace", path=str(path), gaps=True).times(100, 0)


def test_a_flash_crowd_is_ten_times_as_much_within_a_second():
    times = load_arrivals("flash", rate_per_s=20.0).times(6000, 0)
    assert len(times) == pytest.approx(20 * 6000, rel=0.02)
    inside = times % 60
    calm, crowd = (inside < 30).sum() / 30, ((inside > 31) & (inside < 35)).sum() / 4
    assert crowd / calm == pytest.approx(10, rel=0.05)
    rising = ((inside > 30) & (inside < 31)).sum()
    assert rising / calm == pytest.approx(5.5, rel=0.1)
    with pytest.raises(BadRequest, match="a crowd rises"):
        load_arrivals("flash", rate_per_s=1.0, crowd_s=0.5)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("time_s\n1\nsoon\n", "line 3"),
        ("time_s\n", "no arrival"),
        ("time_s\n1\ninf\n", "finite"),
        ("t\n1\n", "'time_s'"),
        ("", "empty"),
    ],
)
def test_a_bad_trace_is_refused_in_one_line_that_names_it(tmp_path, data, named):
    path = tmp_path / "trace.csv"
    path.write_text(data)
    with pytest.raises(BadRequest) as refusal:
        load_arrivals("trace", path=str(path), column="time_s").times(10, 0)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rate_per_s": 0}, "rate_per_s"), ({"rate": 1}, "rate"), ({}, "rate_per_s"), ({"rate_per_s": 1e12}, "unit")],
)
def test_bad_arrivals_are_refused(options, named):
    with pytest.raises(BadRequest, match=named):
        load_arrivals("poisson", **options).times(10.0, 0)
    with pytest.raises(BadRequest, match="unknown arrivals"):
        load_arrivals("fish")
    with pytest.raises(BadRequest, match="horizon_s"):
        load_arrivals("bursty", rate_per_s=1).times(-1, 0)


# -- requests ------------------------------------------------------------------------------------------------------


def test_requests_are_timed_prompts_of_one_split_and_the_same_for_one_seed():
    asked = {"horizon_s": 300, "split": "test", "seed": 5, "pool": 10}
    demands = Demands(preference=(0.2, 0.6), deadline_s=(5, 50), with_deadline=0.5)
    workload, arrivals = load_workload("scenes"), load_arrivals("poisson", rate_per_s=1)
    made = list(requests(workload, arrivals, **asked, demands=demands))
    assert made == list(requests(workload, arrivals, **asked, demands=demands))
    assert [r.arrival_s for r in made] == arrivals.times(300, 5).tolist()
    assert {r.prompt for r in made} <= set(workload.prompts("test", 10, 5))
    assert all(0.2 <= r.preference <= 0.6 for r in made)
    with_deadline = [r.deadline_s for r in made if r.deadline_s is not None]
    assert all(5 <= each <= 50 for each in with_deadline)
    assert 0.35 < len(with_deadline) / len(made) < 0.65
    assert len({r.seed for r in made}) == len(made)
    # what askers want changes neither times nor prompts
    free = list(requests(workload, arrivals, **asked))
    assert [(r.arrival_s, r.prompt, r.seed) for r in free] == [(r.arrival_s, r.prompt, r.seed) for r in made]
    assert all(r.deadline_s is None for r in free)


def test_preferences_and_deadlines_say_nothing_of_the_arrivals():
    demands = Demands(deadline_s=(1, 100))
    gaps = np.diff(load_arrivals("poisson", rate_per_s=1).times(5000, 0))[:4000]
    columns = np.array([gaps, demands.preferences(4000, 0), np.log(demands.deadlines(4000, 0))])
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.06
    assert columns[1].mean() == pytest.approx(0.5, abs=0.03)
    assert columns[2].mean() == pytest.approx(np.log(10), abs=0.1)


def test_demands_that_contradict_themselves_are_refused():
    with pytest.raises(BadRequest, match="preference"):
        Demands(preference=(0.8, 0.2))
    with pytest.raises(BadRequest, match="deadline_s"):
        Demands(deadline_s=(0, 5))


def test_importing_workloads_is_light():
    code = "import sys, experiments.workloads; print({'torch', 'polars', 'pyarrow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
