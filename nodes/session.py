"""What every command that runs a pipeline shares: loading it quietly, and a progress bar over its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from relay.family import FamilySpec, Role
    from relay.pipeline import RelayPipeline


def load_pipeline(spec: FamilySpec, dtype: str | None, device: str | None, role: Role = "all") -> RelayPipeline:
    """A pipeline whose weights load on first use, quietly."""
    quiet_libraries()
    from relay.pipeline import RelayPipeline

    return RelayPipeline.from_pretrained(spec, torch_dtype=dtype, device=device, role=role)


def quiet_libraries() -> None:
    """Progress bars and load reports of libraries would drown our one line a picture."""
    import logging
    import warnings

    from nodes.own_process import without_bars

    without_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("huggingface_hub", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def progress_bar(console: Console | None = None) -> Progress:
    """A bar with time left on stderr, gone when it is done; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def step_progress(label: str):  # noqa: ANN201
    """A context that gives a diffusers-style step callback which moves a progress bar on a terminal's stderr."""
    from contextlib import contextmanager

    @contextmanager
    def bar():
        with progress_bar() as progress:
            task = progress.add_task(label, total=None)

            def advance(pipe: Any, step: int, sigma: float, state: dict[str, Any]) -> dict[str, Any]:
                progress.update(task, total=getattr(pipe, "num_timesteps", None), completed=step + 1)
                return state

            yield advance

    return bar()
