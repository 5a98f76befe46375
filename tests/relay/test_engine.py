"""The step engine: company changes nothing, and who steps, waits, leaves and is refused."""

import itertools
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NEGATIVE, OTHER, PROMPT

from relay.batching import TRUSTED
from relay.conditioning import Conditioning
from relay.engine import StepEngine, Walk
from relay.errors import BadRequest, Busy, Cancelled, DeadlinePassed, NonFiniteLatent, StepFailed
from relay.pipeline import RelayPipeline
from relay.sampling import walk_leg

ARCHITECTURES = ("sdxl", "sd3")
FLAT = {1: 0.004, 64: 0.004}


class Watched:
    """A denoiser that remembers what it was asked, and does `before` first, such as really run out of memory."""

    def __init__(self, denoiser, before=lambda x: None):
        self.denoiser, self.before = denoiser, before
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.asked = []

    def __call__(self, x, sigma, cond, guidance):
        self.asked.append((x, sigma, cond))
        self.before(x)
        return self.denoiser(x, sigma, cond, guidance)

    @property
    def batches(self):
        return [len(x) for x, _, _ in self.asked]


class Clock:
    """A second for every tick."""

    now = 0.0

    def tick(self, _):
        self.now += 1


@pytest.fixture
def clock(monkeypatch):
    """The engine's clock, moved by hand."""
    clock = Clock()
    monkeypatch.setattr("relay.engine.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def ask(pipe, id, *, first=0, last=4, steps=4, guidance=3.0, seed=0, prompt=PROMPT, size=(32, 32), **walk):
    """Indices `first` to `last` of the large member's schedule of `steps`, from noise."""
    family = pipe.family
    sigmas = family.schedules(size)["large"](steps).sigmas[first : last + 1]
    noise = family.initial_noise(1, size, torch.Generator().manual_seed(seed))
    cond = family.text.encode([prompt], [NEGATIVE] if guidance > 1 else None, guidance > 1, size)
    return Walk(id=id, latent=noise * sigmas[0], sigmas=sigmas, conditioning=cond, guidance=guidance, **walk)


def engine_of(pipe, *, curve=FLAT, max_batch=8, max_queue=100, denoiser=None):
    return StepEngine(denoiser or pipe.family.denoiser("large"), "large", curve, max_batch, max_queue)


def drained(engine, *walks):
    """id -> how it ended, in the order of ending."""
    for walk in walks:
        engine.submit(walk)
    ended = {}
    while engine.load.running or engine.load.queued:
        ended |= {each.id: each for each in engine.step()}
    return ended


def alone(pipe, walk):
    return walk_leg(
        pipe.family.denoiser("large"), walk.latent, walk.sigmas, walk.conditioning, walk.guidance, member="large"
    )


def off(x, reference):
    return float((x - reference).abs().max() / reference.abs().max())


# --- the same image ---


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("handoff", [5, 2, 0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alone_every_leg_is_the_pipelines_bit_for_bit(pipes, name, handoff, guidance):
    from relay import matching

    pipe = pipes[name]
    call = {"num_inference_steps": 5, "handoff": handoff, "codec": "fp32", "guidance_scale": guidance, "seed": 3}
    whole = pipe(PROMPT, output_type="latent", **call)
    legs = matching.walk(whole.program, pipe.family.schedules((32, 32)))
    cond = pipe.family.text.encode([PROMPT], None, guidance > 1, (32, 32))
    first = pipe.family.schedules((32, 32))[legs[0][0].member](5)
    latent = pipe.family.initial_noise(1, (32, 32), torch.Generator().manual_seed(3)) * first.init_noise_sigma
    for leg, sigmas in legs:
        engine = StepEngine(pipe.family.denoiser(leg.member), leg.member, FLAT, 8, 8)
        ended = drained(engine, Walk("a", latent, sigmas, cond, guidance))
        assert ended["a"].error is None
        latent = ended["a"].latent
    assert torch.equal(latent, whole.images)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_going_on_from_any_step_is_the_unbroken_walk_bit_for_bit(pipes, name):
    pipe, trail = pipes[name], []
    whole = ask(pipe, "whole", on_step=lambda done, sigma, x: trail.append((done, sigma, x.clone())))
    end = drained(engine_of(pipe), whole)["whole"].latent
    assert [(done, sigma) for done, sigma, _ in trail] == [(i, whole.sigmas[i]) for i in range(1, 5)]
    assert torch.equal(trail[-1][2], end)
    for done, _, latent in trail[:-1]:
        rest = Walk("rest", latent, whole.sigmas[done:], whole.conditioning, whole.guidance)
        assert torch.equal(drained(engine_of(pipe), rest)["rest"].latent, end)


REQUEST = st.fixed_dictionaries(
    {
        "first": st.integers(0, 3),
        "last": st.integers(4, 6),
        "guidance": st.sampled_from([0.0, 1.0, 1.5, 3.0]),
        "seed": st.integers(0, 9),
        "prompt": st.sampled_from([PROMPT, OTHER]),
        "size": st.sampled_from([(32, 32), (32, 32), (48, 32)]),
        "arrived": st.integers(0, 5),
        "deadline": st.sampled_from([math.inf, math.inf, 1e12, 2e12]),
    }
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6)
@given(asked=st.lists(REQUEST, min_size=2, max_size=7), max_batch=st.integers(1, 6))
def test_company_changes_no_image(pipes, name, asked, max_batch):
    pipe = pipes[name]
    walks = [ask(pipe, str(i), steps=6, **each) for i, each in enumerate(asked)]
    references = [alone(pipe, walk) for walk in walks]
    engine, ended = engine_of(pipe, max_batch=max_batch), {}
    for now in range(200):
        for walk in walks:
            if walk.arrived == now:
                engine.submit(walk)
        ended |= {each.id: each for each in engine.step()}
    assert len(ended) == len(walks)
    for i, reference in enumerate(references):
        assert ended[str(i)].error is None
        assert off(ended[str(i)].latent, reference) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bf16_company_changes_what_bf16_rounds(checkpoints, tmp_path, name):
    from tiny import write_family

    pipe = RelayPipeline.from_pretrained(write_family(tmp_path / f"{name}.yaml", checkpoints[name], name, dtype="bf16"))
    assert pipe.dtype == "bf16"
    walks = [ask(pipe, str(i), seed=i, first=i % 3) for i in range(6)]
    references = [alone(pipe, walk) for walk in walks]
    ended = drained(engine_of(pipe), *walks)
    worst = max(off(ended[str(i)].latent, reference) for i, reference in enumerate(references))
    assert worst < 2e-2


# --- who is in the batch ---


def test_done_ones_leave_and_new_ones_enter_at_the_next_step(pipes):
    denoiser = Watched(pipes["sd3"].family.denoiser("large"))
    engine = engine_of(pipes["sd3"], denoiser=denoiser)
    for id, last in (("short", 1), ("long", 4)):
        engine.submit(ask(pipes["sd3"], id, last=last))
    assert [each.id for each in engine.step()] == ["short"]
    engine.submit(late := ask(pipes["sd3"], "late", last=2))
    assert engine.step() == []
    assert engine.load.running == 2
    assert [each.id for each in engine.step()] == ["late"]
    assert [each.id for each in engine.step()] == ["long"]
    assert denoiser.batches == [2, 2, 2, 1]
    assert sorted(denoiser.asked[1][1].tolist()) == pytest.approx(sorted([late.sigmas[0], late.sigmas[1]]))
    assert engine.load.steps_done == 7
    assert engine.step() == []


def test_the_batch_is_gathered_only_when_its_members_change(pipes):
    denoiser = Watched(pipes["sdxl"].family.denoiser("large"))
    drained(
        engine_of(pipes["sdxl"], denoiser=denoiser), ask(pipes["sdxl"], "a", last=2), ask(pipes["sdxl"], "b", last=4)
    )
    conds = [id(cond) for _, _, cond in denoiser.asked]
    assert conds[0] == conds[1] != conds[2] == conds[3]


def test_unguided_walks_pay_for_one_forward_and_share_no_batch_with_guided_ones(pipes):
    pipe, rows = pipes["sd3"], []
    plain, bare = (ask(pipe, id, guidance=1.0, last=2) for id in ("plain", "bare"))
    plain.conditioning = ask(pipe, "").conditioning  # brings negatives that no step of it reads
    reference = alone(pipe, bare)
    hook = pipe.family.denoiser("large").transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        ended = drained(engine_of(pipe), ask(pipe, "a", last=1), ask(pipe, "b", last=1, guidance=2.0), plain, bare)
    finally:
        hook.remove()
    assert sorted(rows) == [2, 2, 4]
    assert all(off(ended[id].latent, reference) < 1e-4 for id in ("plain", "bare"))


def test_admission_is_by_deadline_then_arrival(pipes):
    now = time.monotonic()
    engine = engine_of(pipes["sd3"], max_batch=1)
    walks = [
        ask(pipes["sd3"], "second-come", last=1, arrived=2.0),
        ask(pipes["sd3"], "first-come", last=1, arrived=1.0),
        ask(pipes["sd3"], "later", last=1, arrived=0.0, deadline=now + 2000),
        ask(pipes["sd3"], "sooner", last=1, arrived=3.0, deadline=now + 1000),
    ]
    assert list(drained(engine, *walks)) == ["sooner", "later", "first-come", "second-come"]


def test_a_more_urgent_walk_sets_one_aside_that_then_goes_on_where_it_was(pipes):
    pipe = pipes["sdxl"]
    engine, walk = engine_of(pipe, max_batch=1), ask(pipe, "patient")
    reference = alone(pipe, walk)
    engine.submit(walk)
    engine.step()
    urgent = ask(pipe, "urgent", last=2, seed=1, deadline=time.monotonic() + 1000)
    ended = drained(engine, urgent)
    assert list(ended) == ["urgent", "patient"]
    assert off(ended["patient"].latent, reference) < 1e-4


def test_some_early_rather_than_all_late_where_a_larger_batch_gains_nothing(pipes):
    denoiser = Watched(pipes["sd3"].family.denoiser("large"))
    linear = {1: 1000.0, 8: 8000.0}  # far above what a step here takes: measuring scales it, its shape stays
    engine = engine_of(pipes["sd3"], curve=linear, denoiser=denoiser)
    ended = drained(engine, *(ask(pipes["sd3"], str(i), last=2, arrived=float(i)) for i in range(4)))
    assert list(ended) == ["0", "1", "2", "3"]
    assert denoiser.batches == [1] * 8


def test_a_curve_that_says_batches_gain_nothing_heals_where_they_do(pipes, clock):
    asked, ids = ask(pipes["sd3"], ""), itertools.count()
    denoiser = Watched(pipes["sd3"].family.denoiser("large"), before=clock.tick)  # a second, whatever the batch
    engine = engine_of(pipes["sd3"], curve={1: 1.0, 4: 4.0}, max_batch=4, denoiser=denoiser)
    for _ in range(210):
        while engine.load.running + engine.load.queued < 5:
            walk = (asked.latent, asked.sigmas, asked.conditioning, asked.guidance)
            engine.submit(Walk(str(next(ids)), *walk))
        engine.step()
    assert denoiser.batches[:60] == [1] * 60
    assert min(denoiser.batches[-10:]) >= 3


def test_it_says_how_much_slower_than_its_curve_its_latest_steps_were(pipes, clock):
    asked, denoiser = ask(pipes["sd3"], ""), Watched(pipes["sd3"].family.denoiser("large"), before=clock.tick)
    engine = engine_of(pipes["sd3"], curve={1: 0.25}, max_batch=1, denoiser=denoiser)
    found = [engine.slower]
    for i in range(3):
        engine.submit(Walk(str(i), asked.latent, asked.sigmas, asked.conditioning, asked.guidance))
        while engine.load.running + engine.load.queued:
            engine.step()
            found.append(engine.slower)
    assert found == [1.0] * TRUSTED + [4.0] * (12 - TRUSTED + 1)  # a step takes a second, not a quarter of one


def test_lanes_share_the_time_so_that_no_shape_blocks_another(pipes, monkeypatch):
    monkeypatch.setattr(
        "relay.batching.TRUSTED", math.inf
    )  # the given curve counts: a wide step costs four narrow ones
    pipe = pipes["sd3"]
    denoiser = Watched(pipe.family.denoiser("large"))
    engine = StepEngine(denoiser, "large", {1: 1.0, 2: 2.0}, 2, 100, curve_size=(16, 16))
    crowd = [ask(pipe, f"narrow {i}") for i in range(6)]
    ended = drained(engine, *crowd, ask(pipe, "wide", size=(64, 64)))
    widths = "".join("W" if x.shape[-1] == 32 else "n" for x, _, _ in denoiser.asked)
    assert widths == "WnnnnWnnnnWnnnnW" + 12 * "n"
    assert list(ended).index("wide") == 3


# --- who is refused, and who leaves early ---


def test_a_full_queue_says_when_to_come_again_by_the_curve_and_the_steps_that_are_left(pipes):
    def retry_after(seconds, steps):
        engine = engine_of(pipes["sd3"], curve={1: seconds, 8: seconds}, max_batch=2, max_queue=1)
        for i in range(3):
            engine.submit(ask(pipes["sd3"], str(i), steps=steps, last=steps))
        with pytest.raises(Busy, match="retry in") as refused:
            engine.submit(ask(pipes["sd3"], "one too many"))
        assert engine.load.queued == 3
        engine.step()
        drained(engine)
        engine.submit(ask(pipes["sd3"], "one too many"))
        return refused.value.retry_after_s

    assert retry_after(0.5, 4) == pytest.approx(4 * 0.5)  # the first two leave after four steps
    assert retry_after(0.5, 8) == pytest.approx(8 * 0.5)
    assert retry_after(2.0, 4) == pytest.approx(4 * 2.0)


def test_the_backlog_is_the_steps_held_at_the_chosen_batch(pipes):
    engine = engine_of(pipes["sd3"], curve={1: 1.0, 2: 1.2, 4: 2.4}, max_batch=4)
    assert engine.backlog_s == 0
    for i in range(3):
        engine.submit(ask(pipes["sd3"], str(i)))
    assert engine.backlog_s == pytest.approx(12 * 1.2 / 2)
    assert engine.profiled_s(2) == 1.2


def test_a_cancelled_walk_leaves_at_the_boundary_with_what_it_reached(pipes):
    pipe = pipes["sd3"]
    engine, walk, seen = engine_of(pipe), ask(pipe, "a"), []
    walk.on_step = lambda done, sigma, x: seen.append(x.clone())
    engine.submit(walk)
    engine.submit(ask(pipe, "b", seed=1))
    engine.step()
    engine.step()
    assert engine.cancel("a")
    assert not engine.cancel("a")
    assert engine.load.running == 1
    [ended] = engine.step()
    assert isinstance(ended.error, Cancelled)
    assert "2 of 4 steps" in str(ended.error)
    assert torch.equal(ended.latent, seen[-1])
    assert len(seen) == 2
    end = drained(engine)["b"].latent
    assert off(end, alone(pipe, ask(pipe, "b", seed=1))) < 1e-4
    assert off(drained(engine_of(pipe), walk)["a"].latent, alone(pipe, ask(pipe, "a"))) < 1e-4  # it may go on


def test_a_deadline_is_honoured_at_the_boundary_waiting_or_walking(pipes, clock):
    pipe = pipes["sd3"]
    denoiser = Watched(pipe.family.denoiser("large"), before=clock.tick)
    walks = [ask(pipe, str(i), steps=20, last=20, deadline=3.5 + i / 10) for i in range(3)]
    ended = drained(engine_of(pipe, max_batch=2, denoiser=denoiser), *walks, ask(pipe, "patient", last=1))
    assert all(isinstance(ended[str(i)].error, DeadlinePassed) for i in range(3))
    assert [walk.done for walk in walks] == [4, 4, 0]
    assert "the deadline passed after 4 of 20 steps" in str(ended["0"].error)
    assert ended["patient"].error is None
    assert denoiser.batches == [2, 2, 2, 2, 1]


def test_a_non_finite_latent_ends_its_own_walk_only(pipes):
    for name in ARCHITECTURES:
        pipe = pipes[name]
        sick = ask(pipe, "sick", seed=1)
        embeds = sick.conditioning.prompt_embeds.clone()
        embeds[0, 0, 0] = math.nan
        sick.conditioning = replace(sick.conditioning, prompt_embeds=embeds)
        healthy = ask(pipe, "healthy")
        reference = alone(pipe, healthy)
        ended = drained(engine_of(pipe), sick, healthy)
        assert isinstance(ended["sick"].error, NonFiniteLatent)
        assert "large made a non-finite latent in step 1 of 4" in str(ended["sick"].error)
        assert ended["sick"].latent is None
        assert off(ended["healthy"].latent, reference) < 1e-4


def more_than(most):
    """Really ask for memory that is not there."""
    return lambda x: torch.empty(1 << 60) if len(x) > most else None


def test_out_of_memory_halves_the_bound_and_takes_the_step_again(pipes):
    pipe = pipes["sdxl"]
    denoiser = Watched(pipe.family.denoiser("large"), before=more_than(2))
    walks = [ask(pipe, str(i), last=2 + i % 2, seed=i, arrived=float(i)) for i in range(8)]
    references = [alone(pipe, walk) for walk in walks]
    engine = engine_of(pipe, denoiser=denoiser)
    ended = drained(engine, *walks)
    assert denoiser.batches[:4] == [8, 4, 2, 2]
    assert max(denoiser.batches[2:]) == 2
    assert engine.load.batch_bound == 2
    for i, reference in enumerate(references):
        assert ended[str(i)].error is None
        assert off(ended[str(i)].latent, reference) < 1e-4


def test_out_of_memory_on_one_image_fails_that_walk_with_a_clear_error(pipes):
    pipe = pipes["sd3"]
    engine = engine_of(pipe, denoiser=Watched(pipe.family.denoiser("large"), before=more_than(0)))
    ended = drained(engine, ask(pipe, "a"))
    assert isinstance(ended["a"].error, StepFailed)
    assert "large ran out of memory on one latent of 4x16x16 after 0 of 4 steps" in str(ended["a"].error)
    assert torch.equal(ended["a"].latent, ask(pipe, "a").latent)


def test_after_many_steps_the_bound_is_dared_again(pipes, monkeypatch):
    monkeypatch.setattr("relay.engine.BOUND_GROWS_AFTER", 3)
    pipe = pipes["sd3"]
    denoiser = Watched(pipe.family.denoiser("large"), before=more_than(1))
    engine = engine_of(pipe, max_batch=2, denoiser=denoiser)
    engine.submit(ask(pipe, "a"))
    engine.submit(ask(pipe, "b"))
    engine.step()
    assert engine.load.batch_bound == 1
    denoiser.before = lambda x: None
    drained(engine)
    assert engine.load.batch_bound == 2
    assert denoiser.batches == [2, 1, 1, 1, 2, 1, 1, 1]


def test_an_error_of_the_member_or_of_a_callback_ends_walks_and_not_the_engine(pipes):
    pipe = pipes["sd3"]
    engine = engine_of(pipe)
    misfit = ask(pipe, "misfit")
    cond = misfit.conditioning
    misfit.conditioning = Conditioning(**{k: v[..., :-1] for k, v in cond.tensors().items()})
    careless = ask(pipe, "careless", on_step=lambda done, sigma, x: [][done])
    ended = drained(engine, misfit, careless, ask(pipe, "fine"))
    assert "large failed after 0 of 4 steps: RuntimeError" in str(ended["misfit"].error)
    assert "IndexError" in str(ended["careless"].error)
    assert ended["fine"].error is None


def test_what_cannot_be_walked_is_refused_at_once(pipes):
    pipe = pipes["sd3"]
    engine = engine_of(pipe)
    engine.submit(ask(pipe, "twice"))
    good = ask(pipe, "good")
    changes = {
        "already held": {"id": "twice"},
        "at least two sigmas": {"sigmas": good.sigmas[:1]},
        "each below the one before": {"sigmas": good.sigmas[::-1]},
        "one image": {"latent": good.latent.repeat(2, 1, 1, 1)},
        "non-finite": {"latent": good.latent * math.nan},
        "negative embeddings": {"conditioning": ask(pipe, "", guidance=1.0).conditioning},
    }
    for reason, change in changes.items():
        walk = ask(pipe, "bad")
        vars(walk).update(change)
        with pytest.raises(BadRequest, match=reason):
            engine.submit(walk)
    assert engine.load.queued == 1
    for bad in ((0, 1), (1, -1)):
        with pytest.raises(BadRequest, match="at least one walk"):
            StepEngine(pipe.family.denoiser("large"), "large", None, *bad)
