"""The report of a comparison: Markdown, JSON beside it, and two pictures, with where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from experiments.provenance import write_result
from experiments.routing import tables
from experiments.routing.config import Comparison
from experiments.routing.drawings import dp_against_cost, dp_against_share
from relay.files import write_atomically

SHOWN = {"dp": "routing: dP against the share sent to the large member", "cost": "routing: dP against mean cost"}


def write_page(out: Path, families: list[dict[str, Any]], comparison: Comparison) -> None:
    """`out` with tables, the same name with .json, and OUT-dp.png and OUT-cost.png."""
    pictures = {"dp": dp_against_share(families)}
    if all(found["three_way"] for found in families):
        pictures["cost"] = dp_against_cost(families)
    parts = [_opening(families, comparison)]
    for found in families:
        parts += _section(found, comparison)
    parts += [f"![{SHOWN[name]}]({out.stem}-{name}.png)\n" for name in pictures]
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(out.with_name(f"{out.stem}-{name}.png"), picture)
    data = {f"{found['family']}, {found['metric_set']}": found for found in families}
    data["config"] = msgspec.to_builtins(comparison)
    write_result(out, "Routing", "\n".join(parts), data)


def _opening(families: list[dict[str, Any]], comparison: Comparison) -> str:
    on = families[0]["on"]
    return (
        f"Two-way routing as RouteT2I has it (arXiv 2411.13787): cloud = the family's large member alone, edge = its small"
        f" member alone, {comparison.share:.0%} of the {on} prompts sent to the large member, exactly, for every router;"
        " ties are broken by chance. dP = mean over metrics of (q(route) - q(small)) / |q(large) - q(small)| in per cent;"
        " a metric that the large member loses counts against sending to it, so that sending all is not 100.\n\n"
        f"Figures are means over {comparison.seeds} seeds, in brackets 95 % intervals redrawn over seeds and prompts (gaps"
        f" anew in each draw). Every learner tried {comparison.tries} settings on the validation prompts, judged by its mean"
        " dP over all shares; test outcomes were read by this table only. A metric is outside noise where the 95 % interval"
        f" of its gap does not hold zero, on train and validation prompts and on the {on} prompts too, whose gap is the"
        " denominator. One picture per prompt and mode (one seed), so the"
        " oracles see the luck of a seed, which no router can. Adapted: no BERT weights are at hand; a small Transformer on"
        " the family's own frozen text encoder stands in their place (experiments/routing/baselines/learned.py). The token-level"
        " router's defaults, one of its tries, had been chosen on train and validation prompts before (docs/router.md).\n"
    )


def _section(found: dict[str, Any], comparison: Comparison) -> list[str]:
    measured = found["prompts"]
    counts = f"{measured['train']} train, {measured['validation']} validation, {measured['test']} test prompts"
    title = (
        f"## {found['family']}, {tables.SETS[found['metric_set']]}\n\n{counts}. Outside noise: {len(found['clear'])}"
    )
    parts = [f"{title} of {len(found['metrics'])}.\n", tables.gap_table(found) + "\n"]
    parts += [f"### Quality at {comparison.share:.0%}\n", tables.quality_table(found) + "\n"]
    parts += [
        "### Cost saving, %, at a dP over the metrics outside noise"
        + (" [the paper's]\n" if found["metric_set"] == "clip" else "\n"),
        tables.savings_table(found) + "\n",
    ]
    if found["three_way"]:
        parts += [
            "### Two ways against three at equal budgets of mean cost\n",
            "dP over the metrics outside noise at a mean cost of at most so much of full-cloud's (cost = steps x measured"
            " seconds of a step); \"no router\" mixes the modes by chance, in the best shares that the train prompts"
            " show.\n",
            tables.three_way_table(found) + "\n",
        ]  # fmt: skip
    return [*parts, "### How they were fitted\n", tables.capped_table(found) + "\n"]
