"""Does the advisor choose well on links that it has not seen? Programs are timed between real processes, over emulated links.

    start a gateway, an edge with the large member and a device with the small one behind the link emulator
    time every program of a run over every link, in turns; the asker is the device's own user (`nodes.local_user`)
    take step costs and what the service adds (`experiments.advise_service`) from one fast link, and from nothing else
    for each held-out link and each floor: let the advisor choose; how far is that from the best measured program?

Scores are the run's, times are this command's. A choice is best where no program above the floor was measured faster.
Beside it the choice by the step costs that are stored with the run, which were measured in one process, another day.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler.links import LinkProfile

if TYPE_CHECKING:
    import polars as pl

    from experiments.advise import Costs
    from experiments.advise_service import Service
    from relay.program import Program
    from scheduler.message_sizes import MessageSizes

FLOORS = (0.0, 0.8, 0.9, 0.95, 0.98)  # least shares of the large member's score


def _link(name: str, megabit_s: float, delay_ms: float, jitter_ms: float = 0.0) -> LinkProfile:
    return LinkProfile(
        name=name, bandwidth_bit_s=megabit_s * 1e6, delay_s=delay_ms / 1e3, jitter_s=jitter_ms / 1e3
    )  # fmt: skip


# Figures of our own, chosen so that neither steps nor link decide alone.
FITTED = _link("near", 1000, 0.2)
HELD_OUT = (
    _link("office", 40, 4, 1), _link("train", 6, 45, 10), _link("hotel", 2.5, 20, 4), _link("village", 1.2, 30, 5),
    _link("overseas", 30, 90, 5), _link("narrow", 0.6, 5),
)  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/advise-links.md"
    ),
    run: Annotated[
        Path, typer.Option(help="A run of configs/experiments/rise.yaml: programs, scores, step costs.")
    ] = Path("docs/results/rise"),
    family: Annotated[list[str] | None, typer.Option(help="Default: all of the run's.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds over each link; medians count.")] = 9,
    threads: Annotated[int, typer.Option(help="Of each node.")] = 1,
) -> None:
    """Time a run's programs over links and write how far the advisor's choices are from the best."""
    import polars as pl

    from experiments.provenance import write_result
    from experiments.run_folder import open_run
    from nodes.session import quiet_libraries

    quiet_libraries()
    opened = open_run(run)
    names = family or opened.outcomes["family"].unique().sort().to_list()
    results = {}
    for name in names:
        own = pl.col("family") == name
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(
                Path(folder),
                name,
                opened.outcomes.filter(own),
                opened.times.filter(own),
                repeats,
                threads,
                FITTED,
                HELD_OUT,
            )
    write_result(
        out, "The advisor on links that it has not seen", "\n".join(map(table, results, results.values())), results
    )


def measure(
    folder: Path, family: str, outcomes: pl.DataFrame, times: pl.DataFrame, repeats: int, threads: int,
    fitted: LinkProfile, held_out: Sequence[LinkProfile],
) -> dict[str, Any]:  # fmt: skip
    """`family`: name or path, whose rows `outcomes` and `times` are. All figures of one family."""
    from dataclasses import asdict

    import polars as pl

    from experiments.advise import fit_costs
    from experiments.advise_service import Measured, fit_service
    from relay.family_spec import find_family
    from relay.program import Program
    from scheduler.message_sizes import computed_sizes

    texts = outcomes.filter(pl.col("method") == "program")["program"].unique(maintain_order=True).to_list()
    programs = [Program.parse(text) for text in texts]
    prompts = outcomes["prompt"].unique(maintain_order=True).to_list()
    rows = timed(folder, family, programs, prompts, [fitted, *held_out], repeats, threads)
    sizes = computed_sizes(find_family(family))
    near = [row for row in rows if row["link"] == fitted.name]
    costs, encode_s = stage_costs(near)

    def median(link: LinkProfile, program: Program, of: str) -> float:
        return statistics.median(row[of] for row in rows if (row["link"], row["program"]) == (link.name, str(program)))

    medians = {link.name: {str(p): median(link, p, "seconds") for p in programs} for link in (fitted, *held_out)}
    basis = [Measured(p, median(fitted, p, "seconds"), median(fitted, p, "bytes")) for p in programs]
    service = fit_service(basis, costs, fitted, sizes, encode_s)
    stored = fit_costs(times)
    found = [judged(outcomes, programs, costs, stored, service, link, sizes, medians[link.name]) for link in held_out]
    return {
        "repeats": repeats, "threads": threads, "fitted": fitted.name, "costs_s": asdict(costs), "stored_costs_s": asdict(stored),
        "service": asdict(service), "links": {link.name: link.describe() for link in (fitted, *held_out)},
        "medians_s": medians, "held_out": found,
        "rows": [{key: row[key] for key in ("link", "program", "round", "seconds", "bytes")} for row in rows],
    }  # fmt: skip


# --- measuring ---


def timed(
    folder: Path, family: str, programs: Sequence[Program], prompts: Sequence[str], links: Sequence[LinkProfile],
    repeats: int, threads: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a program, link and round: the asker's seconds, the nodes' own of each stage, the bytes that the link carried
    (less what it carries when nobody asks). Every round goes over every link, with the programs in a random order and
    another prompt each time, so that a drifting machine drifts for all."""
    from nodes.asker import Asker
    from nodes.commands.service import free_port
    from nodes.fleet import fleet
    from nodes.keys import Credentials, Peer
    from nodes.link_control import LinkControl

    source = str(Path(family).resolve()) if Path(family).suffix else family
    control, local = str(folder / "link.sock"), f"tcp://127.0.0.1:{free_port()}"
    nodes: dict[str, dict[str, Any]] = {
        "edge": {"role": "edge", "families": {source: ["large"]}, "threads": threads},
        "device": {"role": "device", "families": {source: ["small"]}, "threads": threads, "local": local,
                   "link": "lan", "link_control": control},
    }  # fmt: skip
    gateway = {"offer": [{"family": source}], "checkpoint_every": 0}
    rng, rows = random.Random(0), []

    async def drive() -> None:
        server = Peer(name="device", role="device", key="device/device")
        seed = 0
        with LinkControl(control) as emulator:
            async with Asker(local, Credentials.plain_text("user", "client"), server) as asker:
                idle_s = await _idle_bytes(emulator)
                for turn in range(repeats + 1):
                    for link in links:
                        await asyncio.to_thread(emulator.set, link)
                        for program in rng.sample(list(programs), len(programs)):
                            seed += 1
                            before = _carried(emulator)
                            row = await _one(asker, program, prompts[seed % len(prompts)], seed)
                            row["bytes"] = _carried(emulator) - before - idle_s * row["seconds"]
                            if turn:  # the first one warms up: connections, the meters' time-outs
                                rows.append({"link": link.name, "round": turn - 1, **row})

    with fleet(folder / "deployment", nodes, gateway, ready_s=300.0):
        asyncio.run(drive())
    return rows


