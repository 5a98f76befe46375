"""What things are called in the report: programs, scores, links, complexity classes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from relay.program import Program
from scheduler.outcomes import SCORE


def slug(text: str) -> str:
    """For ids and file names: small letters and digits, one hyphen between words."""
    kept = (c if c.isalnum() else "-" for c in text.lower())
    return "-".join(filter(None, "".join(kept).split("-")))


def class_name(cls: str) -> str:
    return {"1": "1 object", "?": "free text"}.get(cls, f"{cls} objects" if cls.isdigit() else cls)


def score_name(column: str) -> str:
    """A score column as a reader calls it."""
    known = {"attributes": "attributes right", "strict": "all attributes right, strict", "clip_score": "CLIP score"}
    name = column.removeprefix(SCORE)
    return known.get(name, name.replace("_", " "))


def short_link(link: str) -> str:
    """`wifi: 100 Mbit/s, 3 ms one way, ... (as given)` -> `wifi (as given)`."""
    kind = re.search(r" \((as given|scaled)", link)
    name = link.partition(":")[0]
    return f"{name} ({kind[1]})" if kind else {"none": "no network"}.get(name, name)


def program_labels(programs: list[Program]) -> dict[str, str]:
    """Short names: the steps, and of the rest only what differs among these programs; no two alike."""
    relays = [p for p in programs if len(p.legs) > 1]
    varying: list[tuple[str, Any]] = [
        (name, of) for name, of in (
            ("match", lambda p: p.matching), ("", lambda p: p.codec), ("", lambda p: f"{p.conditioning} embeddings"),
        ) if len({of(p) for p in relays}) > 1
    ]  # fmt: skip
    guided = len({p.guidance for p in relays}) > 1 or any(
        len({p.guidance for p in programs if p.mode == m}) > 1 for m in ("full-cloud", "edge-only")
    )
    found = {}
    for p in programs:
        legs = " + ".join(f"{leg.steps} {leg.member}" for leg in p.legs)
        words = {"full-cloud": "large alone", "edge-only": "small alone"}.get(p.mode, legs)
        if p.mode == "relay":
            words = f"s = {p.steps['large']}, n = {p.steps['small']}"
        extra = [f"{name} {of(p)}".strip() for name, of in varying] if len(p.legs) > 1 else []
        if guided:
            extra.append("guidance " + ", ".join(f"{g:g}" for g in p.guidance))
        found[str(p)] = ", ".join([words, *extra])
    counts = Counter(found.values())
    for p in relays:  # as many steps on schedules of other lengths
        if counts[found[str(p)]] > 1:
            found[str(p)] += " of " + " and ".join(str(leg.steps_total) for leg in p.legs[1:])
    return found
