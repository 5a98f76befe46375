"""What a device does about judging, as its own config says (`judge: off | local | share`).

    off     nothing: a picture that is kept here never leaves, whoever asks
    local   the device scores its pictures itself, when it has nothing to draw, and sends numbers only
    share   a picture that is kept here may be sent for judging

The gateway draws the sample and asks; the device decides. A picture is remembered for a while after its result was
delivered, the newest few only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nodes.messages import Assign, JudgeThis, KeptPicture, Message, Scores
from relay.program import Program

if TYPE_CHECKING:
    from nodes.compute import Compute
    from nodes.scoring import Scored, Scorer

log = logging.getLogger("relay.node")
REMEMBERED = 64  # pictures that may still be asked for
QUEUE = 16  # pictures that wait to be scored; the oldest goes
IDLE_EVERY_S = 0.05
NICE = 19


class _Picture(NamedTuple):
    png: bytes
    prompt: str
    family: str


class DeviceJudge:
    """`tell`: a message to the gateway. `show`: a message with a picture, over the data lane."""

    def __init__(
        self, mode: str, metrics: Sequence[str | Mapping[str, Any]], compute: Compute,
        tell: Callable[[Message], Awaitable[Any]], show: Callable[[KeptPicture, bytes], Awaitable[Any]],
    ):  # fmt: skip
        self.mode, self.metrics, self.compute, self.tell, self.show = mode, metrics, compute, tell, show
        self._pictures: OrderedDict[str, _Picture] = OrderedDict()
        self._queue: deque[tuple[str, _Picture]] = deque()
        self._there = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._loop = asyncio.get_running_loop()

    def keep(self, assign: Assign, png: bytes) -> None:
        """A picture was drawn here for the gateway."""
        if self.mode == "off" or (self.mode == "share" and not assign.keep_image):
            return
        self._pictures[assign.job] = _Picture(png, assign.prompt, Program.parse(assign.program).family)
        while len(self._pictures) > REMEMBERED:
            self._pictures.popitem(last=False)

    async def asked(self, message: JudgeThis) -> None:
        """The gateway asks for a job's scores, or for its picture."""
        picture = self._pictures.pop(message.job, None)
        if self.mode == "off":
            await self._refuse(message.job, "this device gives neither pictures nor scores (`judge: off`)")
        elif picture is None:
            await self._refuse(message.job, "its picture is not here any more")
        elif self.mode == "share":
            await self.show(KeptPicture(job=message.job), picture.png)
        else:
            if len(self._queue) >= QUEUE:
                await self._refuse(self._queue.popleft()[0], "this device had no time for it")
            self._queue.append((message.job, picture))
            self._there.release()
            self._start()

    def stop(self) -> None:
        self._stopped = True
        self._there.release()

    async def _refuse(self, job: str, reason: str) -> None:
        await self.tell(Scores(job=job, reason=reason))

    # --- the thread ---

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        import torch

        from nodes.scoring import Scorer

        lowest_priority()
        torch.set_num_threads(1)  # of this thread: the compute thread's own are as they were
        scorer = Scorer(self.metrics)
        while True:
            self._there.acquire()
            if self._stopped:
                return
            try:
                job, picture = self._queue.popleft()
            except IndexError:  # it was the oldest of too many
                continue
            while self.compute.works and not self._stopped:  # drawing comes first
                time.sleep(IDLE_EVERY_S)
            began = time.monotonic()
            found = self._score(scorer, picture)
            message = Scores(job=job, scores=found.scores, missing=found.missing, seconds=time.monotonic() - began)
            asyncio.run_coroutine_threadsafe(self._told(message), self._loop)

    def _score(self, scorer: Scorer, picture: _Picture) -> Scored:
        scenes = self.compute.pipes[picture.family].family.spec.scenes
        return scorer.score(picture.png, picture.prompt, scenes)

    async def _told(self, message: Message) -> None:
        await self.tell(message)


def lowest_priority() -> None:
    """Of the calling thread alone, where the system can tell threads apart (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    except (AttributeError, OSError) as error:
        log.debug("the judge's thread keeps its priority: %s", error)
