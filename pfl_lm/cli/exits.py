"""How the command line ends: 0 well, 1 our fault, 2 the user's input, 130 or 141 broken off."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from unicodedata import category

import typer

from pfl_lm.cli.interrupts import Interrupted
from pfl_lm.errors import DismissedError, LostRankError, PflError

OURS = 1
INPUT = 2
INTERRUPTED = 130
UNREAD = 141
"""What shells say of a process that wrote on when nobody read: 128 and the number of SIGPIPE."""


_ACTS = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters, halves of surrogate pairs, line and paragraph separators."""

_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""

_LONGEST = 120


def plain(text: str) -> str:
    """Return text with control characters escaped, so that it cannot act on a terminal."""
    return "".join(
        repr(c)[1:-1] if c != "\n" and (category(c) in _ACTS or c in _TURNS) else c for c in text
    )


def label(client: str) -> str:
    """Return a client's id for a line or a cell: plain, and its end left out where it is long."""
    return plain(client if len(client) <= _LONGEST else f"{client[: _LONGEST - 1]}…")


@contextmanager
def exits(*, debug: bool) -> Iterator[None]:
    """Turn what a verb raises into a message on stderr and an exit code.

    Of several ranks on a machine, one says what is wrong with the user's input: all see the same.

    Args:
        debug: show the traceback as well.

    Raises:
        typer.Exit: with 2 for a `PflError`, 130 for an interrupt, 141 if nobody reads on, 1 for
            anything unexpected.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except DismissedError:
        _trace(debug)
        raise typer.Exit(INPUT) from None
    except PflError as error:
        _trace(debug)
        if _speaks() or isinstance(error, LostRankError):
            typer.echo(plain(str(error)), err=True)
        raise typer.Exit(INPUT) from None
    except (KeyboardInterrupt, Interrupted):
        _trace(debug)
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _trace(debug)
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still to be flushed
        os.dup2(nowhere, sys.stdout.fileno())
        raise typer.Exit(UNREAD) from None
    except Exception as error:
        _trace(debug)
        what = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        again = "" if debug else "; run again with --debug for the traceback"
        typer.echo(plain(f"this is a bug in pfl-lm ({what}){again}"), err=True)
        raise typer.Exit(OURS) from None


def _speaks() -> bool:
    """Return whether this is the only rank of its machine, or the first."""
    environment = os.environ
    return environment.get("LOCAL_RANK", environment.get("RANK", "0")) == "0"


def _trace(debug: bool) -> None:
    if debug:
        typer.echo(traceback.format_exc(), err=True, nl=False)
