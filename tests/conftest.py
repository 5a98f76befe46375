"""Shared by all tests: tiny checkpoints, saved once per session, and the families over them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tiny import DENOISER, build_sd3, build_sdxl, write_family

from relay.pipeline import RelayPipeline

torch.set_num_threads(1)  # tiny models: threads only get in each other's way
settings.register_profile("relay", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("relay")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> diffusers folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {"sdxl": build_sdxl(root / "sdxl"), "sd3": build_sd3(root / "sd3")}


@pytest.fixture(scope="session")
def pipes(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RelayPipeline]:
    """Architecture -> pipeline of large and small; `ARCHITECTURE-twin` has the large member on both sides."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for name, folder in checkpoints.items():
        small: dict[str, Any] = {"scheduler": "scheduler_small"} if name == "sdxl" else {}
        made[name] = write_family(root / f"{name}.yaml", folder, name, small=small)
        twin = {"subfolder": DENOISER[name]}
        made[f"{name}-twin"] = write_family(root / f"{name}-twin.yaml", folder, name, small=twin)
    return {name: RelayPipeline.from_pretrained(path) for name, path in made.items()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds per folder of tests/, set-up and tear-down included."""
    seconds: Counter[str] = Counter()
    for report in (each for category in terminalreporter.stats.values() for each in category):
        if isinstance(report, pytest.TestReport):
            *folders, _ = Path(report.location[0]).parts
            seconds["/".join(folders[:2])] += report.duration  # type: ignore[assignment]
    terminalreporter.section("time per folder")
    for folder, total in sorted(seconds.items()):
        terminalreporter.write_line(f"{total:7.1f} s  {folder}")
