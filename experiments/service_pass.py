"""Times through the service: each policy over each link, between real processes. A pass of its own, as all times are.

For each link (in its kind, as given or scaled) and each policy: an edge with the large member, a device with the small
one behind the emulated link, and the workload's first prompts as requests that arrive at random. The policy chooses
among the grid's programs. What a row says is the latency that the asker saw, queues and shared batches included.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.links import link_for
from experiments.provenance import machine
from relay.errors import RelayError
from relay.step_times import step_curve

if TYPE_CHECKING:
    from experiments.prepare import Prepared
    from scheduler.links import LinkProfile
    from scheduler.message_sizes import MessageSizes

MEASURE = "latency through the service"


def serve_family(prepared: Prepared, family: str) -> list[dict[str, Any]]:
    """Time rows of one family, `method` being `policy:NAME`."""
    config, pipe = prepared.config, prepared.pipes[family]
    mini = step_curve(pipe.family, "large", [1])[1]
    rows: list[dict[str, Any]] = []
    for entry in config.links:
        link, sizes = link_for(entry, pipe.family.spec, mini)
        for policy in config.policy:
            with tempfile.TemporaryDirectory() as folder:
                ended = _serve(prepared, family, policy, link, sizes, Path(folder) / "service")
            for number, told in enumerate(ended):
                rows.append(_row(prepared, pipe.family.name, policy, link, number, told))
    return rows


def _serve(
    prepared: Prepared, family: str, policy: str, link: LinkProfile, sizes: MessageSizes, folder: Path
) -> list[dict[str, Any]]:
    """The requests' ends under one policy over one link."""
    import numpy as np

    from nodes.fleet import fleet

    config = prepared.config
    figures = {"bandwidth_bit_s": link.bandwidth_bit_s, "delay_s": link.delay_s, "jitter_s": link.jitter_s}
    pad = {"latent": sizes.latent, "image": sizes.image} if link.scaling else None
    source = str(Path(family).resolve()) if Path(family).suffix else family
    nodes: dict[str, dict[str, Any]] = {
        "edge": {"role": "edge", "families": {source: ["large"]}} | ({"pad": pad} if pad else {}),
        "device": {"role": "device", "families": {source: ["small"]}, "link": {"name": link.name, **figures}},
    }
    offer = [{"family": source, "program": str(program)} for program in prepared.programs[family]]
    prompts = [p.text for some in prepared.prompts for p in some][: config.service.requests]

    async def drive(asker: Any) -> list[dict[str, Any]]:
        rng = np.random.default_rng(0)  # the same arrivals for every policy and link
        waiting = []
        for i, text in enumerate(prompts):
            job = (await asker.submit({"prompt": text, "seed": i, "family": prepared.pipes[family].family.name})).jobs[
                0
            ]
            waiting.append(asyncio.ensure_future(asker.wait(job, 300.0)))
            await asyncio.sleep(float(rng.exponential(config.service.gap_s)))
        return list(await asyncio.gather(*waiting))

    with fleet(folder, nodes, {"offer": offer, "policy": policy}) as running:
        began = time.monotonic()
        ended = running.ask(drive, 3600.0)
    if failed := [told for told in ended if told["stage"] != "done"]:
        raise RelayError(
            f"policy {policy} over {link.name}: {failed[0]['error']} (after {time.monotonic() - began:.0f} s)"
        )
    return ended


def _row(
    prepared: Prepared, family: str, policy: str, link: LinkProfile, number: int, told: dict[str, Any]
) -> dict[str, Any]:
    report = told["report"]
    return {
        "config_hash": prepared.hash, "family": family, "method": f"policy:{policy}", "program": report["program"],
        "measure": MEASURE, "link": link.describe(), "link_kind": link.kind, "round": number,
        "end_to_end_s": report["seconds"], "threads": 1, "machine": machine(prepared.facts["provenance"]),
    }  # fmt: skip
