"""Every command and every line of Python in the README works as written."""

import contextlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from experiments.cli import main as relay_experiment
from experiments.training.cli import main as relay_train
from nodes.cli import main as relay

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
# Run by other tests: the make targets by continuous integration and in short form in tests/experiments.
# `relay up` and what talks to it: tests/nodes.
ELSEWHERE = (
    "make ",
    "git ",
    "python -m experiments.",
    "hf ",
    "relay up ",
    "relay submit ",
    "relay status ",
    "relay trace ",
)


def test_the_command_lines_run_in_the_order_they_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    ran = 0
    for language, block in BLOCKS:
        if language != "bash":
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = line.split(" #")[0].strip()
            if not command or command.startswith("#") or command.startswith(ELSEWHERE):
                continue
            words = shlex.split(command)
            if words[0] == "relay-train":
                words += ["--help"]  # trains for hours; tests/experiments runs it in short form
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                {"relay": relay, "relay-train": relay_train, "relay-experiment": relay_experiment}[words[0]]()
            assert ended.value.code == 0, f"{command}: {capsys.readouterr().err}"
            ran += 1
    assert ran >= 8


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    for i, block in enumerate(blocks):
        script = tmp_path / f"block{i}.py"
        script.write_text(block)
        with contextlib.redirect_stdout(None):
            runpy.run_path(str(script))


def test_files_that_the_readme_names_exist():
    root = Path(__file__).parent.parent
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / path).exists(), path
