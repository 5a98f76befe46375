"""`RelayPipeline`: a relay in the shape that diffusers' users have in their fingers.

`__call__` is the whole story: encode, draw noise, let each leg walk, hand the latent over between legs, decode. The
handoff between two legs goes through its real bytes, so a run in one process is what a run over a wire is. Knows no
socket; two hosts use `start` and `finish`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from relay import matching as sigma_matching
from relay.cached import CachedStart, check_start, first_leg_space
from relay.conditioning import Conditioning, prompt_digest
from relay.deviation import IntensityTrace
from relay.deviation import deviation as compare_intensities
from relay.errors import BadRequest, HandoffRefused
from relay.family import Family, FamilySpec, Role
from relay.handoff import Handoff, accept
from relay.program import Program, check_choice
from relay.request import PLAN_WORDS, Job, check_texts, draw_noise, make_job, plan_program
from relay.sampling import OnStep, walk_leg

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

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
    starts: list[dict[str, Any]] = field(default_factory=list)  # of each image what it began from; empty: from noise
    kept: dict[int, list[CachedStart]] = field(
        default_factory=dict
    )  # step of the first leg -> each image's latent there

    @property
    def steps(self) -> dict[str, int]:
        """Steps that each member really took."""
        return self.program.taken(self.starts[0]["skipped"] if self.starts else 0)

    @property
    def denoising_s(self) -> dict[str, float]:
        """Seconds that each member took; `large` and `small` are always there."""
        seconds = {"large": 0.0, "small": 0.0}
        for stage, taken in self.timings.items():
            if stage.startswith("denoise["):
                member = stage.split()[-1]
                seconds[member] = seconds.get(member, 0.0) + taken
        return seconds

    def only(self, i: int) -> RelayOutput:
        """The output of image i alone (its timings are the batch's)."""
        negative = None if self.negative_prompts is None else self.negative_prompts[i : i + 1]
        prompts, seeds = self.prompts[i : i + 1], self.seeds[i : i + 1]
        kept = {step: latents[i : i + 1] for step, latents in self.kept.items()}
        return replace(
            self, images=self.images[i : i + 1], prompts=prompts, seeds=seeds, negative_prompts=negative,
            starts=self.starts[i : i + 1], kept=kept,
        )  # fmt: skip


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
        cached: CachedStart | Sequence[CachedStart] | None = None,
        keep: Sequence[int] = (),
        **plan: Any,
    ) -> RelayOutput:
        """Pictures of prompts; `plan` is what `RelayPipeline.plan` takes (handoff, num_inference_steps, program, ...).

        Noise comes from `latents` (unit noise, (B, C, h, w)), from `generator` (one draws the whole batch, a list one
        image each, as in diffusers) or from `seed`, where image i of each prompt uses seed + i. `deviation=True` also
        measures the latent-intensity deviation of a relay, at the cost of one more run. `cached` is what the first leg
        begins from in place of noise (one for all images, or one each, all with the same steps skipped); `keep` names
        steps of the first leg whose latents the output shall hold (`kept`). BadRequest, before any weights load, on
        whatever cannot be done, but for what is wrong with a cached latent: to tell that takes the text encoders and the VAE.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        job = make_job(self.family, prompt, negative_prompt, num_images_per_prompt, plan)
        if deviation and job.program.mode != "relay":
            raise BadRequest(f"deviation compares the legs of a relay; this program is {job.program.mode}")
        noise = draw_noise(self.family, job, num_images_per_prompt, generator, seed, latents)
        begun = self.begin(job, noise, cached)
        on_step, kept = self._stepper(job, callback_on_step_end), self._keeper(job, keep)

        cond = self.encode(job)
        latent, sigmas = self._walk(job, 0, begun, cond, None, on_step, keep=kept)
        for k in range(1, len(job.program.legs)):
            received = self.over_the_wire(job, self.pack(job, k, latent, sigmas, cond))
            if deviation:
                reference = self._reference(job, k, received, cond)
            latent, sigmas = self._walk(job, k, received.latent, cond, received, on_step, trace := IntensityTrace())
            if deviation:
                job.deviation = compare_intensities(trace.intensities, reference.intensities)
        return replace(self._output(job, latent, output_type), kept=kept)

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
        cached: CachedStart | Sequence[CachedStart] | None = None,
        **plan: Any,
    ) -> Handoff:
        """Walk the first leg and stop: what `finish` goes on from, on this host or another."""
        job = make_job(self.family, prompt, negative_prompt, num_images_per_prompt, plan)
        if len(job.program.legs) == 1:
            raise BadRequest(f"{job.program.mode} has one leg and hands nothing over: choose a handoff between 0 and T")
        noise = draw_noise(self.family, job, num_images_per_prompt, generator, seed, None)
        begun = self.begin(job, noise, cached)
        cond = self.encode(job)
        latent, sigmas = self._walk(job, 0, begun, cond, None, self._stepper(job, callback_on_step_end))
        return self.pack(job, 1, latent, sigmas, cond)

    @torch.inference_mode()
    def finish(
        self, handoff: Handoff, *, output_type: str = "pil", callback_on_step_end: Callback | None = None
    ) -> RelayOutput:
        """Check a handoff against this family, walk the legs that are left, decode. HandoffRefused if it is foreign."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        program = accept(handoff, self.family)
        size = (handoff.width, handoff.height)
        self.family.check_size(*size)
        job = Job(program, list(handoff.prompts), handoff.negative_prompts, size, list(handoff.seeds))
        job.starts = starts_of(handoff)
        check_texts(self.family, job.prompts, job.negatives or [])
        on_step = self._stepper(job, callback_on_step_end, handoff.leg_index)
        cond = handoff.conditioning or self.encode(job)
        received = handoff if handoff.received else self.over_the_wire(job, handoff)
        latent, sigmas = received.latent, received.sigmas_walked
        for k in range(handoff.leg_index, len(program.legs)):
            if k > handoff.leg_index:
                received = self.over_the_wire(job, self.pack(job, k, latent, sigmas, cond))
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
        asked = {name: value for name, value in locals().items() if name in PLAN_WORDS}
        return plan_program(self.family, prompts, negative_prompt, **asked)

    # --- stages ---

    def begin(self, job: Job, noise: torch.Tensor, cached: CachedStart | Sequence[CachedStart] | None) -> torch.Tensor:
        """What the first leg begins with: noise, or the cached latents, which the job then tells of."""
        if cached is None:
            return noise
        found = [cached] * len(job.prompts) if isinstance(cached, CachedStart) else list(cached)
        if len(found) != len(job.prompts) or len({each.skipped for each in found}) != 1:
            raise BadRequest(f"{len(job.prompts)} images need one cached start, or one each that skips as many steps")
        negatives: Sequence[str | None] = job.negatives or [None] * len(found)
        for each, negative in zip(found, negatives, strict=True):
            space = first_leg_space(self.family, job.program, negative, job.size)
            check_start(each, job.program, space, noise.shape[1:])
        job.starts = [each.told for each in found]
        return torch.cat([each.latent for each in found])

    def _keeper(self, job: Job, steps: Sequence[int]) -> dict[int, list[CachedStart]]:
        """Where `_walk` puts the latents of these steps of the first leg."""
        last = job.program.legs[0].last
        for step in steps:
            if not (isinstance(step, int) and job.skipped < step < last):
                raise BadRequest(f"latents are kept between steps {job.skipped + 1} and {last - 1}, not at {step!r}")
        return {step: [] for step in steps}

    def encode(self, job: Job) -> Conditioning:
        with job.timed("encode"):
            return self.family.text.encode(job.prompts, job.negatives, job.guided, job.size)

    def _walk(
        self,
        job: Job,
        k: int,
        latent: torch.Tensor,
        cond: Conditioning,
        received: Handoff | None,
        on_step: Callable[[int, list[float]], OnStep],
        trace: IntensityTrace | None = None,
        keep: dict[int, list[CachedStart]] | None = None,
    ) -> tuple[torch.Tensor, list[float]]:
        """Leg k from noise or a cached start (`received` None) or from a handoff; the receiver does the sigma matching."""
        leg = job.program.legs[k]
        sigmas = self.leg_sigmas(job, k, received)
        done = job.skipped if received is None else received.index if received.under_way else 0
        denoiser = self.family.denoiser(leg.member)
        report = on_step(k, sigmas[done:])

        def each(i: int, sigma: float, x: torch.Tensor) -> torch.Tensor | None:
            if trace:
                trace.record(i, sigma, x)
            if keep and done + i + 1 in keep:
                keep[done + i + 1] = self._states(job, done + i + 1, x)
            return report(i, sigma, x)

        with job.timed(f"denoise[{k}] {leg.member}"):
            latent = walk_leg(
                denoiser, latent, sigmas[done:], cond, job.program.guidance[k], member=leg.member, on_step=each
            )
        return latent, sigmas

    def _states(self, job: Job, step: int, x: torch.Tensor) -> list[CachedStart]:
        """Each image's latent after a step of the first leg."""
        negatives: Sequence[str | None] = job.negatives or [None] * len(x)
        spaces = {each: first_leg_space(self.family, job.program, each, job.size) for each in set(negatives)}
        return [
            CachedStart(spaces[negatives[i]], step, x[i : i + 1].float().cpu().clone(), f"seed {seed}")
            for i, seed in enumerate(job.seeds)
        ]

    def leg_sigmas(self, job: Job, k: int, received: Handoff | None) -> list[float]:
        schedules = self.family.schedules(job.size)
        if received is None:
            return sigma_matching.leg_sigmas(job.program, k, schedules, None)
        if received.under_way:  # a checkpoint inside leg k: the sender's own list goes on
            return received.sigmas_walked
        return sigma_matching.leg_sigmas(job.program, k, schedules, received.sigma, job.program.legs[k - 1].last)

    def _reference(self, job: Job, k: int, received: Handoff, cond: Conditioning) -> IntensityTrace:
        """The large member going on from the very latent, over the very sigmas, that the small one is given."""
        trace = IntensityTrace()
        walk_leg(
            self.family.denoiser("large"), received.latent, self.leg_sigmas(job, k, received), cond,
            job.program.guidance[k - 1], member="large", on_step=trace.record,
        )  # fmt: skip
        return trace

    def pack(self, job: Job, k: int, latent: torch.Tensor, sigmas: list[float], cond: Conditioning) -> Handoff:
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
            meta={STARTS: json.dumps(job.starts)} if job.starts else {},
        )

    def over_the_wire(self, job: Job, handoff: Handoff) -> Handoff:
        with job.timed("handoff"):
            data = handoff.to_bytes()
            job.handoff_bytes += len(data)
            return Handoff.from_bytes(data)

    def _stepper(self, job: Job, callback: Callback | None, first_leg: int = 0) -> Callable[[int, list[float]], OnStep]:
        """For each leg a function that tells the callback of its steps, counted over all legs of this call."""
        legs = job.program.legs
        self.num_timesteps = sum(leg.steps for leg in legs[first_leg:]) - (0 if first_leg else job.skipped)

        def for_leg(k: int, sigmas: list[float]) -> OnStep:
            before = sum(leg.steps for leg in legs[first_leg:k]) - (job.skipped if first_leg == 0 < k else 0)

            def report(i: int, _: float, x: torch.Tensor) -> torch.Tensor | None:
                if callback is None:
                    return None
                changed = callback(self, before + i, sigmas[i], {"latents": x})
                return (changed or {}).get("latents", x)

            return report

        return for_leg

    def _output(self, job: Job, latent: torch.Tensor, output_type: str) -> RelayOutput:
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
            starts=job.starts,
        )


STARTS = "starts"  # under this key a handoff tells on what its images began from


def starts_of(handoff: Handoff) -> list[dict[str, Any]]:
    """What a handoff's images began from; empty: from noise. HandoffRefused where it says something else."""
    try:
        said = json.loads(handoff.meta.get(STARTS, "[]"))
        found = [
            {"source": str(s["source"]), "similarity": s["similarity"], "skipped": int(s["skipped"])} for s in said
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise HandoffRefused(f"handoff: what its images began from cannot be read: {error}") from None
    if found and len(found) != len(handoff.prompts):
        raise HandoffRefused(f"handoff tells of {len(found)} starts for {len(handoff.prompts)} images")
    return found


def _as(images: torch.Tensor, output_type: str) -> Any:
    """Images (B, 3, H, W) in 0..1 as "pt", "np" (B, H, W, 3) or "pil"."""
    if output_type == "pt":
        return images
    from diffusers.image_processor import VaeImageProcessor

    array = VaeImageProcessor.pt_to_numpy(images)
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)
