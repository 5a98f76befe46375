"""Schedules: the explicit list of sigmas that a member walks, read from its diffusers scheduler.

Two parameterisations of a noisy latent: `flow`, x = (1 - sigma) x0 + sigma n, and `epsilon` (variance exploding),
x = x0 + sigma n. A v-prediction U-Net walks `epsilon` latents too: what it predicts is its denoiser's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from relay.errors import BadRequest, FamilyError

Parameterisation = Literal["flow", "epsilon"]
EULER: dict[str, Parameterisation] = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "EulerDiscreteScheduler": "epsilon",
}


@dataclass(frozen=True)
class Schedule:
    """`sigmas`: T + 1 float32 values, strictly descending, the last one 0. Noise starts at `init_noise_sigma`."""

    sigmas: tuple[float, ...]
    init_noise_sigma: float
    parameterisation: Parameterisation

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def parameterisation(config: Mapping[str, Any]) -> Parameterisation:
    """How a scheduler config's latents are noised; FamilyError where it is not a deterministic Euler walk to 0."""
    name = config.get("_class_name", "without a _class_name")
    if name not in EULER:
        raise FamilyError(
            f"scheduler {name} is not Euler; say `replace_scheduler: euler` in the family's YAML to replace it"
        )
    for option, allowed in {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "stochastic_sampling": (False,),
        "invert_sigmas": (False,),
    }.items():
        if config.get(option, allowed[0]) not in allowed:
            raise FamilyError(f"{name} with {option}={config[option]!r} is not supported: set it to {allowed[0]!r}")
    return EULER[name]


def make_schedule(config: Mapping[str, Any], steps: int, image_seq_len: int | None = None) -> Schedule:
    """The schedule of `steps` steps that diffusers' scheduler makes of this config.

    `image_seq_len` (image tokens) is needed by configs with dynamic shifting. FamilyError on a config that is not
    supported, BadRequest where it cannot make that many steps.
    """
    import diffusers

    kind = parameterisation(config)
    name = config["_class_name"]
    scheduler = getattr(diffusers, name).from_config(dict(config))
    options = {}
    if config.get("use_dynamic_shifting"):
        if image_seq_len is None:
            raise FamilyError(f"{name} shifts dynamically: its schedule needs the image size")
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        options["mu"] = calculate_shift(image_seq_len, *(scheduler.config[key] for key in keys))
    try:
        scheduler.set_timesteps(steps, **options)
        sigmas = tuple(scheduler.sigmas.tolist())
    except (ValueError, IndexError, ZeroDivisionError):
        sigmas = ()
    descending = all(a > b for a, b in pairwise(sigmas))
    if len(sigmas) != steps + 1 or sigmas[-1] != 0 or not (descending and math.isfinite(sigmas[0])):
        raise BadRequest(f"{name} cannot make a descending schedule of {steps} steps with this config: ask for fewer")
    return Schedule(sigmas, float(scheduler.init_noise_sigma) if kind == "epsilon" else 1.0, kind)


def replace_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Euler counterpart of a scheduler config: same noise, timestep spacing and prediction type."""
    import diffusers

    if config.get("_class_name") in EULER:
        return dict(config)
    flow = config.get("prediction_type") == "flow_prediction" or "FlowMatch" in str(config.get("_class_name"))
    if flow:
        # solvers with flow sigmas call the shift `flow_shift`
        config = {**config, "shift": config.get("flow_shift", config.get("shift", 1.0))}
    cls = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.EulerDiscreteScheduler
    known = {k: v for k, v in config.items() if not k.startswith("_") and k in cls().config}
    if flow or known.get("final_sigmas_type", "zero") != "zero":
        known.pop("final_sigmas_type", None)
    return {**cls(**known).config, "_class_name": cls.__name__}
