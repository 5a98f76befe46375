"""From a deployment's YAML to a running process: keys, sockets, signals. What `relay gateway|edge|device` run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.deployment import Deployment, NodeConfig, node_of, read_deployment
from nodes.keys import AllowList, Credentials, Peer, load_public, load_secret
from nodes.own_process import leave, ready_for_libraries
from relay.errors import BadRequest

if TYPE_CHECKING:
    from nodes.transport import Client, Lane


def keys_folder(deployment: Deployment, path: Path) -> Path | None:
    """Relative to the YAML that names it."""
    return None if deployment.keys is None else path.parent / deployment.keys


def credentials(deployment: Deployment, path: Path, name: str, role: str) -> Credentials:
    """This process's key; without keys it speaks plain text. BadRequest where the key is another role's."""
    folder = keys_folder(deployment, path)
    if folder is None:
        return Credentials.plain_text(name, role)
    mine = load_secret(folder / f"{name}.key")
    if (mine.name, mine.role) != (name, role):
        raise BadRequest(f"{folder / name}.key is the key of {mine.role} {mine.name}, not of {role} {name}")
    return mine


def allow_list(deployment: Deployment, path: Path) -> AllowList | None:
    folder = keys_folder(deployment, path)
    return None if folder is None else AllowList(folder)


def gateway_key(deployment: Deployment, path: Path) -> str:
    """The public key that the gateway must prove, empty in plain text."""
    folder = keys_folder(deployment, path)
    if folder is None:
        return ""
    return deployment.gateway_key or load_public(folder / "gateway.pub").key


def run_gateway(path: Path) -> None:
    """Until SIGTERM or Ctrl-C."""
    started = time.monotonic()
    deployment = read_deployment(path)
    mine = credentials(deployment, path, "gateway", "gateway")
    allow = allow_list(deployment, path)
    ready_for_libraries()

    async def main() -> None:
        from nodes.gateway.service import Gateway
        from nodes.transport import CONTROL, DATA, Server

        config = deployment.gateway
        plain = deployment.allow_plain_text
        async with (
            Server(config.control, CONTROL, mine, allow, allow_plain_text=plain) as control,
            Server(config.data, DATA, mine, allow, allow_plain_text=plain) as data,
        ):
            gateway = Gateway(deployment, control, data, started)
            on_signals(lambda _: gateway.stopped.set())
            await gateway.run()

    asyncio.run(main())
    leave()


def run_node(path: Path, role: str, name: str | None, routes: Mapping[str, str] | None = None) -> None:
    """Until it was drained: by SIGTERM, Ctrl-C, or the gateway's word. A second signal ends it at once."""
    started = time.monotonic()
    deployment = read_deployment(path)
    name, config = node_of(deployment, name, role, path)
    if config.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # before torch is imported
    mine = credentials(deployment, path, name, role)
    ready_for_libraries()

    async def main() -> None:
        from nodes.exchange import Exchange
        from nodes.node import Node
        from nodes.tasks import background
        from nodes.transport import CONTROL, DATA, Client, Server

        allow, key = allow_list(deployment, path), gateway_key(deployment, path)
        table = {**config.routes, **(routes or {})}
        plain = deployment.allow_plain_text

        def dial(address: str, lane: Lane, peer: Peer) -> Client:
            return Client(table.get(address, address), lane, mine, peer, allow_plain_text=plain)

        def dial_edge(address: str, server_key: str) -> Client:
            return dial(address, DATA, Peer(name=server_key, role="edge", key=server_key))

        gateway = Peer(name="gateway", role="gateway", key=key)
        control = dial(deployment.gateway.control, CONTROL, gateway)
        data = dial(deployment.gateway.data_address, DATA, gateway)
        await data.connect()
        server = Server(config.data, DATA, mine, allow, allow_plain_text=plain) if config.data is not None else None
        if server is not None:
            await server.open()
        bound = int(deployment.gateway.checkpoint_mb * 1e6)  # of others' checkpoints, where this edge keeps them
        exchange = Exchange(data, deployment.gateway.data_address, dial_edge, server, config.pad, bound)
        node = Node(name, config, deployment, control, exchange, started)
        local = _local_user(node, config, deployment)
        stopping: list[asyncio.Task[None]] = []

        def stop(_: int) -> None:
            if stopping:
                node.stopped.set()
            else:
                stopping.append(background(node.drain("told to stop")))

        on_signals(stop)
        try:
            await node.run()
        finally:
            for socket in (local, control, data, server):
                if socket is not None:
                    await socket.close()

    asyncio.run(main())
    leave()


def _local_user(node: Any, config: NodeConfig, deployment: Deployment) -> Any:
    """A device's own user asks it on a loopback socket."""
    if config.local is None:
        return None
    from nodes.local_user import LocalUser

    return LocalUser(node, config.local, deployment)


def on_signals(act: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act, number)
