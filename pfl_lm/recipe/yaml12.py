"""A strict reader for the part of YAML 1.2 that a recipe needs, with the line of every value.

PyYAML splits the text into events; what a plain scalar means is decided in ``scalars.py``, by the
YAML 1.2 core schema. Anchors, aliases, tags, duplicate keys and keys that are no text are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from pfl_lm.errors import SHOWN, RecipeError, listed
from pfl_lm.recipe.scalars import Scalar, Value, brief, resolve_plain, show

Location = tuple[str | int, ...]
"""The keys and positions that lead to a value: ``("adapter", "target_modules", 0)``."""

MAX_BYTES = 100_000
MAX_DEPTH = 32

# YAML 1.1 takes some of these for line ends, so that lines would not be those of an editor.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_FORBIDDEN_IN_VALUES = re.compile("[\0\ud800-\udfff]")
_NO_COMMENT = "must be one value; put text with `#` in it in quotes"
_HINTS = {
    "found character '\\t' that cannot start any token": "a tab; use spaces",
    "found character '@' that cannot start any token": "a value that starts with @ needs quotes",
    "found character '`' that cannot start any token": "a value that starts with ` needs quotes",
    "mapping values are not allowed here": "wrong indentation, or a value with `: ` needs quotes",
    "expected <block end>, but found '<block mapping start>'": "wrong indentation",
}


@dataclass(frozen=True)
class Document:
    """What a YAML file says, and on which line (from 1) each key and each list item stands."""

    data: dict[str, Value]
    lines: dict[Location, int]


class _StopReading(Exception):  # noqa: N818 - it is not an error
    """Reading cannot go on; what was found so far is in ``problems``."""


def read_yaml(raw: bytes, where: str) -> Document:
    """Read one YAML mapping.

    Args:
        raw: the file's bytes.
        where: what to call the file in messages.

    Raises:
        RecipeError: it is not one mapping in strict YAML 1.2; every problem found, with its line.
    """
    reading = _Reading()
    data: Value = None
    try:
        text = reading.decode(raw)
        data = reading.document(text)
    except _StopReading:
        pass
    if not reading.problems and not isinstance(data, dict):
        empty = data is None
        said = (
            "is empty" if empty else f"expected keys such as `name:` at the top, got {show(data)}"
        )
        raise RecipeError(f"{where}: {said}", hint="a recipe is a mapping of keys to values")
    if reading.problems or not isinstance(data, dict):
        raise RecipeError(listed(where, [said for _, said in sorted(reading.problems)]))
    return Document(data, reading.lines)


def parse_scalar_or_flow(text: str) -> Value:
    """Read the value of an override: a scalar, a flow list ``[a, b]`` or a flow mapping ``{a: 1}``.

    Raises:
        ValueError: it is not one such value; the message says why.
    """
    reading = _Reading()
    value: Value = None
    try:
        reading.check_characters(text)
        value = reading.document(text, flow_only=True)
    except _StopReading:
        pass
    if reading.problems:
        told = [said.partition("  ")[2] for _, said in reading.problems[:SHOWN]]
        raise ValueError("; ".join(told))
    return value


class _Reading:
    """One pass over the events of one text."""

    def __init__(self) -> None:
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[Location, int] = {}
        self._events: Iterator[yaml.Event] = iter(())

    def decode(self, raw: bytes) -> str:
        if len(raw) > MAX_BYTES:
            self._stop(1, f"larger than {MAX_BYTES} bytes; a recipe is a page or two")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            self._stop(
                line, f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
            )
        self.check_characters(text)
        return text

    def check_characters(self, text: str) -> None:
        line, counted = 1, 0
        for found in _FORBIDDEN.finditer(text):
            line += text.count("\n", counted, found.start())
            counted = found.start()
            code = f"U+{ord(found[0]):04X}"
            self._note(
                line, f"the character {code} is not allowed; write it as an escape in quotes"
            )
        if self.problems:
            raise _StopReading

    def document(self, text: str, *, flow_only: bool = False) -> Value:
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        try:
            self._next()  # the start of the stream
            start = self._next()
            if isinstance(start, yaml.StreamEndEvent):
                if flow_only and text.strip():
                    self._stop(1, _NO_COMMENT)
                return None
            assert isinstance(start, yaml.DocumentStartEvent)
            if start.tags or start.version not in (None, (1, 2)):
                self._note(_line(start), "directives are not allowed here, other than `%YAML 1.2`")
            first = self._next()
            value = self._value(first, (), 1)
            if flow_only:
                self._only_flow(text, start, first)
            self._next()  # the end of the document
            if not isinstance(last := self._next(), yaml.StreamEndEvent):
                self._stop(_line(last), "a second document starts; a recipe is one document")
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self._stop(1, f"not valid YAML: {error}")
        return value

    def _only_flow(self, text: str, start: yaml.DocumentStartEvent, first: yaml.Event) -> None:
        block = isinstance(first, yaml.CollectionStartEvent) and not first.flow_style
        block = block or (isinstance(first, yaml.ScalarEvent) and first.style in ("|", ">"))
        end = self._last.end_mark
        if start.explicit or block:
            self._stop(1, "must be one value, a list `[a, b]` or a mapping `{a: 1}`")
        if end is not None and text[end.index :].strip():
            self._stop(1, _NO_COMMENT)

    def _value(self, event: yaml.Event, at: Location, depth: int) -> Value:
        if isinstance(event, yaml.AliasEvent):
            self._note(_line(event), f"alias `*{brief(str(event.anchor))}`: write the value out")
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            anchor = brief(event.anchor)
            self._note(_line(event), f"anchor `&{anchor}`: not allowed, write values out")
        if event.tag is not None:
            tag = brief(event.tag.replace("tag:yaml.org,2002:", "!!"))
            self._note(_line(event), f"tag `{tag}`: not allowed, a value's type is plain to see")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if depth > MAX_DEPTH:
            self._stop(_line(event), f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(at, depth)
        return self._mapping(at, depth)

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        if bad := _FORBIDDEN_IN_VALUES.search(event.value):
            self._note(_line(event), f"the character U+{ord(bad[0]):04X} is not allowed in a value")
        if event.style is not None:
            return event.value
        try:
            return resolve_plain(event.value)
        except ValueError as error:
            self._note(_line(event), f"{error}; put text in quotes")
            return None

    def _list(self, at: Location, depth: int) -> list[Value]:
        items: list[Value] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            here = (*at, len(items))
            self.lines[here] = _line(event)
            items.append(self._value(event, here, depth + 1))
        return items

    def _mapping(self, at: Location, depth: int) -> dict[str, Value]:
        mapping: dict[str, Value] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            line = _line(event)
            key = self._value(event, at, depth + 1)
            if not isinstance(key, str):
                if not isinstance(event, yaml.AliasEvent):
                    self._note(line, f"a key must be text, got {show(key)}; put it in quotes")
                key = f"{line}"
            elif key in mapping:
                first = self.lines[(*at, key)]
                self._note(line, f"duplicate key `{brief(key)}`, first on line {first}")
            here = (*at, key)
            self.lines.setdefault(here, line)
            mapping[key] = self._value(self._next(), here, depth + 1)
        return mapping

    def _next(self) -> yaml.Event:
        self._last = next(self._events)
        return self._last

    def _note(self, line: int, said: str) -> None:
        self.problems.append((line, f"line {line}  {said}"))

    def _stop(self, line: int, said: str) -> None:
        self._note(line, said)
        raise _StopReading

    def _syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        said = f"{error.problem}"
        if error.context and error.context_mark and error.context_mark.line + 1 != line:
            said = f"{said} ({error.context} that starts on line {error.context_mark.line + 1})"
        if hint := _HINTS.get(f"{error.problem}"):
            said = f"{said}: {hint}"
        self._stop(line, f"not valid YAML, column {column}: {said}")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1
