"""`relay up` as a user runs it: it starts, serves, and Ctrl-C leaves nothing behind; bad deployments get one line."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from tiny import build_sd3, write_family

from nodes.commands.service import children_of, free_port
from nodes.deployment import read_deployment
from nodes.forker import forks


def up(path, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "up", str(path), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
    )  # fmt: skip


def one_edge(folder, **more):
    """A deployment of a gateway and an edge of a tiny family; `more` of the edge."""
    family = write_family(folder / "tiny-sd3.yaml", build_sd3(folder / "sd3"), "sd3")
    ports = [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]
    path = folder / "deployment.yaml"
    gateway = {
        "control": ports[0], "data": ports[1], "http": None, "store": str(folder / "store"),
        "offer": [{"family": str(family)}],
    }  # fmt: skip
    node = {"role": "edge", "data": ports[2], "families": {str(family): ["large"]}, **more}
    path.write_text(yaml.safe_dump({"gateway": gateway, "nodes": {"edge": node}}))
    return path


def test_ctrl_c_stops_everything_and_leaves_no_orphan(tmp_path):
    path = one_edge(tmp_path, link="lan")
    process, children = up(path), []
    try:
        said, ends = [], time.monotonic() + 120
        for line in process.stdout:
            said.append(line)
            if "node edge is here" in line or time.monotonic() > ends:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        # gateway, edge, the judge that learning wants and who starts them, the edge's link
        assert len(children) == 4 + forks({}), said
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
    finally:
        for each in (process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": {"a": {"role": "edge", "families": {"mini-sd3": ["large"]}}}}, "an edge needs a data address"),
        ({"nodes": {"a": {"role": "device", "families": {"mini-sd3": ["large"]}}}}, "a device holds small members"),
        ({"nodes": {"a": {"role": "king", "families": {"mini-sd3": ["large"]}}}}, "role"),
        ({"gateway": {"polcy": "fixed"}}, "polcy"),
        ({"gateway": {"offer": []}}, "offer"),
        (
            {
                "gateway": {"checkpoints_to": "a"},
                "nodes": {"a": {"role": "device", "families": {"mini-sd3": ["small"]}}},
            },
            "gateway.checkpoints_to",
        ),
        ({"nodes": {"Bad Name": {"role": "device", "families": {"mini-sd3": ["small"]}}}}, "nodes"),
    ],
)
def test_a_wrong_deployment_gets_one_line_that_names_file_and_key(tmp_path, wrong, said):
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump(wrong))
    out, _ = (process := up(path)).communicate(timeout=60)
    assert process.returncode == 2
    assert len(out.strip().splitlines()) == 1
    assert str(path) in out
    assert said in out


def test_a_device_imports_nothing_of_the_gateway_and_no_bandit(tmp_path):
    """vowpal-wabbit-next has no wheel for many devices, and what a device does not load it cannot be attacked through."""
    code = (
        "import sys, nodes.process, nodes.node, nodes.compute, nodes.exchange, nodes.local_user, nodes.embeddings\n"
        "import relay.engine, relay.pipeline\n"
        "wrong = [m for m in sys.modules if m.startswith(('nodes.gateway', 'vowpal', 'fastapi', 'experiments', 'polars'))]\n"
        "print(wrong)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("said", "judges"),
    [("name: home", True), ("judge: false", False), ("gateway: {policy: round-robin}", False),
     ("gateway: {policy: round-robin}\njudge: true", True), ("gateway: {policy: {name: learned, explore: 0}}", True)],
)  # fmt: skip
def test_what_learns_from_scores_has_a_judge_where_nothing_is_said(tmp_path, said, judges):
    path = tmp_path / "deployment.yaml"
    path.write_text(f"{said}\n")
    assert ("judge" in [child.name for child in children_of(read_deployment(path), path)]) is judges


def test_with_keys_a_judge_that_nobody_asked_for_needs_its_own(tmp_path, capsys):
    path = tmp_path / "deployment.yaml"
    path.write_text("keys: keys\n")
    assert "judge" not in [child.name for child in children_of(read_deployment(path), path)]
    assert "relay keygen judge --role judge" in capsys.readouterr().err
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "judge.key").touch()
    assert "judge" in [child.name for child in children_of(read_deployment(path), path)]


WRITES = """
import sys, threading
def told(event, args):
    if event in ("os.putenv", "os.unsetenv") and threading.active_count() > 1:
        print("written beside other threads:", args, flush=True)
sys.addaudithook(told)
sys.argv = ["relay", *sys.argv[1:]]
from nodes.cli import main
main()
"""


def test_no_process_writes_its_environment_once_it_has_threads(tmp_path):
    """Where one thread writes it while another reads it, the C library may read what is no longer there."""
    path = one_edge(tmp_path)
    said, ends = [], time.monotonic() + 120
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITES, role, "--config", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for role in ("gateway", "edge")
    ]  # fmt: skip
    try:
        for line in running[0].stdout:
            said.append(line)
            if "node edge is here" in line or time.monotonic() > ends:
                break
        assert "node edge is here" in said[-1], said
    finally:
        for each in reversed(running):
            each.terminate()
        said += [line for each in running for line in each.communicate(timeout=60)[0].splitlines()]
    assert [line for line in said if "written beside other threads" in line] == []
