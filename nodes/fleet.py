"""A deployment's processes as one object, for demos, benchmarks, fault suites and tests: start, wait, ask, kill."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nodes.asker import Asker
from nodes.commands.service import children_of, free_port
from nodes.deployment import read_deployment
from nodes.keys import Credentials, Peer, load_public, load_secret
from nodes.process import keys_folder
from nodes.supervise import Supervisor
from relay.errors import RelayError

POLICY = "least-finish-time"


class Fleet:
    """A deployment that runs. `ask(work)` gives a coroutine function an Asker and returns what it returns."""

    def __init__(self, path: Path, up: Supervisor):
        self.path, self.up = path, up
        self.deployment = read_deployment(path)
        self.gateway = self.deployment.gateway
        self.store = Path(self.gateway.store)

    def ask(self, work: Any, timeout_s: float = 60.0) -> Any:
        async def asking() -> Any:
            async with self.asker() as asker:
                async with asyncio.timeout(timeout_s):
                    return await work(asker)

        return asyncio.run(asking())

    def asker(self) -> Asker:
        """As its client: with the key `client` where the deployment has keys."""
        folder = keys_folder(self.deployment, self.path)
        if folder is None:
            mine, server = Credentials.plain_text("client", "client"), Peer(name="gateway", role="gateway")
        else:
            mine, server = load_secret(folder / "client.key"), load_public(folder / "gateway.pub")
        return Asker(self.gateway.control, mine, server)

    def status(self) -> dict[str, Any]:
        return self.ask(lambda asker: asker.status())

    def draw(self, timeout_s: float = 60.0, **request: Any) -> tuple[dict[str, Any], bytes | None]:
        """One picture: its end, and its PNG if there is one."""

        async def work(asker: Asker) -> tuple[dict[str, Any], bytes | None]:
            accepted = await asker.submit(request)
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
        """Until all of these (default: the config's) are ready. RelayError where a process has failed for good."""
        wanted, ends = set(names or self.deployment.nodes), time.monotonic() + timeout_s
        here: set[str] = set()
        with _quietly():  # that nobody listens yet is no news here
            while time.monotonic() < ends:
                try:
                    here = {node["name"] for node in self.status()["nodes"] if node["state"] == "ready"}
                except (RelayError, TimeoutError):  # not listening yet
                    here = set()
                if wanted <= here:
                    return
                if failed := [name for name, child in self.up.status().items() if child.state == "failed"]:
                    raise RelayError(f"{', '.join(failed)} failed to start")
                time.sleep(0.2)
        raise TimeoutError(f"{', '.join(sorted(wanted - here))} not ready within {timeout_s:g} s: {self.up.status()}")


@contextmanager
def _quietly() -> Iterator[None]:
    transport = logging.getLogger("relay.transport")
    before = transport.level
    transport.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transport.setLevel(before)


@contextmanager
def fleet(
    folder: Path,
    nodes: dict[str, dict[str, Any]],
    gateway: dict[str, Any],
    keys: str | None = None,
    ready_s: float = 120.0,
    environment: Mapping[str, Mapping[str, str]] | None = None,
    judge: dict[str, Any] | None = None,
    cache: str | None = None,
) -> Iterator[Fleet]:
    """Processes of a deployment on free loopback ports, all of its nodes ready; stopped at the end.

    `nodes`, `gateway`, `judge`, `cache`: as in a deployment's YAML; addresses and store are filled in, everything lies in
    `folder`, and where no policy is named one decides that neither draws nor learns.
    `environment`: process -> variables on top of this process's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    filled = {
        name: config | ({"data": f"tcp://127.0.0.1:{free_port()}"} if config["role"] == "edge" else {})
        for name, config in nodes.items()
    }
    ports = {key: f"tcp://127.0.0.1:{free_port()}" for key in ("control", "data")}
    own = {"http": None, "store": str(folder / "store"), "heartbeat_s": 0.3, "policy": POLICY} | ports | gateway
    path = folder / "deployment.yaml"
    deployment = {"name": folder.name, "gateway": own, "nodes": filled} | ({"keys": keys} if keys else {})
    deployment |= {key: said for key, said in (("judge", judge), ("cache", cache)) if said is not None}
    path.write_text(yaml.safe_dump(deployment))
    with (folder / "log.txt").open("w") as file:
        own_env = environment or {}
        children = [
            replace(child, env={**child.env, **own_env.get(child.name, {})})
            for child in children_of(read_deployment(path), path)
        ]
        up = Supervisor(children, out=file, stop_s=15.0, deaths=1000, backoff_s=(0.05, 0.5))
        with up:
            running = Fleet(path, up)
            try:
                running.wait_for_nodes(timeout_s=ready_s)
                yield running
            except BaseException:
                print((folder / "log.txt").read_text()[-6000:], file=sys.stderr)
                raise
