"""`relay-train`: train the embedded families, whole or piece by piece, and the token-level router."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.training.budget import Budget
from nodes.cli import run

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Minutes = Annotated[float | None, typer.Option(help="Length of this piece; default: the rest of the budget.")]
Total = Annotated[float | None, typer.Option(help="Horizon of the learning-rate schedule, over all pieces together.")]


def _shipped() -> Path:
    import relay

    return Path(relay.__file__).resolve().parent / "weights"


@app.callback()
def _root() -> None:
    """Train the embedded families, whole or piece by piece."""


FAMILIES = ("mini-sd3", "mini-sdxl")
PARTS = (
    "vae",
    "text",
    "judge",
    "clip",
    *(f"{family}/{member}" for family in FAMILIES for member in ("large", "small")),
)
DEFAULT_MINUTES = {"vae": 20, "text": 15, "judge": 15, "clip": 30, "large": 120, "small": 30}


Work = Annotated[Path, typer.Option(help="Checkpoints, curves and the latent cache.")]
Out = Annotated[Path, typer.Option(help="Where weights go; shipped ones that a part builds on are copied there first.")]
Quick = Annotated[bool, typer.Option(help="A handful of scenes and prompts, to try the machinery out.")]
Start = Annotated[str, typer.Option(help="fresh | shipped: go on from the package's half-precision weights.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]


@app.command()
def family(
    name: Annotated[str, typer.Argument(help="mini-sd3 | mini-sdxl")],
    scale: Annotated[float, typer.Option(help="Of the default minutes: 2 trains everything twice as long.")] = 1.0,
    minutes: Minutes = None,
    work: Work = Path("runs/training"),
    out: Out = Path("runs/weights"),
    seed: int = 0,
    device: str = "auto",
    threads: Threads = 0,
    start: Start = "fresh",
    quick: Quick = False,
) -> None:
    """Train a whole family, part after part: VAE, text encoder, judge, large, small. Goes on where it stopped.

    With --minutes each call does at most that much of the first part that is not done, and leaves usable weights.
    """
    _known(name in FAMILIES, f"no family is called '{name}'; families: {', '.join(FAMILIES)}")
    for each in ("vae", "text", "judge", f"{name}/large", f"{name}/small"):
        total = DEFAULT_MINUTES[each.split("/")[-1]] * scale
        if _spent(work / each.replace("/", "-")) >= total:
            continue
        _train(each, Budget(total, minutes, seed, device), work, out, threads, start, quick)
        if minutes is not None:
            break
    card(name, work, out)


@app.command()
def part(
    name: Annotated[
        str, typer.Argument(help="vae | text | judge | clip | mini-sd3/large | mini-sd3/small | mini-sdxl/large | ...")
    ],
    total_minutes: Total = None,
    minutes: Minutes = None,
    work: Work = Path("runs/training"),
    out: Out = Path("runs/weights"),
    seed: int = 0,
    device: str = "auto",
    threads: Threads = 0,
    start: Start = "fresh",
    quick: Quick = False,
) -> None:
    """Train one part (the two families share VAE, text encoder and judge); goes on where it stopped."""
    _known(name in PARTS, f"no part is called '{name}'; parts: {', '.join(PARTS)}")
    total = total_minutes or DEFAULT_MINUTES[name.split("/")[-1]]
    _train(name, Budget(total, minutes, seed, device), work, out, threads, start, quick)


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="mini-sd3 | mini-sdxl")],
    work: Work = Path("runs/training"),
    out: Out = Path("runs/weights"),
) -> None:
    """Write the model card of a family from the provenance beside its weights."""
    from experiments.training.card import write_card

    _known(name in FAMILIES, f"no family is called '{name}'; families: {', '.join(FAMILIES)}")
    print(write_card(out, name, work))


@app.command()
def router(
    family: Annotated[list[str] | None, typer.Option(help="Default: every family of the runs that has rows.")] = None,
    run: Annotated[list[Path] | None, typer.Option(help="Run folders with outcomes of all modes.")] = None,
    metrics: Annotated[str, typer.Option(help="clip | scene | both")] = "both",
    ways: Annotated[str, typer.Option(help="three-way | two-way: learn about relay too, or not.")] = "three-way",
    multi_metric: Annotated[bool, typer.Option(help="Off: one expert, on PRS itself.")] = True,
    token_selection: Annotated[bool, typer.Option(help="Off: every expert reads every token.")] = True,
    dual_gate: Annotated[bool, typer.Option(help="Off: one gate per expert.")] = True,
    seed: int = 0,
    out: Annotated[
        Path | None, typer.Option(help="Weights go to OUT/FAMILY/METRICS.safetensors; default: where they ship.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Train the token-level router on the outcome store; minutes on a CPU. See docs/router.md."""
    from experiments.training.router_run import train_routers

    _known(metrics in ("clip", "scene", "both"), f"--metrics is clip, scene or both, not '{metrics}'")
    _known(ways in ("three-way", "two-way"), f"--ways is three-way or two-way, not '{ways}'")
    if threads:
        import torch

        torch.set_num_threads(threads)
    train_routers(
        run or [Path("runs/experiments/decisions")], family, ("clip", "scene") if metrics == "both" else (metrics,),
        out, seed, {"ways": ways, "multi": multi_metric}, {"select": token_selection, "dual": dual_gate},
        "relay-train " + " ".join(sys.argv[1:]), say=lambda text: print(text, flush=True),
    )  # fmt: skip


