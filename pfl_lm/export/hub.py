"""Pushing a finished run: one repository, one folder per client, few commits, nothing twice.

Everything is checked before anything is sent. The index and the repository's card go last, so that
a push that broke off lists nobody whose files are missing, and the next one sends only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pfl_lm.errors import HubError
from pfl_lm.export.card_text import count
from pfl_lm.export.outgoing import OutgoingFile
from pfl_lm.export.plan import Plan, check_visibility
from pfl_lm.export.remote import Remote


@dataclass(frozen=True, slots=True)
class Pushed:
    """What came of a push: the repository's address, its last commit, and what was sent."""

    url: str
    commit: str
    plan: Plan


def push(
    plan: Plan,
    remote: Remote,
    *,
    public: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Carry out a plan. What was sent before an error stays, and a new plan leaves it out.

    Raises:
        ExportError: a file is not what it was when the plan was made.
        HubError: the Hub refuses or cannot be reached.
    """
    found = plan.found
    if found is None:
        remote.create(private=not public)
        found = remote.find()
        if found is None:
            raise HubError(
                f"{remote.repo} cannot be seen just after it was made", hint="push again"
            )
        check_visibility(remote.repo, found, public=public)
    head = found.commit
    for number, files in enumerate(plan.commits, start=1):
        say(f"sending commit {number} of {len(plan.commits)}: {len(files)} files")
        head = remote.commit(files, _message(files), parent=head)
    return Pushed(remote.url, head, plan)


def _message(files: Sequence[OutgoingFile]) -> str:
    n_clients = len({file.path.split("/")[1] for file in files if "/" in file.path})
    if n_clients == 0:
        return "Update the list of adapters"
    return f"Add adapters of {count(n_clients, 'client')}"
