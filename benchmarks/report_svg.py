"""A matplotlib drawing as SVG inside of a page: text stays text, ids are the plot's own, colours are the page's.

Colours are given by name. They reach the page as CSS variables, so that style.css says what they are in light and in
dark; on the way matplotlib sees a number for each.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 360  # of every plot, in units of which a text line is 12 high: a phone shows about one of them per pixel
SERIES = 8
COLOURS = ("ink", "muted", "grid", "band", *(f"series-{k + 1}" for k in range(SERIES)))
CONTROL = bytes(k for k in range(32) if k not in b"\t\n\r")  # XML has none of them, a name may
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
REFERENCE = re.compile(r"#([\w.-]+)")
DECIMALS = re.compile(r"(\.\d\d)\d+")
NUMBERED = re.compile(r"#0000([0-9a-f]{2})")


def colour(name: str) -> str:
    """What matplotlib is given for a colour of the page.

    >>> colour("ink"), colour("grid")
    ('#000001', '#000003')
    """
    return f"#0000{COLOURS.index(name) + 1:02x}"  # from 1: of text in black the colour is not written


def series(number: int) -> str:
    """The name of the colour of a series."""
    return f"series-{number % SERIES + 1}"


SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],  # to measure with; style.css names the page's own, which are narrower
    "svg.hashsalt": "report",  # equal results, equal pages
    "text.parse_math": False,  # names of models may hold a $
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": colour("muted"),
    "axes.labelcolor": colour("ink"),
    "text.color": colour("ink"),
    "xtick.color": colour("muted"),
    "ytick.color": colour("muted"),
    "xtick.labelcolor": colour("ink"),
    "ytick.labelcolor": colour("ink"),
    "grid.color": colour("grid"),
    "axes.axisbelow": True,
}


def draw(name: str, title: str, height: float, paint: Callable[[Axes], None]) -> Markup:
    """The SVG of what ``paint`` draws; ``name`` begins all its ids, ``title`` is what it is called when not seen."""
    target = io.BytesIO()
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw it
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        figure.savefig(target, format="svg", transparent=True, metadata=NO_METADATA)
    drawing = target.getvalue().translate(None, delete=CONTROL)
    return Markup(_inline(ET.fromstring(drawing), name, title))


def _inline(root: ET.Element, name: str, title: str) -> str:
    """The element as text without namespaces, with its name, its own ids and the page's colours."""
    _drop(root)
    wanted = {found for element in root.iter() for value in _targets(element) for found in REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(k): _mended(_local(k), v, name) for k, v in element.attrib.items() if _kept(k, v, wanted)
        }
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib = {"id": name, "class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    heading = ET.Element("title")
    heading.text = title
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode")


def _drop(root: ET.Element) -> None:
    """Take out style sheets, which would hold for the whole page, and descriptions of the file."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("style", "metadata"):
                parent.remove(child)


def _local(name: str) -> str:
    """A name without its namespace; a page needs none."""
    return name.rpartition("}")[2]


def _targets(element: ET.Element) -> list[str]:
    return [v for k, v in element.attrib.items() if _local(k) == "href" or v.startswith("url(")]


def _kept(key: str, text: str, wanted: set[str]) -> bool:
    """Of ids, only those that something in the drawing refers to."""
    return key != "id" or text in wanted


def _mended(key: str, text: str, name: str) -> str:
    """An attribute as the page needs it."""
    if key == "id":
        return f"{name}-{text}"
    if key == "href" or text.startswith("url("):
        return REFERENCE.sub(rf"#{name}-\1", text)
    text = DECIMALS.sub(r"\1", text)
    return NUMBERED.sub(lambda found: f"var(--{COLOURS[int(found[1], 16) - 1]})", text) if key == "style" else text


def styled(**more: Any) -> dict[str, Any]:
    """Arguments of a drawing call, its colours given by name."""
    return {key: colour(value) if key.endswith("color") else value for key, value in more.items()}
