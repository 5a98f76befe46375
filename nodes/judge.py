"""The judge as a process of its own, at the lowest priority: `relay judge --config FILE`, or a `judge:` block in what
`relay up` starts.

    dial the gateway (data lane)
    say every second how it is; when it is free, that it wants the next picture
    score what comes, in a thread, and send the scores back

It pulls: nobody waits for it, and when it dies what it had is lost to judging and to nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from nodes.deployment import Deployment, JudgeConfig, read_deployment
from nodes.keys import Peer
from nodes.messages import JudgeHere, Refused, Scores, ToJudge
from nodes.own_process import leave, lower_priority, memory_bytes, ready_for_libraries
from nodes.process import credentials, gateway_key, on_signals
from nodes.scoring import Scored, Scorer
from nodes.tasks import background
from nodes.transport import DATA, Client, sent
from relay.errors import BadRequest, RelayError

if TYPE_CHECKING:
    from relay.family_spec import FamilySpec

log = logging.getLogger("relay.judge")
NAME = "judge"  # of the process, of its key and of its role
BEAT_S = 1.0
SEND_S = 10.0


def run_judge(path: Path) -> None:
    """Until SIGTERM or Ctrl-C. BadRequest where the deployment has no judge, or names metrics that there are not."""
    deployment = read_deployment(path)
    config = deployment.judging
    if config is None:
        raise BadRequest(f"{path} wants no judge: add a block, e.g. `judge: {{share: 0.25}}`")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # before torch is imported
    lower_priority(config.nice)
    mine = credentials(deployment, path, NAME, NAME)
    gateway = Peer(name="gateway", role="gateway", key=gateway_key(deployment, path))
    ready_for_libraries()

    async def main() -> None:
        client = Client(
            deployment.gateway.data_address, DATA, mine, gateway, allow_plain_text=deployment.allow_plain_text
        )
        async with client:
            judge = Judge(config, _families(deployment), client)
            on_signals(lambda _: judge.stopped.set())
            await judge.run()

    asyncio.run(main())
    leave()


def _families(deployment: Deployment) -> dict[str, FamilySpec]:
    """What a deployment serves, by name: its nodes and its offer name families by name or by path."""
    from relay.family_spec import find_family

    named = [offer.family for offer in deployment.gateway.offer]
    named += [family for node in deployment.nodes.values() for family in node.families]
    specs = [find_family(name) for name in dict.fromkeys(named)]
    return {spec.name: spec for spec in specs}


class Judge:
    """`client`: connected to the gateway's data socket."""

    def __init__(self, config: JudgeConfig, families: dict[str, FamilySpec], client: Client):
        self.config, self.families, self.client = config, families, client
        self.scorer = Scorer(config.metrics)
        self.stopped = asyncio.Event()
        self.session = secrets.token_hex(6)
        self.ask = 0  # the number of its asking, 0 while it is busy
        self.asked = 0
        self.doing = "loading"
        self.judged = 0
        self.last_error: str | None = None
        self._thread = ThreadPoolExecutor(1, "scores", self._one_pool)

    async def run(self) -> None:
        """Until stopped."""
        tasks = [background(self._beat()), background(self._work())]
        stop = asyncio.ensure_future(self.stopped.wait())
        try:
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()  # a loop of ours that ended has failed: say so and end
        finally:
            for task in (stop, *tasks):
                task.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        await loop.run_in_executor(self._thread, self._warm_up)
        log.info("ready after %.1f s: %s", time.monotonic() - began, ", ".join(self.scorer.columns))
        while True:
            self.asked += 1
            self.ask, self.doing = self.asked, "waiting for a picture"
            await self._say()
            message, png = await self._next()
            self.ask, self.doing = 0, f"scoring {message.job}"
            began = time.monotonic()
            found = await loop.run_in_executor(self._thread, self._score, message, png)
            self.judged += 1
            answer = Scores(
                job=message.job, scores=found.scores, missing=found.missing, seconds=time.monotonic() - began
            )
            await sent(self.client.send(answer, timeout_s=SEND_S))

    async def _next(self) -> tuple[ToJudge, bytes]:
        while True:
            message, payloads = await self.client.receive()
            if isinstance(message, ToJudge):
                return message, bytes(payloads[0])
            if isinstance(message, Refused):
                self.last_error = f"refused by the gateway: {message.reason}"
                log.warning("%s", self.last_error)

    async def _beat(self) -> None:
        while True:
            await self._say()
            await asyncio.sleep(BEAT_S)

    async def _say(self) -> None:
        here = JudgeHere(
            session=self.session, ask=self.ask, doing=self.doing, judged=self.judged, columns=self.scorer.columns,
            memory_bytes=memory_bytes(), last_error=self.last_error,
        )  # fmt: skip
        await sent(self.client.send(here, timeout_s=BEAT_S), logging.DEBUG)

    # --- the thread ---

    def _one_pool(self) -> None:
        import torch

        torch.set_num_threads(self.config.threads)

    def _warm_up(self) -> None:
        """Loads what scores a family that draws scenes, if there is one: the first picture shall not wait for it."""
        if any(spec.scenes for spec in self.families.values()):
            for metric, why in self.scorer.score(_blank(), "a red circle", scenes=True).missing.items():
                self.last_error = f"{metric}: {why}"
                log.warning("%s cannot score: %s", metric, why)

    def _score(self, message: ToJudge, png: bytes) -> Scored:
        from relay.program import Program

        try:
            family = Program.parse(message.program).family
        except RelayError as error:
            return Scored({}, {"program": str(error)})
        spec = self.families.get(family)
        return self.scorer.score(png, message.prompt, spec is not None and spec.scenes)


def _blank() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="PNG")
    return buffer.getvalue()
