"""What Prometheus reads at /metrics: counted as it happens from the jobs' timeline, or read off when it is asked.

Labels take few values: stages, ends, modes, policies, routes, node names; never a tenant, a job or what a node made up.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from relay.errors import BadRequest
from relay.program import Program

if TYPE_CHECKING:
    from nodes.gateway.dispatcher import Dispatcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
STAGES = frozenset({"accepted", "waiting", "queued", "encoding", "denoising", "sending", "decoding"})
ENDS = frozenset({"done", "failed", "cancelled"})
# The dispatcher's own counters: name there -> name here and what it counts.
COUNTERS = {
    "accepted": ("relay_jobs_accepted", "Jobs taken in"),
    "idempotent": (
        "relay_requests_repeated",
        "Requests answered with what an earlier one of their idempotency key began",
    ),
    "recovered": ("relay_jobs_recovered", "Times a job was placed again because what it ran on was lost or failed"),
    "busy": ("relay_jobs_deferred", "Times a node's queue was full"),
    "degraded": ("relay_answers_degraded", "Pictures that another program finished"),
    "checkpoints": ("relay_checkpoints", "Checkpoints kept"),
    "unwritable": ("relay_ledger_errors", "Commits or images that the disk did not take"),
    "results_late": ("relay_results_late", "Pictures that came after their job's end"),
    "results_foreign": ("relay_results_foreign", "Pictures from a node that was never given the job"),
    "errors": ("relay_dispatcher_errors", "Errors of the dispatcher's own, a defect"),
}


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, what, labels, buckets=buckets, registry=self.registry)

        self.jobs = histogram("relay_job_seconds", "From acceptance to its end", SECONDS, "end")
        self.stages = histogram(
            "relay_stage_seconds", "A stage, by the clock of where it ran", SECONDS, "stage", "role"
        )
        self.batches = histogram("relay_step_batch", "Images that shared a step, as jobs report it (sampled)", BATCHES)
        self.handoffs = counter("relay_handoff_bytes", "Bytes of latents that went from node to node")
        self.decisions = counter("relay_decisions", "Placements decided", "policy", "mode")
        self.requests = counter("relay_http_requests", "HTTP requests answered", "method", "route", "status")
        self.latencies = histogram("relay_http_seconds", "HTTP requests, streams to their end", SECONDS, "route")
        self.registry.register(_Now(dispatcher))
        dispatcher.timeline.observers.append(self._observe)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        method = method if method in ("GET", "POST", "DELETE", "HEAD") else "other"
        self.requests.labels(method, route, str(status)).inc()
        self.latencies.labels(route).observe(seconds)

    def _observe(self, node: str, what: str, data: dict[str, Any]) -> None:
        """One event of a timeline."""
        known = self.dispatcher.registry.nodes.get(node)
        if left := data.get("left"):
            role = known.role if known else "gateway"
            self.stages.labels(left if left in STAGES else "other", role).observe(data.get("spent_s", 0.0))
        if what == "step":
            self.batches.observe(data["batch"])
        elif what == "ready":
            self.handoffs.inc(max(data.get("bytes", 0), 0))
        elif known is None and what == "placed":
            self.decisions.labels(data.get("policy", "none"), _mode(data["program"])).inc()
        elif known is None and what in ENDS:
            self.jobs.labels(what).observe(data.get("seconds", 0.0))


def _mode(program: str) -> str:
    try:
        return Program.parse(program).mode
    except BadRequest:
        return "other"


class _Now(Collector):
    """What is read off the dispatcher and the registry when it is asked."""

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher

    def describe(self) -> list[Any]:
        return []  # nothing is collected to learn the names

    def collect(self) -> Iterator[Any]:
        dispatcher = self.dispatcher
        for name, (shown, what) in COUNTERS.items():
            yield CounterMetricFamily(shown, what, value=dispatcher.counters[name])
        yield CounterMetricFamily(
            "relay_decisions_lost", "Lines of the decision log lost", value=dispatcher.decider.decisions.lost
        )
        ends = CounterMetricFamily("relay_jobs_ended", "Jobs by how they ended", labels=["end"])
        for end in sorted(ENDS):
            ends.add_metric([end], dispatcher.counters[end])
        yield ends
        stages = GaugeMetricFamily("relay_jobs_open", "Jobs that have not ended", labels=["stage"])
        for stage, count in Count(str(job.stage) for job in list(dispatcher.jobs.values())).items():
            stages.add_metric([stage], count)
        yield stages
        yield GaugeMetricFamily(
            "relay_checkpoint_bytes", "Bytes of checkpoints kept", value=dispatcher.checkpoints.bytes
        )
        yield from self._nodes()

    def _nodes(self) -> Iterator[Any]:
        rows = self.dispatcher.registry.told()
        states = GaugeMetricFamily("relay_nodes", "Nodes by role and state", labels=["role", "state"])
        for key, count in Count((row["role"], row["state"].split()[0]) for row in rows).items():
            states.add_metric(key, count)
        yield states
        gauges = {
            "relay_node_queued": ("Stretches that wait on a node", "queued"),
            "relay_node_running": ("Stretches in a node's batch", "running"),
            "relay_node_jobs": ("Jobs the gateway has placed on a node", "jobs"),
            "relay_node_memory_bytes": ("Resident memory of a node", "memory_bytes"),
            "relay_node_battery_ratio": ("Battery of a node", "battery"),
            "relay_node_round_trip_seconds": ("Round trip from a node to the gateway", "round_trip_s"),
            "relay_node_heard_seconds_ago": ("Since a node was last heard", "heard_s_ago"),
        }
        for name, (what, field) in gauges.items():
            gauge = GaugeMetricFamily(name, what, labels=["node"])
            for row in rows:
                if row[field] is not None:
                    gauge.add_metric([row["name"]], row[field])
            yield gauge
        steps = CounterMetricFamily("relay_node_steps", "Steps that a node's engines took", labels=["node"])
        sent = CounterMetricFamily("relay_node_sent_bytes", "Bytes a node sent", labels=["node"])
        received = CounterMetricFamily("relay_node_received_bytes", "Bytes a node received", labels=["node"])
        for node in list(self.dispatcher.registry.nodes.values()):
            if (beat := node.heartbeat) is not None:
                steps.add_metric([node.name], beat.steps_done)
                sent.add_metric([node.name], sum(peer.bytes_sent for peer in beat.peers.values()))
                received.add_metric([node.name], sum(peer.bytes_received for peer in beat.peers.values()))
        yield from (steps, sent, received)
        for what in ("latents", "bytes", "hits", "misses", "evicted", "damaged"):
            kind = GaugeMetricFamily if what in ("latents", "bytes") else CounterMetricFamily
            family = kind(f"relay_cache_{what}", f"Latent cache of an edge: {what}", labels=["node"])
            for row in rows:
                if what in row["cache"]:
                    family.add_metric([row["name"]], row["cache"][what])
            yield family
