"""What was asked of a pipeline: checked before any weights load, then one prompt, one seed and one noise an image.

Everything that a caller can get wrong is refused here, in one line that names it.
"""

from __future__ import annotations

import inspect
import math
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from relay import matching as sigma_matching
from relay.errors import BadRequest
from relay.family import Family
from relay.program import CODECS, CONDITIONING_MODES, MATCHINGS, Program, check_choice

MODES = ("full-cloud", "relay", "edge-only")
MAX_STEPS, MAX_IMAGES = 1000, 1000


@dataclass
class Job:
    """One call, checked: what every image of the batch shares and what is its own."""

    program: Program
    prompts: list[str]
    negatives: list[str] | None
    size: tuple[int, int]  # width, height
    seeds: list[int | None] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    handoff_bytes: int = 0
    deviation: dict[str, Any] | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)  # of each image what it began from; empty: from noise

    @property
    def skipped(self) -> int:
        """Steps of the first leg that a cached start spared."""
        return self.starts[0]["skipped"] if self.starts else 0

    @property
    def guided(self) -> bool:
        return any(value > 1 for value in self.program.guidance)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds a stage's seconds, with what the accelerator still had to do."""
        _synchronize()
        started = time.perf_counter()
        yield
        _synchronize()
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started


def make_job(family: Family, prompt: Any, negative: Any, count: int, plan: dict[str, Any]) -> Job:
    """What was asked, checked and multiplied out to one prompt an image. BadRequest before any weights load."""
    if unknown := plan.keys() - PLAN_WORDS:
        raise BadRequest(f"unknown argument {', '.join(sorted(unknown))}: known are {', '.join(sorted(PLAN_WORDS))}")
    prompts = [prompt] if isinstance(prompt, str) else _listed("the prompt is text", prompt)
    _whole("num_images_per_prompt", count, 1, MAX_IMAGES)
    if isinstance(negative, str) or negative is None:
        negatives = None if negative is None else [negative] * len(prompts)
    else:
        negatives = _listed("the negative prompt is text", negative)
        if len(negatives) != len(prompts):
            raise BadRequest(f"{len(prompts)} prompts need as many negative prompts, not {len(negatives)}")
    program = plan_program(family, prompts, negatives, **plan)

    def each(texts: list[str]) -> list[str]:
        return [text for text in texts for _ in range(count)]

    size = image_size(family, plan.get("width"), plan.get("height"))
    job = Job(program, each(prompts), None if negatives is None else each(negatives), size)
    if negatives is not None and not job.guided:
        raise BadRequest("a negative prompt does nothing without guidance: ask for a guidance above 1")
    if len({leg.member for leg in program.legs}) > 1:
        family.members_share_latent_space()
    return job


def check_texts(family: Family, prompts: list[str], negatives: list[str]) -> None:
    """Refuse what is no text, empty, or outside the scene language of a family that draws scenes."""
    if not prompts:
        raise BadRequest("there is no prompt; say what the picture shall show")
    for text in [*prompts, *negatives]:
        if not isinstance(text, str):
            raise BadRequest(f"a prompt is text, not {type(text).__name__}")
    if any(not text.strip() for text in prompts):
        raise BadRequest("the prompt is empty; say what the picture shall show")
    if family.spec.scenes:
        from relay.scenes.language import parse

        for text in [*prompts, *filter(str.strip, negatives)]:
            parse(text)


def image_size(family: Family, width: int | None, height: int | None) -> tuple[int, int]:
    """(width, height), the family's default where unsaid; refused where the VAE cannot do it."""
    default = family.spec.sizes.default
    size = (default[0] if width is None else width, default[1] if height is None else height)
    for name, value in zip(("width", "height"), size, strict=True):
        _whole(name, value, 1, 16384)
    family.check_size(*size)
    return size


def _guidance(family: Family, scale: Any) -> dict[str, float]:
    members = family.spec.members
    if scale is None:
        return {name: member.guidance for name, member in members.items()}
    values = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values)
    if len(values) != 2 or not numbers:
        raise BadRequest(f"guidance_scale {scale!r} is not a number of at least 0, or two of them: (large, small)")
    large, small = map(float, values)
    return {name: small if name == "small" else large for name in members}


def _checked_program(family: Family, program: Program | str, schedules: Any) -> Program:
    program = Program.parse(program) if isinstance(program, str) else program
    if program.family != family.name:
        raise BadRequest(f"the program is for family {program.family}, but this is {family.name}")
    sigma_matching.walk(program, schedules)
    return program


