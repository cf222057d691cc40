"""Plain data to YAML that the strict reader reads back as the very same data."""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from pfl_lm.recipe.scalars import resolve_plain

_PLAIN = re.compile(r"[A-Za-z0-9_./~][\w ./~@+-]*(?<! )", re.ASCII)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text by our rules, and never makes anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and isinstance(resolve_plain(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


def _short_list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _short_list)


def write_yaml(data: Mapping[str, object]) -> str:
    """Return ``data`` as YAML text, keys in their own order, lists on one line."""
    return yaml.dump(
        dict(data),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=2**31,
    )
