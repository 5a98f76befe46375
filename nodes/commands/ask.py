"""`relay submit | status | trace | cancel | feedback | drain`: talking to a running gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes import options as opt
from relay.errors import BadRequest, RelayError

if TYPE_CHECKING:
    from nodes.asker import Asker

DEFAULT = "tcp://127.0.0.1:5600"
SLOWER = 1.5  # times as long as it measured at its start: said from there on
COLUMNS = (
    "node", "role", "state", "doing", "jobs", "battery", "pace", "start-up", "memory", "cpu", "round trip", "done", "last error",
)  # fmt: skip
Gateway = Annotated[str, typer.Option(metavar="ADDR", help="The gateway's control address.")]
Key = Annotated[Path | None, typer.Option(help="Your secret key (relay keygen); plain text without.")]
GatewayKey = Annotated[Path | None, typer.Option(help="The gateway's public key file, with --key.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def submit(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    gateway: Gateway = DEFAULT,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    family: Annotated[str | None, typer.Option(help="Default: what the gateway's policy chooses.")] = None,
    mode: Annotated[str | None, typer.Option(help="full-cloud | relay | edge-only.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="T")] = None,
    handoff: Annotated[int | None, typer.Option(metavar="S", help="Steps the large member takes.")] = None,
    small_steps: Annotated[int | None, typer.Option(metavar="N")] = None,
    program: Annotated[str | None, typer.Option(help="A whole program in its text form.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses seed + i; default: a random one, reported.")] = None,
    images: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    preference: Annotated[float, typer.Option(help="0 asks for quality, 1 for speed.")] = 0.5,
    deadline_ms: Annotated[int | None, typer.Option(help="End in an error if it is not done by then.")] = None,
    allow_degraded: Annotated[
        bool | None,
        typer.Option(help="Whether another program may finish when a node dies; default: only if nothing was fixed."),
    ] = None,
    cache: opt.Cache = None,
    wait: Annotated[bool, typer.Option(help="Wait for the pictures; else print the jobs' ids.")] = True,
    key: Key = None,
    gateway_key: GatewayKey = None,
    as_json: Json = False,
) -> None:
    """Ask a gateway for pictures and fetch them.

    Example: relay submit "a red heart at the top left" --handoff 10 --small-steps 6 --family mini-sd3
    """
    said = {
        "prompt": prompt, "family": family, "mode": mode, "steps": steps, "handoff": handoff, "small_steps": small_steps,
        "program": program, "seed": seed, "images": images, "preference": preference, "deadline_ms": deadline_ms,
        "allow_degraded": allow_degraded, "cache": cache,
    }  # fmt: skip
    request = {name: value for name, value in said.items() if value is not None}

    async def main(asker: Asker) -> None:
        accepted = await asker.submit(request)
        if not wait:
            print(json.dumps(accepted.jobs) if as_json else "\n".join(accepted.jobs))
            return
        failed = None
        for job in accepted.jobs:
            told = await asker.wait(job, (deadline_ms or 3600_000) / 1000 + 10)
            if told["stage"] == "done":
                path = await _save(asker, job, out)
                print(json.dumps(told | {"file": str(path)}) if as_json else _line(told, path))
            else:
                failed = f"job {job}: {told['stage']}: {told['error']}"
        if failed:
            raise RelayError(failed)

    _ask(gateway, key, gateway_key, main)


async def _save(asker: Asker, job: str, out: Path) -> Path:
    from nodes.images import write_bytes

    told, png = await asker.image(job)
    path = out / f"{job}-{told['seed']}.png"
    write_bytes(path, png)
    return path


def _line(told: dict[str, Any], path: Path) -> str:
    report = told["report"]
    taken = " + ".join(f"{n} {member}" for member, n in report["steps"].items() if n)
    degraded = ", degraded: another program finished" if told.get("degraded") else ""
    start = report.get("start")
    cached = f", from step {start['skipped']} of {start['source']}, {start['similarity']:.3f} alike" if start else ""
    where, how = f"{taken} steps on {', '.join(report['nodes'])}", f"{cached}{degraded}"
    return f"{path}  {where}  {report['seconds']:.2f} s  seed {told['seed']}{how}"


def status(
    gateway: Gateway = DEFAULT,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
    key: Key = None,
    gateway_key: GatewayKey = None,
    as_json: Json = False,
) -> None:
    """Say what a gateway and its nodes really do now."""

    async def main(asker: Asker) -> None:
        if as_json:
            print(json.dumps(await asker.status(), indent=1))
            return
        from rich.console import Console

        console = Console(width=None if watch else max(Console().width, 160))
        if not watch:
            console.print(status_table(await asker.status()))
            return
        from rich.live import Live

        with Live(status_table(await asker.status()), console=console, refresh_per_second=4) as live:
            while True:
                await asyncio.sleep(1)
                live.update(status_table(await asker.status()))

    _ask(gateway, key, gateway_key, main)


def status_table(told: dict[str, Any]) -> Any:
    from rich.table import Table

    stages = ", ".join(f"{n} {stage}" for stage, n in told["stages"].items()) or "none"
    counted = ", ".join(f"{n} {what}" for what, n in sorted(told["counters"].items())) or "nothing yet"
    who = f"{told['gateway']} {told['version']}, up {told['up_s']:.0f} s, policy {told['policy']}"
    title = f"{who}; open jobs: {stages}; {counted}{_deciding(told.get('decisions'))}{_judging(told.get('judge'))}"
    title += _load(told.get("load"))
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in COLUMNS:
        table.add_column(column)
    if "memory_bytes" in told:  # not from a device that is cut off from its gateway
        doing = f"{told['open']} jobs are open"
        table.add_row("gateway", "gateway", "ready", doing, "", "", "", *_cost(told), "", "", "")
    for node in told["nodes"]:
        pace = f"{node['pace']:g}x emulated" if node["emulated"] else "own"
        if node["slower"] >= SLOWER:
            pace += f", now {node['slower']:.1f}x slower"
        trip = "?" if node["round_trip_s"] is None else f"{node['round_trip_s'] * 1000:.1f} ms"
        battery = "" if node["battery"] is None else f"{node['battery']:.0%}"
        jobs = f"{node['running']} + {node['queued']}"
        cells = [node["name"], node["role"], node["state"], node["doing"], jobs, battery, pace, *_cost(node), trip]
        table.add_row(*cells, str(node["done"]), node["last_error"] or "")
    return table


def _cost(process: dict[str, Any]) -> list[str]:
    """How long it took to start, what it holds in memory, and the processor time that it has used."""
    return [f"{process['startup_s']:.1f} s", f"{process['memory_bytes'] / 1e6:.0f} MB", f"{process['cpu_s']:.0f} s"]


def _deciding(told: dict[str, Any] | None) -> str:
    """What decides, how much it has learned, the latest decision and its reason, and what is broken."""
    if told is None:
        return ""
    learned = f"; learned from {told['learned']}" if told["learned"] is not None else ""
    router = f"; router {told['router']}" if told["router"] else ""
    broken = f"; BROKEN: {told['broken']}" if told["broken"] else ""
    latest = ""
    if told["latest"]:
        last = told["latest"][-1]
        why = last["mark"] or last["reason"] or "by its estimate"
        latest = (
            f"; last: {last['mode']} on {'+'.join(last['nodes'])} with probability {last['probability']:.2g} ({why})"
        )
    return f"{learned}{router}{latest}{broken}"


def _load(told: dict[str, Any] | None) -> str:
    """Demand, whether anything is held back and at which prices, and what was refused."""
    if told is None:
        return ""
    prices = ", ".join(f"{name} {price:.2g}" for name, price in told["prices"].items() if price > 0)
    state = f"pressed ({prices or 'queues'})" if told["pressed"] else "no pressure"
    why = f", NO PLAN: {told['why_no_plan']}" if told["why_no_plan"] else ""
    counted = ", ".join(f"{told['counters'].get(what, 0)} {what}" for what in ("admitted", "late", "share"))
    return f"; load {told['demand_per_s']:.3g}/s, {state}{why}: {counted}"


def _judging(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    judges = ", ".join(judge["doing"] if judge["alive"] else f"{judge['name']} is gone" for judge in told["judges"])
    who = f" ({judges})" if judges else ""
    state = "alive" if told["alive"] else "not here" if told["expected"] else "devices only"
    counted = ", ".join(f"{told['counters'].get(what, 0)} {what}" for what in ("sampled", "judged", "dropped"))
    lag = "" if told["lag_s"] is None else f", lag {told['lag_s']:.1f} s"
    return f"; judge {state}{who}: {counted}{lag}"


def trace(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    gateway: Gateway = DEFAULT,
    chrome: Annotated[
        Path | None, typer.Option(help="Write Chrome trace JSON here (chrome://tracing, Perfetto).")
    ] = None,
    key: Key = None,
    gateway_key: GatewayKey = None,
    as_json: Json = False,
) -> None:
    """Show one job's timeline over all nodes."""

    async def main(asker: Asker) -> None:
        events = await asker.trace(job)
        if chrome is not None:
            from nodes.trace import chrome_trace

            chrome.write_text(json.dumps(chrome_trace(job, events)))
            print(chrome)
        elif as_json:
            print(json.dumps(events, indent=1))
        else:
            started = events[0]["at"] if events else time.time()
            for event in events:
                shown = {k: v for k, v in event.items() if k not in ("at", "node", "what") and v not in ("", 0, 0.0)}
                more = ", ".join(f"{k} {v}" for k, v in shown.items())
                print(f"{event['at'] - started:8.3f} s  {event['node']:<12} {event['what']:<10} {more}")

    _ask(gateway, key, gateway_key, main)


