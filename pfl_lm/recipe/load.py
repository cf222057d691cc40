"""From a recipe file and overrides to a checked `Recipe` with every default filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pfl_lm.errors import RecipeError, listed
from pfl_lm.recipe.clients import ClientRule, ClientRules
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.draft import Draft, read_draft
from pfl_lm.recipe.explain import explain
from pfl_lm.recipe.kinds import RunName
from pfl_lm.recipe.options import Options
from pfl_lm.recipe.places import place_backbone, place_data, place_federation, place_runtime
from pfl_lm.recipe.privacy import PrivacyOptions
from pfl_lm.recipe.schema import Recipe
from pfl_lm.recipe.sections import (
    AdapterOptions,
    BackboneOptions,
    FederationOptions,
    RuntimeOptions,
)
from pfl_lm.recipe.write import write_yaml

Section = TypeVar("Section", bound=Options)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, where it came from, and its text as the user wrote it.

    ``folder`` is that of a run which has begun, wherever it was moved to since.
    """

    recipe: Recipe
    path: Path
    source_text: str
    folder: Path | None = None

    @property
    def run_folder(self) -> Path:
        """The folder of this run: ``<runtime.output_dir>/<name>``, absolute."""
        return self.folder or Path(self.recipe.runtime.output_dir) / self.recipe.name

    def resolved(self) -> str:
        """Return what is run as YAML: defaults filled in, absolute paths, a recipe itself."""
        return write_yaml(self.recipe.run_options())


@dataclass(frozen=True)
class Parts:
    """What the files of a run depend on; None where the recipe does not say it validly."""

    backbone: BackboneOptions | None
    adapter: AdapterOptions | None
    data: DataOptions | None
    run_folder: Path | None
    runtime: RuntimeOptions | None
    federation: FederationOptions | None
    privacy: PrivacyOptions | None
    clients: list[ClientRule] | None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: the recipe file.
        overrides: ``section.key=value``, by the same rules and the same schema as the file;
            relative paths in them start at the current folder, those of the file beside it.

    Raises:
        RecipeError: the recipe is not valid; every problem found, with its line.
    """
    return check_draft(read_draft(path, overrides))


def check_draft(draft: Draft) -> LoadedRecipe:
    """Check a draft against the schema and make its paths absolute.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as error:
        raise RecipeError(listed(str(draft.path), explain(error, draft))) from None
    return place(recipe, draft)


def place(recipe: Recipe, draft: Draft) -> LoadedRecipe:
    """Return a valid recipe with its paths made absolute, beside the draft it is of.

    Raises:
        RecipeError: a path cannot be one.
    """
    placed = {
        "backbone": place_backbone(recipe.backbone, draft),
        "data": place_data(recipe.data, draft),
        "federation": place_federation(recipe.federation, draft),
        "runtime": place_runtime(recipe.runtime, draft),
    }
    return LoadedRecipe(recipe.model_copy(update=placed), draft.path, draft.source_text)


def valid_parts(draft: Draft) -> Parts:
    """Return the parts that hold of a draft that does not, so that its files can be checked."""
    backbone = _part(BackboneOptions, "backbone", place_backbone, draft)
    adapter = _part(AdapterOptions, "adapter", lambda options, draft: options, draft)
    data = _part(DataOptions, "data", place_data, draft)
    runtime = _part(RuntimeOptions, "runtime", place_runtime, draft)
    federation = _part(FederationOptions, "federation", place_federation, draft)
    privacy = _part(PrivacyOptions, "privacy", lambda options, draft: options, draft)
    clients: list[ClientRule] | None = None
    with suppress(ValidationError):
        clients = TypeAdapter(ClientRules).validate_python(draft.data.get("clients", []))
    try:
        name = TypeAdapter(RunName).validate_python(draft.data.get("name"), strict=True)
    except ValidationError:
        return Parts(backbone, adapter, data, None, runtime, federation, privacy, clients)
    folder = Path(runtime.output_dir) / name if runtime else None
    return Parts(backbone, adapter, data, folder, runtime, federation, privacy, clients)


def _part(
    kind: type[Section], name: str, place: Callable[[Section, Draft], Section], draft: Draft
) -> Section | None:
    try:
        return place(kind.model_validate(draft.data.get(name, {})), draft)
    except (ValidationError, RecipeError):
        return None
