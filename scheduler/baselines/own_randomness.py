"""Libraries that draw from process-wide random states, given states of their own, so that no policy disturbs another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class OwnRandomness:
    """torch's and numpy's global states of one owner, from a seed; None seeds them anew."""

    def __init__(self, seed: int | None):
        first, second = np.random.SeedSequence(seed).generate_state(2)
        self._numpy = np.random.RandomState(int(first)).get_state()
        self._torch = torch.Generator().manual_seed(int(second)).get_state()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, the global states are this owner's; afterwards they are what they were."""
        before_numpy, before_torch = np.random.get_state(), torch.get_rng_state()
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        try:
            yield
        finally:
            self._numpy, self._torch = np.random.get_state(), torch.get_rng_state()
            np.random.set_state(before_numpy)
            torch.set_rng_state(before_torch)
