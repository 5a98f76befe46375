"""A real deployment for tests: real processes on free loopback ports, over tiny random members unless said otherwise."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nodes.asker import Asker
from nodes.commands.service import children_of, free_port
from nodes.deployment import read_deployment
from nodes.keys import Credentials, Peer
from nodes.supervise import Supervisor

PROMPT = "a red circle"


class Running:
    """A deployment that runs. `ask(work)` gives a coroutine function an Asker and returns what it returns."""

    def __init__(self, path: Path, up: Supervisor):
        self.path, self.up = path, up
        self.deployment = read_deployment(path)
        self.gateway = self.deployment.gateway
        self.store = Path(self.gateway.store)

    def ask(self, work: Any, timeout_s: float = 60.0) -> Any:
        async def asking() -> Any:
            server = Peer(name="gateway", role="gateway", key="gateway/gateway")
            async with Asker(self.gateway.control, Credentials.plain_text("client", "client"), server) as asker:
                return await asyncio.wait_for(work(asker), timeout_s)

        return asyncio.run(asking())

    def status(self) -> dict[str, Any]:
        return self.ask(lambda asker: asker.status())

    def run(self, timeout_s: float = 60.0, **request: Any) -> tuple[dict[str, Any], bytes | None]:
        """One picture: its end, and its PNG if there is one."""

        async def work(asker: Asker) -> tuple[dict[str, Any], bytes | None]:
            accepted = await asker.submit({"prompt": PROMPT, **request})
            told = await asker.wait(accepted.jobs[0], timeout_s)
            return told, (await asker.image(accepted.jobs[0]))[1] if told["stage"] == "done" else None

        return self.ask(work, timeout_s + 10)

    def pid(self, name: str) -> int:
        pid = self.up.status()[name].pid
        assert pid is not None
        return pid

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), how)

    def wait_for_nodes(self, *names: str, timeout_s: float = 90.0) -> None:
        """Until all of these (default: the config's) are ready."""
        wanted, ends = set(names or self.deployment.nodes), time.monotonic() + timeout_s
        here: set[str] = set()
        while time.monotonic() < ends:
            try:
                here = {node["name"] for node in self.status()["nodes"] if node["state"] == "ready"}
            except Exception:  # not listening yet
                here = set()
            if wanted <= here:
                return
            time.sleep(0.2)
        raise AssertionError(f"{wanted - here} not ready within {timeout_s} s: {self.up.status()}")


@contextmanager
def deployed(
    folder: Path, nodes: dict[str, dict[str, Any]], gateway: dict[str, Any], log: Any = None
) -> Iterator[Running]:
    """`nodes` and `gateway` as in a deployment's YAML; addresses and store are filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    filled = {
        name: config | ({"data": f"tcp://127.0.0.1:{free_port()}"} if config["role"] == "edge" else {})
        for name, config in nodes.items()
    }
    ports = {key: f"tcp://127.0.0.1:{free_port()}" for key in ("control", "data")}
    own = {"http": None, "store": str(folder / "store"), "heartbeat_s": 0.3} | ports | gateway
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "gateway": own, "nodes": filled}))
    with (folder / "log.txt").open("w") as file:
        up = Supervisor(
            children_of(read_deployment(path), path), out=log or file, stop_s=8.0, deaths=50, backoff_s=(0.05, 0.5)
        )
        with up:
            running = Running(path, up)
            try:
                running.wait_for_nodes()
                yield running
            except BaseException:
                print((folder / "log.txt").read_text()[-6000:], file=sys.stderr)
                raise


def gather(*work: Coroutine[Any, Any, Any]) -> Any:
    """All of them, in order."""
    return asyncio.gather(*work)
