"""Asking a gateway (or a device, for its own user) over ZeroMQ: what `relay submit`, `status` and `trace` use."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from nodes.keys import Credentials, Peer
from nodes.messages import Accepted, Ask, CancelJob, Drain, Feedback, Message, Refused, Submit, Told
from nodes.tasks import background
from nodes.transport import CONTROL, DATA, Client, SendFailed
from relay.errors import RelayError


class Unanswered(RelayError):
    """No answer within the time; the text says what is known of the connection."""


class RefusedByGateway(RelayError):
    """The gateway's own words."""

    def __init__(self, refused: Refused):
        super().__init__(refused.reason)
        self.status, self.retry_after_s = refused.status, refused.retry_after_s


class Asker:
    """`async with Asker(address, credentials, server) as asker: ...`; `server`: who is expected there, and its key."""

    def __init__(self, address: str, mine: Credentials, server: Peer, allow_plain_text: bool = False):
        self.client = Client(address, CONTROL, mine, server, allow_plain_text=allow_plain_text)
        self.address = address
        self._refs = itertools.count(1)
        self._open: dict[int, asyncio.Future[tuple[Message, list[Any]]]] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._data: Client | None = None
        self._plain = allow_plain_text

    async def __aenter__(self) -> Asker:
        await self.client.connect()
        self._readers.append(background(self._read(self.client)))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for reader in self._readers:
            reader.cancel()
        for client in (self.client, self._data):
            if client is not None:
                await client.close()

    async def submit(self, request: dict[str, Any], key: str | None = None, timeout_s: float = 20.0) -> Accepted:
        message, _ = await self._ask(Submit(request=request, idempotency_key=key, ref=next(self._refs)), timeout_s)
        assert isinstance(message, Accepted)
        return message

    async def job(self, job: str, wait_s: float = 0.0) -> dict[str, Any]:
        """Its state; with `wait_s` when it has ended or that time is over."""
        return await self._told("job", job, wait_s)

    async def wait(self, job: str, timeout_s: float) -> dict[str, Any]:
        """Its state once it has ended. Unanswered when the time is over."""
        ends = time.monotonic() + timeout_s
        while (left := ends - time.monotonic()) > 0:
            told = await self._told("job", job, min(left, 20.0))
            if told["stage"] in ("done", "failed", "cancelled"):
                return told
        raise Unanswered(f"job {job} has not ended within {timeout_s:g} s")

    async def image(self, job: str) -> tuple[dict[str, Any], bytes]:
        """Its state and its PNG, over the data socket."""
        if self._data is None:
            address = (await self.status())["data"]
            self._data = Client(address, DATA, self.client.me, self.client.server, allow_plain_text=self._plain)
            await self._data.connect()
            self._readers.append(background(self._read(self._data)))
        message, payloads = await self._ask(Ask(what="image", job=job, ref=next(self._refs)), 60.0, self._data)
        assert isinstance(message, Told)
        return message.value, bytes(payloads[0])

    async def status(self) -> dict[str, Any]:
        return await self._told("status")

    async def trace(self, job: str) -> list[dict[str, Any]]:
        return await self._told("trace", job)

    async def cancel(self, job: str) -> None:
        await self._ask(CancelJob(job=job, ref=next(self._refs)), 10.0)

    async def rate(self, job: str, rating: float, comment: str | None = None) -> dict[str, Any]:
        """Say what its picture is worth, 0 to 1; the rating as it is kept."""
        message, _ = await self._ask(Feedback(job=job, rating=rating, comment=comment, ref=next(self._refs)), 10.0)
        assert isinstance(message, Told)
        return dict(message.value)

    async def drain(self, node: str, limit_s: float) -> None:
        await self._ask(Drain(node=node, limit_s=limit_s, ref=next(self._refs)), 10.0)

    async def _told(self, what: str, job: str = "", wait_s: float = 0.0) -> Any:
        message, _ = await self._ask(Ask(what=what, job=job, wait_s=wait_s, ref=next(self._refs)), wait_s + 10.0)
        assert isinstance(message, Told)
        return message.value

    async def _ask(self, question: Any, timeout_s: float, client: Client | None = None) -> tuple[Message, list[Any]]:
        future = self._open[question.ref] = asyncio.get_running_loop().create_future()
        try:
            await (client or self.client).send(question, timeout_s=min(timeout_s, 5.0))
            async with asyncio.timeout(timeout_s):  # wait_for (Python 3.11) forgets a cancellation of the same moment
                message, payloads = await future
        except TimeoutError:
            raise Unanswered(f"{self.address} did not answer within {timeout_s:g} s") from None
        except SendFailed as error:
            raise Unanswered(str(error)) from None
        finally:
            self._open.pop(question.ref, None)
        if isinstance(message, Refused):
            raise RefusedByGateway(message)
        return message, payloads

    async def _read(self, client: Client) -> None:
        while True:
            message, payloads = await client.receive()
            ref = getattr(message, "ref", 0)
            if (future := self._open.get(ref)) and not future.done():
                future.set_result((message, payloads))
            elif isinstance(message, Refused) and ref == 0:  # it could not read the question
                for future in self._open.values():
                    if not future.done():
                        future.set_result((message, []))
