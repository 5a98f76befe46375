"""`relay generate` and `relay show`: prompts to pictures, and a picture back to the command that made it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from nodes import options as opt
from nodes.results import describe, image_paths, save_result, write_report
from nodes.session import load_pipeline, step_progress
from relay.errors import BadRequest

Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT...", help="What the pictures shall show; one prompt each.")
]
Out = Annotated[Path, typer.Option(help="A .png file for a single image, else a folder.")]
Report = Annotated[Path | None, typer.Option(help="Write programs, seeds, timings and scores as JSON.")]


def generate(
    prompts: Prompts,
    family: opt.Family = "mini-sd3",
    mode: opt.Mode = None,
    handoff: opt.Handoff = None,
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
    out: Out = Path("out"),
    report: Report = None,
    deviation: Annotated[bool, typer.Option(help="Measure the latent-intensity deviation (one more run).")] = False,
    cache: opt.Cache = None,
    gateway: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Have it made by a running service; see `relay submit`.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="With --gateway: your secret key.")] = None,
    gateway_key: Annotated[Path | None, typer.Option(help="With --gateway: the gateway's public key file.")] = None,
) -> None:
    """Make pictures: the large member takes S steps, the small one the rest.

    Each image runs alone (batch 1), so `relay show FILE.png` can give the command that makes it again bit for bit.

    Examples:

        relay generate "a red heart at the top left" --handoff 14 --out heart.png

        relay generate "two blue stars" "a ring" --mode full-cloud --num-images 4 --out pictures/
    """
    from relay.family import find_family

    opt.check_prompts(prompts)
    opt.check_count(num_images)
    if gateway is not None:
        here = {
            "--matching": matching, "--codec": codec, "--conditioning": conditioning, "--guidance": guidance,
            "--negative-prompt": negative_prompt, "--size": size, "--dtype": dtype, "--device": device,
            "--threads": threads or None, "--report": report, "--deviation": deviation or None,
        }  # fmt: skip
        if said := [name for name, value in here.items() if value is not None]:
            raise BadRequest(
                f"{', '.join(said)} cannot be said to a gateway: fix all of it with --program, or leave it out"
            )
        from nodes.commands.ask import submit

        for prompt in prompts:
            submit(
                prompt, gateway, out, None if program else family, mode, steps, handoff, small_steps, program, seed, num_images,
                cache=cache, key=key, gateway_key=gateway_key,
            )  # fmt: skip
        return
    if cache:
        raise BadRequest("--cache: latents are cached by the edges of a service: say --gateway, or leave it out")
    spec = find_family(family)
    width, height = opt.parse_size(size)
    first_seed = opt.parse_seed(seed, num_images)
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "handoff": handoff,
        "mode": mode,
        "small_steps": small_steps,
        "matching": matching,
        "guidance_scale": opt.parse_guidance(guidance),
        "codec": codec,
        "conditioning": conditioning,
        "program": program,
        "width": width,
        "height": height,
    }
    targets = image_paths(opt.writable(out), prompts, first_seed, num_images)
    if report:
        opt.writable(report)
    opt.set_threads(threads)
    pipe = load_pipeline(spec, dtype, device)
    pipe.plan(prompts, **call)  # every refusal that needs no weights, before any is loaded
    entries = []
    with step_progress("denoising") as advance:
        for (prompt, image_seed), path in targets.items():
            result = pipe(prompt, seed=image_seed, deviation=deviation, callback_on_step_end=advance, **call)
            entries.append(save_result(pipe, result, path, prompt, image_seed, family))
    for entry in entries:
        print(describe(entry))
    if report:
        write_report(report, entries, pipe)
        print(f"report: {report}")


def show(file: Annotated[Path, typer.Argument(metavar="FILE.png")]) -> None:
    """Print the command that makes a saved picture again."""
    from nodes.images import read_parameters

    parameters = read_parameters(file)
    if start := parameters.get("start"):
        raise BadRequest(
            f"{file} started at step {start['skipped']} from a cached latent of {start['source']}: no command makes it again"
        )
    try:
        command = ["relay", "generate", parameters["prompt"], "--family", parameters["family_source"]]
        command += ["--program", parameters["program"], "--seed", str(parameters["seed"])]
        command += ["--size", f"{parameters['width']}x{parameters['height']}", "--dtype", parameters["dtype"]]
        if parameters.get("negative_prompt"):
            command += ["--negative-prompt", parameters["negative_prompt"]]
    except KeyError as missing:
        raise BadRequest(f"{file} carries relay parameters without {missing}: it was made by another version") from None
    print(shlex.join([*command, "--out", file.name]))
