"""The paper configs on real checkpoints: what `real:` replaces, and a dry run that needs none of their files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import yaml
from tiny import write_family
from typer.testing import CliRunner

from experiments import estimate
from experiments.cli import app
from experiments.estimate import dry_run, parse_step_ms, step_costs
from experiments.grid import Legs, for_its_families, read_experiment
from experiments.prepare import prepare
from experiments.run import draw_unit
from experiments.run_folder import open_run
from experiments.sketch import Sketch, family_or_sketch
from relay.checkpoints import _hub_reachable
from relay.errors import BadRequest, FamilyError
from relay.family import find_family

ROOT = Path(__file__).parents[2]
PAPERS = ("rise", "rise-long", "rise-sensitivity")
REAL = ("sdxl-vega", "sd35")


def paper(name: str) -> Path:
    return ROOT / "configs" / "experiments" / f"{name}.yaml"


class Spread:
    """A metric of one's own."""

    name, columns, needs_reference = "spread", ("spread",), False

    def missing(self):
        return None

    def score(self, images, prompts, references=None):
        return {"spread": images.std((1, 2, 3)).tolist()}


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A machine that has fetched nothing and reaches no hub, whatever this one has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(estimate, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    _hub_reachable.cache_clear()
    yield tmp_path
    _hub_reachable.cache_clear()


@pytest.fixture
def tiny_config(checkpoints, tmp_path):
    """A config for scenes with a `real:` block, and a family of random weights that draws none."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    family = write_family(tmp_path / "tiny-sd3.yaml", checkpoints["sd3"], "sd3")
    body = {
        "name": "both",
        "workload": {"name": "scenes", "split": "validation", "count": 5},
        "families": [str(family)],
        "programs": [{"mode": "full-cloud"}, {"mode": "relay", "handoff": [0.25, 0.5]}, {"mode": "edge-only"}],
        "deviation": 1,
        "real": {
            "workload": {"name": "file", "path": str(tmp_path / "prompts.txt"), "split": "all", "count": 3},
            "metrics": ["test_real_families:Spread"],
            "steps": [4],
            "baselines": ["fewer-steps"],
            "times": None,
            "batch": 2,
        },
    }
    return body, tmp_path / "both.yaml"


def write(body: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(body))
    return path


def refusal(*words) -> str:
    """What a command says that ends in one line and a code of its own."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, BadRequest), done.output
    return str(done.exception)


# -- the dry run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_of_each_paper_lists_all_that_is_missing_and_states_gpu_hours(nothing_here, name, family):
    words = ["run", str(paper(name)), "--family", str(ROOT / "configs" / "families" / f"{family}.yaml"), "--dry-run"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    told, missing = done.stdout.split("missing, before it can run:\n")
    config, _ = for_its_families(with_families(paper(name), family), name)
    for metric in config.metrics:
        label = metric if isinstance(metric, str) else metric["name"]
        assert f"  metric {label}: " in missing
    for spec in config.workload if isinstance(config.workload, list) else [config.workload]:
        assert f"  workload {spec['name']}: there is no folder {spec['folder']}: fetch " in missing
    for part in ("large", "small", "text encoders", "vae"):
        assert f"  weights of {family}, {part}: " in missing
    assert "GPU hours" in told
    assert "Argus, arXiv 2511.06724" in told
    assert "n follows from the schedules at the run" in told
    assert "scenes" not in missing
    if name != "rise-sensitivity":  # RISE's own handoff steps
        for s in (5, 10, 15, 20, 25):
            assert f"relay       T = 50  s = {s:<3} n = {50 - s:<3}" in told
    if name == "rise-long":
        assert "full-cloud  T = 28  s = 28" in told
        assert "full-cloud  T = 50  s = 50" in told


def with_families(path: Path, *families: str):
    return msgspec.structs.replace(read_experiment(path), families=list(families))


@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_on_the_embedded_families_misses_nothing(name):
    said = dry_run(read_experiment(paper(name)), name, step_ms="50,10")
    assert "missing" not in said
    assert "GPU" not in said
    assert "mini-sd3/large:28:0-14/small:28:14-28/match=" in said
    assert "(--step-ms)" in said


def test_a_dry_run_measures_a_step_where_the_weights_are_here(tiny_config):
    body, path = tiny_config
    said = dry_run(read_experiment(write(body, path)), str(path))
    assert "(measured here, cpu, batch 2)" in said
    assert "tiny-sd3/large:4:0-2/small:4:2-4/" in said
    assert "2 units of work; about 0 s" in said


def test_the_steps_of_a_dry_run_are_those_that_a_run_walks(tiny_config, tmp_path):
    body, path = tiny_config
    prepared = prepare(read_experiment(write(body, path)), str(path))
    (tmp_path / "run").mkdir()
    walked = sum(draw_unit(prepared, unit, tmp_path / "run")[1].sample_steps for unit in prepared.units)
    (family,) = prepared.config.families
    work = estimate._work(prepared.config, prepared.programs[family], prepared.points[family], prepared.units)
    assert sum(next(iter(work.values())).values()) == walked == 3 * (4 + 3 + 2 + 4)
    assert "baselines, 3 settings, a cache counted as if it saved nothing" in work


def test_step_costs_are_said_then_measured_elsewhere_then_argus(nothing_here):
    family, needs = family_or_sketch(find_family("sd35"), None, None)
    assert isinstance(family, Sketch)
    assert not any(need.installed for need in needs)
    argus = step_costs(family, 4, installed=False)
    assert argus.seconds["large"] == pytest.approx(0.084 * 8.06 / 2.57)
    assert argus.seconds["small"] == pytest.approx(0.084 * 2.24 / 2.57)
    curves = {"large": [(1, 0.2), (2, 0.3), (8, 1.0)], "small": [(1, 0.1), (2, 0.15), (8, 0.5)]}
    members = {
        m: {"curve": [{"batch": batch, "step_s": seconds} for batch, seconds in curve]} for m, curve in curves.items()
    }
    data = {"tiny": False, "device": "a GPU", "dtype": "bf16", "members": members}
    estimate.RESULTS.mkdir()
    result = estimate.RESULTS / "latency-sd35.json"
    result.write_text(json.dumps({"families": {"sd35": data}}))
    measured = step_costs(family, 4, installed=False)
    assert measured.seconds == {"large": pytest.approx(0.15), "small": pytest.approx(0.075)}
    assert "latency-sd35.json: a GPU, bf16, batch 2" in measured.source
    result.write_text(json.dumps({"families": {"sd35": data | {"tiny": True}}}))
    assert step_costs(family, 4, installed=False) == argus
    result.write_text("{}")
    with pytest.raises(BadRequest, match=r"latency-sd35\.json is not what"):
        step_costs(family, 4, installed=False)
    assert step_costs(family, 4, installed=False, given=parse_step_ms("70,20")).seconds == {
        "large": 0.07,
        "small": 0.02,
    }


def test_a_family_of_unknown_size_is_left_out_of_the_hours_until_its_steps_are_said(nothing_here):
    member = {"repo": "no/such", "guidance": 3.0, "steps": 4}
    spec = {
        "name": "mine",
        "architecture": "sdxl",
        "members": {"large": member, "small": member},
        "sizes": {"default": [64, 64]},
    }
    path = write(spec, nothing_here / "mine.yaml")
    programs = [Legs(mode="full-cloud"), Legs(mode="relay", handoff=[0.1, 0.2, 0.3, 0.4, 0.5]), Legs(mode="edge-only")]
    config = msgspec.structs.replace(with_families(paper("rise"), str(path)), programs=programs)
    said = dry_run(config, "rise")
    assert "no step cost is known for it: say --step-ms LARGE,SMALL" in said
    assert "mine left out" in said
    # 100 prompts with 50 shared large steps, the relays' and edge-only's small ones and 138 of baselines; 25 watched; 4 rounds
    hours = (100 * (50 + 138) + 25 * 175 + 4 * (50 + 75 + 138)) * 1.0 / 3600
    hours += (100 * 225 + 4 * 225) * 0.5 / 3600
    assert f"about {hours:.1f} GPU hours" in dry_run(config, "rise", step_ms="1000,500")


def test_a_program_given_as_text_is_shown_as_it_is_where_no_schedule_can_be_asked(nothing_here):
    program = "sd35/large:50:0-10/small:40:3-40/match=nearest/codec=fp16/guidance=4.5,5/conditioning=encode"
    config = msgspec.structs.replace(with_families(paper("rise"), "sd35"), programs=[Legs(program=program)])
    assert "relay       T = 50  s = 10  n = 37  match=nearest" in dry_run(config, "rise")


def test_a_local_family_that_is_broken_is_refused_by_a_dry_run_too(checkpoints, tmp_path):
    path = write_family(tmp_path / "broken.yaml", checkpoints["sd3"], "sd3", small={"repo": str(tmp_path / "nowhere")})
    with pytest.raises(FamilyError, match="nowhere"):
        dry_run(with_families(paper("rise"), str(path)), "rise")


# -- what `real:` replaces -----------------------------------------------------------------------------------------


def test_a_family_that_draws_no_scenes_runs_what_real_says(tiny_config, tmp_path):
    body, path = tiny_config
    done = CliRunner().invoke(
        app, ["run", str(write(body, path)), "--out", str(tmp_path / "run")], catch_exceptions=False
    )
    assert done.exit_code == 0
    frame = open_run(tmp_path / "run").outcomes
    assert set(frame["prompt"]) == {"a red circle", "a blue square", "a green circle"}
    assert [c for c in frame.columns if c.startswith("score_")] == ["score_spread"]
    assert set(frame["workload"]) == {"file"}
    assert set(frame["method"]) == {"program", "fewer-steps"}
    assert open_run(tmp_path / "run").times.is_empty()
    assert open_run(tmp_path / "run").config["batch"] == 2


def test_a_family_that_draws_scenes_runs_as_if_there_were_no_real(tiny_config):
    body, path = tiny_config
    body |= {"families": ["mini-sd3"], "times": None}
    config = prepare(read_experiment(write(body, path)), str(path))
    plain = prepare(read_experiment(write({k: v for k, v in body.items() if k != "real"}, path)), str(path))
    assert config.config == plain.config
    assert config.hash == plain.hash
    assert [p.complexity for p in config.prompts[0]] == ["1", "2", "3", "4", "letters"]


def test_metrics_score_where_a_real_family_runs(tiny_config):
    body, path = tiny_config
    body["real"]["metrics"] = ["clip_score", {"name": "pick_score", "device": "meta"}]
    config = read_experiment(write(body, path))
    metrics = estimate.prepare.metrics_of(for_its_families(config, "")[0], estimate.prepare.Keyed("", frozenset()))
    family, _ = family_or_sketch(find_family(config.families[0]), None, None)
    metrics[0].device = "unset"
    estimate.prepare.put_metrics(metrics, for_its_families(config, "")[0], family)
    assert [metric.device for metric in metrics] == ["cpu", "meta"]


def test_what_cannot_be_run_on_real_families_is_one_line_that_says_what_to_do(tiny_config, tmp_path):
    body, path = tiny_config
    out = ("--out", tmp_path / "out")
    mixed = refusal("run", write(body | {"families": ["mini-sd3", *body["families"]]}, path), *out)
    assert "`$.families` mixes mini-sd3" in mixed
    assert "run them apart" in mixed
    bare = refusal("run", write({k: v for k, v in body.items() if k != "real"}, path), *out)
    assert "`$.metrics[0]`: the scene judge" in bare
    assert "under `real:`" in bare
    own = refusal("run", write(body | {"real": body["real"] | {"metrics": ["scene"]}}, path), *out)
    assert "`$.real.metrics[0]`: the scene judge" in own
    assert "colour" in refusal("run", write(body | {"real": {"colour": 1}}, path), *out)
    lacking = refusal("run", write(body | {"real": body["real"] | {"metrics": ["lpips"]}}, path), *out)
    assert f"{path}: `$.real.metrics[0]`: LPIPS's trunk is not given" in lacking
    nowhere = body["real"] | {"workload": {"name": "diffusiondb", "folder": str(tmp_path / "db"), "count": 3}}
    assert "`$.real.workload[0]`: workload diffusiondb: there is no folder" in refusal(
        "run", write(body | {"real": nowhere}, path), *out
    )
    assert "--step-ms" in refusal("run", write(body, path), *out, "--step-ms", "3,1")
    assert not (tmp_path / "out").exists()
