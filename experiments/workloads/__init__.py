"""What is asked and when: prompts in splits that never mix, arrival times, timed requests."""

from experiments.workloads.arrivals import Arrivals, load_arrivals
from experiments.workloads.prompts import SPLITS, Prompt, Workload
from experiments.workloads.registry import load_workload
from experiments.workloads.requests import Demands, TimedRequest, requests

__all__ = [
    "SPLITS", "Arrivals", "Demands", "Prompt", "TimedRequest", "Workload", "load_arrivals", "load_workload", "requests",
]  # fmt: skip
