"""Rows of a dataset on the Hub, by Hugging Face's ``datasets``, which is imported when one is read.

``datasets`` downloads and caches; no code that comes with a dataset is run, and of the many kinds
it knows only those with rows are read. Its rows then go the way of every other row. What no network
is needed for is found without one: a dataset that was read before is in the cache of ``datasets``.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pfl_lm.data.files import Kind, RawRow
from pfl_lm.data.parquet import ALWAYS, MOST_TIMES, rows_of
from pfl_lm.data.records import Split
from pfl_lm.data.words import did_you_mean, quoted
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.recipe.data import DataOptions

HUB = Kind("a Hub dataset", "a dataset of the Hub, each of its rows an example", "row")
ROW_KINDS = ("json", "csv", "parquet", "arrow", "text")
_FROM_CACHE = "cache"
_BATCH = 64
_LONGEST_SAID = 300

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a dataset, read into the cache of ``datasets``.

    ``limit`` is how many bytes its rows may take: as of a Parquet file, 100 times what it is.
    """

    split: Split
    called: str
    limit: int
    table: Any = field(repr=False)
    client: str | None = None
    kind: Kind = HUB

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows with nothing decoded: an image is its bytes, and no example."""
        tables = self.table.with_format("arrow").iter(batch_size=_BATCH)
        batches = (batch for table in tables for batch in table.to_batches())
        for number, columns in rows_of(batches, "split", self.limit):
            yield RawRow(self, number, columns)


def hub_splits(options: DataOptions) -> list[HubSplit]:
    """Return the splits of a Hub dataset that a recipe names, read from the Hub or the cache.

    Raises:
        DataError: there is no such dataset, configuration, revision or split, or it may not be
            read; the Hub cannot be reached, and the dataset is not in the cache; or it has no rows.
    """
    name = options.dataset_name
    assert name is not None
    if Path(name).exists():
        raise DataError(
            f"data.dataset_name: {name!r} is a file or folder here too, and `datasets` would read "
            "that one",
            hint="name it in data.path, or start from another folder",
        )
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it fails at is said below
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    builder = _explained(
        options,
        lambda: datasets.load_dataset_builder(
            name, options.dataset_config_name, revision=options.revision
        ),
    )
    _refuse_other_kinds(name, builder)
    _refuse_other_revision(options, builder)
    _explained(options, builder.download_and_prepare)
    limit = max(ALWAYS, MOST_TIMES * (builder.info.download_size or 0))
    return [
        HubSplit(split, asked, limit, _split(options, builder, split, asked))
        for split, asked in options.dataset_splits.items()
    ]


def _split(options: DataOptions, builder: Any, split: Split, asked: str) -> Any:
    """Return a split's rows, or say which splits there are."""
    there = list(builder.info.splits or ())
    try:
        return builder.as_dataset(split=asked)
    except (ValueError, AssertionError) as error:
        if all(part.partition("[")[0].strip() in there for part in asked.split("+")):
            wrong = f"{asked!r} is not a part of a split ({_said(error)})"
            hint = f"name one of {quoted(there)}, or a part of it such as `{there[0]}[:10%]`"
        else:
            meant = did_you_mean(asked, {name: name for name in there})
            wrong = f"{options.dataset_name} has no split {asked!r}{meant}"
            hint = f"it has {quoted(there)}"
        raise DataError(f"data.dataset_{split}_split: {wrong}", hint=hint) from None


def _kind_of(builder: Any) -> str:
    return type(builder).__module__.rpartition(".")[2]


def _refuse_other_kinds(name: str, builder: Any) -> None:
    if (kind := _kind_of(builder)) not in (*ROW_KINDS, _FROM_CACHE):
        raise DataError(
            f"data.dataset_name: {name} is a dataset of the kind {kind!r}, which is not read. "
            f"Read are {', '.join(ROW_KINDS)}",
            hint="name a dataset whose files hold rows",
        )


