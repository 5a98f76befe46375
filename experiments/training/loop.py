"""One resumable training loop for everything the project trains.

A `Task` says what is trained; `train` walks it for a number of minutes, keeps a checkpoint that a killed run goes on
from, a moving average of the weights, and a curve on disk. Learning rate follows *trained time* over the whole
budget (`total_minutes`), so a run cut into pieces of any length follows the same schedule, and every piece leaves
usable weights. It needs torch alone.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experiments.training.budget import Budget
from relay.files import replacing


class Task(Protocol):
    """What is trained. `modules` are checkpointed, averaged and exported under their names."""

    name: str
    modules: dict[str, nn.Module]
    learning_rate: float
    batch_size: int

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        """Draw batch number `step` (a function of the step alone) and return its loss and figures to log."""
        ...

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Held-out figures of the averaged weights."""
        ...

    def export(self, modules: dict[str, nn.Module], provenance: dict[str, Any]) -> None:
        """Write usable weights from the averaged modules."""
        ...

    def load_shipped(self, weights: Path) -> None:
        """Start from the half-precision weights in a folder instead of from nothing."""
        ...


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def train(task: Task, state_dir: Path, budget: Budget, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train until the piece or the whole budget is over; returns the last validation figures."""
    device = pick_device(budget.device)
    state_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(budget.seed)
    for module in task.modules.values():
        module.to(device).train()
    optimizers = make_optimizers(task)
    average = {name: _copy(module) for name, module in task.modules.items()}
    step, spent = _resume(state_dir / "state.pt", task, optimizers, average, device)
    horizon = budget.total_minutes * 60
    end = horizon if budget.minutes is None else min(horizon, spent + budget.minutes * 60)
    low = autocast_dtype(task, device, step, say) if spent < end else torch.float32
    say(f"{task.name}: step {step}, {spent / 60:.1f} of {budget.total_minutes:g} minutes done, {low} on {device}")
    figures: dict[str, float] = {}
    last_validation = spent
    while spent < end:
        started = time.perf_counter()
        scale = _schedule(spent / horizon)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
        with torch.autocast(device.type, low, enabled=low != torch.float32):
            loss, logs = task.loss(step, device)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_((p for m in task.modules.values() for p in m.parameters()), 2.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{task.name}: the gradient is not finite at step {step}; the last checkpoint stands"
            )
        for optimizer in optimizers:
            optimizer.step()
        _move_average(average, task.modules, step)
        step += 1
        spent += time.perf_counter() - started
        if step % 25 == 0:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in logs.items())
            rate = task.batch_size / (time.perf_counter() - started)
            say(f"{task.name} {spent / 60:6.1f} min  step {step:6d}  loss {loss.item():.4f}  {shown}  {rate:.0f}/s")
            _log(state_dir / "curve.csv", {"step": step, "minutes": spent / 60, "loss": loss.item(), **logs})
        if spent - last_validation > budget.validate_every * 60 or spent >= end:
            last_validation = spent
            figures = _finish_piece(task, average, state_dir, step, spent, optimizers, budget, low)
            say(f"{task.name} {spent / 60:6.1f} min  step {step:6d}  held out: {json.dumps(figures)}")
    return figures


def _finish_piece(
    task: Task,
    average: dict[str, nn.Module],
    state_dir: Path,
    step: int,
    spent: float,
    optimizers: list[torch.optim.Optimizer],
    budget: Budget,
    low: torch.dtype,
) -> dict[str, float]:
    figures = task.validate(average)
    _log(state_dir / "validation.csv", {"step": step, "minutes": spent / 60, **figures})
    _save(state_dir / "state.pt", task, optimizers, average, step, spent)
    provenance = {
        "command": budget.command,
        "seed": budget.seed,
        "steps": step,
        "samples": step * task.batch_size,
        "minutes": round(spent / 60, 1),
        "horizon_minutes": budget.total_minutes,
        "precision": str(low).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": budget.device,
        "figures": {k: round(v, 5) for k, v in figures.items()},
        **budget.extra,
    }
    task.export(average, provenance)
    return figures


def _schedule(progress: float) -> float:
    """Warm-up over 2 %, constant, then a linear fall to 2 % over the second half."""
    if progress < 0.02:
        return max(progress / 0.02, 0.02)
    return 1.0 if progress < 0.5 else max(0.02, (1 - progress) / 0.5)


def make_optimizers(task: Task) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that a task names in `muon_parameters`, AdamW for the rest (AdamW for all before torch 2.9)."""
    chosen: Iterable[nn.Parameter] = getattr(task, "muon_parameters", list)()
    muon = list(chosen) if hasattr(torch.optim, "Muon") else []
    taken = {id(p) for p in muon}
    rest = [p for m in task.modules.values() for p in m.parameters() if p.requires_grad and id(p) not in taken]
    matrices, vectors = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=task.learning_rate,
            betas=(0.9, 0.99),
        )
    ]
    if muon:
        rate = getattr(task, "muon_learning_rate", 2e-3)
        optimizers.append(torch.optim.Muon(muon, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def autocast_dtype(task: Task, device: torch.device, step: int, say: Callable[[str], None]) -> torch.dtype:
    """bf16 or fp32, whichever runs a real step of this task faster on this machine (bf16 is slower on some CPUs)."""
    if device.type == "cuda":
        return torch.bfloat16
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, _ = task.loss(step, device)
            loss.backward()
            times[dtype] = time.perf_counter() - started
    for module in task.modules.values():
        module.zero_grad(set_to_none=True)
    say(f"{task.name}: a step takes {times[torch.float32]:.2f} s in fp32, {times[torch.bfloat16]:.2f} s in bf16")
    return min(times, key=times.__getitem__)


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def _move_average(average: dict[str, nn.Module], modules: dict[str, nn.Module], step: int) -> None:
    weight = 1 - min(0.999, (1 + step) / (20 + step))
    for name, module in modules.items():
        live = [p.data for p in module.parameters()]
        if live:
            torch._foreach_lerp_(list(average[name].parameters()), live, weight)
        for kept, buffer in zip(average[name].buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)


def _save(path: Path, task: Task, optimizers, average, step: int, spent: float) -> None:  # noqa: ANN001
    state = {
        "step": step,
        "spent": spent,
        "modules": {k: m.state_dict() for k, m in task.modules.items()},
        "average": {k: m.state_dict() for k, m in average.items()},
        "optimizers": [o.state_dict() for o in optimizers],
    }
    with replacing(path) as partial:
        torch.save(state, partial)


def _resume(path: Path, task: Task, optimizers, average, device) -> tuple[int, float]:  # noqa: ANN001
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    for name, module in task.modules.items():
        module.load_state_dict(state["modules"][name])
        average[name].load_state_dict(state["average"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["spent"]


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow([f"{v:.6g}" if isinstance(v, float) and math.isfinite(v) else v for v in row.values()])
