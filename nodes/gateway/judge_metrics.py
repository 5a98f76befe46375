"""Judging and ratings at /metrics, read off when it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nodes.gateway.judging import Judging
    from nodes.gateway.verdicts import Verdicts

COUNTERS = {
    "sampled": "Pictures drawn for judging",
    "judged": "Pictures that were scored",
    "kept": "Pictures drawn that stay on a device which shares nothing",
    "dropped": "Pictures drawn that were the oldest of too many",
    "gone": "Pictures that were not there any more when a judge was free",
    "declined": "Pictures that a device did not score",
    "lost": "Pictures given to a judge that did not answer",
    "refused": "Scores or pictures from who was not asked for them, or that were none",
}


class JudgeMetrics(Collector):
    def __init__(self, judging: Judging, verdicts: Verdicts):
        self.judging, self.verdicts = judging, verdicts

    def describe(self) -> list[Any]:
        return []  # nothing is collected to learn the names

    def collect(self) -> Iterator[Any]:
        tally = self.judging.tally
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"relay_judge_{name}", what, value=tally.counters[name])
        alive = sum(judge.alive for judge in self.judging.judges.values())
        yield GaugeMetricFamily("relay_judge_alive", "Judge processes that were heard lately", value=alive)
        yield GaugeMetricFamily(
            "relay_judge_waiting", "Pictures that wait for a judge", value=len(self.judging.waiting)
        )
        lag = tally.lag
        yield SummaryMetricFamily(
            "relay_judge_lag_seconds", "From a job's end to its scores", count_value=lag.count, sum_value=lag.total
        )
        scores = SummaryMetricFamily("relay_score", "Scores of judged pictures", labels=["column", "mode"])
        for labels, mean in sorted(tally.scores.items()):
            scores.add_metric(labels, count_value=mean.count, sum_value=mean.total)
        yield scores
        yield CounterMetricFamily("relay_ratings", "Users' ratings", value=self.verdicts.counters["ratings"])
        yield CounterMetricFamily(
            "relay_scores_unlearned", "Times a learner failed on a score", value=self.verdicts.counters["unlearned"]
        )
