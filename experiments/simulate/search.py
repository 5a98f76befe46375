"""Random search of every learner's settings, on validation prompts: as many configurations and interactions for each.

The first configuration is the one that the config gives; the others are drawn from the contender's space. What is found
is written beside the config and committed before any test request is run; every tried configuration is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.simulate.scheduling import PLAIN, Bench, Contender, Range
from relay.errors import BadRequest
from relay.files import write_atomically

Said = Callable[[str], None]


def drawn(contender: Contender, configurations: int, seed: int) -> list[dict[str, Any]]:
    """The configurations to try, as options over the given ones."""
    found: list[dict[str, Any]] = [{}]
    rng = np.random.default_rng(seed)
    while len(found) < configurations:
        found.append({key: _draw(space, rng) for key, space in contender.space.items()})
    return found


def _draw(space: Range | list[Any], rng: np.random.Generator) -> Any:
    if isinstance(space, list):
        return space[int(rng.integers(len(space)))]
    if space.log:
        value = float(math.exp(rng.uniform(math.log(space.low), math.log(space.high))))
    else:
        value = float(rng.uniform(space.low, space.high))
    return round(value) if space.whole else float(f"{value:.3g}")


def search(bench: Bench, folder: Path, only: list[str] | None, say: Said) -> dict[str, Any]:
    """Tune every contender that learns; what was tried before is read from `folder`. Returns contender -> what was found."""
    config, found = bench.config, {}
    names = [n for n, c in config.contenders.items() if c.space and (not only or n in only)]
    if not names:
        raise BadRequest("no contender has a `space` to search")
    for name in names:
        contender = config.contenders[name]
        tried: list[dict[str, Any]] = []
        for number, options in enumerate(drawn(contender, config.search.configurations, config.search.seed)):
            reward = _tried(bench, folder, name, contender.options | options)
            tried.append({"options": options, "reward": reward})
            say(f"{name} {number + 1}/{config.search.configurations}: {np.mean(reward):.4f} {options}")
        best = max(tried, key=lambda each: float(np.mean(each["reward"])))
        found[name] = {"options": best["options"], "reward": float(np.mean(best["reward"])), "tried": tried}
    return found


def _tried(bench: Bench, folder: Path, name: str, options: dict[str, Any]) -> list[float]:
    """Mean reward a seed."""
    how, config = bench.config.search, bench.config
    path = folder / "search" / name / f"{bench.digest(name, PLAIN, options)}-{how.learn}-{how.requests}.json"
    kept: dict[str, float] = json.loads(path.read_text())["reward"] if path.exists() else {}
    for seed in how.seeds:
        if str(seed) in kept:
            continue
        _, rows, _ = bench.run(name, seed, config.splits[1], how.learn, how.requests, options=options)
        kept[str(seed)] = float(np.mean([row.reward for row in rows if row.reward is not None]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"options": options, "reward": kept}) + "\n")
    return [kept[str(seed)] for seed in how.seeds]


def write_tuned(bench: Bench, found: dict[str, Any], out: Path) -> None:
    """What the table reads, every tried configuration with its reward."""
    split = bench.config.splits[1]
    head = f"# Written by `python -m experiments.simulate tune`: settings chosen on {split} prompts, before test.\n"
    how = bench.config.search
    kept = msgspec.yaml.decode(out.read_bytes())["contenders"] if out.exists() else {}
    said = {
        "searched": {
            "config": bench.config.name, "split": split, "configurations": how.configurations,
            "learn": how.learn, "requests": how.requests, "seeds": how.seeds,
        },
        "contenders": kept | found,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, head.encode() + msgspec.yaml.encode(said))
