"""Which metric moves with which degradation: the 10 x 10 table of the embedded CLIP's qualities.

Held-out test scenes are drawn clean and with one degradation at a time; a cell is the drop of a metric's mean q from
clean to degraded. A metric separates where its own degradation moves it at least three times as much as any other
degradation does; where it does not, the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from relay.scenes.language import Scene

SEVERITIES = (0.25, 0.5, 0.75, 1.0)
GOAL = 3.0


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/metrics.md"
    ),
    model: Annotated[str | None, typer.Option(help="A CLIPModel's path or hub id; default: the embedded one.")] = None,
    scenes: Annotated[int, typer.Option(help="Held-out test scenes.")] = 200,
    threads: int = 2,
) -> None:
    """Measure every metric's drop under every degradation."""
    import torch

    from experiments.provenance import write_result
    from nodes.session import quiet_libraries
    from relay.errors import BadRequest
    from relay.metrics.clip import load_clip
    from relay.metrics.clip_quality import EMBEDDED, phrases_of, qualities
    from relay.scenes.sampling import held_out

    quiet_libraries()
    torch.set_num_threads(threads)
    path = model or str(EMBEDDED)
    clip = load_clip(path)
    phrases = phrases_of(path)
    if scenes < 5:
        raise BadRequest(f"--scenes {scenes}: at least 5 are needed, one of each complexity class")
    found = measure(lambda images: qualities(clip, clip.images(images), phrases), held_out(scenes, "test"))
    text = table(found, scenes, model) + trained(path)
    write_result(out, "Ten qualities against ten degradations", text, {"scene-clip": found})


def trained(path: str) -> str:
    """How long the weights were trained when they were measured, where provenance lies beside them."""
    import json

    file = Path(path) / "provenance.json"
    if not file.exists():
        return ""
    facts = json.loads(file.read_text())
    return f"\nWeights after {facts['steps']} steps, {facts['minutes']:g} of {facts['horizon_minutes']:g} minutes of training.\n"


def measure(
    score: Callable[[Tensor], Tensor],
    scenes: list[Scene],
    severities: tuple[float, ...] = SEVERITIES,
    seed: int = 41,
) -> dict[str, Any]:
    """Drops of mean q, `drops[degradation][metric]` over all severities, each metric's ratio own : largest other, and
    `graded[kind]`: its own drop at each severity. `score` gives q (B, 10) of pictures (B, 3, 64, 64) in 0..1."""
    import numpy as np
    import torch

    from experiments.training.degrade import KINDS, complete_all, spoil_scenes

    drawn = complete_all(scenes, np.random.default_rng(seed))
    clean = None
    drops = torch.zeros(len(KINDS), len(KINDS))
    graded: dict[str, list[float]] = {}
    for i, kind in enumerate(KINDS):
        each = []
        for severity in severities:
            # The same seed each time: the same jitter of the objects, so clean is one set of pictures for all.
            wanted = [{kind: severity}] * len(drawn)
            before, after, _ = spoil_scenes(drawn, wanted, np.random.default_rng(seed + 1))
            clean = score(before).mean(0) if clean is None else clean
            each.append(clean - score(after).mean(0))
        drops[i] = torch.stack(each).mean(0)
        graded[kind] = [round(float(d[i]), 4) for d in each]
    assert clean is not None
    ratios, rivals = {}, {}
    for i, kind in enumerate(KINDS):
        others = drops[:, i].abs().clone()
        others[i] = -1
        ratios[kind] = float(drops[i, i] / others.max().clamp(min=1e-4))
        rivals[kind] = KINDS[int(others.argmax())]

    def named(values: Tensor) -> dict[str, float]:
        return {k: round(float(v), 4) for k, v in zip(KINDS, values, strict=True)}

    return {
        "clean": named(clean),
        "drops": {kind: named(row) for kind, row in zip(KINDS, drops, strict=True)},
        "severities": list(severities),
        "graded": graded,
        "ratio": {k: round(v, 2) for k, v in ratios.items()},
        "rival": rivals,
    }


def table(found: dict[str, Any], count: int, model: str | None) -> str:
    kinds = list(found["drops"])
    graded = ", ".join(f"{s:g}" for s in found["severities"])
    what = model or "the embedded CLIP (`relay/weights/scene-clip`)"
    lines = [
        f"q(I, m) = sigmoid(CLIP(I, m+) - CLIP(I, m-)) over {what}, {count} held-out test scenes. Rows: what was done to",
        f"the pictures, mean over severities {graded}; columns: how far the mean of each metric fell below that of the",
        "clean pictures. Bold: a metric's own degradation.",
        "",
        "| degradation | " + " | ".join(kinds) + " |",
        "| --- |" + " --- |" * len(kinds),
    ]
    for kind in kinds:
        cells = [f"**{v:.3f}**" if m == kind else f"{v:.3f}" for m, v in found["drops"][kind].items()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| clean: mean q | " + " | ".join(f"{v:.3f}" for v in found["clean"].values()) + " |")
    lines.append("| own / largest other | " + " | ".join(f"{found['ratio'][k]:.1f}" for k in kinds) + " |")
    lines += ["", "A metric's own drop, by severity:", ""]
    lines += ["| severity | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for i, severity in enumerate(found["severities"]):
        lines.append(f"| {severity:g} | " + " | ".join(f"{found['graded'][k][i]:.3f}" for k in kinds) + " |")
    weak = [f"{k} ({found['ratio'][k]:.1f}, beside {found['rival'][k]})" for k in kinds if found["ratio"][k] < GOAL]
    verdict = f"Metrics that do not separate {GOAL:g}x: {'; '.join(weak) if weak else 'none'}."
    return "\n".join([*lines, "", verdict]) + "\n"


if __name__ == "__main__":
    typer.run(main)
