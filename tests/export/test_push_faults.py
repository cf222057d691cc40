"""What a push says when the Hub refuses or the network fails, and how the next one goes on."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from pfl_lm.errors import HubError
from pfl_lm.export.hub_errors import wait_asked
from pfl_lm.export.plan import check_repo_id, plan_push
from pfl_lm.export.remote import Remote
from tests.export.conftest import HOSTILE_SLUG
from tests.export.fake_hub import TOKEN, FakeHub, account
from tests.export.pushing import REPO, committed, of_clients, push

ALL = of_clients("alice", "bob", HOSTILE_SLUG)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def again(run: Path) -> str:
    return f"to try again: {shlex.join(['pfl-lm', 'push', str(run), '--repo', REPO])}"


COMMIT, PREUPLOAD, PUT = "POST .*/commit/main", "POST .*/preupload/main", "PUT /lfs/"


@pytest.mark.parametrize("pattern", [COMMIT, PREUPLOAD, PUT, "/lfs-verify", "objects/batch"])
def test_a_push_that_lost_the_connection_goes_on(
    pattern: str, run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.export.plan.MAX_FILES", 3)  # a commit a client, one for the index
    hub.hang_up(pattern, times=50, skip=1)
    before = snapshot(run_folder)

    code, stdout, stderr = push(run_folder)

    assert code == 2
    assert "sending commit 2 of 4" in stdout
    lines = stderr.splitlines()
    assert lines[0].startswith("the connection to the Hub was lost (")
    assert lines[1:] == [
        "  hint: check the network; what was sent stays sent, and a push goes on from there",
        f"  {again(run_folder)}",
    ]
    assert snapshot(run_folder) == before
    repo = hub.repos[REPO]
    assert set(repo.files) == {".gitattributes"} | {path for path in ALL if HOSTILE_SLUG in path}

    hub.faults.clear()
    hub.forget()
    assert push(run_folder)[0] == 0
    assert set(repo.files) == ALL
    assert not any(HOSTILE_SLUG in path for path in committed(hub))


def test_a_commit_whose_answer_is_lost_is_not_made_again(run_folder: Path, hub: FakeHub) -> None:
    hub.hang_up(COMMIT, after=True)

    assert push(run_folder)[0] == 2
    assert set(hub.repos[REPO].files) == ALL
    hub.forget()

    code, stdout, _ = push(run_folder)
    assert (code, hub.sent()) == (0, [])
    assert stdout.startswith("nothing to send: ")


def test_no_connection_at_all(run_folder: Path, hub: FakeHub) -> None:
    hub.hang_up("whoami", times=50)

    code, _, stderr = push(run_folder)

    assert code == 2
    assert stderr.startswith("the connection to the Hub was lost (RemoteProtocolError)\n")
    assert again(run_folder) in stderr


REFUSALS = [
    ("whoami", 401, "the Hub does not accept this token (401)", "run `hf auth login`, or set"),
    (COMMIT, 401, "the Hub does not accept this token (401)", "run `hf auth login`, or set"),
    (
        "/repos/create",
        403,
        f"this token may not write to {REPO} (403): refused for a test",
        "make a token with write access to me: https://huggingface.co/settings/tokens",
    ),
    (COMMIT, 403, f"this token may not write to {REPO} (403): refused for a test", "make a token"),
    (PUT, 403, f"this token may not write to {REPO} (403): refused for a test", "make a token"),
    (
        COMMIT,
        409,
        f"{REPO} was changed by somebody else meanwhile (409): refused for a test",
        "look at what is there, then push again",
    ),
    (COMMIT, 412, f"{REPO} was changed by somebody else meanwhile (412)", "look at what is there"),
    (COMMIT, 404, f"{REPO} is not on the Hub, or this token may not see it (404)", "it may have"),
    (COMMIT, 413, "the Hub refuses this push (413): refused for a test", "to try again"),
    (COMMIT, 503, "the Hub is in trouble (503)", "push again later; what was sent stays sent"),
    (PREUPLOAD, 500, "the Hub is in trouble (500)", "push again later; what was sent stays sent"),
]


@pytest.mark.parametrize(("pattern", "status", "message", "hint"), REFUSALS)
def test_refusals_in_words(
    pattern: str, status: int, message: str, hint: str, run_folder: Path, hub: FakeHub
) -> None:
    hub.refuse(pattern, status, times=50)

    code, _, stderr = push(run_folder)

    assert code == 2
    lines = stderr.splitlines()
    assert lines[0].startswith(message)
    assert lines[1].startswith(f"  hint: {hint}")
    assert lines[-1].endswith(again(run_folder))
    assert "Traceback" not in stderr
    assert TOKEN not in stderr
    hub.faults.clear()
    assert push(run_folder)[0] == 0
    assert set(hub.repos[REPO].files) == ALL


@pytest.mark.parametrize("pattern", ["whoami", "/repos/create", PREUPLOAD, PUT, COMMIT, "/tree/"])
def test_a_short_rest_is_taken(pattern: str, run_folder: Path, hub: FakeHub) -> None:
    if pattern == "/tree/":
        push(run_folder, "--clients", "alice")
    hub.refuse(pattern, 429, Retry_After="7")

    code, stdout, stderr = push(run_folder)

    assert (code, stderr, hub.naps) == (0, "", [8.0])
    assert "the Hub asks for 7 s of rest (429); waiting" in stdout
    assert set(hub.repos[REPO].files) == ALL


@pytest.mark.parametrize("pattern", ["whoami", PREUPLOAD, PUT, COMMIT])
def test_a_long_rest_is_told_of_and_not_slept_through(
    pattern: str, run_folder: Path, hub: FakeHub
) -> None:
    hub.refuse(pattern, 429, Retry_After="3500", times=50)

    code, _, stderr = push(run_folder)

    assert (code, hub.naps) == (2, [])
    assert stderr.splitlines()[:2] == [
        "the Hub limits how much this account may ask (429) and wants 59 min of rest",
        "  hint: what was sent stays sent; push again in 59 min",
    ]
    assert again(run_folder) in stderr


@pytest.mark.parametrize("wait", ["0", "100"])
def test_patience_ends(wait: str, run_folder: Path, hub: FakeHub) -> None:
    hub.refuse(COMMIT, 429, Retry_After=wait, times=1000)

    code, _, stderr = push(run_folder)

    assert code == 2
    assert len(hub.naps) <= 11
    assert sum(hub.naps) <= 310
    assert "the Hub limits how much this account may ask (429)" in stderr


def test_what_a_429_asks_for() -> None:
    assert wait_asked({"retry-after": "12"}) == 12
    assert wait_asked({"ratelimit": '"api";r=0;t=55'}) == 55
    assert wait_asked({"retry-after": "soon", "ratelimit": '"api"; r=0; t = 5'}) == 5
    assert wait_asked({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert wait_asked({}) == 60
    assert wait_asked({"retry-after": "9" * 400}) == 60


def test_no_token(run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")

    code, _, stderr = push(run_folder)

    assert (code, hub.received) == (2, [])
    assert stderr.splitlines()[:2] == [
        "there is no token to push with",
        "  hint: run `hf auth login`, or set HF_TOKEN to a token that may write",
    ]


def test_no_network_wanted(run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    code, _, stderr = push(run_folder)

    assert (code, hub.received) == (2, [])
    assert stderr.startswith("HF_HUB_OFFLINE is set, so the Hub is not asked\n")


def test_a_token_that_only_reads(run_folder: Path, hub: FakeHub) -> None:
    hub.accounts[TOKEN] = account("read")

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith("this token may read but not write\n")


def test_a_name_space_of_others(run_folder: Path, hub: FakeHub) -> None:
    code, _, stderr = push(run_folder, repo="others/adapters")

    assert (code, hub.sent()) == (2, [])
    assert stderr.splitlines()[:2] == [
        "others/adapters: the account me has no name space 'others'. It has: an-org, me",
        "  hint: for example --repo me/adapters",
    ]


def test_what_a_fine_grained_token_may_do_is_left_to_the_hub(
    run_folder: Path, hub: FakeHub
) -> None:
    hub.accounts[TOKEN] = account("fineGrained")

    code, _, stderr = push(run_folder, repo="others/adapters")

    assert code == 2
    assert stderr.startswith(
        "this token may not write to others/adapters (403): "
        "You don't have the rights to create a model under others\n"
    )


def test_a_repository_that_the_token_is_not_good_for(run_folder: Path, hub: FakeHub) -> None:
    hub.refuse(f"GET /api/models/{REPO}$", 401, X_Error_Code="RepoNotFound")

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith("the Hub does not accept this token (401)\n")


BAD_IDS = ["adapters", "a/b/c", "me/a b", "me/..", "me/a--b", "/me", "me/", "me/x.git", "../x/y"]


@pytest.mark.parametrize("repo", BAD_IDS)
def test_names_no_repository_can_have(repo: str, run_folder: Path, hub: FakeHub) -> None:
    with pytest.raises(HubError, match="--repo"):
        check_repo_id(repo)

    code, _, stderr = push(run_folder, repo=repo)
    assert (code, hub.received) == (2, [])
    assert stderr.splitlines()[-1].startswith("  hint: name it as --repo ORG/NAME")


def test_somebody_else_pushing_at_the_same_time(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder, "--clients", "alice")
    remote = Remote(REPO)
    plan = plan_push(run_folder, REPO, ["bob"], remote=remote)
    hub.repos[REPO].head = "0" * 40

    with pytest.raises(HubError, match=r"changed by somebody else meanwhile \(412\)"):
        remote.commit(plan.files, "x", parent=plan.found.commit if plan.found else "")


def test_a_file_that_changes_between_plan_and_push(run_folder: Path, hub: FakeHub) -> None:
    remote = Remote(REPO)
    plan = plan_push(run_folder, REPO, ["bob"], remote=remote)
    (run_folder / "adapters" / "bob" / "adapter_config.json").write_text("{}")

    with pytest.raises(Exception, match="changed while it was being pushed"):
        [file.content() for file in plan.files]


def test_a_repository_seen_as_public_after_it_was_made(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FakeHub.add_repo

    def add_public(self: FakeHub, name: str, files: dict[str, bytes], *, private: bool) -> object:
        return real(self, name, files, private=False)

    monkeypatch.setattr(FakeHub, "add_repo", add_public)

    code, _, stderr = push(run_folder)

    assert code == 2
    assert f"{REPO} is public" in stderr
    assert set(hub.repos[REPO].files) == {".gitattributes"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_adapter(run_folder: Path, hub: FakeHub) -> None:
    file = run_folder / "adapters" / "bob" / "adapter_model.safetensors"
    file.chmod(0)

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert f"{file}: cannot be read: Permission denied" in stderr
