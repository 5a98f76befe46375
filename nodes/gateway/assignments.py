"""What each node of a placed job is told: its stretch of the program, where the latent comes from and where it goes."""

from __future__ import annotations

import hashlib

import msgspec

from nodes.deployment import CacheConfig
from nodes.gateway.jobs import Job, Point
from nodes.gateway.registry import Node, Registry
from nodes.messages import Assign, CacheUse, Source
from nodes.requests import ImageRequest


def assignments(
    job: Job, point: Point | None, registry: Registry, gateway: Source, checkpoint_every: int, keeper: Node | None,
    cache: CacheConfig,
) -> list[Assign]:  # fmt: skip
    """One for each stretch, in order. `point`: where the job goes on from, None at its start; `gateway`: where the
    gateway's checkpoints are fetched; `keeper`: the edge that keeps those of others; `cache`: what the deployment says."""
    nodes = [registry.nodes[stretch.node] for stretch in job.stretches]
    program, request = job.program, job.request
    assert program is not None
    found = []
    for i, (stretch, node) in enumerate(zip(job.stretches, nodes, strict=True)):
        after = nodes[i + 1] if i + 1 < len(nodes) else None
        found.append(
            Assign(
                job=job.id, attempt=job.attempt, program=str(program), prompt=request.prompt,
                negative=request.negative_prompt, seed=job.seed, width=job.size[0], height=job.size[1],
                first_leg=stretch.first, last_leg=stretch.last,
                source=_handed(nodes[i - 1]) if i else _start(point, node, registry, gateway),
                put_to=_at(after, "put") if after is not None and node.role == "device" else None,
                next_key=after.key if after is not None else "", deadline_s=job.left_s,
                checkpoint_every=checkpoint_every if node.register.checkpoints else 0,
                checkpoint_to=_at(keeper, "put") if keeper is not None and keeper.name != node.name else None,
                cache=cache_use(job, cache) if node.role == "edge" and not i and point is None else None,
                preview_every=request.previews, degraded=job.degraded,
                keep_image=request.keep_on_device and request.device == stretch.node,
            )
        )  # fmt: skip
    return found


def _start(point: Point | None, node: Node, registry: Registry, gateway: Source) -> Source:
    """Where the first stretch's latent is."""
    if point is None:
        return Source(kind="noise")
    if point.holder == "gateway":
        return gateway
    there = Source(kind="held") if point.holder == node.name else _at(registry.nodes[point.holder], "fetch")
    return msgspec.structs.replace(there, checkpoint=point.checkpoint)


def cache_use(job: Job, cache: CacheConfig) -> CacheUse | None:
    """What a job that begins on an edge may take from the latent cache there, and leave in it.

    It may start from it where its asker says so, or, where it fixes nothing, where the deployment lets such requests or its
    level skips some steps (under pressure): so many at most. An asker's `cache: false` is neither started nor kept.
    """
    asked = job.request.cache
    if cache.scope == "off" or asked is False:
        return None
    assert job.program is not None
    most = job.program.legs[0].last - 1
    if not may_start(job.request, cache):
        most = 0
    elif not asked and cache.starts == "asked":
        most = min(most, job.skip or 0)
    owner = hashlib.blake2b(job.tenant.encode(), digest_size=12).hexdigest()
    return CacheUse(owner=owner, most=most, nth=job.number)


def _handed(before: Node) -> Source:
    """From the stretch before: nobody can dial a device, so it dials and puts."""
    return _at(before, "put" if before.role == "device" else "fetch")


def may_start(request: ImageRequest, cache: CacheConfig) -> bool:
    """Whether a request may begin from a cached latent at all: it asks to, or fixes nothing that this would change."""
    return cache.scope != "off" and request.cache is not False and bool(request.cache or not request.fixes_start)


def _at(node: Node, kind: str) -> Source:
    return Source(kind=kind, node=node.name, address=node.register.data_address or "", key=node.key)
