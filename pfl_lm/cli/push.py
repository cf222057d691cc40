"""``pfl-lm push``: a finished run's adapters to one repository on the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from pfl_lm.cli.exits import plain
from pfl_lm.errors import HubError
from pfl_lm.export.card_text import count, size
from pfl_lm.export.hub import push as send
from pfl_lm.export.plan import Plan, check_repo_id, plan_push
from pfl_lm.export.remote import Remote

MOST_FILES = 60
"""How many files a dry run lists."""


def push(run: Path, repo: str, clients: list[str], *, public: bool, dry_run: bool) -> None:
    """Push the adapters of a run, or say what a push would send.

    Raises:
        PflError: the run, the account, the repository or the Hub does not allow it.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    check_repo_id(repo)
    disable_progress_bars()
    logging.set_verbosity_error()
    if dry_run:
        _show_plan(plan_push(run, repo, clients, public=public, remote=_if_reachable(repo)), repo)
        return
    with _retryable(run, repo, clients, public=public):
        remote = Remote(repo, say=_say)
        plan = plan_push(run, repo, clients, public=public, remote=remote)
        _show_notes(plan)
        if not plan.files:
            assert plan.found is not None
            _say(f"nothing to send: {remote.url} is up to date at commit {plan.found.commit}")
            return
        pushed = send(plan, remote, public=public, say=_say)
    sent = f"{count(len(plan.files), 'file')}, {size(sum(file.size for file in plan.files))}"
    _say(f"sent {sent}; {plan.unchanged} were there already")
    _say(f"{pushed.url} ({'public' if public else 'private'}), commit {pushed.commit}")


def _if_reachable(repo: str) -> Remote | None:
    try:
        return Remote(repo, say=_say)
    except HubError as error:
        _say(f"not compared with the Hub: {error.message}")
        return None


@contextmanager
def _retryable(run: Path, repo: str, clients: list[str], *, public: bool) -> Iterator[None]:
    """Say how to push again, whatever happens: the run folder is as it was."""
    named = [argument for client in clients for argument in ("--clients", client)]
    words = ["pfl-lm", "push", str(run), "--repo", repo, *named, *["--public"] * public]
    try:
        yield
    except HubError as error:
        again = f"to try again: {shlex.join(words)}"
        hint = again if error.hint is None else f"{error.hint}\n  {again}"
        raise HubError(error.message, hint=hint) from error
    except KeyboardInterrupt:
        _say(f"the push was stopped; what was sent stays. To go on: {shlex.join(words)}")
        raise


def _show_plan(plan: Plan, repo: str) -> None:
    for file in plan.files[:MOST_FILES]:
        _say(f"{size(file.size):>12}  {file.path}")
    if len(plan.files) > MOST_FILES:
        _say(f"and {len(plan.files) - MOST_FILES} more")
    total = f"{count(len(plan.files), 'file')}, {size(sum(file.size for file in plan.files))}"
    _say(f"would send {total} to {repo} in {count(len(plan.commits), 'commit')}")
    if plan.unchanged:
        _say(f"{count(plan.unchanged, 'file')} there already")
    _show_notes(plan)
    _say("dry run: nothing was sent")


def _show_notes(plan: Plan) -> None:
    if plan.unlisted:
        folders = ", ".join(plan.unlisted[:5]) + (" …" if len(plan.unlisted) > 5 else "")
        _say(f"left in the repository as they are, and not listed: {folders}")


def _say(text: str) -> None:
    typer.echo(plain(text))
