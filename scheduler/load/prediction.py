"""Predicted quality of each level for a prompt: linear in what the prompt's words and the router say of it, calibrated.

The measured levels of a family lie in one JSON: per level its mean measured quality, and how to predict it for a prompt. It
is fitted on train rows of the outcome store, its ridge penalty and whether the router's word is worth having are chosen on
validation, where it is calibrated too, and it says how well it does there (`python -m experiments.load levels`). A family
without one cannot be planned for.

Inputs: the counts of `scheduler.features.PROMPT`, and where a router has read the prompt its predicted quality of each
mode and metric and the two advantages over edge-only. Both sets of weights are kept: without a router it does with less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from relay.errors import BadRequest
from relay.program import Program
from scheduler.features import PROMPT, read_features
from scheduler.load.expected import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scheduler.router.router import Prediction

WEIGHTS = Path(__file__).parent / "weights"
FORMAT = "relay-levels-1"


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """quality = clip(intercept + coefficients (levels, inputs) @ (x - mean) / scale, 0, 1)."""

    mean: list[float]
    scale: list[float]
    coefficients: list[list[float]]
    intercept: list[float]

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Predicted quality (N, levels) from inputs (N, inputs)."""
        scaled = (x - np.asarray(self.mean)) / np.asarray(self.scale)
        return np.asarray(np.clip(scaled @ np.asarray(self.coefficients).T + np.asarray(self.intercept), 0.0, 1.0))


class MeasuredLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A level and its measured quality, mean over prompts of the validation split. `skipped`: steps a cached latent spares."""

    program: str
    quality: float
    skipped: int = 0

    @property
    def work(self) -> Work:
        return Work(Program.parse(self.program), self.skipped)


class Levels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A family's levels. `sample`: predicted qualities of validation prompts (N, levels), rounded: what is asked before
    enough has come. `metric`: the outcome store's score that is called quality; `router`: the metric set whose router's
    word `with_router` takes, and its version."""

    format: str
    family: str
    metric: str
    levels: list[MeasuredLevel]
    prompt_only: Linear
    with_router: Linear | None
    router: str | None
    router_version: str | None
    sample: list[list[float]]
    provenance: dict[str, Any]

    @property
    def from_noise(self) -> Levels:
        """Without those that begin from cached latents, which come last."""
        count = sum(not level.skipped for level in self.levels)

        def of(linear: Linear) -> Linear:
            return msgspec.structs.replace(
                linear, coefficients=linear.coefficients[:count], intercept=linear.intercept[:count]
            )

        return msgspec.structs.replace(
            self, levels=self.levels[:count], prompt_only=of(self.prompt_only),
            with_router=self.with_router and of(self.with_router), sample=[row[:count] for row in self.sample],
        )  # fmt: skip

    def predict(self, prompts: Sequence[str], said: Prediction | None = None) -> NDArray[np.float64]:
        """Predicted quality (N, levels). `said`: what a router said of these prompts."""
        words = prompt_inputs(prompts)
        if said is None or self.with_router is None:
            return self.prompt_only(words)
        inputs = np.concatenate([words, router_inputs(said)], axis=1)
        if inputs.shape[1] != len(self.with_router.mean):  # another metric set's router
            return self.prompt_only(words)
        return self.with_router(inputs)


def prompt_inputs(prompts: Sequence[str]) -> NDArray[np.float64]:
    """(N, len(PROMPT))."""
    return np.array([[found[name] for name in PROMPT] for found in map(read_features, prompts)])


def router_inputs(said: Prediction) -> NDArray[np.float64]:
    """(N, 3 M + 2): predicted quality of each mode and metric, advantages of full-cloud and relay."""
    return np.concatenate([said.quality.reshape(len(said), -1), said.advantage[:, :2]], axis=1)


def shipped(family: str) -> Path:
    """Where the levels of a family lie that come with the package."""
    return WEIGHTS / f"{family}.json"


def read_levels(path: Path, family: str | None = None) -> Levels:
    """BadRequest, in one line, on a file that is missing, damaged, of another version or another family's."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Levels)
    except OSError as error:
        said = error.strerror or "unreadable"
        raise BadRequest(
            f"no measured levels in {path} ({said}): `python -m experiments.load levels` makes them"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is damaged or of another version: {error}") from None
    if found.format != FORMAT:
        raise BadRequest(f"{path} is of version {found.format!r}, this one reads {FORMAT}")
    if family is not None and found.family != family:
        raise BadRequest(f"{path} holds the levels of {found.family}, not of {family}")
    count = len(found.levels)
    rows = [*found.sample, *([found.prompt_only.intercept] if count else [])]
    if not count or not found.sample or any(len(row) != count for row in rows):
        raise BadRequest(f"{path} is damaged: its rows do not fit its {count} levels")
    return found
