"""Adapters as others load them."""

from pfl_lm.export.adapters import ClientResult, export_adapters
from pfl_lm.export.folders import export_adapter

__all__ = ["ClientResult", "export_adapter", "export_adapters"]
