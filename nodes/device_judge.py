"""What a device does about judging, as its own config says (`judge: off | local | share`).

    off     nothing: a picture that is kept here never leaves, whoever asks
    local   the device scores its pictures itself, when it has nothing to draw, and sends numbers only
    share   a picture that is kept here may be sent for judging

The gateway draws the sample and asks; the device decides. A picture is remembered for a while after its result was
delivered, the newest few only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from nodes.deployment import JudgeConfig
from nodes.messages import Assign, JudgeThis, KeptPicture, Message, Scores
from nodes.score_process import NotScored, ScoreProcess
from nodes.tasks import background
from relay.program import Program

if TYPE_CHECKING:
    from nodes.compute import Compute

REMEMBERED = 64  # pictures that may still be asked for
QUEUE = 16  # pictures that wait to be scored; the oldest goes
IDLE_EVERY_S = 0.05
REST_S = 60.0  # without a picture, the process that scores ends


class _Picture(NamedTuple):
    png: bytes
    prompt: str
    family: str


class DeviceJudge:
    """`tell`: a message to the gateway. `show`: a message with a picture, over the data lane."""

    def __init__(
        self, mode: str, config: JudgeConfig, compute: Compute,
        tell: Callable[[Message], Awaitable[Any]], show: Callable[[KeptPicture, bytes], Awaitable[Any]],
    ):  # fmt: skip
        self.mode, self.compute, self.tell, self.show = mode, compute, tell, show
        self.process = ScoreProcess(config.metrics, config.nice)
        self._pictures: OrderedDict[str, _Picture] = OrderedDict()
        self._queue: deque[tuple[str, _Picture]] = deque()
        self._there = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

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
            self._queue.append((message.job, picture))
            self._there.set()
            if self._work is None:
                self._work = background(self._score_all())
            if len(self._queue) > QUEUE:
                await self._refuse(self._queue.popleft()[0], "this device had no time for it")

    async def close(self) -> None:
        if self._work is not None:
            self._work.cancel()
        await self.process.stop()

    async def _refuse(self, job: str, reason: str) -> None:
        await self.tell(Scores(job=job, reason=reason))

    async def _score_all(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REST_S):
                    await self._there.wait()
            self._there.clear()
            if not self._queue:
                await self.process.stop()
            while self._queue:
                while self.compute.works:  # drawing comes first
                    await asyncio.sleep(IDLE_EVERY_S)
                if self._queue:  # its oldest may have gone meanwhile
                    await self._score(*self._queue.popleft())

    async def _score(self, job: str, picture: _Picture) -> None:
        began = time.monotonic()
        scenes = self.compute.pipes[picture.family].family.spec.scenes
        try:
            found = await self.process.score(picture.png, picture.prompt, scenes)
        except NotScored as error:
            await self._refuse(job, str(error))
            return
        await self.tell(Scores(job=job, scores=found.scores, missing=found.missing, seconds=time.monotonic() - began))
