"""A file is there whole or not at all."""

import resource
import signal
import subprocess
import sys
import time

import pytest

from relay.files import replacing, write_atomically


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    for data, read in (("één\n", "één\n".encode()), (b"\0\1", b"\0\1"), (memoryview(b"abc"), b"abc")):
        write_atomically(path, data, sync=True)
        assert path.read_bytes() == read
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "before"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["a.bin"]


def test_a_killed_writer_leaves_the_whole_file_that_was_there(tmp_path):
    path = tmp_path / "a.bin"
    code = "import sys; from pathlib import Path; from relay.files import write_atomically as w\n"
    code += "while True:\n    for fill in b'ab': w(Path(sys.argv[1]), bytes([fill]) * 200_000)"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        writer.kill()
        writer.wait()
        data = path.read_bytes()
        assert len(data) == 200_000
        assert len(set(data)) == 1
