"""What the latent cache costs an edge at 10^3 to 10^6 latents: a look-up, a latent kept, one kept where it is full, a start.

    python -m experiments.cache_bench

Rows are written into the database at once, in the store's own form, rather than through a million stores; files exist for
those latents that a look-up finds, which are the only ones it reads. Vectors are random and of the pooled embedding's width,
so that nothing but what was meant to be alike is. The cache's own code is measured from there on.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from nodes.cache.store import LatentCache
from relay.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZES = [1_000, 10_000, 100_000, 1_000_000]
WIDTH = 160  # of mini-sd3's pooled embedding; SDXL's is 1280
PAYLOAD = 4096  # bytes of a latent: 16 x 8 x 8 of fp32
SKIPS = (3, 6, 8, 11, 14)  # of 28: what one walk leaves


def bench(
    sizes: Annotated[list[int] | None, typer.Argument(help="Latents; default: 10^3 to 10^6.")] = None,
    width: int = WIDTH,
    asks: Annotated[int, typer.Option(min=10, help="Look-ups a size.")] = 500,
    out: Annotated[Path, typer.Option(help="A .json lies beside it.")] = Path("docs/results/cache.md"),
) -> None:
    """Measure each size in a folder of its own, which is removed."""
    from experiments.provenance import write_result

    found = {}
    for size in sizes or SIZES:
        folder = Path(tempfile.mkdtemp(prefix="cache-bench-"))
        try:
            found[str(size)] = measured(folder / "cache", size, width, asks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(size, found[str(size)], flush=True)
    write_result(out, "The latent cache: what it costs", table(found, width, asks), found)


def measured(folder: Path, size: int, width: int, asks: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of look-ups and stores (median, 99 %), of opening with and without an index on disk; growth of the process's
    resident memory, bytes."""
    if size < 2 * asks:
        raise BadRequest(f"{asks} look-ups need at least {2 * asks} latents")
    rng = np.random.default_rng(seed)
    wanted = unit(rng.standard_normal((asks, width)))
    bound = size * PAYLOAD
    fill(folder, size, wanted, bound, rng)
    built, cache = timed(lambda: LatentCache(folder, bound))
    cache.close()
    del cache
    before = _resident()
    opened, cache = timed(lambda: LatentCache(folder, bound))
    grown = _resident() - before
    index_bytes = sum(path.stat().st_size for path in (folder / "index").glob("*"))
    near = unit(wanted + 0.15 / np.sqrt(width) * rng.standard_normal(wanted.shape))
    hits, hit_s = each(lambda v: cache.find("space", "tenant", v), near)
    misses, miss_s = each(lambda v: cache.find("space", "tenant", v), unit(rng.standard_normal((asks, width))))
    fresh = unit(rng.standard_normal((asks, width)))
    payload = rng.bytes(PAYLOAD)
    names: Iterator[int] = iter(range(10**9))
    _, full_s = each(lambda v: _keep(cache, next(names), v, payload), fresh)
    cache.bound *= 2
    _, store_s = each(lambda v: _keep(cache, next(names), v, payload), fresh)
    told = cache.status()
    cache.close()
    return {
        "build_s": built, "open_s": opened, "resident_bytes": grown,
        "disk_bytes": (folder / "cache.db").stat().st_size + index_bytes, "found": sum(hit is not None for hit in hits) / asks,
        "found_by_chance": sum(hit is not None for hit in misses) / asks, "evicted": told["evicted"],
        **{name: quantiles(seconds) for name, seconds in (
            ("hit_s", hit_s), ("miss_s", miss_s), ("store_s", store_s), ("store_full_s", full_s),
        )},
    }  # fmt: skip


def fill(folder: Path, size: int, wanted: NDArray[np.float32], bound: int, rng: np.random.Generator) -> None:
    """A cache of `size` latents, those of `wanted` with their files."""
    cache = LatentCache(folder, bound)
    for i, vector in enumerate(wanted):
        _keep(cache, -1 - i, vector, rng.bytes(PAYLOAD))
    cache.close()
    import sqlite3

    left = size - len(wanted)
    with sqlite3.connect(folder / "cache.db") as db:
        for first in range(0, left, 10_000):
            count = min(10_000, left - first)
            vectors = unit(rng.standard_normal((count, wanted.shape[1])))
            db.executemany(
                "INSERT INTO latents (id, space, owner, source, vector, skipped, total, bytes, used)"
                " VALUES (?,'space','tenant',?,?,?,28,?,?)",
                [
                    (hashlib.blake2b(str(first + i).encode(), digest_size=16).hexdigest(), f"job-{first + i}",
                     vectors[i].tobytes(), SKIPS[i % 5], PAYLOAD, time.time() - 1e6 + first + i)
                    for i in range(count)
                ],
            )  # fmt: skip
    db.close()


def _keep(cache: LatentCache, number: int, vector: NDArray[np.float32], payload: bytes) -> bool:
    return cache.store(
        "space", "tenant", f"prompt {number}", 0, f"job-{number}", vector, SKIPS[number % 5], 28, payload
    )  # fmt: skip


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


def each(work: Any, values: Any) -> tuple[list[Any], list[float]]:
    """What `work` gives for each value, and the seconds of each."""
    seconds, given = zip(*(timed(lambda value=value: work(value)) for value in values), strict=True)
    return list(given), list(seconds)


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.quantile(seconds, 0.5)), "p99": float(np.quantile(seconds, 0.99))}


def _resident() -> int:
    """Bytes; the most so far where the system does not tell what is now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(found: dict[str, Any], width: int, asks: int) -> str:
    lines = [
        f"Milliseconds, median (99 %) of {asks}; vectors of width {width}, one space and owner, latents of {PAYLOAD} bytes.",
        "A look-up that hits reads and checks the latent's file; `kept, full` also drops others by LCBFU. `start`: opening"
        " the folder where its index lies on disk, `built`: where it does not. Memory: what the process grew by at the start;"
        " on disk: rows and index, latents aside.",
        "",
        "| latents | look-up, hit | look-up, miss | kept | kept, full | start | built | memory | on disk | near ones found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, row in found.items():
        times = [
            f"{1000 * row[name]['p50']:.2f} ({1000 * row[name]['p99']:.2f})"
            for name in ("hit_s", "miss_s", "store_s", "store_full_s")
        ]
        rest = [
            f"{row['open_s']:.2f} s", f"{row['build_s']:.2f} s", f"{row['resident_bytes'] / 1e6:.0f} MB",
            f"{row['disk_bytes'] / 1e6:.0f} MB", f"{row['found']:.1%}",
        ]  # fmt: skip
        lines.append(f"| {int(size):,} | " + " | ".join(times + rest) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(bench)
