"""How much will be asked in the next control period: quick to rise, slow to fall, and on the safe side of chance."""

from __future__ import annotations

from relay.errors import BadRequest


class LoadEstimator:
    """An exponentially weighted mean of arrivals a second, with the Poisson quantile of a period above it.

    `rise`, `fall`: weight of the newest period when it lies above and below the mean. A flash crowd is planned for after
    one period, and capacity is given back over many, since a level too low costs quality for seconds, one too high
    costs deadlines.
    """

    def __init__(self, period_s: float = 1.0, rise: float = 0.7, fall: float = 0.1, quantile: float = 0.9):
        if period_s <= 0 or not 0 < fall <= rise <= 1 or not 0 < quantile < 1:
            raise BadRequest("load estimator: period_s > 0, 0 < fall <= rise <= 1 and 0 < quantile < 1")
        self.period_s, self.rise, self.fall, self.quantile = period_s, rise, fall, quantile
        self.mean: float | None = None  # requests a second; None before the first period
        self.demand = 0.0  # requests a second to plan for; every request asks, so worked out where the mean moves

    def observe(self, arrivals: int) -> None:
        """So many came in the period that has ended."""
        rate = arrivals / self.period_s
        if self.mean is None:
            self.mean = rate
        else:
            self.mean += (self.rise if rate > self.mean else self.fall) * (rate - self.mean)
        self.demand = self._above(self.mean)

    def surge(self, arrivals: int) -> None:
        """So many have come in a period that is not over: the mean is at least that."""
        self.mean = max(self.mean or 0.0, arrivals / self.period_s)
        self.demand = self._above(self.mean)

    def _above(self, mean: float) -> float:
        if not mean:
            return 0.0
        from scipy.special import pdtrik

        return max(mean, float(pdtrik(self.quantile, mean * self.period_s)) / self.period_s)