def _refuse_other_revision(options: DataOptions, builder: Any) -> None:
    """Make sure that what the cache has is what was asked for, which ``datasets`` does not."""
    asked = options.revision
    if asked is None or _kind_of(builder) != _FROM_CACHE or builder.hash == asked:
        return
    raise DataError(
        f"data.revision: the Hub cannot be reached, and the cache has {options.dataset_name} at "
        f"{builder.hash}, which need not be {asked!r}",
        hint=f"connect to the Hub, or set data.revision: {builder.hash}",
    )


def _explained(options: DataOptions, read: Callable[[], Result]) -> Result:
    """Return what ``datasets`` reads, or raise what it says is wrong in words of ours."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return read()
    except DatasetNotFoundError as error:
        raise _not_there(options, _said(error)) from None
    except ConnectionError as error:
        raise _not_reached(options, error) from None
    except ValueError as error:
        if (configs := _listed(error)) is not None:
            raise _no_config(options, configs, str(error)) from None
        raise _unreadable(options, error) from None
    except (DatasetsError, OSError, RuntimeError, LookupError, TypeError) as error:
        raise _unreadable(options, error) from None
    except Exception as error:
        # Told by name: huggingface_hub 1 talks through httpx, 2 through its successor httpx2.
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            raise _not_reached(options, error) from None
        raise


def _not_reached(options: DataOptions, error: Exception) -> DataError:
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _said(error)
    return DataError(
        f"data.dataset_name: {options.dataset_name} is not in the cache, and the Hub cannot be "
        f"reached ({why})",
        hint="run `pfl-lm validate` once where there is a network and HF_HUB_OFFLINE is not set; "
        "from then on the cache has it",
    )


def _not_there(options: DataOptions, said: str) -> DataError:
    key, hint = "dataset_name", "check the id on the Hub; for a private one run `hf auth login`"
    if "gated" in said:
        hint = (
            f"ask for access at https://huggingface.co/datasets/{options.dataset_name}, then run "
            "`hf auth login`"
        )
    elif said.startswith("Revision"):
        key, hint = "revision", "name a branch, tag or commit that the dataset has"
    return DataError(f"data.{key}: {said}", hint=hint)


def _no_config(options: DataOptions, configs: Sequence[str], said: str) -> DataError:
    asked = options.dataset_config_name
    if asked is not None and "in the cache" in said:
        wrong = (
            f"the Hub cannot be reached, and the cache has {options.dataset_name} without its "
            f"configuration {asked!r}"
        )
    elif asked is None:
        wrong = f"{options.dataset_name} has several configurations, and one must be named"
    else:
        meant = did_you_mean(asked, {config: config for config in configs})
        wrong = f"{options.dataset_name} has no configuration {asked!r}{meant}"
    return DataError(f"data.dataset_config_name: {wrong}", hint=f"it has {quoted(configs)}")


def _listed(error: ValueError) -> list[str] | None:
    """Return the configurations that a message of ``datasets`` lists; None if it is of another."""
    text = str(error)
    if several := re.search(r"configurations in the cache: (.*)", text):
        return several[1].split(", ")
    found = re.search(r"(?:Available|available configs|in the cache): \[(.*)\]", text)
    if found is None or not re.search(r"[Cc]onfig", text):
        return None
    return list(re.findall(r"['\"](.*?)['\"](?:, |$)", found[1]))


def _unreadable(options: DataOptions, error: Exception) -> DataError:
    reason = _said(error.__cause__) if error.__cause__ is not None else _said(error)
    if "scripts are no longer supported" in reason:
        return DataError(
            f"data.dataset_name: {options.dataset_name} comes as a script, and no code that comes "
            "with a dataset is run",
            hint="name a dataset whose files hold rows, such as Parquet",
        )
    return DataError(
        f"data.dataset_name: {options.dataset_name} cannot be read by `datasets`: {reason}",
        hint="see on the Hub whether its files are what they should be",
    )


def _said(error: BaseException) -> str:
    """Return the first line of what an error says, shortened."""
    text = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return text if len(text) <= _LONGEST_SAID else f"{text[: _LONGEST_SAID - 3]}..."
