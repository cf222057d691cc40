"""Make rows of real people's chats out of the package chitchat-dataset 0.9.0, one client a person.

    pip install --no-deps chitchat-dataset==0.9.0
    python make.py [--people 20] [--rows 40]

The package is read where it is installed and never imported. Nothing is downloaded. Written beside
this script: ``chat_users.jsonl``, a row for each excerpt of a chat, with the columns ``client``
(who is to be learnt), ``messages`` (what the other one said is the user's, what the client said is
the assistant's, the topic is the system's), ``conv`` (the chat) and ``split``.
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "chitchat-dataset"
PRIVATE = re.compile(
    r"https?://|www\.|[\w.+-]+@[\w-]+\.\w+|(?i:my (?:last |full )?name is )[A-Z]|\d{3}[-. ]\d{4}"
)
"""Messages with an address, a name or a telephone number are left out."""

LONGEST = 60
"""Words of one turn; of a longer one, the end is left out."""

TURNS = 3
"""How often the client answers in an excerpt, at most."""

EXCERPTS = 4
"""Excerpts of one chat, at most: long ones are cut short, so that nobody is one chat alone."""

Turn = tuple[str, str]
"""Who, and what."""


def main() -> None:
    """Write the rows, and say what was written."""
    parser = argparse.ArgumentParser(description="Rows of real people's chats, a client a person.")
    parser.add_argument("--people", type=int, default=20, help="how many clients (20)")
    parser.add_argument("--rows", type=int, default=40, help="rows of each (40)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("chat_users.jsonl"))
    asked = parser.parse_args()
    excerpts = excerpts_by_person(json.loads(source().read_text(encoding="utf-8")))
    enough = [person for person, own in excerpts.items() if len(own) >= asked.rows]
    people = sorted(enough, key=lambda person: hashlib.sha256(person.encode()).digest())
    people = sorted(people[: asked.people])
    with asked.output.open("w", encoding="utf-8") as file:
        for person in people:
            for row in split(excerpts[person], asked.rows):
                file.write(json.dumps({"client": f"user-{person[:8]}", **row}) + "\n")
    print(f"{asked.output}: {len(people)} of {len(enough)} people with {asked.rows} rows or more")


def source() -> Path:
    """Return where the package's data lie; ends with advice if it is not installed."""
    try:
        return Path(distribution(PACKAGE).locate_file("chitchat_dataset/dataset.json"))
    except PackageNotFoundError:
        raise SystemExit(f"pip install --no-deps {PACKAGE}==0.9.0") from None


def excerpts_by_person(chats: dict[str, dict]) -> dict[str, list[dict]]:
    """Cut every chat into excerpts, once for each of the two, in the order of time."""
    excerpts = defaultdict(list)
    for name, chat in sorted(chats.items(), key=lambda item: (item[1]["start"], item[0])):
        turns = turns_of(chat)
        topic = tidy(chat.get("prompt") or "")
        for person in sorted({who for who, _ in turns}):
            for messages in cut(turns, person)[:EXCERPTS]:
                system = {"role": "system", "content": topic or "A chat."}
                excerpts[person].append({"messages": [system, *messages], "conv": name})
    return excerpts


def turns_of(chat: dict) -> list[Turn]:
    """Return who said what, messages of one person in a row joined."""
    turns: list[Turn] = []
    for message in (message for group in chat["messages"] for message in group):
        if said := tidy(message["text"] or ""):
            who = message["sender"]
            if turns and turns[-1][0] == who:
                said = f"{turns.pop()[1]}\n{said}"
            turns.append((who, said))
    return turns


def cut(turns: list[Turn], person: str) -> list[list[dict[str, str]]]:
    """Return stretches that begin with the other one and end with an answer of ``person``."""
    stretches: list[list[dict[str, str]]] = [[]]
    for who, said in turns:
        if who != person and len(stretches[-1]) >= 2 * TURNS:
            stretches.append([])
        if who != person or stretches[-1]:
            content = " ".join(said.split(" ")[:LONGEST])
            role = "assistant" if who == person else "user"
            stretches[-1].append({"role": role, "content": content})
    if stretches[-1] and stretches[-1][-1]["role"] == "user":
        stretches[-1].pop()
    return [stretch for stretch in stretches if stretch]


def split(excerpts: list[dict], n_rows: int) -> list[dict]:
    """Return the first rows in time; the last fifth, in whole chats, is for testing."""
    rows = excerpts[:n_rows]
    border = rows[-max(1, n_rows // 5)]["conv"]
    first = next(i for i, row in enumerate(rows) if row["conv"] == border)
    return [{**row, "split": "test" if i >= first else "train"} for i, row in enumerate(rows)]


def tidy(text: str) -> str:
    """Return text with even white space, or nothing if it may say who somebody is."""
    return "" if PRIVATE.search(text) else re.sub(r"\s+", " ", text.replace("\u200b", "")).strip()


if __name__ == "__main__":
    main()
