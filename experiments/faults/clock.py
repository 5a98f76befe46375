"""Wall clocks that jump, one a process: Debian's libfaketime, preloaded, reads each clock's offset from a file.

Monotonic clocks stay as they are: a jump is what NTP or a person does to a machine that runs. The times of files that such
a process looks at jump with its clock, as if all had been written by it. `time.sleep` fails under
libfaketime 0.9.10 where the monotonic clock is left alone (it passes an absolute time through the wrong clock), so a
process that calls it (a node with a `pace`) cannot have such a clock; event loops, queues and locks do not.
"""

from __future__ import annotations

import os
from pathlib import Path

MISSING = "libfaketime is not installed (Debian's package faketime)"
SHARED = Path("/dev/shm")  # where libfaketime keeps its state, and leaves it when its process is killed


def library() -> Path | None:
    """The preloaded library for threads, where it is installed."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


class Clocks:
    """A clock for each name; all right until they jump."""

    def __init__(self, folder: Path, names: tuple[str, ...]):
        folder.mkdir(parents=True, exist_ok=True)
        self.names, self._folder, self._library = names, folder, library()
        self._before = set(_left_behind())
        for name in names:
            self.jump(name, 0)

    def environment(self) -> dict[str, dict[str, str]]:
        """Process -> what its environment needs; empty without the library."""
        if self._library is None:
            return {}
        shared = {
            "LD_PRELOAD": str(self._library), "DONT_FAKE_MONOTONIC": "1", "FAKETIME_CACHE_DURATION": "1",
        }  # fmt: skip
        return {name: shared | {"FAKETIME_TIMESTAMP_FILE": str(self._folder / name)} for name in self.names}

    def jump(self, name: str, seconds: float) -> None:
        """From now on (it looks once a second) this clock is so far from the right one, until it jumps again."""
        partial = self._folder / f".{name}"
        partial.write_text(f"{seconds:+.0f}\n")
        partial.replace(self._folder / name)

    def close(self) -> None:
        """Remove what killed processes left in shared memory."""
        for path in set(_left_behind()) - self._before:
            if not Path("/proc", path.name.rpartition("_")[2]).exists():
                path.unlink(missing_ok=True)


def _left_behind() -> list[Path]:
    return list(SHARED.glob("*faketime_*")) if os.access(SHARED, os.W_OK) else []
