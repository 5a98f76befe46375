"""`relay families`, `relay judge` and `relay doctor`: what there is, what a picture shows, what works here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from relay.errors import BadRequest, FamilyError, RelayError


def families(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the families in configs/families: members, parameters, schedules, folders, what is installed."""
    from nodes.session import quiet_libraries
    from relay.family import find_family, list_families

    quiet_libraries()
    rows = [row for name in list_families() for row in _members(find_family(name))]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("family", "member", "parameters", "schedule", "T", "guidance", "installed", "where"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        count = f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "?"
        cells = [row["family"], row["member"], count, row["schedule"], str(row["steps"]), f"{row['guidance']:g}"]
        table.add_row(*cells, "yes" if row["installed"] else "no", row["where"])
    Console(width=max(Console().width, 120)).print(table)


def _members(spec: Any) -> list[dict[str, Any]]:
    from relay.family import Family, installed

    rows = []
    for name, member in spec.members.items():
        row: dict[str, Any] = {"family": spec.name, "architecture": spec.architecture, "member": name}
        row |= {"steps": member.steps, "guidance": member.guidance, "where": _short(member)}
        row |= {"installed": installed(member), "parameters": None, "schedule": "?"}
        if row["installed"]:
            family = Family(spec)
            row |= {"parameters": family.parameters(name), "schedule": _schedule(family.scheduler_config(name))}
        rows.append(row)
    return rows


def _short(member: Any) -> str:
    """A hub id, or a folder as a person would name it from here."""
    if not member.is_local:
        return str(member)
    path = Path(str(member))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _schedule(config: Any) -> str:
    if "FlowMatch" in config["_class_name"]:
        return f"flow, shift {config.get('shift', 1.0):g}"
    spacing = config.get("timestep_spacing", "linspace")
    return f"epsilon, {'Karras, ' if config.get('use_karras_sigmas') else ''}{spacing}"


def judge(
    image: Annotated[Path | None, typer.Argument(metavar="IMAGE")] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Instead: run this deployment's judge process (docs/judging.md).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what of a scene prompt an image shows: per attribute, per GenEval category, and all right or not."""
    if config is not None and image is None:
        from nodes.judge import run_judge
        from nodes.logs import set_up

        set_up()
        run_judge(config)
        return
    if config is not None or image is None or prompt is None:
        raise BadRequest("say IMAGE and PROMPT to have a picture judged, or --config FILE to run a deployment's judge")
    from nodes.images import open_image
    from nodes.results import score
    from relay.scenes.language import parse

    parse(prompt)
    picture = open_image(image)
    if picture.width != picture.height:
        raise BadRequest(f"{image} is {picture.width}x{picture.height}: the scene judge reads square images")
    verdict = score(picture, prompt)
    if as_json:
        print(json.dumps(verdict, indent=1))
        return
    print(f"attributes right {verdict['attributes']:.0%}, {'all right' if verdict['strict'] else 'not all right'}")
    for kind, (right, asked) in verdict["parts"].items():
        print(f"  {kind:<12} {right} of {asked}")
    for kind, right in verdict["categories"].items():
        print(f"  {kind:<18} {'yes' if right else 'no'}")


def doctor(
    family: Annotated[str | None, typer.Option(help="Check this family too.")] = None,
    role: Annotated[str, typer.Option(help="all | edge | device: what this machine shall hold.")] = "all",
    peer: Annotated[str | None, typer.Option(metavar="ADDR", help="Check the node at tcp://HOST:PORT instead.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --peer: the .key file of the node that asks.")] = None,
    peer_key: Annotated[Path | None, typer.Option(help="With --peer: the .pub file of the node that answers.")] = None,
    allow_plain_text: Annotated[bool, typer.Option(help="With --peer: without keys, off loopback too.")] = False,
) -> None:
    """Versions, devices, threads, what works here; with --family also bytes to download and memory needed. With --peer:
    whether a node can be reached with this key, its version, round trip and throughput."""
    if peer is not None:
        from nodes.peer_check import check_peer

        if family:
            raise BadRequest("--peer asks another node, --family this machine: one at a time")
        print(check_peer(peer, key, peer_key, plain=allow_plain_text).lines())
        return
    if key or peer_key or allow_plain_text:
        raise BadRequest("--key, --peer-key and --allow-plain-text say how to reach a --peer")
    import os
    import platform
    import sys

    from nodes.session import quiet_libraries
    from relay.family import Family, find_family
    from relay.program import check_choice

    check_choice("role", role, ("all", "edge", "device"))
    spec = find_family(family) if family else None
    quiet_libraries()
    print(f"python       {platform.python_version()} at {sys.prefix}")
    for package in ("torch", "torchvision", "diffusers", "transformers", "pyzmq", "lpips", "vowpal-wabbit-next"):
        print(f"{package:<12} {_installed_version(package)}")
    import torch

    print(f"processor    {platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("Apple MPS")
    print(f"accelerators {', '.join(accelerators) or 'none (the embedded families run on the CPU)'}")
    if spec is None:
        return
    configs_missing = None
    try:
        loaded = Family.load(spec, role=role)  # type: ignore[arg-type]
        kind = loaded.parameterisation
    except FamilyError as error:
        if not any(part.repo and not part.is_local for part in (*spec.members.values(), spec.vae, spec.text)):
            raise
        loaded, kind, configs_missing = Family(spec, role=role), "parameterisation unknown", error  # type: ignore[arg-type]
    print(f"family       {spec.name}: {spec.architecture}, {kind}, role {role}")
    needs = loaded.needs()
    for need in needs:
        state = "on disk" if need.installed else f"to download: {_bytes(need.bytes)}"
        print(f"  {need.name:<16} {_bytes(need.memory)} in memory, {state}, {need.where}")
    known = [need.memory for need in needs if need.memory is not None]
    unknown = len(needs) - len(known)
    more = f" and {unknown} components of unknown size" if unknown else ""
    print(f"  memory needed for weights: {_bytes(sum(known))}{more}")
    if configs_missing is not None:
        print(f"  nothing else can be checked: {configs_missing}")
        return
    try:
        loaded.members_share_latent_space()
    except RelayError as error:
        raise RelayError(f"family {spec.name}: {error}") from None
    print("  members share one latent space, as far as their configs and VAEs say")


def _installed_version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _bytes(count: int | None) -> str:
    if count is None:
        return "size unknown"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError
