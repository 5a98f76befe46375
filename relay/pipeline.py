"""`RelayPipeline`: a relay in the shape that diffusers' users have in their fingers.

`__call__` is the whole story: encode, draw noise, let each leg walk, hand the latent over between legs, decode. The
handoff between two legs goes through its real bytes, so a run in one process is what a run over a wire is. Knows no
socket; two hosts use `start` and `finish`.
"""

from __future__ import annotations

import inspect
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from relay import matching as sigma_matching
from relay.conditioning import Conditioning, prompt_digest
from relay.deviation import IntensityTrace, deviation
from relay.errors import BadRequest
from relay.family import Family, FamilySpec, Role
from relay.handoff import Handoff, accept
from relay.program import CODECS, CONDITIONING_MODES, MATCHINGS, Program, check_choice
from relay.sampling import OnStep, walk_leg

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODES = ("full-cloud", "relay", "edge-only")
MAX_STEPS, MAX_IMAGES = 1000, 1000

Callback = Callable[["RelayPipeline", int, Any, dict[str, Any]], dict[str, Any] | None]


@dataclass
class RelayOutput:
    """What a call made, and how."""

    images: Any  # list of PIL images, or an array or tensor, as `output_type` says
    program: Program
    prompts: list[str]
    seeds: list[int | None]  # None where no seed alone gives the noise: given latents, one generator for a batch, ...
    timings: dict[str, float]  # seconds: encode, denoise[leg] MEMBER, handoff, decode
    handoff_bytes: int = 0
    negative_prompts: list[str] | None = None
    deviation: dict[str, Any] | None = None

    @property
    def steps(self) -> dict[str, int]:
        """Steps that each member really took."""
        return self.program.steps

    def only(self, i: int) -> RelayOutput:
        """The output of image i alone (its timings are the batch's)."""
        negative = None if self.negative_prompts is None else self.negative_prompts[i : i + 1]
        prompts, seeds = self.prompts[i : i + 1], self.seeds[i : i + 1]
        return replace(self, images=self.images[i : i + 1], prompts=prompts, seeds=seeds, negative_prompts=negative)


@dataclass
class _Job:
    """One call, checked: what every image of the batch shares and what is its own."""

    program: Program
    prompts: list[str]
    negatives: list[str] | None
    size: tuple[int, int]  # width, height
    seeds: list[int | None] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    handoff_bytes: int = 0
    deviation: dict[str, Any] | None = None

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


