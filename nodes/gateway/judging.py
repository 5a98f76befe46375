"""Which pictures are judged, and how they get to a judge and their scores back; never on a request's way.

    ended      a job has ended: drawn for the sample or not; into a bounded queue, newest kept; no disk, no wait
    a judge is free   the oldest in the queue is read from the disk, or asked of the device that keeps it, and sent
    a device scores its own   it is asked for the numbers; its picture stays where it is
    scores     taken only from whom the job was given to; into the report and to whoever learns

A judge that dies, or never answers, costs the scores of what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nodes.deployment import JudgeConfig
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.jobs import Job
from nodes.gateway.registry import Node
from nodes.keys import Peer
from nodes.messages import JudgeHere, JudgeThis, KeptPicture, Message, Refused, Scores, ToJudge, name_of
from nodes.scoring import REASON, Scorer
from nodes.stages import Stage
from nodes.tasks import Tasks
from nodes.transport import Server, sent
from relay.errors import BadRequest
from relay.program import Program

log = logging.getLogger("relay.gateway")
SILENT_S = 10.0  # a judge that was not heard for so long is not alive
SHOWN_S = 30.0  # a device has so long to send a picture
MAX_COLUMNS = 64
COLUMN = re.compile(r"[A-Za-z0-9_.-]{1,60}")


@dataclass(frozen=True)
class _Picture:
    """What may be judged. `image`: its file in the store; None: on the device `holder`."""

    job: str
    prompt: str
    program: str
    image: str | None
    holder: str
    ended: float  # monotonic


@dataclass(frozen=True)
class _Given:
    """To whom, by key, and until when an answer counts."""

    picture: _Picture
    key: str
    until: float


@dataclass
class _Judge:
    name: str
    key: str
    identity: bytes
    heard: float
    here: JudgeHere
    served: tuple[bytes, int] = (b"", 0)  # the connection and the number of the asking that was answered last

    @property
    def alive(self) -> bool:
        return time.monotonic() - self.heard < SILENT_S

    @property
    def free(self) -> bool:
        return self.alive and self.here.ask > 0 and self.served != (self.identity, self.here.ask)


@dataclass
class _Mean:
    """Of one column and mode."""

    total: float = 0.0
    count: int = 0


@dataclass
class Tally:
    """What `relay status` and /metrics show."""

    counters: Counter[str] = field(default_factory=Counter)
    lag: _Mean = field(default_factory=_Mean)
    last_lag_s: float | None = None
    scores: dict[tuple[str, str], _Mean] = field(default_factory=dict)  # (column, mode)


class Judging:
    """`config` None: the deployment has no judge process, and only devices that score their own pictures do anything.

    `data`: the gateway's data socket. `to_node`: a control message to a node by name, and whether it could be sent.
    """

    def __init__(
        self, config: JudgeConfig | None, dispatcher: Dispatcher, data: Server,
        to_node: Callable[[str, Message], Awaitable[bool]],
    ):  # fmt: skip
        self.config = config or JudgeConfig(share=1.0)
        self.expected = config is not None
        self.dispatcher, self.data, self.to_node = dispatcher, data, to_node
        self.waiting: deque[_Picture] = deque()
        self.given: dict[str, _Given] = {}
        self.judges: dict[str, _Judge] = {}  # by key
        self.tally = Tally()
        self.known = set(Scorer().columns)  # columns that /metrics shows
        self.wake = asyncio.Event()
        self._shown: dict[str, tuple[str, asyncio.Future[bytes]]] = {}  # job -> who may show it
        self._tasks = Tasks()
        dispatcher.on_end.append(self.ended)

    # --- in ---

    def ended(self, job: Job) -> None:
        """A job has ended; costs the same however much there is to judge."""
        if job.stage is not Stage.DONE:
            return
        if not self._drawn(job):
            asyncio.get_running_loop().call_soon(
                self.dispatcher.verdicts.unjudged, job.id
            )  # after the job's other hooks

    def _drawn(self, job: Job) -> bool:
        """Whether it is judged, and if so, who shall do it."""
        if random.random() >= self.config.share:
            return False
        report = job.report or {}
        node = self.dispatcher.registry.nodes.get(report.get("node", ""))
        mode = node.register.judge if node is not None else "off"
        picture = _Picture(
            job.id, job.request.prompt, str(report.get("program")), job.image, node.name if node else "",
            time.monotonic(),
        )  # fmt: skip
        if node is not None and mode == "local":
            self.tally.counters["sampled"] += 1
            self._tasks.start(self._ask_device(picture, node))
            return True
        if not self.expected:
            return False
        if job.image is None and mode != "share":
            self.tally.counters["kept"] += 1  # on its device, which shares nothing
            return False
        self.tally.counters["sampled"] += 1
        self.waiting.append(picture)
        self._keep_newest()
        return True

    def _keep_newest(self) -> None:
        """One more waits."""
        while len(self.waiting) > self.config.queue:
            self._unjudged(self.waiting.popleft().job, "dropped")
        self.wake.set()

    async def _ask_device(self, picture: _Picture, node: Node) -> None:
        if len(self.given) >= 2 * self.config.queue:
            self._unjudged(picture.job, "dropped")
            return
        self._give(picture, node.key)
        if not await self.to_node(node.name, JudgeThis(job=picture.job)):
            self._lost(picture.job)

    # --- out ---

    async def run(self) -> None:
        """Hand pictures to judges that are free, and give up on what does not come back."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.wake.wait()
            self.wake.clear()
            now = time.monotonic()
            for job in [job for job, given in self.given.items() if now > given.until]:
                self._lost(job)
            while self.waiting and (judge := next((j for j in self.judges.values() if j.free), None)) is not None:
                judge.served = judge.identity, judge.here.ask
                self._tasks.start(self._hand(judge, self.waiting.popleft()))

    def close(self) -> None:
        self._tasks.cancel()

    async def _hand(self, judge: _Judge, picture: _Picture) -> None:
        served = judge.served
        try:
            png = await self._read(picture)
        except (OSError, TimeoutError):
            self._unjudged(picture.job, "gone")
            self._still_free(judge, served)
            return
        message = ToJudge(job=picture.job, prompt=picture.prompt, program=picture.program)
        self._give(picture, judge.key)
        if not await sent(self.data.send(served[0], message, [png])):
            # nobody is there any more, or does not read: who is heard next may have it
            judge.heard = min(judge.heard, time.monotonic() - SILENT_S)
            self._still_free(judge, served)
            if self.given.pop(picture.job, None) is not None:
                self.waiting.appendleft(picture)
                self._keep_newest()

    def _still_free(self, judge: _Judge, served: tuple[bytes, int]) -> None:
        if judge.served == served:
            judge.served = b"", 0
            self.wake.set()

    async def _read(self, picture: _Picture) -> bytes:
        """The PNG. OSError where it is not kept any more, TimeoutError where its device does not send it."""
        if picture.image is not None:
            return await asyncio.to_thread((self.dispatcher.store / picture.image).read_bytes)
        node = self.dispatcher.registry.nodes.get(picture.holder)
        if node is None:
            raise FileNotFoundError(picture.holder)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._shown[picture.job] = node.key, future
        try:
            if not await self.to_node(node.name, JudgeThis(job=picture.job)):
                raise FileNotFoundError(picture.holder)
            async with asyncio.timeout(SHOWN_S):
                return await future
        finally:
            self._shown.pop(picture.job, None)

    def _give(self, picture: _Picture, key: str) -> None:
        self.given[picture.job] = _Given(picture, key, time.monotonic() + self.config.give_up_s)

    def _lost(self, job: str) -> None:
        if self.given.pop(job, None) is not None:
            self._unjudged(job, "lost")

    def _unjudged(self, job: str, why: str) -> None:
        self.tally.counters[why] += 1
        self.dispatcher.verdicts.unjudged(job)

    # --- hearing ---

    async def hear(
        self, server: Server, identity: bytes, peer: Peer, message: Message, payloads: Sequence[Any]
    ) -> None:
        """What a judge or a device says of judging, on either lane."""
        match message:
            case JudgeHere():
                self._here(identity, peer, message)
                return
            case Scores():
                refused = self._scored(peer, message)
            case KeptPicture():
                refused = self._show(peer, message.job, payloads)
            case _:
                return
        if refused is not None:
            self.tally.counters["refused"] += 1
            log.warning("%s of %s %s is refused: %s", name_of(message), peer.role, peer.name, refused)
            await sent(
                server.send(identity, Refused(reason=refused, status=403, what=name_of(message), job=message.job))
            )

    def _here(self, identity: bytes, peer: Peer, here: JudgeHere) -> None:
        judge = self.judges.get(peer.key)
        if judge is None or judge.here.session != here.session:
            log.info("the judge %s is here", peer.name)
        if judge is None:
            judge = self.judges[peer.key] = _Judge(peer.name, peer.key, identity, 0.0, here)
        judge.identity, judge.heard, judge.here = identity, time.monotonic(), here
        self.known |= {column for column in here.columns[:MAX_COLUMNS] if COLUMN.fullmatch(column)}
        self.wake.set()

    def _scored(self, peer: Peer, message: Scores) -> str | None:
        """Why they are refused, None where they are taken."""
        for_show = self._shown.get(message.job)
        if message.reason and for_show is not None and for_show[0] == peer.key:  # it was asked for the picture
            if not for_show[1].done():
                for_show[1].set_exception(FileNotFoundError(message.reason[:REASON]))
            return None
        given = self.given.get(message.job)
        if given is None or given.key != peer.key:
            return f"{peer.name} was not given job {message.job[:100]} to judge, or not any more"
        try:
            scores, missing = check_scores(message)
        except BadRequest as error:
            self._lost(message.job)
            return str(error)
        del self.given[message.job]
        if message.reason:
            log.info("job %s is not judged: %s", message.job, message.reason[:REASON])
            self._unjudged(message.job, "declined")
            return None
        self._count(given.picture, scores)
        lag = time.monotonic() - given.picture.ended
        self.tally.last_lag_s = lag
        self.tally.lag.total += lag
        self.tally.lag.count += 1
        judged = self.dispatcher.verdicts.judged(
            message.job, scores, by=peer.name, seconds=message.seconds, lag_s=lag, missing=missing
        )
        self._tasks.start(judged)
        return None

    def _show(self, peer: Peer, job: str, payloads: Sequence[Any]) -> str | None:
        key, future = self._shown.get(job, ("", None))
        if future is None or key != peer.key:
            return f"{peer.name} was not asked for the picture of job {job[:100]}"
        if not future.done():
            future.set_result(bytes(payloads[0]))
        return None

    def _count(self, picture: _Picture, scores: Mapping[str, float]) -> None:
        self.tally.counters["judged"] += 1
        with contextlib.suppress(BadRequest):
            mode = Program.parse(picture.program).mode
            for column in scores.keys() & self.known:
                mean = self.tally.scores.setdefault((column, mode), _Mean())
                mean.total += scores[column]
                mean.count += 1

    # --- told ---

    def told(self) -> dict[str, Any] | None:
        """For `relay status`; None where nothing is judged here."""
        if not self.expected and not self.tally.counters["sampled"]:
            return None
        now, tally = time.monotonic(), self.tally
        judges = [
            {"name": judge.name, "alive": judge.alive, "doing": judge.here.doing, "judged": judge.here.judged,
             "heard_s_ago": round(now - judge.heard, 1), "memory_bytes": judge.here.memory_bytes,
             "last_error": judge.here.last_error}
            for judge in self.judges.values()
        ]  # fmt: skip
        return {
            "expected": self.expected, "alive": any(judge.alive for judge in self.judges.values()), "judges": judges,
            "share": self.config.share, "waiting": len(self.waiting), "given": len(self.given),
            "counters": dict(tally.counters), "lag_s": tally.last_lag_s,
            "mean_lag_s": tally.lag.total / tally.lag.count if tally.lag.count else None,
        }  # fmt: skip


def check_scores(message: Scores) -> tuple[dict[str, float], dict[str, str]]:
    """Scores and what is missing. BadRequest unless every column is a name and every score a finite number."""
    if len(message.scores) > MAX_COLUMNS or len(message.missing) > MAX_COLUMNS:
        raise BadRequest(f"more than {MAX_COLUMNS} scores of one picture")
    for column, value in message.scores.items():
        if not COLUMN.fullmatch(column) or not math.isfinite(value):
            raise BadRequest(f"{column[:60]!r}: {value} is no score")
    if not 0 <= message.seconds < math.inf:
        raise BadRequest(f"{message.seconds} s is no time")
    return dict(message.scores), {name[:60]: why[:REASON] for name, why in message.missing.items()}