def _carried(emulator: Any) -> int:
    status = emulator.status()
    return int(status.up.bytes + status.down.bytes)


async def _idle_bytes(emulator: Any, seconds: float = 2.0) -> float:
    """Bytes a second that the link carries when nobody asks: heartbeats."""
    before = _carried(emulator)
    await asyncio.sleep(seconds)
    return (_carried(emulator) - before) / seconds


async def _one(asker: Any, program: Program, prompt: str, seed: int) -> dict[str, Any]:
    """From the question to the picture in the asker's hands."""
    from relay.errors import RelayError

    request = {"prompt": prompt, "program": str(program), "seed": seed}
    began = time.monotonic()
    job = (await asker.submit(request)).jobs[0]
    told = await asker.wait(job, 300.0)
    if told["stage"] != "done":
        raise RelayError(f"{program}: {told['error']}")
    _, png = await asker.image(job)
    seconds = time.monotonic() - began
    spent = told["report"]["timings"]
    return {"program": str(program), "seconds": seconds, "png_bytes": len(png), "spent_s": spent}


def stage_costs(rows: Sequence[Mapping[str, Any]]) -> tuple[Costs, float]:
    """Seconds of a step of each member as the nodes took them, and of encoding on the edge; medians over rows."""
    from experiments.advise import Costs
    from relay.program import Program

    large: list[float] = []
    small: list[float] = []
    encode: list[float] = []
    for row in rows:
        program, spent = Program.parse(row["program"]), row["spent_s"]
        for node, member, found in (("edge", "large", large), ("device", "small", small)):
            if program.steps[member]:
                found.append(spent[node]["denoising"] / program.steps[member])
        if program.steps["large"]:
            encode.append(spent["edge"].get("encoding", 0.0))
    return Costs(0.0, 0.0, statistics.median(large), statistics.median(small)), statistics.median(encode)


