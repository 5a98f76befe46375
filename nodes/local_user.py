"""A device's own user: asks the device on a loopback socket, is served through the gateway, or by the device alone.

With a gateway the request goes there under the device's name: its small legs run on this device, the picture stays here
and only the report travels. Cut off, the device does what it can alone, edge-only, and says so in the answer; what only
the large member could do is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from nodes.deployment import Deployment
from nodes.keys import Credentials
from nodes.messages import Accepted, Ask, Assign, CancelJob, Feedback, Message, Refused, Result, Source, Submit, Told
from nodes.tasks import Tasks
from nodes.transport import DATA, SendFailed, Server, sent
from relay.errors import BadRequest, RelayError

if TYPE_CHECKING:
    from nodes.node import Node

log = logging.getLogger("relay.node")
ANSWER_S = 10.0
KEPT = 256  # jobs of its own that it remembers


class LocalUser:
    """`address` is loopback: whoever can reach it is the device's user."""

    def __init__(self, node: Node, address: str, deployment: Deployment):
        self.node, self.deployment = node, deployment
        self.server = Server(address, DATA, Credentials.plain_text(node.name, "device"))
        self._refs = itertools.count(1)
        self._asked: dict[int, asyncio.Future[tuple[Message, list[Any]]]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._tasks = Tasks()
        node.on_answer, node.on_end = self._answered, self._finished
        self._tasks.start(self._serve())

    async def close(self) -> None:
        self._tasks.cancel()
        with contextlib.suppress(AttributeError):  # it was never opened
            await self.server.close()

    async def _serve(self) -> None:
        await self.server.open()
        while True:
            identity, _, message, _ = await self.server.receive()
            if isinstance(message, (Submit, Ask, CancelJob, Feedback)):
                self._tasks.start(self._one(identity, message))

    async def _one(self, identity: bytes, message: Any) -> None:
        payload: list[bytes | memoryview] = []
        try:
            answer, payload = await self._answer(message)
        except RelayError as error:
            answer = Refused(ref=message.ref, reason=str(error), status=400)
        await sent(self.server.send(identity, answer, payload))

    async def _answer(self, message: Any) -> tuple[Message, list[bytes | memoryview]]:
        job = getattr(message, "job", "")
        if job in self._own:
            return await self._of_its_own(message)
        if isinstance(message, Ask) and message.what == "status" and not self.node.reachable:
            return Told(ref=message.ref, what="status", value=self._status()), []
        if isinstance(message, Ask) and message.what == "image" and job in self.node.images:
            result, png = self.node.images[job]
            told = {"id": job, "stage": "done", "seed": result.report["seed"], "report": result.report}
            return Told(ref=message.ref, what="image", value=told), [png]
        if self.node.reachable:
            return await self._forwarded(message)
        if isinstance(message, Submit):
            return await self._alone(message), []
        raise BadRequest("this device is cut off from its gateway and knows of no such job")

    async def _forwarded(self, message: Any) -> tuple[Message, list[bytes | memoryview]]:
        """To the gateway, and its answer back under the asker's own number."""
        import msgspec

        ref = next(self._refs)
        if isinstance(message, Submit):
            request = {"device": self.node.name} | message.request
            forwarded: Any = Submit(ref=ref, request=request, idempotency_key=message.idempotency_key)
        else:
            forwarded = msgspec.structs.replace(message, ref=ref)
        future = self._asked[ref] = asyncio.get_running_loop().create_future()
        try:
            await self.node.control.send(forwarded, timeout_s=2.0)
            async with asyncio.timeout(ANSWER_S + getattr(message, "wait_s", 0.0)):
                answer, payloads = await future
        except (TimeoutError, SendFailed):
            if isinstance(message, Submit):
                return await self._alone(message), []
            raise BadRequest("the gateway did not answer") from None
        finally:
            self._asked.pop(ref, None)
        if isinstance(answer, Told) and answer.what == "status":  # pictures of this user are here
            answer = msgspec.structs.replace(answer, value=answer.value | {"data": self.server.address})
        return msgspec.structs.replace(answer, ref=message.ref), [bytes(each) for each in payloads]

    def _answered(self, message: Message, payloads: list[Any]) -> None:
        if (future := self._asked.get(getattr(message, "ref", 0))) and not future.done():
            future.set_result((message, payloads))

    # --- alone ---

    async def _alone(self, message: Submit) -> Accepted:
        """Edge-only, on this device; BadRequest where that is not what was asked."""
        from nodes.requests import new_seed, read_request

        request = read_request(message.request)
        if request.mode not in (None, "edge-only") or request.handoff or request.program:
            raise BadRequest(
                "this device is cut off from its gateway and can only draw edge-only: ask for that, or wait"
            )
        family = request.family or next(iter(self.node.compute.pipes))
        if family not in self.node.compute.pipes:
            raise BadRequest(f"this device holds {', '.join(self.node.compute.pipes)}, not {family}")
        pipe = self.node.compute.pipes[family]
        words: dict[str, Any] = {
            "mode": "edge-only",
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
        }
        said = {k: v for k, v in words.items() if v is not None}
        program = await asyncio.to_thread(
            pipe.plan, [request.prompt], width=request.width, height=request.height, **said
        )
        width, height = pipe.family.spec.sizes.default
        first = request.seed if request.seed is not None else new_seed()
        jobs = []
        for i in range(request.images):
            job = f"local-{secrets.token_hex(8)}"
            self._own[job] = {"id": job, "stage": "denoising", "seed": first + i, "alone": True}
            self._ended[job] = asyncio.Event()
            self.node.take(
                Assign(
                    job=job, attempt=1, program=str(program), prompt=request.prompt, negative=request.negative_prompt,
                    seed=first + i, width=request.width or width, height=request.height or height, first_leg=0, last_leg=0,
                    source=Source(kind="noise"), keep_image=True,
                    deadline_s=request.deadline_ms / 1000 if request.deadline_ms else None,
                )
            )  # fmt: skip
            jobs.append(job)
        while len(self._own) > KEPT:
            old = next(iter(self._own))
            self._own.pop(old)
            self._ended.pop(old, None)
        log.info("cut off from the gateway: %d pictures are drawn here alone, edge-only", len(jobs))
        return Accepted(ref=message.ref, request=f"local-{secrets.token_hex(6)}", jobs=tuple(jobs))

    def _finished(self, key: Any, error: str, result: Result | None, png: bytes) -> None:
        """The node's word of a stretch that ended."""
        told = self._own.get(key[0])
        if told is None:
            return
        if result is None:
            told |= {"stage": "failed", "error": error}
        else:
            extra = {"nodes": [self.node.name], "alone": True, "seconds": sum(result.report["spent_s"].values())}
            told |= {"stage": "done", "report": result.report | extra, "png": png, "at": time.time()}
        self._ended[key[0]].set()

    async def _of_its_own(self, message: Any) -> tuple[Message, list[bytes | memoryview]]:
        told = self._own[message.job]
        if isinstance(message, Feedback):
            raise BadRequest(f"job {message.job} was drawn here alone: nobody learns from its rating")
        if isinstance(message, CancelJob):
            self.node.compute.cancel(message.job, 1)
            told["stage"] = "cancelled"
            self._ended[message.job].set()
            return Told(ref=message.ref, what="cancel", value=message.job), []
        if message.wait_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(message.wait_s, 60.0)):
                    await self._ended[message.job].wait()
        value = {k: v for k, v in told.items() if k != "png"}
        if message.what != "image":
            return Told(ref=message.ref, what=message.what, value=value), []
        if "png" not in told:
            raise BadRequest(f"job {message.job} has no image: it is {told['stage']}")
        return Told(ref=message.ref, what="image", value=value), [told["png"]]

    def _status(self) -> dict[str, Any]:
        why = self.node.control.state.reason or "not reached yet"
        return {
            "gateway": f"none: {why}", "data": self.server.address, "version": "", "up_s": 0.0,
            "policy": "edge-only, alone", "open": len(self.node.held), "stages": {}, "counters": {}, "nodes": [],
        }  # fmt: skip
