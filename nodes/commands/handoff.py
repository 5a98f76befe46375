"""`relay start` and `relay finish`: a relay over two hosts with nothing between them but a file copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nodes import options as opt
from nodes.results import describe, image_paths, save_result
from nodes.session import load_pipeline, step_progress
from relay.errors import BadRequest, HandoffRefused
from relay.files import write_atomically


def start(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shall show.")],
    out: Annotated[Path, typer.Option(help="The handoff file to write, e.g. heart.handoff.")],
    handoff: opt.Handoff = None,
    family: opt.Family = "mini-sd3",
    steps: opt.Steps = None,
    small_steps: opt.SmallSteps = None,
    matching: opt.Matching = None,
    codec: opt.Codec = None,
    conditioning: opt.Conditioning = None,
    program: opt.ProgramText = None,
    seed: opt.Seed = None,
    guidance: opt.Guidance = None,
    negative_prompt: opt.Negative = None,
    num_images: opt.NumImages = 1,
    size: opt.Size = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = 0,
) -> None:
    """Run the large member's steps and write the latent to a file. `relay finish` goes on from it, here or elsewhere."""
    from relay.family import find_family

    opt.check_prompts([prompt])
    opt.check_count(num_images)
    width, height = opt.parse_size(size)
    opt.set_threads(threads)
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt, "num_inference_steps": steps, "handoff": handoff, "small_steps": small_steps,
        "matching": matching, "guidance_scale": opt.parse_guidance(guidance), "codec": codec, "conditioning": conditioning,
        "program": program, "width": width, "height": height,
    }  # fmt: skip
    first_seed = opt.parse_seed(seed, num_images)
    if out.is_dir():
        raise BadRequest(f"--out {out} is a folder: name the handoff file to write")
    opt.writable(out)
    pipe = load_pipeline(find_family(family), dtype, device, role="edge")
    pipe.plan([prompt], **call)
    with step_progress("large member") as advance:
        made = pipe.start(
            prompt, seed=first_seed, num_images_per_prompt=num_images, callback_on_step_end=advance, **call
        )
    data = made.to_bytes()
    write_atomically(out, data)
    print(
        f"{out}  {len(data)} B  at sigma {made.sigma:.4g}  seed {first_seed}  next: relay finish {out} --out FILE.png"
    )


def finish(
    file: Annotated[Path, typer.Argument(metavar="F.handoff")],
    out: Annotated[Path, typer.Option(help="A .png file for a single image, else a folder.")],
    family: Annotated[
        str | None, typer.Option(help="Only where the handoff's family is not found by its name.")
    ] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = 0,
) -> None:
    """Check a handoff, let the small member finish it, and save the picture."""
    from relay.family import find_family
    from relay.handoff import Handoff
    from relay.program import Program

    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadRequest(f"cannot read {file}: {error.strerror}") from None
    try:
        received = Handoff.from_bytes(data)
    except HandoffRefused as error:
        raise HandoffRefused(f"{file}: {error}") from None
    if out.suffix.lower() == ".png" and len(received.prompts) > 1:
        raise BadRequest(f"the handoff holds {len(received.prompts)} images: give a folder")
    named = family or Program.parse(received.program).family
    opt.writable(out)
    opt.set_threads(threads)
    pipe = load_pipeline(find_family(named), dtype, device, role="device")
    with step_progress("small member") as advance:
        result = pipe.finish(received, callback_on_step_end=advance)
    for i, (prompt, seed) in enumerate(zip(received.prompts, received.seeds, strict=True)):
        path = out if out.suffix.lower() == ".png" else image_paths(out, [prompt], seed or 0, 1)[prompt, seed or 0]
        print(describe(save_result(pipe, result.only(i), path, prompt, seed, named)))
