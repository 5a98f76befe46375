"""What was said of a picture afterwards, by a judge or by who asked for it: into the job's report on disk, then to whoever
learns from it.

    report.scores     column -> number, of the judge
    report.judged     {by, at, seconds, lag_s, missing: {metric: why}}
    report.feedback   {rating, comment, at}, of who asked; a second one replaces the first

Learners are called in the gateway's event loop, after the write, and must return at once; when one raises, that is logged.

    on_scores(job id, {column: number})      a judge's scores, once, without what is missing; or {"user_rating": 0..1}
    on_unjudged(job id)                      no judge's scores will come of a picture: not drawn, or given up
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from nodes.gateway.ledger import Ledger, LedgerUnwritable
from nodes.requests import Refusal
from nodes.stages import Stage
from relay.errors import BadRequest

log = logging.getLogger("relay.gateway")
OnScores = Callable[[str, Mapping[str, float]], None]
OnUnjudged = Callable[[str], None]
USER_RATING = "user_rating"
MAX_COMMENT = 1000  # characters


class Verdicts:
    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.on_scores: list[OnScores] = []
        self.on_unjudged: list[OnUnjudged] = []
        self.counters: Counter[str] = Counter()

    async def judged(
        self,
        job: str,
        scores: Mapping[str, float],
        *,
        by: str,
        seconds: float,
        lag_s: float,
        missing: Mapping[str, str],
    ) -> None:
        """A judge's scores of a job that has ended. Where the disk does not take them they are handed on all the same."""
        said = {"by": by, "at": time.time(), "seconds": seconds, "lag_s": lag_s, "missing": dict(missing)}
        try:
            await self.ledger.amend(job, scores=dict(scores), judged=said)
        except LedgerUnwritable as error:
            self.counters["unwritable"] += 1
            log.warning("scores of %s are not kept: %s", job, error)
        if scores:
            self._tell(job, scores)
        else:
            self.unjudged(job)

    def unjudged(self, job: str) -> None:
        """No judge's scores will come of this picture."""
        for learn in self.on_unjudged:
            self._call(job, learn, job)

    async def rated(self, tenant: str, job: str, rating: Any, comment: Any = None) -> dict[str, Any]:
        """What a tenant thinks of its picture: 0 useless, 1 just right. The rating as it is kept; the same again changes
        nothing. BadRequest on what is no rating, Refusal where there is no such picture of this tenant."""
        rating, comment = check_rating(rating), _checked_comment(comment)
        row = await asyncio.to_thread(self.ledger.job, job)
        if row is None or row["tenant"] != tenant:
            raise Refusal(f"there is no job {job[:100]}", 404)
        if (stage := Stage(row["stage"])) is not Stage.DONE:
            raise Refusal(f"job {job} has no picture to rate: it is {stage}", 409)
        before = json.loads(row["report"] or "{}").get("feedback")
        said = {"rating": rating, "comment": comment, "at": time.time()}
        if before is not None and (before["rating"], before["comment"]) == (rating, comment):
            return dict(before)
        try:
            old = await self.ledger.amend(job, feedback=said)
        except LedgerUnwritable as error:
            raise Refusal(str(error), 507, 5.0) from None
        if old is None:  # it was too old and is forgotten since
            raise Refusal(f"there is no job {job}", 404)
        self.counters["ratings"] += 1
        if (old.get("feedback") or {}).get("rating") != rating:
            self._tell(job, {USER_RATING: rating})
        return said

    def _tell(self, job: str, scores: Mapping[str, float]) -> None:
        for learn in self.on_scores:
            self._call(job, learn, job, scores)

    def _call(self, job: str, learn: Callable[..., None], *said: Any) -> None:
        try:
            learn(*said)
        except Exception:  # what learns must not stop what serves
            self.counters["unlearned"] += 1
            log.exception("scores of %s", job)


def check_rating(rating: Any) -> float:
    if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not math.isfinite(rating):
        raise BadRequest("rating: a number from 0 (useless) to 1 (just right)")
    if not 0 <= rating <= 1:
        raise BadRequest(f"rating: {rating:g} is not from 0 (useless) to 1 (just right); four of five stars are 0.75")
    return float(rating)


def _checked_comment(comment: Any) -> str | None:
    if comment is not None and (not isinstance(comment, str) or len(comment) > MAX_COMMENT):
        raise BadRequest(f"comment: a text of at most {MAX_COMMENT} characters")
    return comment
