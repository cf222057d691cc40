"""A drawing by Matplotlib as a part of a page: inline SVG that takes on the page's colours.

Matplotlib is given stand-in colours, which become CSS variables; ids get a prefix, so that several
drawings can stand on one page; whatever names a place on the network is taken out. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, RULE = "#010101", "#020202", "#030303"
ACCENT, GOOD, BAD = "#040404", "#050505", "#060606"
COLOURS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
}
"""What each stand-in colour becomes."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pfl-lm",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
"""Matplotlib's settings, for `matplotlib.rc_context` around whatever is drawn."""

_LEFT_OUT = ("metadata", "style")


def inline_svg(
    figure: Figure,
    name: str,
    title: str,
    description: str,
    tips: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return a figure as an ``svg`` element with a title and a description for screen readers.

    Args:
        figure: drawn with the stand-in colours, under ``SETTINGS``.
        name: a prefix for its ids, no other figure's on the page.
        title: what it shows.
        description: what a person who cannot see it should know.
        tips: a text for each marker of the group with that gid, shown when it is pointed at.
    """
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(content.getvalue())
    _strip(root)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    _tip(root, tips or {})
    for element in root.iter():
        _rename(element, name)
    told = {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "chart"}
    root.attrib.update(told, style="stroke-linejoin: round; stroke-linecap: butt")
    for tag, text in (("desc", description), ("title", title)):
        child = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        child.text = text
        root.insert(0, child)
    return _coloured(ElementTree.tostring(root, encoding="unicode"))


def _strip(element: ElementTree.Element) -> None:
    """Take namespaces off, which inline SVG does without, and what the page has no use for."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for child in list(element):
        _strip(child)
        if child.tag in _LEFT_OUT:
            element.remove(child)


def _tip(root: ElementTree.Element, tips: Mapping[str, Sequence[str]]) -> None:
    for group in root.iter("g"):
        texts = tips.get(group.get("id", ""), ())
        for marker, text in zip(group.iter("use"), texts, strict=False):
            ElementTree.SubElement(marker, "title").text = text


def _rename(element: ElementTree.Element, name: str) -> None:
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == "href":
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _coloured(svg: str) -> str:
    found = re.compile("|".join(COLOURS))
    svg = found.sub(lambda match: COLOURS[match[0]], svg)
    return re.sub(r"font-family: [^;\"]*; ?", "", svg)
