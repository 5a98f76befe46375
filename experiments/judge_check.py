"""Can the scene judge be believed? Its accuracy on true renders, and its agreement with a person on generated images.

Accuracy: held-out scenes of which everything is known, as rendered and after the families' VAE. Agreement: images that
the embedded families made, labelled by looking at them without the prompt; a label that was left open because the
picture is unclear is not compared.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from relay.scenes.detector import Seen
    from relay.scenes.language import Scene

LABELLED = Path(__file__).parent.parent / "tests" / "data" / "labelled"
OBJECT = ("shape", "colour", "texture", "size")
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/judge.md"
    ),
    prompts: Annotated[int, typer.Option(help="Held-out test scenes, spread evenly over the classes.")] = 2000,
    labelled: Annotated[Path, typer.Option(help="Folder of images with their labels.json.")] = LABELLED,
) -> None:
    """Measure accuracy and agreement; write the tables."""
    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    found: dict[str, Any] = accuracy(prompts)
    found["a person's labels of generated images"] = agreement(labelled)
    write_result(out, "The scene judge", table(found, prompts), found)


def accuracy(count: int) -> dict[str, dict[str, list[int]]]:
    """Right and asked per attribute, on clean renders and on their VAE reconstructions."""
    import numpy as np
    import torch

    from relay.family import Family
    from relay.scenes.judge import judge
    from relay.scenes.render import render
    from relay.scenes.sampling import complete, held_out

    rng = np.random.default_rng(53)
    scenes = [complete(scene, rng) for scene in held_out(count, "test", seed=1)]
    images = render(scenes, rng)
    vae = Family.load("mini-sd3").vae
    with torch.inference_mode():
        decoded = torch.cat([vae.decode(vae.encode(chunk).latents).sample for chunk in images.split(50)])
    found = {}
    for label, pictures in (("clean renders", images), ("VAE reconstructions", decoded)):
        right, asked = Counter[str](), Counter[str]()
        for verdict in judge(pictures.float(), scenes):
            for kind, (r, a) in verdict.parts.items():
                right[kind] += r
                asked[kind] += a
        found[label] = {kind: [right[kind], asked[kind]] for kind in asked}
    return found


def agreement(folder: Path) -> dict[str, list[int]]:
    """Where judge and person say the same of an image, per attribute; presence is asked of each of the nine cells."""
    labels = json.loads((folder / "labels.json").read_text())
    names = sorted(labels)
    found: dict[str, list[int]] = {}
    for name, seen in zip(names, see(folder, names), strict=True):
        for kind, same in compared(labels[name], seen):
            so_far = found.setdefault(kind, [0, 0])
            so_far[0] += same
            so_far[1] += 1
    return found


def see(folder: Path, names: list[str]) -> list[Seen]:
    """What the judge sees in these image files."""
    import numpy as np
    import torch
    from PIL import Image

    from relay.scenes.detector import load_detector

    pixels = np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
    images: Tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return load_detector().see(images)


def compared(label: dict[str, Any], seen: Seen) -> list[tuple[str, bool]]:
    """(attribute, same) for all that the person could say. A label: background, objects {place: attributes}, word, ink."""
    from relay.scenes.vocabulary import PLACES

    pairs = []
    if label.get("background"):
        pairs.append(("background", label["background"] == seen.background))
    if label.get("word") is not None:
        pairs.append(("letters in number", len(label["word"]) == len(seen.word)))
        pairs += [("letter", a == b) for a, b in zip(label["word"], seen.word, strict=False) if a != "?"]
    if label.get("ink"):
        pairs.append(("ink", label["ink"] == seen.ink))
    if "objects" in label:
        there = {group.place: group for group in seen.objects}
        for place in PLACES:
            mine, its = label["objects"].get(place), there.get(place)
            pairs.append(("presence", (mine is None) == (its is None)))
            if mine and its:
                pairs += [(kind, mine[kind] == getattr(its, kind)) for kind in OBJECT if mine.get(kind)]
    return pairs


def table(found: dict[str, dict[str, list[int]]], prompts: int) -> str:
    """One row an attribute, one column a measure."""
    kinds = list(dict.fromkeys(kind for column in found.values() for kind in column if kind != "extra"))
    lines = [
        f"Share of attributes right on {prompts} held-out test scenes, as rendered and after the VAE; and on"
        f" {len(list(LABELLED.glob('*.png')))} images that the embedded families generated, share on which judge and a"
        " person agree (in brackets: how many were compared).",
        "",
        "| attribute | " + " | ".join(found) + " |",
        "| --- |" + " --- |" * len(found),
    ]
    for kind in kinds:
        counts = [column.get(kind) for column in found.values()]
        cells = [f"{c[0] / c[1]:.4f} ({c[1]})" if c else "" for c in counts]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    totals = [[sum(v[i] for k, v in c.items() if k != "extra") for i in (0, 1)] for c in found.values()]
    lines.append("| all | " + " | ".join(f"{r / n:.4f} ({n})" for r, n in totals) + " |")
    return "\n".join(lines) + "\n"


@app.command()
def draw(
    out: Annotated[Path, typer.Option(help="Folder for the images and a numbered sheet to label from.")] = LABELLED,
    count: int = 100,
) -> None:
    """Generate validation prompts with both families (full-cloud and relays in turn), to be labelled by eye."""
    import numpy as np

    from experiments.contact_sheet import Cell, contact_sheet
    from relay.pipeline import RelayPipeline
    from relay.scenes.sampling import caption, held_out

    out.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = held_out(count, "validation", seed=2)
    rng = np.random.default_rng(59)
    order = rng.permutation(count)
    cells = []
    for number, i in enumerate(order):
        family = ("mini-sd3", "mini-sdxl")[number % 2]
        pipe = RelayPipeline.from_pretrained(family)
        steps = pipe.family.spec.members["large"].steps
        handoff = (steps, steps // 2, steps, steps // 3)[number // 2 % 4]
        image = pipe(caption(scenes[i], rng), handoff=handoff, seed=int(i)).images[0]
        image.save(out / f"{number:03d}.png")
        cells.append(Cell(image, f"{number:03d}"))
    for at in range(0, count, 20):
        rows = [("", cells[row : row + 5]) for row in range(at, min(at + 20, count), 5)]
        contact_sheet("", [""] * 5, rows).save(Path("out") / f"label-{at:03d}.png")


if __name__ == "__main__":
    app()
