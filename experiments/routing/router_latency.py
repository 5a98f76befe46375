"""What a decision of the router costs: tokens, text encoding, network, choice; one prompt at a time, as a gateway asks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np


def decision_times(what: str | Path, metric_set: str | None = None, repeats: int = 100) -> dict[str, Any]:
    """Milliseconds of one decision, text encoding included, over `repeats` different prompts; median and 95th per cent."""
    from experiments.workloads import load_workload
    from scheduler.router.budget import Budget
    from scheduler.router.router import Router

    router = Router.load(what, metric_set)
    reader = router.readers[0]
    budget = Budget(full=0.3, relay=0.4)
    prompts = [prompt.text for prompt in load_workload("scenes").prompts("test", repeats + 5, 1)]
    for prompt in prompts[:5]:
        router.decide(prompt, budget)  # the budget's prices are found once, not per prompt
    spent: dict[str, list[float]] = {"text_encoding": [], "decision": []}
    for prompt in prompts[5:]:
        begun = time.perf_counter()
        reader.read([prompt])
        spent["text_encoding"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        router.decide(prompt, budget)
        spent["decision"].append(time.perf_counter() - begun)
    return {
        f"{part}_{name}_ms": float(np.quantile(values, share) * 1000)
        for part, values in spent.items()
        for name, share in (("median", 0.5), ("p95", 0.95))
    } | {"prompts": repeats}  # fmt: skip
