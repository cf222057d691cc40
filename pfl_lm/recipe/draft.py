"""A recipe as it was written: read, overridden, and not yet checked against the schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pfl_lm.errors import RecipeError
from pfl_lm.files import open_ordinary
from pfl_lm.recipe.overrides import Override, apply_overrides, parse_overrides
from pfl_lm.recipe.scalars import Value
from pfl_lm.recipe.yaml12 import MAX_BYTES, Location, read_yaml


@dataclass(frozen=True)
class Draft:
    """The merged data of a recipe, and where each part of it comes from."""

    path: Path
    source_text: str
    data: dict[str, Value]
    lines: dict[Location, int]
    overrides: tuple[Override, ...]

    def override_of(self, at: Location) -> Override | None:
        """Return the override that set ``at``, or something around it."""
        for override in self.overrides:
            if at[: len(override.at)] == override.at:
                return override
        if at and at not in self.lines:
            return next((each for each in self.overrides if each.at[: len(at)] == at), None)
        return None

    def line_of(self, at: Location) -> int | None:
        """Return the line of ``at`` in the file, or of the nearest thing around it."""
        while at:
            if at in self.lines:
                return self.lines[at]
            at = at[:-1]
        return None


def read_draft(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read a recipe file and set the overrides in it.

    Raises:
        RecipeError: the file cannot be read or is not strict YAML, or an override is malformed.
    """
    return draft_of(_read(path), path, overrides)


def draft_of(raw: bytes, path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Return the draft of a recipe that was read; ``path`` is what to call it.

    Raises:
        RecipeError: it is not strict YAML, or an override is malformed.
    """
    where = str(path)
    document = read_yaml(raw, where)
    parsed = parse_overrides(overrides, where)
    data = apply_overrides(document.data, parsed, where)
    return Draft(path, raw.decode("utf-8-sig"), data, document.lines, parsed)


def set_in(draft: Draft, overrides: Sequence[Override]) -> Draft:
    """Return a draft with more overrides, which win over those it has.

    Raises:
        RecipeError: one goes beneath something that is not a mapping.
    """
    data = apply_overrides(draft.data, overrides, str(draft.path))
    return replace(draft, data=data, overrides=(*overrides, *draft.overrides))


def _read(path: Path) -> bytes:
    try:
        with open_ordinary(path) as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = "check the spelling; a relative path starts at the current folder"
        raise RecipeError(f"{path}: there is no such recipe file", hint=hint) from None
    except IsADirectoryError:
        inside = sorted(each.name for each in path.glob("*.y*ml"))[:5]
        hint = f"it holds {', '.join(inside)}" if inside else "name a YAML file"
        raise RecipeError(f"{path}: a folder, not a recipe file", hint=hint) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "check that it is a file and that you may read it"
        raise RecipeError(f"{path}: cannot be read ({reason})", hint=hint) from None
