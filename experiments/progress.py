"""What one sees of a run: how far it is, how long it still takes, and the scores so far."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from nodes.session import progress_bar
from scheduler.outcomes import SCORE

SHOWN = 12  # programs in the summary; more would scroll the bar away


class RunProgress:
    """A bar over prompts with time left and a table of mean scores; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = progress_bar(self.console)
        self.task = self.bar.add_task("prompts", total=None)
        self.scores: dict[str, list[float]] = defaultdict(list)
        self.sizes: dict[str, int] = {}
        self.done = self.units = 0
        self.saved = [0, 0]
        self.live = Live(self.bar, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def begin(self, units: int, done: int, sizes: dict[str, int]) -> None:
        self.sizes, self.units, self.done = sizes, units, done
        self.say(f"{units} units of work, {done} done before")
        self.bar.update(self.task, total=sum(sizes.values()), completed=0)

    def unit(self, name: str, rows: list[dict[str, Any]], drawn: Any) -> None:
        self.done += 1
        self.saved[0] += drawn.sample_steps
        self.saved[1] += drawn.sample_steps_alone
        first = next((key for key in sorted(rows[0]) if key.startswith(SCORE)), None) if rows else None
        first = f"{SCORE}attributes" if rows and f"{SCORE}attributes" in rows[0] else first
        for row in rows:
            if first:
                self.scores[f"{row['program']}"].append(row[first])
        self.bar.advance(self.task, self.sizes[name])
        if self.console.is_terminal:
            self.live.update(Group(self._summary(first or ""), self.bar))
        else:
            self.say(f"unit {self.done} of {self.units} done: {name}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _summary(self, score: str) -> Table:
        table = Table(box=None, header_style="bold")
        table.add_column("program", overflow="ellipsis", no_wrap=True, max_width=70)
        table.add_column(f"mean {score.removeprefix(SCORE)} so far", justify="right")
        table.add_column("rows", justify="right")
        for program, values in list(self.scores.items())[:SHOWN]:
            table.add_row(program, f"{sum(values) / len(values):.3f}", str(len(values)))
        if len(self.scores) > SHOWN:
            table.add_row(f"... and {len(self.scores) - SHOWN} more", "", "")
        return table
