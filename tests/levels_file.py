"""Levels of the programs on offer, their quality by a rule of the tests' own: letters bear everything."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from nodes.deployment import Offer
from nodes.gateway.planner import Planner
from scheduler.features import PROMPT
from scheduler.load.prediction import FORMAT, Levels, Linear, MeasuredLevel

WORTH = {"full-cloud": 0.9, "relay": 0.85, "edge-only": 0.4}


def write_levels(
    path: Path, offer: list[dict[str, Any]], worth: dict[str, float] = WORTH, starts: dict[int, float] | None = None
) -> dict[str, str]:
    """Mode -> its program. `starts`: steps that full-cloud skips from a cached latent -> the share of quality it keeps."""
    offered = asyncio.run(Planner([msgspec.convert(each, Offer) for each in offer]).start())
    quality = [worth[program.mode] for program in offered]
    letters = [0.0 if p.mode == "full-cloud" else 0.5 - 0.02 * i for i, p in enumerate(offered)]
    levels = [MeasuredLevel(str(p), q) for p, q in zip(offered, quality, strict=True)]
    full = next(i for i, program in enumerate(offered) if program.mode == "full-cloud")
    for skipped, share in (starts or {}).items():
        levels.append(MeasuredLevel(str(offered[full]), share * quality[full], skipped))
        letters.append(share * letters[full])
    quality = [level.quality for level in levels]
    coefficients = [[t if name == "text" else 0.0 for name in PROMPT] for t in letters]
    linear = Linear([0.0] * len(PROMPT), [1.0] * len(PROMPT), coefficients, quality)
    found = Levels(
        format=FORMAT, family="mini-sd3", metric="attributes", levels=levels, prompt_only=linear, with_router=None,
        router=None, router_version=None, sample=[quality] * 20, provenance={},
    )  # fmt: skip
    path.write_bytes(msgspec.json.encode(found))
    return {p.mode: str(p) for p in offered}
