"""What every picture shares: fonts, colours, axes, and how it is written.

Drawn without pyplot: no display is needed, and no state stays behind.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from utils.artifacts import replacing

FONT = "DejaVu Sans"  # comes with matplotlib, so that pictures look the same everywhere
BLUE, ORANGE, INK, GREY, PALE = "#0072B2", "#D55E00", "#22262B", "#666B73", "#D6D9DE"
# After Paul Tol's "muted" scheme: told apart under every colour blindness, and from pale grey.
COLOURS = ["#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33", "#AA4499", "#44AA99", "#882255"]
COLOURS += ["#999933"]
STYLE = {
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9BA0A8",
    "axes.titlecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8EAED",
    "legend.frameon": False,
}
HALO = [withStroke(linewidth=2.5, foreground="white")]


@contextlib.contextmanager
def picture(path: Path, title: str, size: tuple[float, float], **grid) -> Iterator[tuple]:
    """Yield a figure, ``size`` in inches, and its axes; leaving the block writes the PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=180, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        if len(title) > 10.5 * size[0]:
            title = title.replace(" (n = ", "\n(n = ")
        figure.suptitle(
            title, x=0.1 / size[0], ha="left", fontsize=12, fontweight="bold", parse_math=False
        )
        yield figure, figure.subplots(**grid)
        with replacing(Path(path)) as partial:
            figure.savefig(partial, format="png")


def compare(axes: Axes, groups: dict[str, pd.Series], bins: np.ndarray) -> None:
    """Histograms of two groups over one another, in % of each; lines at their means."""
    for (label, values), colour in zip(groups.items(), (ORANGE, GREY), strict=True):
        percent = np.full(len(values), 100 / max(1, len(values)))
        within, style = values.clip(bins[0], bins[-1]), {"color": colour, "label": label}
        axes.hist(within, bins, weights=percent, alpha=0.55, **style)
        axes.axvline(values.mean(), color=colour, linewidth=1.5)


def log_ticks(axis: Axis, multiples: tuple[float, ...]) -> None:
    """Ticks at these multiples of powers of ten, labelled in plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=multiples))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(ticker.NullFormatter())
