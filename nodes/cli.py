"""The `relay` command line: one place for errors, one module a group of commands.

Nothing heavy is imported here: `relay --help` answers at once, torch is loaded when a command needs it.
"""

from __future__ import annotations

import sys

import click
import typer

from nodes.commands import generate, handoff, inspect
from relay.errors import BadRequest, RelayError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Relay inference: a large diffusion model starts a picture, a small one of the same family finishes it.\n\n"
    'Try: `relay generate "a red heart at the top left and a blue circle, on a yellow background" --handoff 14`',
)
app.command("generate")(generate.generate)
app.command("start")(handoff.start)
app.command("finish")(handoff.finish)
app.command("families")(inspect.families)
app.command("judge")(inspect.judge)
app.command("show")(generate.show)
app.command("doctor")(inspect.doctor)


def main() -> None:
    """Run the command; any error is one line on stderr and a non-zero exit (2: what was asked cannot be done)."""
    try:
        code = app(standalone_mode=False)
    except BadRequest as error:
        code = _fail(str(error), 2)
    except RelayError as error:
        code = _fail(str(error), 1)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = 2
    except click.ClickException as error:
        code = _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = _fail("stopped", 130)
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
