"""`relay-train`: train the embedded families, whole or piece by piece."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Minutes = Annotated[float | None, typer.Option(help="Length of this piece; default: the rest of the budget.")]
Total = Annotated[float | None, typer.Option(help="Horizon of the learning-rate schedule, over all pieces together.")]


def _weights() -> Path:
    import relay

    return Path(relay.__file__).parent / "weights"


@app.callback()
def _root() -> None:
    """Train the embedded families, whole or piece by piece."""


FAMILIES = ("mini-sd3", "mini-sdxl")
DEFAULT_MINUTES = {"vae": 20, "text": 15, "judge": 15, "large": 90, "small": 30}


@app.command()
def part(
    name: Annotated[
        str, typer.Argument(help="vae | text | judge | mini-sd3/large | mini-sd3/small | mini-sdxl/large | ...")
    ],
    total_minutes: Total = None,
    minutes: Minutes = None,
    work: Annotated[Path, typer.Option(help="Checkpoints, curves and the latent cache.")] = Path("runs/training"),
    out: Annotated[Path | None, typer.Option(help="Where weights go; default: the package's own.")] = None,
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
) -> None:
    """Train one part (the two families share VAE, text encoder and judge); goes on where it stopped."""
    import torch

    from experiments.training.loop import Budget, train

    if threads:
        torch.set_num_threads(threads)
    weights = out or _weights()
    total = total_minutes or DEFAULT_MINUTES[name.split("/")[-1]]
    command = "relay-train " + " ".join(sys.argv[1:])
    task = _task(name, weights, work, seed)
    state = work / name.replace("/", "-")
    train(task, state, Budget(total, minutes, seed, device, command=command), say=lambda text: print(text, flush=True))


def _task(name: str, weights: Path, work: Path, seed: int):  # noqa: ANN202
    folders = [weights / family for family in FAMILIES]
    if name == "vae":
        from experiments.training.vae import VaeTask

        return VaeTask(folders, seed)
    if name == "text":
        from experiments.training.text import TextTask

        return TextTask(folders, seed)
    if name == "judge":
        from experiments.training.judge import JudgeTask

        return JudgeTask(weights, seed)
    family, _, member = name.partition("/")
    if family in FAMILIES and member in {"large", "small"}:
        from experiments.training.members import MemberTask

        return MemberTask(family, member, weights, work, seed)
    raise typer.BadParameter(
        f"no part is called '{name}'; parts: vae, text, judge, {', '.join(f'{f}/large' for f in FAMILIES)}, ..."
    )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
