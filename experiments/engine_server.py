"""A small HTTP service in a process of its own, which serves one family three ways: what `experiments.served_bench` asks.

    POST /draw/WAY {"prompt", "seed", "program"}   one PNG, drawn from that prompt, seed and program
    GET  /ready                                    once every way has drawn one

FastAPI and uvicorn, as many threads for torch as told. All ways share this shell, the PNG encoder and the family's weights
and dtype; each has a thread of its own and only one is asked at a time. What differs is who is drawn with whom:

    engine  `nodes.compute.Compute`: what an edge node that holds both members runs, both engines in one thread
    one     diffusers' prefix and suffix pipelines, one request after the other
    static  the same in batches of all that waits, answered when the whole batch is done

The engine is behind this shell and not behind the gateway, so that the ratio is the serving discipline's alone: the
gateway adds a process that shares the cores, a ledger and a placement. What it costs is in service.md.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Protocol

import typer

WARM_UP = "a red circle"


class Way(Protocol):
    """`submit` may be called from any thread; the future holds the PNG."""

    def submit(self, prompt: str, seed: int, program: str) -> Future[bytes]: ...


class Engine:
    """An edge node's compute thread, without the node."""

    def __init__(self, family: str, threads: int, most: int, size: tuple[int, int]):
        from nodes.compute import Compute

        self.size = size
        self._open: dict[str, Future[bytes]] = {}
        self._lock, self._count = threading.Lock(), 0
        self.compute = Compute({family: ("large", "small")}, self._happened, threads=threads, batch=most)
        self.compute.start()
        self.compute.ready.wait()
        if self.compute.failed is not None:
            raise self.compute.failed

    def submit(self, prompt: str, seed: int, program: str) -> Future[bytes]:
        from nodes.messages import Assign, Source
        from relay.program import Program

        with self._lock:
            self._count += 1
            job = f"job_{self._count}"
        future = self._open[job] = Future()
        assign = Assign(
            job=job, attempt=1, program=program, prompt=prompt, negative=None, seed=seed, width=self.size[0],
            height=self.size[1], first_leg=0, last_leg=len(Program.parse(program).legs) - 1, source=Source(kind="noise"),
        )  # fmt: skip
        self.compute.take(assign, float("inf"))
        return future

    def _happened(self, event: Any) -> None:
        if event.kind in ("image", "failed"):
            future = self._open.pop(event.key[0])
            if event.kind == "image":
                future.set_result(event.data)
            else:
                future.set_exception(RuntimeError(event.reason))


class Batches:
    """diffusers' pipelines over `most` requests at a time, of those that wait; 1: one after the other."""

    def __init__(self, family: str, threads: int, most: int):
        self.most = most
        self._waiting: queue.SimpleQueue[tuple[Any, Future[bytes]]] = queue.SimpleQueue()
        loaded: Future[None] = Future()
        threading.Thread(target=self._work, args=(family, threads, loaded), daemon=True).start()
        loaded.result()  # one after the other: transformers patches torch's initialisation while it loads, for all threads

    def submit(self, prompt: str, seed: int, program: str) -> Future[bytes]:
        from experiments.diffusers_relay import Wanted

        future: Future[bytes] = Future()
        self._waiting.put((Wanted(prompt, seed, program), future))
        return future

    def _work(self, family: str, threads: int, loaded: Future[None]) -> None:
        import torch

        from experiments.diffusers_relay import DiffusersRelay
        from relay.family import Family

        torch.set_num_threads(threads)
        try:
            relay = DiffusersRelay(Family.load(family))
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self.most and not self._waiting.empty():
                batch.append(self._waiting.get())
            self._answer(relay, batch)

    @staticmethod
    def _answer(relay: Any, batch: Sequence[tuple[Any, Future[bytes]]]) -> None:
        from nodes.images import png_bytes, to_image

        try:
            images = relay.draw([wanted for wanted, _ in batch])
            found = [png_bytes(to_image(image), {}) for image in images]
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), png in zip(batch, found, strict=True):
            future.set_result(png)


def make_ways(family: str, threads: int, most: int) -> dict[str, Way]:
    """`most`: images in a batch of the engine and of static batches."""
    from relay.family_spec import find_family

    return {
        "engine": Engine(family, threads, most, find_family(family).sizes.default),
        "one": Batches(family, threads, 1),
        "static": Batches(family, threads, most),
    }


def make_app(ways: dict[str, Way], program: str) -> Any:
    """The shell."""
    import asyncio

    from fastapi import FastAPI
    from fastapi.responses import Response

    app = FastAPI()

    @app.post("/draw/{way}", response_model=None)
    async def draw(way: str, body: dict[str, Any]) -> Any:
        png = await asyncio.wrap_future(ways[way].submit(body["prompt"], body["seed"], body["program"]))
        return Response(png, media_type="image/png")

    @app.get("/ready", response_model=None)
    async def ready() -> Any:
        for way in ways.values():
            await asyncio.wrap_future(way.submit(WARM_UP, 0, program))
        return Response("ready")

    return app


def main(
    family: str,
    port: Annotated[int, typer.Option()],
    program: Annotated[str, typer.Option(help="What /ready draws.")],
    threads: int = 2,
    most: int = 32,
) -> None:
    """Serve until killed."""
    import torch
    import uvicorn

    from nodes.own_process import ready_for_libraries
    from nodes.session import quiet_libraries

    ready_for_libraries()
    quiet_libraries()
    torch.set_num_threads(threads)
    app = make_app(make_ways(family, threads, most), program)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    typer.run(main)
