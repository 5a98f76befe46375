"""`relay link` and `relay link-set`: a slow network between two processes, and how it is changed while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.errors import BadRequest

if TYPE_CHECKING:
    import asyncio

    from nodes.link import LinkStatus


def link(
    to: Annotated[list[str], typer.Option(metavar="HOST:PORT", help="Where it passes on to; once per --listen.")],
    profile: Annotated[str, typer.Option(help="loopback | lan | wifi | 5g | lte | dsl, or a YAML.")],
    listen: Annotated[
        list[str],
        typer.Option(metavar="HOST:PORT", help="Port 0: the system chooses. Given twice: routes that share it."),
    ],
    profile_up: Annotated[
        str | None, typer.Option(help="From those who dial to the target; default: as --profile.")
    ] = None,
    control: Annotated[
        str,
        typer.Option(metavar="HOST:PORT|PATH", help="Where `relay link-set` reaches it: loopback or a unix socket."),
    ] = "127.0.0.1:0",
    seed: Annotated[int | None, typer.Option(help="Of the jitter; default: another one each time.")] = None,
) -> None:
    """Emulate a link: pass TCP on with a profile's bandwidth, delay and jitter, until Ctrl-C."""
    from nodes.link import Link, run_link
    from nodes.link_control import serve
    from scheduler.links import find_link

    if len(listen) != len(to):
        raise BadRequest(f"--listen is given {len(listen)} times and --to {len(to)} times; they go in pairs")
    if seed is not None and seed < 0:
        raise BadRequest(f"--seed {seed} must be at least 0")
    down, up = find_link(profile), find_link(profile_up) if profile_up else None

    async def main(stop: asyncio.Event) -> None:
        made = Link(list(zip(listen, to, strict=True)), down, up, seed)
        try:
            await made.start()
            server, address = await serve(made, control)
            for line in _describe(made.status()):
                print(line)
            print(f"control {address}", flush=True)
            await stop.wait()
            server.close()
            if "/" in address:
                Path(address).unlink(missing_ok=True)
        finally:
            made.close()

    run_link(main)


def link_set(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT|PATH", help="The control address `relay link` printed.")],
    stall: Annotated[bool, typer.Option("--stall", help="Nothing moves, connections stay.")] = False,
    cut: Annotated[bool, typer.Option("--cut", help="Reset connections, refuse new ones.")] = False,
    restore: Annotated[bool, typer.Option("--restore", help="End of --stall or --cut.")] = False,
    profile: Annotated[str | None, typer.Option(help="loopback | lan | wifi | 5g | lte | dsl, or a YAML.")] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="BIT_S", help="Bits a second, e.g. 4e6.")] = None,
    delay: Annotated[float | None, typer.Option(metavar="S", help="Mean one-way delay in seconds.")] = None,
    jitter: Annotated[float | None, typer.Option(metavar="S", help="Its standard deviation.")] = None,
    direction: Annotated[str, typer.Option(help="both | up | down: which way the figures are for.")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Change a running link; without an option, only say how it is."""
    import msgspec

    from nodes.link_control import LinkControl
    from relay.program import check_choice
    from scheduler.links import find_link

    check_choice("direction", direction, ("both", "up", "down"))
    if stall + cut + restore > 1:
        raise BadRequest("--stall, --cut and --restore exclude each other")
    found = find_link(profile) if profile is not None else None
    with LinkControl(address) as client:
        status = client.status()
        if any(value is not None for value in (found, bandwidth, delay, jitter)):
            status = client.set(
                found,
                direction=direction,  # type: ignore[arg-type]
                bandwidth_bit_s=bandwidth,
                delay_s=delay,
                jitter_s=jitter,
            )
        for asked, what in ((stall, client.stall), (cut, client.cut), (restore, client.restore)):
            if asked:
                status = what()
    print(msgspec.json.encode(status).decode() if as_json else "\n".join(_describe(status)))


def _describe(status: LinkStatus) -> list[str]:
    lines = [f"link {status.state}, {status.connections} connections"]
    lines += [f"  {listen} -> {to}" for listen, to in status.routes]
    for name, line in (("up", status.up), ("down", status.down)):
        lines.append(f"  {name:<4} {line.profile.describe()}; {line.bytes} bytes, {line.under_way} under way")
    return lines
