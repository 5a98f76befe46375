"""`relay generate` and `relay show`: prompts to pictures, and a picture back to the command that made it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes import options as opt
from relay.errors import BadRequest

if TYPE_CHECKING:
    from relay.family import FamilySpec
    from relay.pipeline import RelayOutput, RelayPipeline

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
    conditioning: opt.Conditioning = "encode",
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
    targets = _targets(opt.writable(out), prompts, first_seed, num_images)
    if report:
        opt.writable(report)
    opt.set_threads(threads)
    pipe = load_pipeline(spec, dtype, device)
    pipe.plan(prompts, **call)  # every refusal that needs no weights, before any is loaded
    entries = []
    with step_progress("denoising") as advance:
        for (prompt, image_seed), path in targets.items():
            result = pipe(prompt, seed=image_seed, deviation=deviation, callback_on_step_end=advance, **call)
            entries.append(_save(pipe, result, path, prompt, image_seed, family))
    for entry in entries:
        print(describe(entry))
    if report:
        _write_report(report, entries, pipe)
        print(f"report: {report}")


def show(file: Annotated[Path, typer.Argument(metavar="FILE.png")]) -> None:
    """Print the command that makes a saved picture again."""
    from nodes.images import read_parameters

    parameters = read_parameters(file)
    try:
        command = ["relay", "generate", parameters["prompt"], "--family", parameters["family_source"]]
        command += ["--program", parameters["program"], "--seed", str(parameters["seed"])]
        command += ["--size", f"{parameters['width']}x{parameters['height']}", "--dtype", parameters["dtype"]]
        if parameters.get("negative_prompt"):
            command += ["--negative-prompt", parameters["negative_prompt"]]
    except KeyError as missing:
        raise BadRequest(f"{file} carries relay parameters without {missing}: it was made by another version") from None
    print(shlex.join([*command, "--out", file.name]))


def load_pipeline(spec: FamilySpec, dtype: str | None, device: str | None, role: str = "all") -> RelayPipeline:
    """A pipeline whose weights load on first use, quietly."""
    quiet_libraries()
    from relay.pipeline import RelayPipeline

    return RelayPipeline.from_pretrained(spec, torch_dtype=dtype, device=device, role=role)


def quiet_libraries() -> None:
    """Progress bars and load reports of libraries would drown our one line a picture."""
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def step_progress(label: str):  # noqa: ANN201
    """A context that gives a diffusers-style step callback which moves a progress bar on a terminal's stderr."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():  # noqa: ANN202
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(label, total=None)

            def advance(pipe: Any, step: int, sigma: float, state: dict[str, Any]) -> dict[str, Any]:
                progress.update(task, total=getattr(pipe, "num_timesteps", None), completed=step + 1)
                return state

            yield advance

    return bar()


def _targets(out: Path, prompts: list[str], seed: int, count: int) -> dict[tuple[str, int], Path]:
    """Where the image of each (prompt, seed) goes; a folder gets names that sort and say what they show."""
    jobs = [(prompt, seed + i) for prompt in dict.fromkeys(prompts) for i in range(count)]
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(jobs) > 1:
            raise BadRequest(f"{len(jobs)} images do not fit into one file {out}: give a folder")
        return {jobs[0]: out}
    if out.suffix and not out.is_dir():
        raise BadRequest(f"--out {out}: only .png files and folders can be written")
    out.mkdir(parents=True, exist_ok=True)
    names: dict[tuple[str, int], Path] = {}
    for job in jobs:
        slug = re.sub(r"[^a-z0-9]+", "-", job[0].lower()).strip("-")[:60] or "image"
        path, n = out / f"{slug}-{job[1]}.png", 1
        while path in names.values():
            path, n = out / f"{slug}-{job[1]}-{n}.png", n + 1
        names[job] = path
    return names


def _save(pipe: RelayPipeline, result: RelayOutput, path: Path, prompt: str, seed: int, family: str) -> dict[str, Any]:
    from nodes.images import save_png

    image = result.images[0]
    parameters = {
        "prompt": prompt,
        "negative_prompt": result.negative_prompt,
        "family_source": family,
        "program": str(result.program),
        "seed": seed,
        "width": image.width,
        "height": image.height,
        "dtype": pipe.dtype,
        "steps": result.steps,
        "version": _version(),
    }
    save_png(image, path, parameters)
    entry = parameters | {"file": str(path), "timings_s": result.timings, "handoff_bytes": result.handoff_bytes}
    if result.deviation is not None:
        entry["deviation"] = result.deviation
    if pipe.family.spec.scenes:
        entry["score"] = score(image, prompt)
    return entry


def score(image: Any, prompt: str) -> dict[str, Any]:
    """The scene judge's verdict on one PIL image."""
    import dataclasses

    import numpy as np
    import torch

    from relay.scenes.judge import judge
    from relay.scenes.language import parse

    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    return dataclasses.asdict(judge(pixels, [parse(prompt)])[0])


def describe(entry: dict[str, Any]) -> str:
    """One line: file, steps really done, denoising time, score."""
    taken = " + ".join(f"{n} {member}" for member, n in entry["steps"].items() if n)
    denoising = sum(v for k, v in entry["timings_s"].items() if k.startswith("denoise"))
    line = f"{entry['file']}  {taken} steps  {denoising:.2f} s denoising  seed {entry['seed']}"
    if entry["handoff_bytes"]:
        line += f"  {entry['handoff_bytes']} B handed over"
    if "score" in entry:
        line += f"  attributes right {entry['score']['attributes']:.0%}"
    if "deviation" in entry:
        line += f"  intensity deviation {entry['deviation']['max']:.2%} at most"
    return line


def _write_report(path: Path, entries: list[dict[str, Any]], pipe: RelayPipeline) -> None:
    import platform

    import diffusers
    import torch

    machine = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    machine |= {"relay": _version(), "threads": torch.get_num_threads(), "processor": platform.machine()}
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps({"images": entries, "dtype": pipe.dtype, "machine": machine}, indent=1) + "\n")
    partial.replace(path)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("relay-inference")
    except PackageNotFoundError:
        return "unknown"
