"""Who is let in: a request that cannot keep its deadline is told so at once, and nobody's flood keeps others out.

`room` is the work, in seconds at batch 1, that may lie on all nodes together so that what comes last still ends within the
deadline. While one tenant asks alone it may have all of it. While several ask, each is sure of its share of the room by its
weight; what the others leave unused is lent in part (`lend`), so that who comes next finds some room at once (after the
dynamic thresholds of Choudhury and Hahne, IEEE/ACM ToN 1998). While a tenant of higher priority asks, the lower ones leave
`reserve` of the room. Outstanding work, and so waiting time and memory, is bounded by all this whatever is asked.

No clock of its own: times are arguments, in monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.load.settings import LoadSettings, TenantShare

LEAST_WAIT_S, MOST_WAIT_S = 0.1, 60.0
NOBODY_S = 5.0  # where no node is there: about as long as one takes to come back
KEPT = 4096  # tenants that are remembered


@dataclass(frozen=True)
class Verdict:
    """`kind`: admitted | late (no level keeps the deadline) | share (its tenant has more than its share outstanding)."""

    kind: str
    reason: str = ""
    retry_after_s: float = 0.0

    @property
    def admitted(self) -> bool:
        return self.kind == "admitted"


class Admission:
    """Outstanding work of each tenant; `admit`, then `taken` and `ended` of each job that was."""

    def __init__(self, settings: LoadSettings):
        self.settings = settings
        self._asked: dict[str, float] = {}  # tenant -> when it last asked
        self._work: dict[str, float] = {}  # tenant -> outstanding seconds of work
        self._jobs: dict[str, tuple[str, float]] = {}

    @property
    def outstanding_s(self) -> float:
        return sum(self._work.values())

    def admit(self, tenant: str, work_s: float, ends_s: float, left_s: float, room_s: float, now: float) -> Verdict:
        """A request of `work_s` at the least, that would end `ends_s` from now at the soonest and must within `left_s`."""
        self._remember(tenant, now)
        if ends_s > left_s:
            wait = _bounded(ends_s - left_s) if ends_s < float("inf") else NOBODY_S
            soon = "nobody can serve it now" if ends_s == float("inf") else f"the soonest is {ends_s:.2g} s"
            return Verdict("late", f"it cannot be done within {left_s:.3g} s: {soon}; try again in {wait:.1f} s", wait)
        limit = self.limit_s(tenant, room_s)
        mine = self._work.get(tenant, 0.0)
        if mine and mine + work_s > limit:  # one request at least is everybody's
            wait = _bounded(left_s * (mine + work_s - limit) / max(limit, 1e-9))
            return Verdict("share", f"more than your share is being worked on; try again in {wait:.1f} s", wait)
        return Verdict("admitted")

    def limit_s(self, tenant: str, room_s: float) -> float:
        """Seconds of work that this tenant may have outstanding, among those who ask at present; inf where it asks alone."""
        others = [each for each in self._asked if each != tenant]
        if not others:
            return float("inf")
        mine = self._of(tenant)
        total = mine.share + sum(self._of(each).share for each in others)
        if any(self._of(each).priority > mine.priority for each in others):
            room_s *= 1 - self.settings.reserve
        unused = sum(
            max(0.0, room_s * self._of(each).share / total - self._work.get(each, 0.0)) for each in others
        )  # fmt: skip
        return room_s * mine.share / total + self.settings.lend * unused

    def taken(self, job: str, tenant: str, work_s: float) -> None:
        """An admitted request is being worked on. Saying it again corrects its work."""
        self.ended(job)
        self._jobs[job] = tenant, work_s
        self._work[tenant] = self._work.get(tenant, 0.0) + work_s

    def ended(self, job: str) -> None:
        """However it ended."""
        tenant, work_s = self._jobs.pop(job, ("", 0.0))
        left = self._work.pop(tenant, 0.0) - work_s
        if left > 1e-9:  # what is less is rounding
            self._work[tenant] = left

    def _remember(self, tenant: str, now: float) -> None:
        self._asked.pop(tenant, None)
        self._asked[tenant] = now  # in the order of their last words
        while self._asked:
            oldest = next(iter(self._asked))
            if now - self._asked[oldest] <= self.settings.remembered_s and len(self._asked) <= KEPT:
                break
            del self._asked[oldest]

    def _of(self, tenant: str) -> TenantShare:
        return self.settings.tenants.get(tenant, _PLAIN)


_PLAIN = TenantShare()


def _bounded(seconds: float) -> float:
    return min(MOST_WAIT_S, max(LEAST_WAIT_S, seconds))
