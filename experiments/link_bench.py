"""How far the link emulator is from the link it emulates: times, jitter, sharing, and what it costs.

Both ends are sockets of this process, so one clock reads the first byte in and the last byte out; the emulator is a
process of its own, as always.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nodes.link_control import LinkControl
    from scheduler.links import LinkProfile

SIZES = (1_000, 131_072, 524_288, 2_730_000)  # a heartbeat, SDXL's and SD3.5's latent, SD3.5's embeddings
LONGEST_S = 2.5  # messages that take longer are left out


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/link.md"
    ),
    repeats: Annotated[int, typer.Option(help="Messages of each size.")] = 15,
    draws: Annotated[int, typer.Option(help="Lone messages a jittery profile is measured with.")] = 300,
) -> None:
    """Measure the link emulator over loopback sockets."""
    from experiments.provenance import write_result
    from nodes.link import format_address
    from nodes.link_control import LinkProcess
    from scheduler.links import LINKS, LinkProfile

    even = [LinkProfile(name=f"{LINKS[n].name} without jitter", bandwidth_bit_s=LINKS[n].bandwidth_bit_s,
                        delay_s=LINKS[n].delay_s) for n in ("lan", "wifi", "5g", "lte", "dsl")]  # fmt: skip
    even.append(LinkProfile(name="wifi x 25 without jitter", bandwidth_bit_s=2.5e9, delay_s=0.12e-3))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        LinkProcess([format_address(server.getsockname())], "lan", seed=0) as link,
        Ends(server, link.addresses[0]) as ends,
        Ends(server, link.addresses[0]) as others,
    ):
        results: dict[str, Any] = {
            "load": os.getloadavg()[0],
            "even": [row for profile in even for row in times(link.control, ends, profile, repeats)],
            "jitter": [jitter(link.control, ends, LINKS[name], draws) for name in ("wifi", "5g", "lte")],
            "beside_bulk": [beside_bulk(link.control, ends, others, profile) for profile in even[1:4]],
            "ceiling_bit_s": ceiling(link.control, ends),
            "idle_cpu": idle(link.control),
        }
    write_result(out, "Link emulator", table(results), results)


class Ends:
    """The two ends of one connection through the link."""

    def __init__(self, server: socket.socket, address: str):
        from nodes.link import parse_address

        self.near = socket.create_connection(parse_address(address), timeout=60)
        self.far, _ = server.accept()

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *exc: object) -> None:
        self.near.close()
        self.far.close()

    def transfer(self, size: int) -> float:
        """Seconds from the first byte in to the last byte out."""
        data = bytes(size)
        sender = threading.Thread(target=self.near.sendall, args=(data,))
        began = time.monotonic()
        sender.start()
        buffer, left = bytearray(1 << 20), size
        while left:
            left -= self.far.recv_into(buffer, min(left, len(buffer)))
        took = time.monotonic() - began
        sender.join()
        return took


def times(control: LinkControl, ends: Ends, profile: LinkProfile, repeats: int) -> list[dict[str, Any]]:
    """Lone messages over an idle link: measured against the profile's `transfer_time`."""
    control.set(profile)
    rows = []
    for size in SIZES:
        stated = profile.transfer_time(size)
        if stated > LONGEST_S:
            continue
        took = []
        for _ in range(repeats):
            took.append(ends.transfer(size))
            time.sleep(0.02)
        row = {"profile": profile.name, "bytes": size, "stated_s": stated, "median_s": statistics.median(took)}
        rows.append(row | {"first_s": min(took), "last_s": max(took)})
    return rows


def jitter(control: LinkControl, ends: Ends, profile: LinkProfile, draws: int) -> dict[str, Any]:
    """Mean and standard deviation of the transfer time of small lone messages."""
    control.set(profile)
    took = [ends.transfer(100) for _ in range(draws)]
    return {
        "profile": profile.name,
        "stated_mean_s": profile.transfer_time(100),
        "mean_s": statistics.mean(took),
        "stated_jitter_s": profile.jitter_s,
        "jitter_s": statistics.stdev(took),
    }


def beside_bulk(control: LinkControl, ends: Ends, others: Ends, profile: LinkProfile) -> dict[str, Any]:
    """What a small message takes while another connection fills the link for a second."""
    control.set(profile)
    size = int(profile.bandwidth_bit_s / 8)
    bulk = threading.Thread(target=others.transfer, args=(size,))
    bulk.start()
    time.sleep(0.2)
    took = [ends.transfer(100) for _ in range(7)]
    bulk.join()
    return {"profile": profile.name, "alone_s": profile.transfer_time(100), "beside_bulk_s": statistics.median(took)}


def ceiling(control: LinkControl, ends: Ends) -> float:
    """Bits a second through a link that is faster than the emulator."""
    control.set({"bandwidth_bit_s": 1e12})
    size = 200_000_000
    return 8 * size / min(ends.transfer(size) for _ in range(3))


def idle(control: LinkControl, seconds: float = 5.0) -> float:
    """Processor time over time, connections open and nothing sent."""
    before = control.status().cpu_s
    time.sleep(seconds)
    return (control.status().cpu_s - before) / seconds


def table(results: dict[str, Any]) -> str:
    lines = [
        "One message over an idle link, from the first byte in to the last byte out, against delay + bytes / bandwidth:",
        "",
        "| profile | bytes | stated | median | over, median | over, worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["even"]:
        over = [row[key] / row["stated_s"] - 1 for key in ("median_s", "last_s")]
        lines.append(
            f"| {row['profile']} | {row['bytes']} | {row['stated_s'] * 1e3:.2f} ms | {row['median_s'] * 1e3:.2f} ms "
            f"| {over[0]:+.1%} | {over[1]:+.1%} |"
        )
    lines += ["", "Jitter, small messages one after the other:", ""]
    lines += ["| profile | mean stated | mean | jitter stated | jitter |", "| --- | --- | --- | --- | --- |"]
    for row in results["jitter"]:
        figures = (row[key] * 1e3 for key in ("stated_mean_s", "mean_s", "stated_jitter_s", "jitter_s"))
        lines.append(f"| {row['profile']} | " + " | ".join(f"{figure:.2f} ms" for figure in figures) + " |")
    lines += ["", "A small message while another connection fills the link:", ""]
    lines += ["| profile | alone, stated | beside bulk, median |", "| --- | --- | --- |"]
    for row in results["beside_bulk"]:
        lines.append(f"| {row['profile']} | {row['alone_s'] * 1e3:.1f} ms | {row['beside_bulk_s'] * 1e3:.1f} ms |")
    lines += [
        "",
        f"- A link without limits passes {results['ceiling_bit_s'] / 1e9:.2f} Gbit/s: profiles above it are not reached.",
        f"- With connections open and nothing sent it takes {results['idle_cpu']:.3%} of a core.",
        f"- Load average of the machine when this was begun: {results['load']:.1f}. Beside busy processes on few cores the "
        "worst case is a few milliseconds of waiting for a core.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
