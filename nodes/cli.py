"""The `relay` command line: one place for errors, one module a group of commands.

Nothing heavy is imported here: `relay --help` answers at once, torch is loaded when a command needs it.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from nodes.commands import ask, explain, generate, handoff, inspect, keys, levels, link, replay, service
from relay.errors import BadRequest, RelayError

# The base of every complaint about the command line; typer carries it without naming it.
CommandLineError: Any = typer.BadParameter.__mro__[2]

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
app.command("explain")(explain.explain)
app.command("levels")(levels.levels)
app.command("doctor")(inspect.doctor)
app.command("keygen")(keys.keygen)
app.command("link")(link.link)
app.command("link-set")(link.link_set)

app.command("gateway")(service.gateway)
app.command("edge")(service.edge)
app.command("device")(service.device)
app.command("up")(service.up)
app.command("submit")(ask.submit)
app.command("status")(ask.status)
app.command("trace")(ask.trace)
app.command("cancel")(ask.cancel)
app.command("feedback")(ask.feedback)
app.command("drain")(ask.drain)
app.command("replay")(replay.replay)


def main() -> None:
    """`relay`."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command line; any error is one line on stderr and a non-zero exit (2: what was asked cannot be done)."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            _fail("stopped", code)
    except BadRequest as error:
        code = _fail(str(error), 2)
    except RelayError as error:
        code = _fail(str(error), 1)
    except CommandLineError as error:
        message = error.format_message()  # empty where the help was asked for by saying nothing, and was printed
        code = _fail(message, 2) if message else 2
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("stopped", 130)
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    except Exception as error:
        if not _interrupted(error):
            raise
        code = _fail("stopped", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries that import lazily wrap whatever happens meanwhile in one of theirs."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
