"""What a gateway under load makes of the shipped levels and of the router's word, without processes."""

from __future__ import annotations

import numpy as np
import pytest

from nodes.gateway.load import LoadControl
from nodes.gateway.registry import Registry
from nodes.requests import ImageRequest, Refusal
from relay.errors import BadRequest
from relay.program import Program
from scheduler.load.prediction import read_levels, shipped
from scheduler.load.settings import LoadSettings

SIZES = {"mini-sd3": 10_000}, {"mini-sd3": 30_000}
EASY, HARD = 'the word "CAT" in red', "a red heart, a blue ring, a green star and a small yellow square"


@pytest.fixture(scope="module")
def levels():
    """Those that begin from noise."""
    return read_levels(shipped("mini-sd3"), "mini-sd3").from_noise


def started(levels, **options):
    control = LoadControl(LoadSettings(deadline_s=2.0), Registry(1.0), seed=0)
    control.start([Program.parse(level.program) for level in levels.levels], SIZES, **options)
    return control


def test_shipped_levels_are_measured_and_predict_what_a_prompt_loses(levels):
    quality = [level.quality for level in levels.levels]
    assert quality == sorted(quality, reverse=True)
    assert levels.levels[0].work.program.mode == "full-cloud"
    easy, hard = levels.predict([EASY, HARD])
    assert ((easy >= 0) & (easy <= 1)).all()
    assert hard[0] - hard[-1] > easy[0] - easy[-1]  # letters are hardly drawn by either member
    assert np.mean(levels.sample, axis=0) == pytest.approx(quality, abs=0.02)


def test_the_routers_word_is_taken_from_the_router_that_levels_were_fitted_with_alone(levels):
    assert started(levels).told()["reads"] == "prompt"
    assert started(levels, routers={"mini-sd3": "another"}).told()["reads"] == "prompt"
    fits = started(levels, routers={"mini-sd3": levels.router_version})
    assert fits.told()["reads"] == "prompt and router"
    fits.read(EASY)  # one that the router has not read is predicted from its words
    assert fits.told()["counters"] == {}


def test_where_no_node_is_there_a_request_is_told_when_to_come_back(levels):
    control = started(levels)
    programs = [work.program for work in control.works]
    with pytest.raises(Refusal, match="nobody can serve it now") as refusal:
        control.admit(ImageRequest(prompt=EASY), programs, "local")
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, 5.0)
    assert control.told()["counters"] == {"late": 1}


def test_what_is_on_offer_must_have_been_measured(levels):
    control = LoadControl(LoadSettings(deadline_s=2.0), Registry(1.0))
    text = levels.levels[0].program.replace(":28:0-28", ":27:0-27")
    with pytest.raises(
        BadRequest, match=r":27:0-27/.* is on offer and has no measured quality in .*, which has .*:28:0-28/"
    ):
        control.start([Program.parse(text)], SIZES)
    # where nothing is handed off, nothing is matched: how an offer says so does not matter
    control.start([Program.parse(levels.levels[0].program.replace("match=exact", "match=direct"))], SIZES)
    lacking = LoadControl(LoadSettings(deadline_s=2.0, levels="nowhere.json"), Registry(1.0))
    with pytest.raises(BadRequest, match=r"no measured levels in nowhere\.json"):
        lacking.start([Program.parse(levels.levels[0].program)], SIZES)


# --- levels that begin from a cached latent ---


@pytest.fixture(scope="module")
def with_starts(levels, tmp_path_factory):
    """A file of the shipped levels, and full-cloud from step 14 that keeps nearly everything."""
    import msgspec

    from scheduler.load.prediction import MeasuredLevel

    def more(linear):
        return msgspec.structs.replace(
            linear, coefficients=[*linear.coefficients, [0.99 * c for c in linear.coefficients[0]]],
            intercept=[*linear.intercept, 0.99 * linear.intercept[0]],
        )  # fmt: skip

    full = levels.levels[0]
    path = tmp_path_factory.mktemp("starts") / "levels.json"
    path.write_bytes(
        msgspec.json.encode(
            msgspec.structs.replace(
                levels, levels=[*levels.levels, MeasuredLevel(full.program, 0.99 * full.quality, 14)],
                prompt_only=more(levels.prompt_only), with_router=more(levels.with_router),
                sample=[[*row, 0.99 * row[0]] for row in levels.sample],
            )
        )
    )  # fmt: skip
    return str(path)


def job_of(control, **words):
    import time

    from nodes.gateway.jobs import Job

    now = time.monotonic()
    request = ImageRequest(**({"prompt": EASY} | words))
    return Job("j", "r", 0, "t", 1, request, now, now + 60, [work.program for work in control.works], 1)


