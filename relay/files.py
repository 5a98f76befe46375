"""Files: written so that they appear whole or not at all, whoever is killed and whatever disk is full; YAML read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from relay.errors import BadRequest

T = TypeVar("T")


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


def read_yaml(path: Path, type: type[T], *, strict: bool = True) -> T:
    """What a YAML holds, as `type`. `strict`: text is no number (YAML 1.1 reads 40e6 as text). BadRequest names the file
    and the key that does not fit."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=type, strict=strict)
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, BadRequest) as error:  # the last: a type's own check
        raise BadRequest(f"{path}: {error}") from None
