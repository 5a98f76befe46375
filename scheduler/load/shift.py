"""Which prompt gets which level: from what prompts can bear to what the plan has room for.

After Argus's optimal degradation (arXiv 2511.06724; the poster 2502.06798): levels lie on a line from the safest (most
work) to the boldest. More prompts at a level than planned: the excess moves to the next safer one, which costs time that
the plan has and no quality. Fewer: the level pulls from the nearest safer one, which costs quality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def shift(wanted: ArrayLike, planned: ArrayLike) -> NDArray[np.float64]:
    """The share of each level's prompts (rows) that is served at each level (columns); rows sum to 1.

    `wanted`, `planned` (levels,): shares of prompts at the boldest level that they bear, and of the plan's load, safest
    level first; both sum to 1.
    """
    want, plan = np.asarray(wanted, float), np.asarray(planned, float)
    if want.shape != plan.shape or want.ndim != 1 or (want < 0).any() or (plan < 0).any():
        raise BadRequest("wanted and planned shares are two lists of one length, none negative")
    if abs(want.sum() - 1) > 1e-6 or abs(plan.sum() - 1) > 1e-6:
        raise BadRequest(f"wanted and planned shares sum to 1, not {want.sum():.3g} and {plan.sum():.3g}")
    moved = np.diag(want)  # [from, at]: prompts by the level they came from and where they are now
    for level in range(len(want) - 1, 0, -1):  # from the boldest on, each level is settled before the next safer one
        surplus = moved[:, level].sum() - plan[level]
        if surplus > 0:
            going = moved[:, level] * surplus / moved[:, level].sum()
            moved[:, level] -= going
            moved[:, level - 1] += going
        for safer in range(level - 1, -1, -1):
            missing = plan[level] - moved[:, level].sum()
            there = moved[:, safer].sum()
            if missing <= 1e-15 or there <= 1e-15:
                continue
            coming = moved[:, safer] * min(1.0, missing / there)
            moved[:, safer] -= coming
            moved[:, level] += coming
    total = moved.sum(axis=1, keepdims=True)
    return np.divide(moved, total, out=np.eye(len(want)), where=total > 0)
