"""Which program, for this family, this link and this wish? Compute time by a fitted cost model, quality as measured.

    time(program) = encode + decode + s c_large + n c_small + handoff + transfer(link)

c_large, c_small and the constants come from the stages of a run's time rows, or are given. That is a request between two
machines and nothing else; what the service's own messages add is `experiments.advise_service`. Quality is never
interpolated: only programs that the run drew are advised. How sure the advice is comes from resampling the prompts: the
share of resamples in which the program meets the wish, and in which it is also the best.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.provenance import RESULTS
from relay.errors import BadRequest
from relay.program import Program
from scheduler.links import LinkProfile
from scheduler.message_sizes import MessageSizes, bytes_sent
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    import polars as pl
    from polars.dataframe.group_by import GroupBy

    from experiments.advise_service import Service

ROUNDS = 2000
SHIPPED = RESULTS / "rise"


@dataclass(frozen=True)
class Costs:
    """Seconds at batch 1: constants of a request, of a handoff, and of one guided step of each member."""

    request_s: float
    handoff_s: float
    large_s: float
    small_s: float

    def compute(self, program: Program) -> float:
        """Seconds of everything but the network."""
        steps = program.steps
        changes = len(program.legs) - 1
        return self.request_s + changes * self.handoff_s + steps["large"] * self.large_s + steps["small"] * self.small_s


@dataclass(frozen=True)
class Option:
    """One program with what it takes and gives. `meets`: share of resamples, of so many prompts, in which it fulfils the wish."""

    program: str
    steps: dict[str, int]
    time_s: float
    network_s: float
    score: float
    of_large: float
    meets: float
    best: float
    prompts: int


def fit_costs(times: pl.DataFrame) -> Costs:
    """Costs from the stages of time rows without a network: each is a median over programs of its medians over rounds."""
    import polars as pl

    stages = ("encode_s", "large_s", "handoff_s", "small_s", "decode_s")
    grouped = _by_program(times).agg(pl.col(*stages).median())
    request: list[float] = []
    handoff: list[float] = []
    large: list[float] = []
    small: list[float] = []
    for row in grouped.iter_rows(named=True):
        program = Program.parse(row["program"])
        request.append(row["encode_s"] + row["decode_s"])
        if changes := len(program.legs) - 1:
            handoff.append(row["handoff_s"] / changes)
        for member, costs in (("large", large), ("small", small)):
            if steps := program.steps[member]:
                costs.append(row[f"{member}_s"] / steps)
    if not large or not small:
        raise BadRequest("a cost model needs time rows of programs in which the large and the small member take steps")
    return Costs(*(float(np.median(values)) if values else 0.0 for values in (request, handoff, large, small)))


def program_medians(times: pl.DataFrame) -> dict[str, float]:
    """Median end-to-end seconds without a network of each program (no baselines)."""
    import polars as pl

    return dict(_by_program(times).agg(pl.col("end_to_end_s").median()).iter_rows())


def _by_program(times: pl.DataFrame) -> GroupBy:
    """Programs' own rows without a network, baselines and links left out."""
    import polars as pl

    own = times.filter((pl.col("link") == "none") & (pl.col("method") == "program"))
    return own.group_by("program", maintain_order=True)


