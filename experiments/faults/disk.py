"""A disk that is full for a while: a small file system where this user may mount one, else a limit on the writer's files.

tmpfs    shrunk to what lies in it: every write that needs a new page gets ENOSPC
limit    RLIMIT_FSIZE of the running process at 0: every write to a file gets EFBIG
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import Literal

SOURCE = "relay-faults"  # and the process id: what the mount table shows
PAGE = 4096


class SmallDisk:
    """`with SmallDisk(folder) as disk:` mounts a file system of `size` bytes at `folder`, or says `kind` "limit"."""

    def __init__(self, folder: Path, size: int = 1 << 30, kind: Literal["tmpfs", "limit"] | None = None):
        self.folder, self.size, self.kind = folder, size, kind
        self._limited: int | None = None

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True, exist_ok=True)
        _unmount_what_others_left()
        if self.kind != "limit":
            source = f"{SOURCE}-{os.getpid()}"
            options = ["-t", "tmpfs", "-o", f"size={self.size},mode=700", source]
            mounted = _run("mount", *options, str(self.folder)) if os.geteuid() == 0 else "mounting needs root"
            if mounted and self.kind == "tmpfs":
                raise OSError(mounted)
            self.kind = "limit" if mounted else "tmpfs"
        return self

    def __exit__(self, *_: object) -> None:
        if self.kind == "tmpfs" and _run("umount", str(self.folder)):
            _run("umount", "-l", str(self.folder))

    def fill(self, writer: int) -> None:
        """No room from now on for the process with id `writer` (a tmpfs: for nobody)."""
        if self.kind == "limit":
            hard = resource.prlimit(writer, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(writer, resource.RLIMIT_FSIZE, (0, hard))
            self._limited = writer
            return
        why = "no try"
        for spare in (0, 0, 8, 64):  # pages, for what is written between the look and the mount
            said = os.statvfs(self.folder)
            used = (said.f_blocks - said.f_bfree) * said.f_frsize
            if (why := self._resize(max(used, PAGE) + spare * PAGE)) == "":
                return
        raise OSError(f"{self.folder} cannot be made smaller: {why}")

    def empty(self) -> None:
        """There is room again."""
        if self.kind == "tmpfs":
            if why := self._resize(self.size):
                raise OSError(why)
        elif self._limited is not None:
            with contextlib.suppress(ProcessLookupError):  # killed meanwhile
                hard = resource.prlimit(self._limited, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(self._limited, resource.RLIMIT_FSIZE, (hard, hard))

    def _resize(self, size: int) -> str:
        return _run("mount", "-o", f"remount,size={size}", str(self.folder))


def _unmount_what_others_left() -> None:
    """Mounts of processes that were killed before they could unmount."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, where = line.split()[:2]
        if source.startswith(f"{SOURCE}-") and not Path("/proc", source.rpartition("-")[2]).exists():
            _run("umount", "-l", where)


def _run(*argv: str) -> str:
    """Empty where it went well, else what it said."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{argv[0]}: {error.strerror}"
    return "" if done.returncode == 0 else done.stderr.strip() or f"{argv[0]} ended with {done.returncode}"
