"""The table of `relay-experiment latency`, as Markdown."""

from __future__ import annotations

from typing import Any

from scheduler.links import LINKS
from scheduler.message_sizes import IMAGE_BYTES_PER_PIXEL


def report(data: dict[str, Any]) -> str:
    """Every section of one family; `data` is what `experiments.latency.measure` returns."""
    parts = [_head, _members, _text, _measured, _relays, _transfer, _throughput, _memory]
    return "\n".join("\n".join(part(data)) + "\n" for part in parts)


def _head(data: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, data["size"]))
    warning = ["**Tiny shapes: this shows that the code runs; its figures mean nothing.**", ""] if data["tiny"] else []
    return [
        *warning,
        f"{data['family']} on {data['device']}, {data['dtype']}, {size}, T = {data['steps']}, guidance"
        f" {data['guidance']['large']:g} and {data['guidance']['small']:g}, eager (not compiled), both members on this"
        f" one device. Every time is the median of {data['repeats']} after a warm-up; end-to-end times are taken in turns.",
        "",
        "**The weights are random: time and memory are those of the real architecture, and no quality can be read from"
        " this.** Text encoders are left out of every end-to-end time, and timed alone: random prompt embeddings of the"
        " right shape are given to relay and to diffusers alike.",
    ]


def _members(data: dict[str, Any]) -> list[str]:
    lines = ["## Members", "", *_header("member", "parameters", "published", "weights", "a guided step, batch 1")]
    for name, facts in data["members"].items():
        published = f"{facts['published'] / 1e9:.2f} B: {facts['source']}" if facts["published"] else "–"
        lines.append(
            f"| {name} | {_count(facts['parameters'])} | {published} | {_bytes(facts['weights'])} "
            f"| {_ms(data['pieces'][name])} |"
        )
    ratio = data["pieces"]["large"] / data["pieces"]["small"]
    return [*lines, "", f"A step of the large member costs **{ratio:.2f}x** the small one's (latency, batch 1)."]


def _text(data: dict[str, Any]) -> list[str]:
    lines = [
        "## Text encoders",
        "",
        "Alone, one guided prompt (two rows of tokens); in no other time of this page.",
        "",
    ]
    lines += _header("encoder", "parameters", "weights", "tokens", "time")
    for row in data["text"]:
        lines.append(
            f"| {row['name']} | {_count(row['parameters'])} | {_bytes(row['weights'])} | {row['tokens']} "
            f"| {_ms(row['seconds'])} |"
        )
    return lines


def _measured(data: dict[str, Any]) -> list[str]:
    pieces = {row["handoff"]: row["compute_s"] for row in data["relays"]}
    full = next(r["seconds"] for r in data["measured"] if r["method"] == "relay" and r["handoff"] == data["steps"])
    lines = [
        "## End to end, measured",
        "",
        "Latency at batch 1, from embeddings to pixels, the handoff as real bytes and no network. `from pieces` is the"
        " sum used in the next table. `ours / diffusers` compares with diffusers' own pipeline over the same weights,"
        " embeddings and noise; `difference` is the mean difference of the two pictures' pixels (0 to 1).",
        "",
        *_header("run by", "s", "small steps", "time", "speedup", "from pieces", "ours / diffusers", "difference"),
    ]
    for row in data["measured"]:
        ours = row["method"] == "relay"
        predicted = pieces[row["handoff"]]
        sum_ = f"{_s(predicted)} ({predicted / row['seconds'] - 1:+.1%})" if ours else ""
        against = ("", "") if ours else (f"**{row['ratio']:.3f}**", f"{row['mean_difference']:.1e}")
        lines.append(
            f"| {row['method']} | {row['handoff']} | {row['steps'].get('small', 0)} | {_s(row['seconds'])} "
            f"| {full / row['seconds']:.2f}x | {sum_} | {against[0]} | {against[1]} |"
        )
    return lines


def _relays(data: dict[str, Any]) -> list[str]:
    pieces, links = data["pieces"], list(LINKS)
    full = data["relays"][-1]["compute_s"]
    lines = [
        "## End to end at every handoff step, from pieces",
        "",
        f"s x {_ms(pieces['large'])} + n x {_ms(pieces['small'])} + handoff {_ms(pieces['handoff'])} + decode"
        f" {_ms(pieces['decode'])}, batch 1. Over a link: with what its bandwidth and mean delay add, computed, nothing"
        " sent; the prompt is encoded on both sides, and full-cloud pays for its image.",
        "",
        *_header("s", "n", "compute", "speedup", *(f"over {name}" for name in links)),
    ]
    for row in data["relays"]:
        over = " | ".join(_s(row["over"][name]) for name in links)
        lines.append(
            f"| {row['handoff']} | {row['small_steps']} | {_s(row['compute_s'])} | {full / row['compute_s']:.2f}x | {over} |"
        )
    return lines


