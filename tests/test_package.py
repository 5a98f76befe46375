"""The wheel: what it holds, and that its base install alone makes a picture in a fresh environment."""

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# What only the gateway, experiments or training may need; a device installs none of it.
EXTRAS_ONLY = ("vowpal-wabbit-next", "fastapi", "uvicorn", "lpips", "matplotlib", "stable-baselines3")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=ROOT, check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def base_closure():
    """Names of all distributions that the base install brings, extras left out."""
    todo, found = ["relay-inference"], set()
    while todo:
        name = todo.pop()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            wanted = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if wanted not in found:
                found.add(wanted)
                todo.append(wanted)
    return found


def test_the_base_install_brings_nothing_that_only_a_gateway_needs():
    assert not base_closure() & set(EXTRAS_ONLY)


def test_the_wheel_holds_weights_and_configs_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "relay/weights/mini-sd3/transformer/config.json",
        "relay/weights/mini-sdxl/unet_small/config.json",
        "relay/weights/scene-judge/model.safetensors",
        "configs/families/sd35.yaml",
        "nodes/cli.py",
    ):
        assert needed in names
    assert not [n for n in names if n.startswith("tests/")]
    assert wheel.stat().st_size < 56_000_000


def test_relay_generates_from_the_base_install_in_a_fresh_environment(wheel, tmp_path):
    """The environment is empty but for the wheel and links to the base requirements' files."""
    home = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    site = next((home / "lib").glob("python*/site-packages"))
    for name in base_closure():
        for file in metadata.files(name) or []:
            top = Path(file.parts[0])
            if file.parts[0] in ("..", "__pycache__") or (site / top).exists():
                continue
            (site / top).symlink_to(Path(metadata.distribution(name).locate_file(top)).resolve())
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel],
        check=True, timeout=120,
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [home / "bin" / "relay", "generate", "a red heart", "--steps", "4", "--handoff", "2", "--out", "heart.png"],
        cwd=tmp_path, env=environment, timeout=180, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "2 large + 2 small steps" in made.stdout
    assert (tmp_path / "heart.png").stat().st_size > 500


def test_tracked_files_stay_below_the_planned_size_and_name_no_host():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]
    rows = [
        f for f in files if ROOT / "docs" / "results" / "rise-long" in f.parents
    ]  # the long run's, not all there yet
    assert sum(f.stat().st_size for f in files if f not in rows) < 56_000_000
    assert sum(f.stat().st_size for f in rows) < 10_000_000
    hosts = re.compile(r"pypi\.org|pythonhosted|files\.python|registry\.npm|--index-url|--extra-index-url|/root/")
    texts = [f for f in files if f.suffix in {".txt", ".toml", ".yaml", ".md", ".json", ".cfg"} or f.name == "Makefile"]
    assert [f.name for f in texts if hosts.search(f.read_text())] == []
