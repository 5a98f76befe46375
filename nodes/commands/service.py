"""`relay gateway | edge | device | up`: the processes of a deployment."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.errors import BadRequest

if TYPE_CHECKING:
    from nodes.deployment import Deployment
    from nodes.supervise import Child

Config = Annotated[Path, typer.Option("--config", help="A deployment, as in configs/deployments/.")]
Name = Annotated[str | None, typer.Option(help="Which of the config's nodes; default: the only one of this role.")]
Route = Annotated[
    list[str] | None, typer.Option(metavar="ADDR=ADDR", help="Dial the second address where the config says the first.")
]


def gateway(config: Config) -> None:
    """Run the gateway: it accepts requests, records them, decides where they run, and answers."""
    from nodes.logs import set_up
    from nodes.process import run_gateway

    set_up()
    run_gateway(config)


def edge(config: Config, name: Name = None, route: Route = None) -> None:
    """Run an edge node: it holds large members and runs the early steps."""
    _node("edge", config, name, route)


def device(config: Config, name: Name = None, route: Route = None) -> None:
    """Run a device node: it holds small members, finishes pictures, and connects outwards only."""
    _node("device", config, name, route)


def _node(role: str, config: Path, name: str | None, route: list[str] | None) -> None:
    from nodes.logs import set_up
    from nodes.process import run_node

    routes = {}
    for each in route or []:
        here, equals, there = each.partition("=")
        if not equals:
            raise BadRequest(f"--route {each!r} is not ADDR=ADDR")
        routes[here] = there
    set_up()
    run_node(config, role, name, routes)


def up(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A deployment, as in configs/deployments/.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Only these of its processes, the gateway's name is gateway.")
    ] = None,
) -> None:
    """Start a gateway and its nodes with the links between them; Ctrl-C stops them all."""
    from nodes.deployment import read_deployment
    from nodes.supervise import Supervisor

    deployment = read_deployment(config)
    children = children_of(deployment, config)
    if sys.stdout.isatty():  # lines for a person, prefixed by the process's name
        children = [replace(child, env={**child.env, "RELAY_LOGS": "text"}) for child in children]
    if only:
        if unknown := set(only) - {child.name for child in children}:
            raise BadRequest(f"--only {', '.join(sorted(unknown))}: {config} has {', '.join(c.name for c in children)}")
        children = [child for child in children if child.name in only]
    raise typer.Exit(Supervisor(children, stop_s=max(20.0, _longest_drain(deployment) + 5)).run())


def children_of(deployment: Deployment, path: Path) -> list[Child]:
    """A process for the gateway, for each node, for each emulated link, and for the judge."""
    from nodes.supervise import Child

    relay = [sys.executable, "-m", "nodes.cli"]
    config = ["--config", str(path)]
    children = [Child("gateway", [*relay, "gateway", *config], _threads(1), forked=True)]
    for name, node in deployment.nodes.items():
        argv = [*relay, node.role, *config, "--name", name]
        if node.link is not None:
            link, routes = _link(deployment, path, name)
            children.append(Child(f"{name}.link", [*relay, *link]))
            argv += [part for here, there in routes.items() for part in ("--route", f"{here}={there}")]
        children.append(Child(name, argv, _threads(node.threads), forked=True))
    if (judging := deployment.judging) is not None and (
        deployment.judge is not None or _judge_has_key(deployment, path)
    ):
        children.append(Child("judge", [*relay, "judge", *config], _threads(judging.threads), forked=True))
    return children


def _judge_has_key(deployment: Deployment, path: Path) -> bool:
    """Whether the judge that a deployment has by default may come in; said where it may not."""
    from nodes.process import keys_folder

    folder = keys_folder(deployment, path)
    if folder is None or (folder / "judge.key").exists():
        return True
    print(f"no judge, so nothing is learned from scores: `relay keygen judge --role judge --out {folder}` lets one in",
          file=sys.stderr)  # fmt: skip
    return False


def _link(deployment: Deployment, path: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """The link emulator's arguments, and where a node must dial so that all it says goes through it."""
    import msgspec

    from scheduler.links import find_link

    node, gateway = deployment.nodes[name], deployment.gateway
    targets = [gateway.control, gateway.data_address]
    targets += [address for each in deployment.nodes.values() if (address := each.data_address) is not None]
    argv, routes = ["link"], {}
    for target in dict.fromkeys(targets):
        port = free_port()
        routes[target] = f"tcp://127.0.0.1:{port}"
        argv += ["--listen", f"127.0.0.1:{port}", "--to", target.removeprefix("tcp://")]
    find_link(node.link)  # type: ignore[arg-type]  # refused here rather than in a child
    if node.link_control is not None:
        argv += ["--control", node.link_control]
    if isinstance(node.link, str):
        return [*argv, "--profile", node.link], routes
    store = Path(gateway.store)
    store.mkdir(parents=True, exist_ok=True)
    file = store / f"link-{name}.yaml"
    file.write_bytes(msgspec.yaml.encode(node.link))
    return [*argv, "--profile", str(file)], routes


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "PYTHONUNBUFFERED": "1"}


def _longest_drain(deployment: Deployment) -> float:
    return max((node.drain_s for node in deployment.nodes.values()), default=0.0)
