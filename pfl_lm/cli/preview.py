"""``pfl-lm preview``: the clients' rows as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.exits import label, plain
from pfl_lm.data.labels import task_of
from pfl_lm.errors import DataError
from pfl_lm.preflight import check_recipe

if TYPE_CHECKING:
    from pfl_lm.data.preview import ClientPreview, Piece, Spread

MOST_CLIENTS = 20
"""How many clients are shown unless one is asked for."""

BEFORE, AFTER = "⟦", "⟧"
SUPERVISED = "underline green"


def preview(recipe: Path, overrides: list[str], only: str | None = None) -> None:
    """Load the tokenizer alone, and show one example and some numbers of each client.

    Raises:
        PflError: the recipe, its data or its backbone cannot be used, or there is no such client.
    """
    console = Console(highlight=False, soft_wrap=True)
    checked = check_recipe(recipe, overrides, to_run=False)
    if only is not None and only not in checked.clients:
        raise _no_such_client(only, list(checked.clients))

    from pfl_lm.data.preview import preview_clients
    from pfl_lm.data.splits import rows_to_train
    from pfl_lm.model.outline import find_source, load_tokenizer

    def say(text: str) -> None:
        console.print(Text(plain(text)))

    options = checked.loaded.recipe
    source = find_source(options.backbone, say)
    tokenizer = load_tokenizer(source, options.backbone)
    max_length = options.data.max_length
    names = list(checked.clients)[:MOST_CLIENTS] if only is None else [only]
    lengths = options.own_lengths(rows_to_train(checked.clients))
    task = task_of(options, checked.clients)
    shown = preview_clients(
        checked.clients, tokenizer, *options.data.length, names, lengths, task=task
    )
    colour = console.color_system is not None
    marks = "underlined" if colour else f"between {BEFORE} and {AFTER}"
    long = "" if options.data.on_long == "truncate" else f", data.on_long {options.data.on_long}"
    say(f"data.max_length {max_length}{long}; what is {marks} is supervised: the loss counts it")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        say(
            f"the padding token is the end token, {tokenizer.eos_token}; padding is masked by its "
            "position, so the end of an answer is learned all the same"
        )
    for each in shown:
        console.print()
        for line in _about(each, lengths.get(each.id, max_length)):
            say(line)
        console.print(_example(each.example, colour))
    if only is None and len(checked.clients) > len(shown):
        say(f"\nand {len(checked.clients) - len(shown)} more clients; --client ID shows one")


def _no_such_client(client: str, clients: Sequence[str]) -> DataError:
    from difflib import get_close_matches

    from pfl_lm.data.words import short

    close = get_close_matches(client, clients, n=3, cutoff=0.5) or clients[:3]
    there = "there is" if len(clients) == 1 else f"there are {len(clients)}:"
    more = ", …" if len(clients) > len(close) else ""
    return DataError(
        f"--client: no row is of a client {short(client)}",
        hint=f"{there} {', '.join(map(short, close))}{more}",
    )


def _about(client: ClientPreview, max_length: int) -> Iterator[str]:
    """Yield the lines above a client's example."""
    yield label(client.id)
    rows = [f"{split.rows} {name}" for name, split in client.splits.items()]
    yield f"  rows        {', '.join(rows)}"
    yield f"  tokens      {_spread(client.tokens)}"
    yield f"  supervised  {_spread(client.supervised)}"
    yield f"  cut         {_by_split(client, 'cut')}"
    yield f"  dropped     {_by_split(client, 'dropped')}"
    if any(split.twice for split in client.splits.values()):
        yield f"  twice       {_by_split(client, 'twice')}, equal to a row before"
    for (a, b), n in client.across.items():
        yield f"  in two      {n} in {a} and in {b}"
    if client.elsewhere:
        yield f"  elsewhere   {client.elsewhere} held out here, and in train of another client"
    if client.example_cut_from is not None:
        yield f"  example     the first {max_length} of {client.example_cut_from} tokens"


def _spread(spread: Spread) -> str:
    return f"{spread.least} to {spread.most}, median {spread.middle:g}"


def _by_split(client: ClientPreview, name: str) -> str:
    found = {split: getattr(each, name) for split, each in client.splits.items()}
    parts = [f"{n} {split}" for split, n in found.items() if n]
    return ", ".join(parts) or "0"


def _example(example: Sequence[Piece], colour: bool) -> Text:
    """Return the text with its supervised parts marked, each line behind a bar.

    The bar keeps a row's text from passing for a line of ours.
    """
    text = Text()
    for piece in example:
        shown = plain(piece.text)
        if not piece.supervised:
            text.append(shown)
        elif colour:
            text.append(shown, style=SUPERVISED)
        else:
            text.append(f"{BEFORE}{shown}{AFTER}")
    lines = text.split("\n", allow_blank=False)
    return Text("\n").join(Text("  │ ") + line for line in lines)