def pressed(path, cached, edges=2):
    """Two edges asked for far more than they can do; full-cloud alone is on offer."""
    from nodes.messages import Holding, Register

    curve = {1: 0.05, 2: 0.1, 4: 0.2, 8: 0.4}
    registry = Registry(60.0)
    for i in range(edges):
        holding = Holding(
            family="mini-sd3", members=("large",), decodes=True, fingerprint={}, curves={"large": curve},
            encode_s=0.0, decode_s=0.0,
        )  # fmt: skip
        said = Register(name=f"edge-{i}", session="s", holdings=(holding,), batch=8, queue=64, data_address="tcp://x")
        registry.register(said, "edge", f"key-{i}", b"id")
    control = LoadControl(LoadSettings(deadline_s=6.0, levels=path), registry, seed=0, cached=cached)
    control.start([control_full(path)], SIZES)
    for _ in range(5):
        for _ in range(3):
            control.controller.arrived(control._predicted(EASY))
        control.controller.control(control.stations())
    return control


def control_full(path):
    from pathlib import Path

    return Program.parse(read_levels(Path(path), "mini-sd3").levels[0].program)


def test_a_level_that_skips_steps_is_assigned_where_the_request_may_and_told(with_starts):
    control = pressed(with_starts, cached=True)
    (full,) = {work.program for work in control.works}
    assert [work.skipped for work in control.works] == [0, 14]
    assert control.controller.pressed
    leave = control.allowed(job_of(control), [full], starts=True)
    assert leave.programs == [full]
    assert leave.skips == {str(full): 14}
    assert leave.told["level"] == f"{full} from step 14"
    assert leave.told["skips"] == {str(full): 14}
    assert leave.told["allowed"] == [str(full)]
    assert control.told()["starts"] == {f"{full} from step 14": pytest.approx(0.5, abs=0.2)}
    assert control.allowed(job_of(control, seed=3), [full], starts=False).skips == {}


def test_without_a_cache_such_levels_are_none(with_starts):
    control = pressed(with_starts, cached=False)
    assert [work.skipped for work in control.works] == [0]
    assert control.told()["starts"] == {}


def test_what_a_start_spared_is_learned_at_its_end(with_starts):
    from nodes.stages import Stage

    control = pressed(with_starts, cached=True)
    before = control.controller.starts.rate(1)
    for spared in (14, 7, None):
        job = job_of(control)
        job.program, job.skip, job.stage = control.works[1].program, 14, Stage.DONE
        job.report = {"start": {"skipped": spared} if spared else None}
        control.ended(job)
        after = control.controller.starts.rate(1)
        assert (after > before) == (spared == 14)
        before = after


@pytest.mark.parametrize(
    ("words", "skip", "starts", "most"),
    [
        ({}, None, "asked", 0), ({}, 14, "asked", 14), ({"seed": 1}, 14, "asked", 0),
        ({"seed": 1, "cache": True}, None, "asked", 27), ({"cache": True}, 14, "asked", 27),
        ({"cache": False}, 14, "asked", None), ({}, 14, "open", 27),
    ],
)  # fmt: skip
def test_who_may_start_from_a_cached_latent_and_where(levels, words, skip, starts, most):
    from nodes.deployment import CacheConfig
    from nodes.gateway.assignments import cache_use, may_start

    control = started(levels)
    job, cache = job_of(control, **words), CacheConfig(starts=starts)
    job.program, job.skip = control.works[0].program, skip
    use = cache_use(job, cache)
    assert (use and use.most) == most
    assert may_start(job.request, cache) == (words.get("cache", "seed" not in words))
    assert cache_use(job, CacheConfig(scope="off")) is None
    assert not may_start(job.request, CacheConfig(scope="off"))


# --- a request that comes again ---


def test_a_request_that_comes_again_gets_its_job_when_nothing_more_is_let_in(tmp_path, levels):
    """Nobody is there and the queue is full: whatever is new is refused, and what its key began is not."""
    import asyncio

    from http_service import Service

    service = Service(tmp_path, queue=2, compute=False)
    try:
        first = ImageRequest(prompt="a red heart")

        def ask(request, key=None, tenant="a"):
            return service.call(service.dispatcher.submit(request, tenant, key))

        begun = ask(first, "k")
        control = LoadControl(LoadSettings(deadline_s=2.0), service.registry)
        control.start([Program.parse(levels.levels[0].program)], SIZES)
        service.dispatcher.control(control)
        assert ask(first, "k") == begun
        for request, key, tenant in ((first, None, "a"), (first, "other", "a"), (first, "k", "b")):
            with pytest.raises(Refusal) as refusal:
                ask(request, key, tenant)
            assert refusal.value.status == 503
        with pytest.raises(Refusal, match="another request") as refusal:
            ask(ImageRequest(prompt="a blue ring"), "k")
        assert refusal.value.status == 409
        service.dispatcher.control(None)

        async def together():
            twins = [service.dispatcher.submit(first, "a", "twin") for _ in range(3)]  # room for one of them
            return await asyncio.gather(*twins)

        assert len({tuple(ids) for _, ids in service.call(together())}) == 1
        with pytest.raises(Refusal, match="too many jobs"):
            ask(first, "third")
        assert ask(first, "k") == begun
        assert service.dispatcher.counters["idempotent"] == 4
        assert service.dispatcher.counters["accepted"] == 2
    finally:
        service.close()


# --- nodes slower than they said ---


