"""Tasks that nobody waits for: held, because one that nobody holds may be collected, and heard of when they break."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("relay.tasks")


def background(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task nobody waits for: if it breaks, that is an error of ours, and the log says so. Its maker holds it."""

    def said(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s broke", task.get_coro(), exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(said)
    return task


class Tasks:
    """Holds what was started until it has ended."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = background(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def cancel(self) -> None:
        """All that still run."""
        for task in self._running:
            task.cancel()
