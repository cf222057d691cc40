"""Recipes: what a run is, read from strict YAML and checked by a schema. No torch in this room."""

from pfl_lm.recipe.averaging import (
    FedAdamOptions,
    FedAvgMOptions,
    FedProxOptions,
    FFALoraOptions,
    RoLoraOptions,
    ScaffoldOptions,
)
from pfl_lm.recipe.load import LoadedRecipe, load_recipe
from pfl_lm.recipe.methods import (
    FedAvgOptions,
    LocalOptions,
    MethodOptions,
    PFLAlignOptions,
)
from pfl_lm.recipe.mixed import FlexLoraOptions, HetLoraOptions
from pfl_lm.recipe.personal import (
    DittoOptions,
    FedSALoraOptions,
)
from pfl_lm.recipe.privacy import ClientLevelOptions, PrivacyOptions, RecordLevelOptions
from pfl_lm.recipe.schema import (
    AdapterOptions,
    AggregationOptions,
    BackboneOptions,
    DataOptions,
    EvaluationOptions,
    FederationOptions,
    Recipe,
    RuntimeOptions,
    TrainingOptions,
    json_schema,
)
from pfl_lm.recipe.task import CAUSAL_LM, Task

__all__ = [
    "CAUSAL_LM",
    "AdapterOptions",
    "AggregationOptions",
    "BackboneOptions",
    "ClientLevelOptions",
    "DataOptions",
    "DittoOptions",
    "EvaluationOptions",
    "FFALoraOptions",
    "FedAdamOptions",
    "FedAvgMOptions",
    "FedAvgOptions",
    "FedProxOptions",
    "FedSALoraOptions",
    "FederationOptions",
    "FlexLoraOptions",
    "HetLoraOptions",
    "LoadedRecipe",
    "LocalOptions",
    "MethodOptions",
    "PFLAlignOptions",
    "PrivacyOptions",
    "Recipe",
    "RecordLevelOptions",
    "RoLoraOptions",
    "RuntimeOptions",
    "ScaffoldOptions",
    "Task",
    "TrainingOptions",
    "json_schema",
    "load_recipe",
]
