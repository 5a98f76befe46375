"""The report's tables, as plain rows: summary, codecs, expected against measured, baselines."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.data import HARD, Entry, Group
from experiments.report.labels import class_name
from relay.errors import BadRequest

# What `expected` may ask of a program, and whether more of it is better.
MEASURES = {
    "score": True, "ratio": True, "gap_closed": True, "speedup": True, "latency_s": False, "deviation_mean": False,
    "deviation_max": False, "latent_bytes": False, "codec_error": False,
}  # fmt: skip
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def gap_name(group: Group) -> str:
    return class_name(HARD) if HARD in group.classes else "all prompts"


def measures(entry: Entry) -> dict[str, float | None]:
    """Every figure that a claim may name."""
    mean, largest = entry.deviation or (None, None)
    return {
        "score": entry.score[0], "ratio": entry.ratio, "gap_closed": entry.gap[0] if entry.gap else None,
        "speedup": entry.speedup, "latency_s": entry.latency, "deviation_mean": mean, "deviation_max": largest,
        "latent_bytes": entry.latent_bytes, "codec_error": entry.codec_error,
    }  # fmt: skip


def summary_rows(group: Group) -> list[dict[str, Any]]:
    """One row a program or baseline: what the headline table shows and summary.csv holds."""
    return [
        {
            "run": group.run.config["name"], "family": group.family, "workload": group.workload, "split": group.split,
            "T": group.steps_total, "method": e.method, "program": e.program, "label": e.label, "prompts": len(e.values),
            "metric": group.score_name, "half_width": (e.score[2] - e.score[1]) / 2,
            "gap_low": e.gap[1] if e.gap else None, "gap_high": e.gap[2] if e.gap else None, "gap_over": gap_name(group),
            "link": group.link, "on_front": e.on_front,
        } | measures(e) | {f"mean_{name.removeprefix('score_')}": value for name, value in sorted(e.scores.items())}
        for e in group.entries
    ]  # fmt: skip


def codec_rows(group: Group) -> list[dict[str, Any]]:
    """Codecs of one relay that differs in nothing else, finest first; the relay with the most codecs, else empty.

    `latent_error` is the relative L2 error of the latent on the wire (None in runs that did not store it), `picture_error`
    the root mean square difference of the pictures (0 to 1) from the finest codec's, `difference` that of the judged
    score, paired, with its 95 % interval.
    """
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for e in group.entries:
        if e.is_relay and e.parsed:
            p = e.parsed
            alike.setdefault((p.legs, p.matching, p.guidance, p.conditioning), []).append(e)
    entries = max(alike.values(), key=len, default=[])
    if len(entries) < 2:
        return []
    finest, *_ = entries = sorted(
        entries, key=lambda e: (-(e.latent_bytes or 0), e.parsed.codec != "fp16" if e.parsed else 0)
    )
    rows = []
    for e in entries:
        assert e.parsed
        mean, low, high = e.less(finest)
        rows.append(
            {"codec": e.parsed.codec, "steps": f"s = {e.handoff}, n = {e.small_steps}", "bytes": e.latent_bytes or 0,
             "latent_error": e.codec_error, "picture_error": picture_error(group, e, finest),
             "difference": mean, "difference_low": low, "difference_high": high}
        )  # fmt: skip
    return rows


def picture_error(group: Group, entry: Entry, reference: Entry) -> float:
    """Root mean square difference of two programs' pictures of the same prompts, pixels in 0..1; over at most 100."""
    squares = []
    for text in [t for t in reference.images if t in entry.images][:100]:
        pair = [group.image(e.images[text][0]) for e in (entry, reference)]
        if all(pair):
            a, b = (np.asarray(picture, dtype=float) / 255 for picture in pair)
            squares.append(float(((a - b) ** 2).mean()))
    return float(np.sqrt(np.mean(squares))) if squares else 0.0


def expected_rows(groups: list[Group]) -> list[dict[str, Any]]:
    """Each claim of each run's config beside what was measured; a claim that nothing here measures says so."""
    rows = []
    for run in dict.fromkeys(g.run for g in groups):
        for claim in run.config.get("expected", []):
            found = [(g, _measured(claim["where"], g)) for g in groups if g.run is run and _in_group(claim["where"], g)]
            said = [(g.label, m) for g, m in found if m] or [("", "")]
            rows += [claim | {"group": label, "measured": m} for label, m in said]
    return rows


def _in_group(where: dict[str, Any], group: Group) -> bool:
    own = {"family": group.family, "workload": group.workload, "split": group.split, "T": group.steps_total}
    return all(where.get(key, value) == value for key, value in own.items())


def _measured(where: dict[str, Any], group: Group) -> str:
    """`ratio 0.981 (s = 14, n = 14)`: of the programs that fit, the best; empty where none does or it was not measured."""
    asked = {k: v for k, v in where.items() if k not in ("measure", "family", "workload", "split", "T")}
    name = where.get("measure", "score")
    if name not in MEASURES:
        raise BadRequest(f"expected: measure {name!r} is not one of {', '.join(MEASURES)}")
    fitting = [e for e in group.entries if all(_fits(e, group, k, v) for k, v in asked.items())]
    found = [(value, e) for e in fitting if (value := measures(e)[name]) is not None]
    if not found:
        return ""
    value, entry = (max if MEASURES[name] else min)(found, key=lambda pair: pair[0])
    best = f", best of {len(found)}" if len(found) > 1 else ""
    return f"{name.replace('_', ' ')} {value:.4g} ({entry.label}{best})"


def _fits(entry: Entry, group: Group, key: str, wanted: Any) -> bool:
    if key in MEASURES:
        value = measures(entry)[key]
        sign, _, number = str(wanted).strip().partition(" ")
        if sign not in _COMPARE or not number:
            raise BadRequest(f'expected: {key}: {wanted!r} is not a comparison as ">= 2.1"')
        return value is not None and _COMPARE[sign](value, float(number))
    if key == "handoff" and isinstance(wanted, float):
        wanted = round(wanted * group.steps_total)
    own = {
        "mode": entry.mode, "method": entry.method, "program": entry.program, "handoff": entry.handoff,
        "small_steps": entry.small_steps, "codec": entry.parsed.codec if entry.parsed else None,
        "matching": entry.parsed.matching if entry.parsed else None,
    }  # fmt: skip
    if key not in own:
        raise BadRequest(f"expected: unknown key {key!r} in where: there are {', '.join([*own, *MEASURES])}")
    return own[key] == wanted


def baseline_rows(groups: list[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Baselines by family: the families, and for each baseline what is said of it under each."""
    verdicts: dict[str, dict[str, str]] = {}
    for group in groups:
        told = group.run.facts.get("baselines") or {}
        for family, names in told.items():
            for name, reason in names.items():
                verdicts.setdefault(name, {})[Path(family).stem] = reason or "applies"
        for e in group.entries:
            if e.method != "program":
                verdicts.setdefault(e.method, {})[group.family] = "applies"
    families = sorted({family for of in verdicts.values() for family in of})
    return families, [(name, [of.get(f, "not asked for") for f in families]) for name, of in verdicts.items()]
