"""The command line: ``pullback explain | evaluate | steer | sae | list | doctor | demo``.

Exit codes: 0 it worked; 2 a mistake of the user's, said in one line on stderr with the way out; 1 a fault of
ours.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from pullback.commands.demo import demo
from pullback.commands.doctor import doctor
from pullback.commands.evaluate import evaluate
from pullback.commands.explain import explain
from pullback.commands.listing import listing
from pullback.commands.sae import sae
from pullback.commands.steer import steer
from pullback.version import __version__

__all__ = ["app", "main"]

OK, INTERNAL, MISTAKE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="pullback",
    help="Gradient attribution for any PyTorch model, with a measure of how far to trust it.",
    epilog="Exit codes: 0 ok, 2 a mistake in what was typed, 1 an internal error. Nothing is downloaded.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(explain)
app.command()(evaluate)
app.command("list")(listing)
app.command()(doctor)
app.command()(demo)
app.add_typer(steer, name="steer")
app.add_typer(sae, name="sae")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pullback {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Gradient attribution for any PyTorch model, with a measure of how far to trust it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # before transformers is imported anywhere: its hub client reads this once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        code = typer.main.get_command(app).main(given, prog_name="pullback", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _said("interrupted.", INTERRUPTED)
    except Exception as error:
        return _reported(error, given)
    return code if isinstance(code, int) else OK


def _reported(error: Exception, given: Sequence[str]) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own: an unknown option, a missing argument
        command = next((word for word in given if not word.startswith("-")), "")
        known = command in {"explain", "evaluate", "steer", "sae", "list", "doctor", "demo"}
        return _said(f"{usage()} See: pullback {command + ' ' if known else ''}--help", MISTAKE)
    if _is_mistake(error):
        return _said(str(error), MISTAKE)
    traceback.print_exception(error)
    return _said(
        f"internal error, {type(error).__name__}: {error} Please report it with the lines above.", INTERNAL
    )


def _is_mistake(error: Exception) -> bool:
    """Whether the error is one of the typed ones that say what to type instead, or a missing extra."""
    from pullback.core import errors

    typed = tuple(
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ValueError)
    )
    return isinstance(error, (*typed, ImportError))


def _said(message: str, code: int) -> int:
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code
