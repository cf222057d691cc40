"""Pushing to a Hub of our own: what is sent, what is not, and that nothing is sent twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pfl_lm.export.index import parse_index
from tests.export.conftest import HOSTILE, HOSTILE_SLUG
from tests.export.fake_hub import TOKEN, FakeHub, account
from tests.export.pushing import REPO, committed, of_clients, push


def test_one_private_repository_with_a_folder_per_client(run_folder: Path, hub: FakeHub) -> None:
    code, stdout, stderr = push(run_folder)

    assert (code, stderr) == (0, "")
    repo = hub.repos[REPO]
    assert repo.private
    assert set(repo.files) == of_clients("alice", "bob", HOSTILE_SLUG)
    assert repo.commits == ["Add adapters of 3 clients"]
    last = stdout.splitlines()[-1]
    assert last == f"{hub.url}/{REPO} (private), commit {repo.head}"
    for slug in ("alice", "bob", HOSTILE_SLUG):
        local = run_folder / "adapters" / slug
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert repo.files[f"clients/{slug}/{name}"] == (local / name).read_bytes()


def test_the_index_lists_the_pushed_clients(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)

    local = parse_index((run_folder / "adapters.json").read_bytes(), "local")
    assert parse_index(hub.repos[REPO].files["adapters.json"], "remote") == local
    assert HOSTILE in local.clients


def test_a_second_push_sends_nothing(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)
    head = hub.repos[REPO].head
    hub.forget()

    code, stdout, _ = push(run_folder)

    assert (code, hub.sent()) == (0, [])
    assert stdout == f"nothing to send: {hub.url}/{REPO} is up to date at commit {head}\n"


def test_only_what_changed_is_sent(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)
    hub.forget()
    with (run_folder / "adapters" / "bob" / "README.md").open("a") as card:
        card.write("\nMore words.\n")

    push(run_folder)

    assert hub.repos[REPO].commits[1:] == ["Add adapters of 1 client"]
    assert committed(hub) == ["clients/bob/README.md"]


def test_some_clients_only_and_then_another(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder, "--clients", "alice")

    repo = hub.repos[REPO]
    assert set(repo.files) == of_clients("alice")
    everything = b"".join(request.body for request in hub.received)
    assert b"bob" not in everything
    assert HOSTILE_SLUG.encode() not in everything

    code, _, _ = push(run_folder, "--clients", f"bob,{HOSTILE_SLUG}")
    assert code == 0
    assert set(repo.files) == of_clients("alice", "bob", HOSTILE_SLUG)
    assert list(parse_index(repo.files["adapters.json"], "").clients) == [HOSTILE, "alice", "bob"]

    hub.forget()
    push(run_folder, "--clients", "alice")
    assert hub.sent() == []


def test_an_id_with_commas_is_one_client(run_folder: Path, hub: FakeHub) -> None:
    index = json.loads((run_folder / "adapters.json").read_text())
    index["clients"]["bob, the second"] = index["clients"].pop("bob")
    (run_folder / "adapters.json").write_text(json.dumps(index))

    code, _, _ = push(run_folder, "--clients", "bob, the second")

    assert code == 0
    assert set(hub.repos[REPO].files) == of_clients("bob")


@pytest.mark.parametrize("client", [" bob", "bob ", "a, b "])
def test_an_id_with_spaces_around_it_is_one_client(
    client: str, run_folder: Path, hub: FakeHub
) -> None:
    index = json.loads((run_folder / "adapters.json").read_text())
    index["clients"][client] = index["clients"].pop("bob")
    (run_folder / "adapters.json").write_text(json.dumps(index))

    assert push(run_folder, "--clients", client)[0] == 0
    assert list(parse_index(hub.repos[REPO].files["adapters.json"], "").clients) == [client]


def test_an_unknown_client_is_named_before_anything_is_asked(
    run_folder: Path, hub: FakeHub
) -> None:
    code, _, stderr = push(run_folder, "--clients", "alice,bobb")

    assert (code, hub.received) == (2, [])
    assert stderr.splitlines()[:2] == [
        "--clients: this run has no client 'bobb'",
        "  hint: did you mean 'bob'?",
    ]


def test_many_clients_take_few_commits_of_less_than_100_files(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.export.plan.MAX_FILES", 5)

    push(run_folder)

    adding = "Add adapters of 1 client"
    assert hub.repos[REPO].commits == [adding, adding, adding]
    assert committed(hub)[-2:] == ["adapters.json", "README.md"]
    assert set(hub.repos[REPO].files) == of_clients("alice", "bob", HOSTILE_SLUG)


def test_a_long_listing_of_the_repository_is_read_to_its_end(
    run_folder: Path, hub: FakeHub
) -> None:
    push(run_folder)
    hub.forget()
    hub.page_size = 4

    push(run_folder)

    assert hub.sent() == []
    assert sum("/tree/" in request.path for request in hub.received) == 3


def test_a_dry_run_lists_and_sends_nothing(run_folder: Path, hub: FakeHub) -> None:
    code, stdout, _ = push(run_folder, "--clients", "alice", "--dry-run")

    assert (code, hub.sent(), hub.repos) == (0, [], {})
    lines = stdout.splitlines()
    listed = [line.split()[-1] for line in lines[:5]]
    assert listed == [
        *(f"clients/alice/{name}" for name in ["adapter_config.json", "adapter_model.safetensors"]),
        "clients/alice/README.md",
        "adapters.json",
        "README.md",
    ]
    weights = (run_folder / "adapters" / "alice" / "adapter_model.safetensors").stat().st_size
    assert lines[1].split()[:2] == [f"{weights / 1000:.1f}", "kB"]
    assert lines[5].startswith("would send 5 files, ")
    assert lines[5].endswith(f" to {REPO} in 1 commit")
    assert lines[6] == "dry run: nothing was sent"


def test_a_dry_run_of_many_files_lists_the_first(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.cli.push.MOST_FILES", 4)
    _, stdout, _ = push(run_folder, "--dry-run")
    lines = stdout.splitlines()
    assert [line.split()[-1].split("/")[0] for line in lines[:4]] == ["clients"] * 4
    assert lines[4] == "and 7 more"
    assert lines[5].startswith("would send 11 files, ")


def test_a_dry_run_leaves_out_what_is_there(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder, "--clients", "alice")
    hub.forget()

    _, stdout, _ = push(run_folder, "--clients", "alice", "--dry-run")

    assert hub.sent() == []
    assert stdout.splitlines()[0] == f"would send 0 files, 0 bytes to {REPO} in 0 commits"
    assert "5 files there already" in stdout


def test_a_dry_run_needs_no_token(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")

    code, stdout, _ = push(run_folder, "--dry-run")

    assert (code, hub.received) == (0, [])
    assert stdout.splitlines()[0] == "not compared with the Hub: there is no token to push with"
    assert "would send 11 files" in stdout


def test_public_only_if_asked_for(run_folder: Path, hub: FakeHub) -> None:
    code, stdout, _ = push(run_folder, "--public")

    assert code == 0
    assert not hub.repos[REPO].private
    assert "(public), commit" in stdout
    assert push(run_folder, "--public")[0] == 0

    code, _, stderr = push(run_folder)
    assert code == 2
    assert stderr.startswith(f"{REPO} is public, so everybody could load these adapters\n")


def test_a_private_repository_is_not_made_public(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)
    hub.forget()

    code, _, stderr = push(run_folder, "--public")

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith(f"{REPO} is private, and a push does not change that\n")


def test_a_repository_of_something_else_is_left_alone(run_folder: Path, hub: FakeHub) -> None:
    hub.add_repo(REPO, {"README.md": b"mine", "config.json": b"{}"})

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith(f"{REPO} holds something else already: README.md, config.json\n")


def test_adapters_of_another_run_are_told_of_and_not_listed(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)
    repo = hub.repos[REPO]
    repo.files["clients/bob/adapter_model.safetensors"] = b"of another run"

    _, stdout, _ = push(run_folder, "--clients", "alice")

    assert stdout.startswith("left in the repository as they are, and not listed: clients/bob\n")
    assert list(parse_index(repo.files["adapters.json"], "").clients) == [HOSTILE, "alice"]
    assert repo.files["clients/bob/adapter_model.safetensors"] == b"of another run"


def test_an_organization_may_be_the_owner(run_folder: Path, hub: FakeHub) -> None:
    assert push(run_folder, repo="an-org/adapters")[0] == 0
    assert hub.repos["an-org/adapters"].private


def test_a_token_that_only_reads_in_an_organization(run_folder: Path, hub: FakeHub) -> None:
    hub.accounts[TOKEN] = account(**{"an-org": "read"})

    code, _, stderr = push(run_folder, repo="an-org/adapters")

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith("an-org/adapters: me may only read in an-org\n")


def test_an_interrupted_push_says_how_to_go_on(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **named: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfl_lm.export.remote.Remote.commit", interrupt)

    code, stdout, stderr = push(run_folder, "--clients", "alice")

    command = f"pfl-lm push {run_folder} --repo {REPO} --clients alice"
    assert (code, stderr) == (130, "interrupted\n")
    assert stdout.splitlines()[-1] == (
        f"the push was stopped; what was sent stays. To go on: {command}"
    )


def test_a_client_alone_may_be_larger_than_a_commit(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.export.plan.MAX_BYTES", 10)

    assert push(run_folder)[0] == 0
    assert len(hub.repos[REPO].commits) == 4
    assert set(hub.repos[REPO].files) == of_clients("alice", "bob", HOSTILE_SLUG)
