"""What a run of a baseline computes, in steps of the large member: a count that no other process disturbs, unlike a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.baselines.base import call, full_cloud
from experiments.baselines.cached import untouched

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline, Setting
    from relay.family import Family


def large_steps(baseline: Baseline, family: Family, setting: Setting, prompt: str, seed: int = 0) -> float:
    """FLOPs of the denoisers in one run at batch 1, over those of one guided step of the large member without a cache."""
    if prepare := getattr(baseline, "prepare", None):
        prepare(family, setting)
    with counting(family) as counted:
        baseline.run(family, [prompt], [seed], setting)
    return counted["flops"] / flops_of_a_step(family, prompt)


def flops_of_a_step(family: Family, prompt: str) -> float:
    with counting(family) as counted:
        call(family, [prompt], [0], full_cloud(family, 2), output_type="latent")
    return counted["flops"] / 2


@contextmanager
def counting(family: Family) -> Iterator[dict[str, int]]:
    """Counts, under "flops", what the members' denoisers compute inside, whatever hooks lie on top of them."""
    from contextlib import ExitStack

    counted = {"flops": 0}
    with ExitStack() as stack:
        for member in family.spec.members:
            model = getattr(family.denoiser(member), family.architecture.denoiser)
            stack.enter_context(untouched(model))
            model.forward = _counted(model.forward, counted)
        yield counted


def _counted(forward: Any, counted: dict[str, int]) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as mode:
            output = forward(*args, **kwargs)
        counted["flops"] += mode.get_total_flops()
        return output

    return counted_forward
