"""The service learns while it serves: a stream of prompts between real processes, and a link that degrades half-way.

    two edges that hold the large member, each behind an emulated link of its own, the near one half as slow again as the
    far one; a phone, a judge, the learned policy as it ships
    first half: both links alike
    then the far edge's link gets slow; what the bandit knew at that moment is kept, frozen
    second half: the service goes on learning

Reported: the share of requests that the far edge had, block by block, beside the share that the frozen bandit would have
given it on the very same contexts and actions (its probabilities, summed: no chance in it).
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from relay.errors import RelayError

PHASES = ("both links alike", "the far edge's link is slow")
LEARN_S = 60.0  # at most, for the judge to catch up before the links change


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; .json and .png beside it.")] = Path(
        "docs/results/live.md"
    ),
    requests: Annotated[int, typer.Option(help="Half of them before the link degrades.")] = 400,
    gap_s: Annotated[float, typer.Option(help="Mean seconds between two requests (Poisson).")] = 0.5,
    link: Annotated[str, typer.Option(help="Both edges' link at first.")] = "wifi",
    delay_s: Annotated[float, typer.Option(help="The far edge's delay, one way, afterwards.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of prompts, gaps and policy.")] = 0,
) -> None:
    """Let the service learn and see whether it leaves a link that got slow."""
    from experiments.provenance import write_result

    with tempfile.TemporaryDirectory() as folder:
        found = live(Path(folder), requests, gap_s, link, delay_s, seed)
    draw(found, out.with_suffix(".png"))
    write_result(out, "The service learns", table(found, out.with_suffix(".png").name), found)


def live(folder: Path, requests: int, gap_s: float, link: str, delay_s: float, seed: int) -> dict[str, Any]:
    """Serve `requests`, the link slow from the half on; decisions as rows."""
    from experiments.workloads import load_workload
    from nodes.fleet import fleet
    from nodes.link_control import LinkControl

    control = str(folder / "far.sock")
    nodes: dict[str, dict[str, Any]] = {
        "near": {"role": "edge", "families": {"mini-sd3": ["large"]}, "link": link, "pace": 1.5},
        "far": {"role": "edge", "families": {"mini-sd3": ["large"]}, "link": link, "link_control": control},
        "phone": {"role": "device", "families": {"mini-sd3": ["small"]}},
    }
    offer = [
        {"family": "mini-sd3", "handoff": handoff, "small_steps": 6, "matching": "exact"} for handoff in (6, 8, 10)
    ] + [{"family": "mini-sd3", "mode": "edge-only"}]
    policy = {"name": "learned", "seed": seed}
    gateway = {"offer": offer, "policy": policy, "heartbeat_s": 1.0}
    prompts = [p.text for p in load_workload("scenes").prompts("validation", requests, seed)]
    random.Random(seed).shuffle(prompts)  # they come class by class: the mix is to be the same in both halves
    with fleet(folder / "live", nodes, gateway, judge={"share": 1.0, "nice": 0}) as running:
        half = requests // 2
        first = running.ask(lambda asker: stream(asker, prompts[:half], gap_s, seed), 3600)
        settle(running)
        frozen = folder / "frozen.model"
        shutil.copy(running.store / "bandit.model", frozen)
        with LinkControl(control) as far:
            far.set(delay_s=delay_s)
        second = running.ask(lambda asker: stream(asker, prompts[half:], gap_s, seed + 1), 3600)
        settle(running)
        told = running.status()["decisions"]
        rows = shares(running.store / "decisions.db", frozen, first + second, policy)
    return {"rows": rows, "half": half, "link": link, "delay_s": delay_s, "gap_s": gap_s, "status": told,
            "policy": policy}  # fmt: skip


async def stream(asker: Any, prompts: list[str], gap_s: float, seed: int) -> list[str]:
    """Ask for every prompt after its gap, wait for the pictures; the job ids, in order."""
    import numpy as np

    rng = np.random.default_rng(seed)
    waits = []
    for i, prompt in enumerate(prompts):
        await asyncio.sleep(float(rng.exponential(gap_s)))
        preference = (0.0, 0.5, 1.0)[i % 3]
        job = (await asker.submit({"prompt": prompt, "preference": preference})).jobs[0]
        waits.append((job, asyncio.ensure_future(asker.wait(job, 300.0))))
    return [job for job, wait in waits if (await wait)["stage"] == "done"]


def settle(running: Any) -> None:
    """Until the judge has caught up and what was learned is on disk; RelayError where that takes too long."""
    from nodes.gateway.learning import MODEL
    from scheduler.bandit_file import read_bandit

    ends, model = time.monotonic() + LEARN_S, running.store / MODEL
    while time.monotonic() < ends:
        told = running.status()["decisions"]
        if not told["awaiting_scores"] and model.exists() and read_bandit(model).learned == told["learned"]:
            return
        time.sleep(0.5)
    raise RelayError(f"the judge or the learner has not caught up within {LEARN_S:g} s: {told}")


def shares(log: Path, frozen: Path, jobs: list[str], policy: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a job that the policy decided, in the order they were asked: where it went, and where the frozen bandit
    would have sent it."""
    from nodes.gateway.learning import make_bandit, read_learned
    from scheduler.decision_log import read_log
    from scheduler.reward import load_reward

    options = {key: value for key, value in policy.items() if key != "name"}
    bandit = make_bandit(read_learned(options), load_reward(None), frozen)
    order, rows = {job: i for i, job in enumerate(jobs)}, []
    for entry in read_log(log):
        if entry.context.job in order and not entry.marks:
            chosen = entry.actions[entry.chosen]
            # the bandit chose among the actions of the mode that the router had picked
            mine = [a for a in entry.actions if entry.router is None or a.program.mode == chosen.program.mode]
            p = bandit.distribution(entry.context, mine)
            rows.append(
                {"request": order[entry.context.job], "nodes": list(chosen.nodes), "program": str(chosen.program),
                 "seconds": entry.seconds, "reward": entry.reward, "far": float("far" in chosen.nodes),
                 "frozen_far": float(sum(q for q, a in zip(p, mine, strict=True) if "far" in a.nodes))}
            )  # fmt: skip
    return sorted(rows, key=lambda row: row["request"])


