"""Writes the report: the page, and every figure as PNG and CSV beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.provenance import provenance
from experiments.report.data import Group, read_groups
from experiments.report.labels import short_link
from experiments.report.results import result_section
from experiments.report.sections import Section, all_sections
from experiments.report.tables import summary_rows
from experiments.run_folder import Run, open_run
from relay.files import write_atomically

HERE = Path(__file__).parent


def write_report(
    folders: Sequence[Path], out: Path | None = None, title: str | None = None, results: Sequence[Path] = ()
) -> Path:
    """Report these run folders in `out` (default: `report` in the first): report.html and figures/; the page's path.

    `results`: Markdown files of measured tables, each a section behind the runs' own. BadRequest where a folder is no run,
    no run has a quality row, or a result cannot be read.
    """
    shown = [result_section(path) for path in results]
    runs = [open_run(folder) for folder in folders]
    groups = read_groups(runs)
    sections = all_sections(groups) + shown
    target = out or runs[0].folder / "report"
    figures = target / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for chart in section.charts:
            write_atomically(figures / f"{chart.name}.png", chart.png)
            if chart.rows:
                _write_csv(figures / f"{chart.name}.csv", chart.rows)
        for grid in section.grids:
            write_atomically(figures / f"pictures-{grid.slug}.png", grid.sheet)
    _write_csv(figures / "summary.csv", [row for group in groups for row in summary_rows(group)])
    write_atomically(target / "report.html", render(title or _title(runs), runs, groups, sections))
    return target / "report.html"


def render(title: str, runs: list[Run], groups: list[Group], sections: list[Section]) -> str:
    """The page as HTML; all text from runs is escaped, charts alone are not."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=title, style=Markup((HERE / "style.css").read_text()), sections=sections, facts=_facts(runs, groups),
        descriptions=list(dict.fromkeys(filter(None, (run.config.get("description") for run in runs)))),
        origins=[_origin(run) for run in runs], made=provenance(),
    )  # fmt: skip


def _title(runs: list[Run]) -> str:
    return " and ".join(dict.fromkeys(run.config["name"] for run in runs))


def _facts(runs: list[Run], groups: list[Group]) -> list[tuple[str, str]]:
    """What was run, as a few lines."""

    def joined(values: Any) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    steps: dict[int, list[str]] = {}
    for group in groups:
        steps.setdefault(group.steps_total, []).append(group.family)
    one = len(steps) == 1
    prompts = joined(
        f"{len(g.prompts)} {g.split} prompts of {g.workload}" + (f" × {g.seeds} seeds" if g.seeds > 1 else "")
        for g in groups
    )
    return [
        ("families", joined(g.family for g in groups)),
        ("prompts", prompts),
        ("T", joined(steps) if one else "; ".join(f"{t} ({joined(names)})" for t, names in steps.items())),
        (
            "metrics",
            joined(
                name.removeprefix("score_").replace("_", " ") for g in groups for e in g.entries for name in e.scores
            ),
        ),
        ("links", joined(short_link(link) for g in groups for link in g.links) or "not timed"),
        ("computed in", joined(filter(None, (run.dtype for run in runs))) or "not told"),
        ("rows", str(sum(run.outcomes.height for run in runs))),
    ]


def _origin(run: Run) -> dict[str, Any]:
    """Where a run's rows come from; a run may have been continued elsewhere, so machines are read from its rows."""
    facts = run.facts["provenance"]
    machines = [
        *run.outcomes["machine"].drop_nulls().unique().sort(),
        *run.times["machine"].drop_nulls().unique().sort(),
    ]
    return {
        "name": run.config["name"], "hash": run.config_hash, "folder": run.folder.name, "dtype": run.dtype,
        "config": json.dumps(run.config, indent=1, ensure_ascii=False), "command": facts["command"],
        "commits": ", ".join(run.outcomes["commit"].drop_nulls().unique().sort()) or facts["commit"], "date": facts["date"],
        "machines": "; ".join(dict.fromkeys(machines)) or facts["processor"],
        "threads": ", ".join(map(str, run.times["threads"].drop_nulls().unique().sort())) or str(facts["threads"]),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "weights": ", ".join(f"{Path(name).stem} {digest}" for name, digest in run.facts.get("weights", {}).items()),
    }  # fmt: skip


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())