def cancel(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    gateway: Gateway = DEFAULT,
    key: Key = None,
    gateway_key: GatewayKey = None,
) -> None:
    """Cancel an open job."""

    async def main(asker: Asker) -> None:
        await asker.cancel(job)
        print(f"{job} cancelled")

    _ask(gateway, key, gateway_key, main)


def feedback(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    rating: Annotated[float, typer.Argument(metavar="RATING", help="0: useless, 1: just right.")],
    comment: Annotated[str | None, typer.Option(help="Kept with the job.")] = None,
    gateway: Gateway = DEFAULT,
    key: Key = None,
    gateway_key: GatewayKey = None,
) -> None:
    """Rate a picture of yours; a second rating replaces the first."""

    async def main(asker: Asker) -> None:
        kept = await asker.rate(job, rating, comment)
        print(f"{job} rated {kept['rating']:g}")

    _ask(gateway, key, gateway_key, main)


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE")],
    gateway: Gateway = DEFAULT,
    limit: Annotated[
        float, typer.Option(metavar="S", help="Then it goes, whatever runs; the gateway places that elsewhere.")
    ] = 30.0,
    key: Key = None,
    gateway_key: GatewayKey = None,
) -> None:
    """Let a node finish what it has and go; it gets nothing new. For rolling upgrades."""

    async def main(asker: Asker) -> None:
        await asker.drain(node, limit)
        print(f"{node} drains, {limit:g} s at most")

    _ask(gateway, key, gateway_key, main)


def _ask(gateway: str, key: Path | None, gateway_key: Path | None, main: Callable[[Asker], Awaitable[None]]) -> None:
    from nodes.asker import Asker
    from nodes.keys import Credentials, Peer, load_public, load_secret

    if (key is None) != (gateway_key is None):
        raise BadRequest("--key and --gateway-key go together: yours, and the one the gateway must prove")
    mine = load_secret(key) if key else Credentials.plain_text("client", "client")
    server = load_public(gateway_key) if gateway_key else Peer(name="gateway", role="gateway")

    async def ask() -> None:
        async with Asker(gateway, mine, server) as asker:
            await main(asker)

    asyncio.run(ask())