def advise(
    outcomes: pl.DataFrame,
    costs: Costs,
    link: LinkProfile | None,
    sizes: MessageSizes,
    *,
    floor: float | None = None,
    limit_s: float | None = None,
    score: str = "attributes",
    complexity: str | None = None,
    service: Service | None = None,
) -> list[Option]:
    """Programs that fulfil the wish, best first, then the others by how nearly they do.

    `service`: of a request that goes through it, over `link`.

    `floor`: least share of the large member's mean score, the fastest wins. `limit_s`: most seconds end to end, the
    best score wins. Both: the fastest above the floor within the limit. `outcomes` holds one family's rows.
    """
    if floor is None and limit_s is None:
        raise BadRequest("say what counts: a quality floor, a time limit, or both")
    programs, scores = _paired_scores(outcomes, f"{SCORE}{score}", complexity)
    full = next((i for i, p in enumerate(programs) if p.mode == "full-cloud"), None)
    if full is None:
        raise BadRequest("the run has no full-cloud rows to measure a share of the large member's score against")
    if service is None:
        network = np.array([_network(p, link, sizes) for p in programs])
        seconds = np.array([costs.compute(p) for p in programs]) + network
    elif link is None:
        raise BadRequest("a service is reached over a link: say which")
    else:
        network = np.array([service.network(p, costs, link, sizes) for p in programs])
        seconds = np.array([service.predict(p, costs, link, sizes) for p in programs])

    draws = np.random.default_rng(0).integers(scores.shape[1], size=(ROUNDS, scores.shape[1]))
    means = np.stack([row[draws].mean(1) for row in scores])  # programs x rounds
    shares = means / means[full]
    within = seconds <= limit_s if limit_s is not None else np.ones(len(programs), bool)
    good = within[:, None] & (shares >= (floor if floor is not None else -np.inf))
    cost = np.broadcast_to(seconds[:, None], means.shape) if floor is not None else -means
    best = np.where(good, cost, np.inf).argmin(0)
    won = good[best, np.arange(ROUNDS)]  # a resample in which nothing fulfils the wish has no winner
    meets = good.mean(1)
    mean = scores.mean(1)
    options = [
        Option(str(p), p.steps, float(seconds[i]), float(network[i]), float(mean[i]), float(mean[i] / mean[full]),
               float(meets[i]), float(((best == i) & won).mean()), scores.shape[1])
        for i, p in enumerate(programs)
    ]  # fmt: skip
    return [options[i] for i in _order(seconds, mean, mean / mean[full], within, floor)]


def _order(seconds, mean, shares, within, floor) -> list[int]:  # noqa: ANN001
    good = within & (shares >= (floor or 0))
    wish = [seconds, -mean] if floor is not None else [-mean, seconds]
    ranked = np.lexsort((wish[1], wish[0])).tolist()
    return [i for i in ranked if good[i]] + sorted((i for i in ranked if not good[i]), key=lambda i: -shares[i])


def _network(program: Program, link: LinkProfile | None, sizes: MessageSizes) -> float:
    if link is None:
        return 0.0
    return sum(link.transfer_time(message.bytes) for message in bytes_sent(program, sizes))


def _paired_scores(outcomes: pl.DataFrame, column: str, complexity: str | None) -> tuple[list[Program], np.ndarray]:
    """Programs and their scores (programs, prompts), on the prompts and seeds that all of them drew: means over seeds, since
    it is prompts that are resampled."""
    import polars as pl

    if column not in outcomes.columns:
        known = ", ".join(c.removeprefix(SCORE) for c in outcomes.columns if c.startswith(SCORE))
        raise BadRequest(f"the run has no score {column.removeprefix(SCORE)!r}; it has {known}")
    rows = outcomes.filter(pl.col("method") == "program")
    if complexity is not None:
        rows = rows.filter(pl.col("complexity") == complexity)
    wide = rows.pivot(on="program", index=["prompt", "seed"], values=column).drop_nulls()
    texts = [c for c in wide.columns if c not in ("prompt", "seed")]
    if wide.is_empty() or not texts:
        raise BadRequest(
            "the run has no prompts that all of its programs drew" + (f" in class {complexity}" if complexity else "")
        )
    by_prompt = wide.group_by("prompt", maintain_order=True).agg(pl.col(texts).mean())
    return [Program.parse(t) for t in texts], by_prompt.select(texts).to_numpy().T


