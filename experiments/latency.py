"""What relays of the real architectures cost: full size, random weights, relay's own code, diffusers beside it.

Time and memory do not depend on the values of weights, so nothing is downloaded, and nothing can be read of quality.
Text encoders are timed alone; random embeddings of the right shape are given to relay and to diffusers alike. Every
time is a median; end-to-end times, which are compared, are taken in turns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.random_family import CLIP_TOKENS, RandomFamily, build, diffusers_call, parameters
from experiments.real_sizes import SIZES, tiny
from experiments.timing import batch_sizes
from relay.codecs import payload_bytes
from relay.errors import BadRequest
from relay.handoff import Handoff
from relay.pipeline import RelayPipeline
from relay.program import CODECS, check_choice
from relay.sampling import walk_leg
from relay.step_times import interleaved
from scheduler.links import LINKS
from scheduler.message_sizes import IMAGE_BYTES_PER_PIXEL, MessageSizes, bytes_sent

MEMBERS = ("large", "small")
PROMPT = "random embeddings stand for this text"


def latency(
    name: str, is_tiny: bool, device: str | None, dtype: str | None, steps: int | None, batches: str, repeats: int
) -> tuple[str, dict[str, Any]]:
    """The report as Markdown, and its data. BadRequest where there is no GPU for the real sizes."""
    from experiments.latency_report import report

    check_choice("family", name, tuple(SIZES))
    sizes = batch_sizes(batches)
    device = device or ("cpu" if is_tiny else "cuda")
    if not is_tiny and (not device.startswith("cuda") or not torch.cuda.is_available()):
        found = "none was found" if not torch.cuda.is_available() else f"not {device!r}"
        raise BadRequest(f"latency of the real sizes needs a CUDA device, {found}; --tiny runs the same code on a CPU")
    family = RandomFamily(name, tiny(SIZES[name]) if is_tiny else SIZES[name], dtype or _default_dtype(device), device)
    steps = family.spec.members["large"].steps if steps is None else steps
    if steps < 2:
        raise BadRequest(f"a relay has at least 2 steps, not {steps}")
    try:
        data = measure(family, steps, sizes, repeats)
    except torch.OutOfMemoryError:
        raise BadRequest(
            f"{name} does not fit the memory of {device}: both members and the VAE must, at batch 1"
        ) from None
    data["tiny"] = is_tiny
    return report(data), data


def measure(family: RandomFamily, steps: int, batches: list[int], repeats: int) -> dict[str, Any]:
    """All figures of one family. Times in seconds, memory and messages in bytes."""
    pipe = RelayPipeline(family)
    programs = [pipe.plan(num_inference_steps=steps, handoff=s) for s in range(steps + 1)]  # refuses before it builds
    device = family.device(family.spec.vae)
    data: dict[str, Any] = {
        "family": family.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": pipe.dtype,
        "steps": steps,
        "size": list(family.spec.sizes.default),
        "repeats": repeats,
        "guidance": {member: family.spec.members[member].guidance for member in MEMBERS},
    }
    _say("text encoders")
    data["text"] = text_encoders(family, repeats)
    data["vae_weights"] = sum(parameter.nbytes for parameter in family.vae.parameters())
    data["members"] = {}
    for member in MEMBERS:
        _say(f"{member} member")
        data["members"][member] = member_facts(family, member) | step_curve(family, member, steps, batches, repeats)
    _say("end to end")
    data["measured"] = end_to_end(pipe, programs, repeats)
    data["pieces"] = {
        member: _at_one(data["members"][member]) for member in MEMBERS
    } | {stage: _stage(data["measured"], stage) for stage in ("handoff", "decode")}  # fmt: skip
    data["messages"] = messages(pipe, programs, repeats)
    sizes = MessageSizes(family.name, *_shapes(data["messages"]), source="this run")
    data["relays"] = [from_pieces(program, data["pieces"], sizes) for program in programs]
    return data


def member_facts(family: RandomFamily, member: str) -> dict[str, Any]:
    """Parameters, what they should be, and bytes of weights on the device."""
    import diffusers

    trained, stored = parameters(getattr(diffusers, family.architecture.model), family.denoiser_config(member))
    published = family.sizes.published.get(member)
    model = getattr(family.denoiser(member), family.architecture.denoiser)
    return {
        "parameters": trained,
        "stored": stored,
        "published": published.parameters if published else None,
        "source": published.source if published else None,
        "weights": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
    }


def step_curve(family: RandomFamily, member: str, steps: int, batches: list[int], repeats: int) -> dict[str, Any]:
    """Seconds of one guided step, and the memory it takes above what was there, over batch size.

    A guided step of B images is a forward of 2 B rows; the step is one of `walk_leg`, with all that it checks. The
    curve ends where memory does: `full_at` is the batch that did not fit, None where all did.
    """
    denoiser, size = family.denoiser(member), family.spec.sizes.default
    middle = steps // 2
    sigmas = family.schedules(size)[member](steps).sigmas[middle : middle + 2]
    guidance = family.spec.members[member].guidance
    rows: list[dict[str, Any]] = []
    full_at: int | None = None
    for batch in batches:
        cond = family.text.encode([PROMPT] * batch, None, True, size)
        x = family.initial_noise(batch, size, torch.Generator().manual_seed(0)).to(denoiser.device) * sigmas[0]

        def step(x: torch.Tensor = x, cond: Any = cond) -> None:
            walk_leg(denoiser, x, sigmas, cond, guidance, member=member)

        held = _reset_peak(denoiser.device)
        try:
            seconds = interleaved([_finished(step, denoiser.device)], repeats)[0]
        except torch.OutOfMemoryError:
            full_at = batch
            break
        rows.append({"batch": batch, "step_s": seconds, "working": _above(held, denoiser.device)})
    _reset_peak(denoiser.device)  # outside the handler, whose traceback holds the tensors that did not fit
    if not rows:
        raise torch.OutOfMemoryError
    return {"curve": rows, "full_at": full_at}


@torch.inference_mode()
def end_to_end(pipe: RelayPipeline, programs: list[Any], repeats: int) -> list[dict[str, Any]]:
    """A few programs as a user would run them, batch 1, embeddings to pixels, and diffusers' own pipeline in turns."""
    family, steps = pipe.family, len(programs) - 1
    assert isinstance(family, RandomFamily)
    size, device = family.spec.sizes.default, family.device(family.spec.vae)
    noise = family.initial_noise(1, size, torch.Generator().manual_seed(0)).to(device)
    rows: list[dict[str, Any]] = []
    jobs: list[Callable[[], Any]] = []
    for s in sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps}):
        row: dict[str, Any] = {"method": "relay", "handoff": s, "steps": programs[s].steps, "stages": []}

        def ours(row: dict[str, Any] = row, program: Any = programs[s]) -> Any:
            output = pipe(PROMPT, program=program, latents=noise, output_type="pt")
            row["stages"].append(output.timings)
            return output.images

        rows.append(row)
        jobs.append(ours)
    for member, s in (("small", 0), ("large", steps)):
        rows.append({"method": "diffusers", "handoff": s, "steps": programs[s].steps})
        jobs.append(diffusers_call(family, member, steps, noise))

    images: list[Any] = []
    for row, job in zip(rows, jobs, strict=True):  # the warm-up, also of memory
        held = _reset_peak(device)
        images.append(job().float().cpu())
        row["working"] = _above(held, device)
        row.get("stages", []).clear()
    for row, seconds in zip(rows, interleaved([_finished(job, device) for job in jobs], repeats), strict=True):
        row["seconds"] = seconds
        if stages := row.pop("stages", None):
            row["stages"] = {name: statistics.median(each[name] for each in stages[1:]) for name in stages[0]}
    for i, row in enumerate(rows):
        if row["method"] == "diffusers":
            ours_at = next(k for k, other in enumerate(rows) if other["handoff"] == row["handoff"])
            row["ratio"] = rows[ours_at]["seconds"] / row["seconds"]  # ours / theirs
            row["mean_difference"] = float((images[i] - images[ours_at]).abs().mean())
    return rows