def _known(fine: bool, otherwise: str) -> None:
    if not fine:
        raise typer.BadParameter(otherwise)


def _spent(state: Path) -> float:
    """Minutes that a part was trained for, as its validation log says."""
    log = state / "validation.csv"
    return float(log.read_text().splitlines()[-1].split(",")[1]) if log.exists() else 0.0


def _train(name: str, budget: Budget, work: Path, out: Path, threads: int, start: str, quick: bool) -> None:
    import torch

    from experiments.training.loop import train

    _known(start in ("fresh", "shipped"), f"--start is fresh or shipped, not '{start}'")
    if threads:
        torch.set_num_threads(threads)
    budget.command = "relay-train " + " ".join(sys.argv[1:])
    _bring_shipped_parts(out)
    task = _task(name, out, work, budget.seed, quick)
    if start == "shipped":
        budget.extra["started_from"] = "the shipped half-precision weights"
        task.load_shipped(_shipped())
    train(task, work / name.replace("/", "-"), budget, say=lambda text: print(text, flush=True))


def _bring_shipped_parts(out: Path) -> None:
    """Copy what a part may build on and is not there yet: VAE, text encoders, tokenizers."""
    if out.resolve() == _shipped():
        return
    for name in FAMILIES:
        for source in _shipped().joinpath(name).glob("*"):
            target = out / name / source.name
            if source.name.startswith(("vae", "text_encoder", "tokenizer")) and not target.exists():
                partial = target.with_name(f"{target.name}.{os.getpid()}.part")
                shutil.copytree(source, partial)
                try:
                    partial.rename(target)
                except OSError:  # another part's training, started beside this one, was quicker
                    shutil.rmtree(partial)


def _task(name: str, weights: Path, work: Path, seed: int, quick: bool):  # noqa: ANN202
    folders = [weights / family for family in FAMILIES]
    if name == "vae":
        from experiments.training.vae import VaeTask

        return VaeTask(folders, seed)
    if name == "text":
        from experiments.training.text import TextTask

        return TextTask(folders, seed, quick)
    if name == "judge":
        from experiments.training.judge import JudgeTask

        return JudgeTask(weights, seed)
    if name == "clip":
        from experiments.training.clip import ClipTask

        return ClipTask(weights, seed, quick)
    from experiments.training.members import MemberTask

    family, _, member = name.partition("/")
    return MemberTask(family, member, weights, work, seed, quick)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
