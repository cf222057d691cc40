"""What a push would send: everything checked, what is there already left out, nothing sent yet.

    run folder ─ adapters.json ─► clients ─► files of the allow-list ─┐
    Hub ─ account, repository, tree ──────────────────────────────────┴► what differs ─► commits

Neither side is believed: files are opened by name and checked, and what is on the Hub is only
compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfl_lm.errors import HubError
from pfl_lm.export.index import NAME, AdapterIndex, read_index
from pfl_lm.export.outgoing import (
    CARD,
    WEIGHTS,
    OutgoingFile,
    choose_clients,
    client_files,
    portable,
)
from pfl_lm.export.remote import Found, Remote, RemoteFile
from pfl_lm.export.repository_card import repository_card

MAX_FILES, MAX_BYTES = 96, 256 * 2**20
"""The most that one commit holds, unless one client alone has more."""
_CLIENTS = "clients/"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push would send, commit by commit.

    Attributes:
        found: the repository as it is; None if it is not there, or was not looked for.
        unchanged: files that are there already.
        unlisted: folders of clients in the repository that are not as they are in this run.
    """

    found: Found | None
    commits: tuple[tuple[OutgoingFile, ...], ...]
    unchanged: int
    unlisted: tuple[str, ...]

    @property
    def files(self) -> list[OutgoingFile]:
        """All files that would be sent."""
        return [file for commit in self.commits for file in commit]


def check_repo_id(repo: str) -> None:
    """Check that a repository can have this name.

    Raises:
        HubError: it cannot.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    hint = "name it as --repo ORG/NAME, where ORG is an account or an organization of yours"
    if repo.count("/") != 1:
        raise HubError(f"--repo: {repo!r} is not of the form ORG/NAME", hint=hint)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--repo: {error}", hint=hint) from None


def plan_push(
    run_folder: Path,
    repo: str,
    clients: Sequence[str] = (),
    *,
    public: bool = False,
    remote: Remote | None,
) -> Plan:
    """Check everything and return what a push would send; sends nothing.

    Without a ``remote`` nothing is asked of the Hub, and the plan is that of a new repository.

    Raises:
        ExportError: the run folder does not hold what it says.
        RunFolderError: a file in it is missing, or is a link.
        HubError: the Hub, the account or the repository does not allow this push.
    """
    check_repo_id(repo)
    index = read_index(run_folder)
    chosen = choose_clients(index, clients)
    found: Found | None = None
    tree: dict[str, RemoteFile] = {}
    if remote is not None:
        remote.check_account()
        found = remote.find()
        if found is not None:
            check_visibility(repo, found, public=public)
            tree = remote.tree()
            _check_ours(repo, tree)

    groups = [client_files(run_folder, index, client, repo) for client in chosen]
    listed = portable(index, {*chosen, *_there_already(index, tree)})
    front = {NAME: listed.text(), CARD: repository_card(listed, repo).encode()}
    groups.append([OutgoingFile.of(path, partial(bytes, text)) for path, text in front.items()])
    changed = [[file for file in group if not _is_there(file, tree)] for group in groups]
    n_files, n_changed = (sum(map(len, each)) for each in (groups, changed))
    return Plan(found, _commits(changed), n_files - n_changed, _unlisted(tree, listed))


def check_visibility(repo: str, found: Found, *, public: bool) -> None:
    """Check that whoever can see the repository is who the user means to.

    Raises:
        HubError: it is public without ``public``, or private with it.
    """
    if not found.private and not public:
        raise HubError(
            f"{repo} is public, so everybody could load these adapters",
            hint="say --public if that is what you want, or name another repository",
        )
    if found.private and public:
        raise HubError(
            f"{repo} is private, and a push does not change that",
            hint="leave out --public, or make it public in its settings on the Hub first",
        )


def _check_ours(repo: str, tree: Mapping[str, RemoteFile]) -> None:
    """Refuse a repository that holds something else than adapters pushed from here."""
    if NAME in tree:
        return
    foreign = [path for path in tree if path != ".gitattributes" and not path.startswith(_CLIENTS)]
    if foreign:
        raise HubError(
            f"{repo} holds something else already: {', '.join(sorted(foreign)[:3])}",
            hint="name a new repository, and it will be made",
        )


def _there_already(index: AdapterIndex, tree: Mapping[str, RemoteFile]) -> list[str]:
    """Return the clients whose adapters are in the repository just as they are in this run."""
    found = []
    for client, entry in index.clients.items():
        there = tree.get(f"clients/{entry.slug}/{WEIGHTS}")
        if there is not None and there.lfs_sha256 == entry.sha256:
            found.append(client)
    return found


def _unlisted(tree: Mapping[str, RemoteFile], listed: AdapterIndex) -> tuple[str, ...]:
    folders = {"/".join(path.split("/")[:2]) for path in tree if path.startswith(_CLIENTS)}
    return tuple(sorted(folders - {f"clients/{entry.slug}" for entry in listed.clients.values()}))


def _is_there(file: OutgoingFile, tree: Mapping[str, RemoteFile]) -> bool:
    there = tree.get(file.path)
    return there is not None and there.is_same(file)


def _commits(groups: Sequence[list[OutgoingFile]]) -> tuple[tuple[OutgoingFile, ...], ...]:
    """Put groups into as few commits as fit; a client's files are never torn apart."""
    commits: list[list[OutgoingFile]] = []
    for group in filter(None, groups):
        size = sum(file.size for file in group)
        last = commits[-1] if commits else None
        fits = last is not None and (
            len(last) + len(group) <= MAX_FILES and sum(f.size for f in last) + size <= MAX_BYTES
        )
        if last is not None and fits:
            last.extend(group)
        else:
            commits.append(list(group))
    return tuple(map(tuple, commits))
