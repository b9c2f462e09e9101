"""Plots inside HTML: matplotlib's SVG with the fonts and colours of the document.

Each colour is drawn as a value that is used for nothing else, and then replaced by a variable such as `var(--ink)`, which
the style sheet sets for light and dark screens. References to anything outside the plot are removed.
"""

import dataclasses
import importlib.util
import io
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .html import Markup, tag
from .result_plots import BLUE, GRAY, GREEN, NEEDED, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT = "#010203", "#040506"
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    GRAY: "--gray",
}
STYLE: dict[Any, Any] = {  # of matplotlib
    "svg.fonttype": "none",
    "svg.hashsalt": "jpfq",
    "font.size": 9,
    "axes.labelsize": "medium",
    "legend.fontsize": "medium",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": SOFT,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 2,
    "lines.linewidth": 1.4,
}


def check_matplotlib() -> None:
    """Raises if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(NEEDED)


@dataclasses.dataclass(frozen=True)
class Frame:
    """The size of a plot and of the margins around its axes, in points; fonts have 9 points.

    Margins are fixed, so that the axes of neighbouring plots are aligned. HTML stretches plots to the width of a column.
    """

    width: float
    height: float
    left: float
    right: float
    bottom: float
    top: float

    @property
    def axes(self) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of the axes, relative to the size of the plot."""
        across, up = self.width - self.left - self.right, self.height - self.bottom - self.top
        return self.left / self.width, self.bottom / self.height, across / self.width, up / self.height


class Plots:
    """Renders the plots of one document, with ids that are unique in it."""

    def __init__(self):
        self._numbers = itertools.count(1)

    def __call__(self, draw: "Callable[[Axes], Any]", frame: Frame, label: str) -> Markup:
        """Renders what `draw` draws on axes as SVG. `label` is the description for screen readers."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # ignores the user's style
            matplotlib.rcParams.update(STYLE)
            figure = Figure(figsize=(frame.width / 72, frame.height / 72))
            ax = figure.add_axes(frame.axes)
            draw(ax)
            ax.yaxis.set_label_coords((12 - frame.left) / (frame.width - frame.left - frame.right), 0.5)  # at the rim
            out = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        return inline(out.getvalue(), f"p{next(self._numbers)}", label)


def inline(svg: str, name: str, label: str) -> Markup:
    """An SVG document by matplotlib as an HTML element. `name` is the prefix of all its ids."""
    box = re.search(r'viewBox="([-0-9. ]+)"', svg)
    assert box, "matplotlib writes a viewBox"
    body = svg[svg.index(">", box.end()) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.S)
    used = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', body))
    used = {one or other for one, other in used}
    rename = lambda match: f' id="{name}-{match[1]}"' if match[1] in used else ""
    body = re.sub(r' id="([^"]*)"', rename, body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"""font: ([0-9.]+)px [^;"]*""", r"font-size: \1px", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    body = re.sub(r">\s+<", "><", re.sub(r"\s*\n\s*", " ", body))
    return tag("svg", Markup(body.strip()), viewBox=box[1], role="img", aria_label=label)
