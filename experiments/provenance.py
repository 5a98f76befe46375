"""What every written figure carries: commit, machine, versions, date, and the command that made it."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from relay.files import write_atomically

RESULTS = Path(__file__).parent.parent / "docs" / "results"  # what this checkout ships as measured


def provenance() -> dict[str, Any]:
    import diffusers
    import torch

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        if Path(sys.argv[0]).name in ("relay", "relay-experiment")
        else _module_command(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def machine(facts: dict[str, Any]) -> str:
    """What did the work: the accelerator where there is one, else the processor."""
    return facts["processor"] if facts["accelerator"] == "none" else facts["accelerator"]


def _module_command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0]).name
    return " ".join(["python -m", name.removesuffix(".__main__"), *sys.argv[1:]])


def _commit() -> str:
    """The commit, with "+" where tracked files differ from it."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()


def write_result(out: Path, title: str, text: str, families: dict[str, Any]) -> None:
    """A measured table as Markdown in `out`, its data as JSON beside it, both with where they come from; printed too."""
    from rich.console import Console

    facts = provenance()
    body = f"{text}\n{footer(facts)}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, f"# {title}\n\n{body}")
    data = json.dumps({"families": families, "provenance": facts}, indent=1)
    write_atomically(out.with_suffix(".json"), data + "\n")
    Console().print(body, soft_wrap=True, highlight=False, markup=False)


def footer(facts: dict[str, Any]) -> str:
    """One line of Markdown under a table."""
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return (
        f"`{facts['command']}` at commit {facts['commit']}, {facts['date']}, on {facts['processor']} "
        f"({facts['threads']} threads, accelerator: {facts['accelerator']}), {versions}."
    )
