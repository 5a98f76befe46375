"""What the service adds to the work itself, measured between real processes on this machine.

gateway overhead   one-step requests, each paired with the same program in one process; idle (one at a time), and with
                   others open at the same time
handoff latency    messages of real sizes through the link emulator against bytes / bandwidth + round trip
idle               CPU of a node that has nothing to do, memory over many requests
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

# Latents at 1024 x 1024 in 16 bit: SDXL, SD3.5; and SD3.5's embeddings of one branch (facts of the published configs).
SIZES = {"SDXL latent": 131_072, "SD3.5 latent": 524_288, "SD3.5 embeddings": 2_730_000}
LINKS = {"50 Mbit/s, 10 ms": (50e6, 0.005), "100 Mbit/s, 20 ms": (100e6, 0.010), "12 Mbit/s, 70 ms": (12e6, 0.035)}


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/service.md"
    ),
    family: Annotated[str, typer.Option(help="A family that is here.")] = "mini-sd3",
    requests: Annotated[int, typer.Option(help="Paired one-step requests.")] = 500,
    flow: Annotated[int, typer.Option(help="Requests over which memory is watched; 0: none.")] = 2000,
    repeats: Annotated[int, typer.Option(help="Messages per size and link.")] = 9,
) -> None:
    """Measure and write a table."""
    from experiments.provenance import write_result

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        found |= overhead(Path(folder) / "bench", family, requests, flow)
    found["links"] = asyncio.run(links(repeats))
    write_result(out, "What the service adds", table(found), found)


def overhead(folder: Path, family: str, requests: int, flow: int) -> dict[str, Any]:
    """Seconds added to a one-step request by the way through gateway and node."""
    import torch

    from experiments.workloads import load_workload
    from nodes.fleet import fleet
    from nodes.images import png_bytes
    from nodes.session import quiet_libraries
    from relay.pipeline import RelayPipeline

    quiet_libraries()
    torch.set_num_threads(1)
    pipe = RelayPipeline.from_pretrained(family)
    program = str(pipe.plan(num_inference_steps=1, mode="edge-only"))
    # Each another one: a node keeps the last encoded prompts, and one prompt would pay for encoding on one side only.
    prompts = [p.text for p in load_workload("scenes").prompts("test", requests + 1, 0)]
    nodes = {"phone": {"role": "device", "families": {family: ["small"]}}}
    with fleet(folder, nodes, {"offer": [{"family": family}]}) as running:

        async def measure(asker: Any) -> dict[str, Any]:
            pipe(prompts[-1], program=program, seed=0)
            await _one(asker, prompts[-1], program, 0)
            apart, alone = [], []
            for i in range(requests):  # a pair: in one process, then through the service
                started = time.perf_counter()
                drawn = pipe(prompts[i], program=program, seed=i)
                png_bytes(drawn.images[0], {"prompt": prompts[i], "program": program, "seed": i})
                alone.append(time.perf_counter() - started)
                apart.append(await _one(asker, prompts[i], program, i) - alone[-1])
            before = await asker.status()
            await asyncio.sleep(3.0)
            idle = _cpu(running.pid("phone"))
            await asyncio.sleep(5.0)
            idle = (_cpu(running.pid("phone")) - idle) / 5.0
            loaded = []
            gate = asyncio.Semaphore(8)

            async def one(i: int) -> None:
                async with gate:
                    loaded.append(await _one(asker, prompts[i % len(prompts)], program, i))

            started = time.perf_counter()
            await asyncio.gather(*(one(i) for i in range(max(requests, flow))))
            rate = max(requests, flow) / (time.perf_counter() - started)
            after = await asker.status()
            memory = [_memory(before), _memory(after)]
            return {
                "overhead_ms": {"median": 1000 * statistics.median(apart), "p99": 1000 * _quantile(apart, 0.99)},
                "alone_ms": 1000 * statistics.median(alone),
                "loaded_ms": {"median": 1000 * statistics.median(loaded), "p99": 1000 * _quantile(loaded, 0.99)},
                "requests_per_s": rate, "requests": requests, "flow": max(requests, flow), "idle_cpu": idle,
                "memory_mb": memory, "gateway_memory_mb": _resident(running.pid("gateway")),
            }  # fmt: skip

        return running.ask(measure, 3600.0)


async def _one(asker: Any, prompt: str, program: str, seed: int) -> float:
    started = time.perf_counter()
    job = (await asker.submit({"prompt": prompt, "program": program, "seed": seed})).jobs[0]
    told = await asker.job(job, 60.0)
    assert told["stage"] == "done", told
    return time.perf_counter() - started


async def links(repeats: int) -> list[dict[str, Any]]:
    """Seconds from sending a message to its arrival's acknowledgement, less the way back, through the emulator."""
    from nodes.keys import Credentials, Peer
    from nodes.link_control import LinkProcess
    from nodes.messages import Latent, Seen
    from nodes.transport import DATA, Client, Server
    from scheduler.links import LinkProfile

    rows = []
    for name, (bandwidth, delay) in LINKS.items():
        profile = LinkProfile(name="bench", bandwidth_bit_s=bandwidth, delay_s=delay)
        async with Server("tcp://127.0.0.1:*", DATA, Credentials.plain_text("edge", "edge")) as server:

            async def answer(server: Server = server) -> None:
                while True:
                    identity, _, message, _ = await server.receive()
                    assert isinstance(message, Latent)
                    await server.send(identity, Seen(job=message.job, attempt=1, what="latent", leg=1))

            task = asyncio.ensure_future(answer())
            with LinkProcess([server.address.removeprefix("tcp://")], profile) as link:
                me, peer = Credentials.plain_text("phone", "device"), Peer(name="edge", role="edge")
                async with Client(f"tcp://{link.addresses[0]}", DATA, me, peer) as client:
                    await client.connected()
                    for what, size in SIZES.items():
                        times = []
                        for i in range(repeats + 1):
                            started = time.perf_counter()
                            await client.send(Latent(job=f"{what}-{i}", attempt=1, leg=1), [bytes(size)], timeout_s=60)
                            await client.receive(60)
                            times.append(time.perf_counter() - started)
                        expected = 8 * size / bandwidth + 2 * delay
                        rows.append(
                            {"link": name, "message": what, "bytes": size, "seconds": statistics.median(times[1:]),
                             "expected": expected, "ratio": statistics.median(times[1:]) / expected}
                        )  # fmt: skip
            task.cancel()
    return rows


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _cpu(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _resident(pid: int) -> float:
    import psutil

    return psutil.Process(pid).memory_info().rss / 1e6


def _memory(status: dict[str, Any]) -> float:
    return status["nodes"][0]["memory_bytes"] / 1e6


def table(found: dict[str, Any]) -> str:
    over, loaded = found["overhead_ms"], found["loaded_ms"]
    lines = [
        f"{found['requests']} one-step requests, each paired with the same program in one process, up to the PNG"
        f" ({found['alone_ms']:.1f} ms):",
        "",
        "| | median | p99 |",
        "| --- | --- | --- |",
        f"| added by gateway, ledger and node, idle | {over['median']:.1f} ms | {over['p99']:.1f} ms |",
        f"| latency with 8 open at a time | {loaded['median']:.1f} ms | {loaded['p99']:.1f} ms |",
        "",
        f"With 8 open at a time {found['requests_per_s']:.0f} requests/s; an idle device node takes {found['idle_cpu']:.1%} of a",
        f"core. Its resident memory before and after {found['flow']} more requests: {found['memory_mb'][0]:.0f} and"
        f" {found['memory_mb'][1]:.0f} MB; the gateway's: {found['gateway_memory_mb']:.0f} MB.",
        "",
        "Handoffs at real sizes, sent and acknowledged through the link emulator (median), against bytes/bandwidth + round trip:",
        "",
        "| link | message | bytes | measured | expected | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['link']} | {row['message']} | {row['bytes']} | {1000 * row['seconds']:.1f} ms | {1000 * row['expected']:.1f} ms"
        f" | {row['ratio']:.3f} |"
        for row in found["links"]
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
