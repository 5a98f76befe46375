"""What is kept and for how long, what a log line holds, and how a timeline is drawn."""

import asyncio
import io
import json
import logging
import os
import sqlite3
import time

import pytest

from nodes import logs
from nodes.gateway.ledger import Ledger
from nodes.gateway.retention import tidy
from nodes.gateway.settling import Settling, digest_of
from nodes.tasks import Tasks
from nodes.trace import chrome_trace, timeline


@pytest.fixture
def store(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path


@pytest.fixture
def ledger(store):
    made = Ledger(store / "ledger.db")
    yield made
    made.close()


async def keep(ledger, store, job, request=None, size=1000, ends=True):
    """A job with an image of so many bytes."""
    request = request or f"req-{job}"
    image = f"images/{job}.png"
    await ledger.accept(request, "local", None, {"prompt": "p"}, [(job, 1)])
    (store / image).write_bytes(bytes(size))
    if ends:
        await ledger.end(job, "done", report={"seed": 1}, image=image)


def left(store):
    return sorted(path.stem for path in (store / "images").iterdir())


def test_pictures_over_the_limit_go_oldest_first_with_their_jobs(ledger, store):
    async def work():
        for job in ("a", "b", "c", "d"):
            await keep(ledger, store, job)
        assert await tidy(ledger, store, 24, 0.0025) == 2
        assert await tidy(ledger, store, 24, 0.0025) == 0

    asyncio.run(work())
    assert left(store) == ["c", "d"]
    assert [ledger.job(job) is None for job in "abcd"] == [True, True, False, False]


def test_what_is_over_goes_and_what_is_open_stays(ledger, store):
    async def work():
        await keep(ledger, store, "old")
        await ledger.note([("old", 1.0, "gateway", "accepted", {})])
        await keep(ledger, store, "open", ends=False)
        stray = store / "images" / "stray.png"
        stray.write_bytes(b"x")
        os.utime(stray, (1, 1))
        await asyncio.sleep(0.05)
        assert await tidy(ledger, store, 0.00001, 100) == 1

    asyncio.run(work())
    assert left(store) == ["open"]
    assert ledger.job("old") is None
    assert ledger.events_of("old") == []
    assert ledger.job("open")["stage"] == "accepted"


def record(handler_stream, style, monkeypatch, log):
    monkeypatch.setenv("RELAY_LOGS", style)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up(handler_stream)
        log(logging.getLogger("relay.test"))
    finally:
        root.handlers[:], root.level = before, level
    return handler_stream.getvalue()


def test_log_is_one_json_object_a_line_that_says_what_it_is_about(monkeypatch):
    def log(logger):
        with logs.about(http="http-1"):
            try:
                raise ValueError("two\nlines")
            except ValueError:
                logger.exception("it %s", "broke", extra=logs.fields(job="job-1", tenant=None))
        logger.info("later\nstill one line")

    first, second = record(io.StringIO(), "json", monkeypatch, log).splitlines()
    said = json.loads(first)
    assert (said["message"], said["level"], said["logger"]) == ("it broke", "error", "relay.test")
    assert (said["http"], said["job"]) == ("http-1", "job-1")
    assert "tenant" not in said
    assert "ValueError: two\nlines" in said["exception"]
    assert "http" not in json.loads(second)


def test_log_on_a_terminal_is_short_and_cannot_be_forged(monkeypatch):
    def log(logger):
        logger.info("POST", extra=logs.fields(seconds=0.25, prompt="a\n12:00:00 error relay: forged"))

    (line,) = record(io.StringIO(), "text", monkeypatch, log).splitlines()
    assert line.endswith('relay.test: POST seconds=0.250 prompt="a\\n12:00:00 error relay: forged"')


def test_context_follows_into_tasks():
    async def work():
        with logs.about(http="1"):
            task = asyncio.ensure_future(inner())
        return await task

    async def inner():
        await asyncio.sleep(0)
        return logs._about.get()

    assert asyncio.run(work()) == {"http": "1"}
    assert logs._about.get() == {}


def test_a_task_that_breaks_is_heard_of_and_one_that_is_called_off_is_not(caplog):
    async def breaks():
        raise KeyError("job-1")

    async def waits():
        await asyncio.sleep(60)

    async def work():
        tasks = Tasks()
        tasks.start(breaks())
        tasks.start(waits())
        await asyncio.sleep(0.01)
        tasks.cancel()
        await asyncio.sleep(0.01)

    asyncio.run(work())
    (record,) = caplog.records
    assert "breaks" in record.message
    assert record.exc_info[0] is KeyError


@pytest.mark.parametrize(("policy", "names"), [("on", {"prompt"}), ("hash", {"prompt_sha256"}), ("off", set())])
def test_prompts_in_logs_as_told(policy, names):
    said = logs.prompt_fields(policy, prompt="secret words", negative_prompt=None)
    assert said.keys() == names
    assert ("secret words" in str(said)) == (policy == "on")


def test_timeline_becomes_slices_that_end_where_the_gateway_heard_of_their_end():
    start = time.time()
    rows = [
        {"at": start + 1.0, "node": "edge", "what": "sending", "left": "denoising", "spent_s": 0.6, "leg": 1},
        {"at": start, "node": "gateway", "what": "accepted"},
        {"at": start + 0.1, "node": "gateway", "what": "placed", "left": "accepted", "spent_s": 0.2},
    ]
    assert [row["what"] for row in timeline(rows)] == ["accepted", "placed", "sending"]
    drawn = chrome_trace("job-1", rows)["traceEvents"]
    slices = {each["name"]: each for each in drawn if each["ph"] == "X"}
    assert slices["denoising"]["ts"] == pytest.approx(0.4e6, rel=1e-3)
    assert slices["denoising"]["dur"] == pytest.approx(0.6e6, rel=1e-3)
    assert slices["accepted"]["ts"] == 0
    assert {each["args"]["name"] for each in drawn if each["name"] == "thread_name"} == {"gateway", "edge"}
    assert json.dumps(drawn)
    assert chrome_trace("job-2", [])["traceEvents"]


# --- what a power cut takes ---


def test_a_picture_that_did_not_reach_the_disk_is_open_again_and_one_that_did_is_not(store):
    pictures = {"whole": b"a whole picture", "short": b"a picture", "gone": b"another"}

    async def before():
        ledger = Ledger(store / "ledger.db")
        for job, png in pictures.items():
            await ledger.accept(f"req-{job}", "local", None, {"prompt": "p"}, [(job, 7)])
            (store / "images" / f"{job}.png").write_bytes(png)
            await ledger.end(job, "done", report={"seed": 7}, image=f"images/{job}.png", digest=digest_of(png))
        ledger.close()

    async def after():
        ledger = Ledger(store / "ledger.db")
        settling = Settling(ledger, store)
        assert await settling.look_back() == 2
        assert ledger.unsettled() == []
        assert await settling.look_back() == 0
        found = {job: ledger.job(job) for job in pictures}, [(each.id, each.seed) for each in ledger.open_jobs()]
        ledger.close()
        return found

    asyncio.run(before())
    (store / "images" / "short.png").write_bytes(b"a pic\0\0\0\0")  # as a file system leaves it
    (store / "images" / "gone.png").unlink()
    jobs, opened = asyncio.run(after())
    assert jobs["whole"]["stage"] == "done"
    assert jobs["whole"]["image"] == "images/whole.png"
    assert opened == [("short", 7), ("gone", 7)]
    assert jobs["gone"]["image"] is jobs["gone"]["report"] is jobs["gone"]["ended_at"] is None


def test_pictures_are_settled_once_a_second_also_where_one_was_dropped_meanwhile(ledger, store):
    async def work():
        settling = Settling(ledger, store)
        for job in ("kept", "dropped"):
            await ledger.accept(f"req-{job}", "local", None, {"prompt": "p"}, [(job, 7)])
            (store / "images" / f"{job}.png").write_bytes(b"png")
            await ledger.end(job, "done", report={}, image=f"images/{job}.png", digest=digest_of(b"png"))
            settling.ended(job, f"images/{job}.png")
        (store / "images" / "dropped.png").unlink()
        assert len(ledger.unsettled()) == 2
        running = asyncio.ensure_future(settling.run())
        while ledger.unsettled():
            await asyncio.sleep(0.05)
        running.cancel()

    asyncio.run(asyncio.wait_for(work(), 20))


def test_a_ledger_of_before_is_read_on(store):
    with sqlite3.connect(store / "ledger.db") as db:
        db.executescript(
            "CREATE TABLE jobs (id TEXT PRIMARY KEY, request TEXT NOT NULL, number INTEGER NOT NULL, tenant TEXT NOT NULL,"
            " seed INTEGER NOT NULL, stage TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, program TEXT, nodes TEXT,"
            " error TEXT, report TEXT, image TEXT, ended_at REAL);"
            "INSERT INTO jobs (id, request, number, tenant, seed, stage) VALUES ('old', 'r', 0, 'local', 1, 'done')"
        )
    ledger = Ledger(store / "ledger.db")
    assert ledger.unsettled() == []
    ledger.close()