def slow_world(slow, seconds=60.0, per_s=20.0):
    """Two edges that take `slow` times what they said, asked for far more than they can do: when each of the admitted came and
    how long it took, and the control. Time is this world's own."""
    import time

    from nodes.gateway.jobs import Stretch
    from nodes.stages import Stage

    control, began = pressed(str(shipped("mini-sd3")), cached=False), time.monotonic()
    (full,) = {work.program for work in control.works}
    work_s, rate = 28 * 0.05, 0.05 * 8 / 0.4  # this curve gains nothing by a batch
    free, ends, took = dict.fromkeys(control.registry.nodes, 0.0), [], []

    def end(until):
        ends.sort(key=lambda each: each[0])
        while ends and ends[0][0] <= until:
            at, job, node, came = ends.pop(0)
            node.jobs.pop(job.id)
            job.stage, job.report = Stage.DONE, {"timings": {node.name: {"denoising": at - came}}}
            control.ended(job)

    for number in range(int(seconds * per_s)):
        now = number / per_s
        end(now)
        try:
            control.admit(ImageRequest(prompt=EASY, deadline_ms=6000), [full], "t")
        except Refusal:
            continue
        node = min(control.registry.nodes.values(), key=lambda n: sum(n.jobs.values()))
        job = job_of(control)
        job.id, job.program, job.stretches = f"j{number}", full, [Stretch(node.name, 0, 0)]
        control.placed(job)
        node.jobs[job.id] = work_s
        free[node.name] = max(free[node.name], now) + slow * work_s / rate
        ends.append((free[node.name], job, node, now))
        took.append((now, free[node.name] - now))
        if number % int(per_s) == 0:
            control._late()
    assert time.monotonic() - began < 60
    return took, control


def test_nodes_slower_than_they_said_are_asked_for_less_and_nobody_waits_for_them():
    """Three times: what their curves would let in takes three times the deadline; it is refused at once instead."""
    took, control = slow_world(1.0)
    assert max(seconds for _, seconds in took) <= 6.0 * 1.1
    assert control.told()["lags"] == {}
    slow, control = slow_world(3.0, seconds=120.0)
    assert max(seconds for _, seconds in slow) > 12.0  # of those that came before anything was known
    assert all(lag > 2 for lag in control.told()["lags"].values())
    later = [seconds for came, seconds in slow if came > 60]
    assert later
    assert max(later) <= 6.0 * 1.3


def test_time_left_is_counted_by_what_nine_in_ten_requests_took_over_what_was_predicted():
    from scheduler.load.lag import Overruns

    overruns = Overruns()
    for _ in range(7):
        overruns.observe(9.0, 1.0)
    assert overruns.factor == 1.0  # too few
    for _ in range(64):
        for seconds in (1.0, 0.5, 1.2, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 9.0):
            overruns.observe(seconds, 1.0)
    assert 2.0 <= overruns.factor < 9.0
    for _ in range(64):
        overruns.rest()
    assert overruns.factor == 1.0


def test_who_would_be_just_in_time_where_requests_overrun_is_told_so_at_once():
    from scheduler.load.expected import ends_s

    control = pressed(str(shipped("mini-sd3")), cached=False)
    soonest, _ = ends_s(control.works[0], control.stations())
    request = ImageRequest(prompt=EASY, deadline_ms=int(1500 * soonest))
    assert control.admit(request, [control.works[0].program], "a") > 0
    for _ in range(20):
        control.controller.overruns.observe(20.0, 10.0)
    with pytest.raises(Refusal, match="it cannot be done within"):
        control.admit(request, [control.works[0].program], "a")
    assert control.told()["overrun"] == 2.0


def test_a_node_on_which_nothing_lies_is_tried_again():
    from scheduler.load.lag import MOST, Lags

    lags = Lags()
    for _ in range(100):
        lags.observe("edge", 1e9, 1.0)
    assert lags.of("edge") == pytest.approx(MOST, rel=0.25)
    for _ in range(100):
        lags.rest("edge")
    assert lags.of("edge") == 1.0
    lags.observe("edge", 0.01, 5.0)
    assert lags.of("edge") == lags.of("never seen") == 1.0
    lags.observe("edge", 0.2, 0.001)  # a hundred times nothing is nothing
    assert lags.of("edge") == 1.0


def test_patience_is_that_of_the_busiest_node_not_of_all_together(tmp_path):
    from http_service import Service

    from nodes.gateway.jobs import Stretch

    control = pressed(str(shipped("mini-sd3")), cached=False)
    service = Service(tmp_path, compute=False)
    try:
        service.registry.nodes |= control.registry.nodes
        job = job_of(control)
        job.stretches = [Stretch(name, i, i) for i, name in enumerate(control.registry.nodes)]
        assert service.dispatcher._patience(job) == 10.0
        for node, work in zip(control.registry.nodes.values(), (8.0, 6.0), strict=True):
            node.jobs["other"] = work
        assert service.dispatcher._patience(job) == pytest.approx(10 + 3 * 8.0)
    finally:
        service.close()
