"""The step engine behind HTTP against diffusers' pipelines behind the same HTTP: requests in, PNGs out.

The server is a process of its own, `experiments.engine_server`; only one of its ways is asked at a time. N askers each send their
next request as soon as the last is answered, over connections that stay open; every request has another prompt and seed,
and a program with one of the mix's s. A turn asks every way with the same requests, after the batch curves of both
members were measured again; ratios are of one turn, and medians over turns are shown.

What the curves allow a mix: 1 / (encode + decode + mean over its programs of s min_B t_large(B) / B + n min_B
t_small(B) / B), B up to N, requests a second. Nothing else is in it: no HTTP, no PNG.

`service`, where asked for: the whole of it, our gateway's HTTP in front of an edge node that holds both members.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIXES = {"mixed s": (0.2, 0.4, 0.6, 0.8, 1.0), "full-cloud only": (1.0,)}  # s as shares of T
WAYS = ("engine", "one", "static")
START_S, ANSWER_S = 300.0, 600.0


@dataclass(frozen=True)
class Server:
    """Where a way listens, and how it is asked."""

    name: str
    port: int

    def question(self, prompt: str, seed: int, program: str) -> bytes:
        """The bytes of a POST for one picture."""
        path, body = f"/draw/{self.name}", {"prompt": prompt, "seed": seed, "program": program}
        if self.name == "service":
            path, body = "/v1/images/generations", body | {"response_format": "b64_json"}
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def measure_served(
    name: str, askers: Sequence[int], steps: int, repeats: int, threads: int, service: bool = True
) -> dict[str, Any]:
    """All figures of one family: per turn the curves, per mix and number of askers each way's throughput and latency."""
    from experiments.workloads import load_workload
    from relay.pipeline import RelayPipeline
    from relay.step_times import ends, step_curve

    pipe = RelayPipeline.from_pretrained(name)
    programs = {
        mix: [str(pipe.plan(num_inference_steps=steps, handoff=max(round(share * steps), 1))) for share in shares]
        for mix, shares in MIXES.items()
    }
    scenes = load_workload("scenes").prompts("test", 300, 0) if pipe.family.spec.scenes else None
    prompts = [each.text for each in scenes] if scenes else ["a red circle", "a blue square"]
    sizes = [b for b in (1, 2, 4, 8, 16, 32) if b <= max(askers)]
    most = max(askers)
    turns = []
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(shell(name, programs["mixed s"][0], threads, most))
        servers = [Server(way, port) for way in WAYS]
        if service:
            servers.append(stack.enter_context(whole_service(name, threads, most)))
        for turn in range(repeats):
            curves = {member: step_curve(pipe.family, member, sizes, 3) for member in ("large", "small")}
            found: dict[str, Any] = {"curves": curves, "ends_s": ends(pipe.family), "mixes": {}}
            for mix, chosen in programs.items():
                found["mixes"][mix] = {
                    count: {server.name: serve(server, chosen, prompts, count, turn) for server in servers}
                    for count in askers
                }
            turns.append(found)
    return {"T": steps, "threads": threads, "programs": programs, "turns": turns, "summary": summary(turns, programs)}


# --- asking ---


def serve(server: Server, programs: Sequence[str], prompts: Sequence[str], askers: int, seed: int) -> dict[str, float]:
    """A way's throughput and median latency once it runs: the first answers, one an asker, are not counted."""
    counted = max(3 * askers, 4 * len(programs))
    answered = asyncio.run(_ask(server, requests(programs, prompts, seed), askers, askers + counted))
    since, measured = answered[askers - 1], answered[askers : askers + counted]
    return {
        "requests_per_s": counted / (measured[-1][1] - since[1]),
        "median_latency_s": statistics.median(end - begin for begin, end in measured),
    }


def requests(programs: Sequence[str], prompts: Sequence[str], seed: int) -> Iterator[tuple[str, int, str]]:
    """Without end: every program as often as the others, in a random order that the seed fixes, each with another
    prompt and seed."""
    rng, i = random.Random(seed), 0
    while True:
        for program in rng.sample(programs, len(programs)):
            yield prompts[i % len(prompts)], i, program
            i += 1


async def _ask(
    server: Server, coming: Iterator[tuple[str, int, str]], askers: int, total: int
) -> list[tuple[float, float]]:
    """When each of at least `total` requests was asked and answered, in the order of the answers."""
    answered: list[tuple[float, float]] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
        try:
            while len(answered) < total:
                question = server.question(*next(coming))
                asked = time.monotonic()
                writer.write(question)
                await asyncio.wait_for(_answer(reader), ANSWER_S)
                answered.append((asked, time.monotonic()))
        finally:
            writer.close()

    await asyncio.gather(*(one() for _ in range(askers)))
    return answered


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer with a length; RuntimeError unless it is a 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    body = await reader.readexactly(length)
    if " 200 " not in lines[0]:
        raise RuntimeError(f"{lines[0]}: {body[:300].decode(errors='replace')}")
    return body


# --- processes ---


