"""``pfl-lm join`` and ``pfl-lm remove``: clients that come late, and clients that leave."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from pfl_lm.cli.exits import plain
from pfl_lm.cli.resume import go_on
from pfl_lm.cli.run import resume_command, run_console
from pfl_lm.resume import finished_rounds, run_recipe


def join(run: Path, client: str, data: Path | None) -> None:
    """Add a client; of a run that was finished it gets its adapter at once.

    Raises:
        PflError: it cannot be added.
    """
    finished = finished_rounds(run_recipe(run).run_folder) is not None
    from pfl_lm.membership import join as add

    member = add(run, client, data)
    rows = f"{member.n_train} train, {member.n_validation} validation, {member.n_test} test rows"
    _say(f"{client} has joined, after round {member.joined}: {rows}")
    if finished:
        go_on(run_recipe(run))
    else:
        _say(f"next: go on with the run  {resume_command(run)}")


def remove(run: Path, client: str, *, replay: bool) -> None:
    """Take a client out; with ``replay``, run all rounds again without it.

    Raises:
        PflError: it cannot be taken out.
    """
    from pfl_lm.membership import remove as take_out

    member = take_out(run, client, replay=replay)
    _say(f"{member.client} is gone: its state, adapter, card, scores and rows of the ledger")
    if replay:
        go_on(run_recipe(run))
        return
    _say("what the shared adapter has learned from it stays in it; --replay would run all rounds")
    _say("again without it. Its rows in your data file, and what was pushed, are yours to remove")


def _say(text: str) -> None:
    run_console().print(Text(plain(text)))