def text_encoders(family: RandomFamily, repeats: int) -> list[dict[str, Any]]:
    """Each text encoder alone: seconds for one guided prompt (two rows of tokens), parameters, bytes of weights."""
    device, dtype, rows = family.text.device, family.dtype(family.spec.text), []
    for name, (cls_name, config) in family.sizes.text.items():
        cls = getattr(transformers, cls_name)
        model = build(cls, config, dtype, device)
        tokens = family.text.t5_tokens if name.startswith("T5") else CLIP_TOKENS
        ids = torch.randint(3, config["vocab_size"], (2, tokens), generator=torch.Generator().manual_seed(0)).to(device)

        def encode(model: Any = model, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                model(input_ids=ids, output_hidden_states=True)

        seconds = interleaved([_finished(encode, device)], repeats)[0]
        weights = sum(parameter.nbytes for parameter in model.parameters())
        count = sum(parameter.numel() for parameter in model.parameters())
        rows.append({"name": name, "tokens": tokens, "seconds": seconds, "parameters": count, "weights": weights})
        del model, encode
        _reset_peak(device)
    return rows


@torch.inference_mode()
def messages(pipe: RelayPipeline, programs: list[Any], repeats: int) -> dict[str, Any]:
    """What travels, of one image: bytes of the latent by codec, of embeddings and image; seconds to write and to read."""
    family = pipe.family
    width, height = size = family.spec.sizes.default
    shape = (1, family.channels, height // family.factor, width // family.factor)
    steps = len(programs) - 1
    latents = {}
    for codec in CODECS:
        made = pipe.start(PROMPT, num_inference_steps=steps, handoff=1, codec=codec, seed=0)
        data = made.to_bytes()
        write, read = interleaved([made.to_bytes, lambda data=data: Handoff.from_bytes(data)], repeats)  # type: ignore[misc]
        payload = payload_bytes(codec, shape)
        latents[codec] = {"payload": payload, "message": len(data), "write_s": write, "read_s": read}
    cond = family.text.encode([PROMPT], None, False, size)
    return {
        "shape": list(shape[1:]),
        "latents": latents,
        "embeddings": cond.prompt_embeds.nbytes + cond.pooled.nbytes,  # one guidance branch
        "image": round(width * height * IMAGE_BYTES_PER_PIXEL["png"]),
    }


def from_pieces(program: Any, pieces: dict[str, float], sizes: MessageSizes) -> dict[str, Any]:
    """A program's seconds as the sum of measured pieces, and with the transfers that each link would add."""
    taken = {member: program.steps.get(member, 0) for member in MEMBERS}
    compute = sum(taken[member] * pieces[member] for member in MEMBERS) + pieces["decode"]
    compute += pieces["handoff"] * (len(program.legs) - 1)
    sent = bytes_sent(program, sizes)
    links = {name: compute + sum(link.transfer_time(m.bytes) for m in sent) for name, link in LINKS.items()}
    return {"handoff": taken["large"], "small_steps": taken["small"], "compute_s": compute, "over": links}


def _at_one(facts: dict[str, Any]) -> float:
    return next(row["step_s"] for row in facts["curve"] if row["batch"] == 1)


def _stage(rows: list[dict[str, Any]], stage: str) -> float:
    """A stage's seconds over the programs measured; 0 where none has it."""
    found = [row["stages"][stage] for row in rows if stage in row.get("stages", {})]
    return statistics.median(found) if found else 0.0


def _shapes(facts: dict[str, Any]) -> tuple[tuple[int, int, int], int, int]:
    channels, height, width = facts["shape"]
    return (channels, height, width), facts["embeddings"], facts["image"]


def _finished(job: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """A job that returns when the device has done it."""

    def run() -> None:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _reset_peak(device: torch.device) -> int:
    """Forget the peak; bytes held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _above(held: int, device: torch.device) -> int | None:
    """Bytes at the peak since `_reset_peak` beyond those held then; None on a CPU, which does not tell."""
    return torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None


def _default_dtype(device: str) -> str:
    return "bf16" if device.startswith("cuda") else "fp32"


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def default_out(name: str, is_tiny: bool) -> Path:
    """Where the table goes: a tiny one never into the docs."""
    return Path("runs/latency-tiny" if is_tiny else "docs/results", f"latency-{name}.md")
