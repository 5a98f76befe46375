"""`relay explain`: what the token-level router makes of a prompt, and which of its tokens decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay.errors import BadRequest

if TYPE_CHECKING:
    from scheduler.router.budget import Budget
    from scheduler.router.router import Prediction, Router, RouterDecision


def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    family: Annotated[list[str] | None, typer.Option(help="One or several; default: mini-sd3.")] = None,
    metrics: Annotated[str | None, typer.Option(help="clip | scene; default: configs/router.yaml's.")] = None,
    full: Annotated[float | None, typer.Option(help="Largest share of full-cloud.", min=0, max=1)] = None,
    relay: Annotated[float | None, typer.Option(help="Largest share of relay; 0: two-way.", min=0, max=1)] = None,
    epsilon: Annotated[float | None, typer.Option(help="Promise a mean loss to full-cloud of at most this.")] = None,
    delta: Annotated[float, typer.Option(help="With --epsilon: the promise may fail with this probability.")] = 0.1,
    weights: Annotated[list[Path] | None, typer.Option(help="Trained weights instead of the shipped ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a prompt as the router sees it: selected tokens per metric, predicted quality per mode, the budget's threshold
    and the decision."""
    if not prompt.strip():
        raise BadRequest("the prompt is empty: say what to draw")
    _quiet()
    from scheduler.router.budget import Budget
    from scheduler.router.router import Router
    from scheduler.router.settings import METRIC_SETS, read_settings

    if metrics is not None and metrics not in METRIC_SETS:
        raise BadRequest(f"--metrics {metrics}: choose one of {', '.join(METRIC_SETS)}")
    router = Router.load(list(weights) if weights else (family or ["mini-sd3"]), metrics)
    own = read_settings().budget
    budget = Budget(full=own.full if full is None else full, relay=own.relay if relay is None else relay)
    promise = None if epsilon is None else router.promise(epsilon, delta)
    said = router.predict([prompt])
    decision = router.choose(said, budget, promise=promise)
    if as_json:
        print(json.dumps(_facts(prompt, said, decision, budget, router), indent=1))
    else:
        _print(prompt, said, decision, budget, router)


def _quiet() -> None:
    """Without importing diffusers, which takes as long as all else here."""
    import logging

    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def _facts(prompt: str, said: Prediction, decision: RouterDecision, budget: Budget, router: Router) -> dict[str, Any]:
    import msgspec

    from scheduler.router.model import PAIRS
    from scheduler.router.settings import MODES

    per_metric = {
        metric: {
            "tokens": [said.tokens[0][at] for at in said.selected(0, metric)],
            "quality": {mode: round(float(said.quality[0, k, i]), 4) for k, mode in enumerate(MODES)},
            "D": {f"{MODES[a]} over {MODES[b]}": round(float(said.d[0, i, k]), 4) for k, (a, b) in enumerate(PAIRS)},
        }
        for i, metric in enumerate(said.metrics)
    }
    return {
        "prompt": prompt, "families": list(said.families), "tokens": said.tokens[0], "metrics": per_metric,
        "budget": msgspec.to_builtins(budget), "decision": msgspec.to_builtins(decision),
        "programs": {each.card.family: each.card.programs for each in router.trained},
    }  # fmt: skip


def _print(prompt: str, said: Prediction, decision: RouterDecision, budget: Budget, router: Router) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from scheduler.router.settings import MODES

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(_coloured(prompt, said))
    console.print()
    table = Table(box=None, header_style="bold")
    for column in ("metric", *MODES, "D"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    table.add_column("selected tokens, strongest first")
    for i, metric in enumerate(said.metrics):
        quality = [f"{q:.3f}" for q in said.quality[0, :, i]]
        tokens = _words(said.tokens[0], said.selected(0, metric)) or "(across families)"
        table.add_row(metric.removeprefix("q_"), *quality, f"{said.d[0, i, 0]:.2f}", escape(tokens))
    mean = [f"{decision.quality[mode]:.3f}" for mode in MODES]
    table.add_row(
        "[bold]weighted mean[/bold]", *mean, f"{decision.prs:.2f}", "D: edge-only against full-cloud, 1/2 is alike"
    )
    console.print(table)
    console.print()
    if len(said.families) > 1:
        best = ", ".join(f"{mode} {decision.family[mode]}" for mode in MODES)
        console.print(f"best family     {best}", highlight=False)
    console.print(f"budget          full-cloud <= {budget.full:.0%}, relay <= {budget.relay:.0%}", highlight=False)
    console.print(
        f"threshold       alpha {decision.alpha:.3f} on PRS {decision.prs:.3f}; prices: full-cloud"
        f" {decision.prices.full:.3f}, relay {decision.prices.relay:.3f}",
        highlight=False,
    )
    console.print(f"decision        [bold]{decision.mode}[/bold]: {decision.reason}", highlight=False)
    if decision.promise:
        console.print(f"promise         {decision.promise}", highlight=False)
    weights = ", ".join(f"{name} {version}" for name, version in decision.versions.items())
    console.print(f"[dim]router {weights}[/dim]", highlight=False)


def _coloured(prompt: str, said: Prediction) -> Any:
    """The prompt, each token the warmer the more metrics selected it."""
    from rich.text import Text

    counts: dict[int, int] = {}
    for metric in said.metrics:
        for at in said.selected(0, metric):
            counts[at] = counts.get(at, 0) + 1
    text = Text(prompt)
    for at, count in counts.items():
        first, last = said.spans[0][at]
        share = count / len(said.metrics)
        text.stylize("bold red" if share > 2 / 3 else "bold yellow" if share > 1 / 3 else "cyan", first, last)
    return text


def _words(tokens: Sequence[str], places: Sequence[int]) -> str:
    """Tokens as a person reads them: a byte-pair encoder's end-of-word mark is no part of the word."""
    return " · ".join(tokens[at].removesuffix("</w>").lstrip("▁Ġ") for at in places)
