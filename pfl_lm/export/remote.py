"""One repository on the Hub, as far as a push needs it. ``huggingface_hub`` is imported late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from pfl_lm.errors import HubError
from pfl_lm.export.hub_errors import explain, rate_limit_of, rate_limits_raised, too_long
from pfl_lm.export.outgoing import OutgoingFile

Result = TypeVar("Result")
PATIENCE_S = 300.0
"""How long one push waits in all where the Hub asks it to; the Hub counts by five minutes."""
_LEAST_PATIENCE_S = 30.0  # so that a Hub that always says "at once" is not asked forever


@dataclass(frozen=True, slots=True)
class Found:
    """A repository that is there: who may see it, and its last commit."""

    private: bool
    commit: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that is there: SHA-256 if it is in LFS, else git's SHA-1."""

    git_sha1: str
    lfs_sha256: str | None

    def is_same(self, file: OutgoingFile) -> bool:
        """Tell whether sending ``file`` would change nothing."""
        if self.lfs_sha256 is not None:
            return self.lfs_sha256 == file.sha256
        return self.git_sha1 == file.git_sha1


class Remote:
    """The repository ``ORG/NAME``, with the token of HF_TOKEN or of ``hf auth login``.

    Args:
        repo: its id.
        say: is told when a wait begins.

    Raises:
        HubError: from the constructor, if there is no token or no network is wanted; from every
            method, if the Hub refuses or cannot be reached.
    """

    def __init__(self, repo: str, say: Callable[[str], None] = lambda text: None) -> None:
        from huggingface_hub import HfApi, get_token, is_offline_mode

        if is_offline_mode():
            raise HubError("HF_HUB_OFFLINE is set, so the Hub is not asked", hint="unset it")
        token = get_token()
        if token is None:
            raise HubError(
                "there is no token to push with",
                hint="run `hf auth login`, or set HF_TOKEN to a token that may write",
            )
        self.repo = repo
        self._api = HfApi(token=token)
        self._say, self._patience_s = say, PATIENCE_S

    @property
    def url(self) -> str:
        """Where people look at the repository."""
        return f"{self._api.endpoint}/{self.repo}"

    def check_account(self) -> None:
        """Check that the token is good and may write where the repository is to be.

        What a fine-grained token may do is not told, so that is left to the first commit.
        """
        account: dict[str, Any] = self._ask(self._api.whoami)
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(
                "this token may read but not write",
                hint="make one that may write: https://huggingface.co/settings/tokens",
            )
        owner = self.repo.partition("/")[0]
        orgs = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or ()}
        names = [account["name"], *orgs]
        if role != "fineGrained" and owner.lower() not in {name.lower() for name in names}:
            raise HubError(
                f"{self.repo}: the account {account['name']} has no name space {owner!r}. "
                f"It has: {', '.join(sorted(names))}",
                hint=f"for example --repo {account['name']}/{self.repo.partition('/')[2]}",
            )
        if orgs.get(owner) == "read":
            raise HubError(f"{self.repo}: {account['name']} may only read in {owner}")

    def find(self) -> Found | None:
        """Return the repository as it is, or None if it is not there."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> Any:
            try:
                return self._api.model_info(self.repo)
            except RepositoryNotFoundError as error:
                if error.response.status_code != 404:
                    raise
                return None

        info = self._ask(look)
        return None if info is None else Found(private=bool(info.private), commit=str(info.sha))

    def create(self, *, private: bool) -> None:
        """Make the repository, empty; it is no fault if it is there by now."""
        self._ask(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))

    def tree(self) -> dict[str, RemoteFile]:
        """Return every file in the repository by its path."""
        from huggingface_hub.hf_api import RepoFile

        listing = self._ask(lambda: list(self._api.list_repo_tree(self.repo, recursive=True)))
        return {
            each.path: RemoteFile(each.blob_id, None if each.lfs is None else each.lfs.sha256)
            for each in listing
            if isinstance(each, RepoFile)
        }

    def commit(self, files: Iterable[OutgoingFile], message: str, parent: str) -> str:
        """Send files as one commit on top of ``parent``; return the commit."""
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(file.path, file.content()) for file in files]
        done = self._ask(
            lambda: self._api.create_commit(
                self.repo, operations, commit_message=message, parent_commit=parent
            )
        )
        return str(done.oid)

    def _ask(self, call: Callable[[], Result]) -> Result:
        """Call the Hub, wait where it asks for a short wait, and put what goes wrong in words."""
        while True:
            try:
                with rate_limits_raised():
                    return call()
            except Exception as error:
                limit = rate_limit_of(error)
                if limit is None:
                    explained = explain(error, self.repo)
                    if explained is None:
                        raise
                    raise explained from error
                if limit.wait_s > self._patience_s:
                    raise too_long(limit) from error
                self._patience_s -= max(limit.wait_s, _LEAST_PATIENCE_S)
                self._say(f"the Hub asks for {limit.wait_s:.0f} s of rest (429); waiting")
                time.sleep(limit.wait_s + 1)  # it counts in whole seconds
