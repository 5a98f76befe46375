"""What an answer was worth: RISE's reward (arXiv 2606.17378, scheduler), every term over a scale of its own.

    r = tanh( sum_m w_m Q_m / scale_m  -  w_time t / scale_t  -  w_memory m_vram / scale_v  -  gamma l_dev / scale_d )

    Q_m      quality scores. RISE: CLIP score, ImageReward, PickScore, Aesthetic, OCR accuracy. Embedded families:
             `scene` (share of what was asked that is right), `words` (whole word right, where RISE has OCR; only for
             prompts that ask for letters) and `clip_own` (the score of our own CLIP, which is not the published one)
    t        seconds from acceptance to the picture at its asker's
    m_vram   megabytes of weights of the members that the program uses
    l_dev    steps that the asker's device makes; RISE does not publish its unit, this is ours

Weights follow the task, as RISE's do: the quality weights are those of `text` where the prompt asks for letters, else of
`general`; w_time goes linearly from `quality` to `speed` with the request's preference; gamma rises where the device's
battery is low. RISE publishes none of the weights: ours, and the scales, lie in configs/reward.yaml, which says where each
comes from. `static()` is the ablation without task-dependent weights.

What is missing is said and never counted as zero: the weights of the quality scores that are there are raised to the same
sum, and without any of them, or without a time, there is no reward. A request that failed has a reward of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from relay.errors import BadRequest
from relay.files import read_yaml
from relay.program import Program
from scheduler.features import LOW_BATTERY
from scheduler.syntax import read_prompt

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "reward.yaml"
COSTS = ("seconds", "memory_mb", "device_steps")

# The outcome store's names of scores, and those of the reward.
SCORES = {"attributes": "scene", "letters": "words", "clip_score": "clip_own"}

Positive = Annotated[float, msgspec.Meta(gt=0)]
Weight = Annotated[float, msgspec.Meta(ge=0)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that nobody reads is a mistake."""


class Tasks(_Strict, frozen=True, kw_only=True):
    """Quality score -> weight."""

    general: dict[str, Weight]
    text: dict[str, Weight]


class TimeWeight(_Strict, frozen=True, kw_only=True):
    quality: Weight  # at preference 0
    speed: Weight  # at preference 1


class DeviceWeight(_Strict, frozen=True, kw_only=True):
    normal: Weight
    low_battery: Weight


class Rewarded(msgspec.Struct, frozen=True, kw_only=True):
    """`value` in -1..1, None where it is missing. `terms`: what each added inside the tanh; `missing`: what was not there."""

    value: float | None
    terms: dict[str, float]
    missing: tuple[str, ...]
    task: str


