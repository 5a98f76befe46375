"""Ends reach the disk a little later than askers: no picture waits for a sync, and what a power cut takes is drawn again.

An end is committed before anyone is told of it, so a killed gateway forgets none; but neither the picture's file nor that
commit waits for the disk. Once a second the pictures that ended since are synced, and then the ledger, which says so. A
process that starts looks at those of which that was not said: where the machine lost power and the file is not whole, the
job is open again and is drawn again from its seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path

from nodes.gateway.ledger import Ledger, LedgerUnwritable

log = logging.getLogger("relay.gateway")
EVERY_S = 1.0


def digest_of(png: bytes) -> str:
    return hashlib.blake2b(png, digest_size=16).hexdigest()


class Settling:
    def __init__(self, ledger: Ledger, store: Path):
        self.ledger, self.store = ledger, store
        self._ended: list[tuple[str, str]] = []  # job, image

    def ended(self, job: str, image: str) -> None:
        """A picture was written, and its end committed."""
        self._ended.append((job, image))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.settle()

    async def settle(self) -> None:
        """What ended until now is on the disk when this returns; what the disk does not take is tried again."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        try:
            await asyncio.to_thread(self._sync, [image for _, image in ended])
            await self.ledger.settled([job for job, _ in ended])
        except (OSError, LedgerUnwritable) as error:
            log.error("%d pictures are not on the disk yet: %s", len(ended), error)
            self._ended = ended + self._ended

    def _sync(self, images: list[str]) -> None:
        for path in [*{(self.store / image).parent for image in images}, *(self.store / image for image in images)]:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # dropped meanwhile (retention.py)
                continue
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    async def look_back(self) -> int:
        """Open again what an earlier process ended and whose picture did not reach the disk. How many."""
        lost = 0
        for job, image, digest in await asyncio.to_thread(self.ledger.unsettled):
            try:
                whole = digest_of((self.store / image).read_bytes()) == digest
            except OSError:
                whole = False
            if whole:
                self.ended(job, image)
            else:
                log.warning("the picture of %s did not reach the disk: it is drawn again", job)
                await self.ledger.reopen(job)
                lost += 1
        await self.settle()
        return lost
