"""The demo: a fleet of processes on this machine, a stream of prompts, a live view, pictures and a summary on disk.

start the deployment's processes, wait until its nodes are ready
submit prompts as they arrive; watch gateway and nodes
fetch the pictures, judge them, write what ran where and how long it took
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay.errors import RelayError

if TYPE_CHECKING:
    from nodes.asker import Asker
    from nodes.fleet import Fleet

# What a request may say beside its prompt: most leave the choice to the policy, some fix it.
WISHES: tuple[dict[str, Any], ...] = ({}, {}, {"mode": "full-cloud"}, {}, {"mode": "edge-only"}, {})


def main(
    config: Annotated[Path, typer.Option(help="A deployment.")] = Path("configs/deployments/simulation.yaml"),
    out: Annotated[Path, typer.Option(help="Folder for pictures, sheet.png, summary.md and summary.json.")] = Path(
        "out/demo"
    ),
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 12,
    gap: Annotated[float, typer.Option(metavar="S", help="Mean seconds between two of them (Poisson).")] = 0.8,
    seed: int = 0,
) -> None:
    """Run a deployment, send it prompts, show what happens."""
    from nodes.commands.service import children_of
    from nodes.deployment import read_deployment
    from nodes.fleet import Fleet
    from nodes.supervise import Supervisor

    children = children_of(read_deployment(config), config)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w") as log, Supervisor(children, out=log) as up:
        try:
            started, running = time.monotonic(), Fleet(config, up)
            running.wait_for_nodes(timeout_s=150.0)
            print(f"{len(running.deployment.nodes)} nodes are ready after {time.monotonic() - started:.0f} s")
            jobs = asyncio.run(_drive(running, prompts, gap, seed, out))
        except (TimeoutError, RelayError) as error:
            raise RelayError(f"{error}; what the processes said is in {out / 'log.txt'}") from None
    write_summary(jobs, out)
    print((out / "summary.md").read_text())
    print(f"pictures: {out / 'sheet.png'} and {out / 'pictures'}; what the processes said: {out / 'log.txt'}")


async def _drive(running: Fleet, count: int, gap: float, seed: int, out: Path) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.live import Live

    from experiments.workloads import load_workload
    from nodes.commands.ask import status_table

    texts = [p.text for p in load_workload("scenes").prompts("test", count, seed)]
    console = Console()
    async with running.asker() as asker:
        ended: list[dict[str, Any]] = []
        work = asyncio.ensure_future(_stream(asker, texts, gap, seed, out, ended))
        if console.is_terminal:
            with Live(console=console, refresh_per_second=4, transient=True) as live:
                while not work.done():
                    live.update(status_table(await asker.status()))
                    await asyncio.wait([work], timeout=0.5)
        await work
        console.print(status_table(await asker.status()))
    return ended


async def _stream(
    asker: Asker, texts: list[str], gap: float, seed: int, out: Path, ended: list[dict[str, Any]]
) -> None:
    """Submit as they arrive, fetch as they end."""
    import numpy as np

    rng = np.random.default_rng(seed)
    waiting = []
    for i, text in enumerate(texts):
        accepted = await asker.submit({"prompt": text, "seed": i} | WISHES[i % len(WISHES)])
        waiting.append(asyncio.ensure_future(_fetch(asker, accepted.jobs[0], text, out)))
        await asyncio.sleep(float(rng.exponential(gap)))
    ended += await asyncio.gather(*waiting)


async def _fetch(asker: Asker, job: str, text: str, out: Path) -> dict[str, Any]:
    told = await asker.wait(job, 120)
    if told["stage"] != "done":
        return told | {"prompt": text}
    told, png = await asker.image(job)
    path = out / "pictures" / f"{told['seed']:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    return told | {"prompt": text, "file": str(path)}


def write_summary(jobs: list[dict[str, Any]], out: Path) -> None:
    """summary.json, summary.md and a sheet of the pictures with where they were made."""
    from experiments.contact_sheet import Cell, contact_sheet
    from nodes.images import open_image
    from nodes.results import score

    lines = ["| prompt | steps | nodes | seconds | attributes right |", "| --- | --- | --- | --- | --- |"]
    rows = []
    for job in jobs:
        if job["stage"] != "done":
            lines.append(f"| {job['prompt']} | {job['stage']}: {job['error']} | | | |")
            continue
        report = job["report"]
        image = open_image(Path(job["file"]))
        job["score"] = score(image, job["prompt"])["attributes"]
        taken = " + ".join(f"{n} {member}" for member, n in report["steps"].items() if n)
        family = report["program"].split("/")[0]
        where = " -> ".join(dict.fromkeys(report["nodes"]))
        lines.append(
            f"| {job['prompt']} | {family}: {taken} | {where} | {report['seconds']:.2f} | {job['score']:.0%} |"
        )
        note = f"{report['seconds']:.1f} s, {job['score']:.0%}"
        rows.append((f"{job['prompt']} [{where}]", [Cell(image, note)]))
    done = [job for job in jobs if job["stage"] == "done"]
    said = f"{len(done)} of {len(jobs)} pictures were made; latency in seconds from submitting to the end, on this machine."
    (out / "summary.md").write_text("\n".join([*lines, "", said]) + "\n")
    (out / "summary.json").write_text(json.dumps(jobs, indent=1) + "\n")
    if rows:
        contact_sheet("What the service drew [where]", ["latency, right"], rows).save(out / "sheet.png")


if __name__ == "__main__":
    from nodes.cli import run

    app = typer.Typer(add_completion=False)
    app.command()(main)
    run(app)
