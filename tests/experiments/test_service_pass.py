"""Policies over links between real processes, as rows of the outcome store."""

import pytest
import yaml
from tiny import build_sd3, write_family

from experiments.grid import read_experiment
from experiments.prepare import prepare
from experiments.run import run
from experiments.run_folder import open_run
from experiments.service_pass import MEASURE
from relay.errors import BadRequest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    (root / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    family = write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3")
    said = {
        "name": "policies", "families": [str(family)], "metrics": [], "steps": [6], "links": ["wifi"], "times": None,
        "workload": {"name": "file", "path": str(root / "prompts.txt"), "split": "all", "count": 3},
        "programs": [{"mode": "full-cloud"}, {"mode": "relay", "handoff": [3]}],
        "policy": ["round-robin", "least-finish-time"], "service": {"requests": 3, "gap_s": 0.05},
    }  # fmt: skip
    path = root / "policies.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_each_policy_over_each_link_is_a_set_of_time_rows(config, tmp_path):
    run(prepare(read_experiment(config), str(config)), tmp_path / "run")
    times = open_run(tmp_path / "run").times
    assert set(times["measure"]) == {MEASURE}
    assert set(times["method"]) == {"policy:round-robin", "policy:least-finish-time"}
    assert times.height == 6
    assert (times["end_to_end_s"] > 0).all()
    assert all(link.startswith("wifi") for link in times["link"])
    turns = times.filter(times["method"] == "policy:round-robin")["program"].n_unique()
    assert turns == 2  # each program in turn


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": ["best"]}, r"policy\[0\].*unknown policy 'best'"),
        ({"links": []}, "policy.*links"),
        ({"load": 1}, "load"),
    ],
)
def test_a_wrong_axis_gets_one_line(config, tmp_path, wrong, said):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | wrong))
    with pytest.raises(BadRequest, match=said):
        read_experiment(path)
