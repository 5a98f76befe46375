"""Scoring in a child process of the lowest priority, for a node that draws as well.

Not in a thread: one of low priority that is off the processor while it holds the interpreter's lock stops the whole node,
compute loop and heartbeats, for seconds on a busy machine (measured: docs/judging.md). The child is started for the first
picture and ends when it has had nothing to do for a while, so that its memory is not held for ever.

Frames on its standard input and output, msgpack behind a length of 4 bytes: [png, prompt, scenes] -> [scores, missing].

This file is also the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from nodes.tether import tethered
from relay.errors import RelayError

if TYPE_CHECKING:
    from nodes.scoring import Scored

SCORE_S = 300.0  # one picture, models loaded from the disk included, on a machine that is busy
_LENGTH = struct.Struct("<I")


class NotScored(RelayError):
    """The child died or did not answer."""


class ScoreProcess:
    """Not to be shared between event loops; one picture at a time."""

    def __init__(self, metrics: Sequence[str | Mapping[str, Any]] = (), nice: int = 19):
        self.argv = [sys.executable, "-m", "nodes.score_process", str(nice), json.dumps(list(metrics))]
        self._child: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """While it runs."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def score(self, png: bytes, prompt: str, scenes: bool) -> Scored:
        """NotScored where the child died; the next call starts another one."""
        import msgspec

        from nodes.scoring import Scored

        if self.pid is None:
            await self.stop()
            self._child = await asyncio.create_subprocess_exec(
                *tethered(self.argv), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        data = msgspec.msgpack.encode((png, prompt, scenes))
        try:
            async with asyncio.timeout(SCORE_S):
                child.stdin.write(_LENGTH.pack(len(data)) + data)
                await child.stdin.drain()
                (length,) = _LENGTH.unpack(await child.stdout.readexactly(_LENGTH.size))
                scores, missing = msgspec.msgpack.decode(
                    await child.stdout.readexactly(length), type=tuple[dict[str, float], dict[str, str]]
                )
        except (OSError, asyncio.IncompleteReadError, TimeoutError, msgspec.DecodeError) as error:
            await self.stop()
            raise NotScored(f"this device's judge broke: {type(error).__name__}") from None
        return Scored(scores, missing)

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


# --- the child ---


def _serve(metrics: str, asked: IO[bytes], answers: IO[bytes]) -> None:
    """Until there is nothing more to come."""
    import msgspec

    from nodes.scoring import Scorer

    scorer = Scorer(json.loads(metrics))
    while len(head := asked.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        png, prompt, scenes = msgspec.msgpack.decode(asked.read(length), type=tuple[bytes, str, bool])
        answer = msgspec.msgpack.encode(tuple(scorer.score(png, prompt, scenes)))
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


def main() -> None:
    from nodes.own_process import lower_priority, ready_for_libraries

    lower_priority(int(sys.argv[1]))
    ready_for_libraries()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _serve(sys.argv[2], sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
