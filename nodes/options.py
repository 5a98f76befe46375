"""Options that several commands share, and the checks that need no model."""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from relay.errors import BadRequest

Family = Annotated[
    str, typer.Option(help="A family in configs/families, the path of a YAML, or of a diffusers folder.")
]
Mode = Annotated[str | None, typer.Option(help="full-cloud | relay | edge-only; default: what --handoff says.")]
Handoff = Annotated[
    int | None, typer.Option(metavar="S", help="Steps the large member takes: 0 (edge-only) to T (full-cloud).")
]
Steps = Annotated[int | None, typer.Option(metavar="T", help="Length of the large member's schedule.")]
SmallSteps = Annotated[
    int | None, typer.Option(metavar="N", help="Steps the small member takes; default: what its schedule leaves.")
]
Matching = Annotated[str | None, typer.Option(help="direct | nearest | exact: where the small member continues.")]
Codec = Annotated[str | None, typer.Option(help="fp32 | fp16 | bf16 | int8: how the latent travels.")]
Conditioning = Annotated[
    str | None, typer.Option(help="encode: the receiver encodes the prompt again; ship: embeddings travel.")
]
ProgramText = Annotated[
    str | None, typer.Option(help="A whole program in its text form, in place of the options above.")
]
Seed = Annotated[
    int | None, typer.Option(metavar="K", help="Image i of n uses seed K + i; default: a random one, reported.")
]
Guidance = Annotated[str | None, typer.Option(metavar="G", help="Classifier-free guidance: one value, or LARGE,SMALL.")]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.")]
NumImages = Annotated[int, typer.Option(help="Images per prompt.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Default: the family's.")]
Dtype = Annotated[str | None, typer.Option(help="fp32 | fp16 | bf16; default: the family's.")]
Device = Annotated[str | None, typer.Option(help="auto | cpu | cuda | cuda:1 | mps; default: the family's.")]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Of a service: whether the picture may start from a cached latent of a similar prompt; --no-cache also leaves"
        " none. Default: not where seed, steps or handoff are said.",
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """ "64x96" to (width, height); the family checks whether the VAE can do it."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise BadRequest(f"--size {text!r} is not WIDTHxHEIGHT; say e.g. 64x64")
    return int(width), int(height)


def parse_guidance(text: str | None) -> float | tuple[float, float] | None:
    """ "3" to 3.0, "4.5,5" to (4.5, 5.0): large, small."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(math.isfinite(v) and v >= 0 for v in values):
        raise BadRequest(f"--guidance {text!r} is not a number of at least 0, or two of them as LARGE,SMALL")
    return values[0] if len(values) == 1 else (values[0], values[1])


def parse_seed(seed: int | None, count: int) -> int:
    """The first seed; a random one where none was given. Seeds are what torch.Generator takes without wrapping."""
    if seed is None:
        return secrets.randbelow(2**31 - count)
    if not 0 <= seed <= 2**63 - 1 - count:
        raise BadRequest(f"--seed {seed} must lie between 0 and 2^63 - 1 - {count}")
    return seed


def check_prompts(prompts: list[str]) -> None:
    if any(not prompt.strip() for prompt in prompts):
        raise BadRequest("the prompt is empty; say what the picture shall show")


def check_count(count: int) -> None:
    if not 1 <= count <= 1000:
        raise BadRequest(f"--num-images {count} must lie between 1 and 1000")


def set_threads(threads: int) -> None:
    if threads < 0:
        raise BadRequest(f"--threads {threads} must be 0 or more")
    if threads:
        import torch

        torch.set_num_threads(threads)


def writable(path: Path) -> Path:
    """`path`, its parent made; refused before any work is done where it cannot be written."""
    parent = path if path.is_dir() else path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}") from None
    target = path if path.exists() else parent
    if not os.access(target, os.W_OK) or (path.exists() and not path.is_dir() and not path.is_file()):
        raise BadRequest(f"cannot write {path}: permission denied")
    return path
