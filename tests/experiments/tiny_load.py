"""A small case of load: an outcome store of four levels and a config over it, fitted by the command itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from experiments.load.__main__ import app
from experiments.load.case import Cell
from scheduler.outcomes import write_unit

CURVE = {1: 0.010, 2: 0.013, 4: 0.020, 8: 0.036}
OPTIONS = "match=exact/codec=fp16"
FULL = f"tiny/large:20:0-20/{OPTIONS}/guidance=3/conditioning=encode"
RELAY = f"tiny/large:20:0-8/small:20:8-20/{OPTIONS}/guidance=3,3/conditioning=encode"
FAST = f"tiny/large:20:0-4/small:8:2-8/{OPTIONS}/guidance=3,3/conditioning=encode"
SMALL = f"tiny/small:20:0-20/{OPTIONS}/guidance=3/conditioning=encode"
WORTH = {FULL: (0.9, 0.9), RELAY: (0.89, 0.85), FAST: (0.88, 0.7), SMALL: (0.87, 0.3)}  # of easy and of hard prompts
PLACE = Cell(fleet="three", trace="poisson", load=1.3, deadline=2.0)


def write_load(folder: Path) -> Path:
    """An outcome store of four levels; prompts with letters bear any of them. Levels are fitted from it."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 120), ("validation", 60), ("test", 60)):
        for i in range(count):
            easy = i % 2 == 0
            for text, values in WORTH.items():
                rows.append(
                    {"method": "program", "family": "tiny", "program": text, "split": split, "prompt_index": i, "seed": i,
                     "prompt": f"{split} {i}" + (" with the word 'HI'" if easy else " a red heart and a blue ring"),
                     "complexity": "letters" if easy else "2",
                     "score_attributes": float(np.clip(values[not easy] + 0.02 * rng.standard_normal(), 0, 1))}
                )  # fmt: skip
    write_unit(folder, "outcomes", "all", rows)
    curves = {"large": CURVE, "small": {batch: s / 4 for batch, s in CURVE.items()}}
    node = {
        "edge": {"role": "edge", "families": {"tiny": ["large"]}},
        "phone": {"role": "device", "families": {"tiny": ["small"]}},
    }
    said = {
        "name": "tiny", "family": "tiny", "store": [str(folder)], "levels": str(folder / "tiny.json"), "router": False,
        "requests": 150, "seeds": 2, "elsewhere": {"requests": 50, "seeds": 1}, "long": {"ours": 200},
        "loads": [0.7, 1.3], "deadlines": [2.0], "tuned": str(folder / "tuned.yaml"),
        "fleets": {
            "three": {
                "nodes": {
                    "edge-1": node["edge"], "edge-2": node["edge"] | {"pace": 2.0}, "phone-1": node["phone"],
                    "phone-2": node["phone"] | {"link": "wifi"},
                },
                "timing": {
                    "tiny": {"curves": curves, "encode_s": 0.002, "decode_s": 0.002, "handoff_s": 0.0005,
                             "latent_bytes": 10_000, "image_bytes": 20_000}
                },
                "overhead_s": 0.001,
            }
        },
        "traces": {"poisson": {"arrivals": "poisson"}, "flash": {"arrivals": "flash", "every_s": 10, "crowd_s": 2}},
        "systems": {
            name: {"system": name}
            for name in ("ours", "clipper-ha", "clipper-ht", "proteus", "sommelier", "diffserve", "nirvana")
        } | {"agnostic": {"system": "agnostic", "seeds": 1}, "alike": {"system": "agnostic", "tuned_as": "ours"}},
        "search": {"configurations": 2, "requests": 60, "traces": ["poisson"], "loads": [1.3], "deadlines": [2.0]},
    }  # fmt: skip
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump(said))
    app(["levels", "tiny", "--store", str(folder), "--out", str(folder / "tiny.json")], standalone_mode=False)
    return path