def answer(
    folder: Path | None,
    family: str | None,
    bandwidth: float | None,
    round_trip: float,
    link_name: str | None,
    floor: float | None,
    limit_s: float | None,
    score: str,
    complexity: str | None,
    step_ms: str | None,
    as_json: bool,
    service: Path | None = None,
) -> str:
    """The command's whole answer as text; see `relay-experiment advise --help`."""
    import json

    import polars as pl

    from experiments.estimate import parse_step_ms
    from experiments.run_folder import open_run
    from relay.family_spec import find_family
    from scheduler.links import find_link
    from scheduler.message_sizes import computed_sizes

    folder = folder or SHIPPED
    if folder is SHIPPED and not folder.is_dir():
        raise BadRequest(
            "say --run, a folder with quality and time rows: those that the project ships are in its checkout"
        )
    run = open_run(folder)
    names = run.outcomes["family"].unique().sort().to_list()
    if family is None and len(names) != 1:
        raise BadRequest(f"{run.folder.name} holds the families {', '.join(names) or '(none)'}: say --family")
    family = family or names[0]
    if family not in names:
        raise BadRequest(f"{run.folder.name} has no rows of family {family!r}; it has {', '.join(names) or 'none'}")
    link = None
    if link_name is not None:
        link = find_link(link_name)
    elif bandwidth is not None:
        link = LinkProfile(name="yours", bandwidth_bit_s=bandwidth * 1e6, delay_s=round_trip / 2000)
    costs, way = fit_costs(run.times.filter(pl.col("family") == family)), None
    if service is not None:
        from experiments.advise_service import read_service

        costs, way = read_service(service, family)
    if step_ms is not None:
        large_s, small_s = parse_step_ms(step_ms)
        costs = replace(costs, large_s=large_s, small_s=small_s)
    path = next((f for f in run.config["families"] if find_family(f).name == family), family)
    options = advise(
        run.outcomes.filter(pl.col("family") == family), costs, link, computed_sizes(find_family(path)),
        floor=floor, limit_s=limit_s, score=score, complexity=complexity, service=way,
    )  # fmt: skip
    if as_json:
        what = {
            "link": link.describe() if link else "none",
            "costs_s": asdict(costs),
            "options": [asdict(option) for option in options],
        }
        return json.dumps(what, indent=1)
    step = f"large {costs.large_s * 1000:.1f} ms, small {costs.small_s * 1000:.1f} ms"
    source = f"{options[0].prompts} prompts of {run.folder.name}; a step: {step}"
    return _told(options, link, floor, limit_s, score, source)


def _told(
    options: list[Option], link: LinkProfile | None, floor: float | None, limit_s: float | None, score: str, source: str
) -> str:
    wish = [f"at least {floor:.0%} of the large member's {score}"] if floor is not None else []
    wish += [f"at most {limit_s:g} s"] if limit_s is not None else []
    lines = [f"wish: {' and '.join(wish)}; link: {link.describe() if link else 'none'}", f"from: {source}", ""]
    fit = [o for o in options if o.of_large >= (floor or 0) and o.time_s <= (limit_s or float("inf"))]
    for place, option in enumerate(options[:4]):
        name = ("best" if fit else "nearest") if place == 0 else "next" if place < len(fit) else "misses"
        lines.append(
            f"{name:<8} s = {option.steps['large']:<3} n = {option.steps['small']:<3} {option.time_s:.3f} s"
            f" ({option.network_s * 1000:.0f} ms of it network), {score} {option.score:.3f} = {option.of_large:.1%} of large;"
            f" meets the wish in {option.meets:.0%}, is the best in {option.best:.0%} of resamples\n         {option.program}"
        )
    if len(options) > 1:
        a, b = options[:2]
        lines.append(
            f"\nThe next one takes {(b.time_s - a.time_s) * 1000:+.0f} ms and gives {b.score - a.score:+.3f} {score}."
        )
    if not fit:
        lines.append("\nNo program of the run fulfils the wish; these come nearest.")
    return "\n".join(lines)


def held_out_errors(times: pl.DataFrame) -> dict[str, float]:
    """Relative error of the predicted compute time of each program, fitted on all the others."""
    import polars as pl

    medians = program_medians(times)
    found = {}
    for text, seconds in medians.items():
        costs = fit_costs(times.filter(pl.col("program") != text))
        found[text] = costs.compute(Program.parse(text)) / seconds - 1
    return found
