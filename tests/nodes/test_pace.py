"""Pace: a slow machine out of a fast one, as the step engine sees it. The clock is moved by hand."""

import time

import pytest
import torch

from nodes.pace import Paced
from relay.engine import StepEngine, Walk

CURVE = {1: 0.04, 4: 0.04}  # seconds of a guided step, pace included: a batch of four costs what one image does


class Clock:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


class Machine:
    """A real member on a machine whose steps take `seconds` of the clock by batch size."""

    def __init__(self, denoiser, clock, seconds):
        self.denoiser, self.clock, self.seconds = denoiser, clock, seconds
        self.device, self.dtype = denoiser.device, denoiser.dtype

    def __call__(self, x, *rest):
        self.clock.now += self.seconds[len(x)]
        return self.denoiser(x, *rest)


@pytest.fixture
def walk(pipes):
    """walk(number, steps): one of the large member's, guided as its family says."""
    family = pipes["sd3"].family
    size = family.spec.sizes.default
    cond = family.text.encode(["a red circle"], None, True, size)
    noise = family.initial_noise(1, size, torch.Generator().manual_seed(0))

    def made(number, steps, guidance=3.0):
        sigmas = family.schedules(size)["large"](steps).sigmas
        return Walk(id=str(number), latent=noise, sigmas=sigmas, conditioning=cond, guidance=guidance)

    return made


def test_a_step_takes_what_the_paced_curve_says_and_draws_the_same(pipes, clock, walk):
    member, one = pipes["sd3"].family.denoiser("large"), walk(0, 4)
    paced = Paced(Machine(member, clock, dict.fromkeys(range(1, 5), 0.01)), {1: 0.04, 2: 0.06}, 4)
    for batch, guidance, seconds in (
        (1, 3.0, 0.04),
        (2, 3.0, 0.06),
        (4, 1.0, 0.06),
        (2, torch.tensor([1.0, 3.0]), 0.06),
    ):
        x, sigma = one.latent.expand(batch, -1, -1, -1), torch.full((batch,), one.sigmas[0])
        many, began = one.conditioning.select([0] * batch), clock.now
        with torch.inference_mode():
            denoised = paced(x, sigma, many, guidance)
            assert clock.now - began == pytest.approx(seconds)
            assert torch.equal(denoised, member(x, sigma, many, guidance))


def test_what_takes_longer_than_its_pace_is_not_held(pipes, clock, walk):
    one = walk(0, 4)
    paced = Paced(Machine(pipes["sd3"].family.denoiser("large"), clock, {1: 0.5}), CURVE, 4)
    with torch.inference_mode():
        paced(one.latent, torch.full((1,), one.sigmas[0]), one.conditioning, 3.0)
    assert clock.now == 0.5


def test_the_engine_chooses_its_batch_by_the_paced_machine(pipes, clock, walk):
    """Here a batch of four gains nothing, for another process is busy; yet it is no slower than its pace, so it is worth it."""
    machine = Machine(pipes["sd3"].family.denoiser("large"), clock, {1: 0.01, 2: 0.02, 3: 0.03, 4: 0.04})
    engine = StepEngine(Paced(machine, CURVE, 4), "large", CURVE, max_batch=4, max_queue=4)
    for number in range(4):
        engine.submit(walk(number, 150))
    batches = []
    for _ in range(140):
        engine.step()
        batches.append(engine.load.batch)
    assert batches == [4] * 128 + [2] * 3 + [4] * 9  # it tries another size now and then
    assert clock.now == pytest.approx(140 * 0.04)