def plan_program(
    family: Family,
    prompts: Any,
    negative_prompt: Any,
    *,
    num_inference_steps: int | None = None,
    handoff: int | None = None,
    mode: str | None = None,
    small_steps: int | None = None,
    small_schedule_steps: int | None = None,
    matching: str | None = None,
    guidance_scale: Any = None,
    codec: str | None = None,
    conditioning: str | None = None,
    program: Program | str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> Program:
    """See `RelayPipeline.plan`."""
    if prompts is not None:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [] if negative_prompt is None else negative_prompt
        check_texts(family, texts, [negatives] if isinstance(negatives, str) else list(negatives))
    spec = family.spec
    schedules = family.schedules(image_size(family, width, height))
    if program is not None:
        fixed = {
            "num_inference_steps": num_inference_steps, "handoff": handoff, "mode": mode, "small_steps": small_steps,
            "small_schedule_steps": small_schedule_steps, "matching": matching, "guidance_scale": guidance_scale,
            "codec": codec, "conditioning": conditioning,
        }  # fmt: skip
        if said := [name for name, value in fixed.items() if value is not None]:
            raise BadRequest(f"a program fixes {', '.join(said)}: give the program alone, or leave it out")
        return _checked_program(family, program, schedules)
    steps = _whole("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    steps = spec.members["large"].steps if steps is None else steps
    handoff = _handoff(mode, _whole("handoff", handoff, 0, MAX_STEPS), steps)
    _whole("small_steps", small_steps, 1, MAX_STEPS)
    _whole("small_schedule_steps", small_schedule_steps, 1, MAX_STEPS)
    chosen = {
        "matching": matching or spec.matching,
        "codec": codec or spec.codec,
        "conditioning": conditioning or "encode",
    }
    for (what, value), choices in zip(chosen.items(), (MATCHINGS, CODECS, CONDITIONING_MODES), strict=True):
        check_choice(what, value, choices)
    return sigma_matching.plan(
        spec.name,
        schedules,
        steps=steps,
        handoff=handoff,
        guidance=_guidance(family, guidance_scale),
        small_steps=small_steps,
        small_schedule_steps=small_schedule_steps,
        **chosen,  # type: ignore[arg-type]
    )


# The words of `RelayPipeline.plan`, which calls take too.
PLAN_WORDS = frozenset(inspect.signature(plan_program).parameters) - {"family", "prompts", "negative_prompt"}


def draw_noise(
    family: Family, job: Job, count: int, generator: Any, seed: int | None, latents: torch.Tensor | None
) -> torch.Tensor:
    """Noise of the whole batch at the first leg's first sigma; sets the job's seeds."""
    given = [
        name for name, value in (("generator", generator), ("seed", seed), ("latents", latents)) if value is not None
    ]
    if len(given) > 1:
        raise BadRequest(f"noise comes from one source: give {' or '.join(given)}")
    images = len(job.prompts)
    if latents is not None:
        shape = (images, family.channels, job.size[1] // family.factor, job.size[0] // family.factor)
        if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
            shown = tuple(getattr(latents, "shape", ()))
            raise BadRequest(f"latents of shape {shown}, expected a tensor of shape {shape}")
        if not torch.isfinite(latents).all():
            raise BadRequest("latents hold non-finite values")
        unit, job.seeds = latents.float(), [None] * images
    else:
        if generator is None:
            first = secrets.randbelow(2**31) if seed is None else _whole("seed", seed, 0, 2**63 - 1 - images)
            numbers = [first + i % count for i in range(images)]
            generator, job.seeds = [torch.Generator().manual_seed(n) for n in numbers], list(numbers)
        elif isinstance(generator, torch.Generator):
            job.seeds = [_fresh_seed(generator)] if images == 1 else [None] * images
        else:
            generator = _listed("generator takes a torch.Generator", generator)
            if not all(isinstance(each, torch.Generator) for each in generator):
                raise BadRequest("generator takes one torch.Generator, or a list of them")
            if len(generator) != images:
                raise BadRequest(f"{images} images need one generator or as many, not {len(generator)}")
            job.seeds = [_fresh_seed(g) for g in generator]
        unit = family.initial_noise(images, job.size, generator)
    first_leg = job.program.legs[0]
    schedule = family.schedules(job.size)[first_leg.member](first_leg.steps_total)
    if first_leg.first:
        raise BadRequest(f"a program starts from noise: its first leg {first_leg} must start at index 0")
    return unit * schedule.init_noise_sigma


def _handoff(mode: str | None, handoff: int | None, steps: int) -> int:
    """The handoff step that mode and handoff ask for together."""
    if mode is not None:
        check_choice("mode", mode, MODES)
    implied = {"full-cloud": steps, "edge-only": 0}.get(mode or "")
    if implied is not None:
        if handoff not in (None, implied):
            raise BadRequest(f"{mode} of {steps} steps means handoff {implied}, not {handoff}")
        return implied
    if handoff is None:
        handoff = (steps + 1) // 2
    if not 0 <= handoff <= steps:
        raise BadRequest(f"handoff must lie between 0 and the {steps} steps, not at {handoff}")
    if mode == "relay" and handoff in (0, steps):
        raise BadRequest(f"a relay of {steps} steps hands over between 1 and {steps - 1}, not at {handoff}")
    return handoff


def _whole(name: str, value: Any, low: int, high: int) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise BadRequest(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return value


def _listed(what: str, value: Any) -> list[Any]:
    """`value` as a list; `what` says what else it might have been."""
    if not isinstance(value, Iterable):
        raise BadRequest(f"{what} or a list, not {type(value).__name__}")
    return list(value)


def _fresh_seed(generator: torch.Generator) -> int | None:
    """The seed that draws this generator's noise again, None where it has been drawn from or is no CPU generator."""
    seed = generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed).get_state()
    return seed if generator.device.type == "cpu" and torch.equal(fresh, generator.get_state()) else None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
