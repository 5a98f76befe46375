"""The load control at /metrics, read off when it is asked. Nodes are labels, tenants never."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nodes.gateway.load import LoadControl

COUNTERS = {
    "admitted": "Requests let in",
    "late": "Requests refused because no level keeps their deadline",
    "share": "Requests refused because their tenant has more than its share",
    "pressed": "Placements with less than everything allowed",
    "errors": "Periods that control failed in, a defect",
}


class LoadMetrics(Collector):
    def __init__(self, load: LoadControl):
        self.load = load

    def describe(self) -> list[Any]:
        return []  # nothing is collected to learn the names

    def collect(self) -> Iterator[Any]:
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"relay_load_{name}", what, value=self.load.counters[name])
        told = self.load.told()
        yield GaugeMetricFamily("relay_load_demand", "Requests a second planned for", value=told["demand_per_s"])
        yield GaugeMetricFamily(
            "relay_load_pressed", "Whether the plan holds anything back", value=int(told["pressed"])
        )
        yield GaugeMetricFamily(
            "relay_load_outstanding_seconds", "Work let in and not done", value=told["outstanding_s"]
        )
        prices = GaugeMetricFamily("relay_load_price", "Quality that a second of a node is worth", labels=["node"])
        for name, price in told["prices"].items():
            prices.add_metric([name], price)
        yield prices
        rates = GaugeMetricFamily(
            "relay_load_start_rate", "Share of its skipped steps that a level's starts from cached latents spare",
            labels=["level"],
        )  # fmt: skip
        for level, rate in told["starts"].items():
            rates.add_metric([level], rate)
        yield rates
        lags = GaugeMetricFamily(
            "relay_load_lag", "How many times longer a node takes than it measured at its start", labels=["node"]
        )
        for name, lag in told["lags"].items():
            lags.add_metric([name], lag)
        yield lags
        yield GaugeMetricFamily(
            "relay_load_overrun",
            "How many times longer than predicted nine in ten requests took at most",
            told["overrun"],
        )
