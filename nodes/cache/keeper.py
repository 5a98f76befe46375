"""An edge's side of the latent cache: what its walks leave is kept once their requests are done; hits for those that begin.

All that touches the disk runs in a thread of its own. Neither the event loop nor the compute thread waits for it: a
request whose look-up takes longer than `LOOK_S` begins from noise, and latents wait for their request's end in memory,
within a bound. A cache that cannot be opened is said once and done without.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from relay.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nodes.cache.store import Hit, LatentCache
    from nodes.deployment import CacheConfig, Deployment, NodeConfig
    from scheduler.load.similarity import Rule

log = logging.getLogger("relay.cache")
LOOK_S = 0.25
MOST_WAITING = 64 << 20  # bytes of latents whose requests have not ended
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A latent (fp32, as bytes) that a job's first leg passed after `skipped` of `total` steps."""

    job: str
    owner: str
    space: str
    prompt: str
    seed: int
    vector: NDArray[np.float32]  # the prompt's pooled embedding
    skipped: int
    total: int
    payload: bytes


@dataclass(frozen=True)
class Look:
    """What is asked for: a latent of `space` that spares fewer than `below` steps, as `rule` allows. See `LatentCache.find`."""

    owner: str
    space: str
    vector: NDArray[np.float32]
    below: int
    nth: int
    rule: Rule


class Keeper:
    """`note`, `ended`, `find` and `status` from the event loop."""

    def __init__(self, folder: Path, config: CacheConfig):
        self.folder, self.config = folder, config
        self.status: dict[str, Any] = {"scope": config.scope}
        self._thread = ThreadPoolExecutor(1, "latent cache")
        self._waiting: OrderedDict[str, list[Kept]] = OrderedDict()
        self._bytes = 0
        self._cache: LatentCache | None = None
        self.opened = threading.Event()  # a large one takes a while; nobody waits for that
        self._thread.submit(self._open)

    def note(self, kept: Kept) -> None:
        """It is kept if its job ends in a picture; the longest waiting go where too much waits."""
        self._waiting.setdefault(kept.job, []).append(kept)
        self._bytes += len(kept.payload)
        while self._bytes > MOST_WAITING:
            self._take(next(iter(self._waiting)))

    def ended(self, job: str, done: bool = True) -> None:
        """A job has ended: what it left is kept where it is `done`, else forgotten."""
        for kept in self._take(job):
            if done:
                self._thread.submit(self._guarded, lambda cache, kept=kept: self._store(cache, kept))

    async def find(self, look: Look) -> Hit | None:
        """The best hit; None where there is none, or none in time."""
        if not self.opened.is_set():
            return None
        asked = asyncio.get_running_loop().run_in_executor(
            self._thread, self._guarded, lambda cache: _found(cache, look)
        )
        try:
            async with asyncio.timeout(LOOK_S):
                return await asked
        except TimeoutError:
            return None

    async def close(self) -> None:
        """What is under way is done first."""
        self._thread.submit(self._close)
        await asyncio.to_thread(self._thread.shutdown)

    def _take(self, job: str) -> list[Kept]:
        taken = self._waiting.pop(job, [])
        self._bytes -= sum(len(kept.payload) for kept in taken)
        return taken

    # --- in the thread ---

    def _open(self) -> None:
        try:
            from nodes.cache.store import LatentCache

            self._cache = LatentCache(
                self.folder, int(self.config.mb * 1e6), self.config.scope, self.config.eviction
            )  # fmt: skip
            self.status = self._cache.status()
        except ImportError as error:
            self._broken(f"{error.name or error} is not installed: pip install 'relay-inference[edge]'")
        except Exception as error:  # a disk that is full, a folder that may not be written, a database nobody foresaw
            self._broken(f"{type(error).__name__}: {error}")
        finally:
            self.opened.set()

    def _broken(self, why: str) -> None:
        log.error("no latents are cached: %s", " ".join(why.split()))
        self._cache, self.status = None, {"scope": self.config.scope, "broken": why}

    def _guarded(self, work: Callable[[LatentCache], T]) -> T | None:
        """No request suffers from what breaks here."""
        if self._cache is None:
            return None
        try:
            return work(self._cache)
        except BadRequest as error:  # an embedding that is not finite, say
            log.warning("%s", error)
        except Exception as error:
            self._broken(f"{type(error).__name__}: {error}")
        finally:
            if self._cache is not None:
                self.status = self._cache.status()
        return None

    @staticmethod
    def _store(cache: LatentCache, kept: Kept) -> None:
        cache.store(
            kept.space, kept.owner, kept.prompt, kept.seed, kept.job, kept.vector, kept.skipped, kept.total, kept.payload
        )  # fmt: skip

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()


def keeper_of(name: str, config: NodeConfig, deployment: Deployment) -> Keeper | None:
    """Of a node: edges cache latents, unless the deployment says `cache: off`."""
    said = deployment.caching
    if config.role != "edge" or said.scope == "off":
        return None
    root = Path(said.folder) if said.folder is not None else Path(deployment.gateway.store) / "cache"
    return Keeper(root / name, said)


def _found(cache: LatentCache, look: Look) -> Hit | None:
    return cache.find(look.space, look.owner, look.vector, look.below, look.nth, look.rule)