def blocks(found: dict[str, Any], size: int) -> list[dict[str, float]]:
    """Means over blocks of `size` requests, none across the change."""
    import numpy as np

    made = []
    for phase, (first, last) in enumerate(((0, found["half"]), (found["half"], 1 << 30))):
        mine = [row for row in found["rows"] if first <= row["request"] < last]
        for at in range(0, len(mine), size):
            part = mine[at : at + size]
            made.append(
                {"phase": phase, "since": at, "count": len(part)}
                | {name: float(np.mean([row[name] for row in part])) for name in ("far", "frozen_far", "seconds")}
                | {"reward": float(np.mean([row["reward"] for row in part if row["reward"] is not None] or [np.nan]))}
            )  # fmt: skip
    return made


def table(found: dict[str, Any], picture: str, size: int = 50) -> str:
    told = found["status"]
    lines = [
        f"{len(found['rows'])} requests decided by the policy, mean gap {found['gap_s']:g} s; from the half on the far edge's"
        f" link ({found['link']}) delays {1000 * found['delay_s']:.0f} ms each way. Learned from {told['learned']} rewards.",
        "",
        f"![Share of requests at the far edge]({picture})",
        "",
        "| | requests since | far edge's share | frozen policy's, same contexts | seconds | reward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = blocks(found, size)
    lines += [
        f"| {PHASES[int(row['phase'])]} | {row['since']:.0f} to {row['since'] + row['count']:.0f} | {row['far']:.2f} |"
        f" {row['frozen_far']:.2f} | {row['seconds']:.2f} | {row['reward']:.3f} |"
        for row in rows
    ]
    for said, first, last in (("Within 100 requests after the change", 0, 100), ("Later", 100, 1 << 30)):
        if after := [row for row in rows if row["phase"] == 1 and first <= row["since"] < last]:
            count = sum(row["count"] for row in after)
            own, frozen = (sum(row[k] * row["count"] for row in after) / count for k in ("far", "frozen_far"))
            lines += ["", f"{said}: {own:.2f} against {frozen:.2f} frozen, a ratio of {own / max(frozen, 1e-9):.2f} (goal: at"
                      " most 0.5)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path, size: int = 25) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from experiments.pictures import save_png

    rows, at = blocks(found, size), 0.0
    middles = []
    for row in rows:
        middles.append(at + row["count"] / 2)
        at += row["count"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(middles, [row["far"] for row in rows], marker="o", label="the service")
    axes.plot(middles, [row["frozen_far"] for row in rows], linestyle="--", marker="s", label="frozen at the change")
    axes.axvline(sum(row["count"] for row in rows if row["phase"] == 0), color="0.5", linewidth=1)
    axes.set(xlabel=f"request, in blocks of {size}", ylabel="share at the far edge", ylim=(0, 1))
    axes.legend(frameon=False)
    save_png(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
