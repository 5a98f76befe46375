"""Sigma matching: where the next leg continues, and what each leg of a program walks.

For every matching the receiving leg walks [start] + own[first + 1 :] of its member's own schedule:

    direct    first is the sender's index, refused where own[first] is not sigma_s;  start = own[first]
    nearest   first = argmin |log own[i] - log sigma_s| (the search of RISE, arXiv 2606.17378);  start = own[first]
    exact     own[first + 1] is the first own sigma below sigma_s;                   start = sigma_s itself

With one member and one schedule on both sides all three walk the very suffix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from relay.errors import BadRequest, FamilyError
from relay.program import MATCHINGS, MAX_SCHEDULE, Codec, ConditioningMode, Leg, Matching, Program, check_choice
from relay.schedules import Schedule

ScheduleFor = Callable[[int], Schedule]  # steps -> schedule

SAME = 1e-6  # relative; two float32 sigmas this close are one sigma


def match(
    sigma_s: float, s_index: int, schedule_for: ScheduleFor, steps_total: int | None, n: int | None, matching: str
) -> tuple[int, int, list[float]]:
    """Where a leg that receives a latent at `sigma_s` (the sender's index `s_index`) continues.

    Give the receiver's schedule length `steps_total`, or `n`, the steps that shall remain, and the length is chosen;
    both are checked against each other. Returns (T, first, the sigmas walked). BadRequest where there is no answer.
    """
    check_choice("matching", matching, MATCHINGS)
    if steps_total is None:
        if n is None:
            raise BadRequest("sigma matching needs the receiver's schedule length or the number of steps that remain")
        steps_total = s_index + n if matching == "direct" else _length_for(sigma_s, schedule_for, n, matching)
    own = schedule_for(steps_total).sigmas
    first = _first(sigma_s, s_index, own, matching)
    if n is not None and steps_total - first != n:
        raise BadRequest(
            f"{matching} matching at sigma {sigma_s:.6g} leaves {steps_total - first} of {steps_total} steps, not {n}"
        )
    start = sigma_s if matching == "exact" else own[first]
    return steps_total, first, [start, *own[first + 1 :]]


def _first(sigma_s: float, s_index: int, own: tuple[float, ...], matching: str) -> int:
    """Index of the receiver's own schedule at which it takes over."""
    steps = len(own) - 1
    if matching == "nearest":
        return min(range(steps), key=lambda i: abs(math.log(own[i] / sigma_s)))
    if matching == "exact":
        first = sum(sigma >= sigma_s * (1 - SAME) for sigma in own) - 1
        if first < 0:
            raise BadRequest(
                f"sigma {sigma_s:.6g} lies above the receiver's first sigma {own[0]:.6g}: the schedules do not overlap;"
                f" hand over later or use nearest matching"
            )
        return first
    if s_index >= steps:
        raise BadRequest(f"direct matching at index {s_index} leaves nothing of the receiver's {steps} steps")
    if abs(own[s_index] - sigma_s) > SAME * sigma_s:
        raise BadRequest(
            f"direct matching needs one sigma on both sides, but index {s_index} is {sigma_s:.6g} for the sender and"
            f" {own[s_index]:.6g} for the receiver; use nearest or exact"
        )
    return s_index


def _length_for(sigma_s: float, schedule_for: ScheduleFor, n: int, matching: str) -> int:
    """The schedule length T' of which exactly `n` steps remain at sigma_s, its own sigma there closest to sigma_s.

    The n-th sigma from the end falls as the schedule grows finer, so a doubling search and a bisection find where it
    passes sigma_s; the lengths around that are compared.
    """
    if n < 1:
        raise BadRequest(f"at least one step must remain for the receiver, not {n}")

    def passed(steps: int) -> bool:
        for length in range(steps, steps + 4):  # diffusers' trailing spacing cannot make a few lengths, such as 61
            try:
                return schedule_for(length).sigmas[length - n] <= sigma_s * (1 + SAME)
            except BadRequest:
                continue
        return True  # longer than the scheduler can make

    def distance(steps: int) -> float:
        """In log sigma, infinite where another number of steps than n remains."""
        try:
            own = schedule_for(steps).sigmas
            first = _first(sigma_s, 0, own, matching)
        except BadRequest:
            return math.inf
        return abs(math.log(own[first] / sigma_s)) if steps - first == n else math.inf

    low = high = n
    while high < MAX_SCHEDULE and not passed(high):
        low, high = high + 1, min(2 * high, MAX_SCHEDULE)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passed(middle) else (middle + 1, high)
    best = min(range(max(n, low - 4), low + 5), key=distance)  # leading spacing rounds: look around
    if math.isinf(distance(best)):
        raise BadRequest(f"no schedule of up to {MAX_SCHEDULE} steps leaves {n} steps at sigma {sigma_s:.6g}")
    return best


def plan(
    family: str,
    schedules: Mapping[str, ScheduleFor],
    *,
    steps: int,
    handoff: int,
    guidance: Mapping[str, float],
    matching: Matching = "exact",
    codec: Codec = "fp16",
    conditioning: ConditioningMode = "encode",
    small_steps: int | None = None,
    small_schedule_steps: int | None = None,
) -> Program:
    """The program that takes `handoff` of the large member's `steps` steps and leaves the rest to the small one.

    handoff = steps is full-cloud, 0 is edge-only. `small_steps` is how many steps the small member takes;
    `small_schedule_steps` the length of its schedule (default: `steps`). BadRequest on what does not fit.
    """
    if not 0 <= handoff <= steps:
        raise BadRequest(f"handoff must lie between 0 and the {steps} steps, not at {handoff}")

    def program(*legs: Leg) -> Program:
        return Program(family, legs, matching, tuple(guidance[leg.member] for leg in legs), codec, conditioning)

    if handoff == steps:
        if small_steps:
            raise BadRequest(f"handoff {handoff} of {steps} is full-cloud and leaves no step to the small member")
        return program(Leg("large", steps, 0, steps))
    if handoff == 0:
        total = small_steps if small_steps is not None else small_schedule_steps or steps
        if small_schedule_steps not in (None, total):
            raise BadRequest(f"edge-only walks its whole schedule: {small_schedule_steps} steps, not {small_steps}")
        return program(Leg("small", total, 0, total))
    sender = schedules["large"](steps)
    if small_schedule_steps is None and (small_steps is None or matching == "direct"):
        small_schedule_steps = steps
    total, first, _ = match(
        sender.sigmas[handoff], handoff, schedules["small"], small_schedule_steps, small_steps, matching
    )
    return program(Leg("large", steps, 0, handoff), Leg("small", total, first, total))


def leg_sigmas(
    program: Program, k: int, schedules: Mapping[str, ScheduleFor], sigma_s: float | None, s_index: int = 0
) -> list[float]:
    """The steps + 1 sigmas that leg `k` walks, having received its latent at `sigma_s` (None: it starts from noise).

    BadRequest where the leg is not what the program's matching yields there.
    """
    leg = program.legs[k]
    if leg.member not in schedules:
        raise BadRequest(f"family {program.family} has no member {leg.member!r}: it has {', '.join(schedules)}")
    schedule_for = schedules[leg.member]
    if sigma_s is None:
        return list(schedule_for(leg.steps_total).sigmas[leg.first : leg.last + 1])
    _, first, sigmas = match(sigma_s, s_index, schedule_for, leg.steps_total, None, program.matching)
    if first != leg.first:
        raise BadRequest(
            f"{program.matching} matching at sigma {sigma_s:.6g} continues {leg.member}:{leg.steps_total} at index"
            f" {first}, not at {leg.first} as the program says"
        )
    return sigmas[: leg.steps + 1]


def walk(program: Program, schedules: Mapping[str, ScheduleFor]) -> list[tuple[Leg, list[float]]]:
    """Each leg with the sigmas it really walks. BadRequest where legs and matching disagree."""
    walked: list[tuple[Leg, list[float]]] = []
    sigma_s, s_index, kinds = None, 0, set()
    for k, leg in enumerate(program.legs):
        sigmas = leg_sigmas(program, k, schedules, sigma_s, s_index)
        kinds.add(schedules[leg.member](leg.steps_total).parameterisation)
        walked.append((leg, sigmas))
        sigma_s, s_index = sigmas[-1], leg.last
    if len(kinds) > 1:
        raise FamilyError(
            f"the members of {program.family} do not share a parameterisation: {', '.join(sorted(kinds))}"
        )
    return walked
