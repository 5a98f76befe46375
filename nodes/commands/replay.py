"""`relay replay`: what a policy would have earned on a log of decisions; or the log, for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay.errors import BadRequest

if TYPE_CHECKING:
    from scheduler.replay import Report


def replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A gateway's decisions.db.")],
    policy: Annotated[str | None, typer.Option(help="By name: random, greedy, linucb, bandit, ...")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of the policy, such as handoff=0.3 or path=bandit.vw."),
    ] = None,
    interval: Annotated[str, typer.Option(help="normal | bootstrap")] = "normal",
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the log to a .parquet or .dsjson file too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Evaluate a policy on a log of another one's decisions (IPS, SNIPS, doubly robust), without serving a request.

    Refused where the effective sample size is below 50 or the log supports less than 80 % of the policy's choices.
    """
    from relay.program import check_choice
    from scheduler.baselines import load_policy
    from scheduler.decision_export import export as write_export
    from scheduler.decision_log import read_log
    from scheduler.replay import as_dict
    from scheduler.replay import replay as evaluate

    check_choice("interval", interval, ("normal", "bootstrap"))
    if policy is None and export is None:
        raise BadRequest("say which --policy to evaluate, or where to --export the log")
    entries = list(read_log(log))
    if export is not None:
        count = write_export(entries, export)
        if not as_json:
            print(f"{export}: {count} decisions")
    if policy is None:
        return
    report = evaluate(entries, load_policy(policy, **_options(option or [])), interval=interval)
    print(json.dumps(as_dict(report), indent=1) if as_json else _told(report))


def _options(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE; a value that reads as JSON is what it reads as, else text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise BadRequest(f"--option {word}: write KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _told(report: Report) -> str:
    left_out = ", ".join(f"{count} {why}" for why, count in report.left_out.items() if count)
    total = report.rows + sum(report.left_out.values())
    lines = [
        f"policy {report.policy}, on {report.rows} of {total} decisions"
        + (f" (left out: {left_out})" if left_out else ""),
        f"effective sample size {report.effective:.0f}, support {report.support:.1%} (by {report.support_from}), "
        f"weights {report.weight_mean:.2f} on average, {report.weight_most:.1f} at most",
        f"reward a decision, with 95 % intervals ({report.interval}):",
    ]
    names = {"logged": "as it was", "ips": "IPS", "snips": "SNIPS", "dr": "doubly robust"}
    for name, title in names.items():
        each = getattr(report, name)
        lines.append(f"  {title:<14} {each.value:+.4f}  [{each.low:+.4f}, {each.high:+.4f}]")
    lines.append(
        "Contexts are taken as they came: what its choices would have done to later queues is not in these figures."
    )
    return "\n".join(lines)
