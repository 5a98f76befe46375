"""`relay keygen`: who a node is, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node's name, as in the deployment.")],
    role: Annotated[str, typer.Option(help="gateway | edge | device | client | judge: what the key may do.")],
    out: Annotated[Path, typer.Option(help="Folder to write NAME.key and NAME.pub to.")] = Path("keys"),
    tenant: Annotated[str | None, typer.Option(help="Whose jobs it asks for; default: its own.")] = None,
) -> None:
    """Make a CURVE key pair: NAME.key stays on the node's machine, NAME.pub goes into the others' allow lists."""
    from nodes.keys import write_keys

    secret, public = write_keys(name, role, out, tenant)
    print(f"{secret}  secret: keep it on the machine of {name}")
    print(f"{public}  public: copy it into the allow list of whoever shall know {name}")