class Reward(_Strict, frozen=True, kw_only=True):
    """The reward's weights and scales; call it with what is known of an answer."""

    scales: dict[str, Positive]
    tasks: Tasks
    time: TimeWeight
    memory: Weight
    device: DeviceWeight
    memory_mb: dict[str, dict[str, Positive]]  # family -> member -> weights
    failed: Annotated[float, msgspec.Meta(ge=-1, le=1)] = -1.0
    dynamic: bool = True

    def __post_init__(self) -> None:
        names = {name for task in (self.tasks.general, self.tasks.text) for name in task} | set(COSTS)
        if unscaled := sorted(names - set(self.scales)):
            raise BadRequest(f"reward: no scale for {', '.join(unscaled)}")
        if not sum(self.tasks.general.values()) > 0 or not sum(self.tasks.text.values()) > 0:
            raise BadRequest("reward: each task needs a quality score with a weight above 0")

    def __call__(self, known: Mapping[str, Any]) -> float | None:
        """The reward, None where it is missing; see `of`."""
        return self.of(known).value

    def of(self, known: Mapping[str, Any]) -> Rewarded:
        """What an answer was worth, term by term. Reads of `known`:

        scores       name -> value, the store's names or the reward's; those that are not there are missing
        seconds      acceptance to picture
        program      its text, or a Program
        prompt       its text; or `text`, whether it asks for letters
        preference   0 quality .. 1 speed; default 0.5
        battery      of the device, 0..1; device_steps: if not the small member's steps; memory_mb: if not the table's
        stage        "done", or "failed": no picture came. "cancelled" has no reward

        BadRequest on a number that is not finite.
        """
        task = "text" if self.dynamic and _asks_letters(known) else "general"
        stage = known.get("stage", "done")
        if stage == "failed":
            return Rewarded(value=self.failed, terms={}, missing=(), task=task)
        if stage != "done":
            return Rewarded(value=None, terms={}, missing=("picture",), task=task)
        weights = self.tasks.text if task == "text" else self.tasks.general
        scores = {SCORES.get(name, name): value for name, value in (known.get("scores") or {}).items()}
        wanted = {name: weight for name, weight in weights.items() if weight}
        present = {name: _finite(name, scores[name]) for name in wanted if scores.get(name) is not None}
        missing = tuple(name for name in wanted if name not in present)
        share = sum(wanted.values()) / sum(wanted[name] for name in present) if present else 0.0
        terms = {name: share * wanted[name] * value / self.scales[name] for name, value in present.items()}
        if known.get("seconds") is None:
            missing += ("seconds",)
        else:
            terms |= {name: -weight * cost / self.scales[name] for name, weight, cost in self._costs(known)}
        value = math.tanh(sum(terms.values())) if present and "seconds" not in missing else None
        return Rewarded(value=value, terms=terms, missing=missing, task=task)

    def static(self) -> Reward:
        """RISE's ablation "no dynamic reward": one set of weights, `general` at preference 0.5, whatever is asked."""
        return msgspec.structs.replace(self, dynamic=False)

    def time_weight(self, preference: float) -> float:
        asked = min(1.0, max(0.0, _finite("preference", preference))) if self.dynamic else 0.5
        return self.time.quality + (self.time.speed - self.time.quality) * asked

    def _costs(self, known: Mapping[str, Any]) -> list[tuple[str, float, float]]:
        program = known["program"]
        if not isinstance(program, Program):
            program = _program(program)
        steps, memory = known.get("device_steps"), known.get("memory_mb")
        if steps is None:
            steps = program.steps["small"]
        if memory is None:
            memory = self.memory_of(program)
        battery = known.get("battery")
        low = self.dynamic and battery is not None and _finite("battery", battery) < LOW_BATTERY
        return [
            ("seconds", self.time_weight(known.get("preference", 0.5)), _finite("seconds", known["seconds"])),
            ("memory_mb", self.memory, _finite("memory_mb", memory)),
            ("device_steps", self.device.low_battery if low else self.device.normal, _finite("device_steps", steps)),
        ]

    def memory_of(self, program: Program) -> float:
        """Megabytes of weights of the members a program uses, each once."""
        members = self.memory_mb.get(program.family, {})
        try:
            return sum(members[member] for member in {leg.member for leg in program.legs})
        except KeyError as error:
            raise BadRequest(
                f"reward: memory_mb says nothing of {error.args[0]!r} of family {program.family!r}"
            ) from None


def load_reward(path: Path | None = None) -> Reward:
    """The reward of a YAML, default configs/reward.yaml; BadRequest names file and key."""
    return read_yaml(path or CONFIG, Reward, strict=False)


def reward_in(outcome: Mapping[str, Any]) -> float | None:
    """The reward that a policy is told of, None where there is none (yet); BadRequest where it is no finite number."""
    value = outcome.get("reward")
    return None if value is None else _finite("reward", value)


def calibrate(rows: Iterable[Mapping[str, float | None]], quantile: float = 0.95) -> dict[str, float]:
    """Scales from a random policy's answers: of each term the value that only one in twenty passes, to 3 digits.

    `rows`: term -> value, None where it is missing. With it as scale a term is about 0..1, so that its weight is what it
    can add inside the tanh. BadRequest where a term was never there or is always zero.
    """
    import numpy as np

    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, [])
            if value is not None:
                columns[name].append(abs(_finite(name, value)))
    found = {}
    for name, values in columns.items():
        scale = float(np.quantile(values, quantile)) if values else 0.0
        scale = scale or max(values, default=0.0)  # a score that is mostly 0 has its highest as scale
        if not scale > 0:
            raise BadRequest(f"no scale for {name}: it is never there, or always 0")
        found[name] = float(f"{scale:.3g}")
    return found


def saturated(arguments: Sequence[float], bound: float = 1.5) -> float:
    """Share of rewards whose tanh is flat: beyond 1.5 its slope is below 0.18, and a better answer is hardly rewarded."""
    return sum(abs(value) > bound for value in arguments) / len(arguments) if arguments else 0.0


@lru_cache(maxsize=4096)
def _program(text: str) -> Program:
    return Program.parse(text)


def _asks_letters(known: Mapping[str, Any]) -> bool:
    if "text" in known:
        return bool(known["text"])
    return read_prompt(known.get("prompt", "")).text


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRequest(f"reward: {name} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise BadRequest(f"reward: {name} is {number}: leave a term that is not known out")
    return number
