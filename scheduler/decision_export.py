"""A decision log for other tools: parquet, a row a decision, and dsjson, what Vowpal Wabbit's own tools read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relay.errors import BadRequest
from relay.files import replacing
from scheduler.decision_log import Entry
from scheduler.features import ACTION, CONTEXT, featurise

KINDS = (".parquet", ".dsjson")


def export(entries: Iterable[Entry], path: Path, time_scale_s: float = 1.0) -> int:
    """Write decisions into a .parquet or .dsjson file, which appears whole or not at all; how many."""
    if path.suffix not in KINDS:
        raise BadRequest(f"{path}: a log is exported as {' or '.join(KINDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return (_parquet if path.suffix == ".parquet" else _dsjson)(entries, path, time_scale_s)


def _parquet(entries: Iterable[Entry], path: Path, time_scale_s: float) -> int:
    """`c_*` and `a_*`: features of the context and of the chosen action; `term_*`: of the reward. Null: missing."""
    try:
        import polars as pl
    except ImportError:
        raise BadRequest(f"{path}: parquet needs polars: pip install 'relay-inference[experiments]'") from None
    rows = []
    for each in entries:
        features, action = featurise(each.context, each.actions, time_scale_s), each.actions[each.chosen]
        rows.append(
            {
                "id": each.id, "at": datetime.fromtimestamp(each.at, UTC), "job": each.context.job,
                "attempt": each.context.attempt, "policy": each.policy, "family": action.program.family,
                "mode": action.program.mode, "program": str(action.program), "nodes": list(action.nodes),
                "actions": [str(one) for one in each.actions], "chosen": each.chosen, "probability": each.probability,
                "distribution": each.distribution, "marks": list(each.marks), "router": each.router,
                "bandit": each.bandit, "stage": each.stage, "seconds": each.seconds, "error": each.error,
                "missing": list(each.missing), "reward": each.reward,
            }
            | {f"c_{name}": float(value) for name, value in zip(CONTEXT, features.context, strict=True)}
            | {f"a_{name}": float(value) for name, value in zip(ACTION, features.actions[each.chosen], strict=True)}
            | {f"term_{name}": value for name, value in each.terms.items() if isinstance(value, (int, float))}
        )  # fmt: skip
    columns = list(dict.fromkeys(name for row in rows for name in row))
    frame = pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], infer_schema_length=None)
    with replacing(path) as partial:
        frame.write_parquet(partial)
    return len(rows)


def _dsjson(entries: Iterable[Entry], path: Path, time_scale_s: float) -> int:
    count = 0
    with replacing(path) as partial, partial.open("w") as file:
        for each in entries:
            file.write(json.dumps(as_dsjson(each, time_scale_s), allow_nan=False, separators=(",", ":")) + "\n")
            count += 1
    return count


def as_dsjson(entry: Entry, time_scale_s: float = 1.0) -> dict[str, Any]:
    """One decision as dsjson, cost = -reward. The chosen action stands first in `a` and `p`; a decision without a reward
    has no label, and one whose distribution is not known has only its own probability."""
    features = featurise(entry.context, entry.actions, time_scale_s)
    others = [i for i in range(len(entry.actions)) if i != entry.chosen and entry.distribution is not None]
    order = [entry.chosen, *others]
    actions = [
        {"A": _said(ACTION, row) | dict.fromkeys(names, 1)}
        for row, names in zip(features.actions, features.labels, strict=True)
    ]
    found: dict[str, Any] = {}
    if entry.reward is not None:
        found = {
            "_label_cost": -entry.reward, "_label_probability": entry.probability, "_label_Action": entry.chosen + 1,
            "_labelIndex": entry.chosen,
        }  # fmt: skip
    return found | {
        "Timestamp": datetime.fromtimestamp(entry.at, UTC).isoformat(), "Version": "1", "EventId": entry.id,
        "a": [i + 1 for i in order], "c": {"C": _said(CONTEXT, features.context), "_multi": actions},
        "p": [entry.probability, *(entry.distribution[i] for i in others if entry.distribution)],
        "VWState": {"m": entry.bandit or ""},
    }  # fmt: skip


def _said(names: Iterable[str], values: Any) -> dict[str, float]:
    return {name: round(float(value), 7) for name, value in zip(names, values, strict=True) if value}
