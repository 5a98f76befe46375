"""Files that appear whole or not at all, whoever is killed and whatever disk is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to: it takes `path`'s place where the block ends well, else it is removed.

    Named after the process, so that several may write one file, and the last one's stands. A killed process may leave
    its own behind: `*.part`, which nothing reads.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes | memoryview, *, sync: bool = False) -> None:
    """Text (UTF-8) or bytes into a file. `sync`: it is on the disk when this returns, so that a power cut keeps it too."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
