"""How long and how much is kept: requests, jobs, timelines and pictures `keep_hours` after their end, and of pictures no
more than `keep_mb`, the oldest going first (with their request, so that nothing is half there).

Open requests are never dropped. The decision log bounds itself; checkpoints live in memory, with their own bound.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from nodes.gateway.ledger import Ledger

STRAY_S = 3600.0  # a file that no job names may be one whose end is just being written


async def tidy(ledger: Ledger, store: Path, keep_hours: float, keep_mb: float) -> int:
    """Drop what is over; the number of pictures dropped. Call it now and then."""
    before = time.time() - keep_hours * 3600
    cutoff = await asyncio.to_thread(_cutoff, ledger, store, int(keep_mb * 1e6))
    images = await ledger.forget(max(before, cutoff))
    await asyncio.to_thread(_remove, ledger, store, images)
    return len(images)


def _cutoff(ledger: Ledger, store: Path, limit: int) -> float:
    """The end of the newest job whose picture does not fit any more: it and all older go. 0 where all fit."""
    kept = 0
    for ended_at, image in ledger.ended_images():
        try:
            kept += (store / image).stat().st_size
        except OSError:
            continue
        if kept > limit:
            return float(ended_at) + 1e-6
    return 0.0


def _remove(ledger: Ledger, store: Path, images: list[str]) -> None:
    """The files of dropped jobs, and strays: written for a job that was cancelled before its end was on disk."""
    for image in images:
        (store / image).unlink(missing_ok=True)
    before, folder = time.time() - STRAY_S, store / "images"
    old = []
    for file in folder.iterdir() if folder.is_dir() else ():
        try:
            if file.stat().st_mtime < before:
                old.append(file)
        except OSError:
            continue
    # Asked after the files were listed: one whose end was written meanwhile is named, whatever the clock says of its age.
    named = {image for _, image in ledger.ended_images()} if old else set()
    for file in old:
        if str(file.relative_to(store)) not in named:
            file.unlink(missing_ok=True)