def _transfer(data: dict[str, Any]) -> list[str]:
    facts = data["messages"]
    lines = [
        "## Transfer",
        "",
        f"One image, latent {' x '.join(map(str, facts['shape']))}. Times over links are computed from the payload; links"
        " as given: " + "; ".join(link.describe().removesuffix(" (as given)") for link in LINKS.values()) + ".",
        "",
        *_header("message", "payload", "whole handoff", "write", "check and read", *LINKS),
    ]

    def over(size: int) -> str:
        return " | ".join(_ms(link.transfer_time(size)) for link in LINKS.values())

    for codec, row in facts["latents"].items():
        lines.append(
            f"| latent, {codec} | {row['payload']} B | {row['message']} B | {_ms(row['write_s'])} "
            f"| {_ms(row['read_s'])} | {over(row['payload'])} |"
        )
    both = 2 * facts["embeddings"]
    lines.append(f"| embeddings, if shipped, both branches | {both} B | | | | {over(both)} |")
    image = f"image, PNG, assumed {IMAGE_BYTES_PER_PIXEL['png']} B/pixel"
    lines.append(f"| {image} | {facts['image']} B | | | | {over(facts['image'])} |")
    return lines


def _throughput(data: dict[str, Any]) -> list[str]:
    steps, half = data["steps"], data["steps"] // 2
    curves = {m: {row["batch"]: row for row in facts["curve"]} for m, facts in data["members"].items()}
    batches = sorted({batch for curve in curves.values() for batch in curve})
    lines = [
        "## Throughput",
        "",
        f"One guided step of a batch, and denoising alone as images a second: {steps} steps of one member, and the relay"
        f" at s = {half} with one batch at a time.",
        "",
        *_header(
            "batch", "large step", "small step", "large alone", f"relay s = {half}", "small alone",
            "memory of a large step", "of a small step",
        ),
    ]  # fmt: skip
    for batch in batches:
        large, small = (curves[member].get(batch) for member in ("large", "small"))
        alone = [_rate(batch, steps * row["step_s"]) if row else "–" for row in (large, small)]
        relay = _rate(batch, half * large["step_s"] + (steps - half) * small["step_s"]) if large and small else "–"
        step = [_ms(row["step_s"]) if row else "–" for row in (large, small)]
        memory = [_bytes(row["working"]) if row else "–" for row in (large, small)]
        lines.append(f"| {batch} | {' | '.join(step)} | {alone[0]} | {relay} | {alone[1]} | {' | '.join(memory)} |")
    full = [f"{m} at batch {f['full_at']}" for m, f in data["members"].items() if f["full_at"] is not None]
    ended = f"Stopped at out of memory: {', '.join(full)}." if full else "No batch ran out of memory."
    return [*lines, "", ended]


def _memory(data: dict[str, Any]) -> list[str]:
    def at_one(member: str) -> int | None:
        return data["members"][member]["curve"][0]["working"]

    weights = {member: data["members"][member]["weights"] for member in ("large", "small")}
    working = [row["working"] for row in data["measured"] if row["method"] == "relay"]
    decode = max(working) if None not in working else None
    text = sum(row["weights"] for row in data["text"])
    small = data["vae_weights"] + weights["small"]
    return [
        "## Peak memory",
        "",
        "Batch 1, weights and the most that a run takes beside them. A device node also decodes, which takes more than"
        f" a step. Text encoders, where they stay loaded, add {_bytes(text)}.",
        "",
        *_header("node", "weights", "beside them", "peak"),
        f"| edge: large member | {_bytes(weights['large'])} | {_bytes(at_one('large'))} "
        f"| {_sum(weights['large'], at_one('large'))} |",
        f"| device: small member and VAE | {_bytes(small)} | {_bytes(decode)} | {_sum(small, decode)} |",
        f"| both in one process | {_bytes(small + weights['large'])} | {_bytes(decode)} "
        f"| {_sum(small + weights['large'], decode)} |",
    ]


def _header(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def _bytes(size: int | None) -> str:
    if size is None:
        return "not told by a CPU"
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _sum(weights: int, working: int | None) -> str:
    return _bytes(None if working is None else weights + working)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2f} ms"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _rate(images: int, seconds: float) -> str:
    return f"{images / seconds:.3g}/s"