@contextlib.contextmanager
def shell(family: str, program: str, threads: int, most: int) -> Iterator[int]:
    """The server's port, once every way has drawn one picture; ended afterwards."""
    import os

    from nodes.commands.service import free_port
    from nodes.tether import tethered

    port = free_port()
    argv = [
        sys.executable, "-m", "experiments.engine_server", family, "--port", str(port), "--program", program,
        "--threads", str(threads), "--most", str(most),
    ]  # fmt: skip
    process = subprocess.Popen(tethered(argv), env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        asyncio.run(_ready(port, process))
        yield port
    finally:
        process.kill()
        process.wait()


async def _ready(port: int, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.2)
            continue
        writer.write(f"GET /ready HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        await asyncio.wait_for(_answer(reader), START_S)
        writer.close()
        return
    raise TimeoutError(f"the server is not ready after {START_S:g} s")


@contextlib.contextmanager
def whole_service(family: str, threads: int, most: int) -> Iterator[Server]:
    """Gateway and one edge node."""
    from nodes.commands.service import free_port
    from nodes.fleet import fleet

    port = free_port()
    edge = {
        "role": "edge",
        "families": {family: ["large", "small"]},
        "threads": threads,
        "batch": most,
        "queue": 4 * most,
    }
    gateway = {"offer": [{"family": family}], "http": f"127.0.0.1:{port}", "checkpoint_every": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder) / "service", {"edge": edge}, gateway, ready_s=START_S),
    ):
        yield Server("service", port)


# --- what is shown ---


def summary(turns: list[dict[str, Any]], programs: dict[str, list[str]]) -> dict[str, dict[int, dict[str, float]]]:
    """mix -> askers -> medians over turns; what is a ratio is one of each turn."""

    def row(turn: dict[str, Any], mix: str, askers: int) -> dict[str, float]:
        ways = turn["mixes"][mix][askers]
        most = allowed(turn, programs[mix], askers)
        shown: dict[str, float] = {}
        for way, each in ways.items():
            shown |= {f"{way}_per_s": each["requests_per_s"], f"{way}_latency_s": each["median_latency_s"]}
            if way in OURS:
                shown[f"{way}_share"] = each["requests_per_s"] / most
                shown |= {
                    f"{way}_over_{other}": each["requests_per_s"] / ways[other]["requests_per_s"] for other in OTHERS
                }
        return shown

    found: dict[str, dict[int, dict[str, float]]] = {}
    for mix, counts in turns[0]["mixes"].items():
        found[mix] = {}
        for askers in counts:
            rows = [row(turn, mix, askers) for turn in turns]
            found[mix][askers] = {key: statistics.median(each[key] for each in rows) for key in rows[0]}
    return found


def allowed(turn: dict[str, Any], programs: Sequence[str], askers: int) -> float:
    """Requests a second that the turn's curves allow; see the module."""
    from relay.program import Program

    best = {
        member: min(seconds / batch for batch, seconds in curve.items() if batch <= askers)
        for member, curve in turn["curves"].items()
    }
    steps = [Program.parse(program).steps for program in programs]
    denoising = statistics.mean(sum(each[member] * best[member] for member in best) for each in steps)
    return 1 / (sum(turn["ends_s"]) + denoising)


OURS, OTHERS = ("engine", "service"), ("one", "static")
NAMES = {"engine": "engine", "one": "one after the other", "static": "static batches", "service": "whole service"}


def table(name: str, result: dict[str, Any]) -> str:
    ways = list(next(iter(result["turns"][0]["mixes"]["mixed s"].values())))
    ours = [way for way in ways if way in OURS]
    lines = [f"## {name} behind HTTP, T = {result['T']}, {result['threads']} threads", ""]
    for member in ("large", "small"):
        curves = [turn["curves"][member] for turn in result["turns"]]
        curve = {b: statistics.median(each[b] for each in curves) for b in curves[0]}
        said = ", ".join(f"{b / t:.0f} at {b}" for b, t in curve.items())
        lines.append(f"- Batch curve of the {member} member, images x steps a second: {said}.")
    ends = [1000 * statistics.median(turn["ends_s"][i] for turn in result["turns"]) for i in (0, 1)]
    lines += [f"- Encoding a prompt takes {ends[0]:.1f} ms, decoding a latent {ends[1]:.1f} ms.", ""]
    head = ["askers", *(f"{NAMES[way]}, requests/s" for way in ours)]
    head += [f"{NAMES[way]} over {NAMES[other]}" for way in ours for other in OTHERS]
    head += [f"{NAMES[way]}, share of the curves" for way in ours]
    head += [f"median latency (ms): {NAMES[ways[0]]}", *(NAMES[way] for way in ways[1:])]
    for mix, rows in result["summary"].items():
        lines += [f"**{mix}** ({', '.join(f'{share:g} T' for share in MIXES[mix])}):", ""]
        lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for askers, row in rows.items():
            cells = [str(askers), *(f"{row[f'{way}_per_s']:.2f}" for way in ours)]
            cells += [f"**{row[f'{way}_over_{other}']:.2f}x**" for way in ours for other in OTHERS]
            cells += [f"{row[f'{way}_share']:.2f}" for way in ours]
            cells += [f"{1000 * row[f'{way}_latency_s']:.0f}" for way in ways]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