# --- choosing ---


def judged(
    outcomes: pl.DataFrame, programs: Sequence[Program], costs: Costs, stored: Costs, service: Service, link: LinkProfile,
    sizes: MessageSizes, medians: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Predictions of one link against what was measured on it, and the advisor's choices against the best."""
    from experiments.advise import advise

    errors = {
        str(p): service.predict(p, costs, link, sizes) / medians[str(p)] - 1 for p in programs
    }  # fmt: skip
    choices = []
    for floor in FLOORS:
        options = advise(outcomes, costs, link, sizes, floor=floor, service=service)
        old = advise(outcomes, stored, link, sizes, floor=floor)
        allowed = [option.program for option in options if option.of_large >= floor]
        best = min(allowed, key=lambda text: medians[text])
        choices.append(
            {"floor": floor, "chosen": options[0].program, "chosen_s": medians[options[0].program], "best": best,
             "best_s": medians[best], "gap": medians[options[0].program] / medians[best] - 1,
             "gap_without_service": medians[old[0].program] / medians[best] - 1}
        )  # fmt: skip
    return {"link": link.name, "errors": errors, "choices": choices}


# --- what is shown ---


def table(name: str, result: dict[str, Any]) -> str:
    costs, service = result["costs_s"], result["service"]
    lines = [
        f"## {name}",
        "",
        f"Medians of {result['repeats']} rounds, {result['threads']} thread(s) a node. On the fitted link a large step took"
        f" {1000 * costs['large_s']:.1f} ms, a small one {1000 * costs['small_s']:.1f} ms.",
        "",
        f"Fitted on {result['links'][result['fitted']]}:",
        "",
        "| mode | seconds beside its steps | bytes beside latent or picture |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {mode} | {1000 * way['seconds']:.1f} ms | {way['bytes']:.0f} |" for mode, way in service["ways"].items()
    ]
    lines += [
        "",
        "| held-out link | floor | chosen | takes | best measured | takes | gap | gap by the run's stored costs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    worst, worst_old = 0.0, 0.0
    for found in result["held_out"]:
        for choice in found["choices"]:
            worst, worst_old = max(worst, choice["gap"]), max(worst_old, choice["gap_without_service"])
            lines.append(
                f"| {result['links'][found['link']]} | {choice['floor']:.0%} | {_short(choice['chosen'])} |"
                f" {1000 * choice['chosen_s']:.0f} ms | {_short(choice['best'])} | {1000 * choice['best_s']:.0f} ms |"
                f" {choice['gap']:.1%} | {choice['gap_without_service']:.1%} |"
            )
    lines.append(f"| largest | | | | | | **{worst:.1%}** | {worst_old:.1%} |")
    lines += ["", "Predicted against measured time, all programs:", ""]
    lines += ["| held-out link | median error | largest |", "| --- | --- | --- |"]
    for found in result["held_out"]:
        errors = list(found["errors"].values())
        lines.append(f"| {found['link']} | {statistics.median(errors):+.1%} | {max(errors, key=abs):+.1%} |")
    return "\n".join(lines) + "\n"


def _short(program: str) -> str:
    return program.split("/match", maxsplit=1)[0].split("/", 1)[1]


if __name__ == "__main__":
    typer.run(main)