class RelayPipeline:
    """Members of one family in one process. Weights load on first use, and only those that a program needs."""

    def __init__(self, family: Family):
        self.family = family
        self.num_timesteps = 0  # steps of the call under way, for progress bars

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | FamilySpec,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        role: Role = "all",
    ) -> RelayPipeline:
        """A family by name, by the path of its YAML or diffusers folder. FamilyError where it cannot be had."""
        return cls(Family.load(name_or_path, role, torch_dtype, device))

    @property
    def dtype(self) -> str:
        """The members' dtype: fp32, fp16 or bf16."""
        return self.family.dtype(next(iter(self.family.spec.members.values())))

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        deviation: bool = False,
        **plan: Any,
    ) -> RelayOutput:
        """Pictures of prompts; `plan` is what `RelayPipeline.plan` takes (handoff, num_inference_steps, program, ...).

        Noise comes from `latents` (unit noise, (B, C, h, w)), from `generator` (one draws the whole batch, a list one
        image each, as in diffusers) or from `seed`, where image i of each prompt uses seed + i. `deviation=True` also
        measures the latent-intensity deviation of a relay, at the cost of one more run. BadRequest, before any weights
        load, on whatever cannot be done.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        job = self._job(prompt, negative_prompt, num_images_per_prompt, plan)
        if deviation and job.program.mode != "relay":
            raise BadRequest(f"deviation compares the legs of a relay; this program is {job.program.mode}")
        noise = self._noise(job, num_images_per_prompt, generator, seed, latents)
        on_step = self._stepper(job, callback_on_step_end)

        cond = self._encode(job)
        latent, sigmas = self._walk(job, 0, noise, cond, None, on_step)
        for k in range(1, len(job.program.legs)):
            received = self._over_the_wire(job, self._pack(job, k, latent, sigmas, cond))
            if deviation:
                reference = self._reference(job, k, received, cond)
            latent, sigmas = self._walk(job, k, received.latent, cond, received, on_step, trace := IntensityTrace())
            if deviation:
                job.deviation = _deviation(trace, reference)
        return self._output(job, latent, output_type)

    @torch.inference_mode()
    def start(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        callback_on_step_end: Callback | None = None,
        **plan: Any,
    ) -> Handoff:
        """Walk the first leg and stop: what `finish` goes on from, on this host or another."""
        job = self._job(prompt, negative_prompt, num_images_per_prompt, plan)
        if len(job.program.legs) == 1:
            raise BadRequest(f"{job.program.mode} has one leg and hands nothing over: choose a handoff between 0 and T")
        noise = self._noise(job, num_images_per_prompt, generator, seed, None)
        cond = self._encode(job)
        latent, sigmas = self._walk(job, 0, noise, cond, None, self._stepper(job, callback_on_step_end))
        return self._pack(job, 1, latent, sigmas, cond)

    @torch.inference_mode()
    def finish(
        self, handoff: Handoff, *, output_type: str = "pil", callback_on_step_end: Callback | None = None
    ) -> RelayOutput:
        """Check a handoff against this family, walk the legs that are left, decode. HandoffRefused if it is foreign."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        program = accept(handoff, self.family)
        size = (handoff.width, handoff.height)
        self.family.check_size(*size)
        job = _Job(program, list(handoff.prompts), handoff.negative_prompts, size, list(handoff.seeds))
        self._check_prompts(job)
        on_step = self._stepper(job, callback_on_step_end, handoff.leg_index)
        cond = handoff.conditioning or self._encode(job)
        received = handoff if handoff.received else self._over_the_wire(job, handoff)
        latent, sigmas = received.latent, received.sigmas_walked
        for k in range(handoff.leg_index, len(program.legs)):
            if k > handoff.leg_index:
                received = self._over_the_wire(job, self._pack(job, k, latent, sigmas, cond))
            latent, sigmas = self._walk(job, k, received.latent, cond, received, on_step)
        return self._output(job, latent, output_type)

    def plan(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        handoff: int | None = None,
        mode: str | None = None,
        small_steps: int | None = None,
        small_schedule_steps: int | None = None,
        matching: str | None = None,
        guidance_scale: float | tuple[float, float] | None = None,
        codec: str | None = None,
        conditioning: str | None = None,
        program: Program | str | None = None,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Program:
        """The program that a call with these words would run, without loading any weights.

        `handoff` is how many of the `num_inference_steps` steps the large member takes (default: half of them);
        `small_steps` how many the small one takes; `small_schedule_steps` the length of its schedule. `guidance_scale`
        is one value or (large, small). BadRequest on whatever contradicts itself or cannot be done.
        """
        if prompts is not None:
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            negatives = [] if negative_prompt is None else negative_prompt
            self._check_texts(texts, [negatives] if isinstance(negatives, str) else list(negatives))
        spec = self.family.spec
        schedules = self.family.schedules(self._size(width, height))
        if program is not None:
            fixed = {
                "num_inference_steps": num_inference_steps, "handoff": handoff, "mode": mode, "small_steps": small_steps,
                "small_schedule_steps": small_schedule_steps, "matching": matching, "guidance_scale": guidance_scale,
                "codec": codec, "conditioning": conditioning,
            }  # fmt: skip
            if said := [name for name, value in fixed.items() if value is not None]:
                raise BadRequest(f"a program fixes {', '.join(said)}: give the program alone, or leave it out")
            return self._checked_program(program, schedules)
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
            guidance=self._guidance(guidance_scale),
            small_steps=small_steps,
            small_schedule_steps=small_schedule_steps,
            **chosen,  # type: ignore[arg-type]
        )

    # --- checks: all before any weights load ---

    def _job(self, prompt: Any, negative: Any, count: int, plan: dict[str, Any]) -> _Job:
        known = set(inspect.signature(RelayPipeline.plan).parameters) - {"self", "prompts", "negative_prompt"}
        if unknown := plan.keys() - known:
            raise BadRequest(f"unknown argument {', '.join(sorted(unknown))}: known are {', '.join(sorted(known))}")
        prompts = [prompt] if isinstance(prompt, str) else _listed("the prompt is text", prompt)
        _whole("num_images_per_prompt", count, 1, MAX_IMAGES)
        if isinstance(negative, str) or negative is None:
            negatives = None if negative is None else [negative] * len(prompts)
        else:
            negatives = _listed("the negative prompt is text", negative)
            if len(negatives) != len(prompts):
                raise BadRequest(f"{len(prompts)} prompts need as many negative prompts, not {len(negatives)}")
        program = self.plan(prompts, negative_prompt=negatives, **plan)

        def each(texts: list[str]) -> list[str]:
            return [text for text in texts for _ in range(count)]

        size = self._size(plan.get("width"), plan.get("height"))
        job = _Job(program, each(prompts), None if negatives is None else each(negatives), size)
        if negatives is not None and not job.guided:
            raise BadRequest("a negative prompt does nothing without guidance: ask for a guidance above 1")
        if len({leg.member for leg in program.legs}) > 1:
            self.family.members_share_latent_space()
        return job

    def _check_prompts(self, job: _Job) -> None:
        self._check_texts(job.prompts, job.negatives or [])

    def _check_texts(self, prompts: list[str], negatives: list[str]) -> None:
        if not prompts:
            raise BadRequest("there is no prompt; say what the picture shall show")
        for text in [*prompts, *negatives]:
            if not isinstance(text, str):
                raise BadRequest(f"a prompt is text, not {type(text).__name__}")
        if any(not text.strip() for text in prompts):
            raise BadRequest("the prompt is empty; say what the picture shall show")
        if self.family.spec.scenes:
            from relay.scenes.language import parse

            for text in [*prompts, *filter(str.strip, negatives)]:
                parse(text)

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        default = self.family.spec.sizes.default
        size = (default[0] if width is None else width, default[1] if height is None else height)
        for name, value in zip(("width", "height"), size, strict=True):
            _whole(name, value, 1, 16384)
        self.family.check_size(*size)
        return size

    def _guidance(self, scale: Any) -> dict[str, float]:
        members = self.family.spec.members
        if scale is None:
            return {name: member.guidance for name, member in members.items()}
        values = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values)
        if len(values) != 2 or not numbers:
            raise BadRequest(f"guidance_scale {scale!r} is not a number of at least 0, or two of them: (large, small)")
        large, small = map(float, values)
        return {name: small if name == "small" else large for name in members}

    def _checked_program(self, program: Program | str, schedules: Any) -> Program:
        program = Program.parse(program) if isinstance(program, str) else program
        if program.family != self.family.name:
            raise BadRequest(f"the program is for family {program.family}, but this is {self.family.name}")
        sigma_matching.walk(program, schedules)
        return program

    # --- stages ---

    def _noise(
        self, job: _Job, count: int, generator: Any, seed: int | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Noise of the whole batch at the first leg's first sigma; sets the job's seeds."""
        given = [
            name
            for name, value in (("generator", generator), ("seed", seed), ("latents", latents))
            if value is not None
        ]
        if len(given) > 1:
            raise BadRequest(f"noise comes from one source: give {' or '.join(given)}")
        images = len(job.prompts)
        if latents is not None:
            shape = (images, self.family.channels, job.size[1] // self.family.factor, job.size[0] // self.family.factor)
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
            unit = self.family.initial_noise(images, job.size, generator)
        first_leg = job.program.legs[0]
        schedule = self.family.schedules(job.size)[first_leg.member](first_leg.steps_total)
        if first_leg.first:
            raise BadRequest(f"a program starts from noise: its first leg {first_leg} must start at index 0")
        return unit * schedule.init_noise_sigma

    def _encode(self, job: _Job) -> Conditioning:
        with job.timed("encode"):
            return self.family.text.encode(job.prompts, job.negatives, job.guided, job.size)

    def _walk(
        self,
        job: _Job,
        k: int,
        latent: torch.Tensor,
        cond: Conditioning,
        received: Handoff | None,
        on_step: Callable[[int, list[float]], OnStep],
        trace: IntensityTrace | None = None,
    ) -> tuple[torch.Tensor, list[float]]:
        """Leg k from noise (`received` None) or from a handoff; the receiver does the sigma matching."""
        leg = job.program.legs[k]
        sigmas = self._leg_sigmas(job, k, received)
        done = received.index if received is not None and received.under_way else 0
        denoiser = self.family.denoiser(leg.member)
        report = on_step(k, sigmas[done:])

        def each(i: int, sigma: float, x: torch.Tensor) -> torch.Tensor | None:
            if trace:
                trace.record(i, sigma, x)
            return report(i, sigma, x)

        with job.timed(f"denoise[{k}] {leg.member}"):
            latent = walk_leg(
                denoiser, latent, sigmas[done:], cond, job.program.guidance[k], member=leg.member, on_step=each
            )
        return latent, sigmas

    def _leg_sigmas(self, job: _Job, k: int, received: Handoff | None) -> list[float]:
        schedules = self.family.schedules(job.size)
        if received is None:
            return sigma_matching.leg_sigmas(job.program, k, schedules, None)
        if received.under_way:  # a checkpoint inside leg k: the sender's own list goes on
            return received.sigmas_walked
        return sigma_matching.leg_sigmas(job.program, k, schedules, received.sigma, job.program.legs[k - 1].last)

    def _reference(self, job: _Job, k: int, received: Handoff, cond: Conditioning) -> IntensityTrace:
        """The large member going on from the very latent, over the very sigmas, that the small one is given."""
        trace = IntensityTrace()
        walk_leg(
            self.family.denoiser("large"), received.latent, self._leg_sigmas(job, k, received), cond,
            job.program.guidance[k - 1], member="large", on_step=trace.record,
        )  # fmt: skip
        return trace

    def _pack(self, job: _Job, k: int, latent: torch.Tensor, sigmas: list[float], cond: Conditioning) -> Handoff:
        ship = job.program.conditioning == "ship"
        return Handoff(
            program=str(job.program),
            leg_index=k,
            latent=latent.cpu(),
            sigmas_walked=list(sigmas),
            index=len(sigmas) - 1,
            fingerprint=self.family.fingerprint,
            codec=job.program.codec,
            prompts=job.prompts,
            width=job.size[0],
            height=job.size[1],
            negative_prompts=job.negatives,
            seeds=job.seeds,
            conditioning=cond if ship else None,
            conditioning_digest=cond.digest() if ship else prompt_digest(job.prompts, job.negatives),
            conditioning_fingerprint=self.family.conditioning_fingerprint if ship else None,
        )

    def _over_the_wire(self, job: _Job, handoff: Handoff) -> Handoff:
        with job.timed("handoff"):
            data = handoff.to_bytes()
            job.handoff_bytes += len(data)
            return Handoff.from_bytes(data)

    def _stepper(
        self, job: _Job, callback: Callback | None, first_leg: int = 0
    ) -> Callable[[int, list[float]], OnStep]:
        """For each leg a function that tells the callback of its steps, counted over all legs of this call."""
        legs = job.program.legs
        self.num_timesteps = sum(leg.steps for leg in legs[first_leg:])

        def for_leg(k: int, sigmas: list[float]) -> OnStep:
            before = sum(leg.steps for leg in legs[first_leg:k])

            def report(i: int, _: float, x: torch.Tensor) -> torch.Tensor | None:
                if callback is None:
                    return None
                changed = callback(self, before + i, sigmas[i], {"latents": x})
                return (changed or {}).get("latents", x)

            return report

        return for_leg

    def _output(self, job: _Job, latent: torch.Tensor, output_type: str) -> RelayOutput:
        with job.timed("decode"):
            images = latent if output_type == "latent" else _as(self.family.decode(latent), output_type)
        self.family.free()
        return RelayOutput(
            images=images,
            program=job.program,
            prompts=job.prompts,
            seeds=job.seeds,
            timings=job.timings,
            handoff_bytes=job.handoff_bytes,
            negative_prompts=job.negatives,
            deviation=job.deviation,
        )


def _deviation(trace: IntensityTrace, reference: IntensityTrace) -> dict[str, Any]:
    return deviation(trace.intensities, reference.intensities)


def _as(images: torch.Tensor, output_type: str) -> Any:
    """Images (B, 3, H, W) in 0..1 as "pt", "np" (B, H, W, 3) or "pil"."""
    if output_type == "pt":
        return images
    from diffusers.image_processor import VaeImageProcessor

    array = VaeImageProcessor.pt_to_numpy(images)
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)


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
