"""Every picture: arrays or tables in, a PNG at ``path`` out.

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
        figure.suptitle(title, x=0.1 / size[0], ha="left", fontsize=12, fontweight="bold")
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


def plot_training_curves(log: pd.DataFrame, path: Path) -> None:
    """Variance unexplained, L0, dead latents and learning rate against training tokens.

    Args:
        log: A row a logged step: ``tokens, fvu, l0, dead_fraction, learning_rate``, and perhaps
            ``val_fvu``, NaN on rows without validation.
    """
    held_out = log.val_fvu.dropna() if "val_fvu" in log else log.fvu[:0]
    last, last_fvu = log.iloc[-1], (log.fvu if held_out.empty else held_out).iloc[-1]
    measured_on = "Training" if held_out.empty else "Held-out"
    title = f"{measured_on} variance unexplained ends at {last_fvu:.1%}, with L0 at {last.l0:,.1f}"
    title += f" (n = {last.tokens:,.0f} tokens)"
    panels = (
        (100 * log.fvu, "Variance unexplained (FVU)", "% of variance", 3),
        (log.l0, "L0", "active latents on a token", 20),
        (100 * log.dead_fraction, "Dead latents", "% of latents", None),
        (log.learning_rate, "Learning rate", "learning rate", None),
    )
    with picture(path, title, (9, 6), nrows=2, ncols=2, sharex=True) as (_, grid):
        line = "o-" if len(log) < 30 else "-"
        for axes, (values, name, unit, wide) in zip(grid.flat, panels, strict=True):
            axes.plot(log.tokens, values, line, ms=4, color=BLUE, label="training")
            axes.set(title=name, ylabel=unit)
            _scale(axes, values[np.isfinite(values)], wide)
        if not held_out.empty:
            tokens = log.tokens[held_out.index]
            grid[0, 0].plot(tokens, 100 * held_out, "o-", ms=4, color=ORANGE, label="held out")
            grid[0, 0].legend()
        for axes in grid[1]:
            axes.set(xlabel="training tokens", xlim=(0, 1.03 * last.tokens))
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _scale(axes: Axes, values: pd.Series, wide: float | None) -> None:
    """A log axis if the values span more than a factor of ``wide``, else one that starts at 0."""
    if wide and 0 < wide * values.min() < values.max():
        axes.set_yscale("log")
        log_ticks(axes.yaxis, (1, 2, 3, 5))
    else:
        axes.set_ylim(0, 1.08 * max(values, default=1) or 1)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)


def plot_scaling_laws(grid: pd.DataFrame, optima: pd.DataFrame, fits: dict, path: Path) -> None:
    """Loss against compute, a line a size; optimal latents, steps and learning rate against it.

    Args:
        grid: A row a run: ``n_latents, flops, loss``.
        optima: A row a budget: ``flops``; ``optimal_latents, optimal_steps`` and ``at_edge``;
            ``optimal_rate`` and ``rate_at_edge``, NaN without a sweep of learning rates.
        fits: By ``loss, n_latents, steps, learning_rate``: ``n_points`` and, if it was fitted,
            ``exponent, standard_error, coefficient, r_squared``.
    """
    panels = (
        ("n_latents", "optimal_latents", "at_edge", "Optimal number of latents", "latents"),
        ("steps", "optimal_steps", "at_edge", "Optimal number of steps", "training steps"),
        ("learning_rate", "optimal_rate", "rate_at_edge", "Optimal learning rate", "learning rate"),
    )
    title = "Loss, and the best use of compute"
    if "exponent" in fits["loss"]:
        lower = 1 - 10 ** fits["loss"]["exponent"]
        title = f"Ten times the compute, spent best, lowers the loss by {lower:.0%}"
    title += f" (n = {len(grid):,} runs)"
    with picture(path, title, (10, 7.5), nrows=2, ncols=2, sharex=True) as (_, axes):
        sizes = grid.groupby("n_latents")
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(sizes)))
        for (n_latents, runs), colour in zip(sizes, colours, strict=True):
            runs = runs.sort_values("flops")
            style = {"color": colour, "label": f"{n_latents:,}"}
            axes[0, 0].plot(runs.flops, runs.loss, "o-", ms=4, lw=1.3, **style)
        axes[0, 0].set(title="Loss on held-out tokens", ylabel="loss (per token and dimension)")
        _power_law(axes[0, 0], optima.flops[~optima.at_edge], grid.loss, fits["loss"])
        corner = _free_corner(fits["loss"])
        axes[0, 0].legend(title="latents", loc=corner, ncols=1 + len(sizes) // 5)
        for panel, (name, column, edge, heading, unit) in zip(axes.flat[1:], panels, strict=True):
            measured = optima[optima[column].notna()]
            at_edge = measured[edge].astype(bool)
            fitted, unfitted = measured[~at_edge], measured[at_edge]
            panel.plot(fitted.flops, fitted[column], "o", c=BLUE, label="optimum")
            style = {"c": GREY, "mfc": "white", "label": "at an edge of the sweep: not fitted"}
            panel.plot(unfitted.flops, unfitted[column], "o", **style)
            panel.set(title=heading, ylabel=unit)
            _power_law(panel, fitted.flops, measured[column], fits[name])
            if at_edge.any():
                panel.legend(loc=_free_corner(fits[name]))
        for panel in axes[1]:
            panel.set(xlabel="training compute (FLOPs, as if dense)")


def _free_corner(fit: dict) -> str:
    """The corner for a legend, to the left of the curve's start."""
    return "lower left" if fit.get("exponent", 0) < 0 else "upper left"


def _power_law(axes: Axes, x: pd.Series, y: pd.Series, fit: dict) -> None:
    """Log axes that hold all of y; the power law over x, its numbers at the right."""
    axes.set(xscale="log", yscale="log")
    if len(y):
        axes.set_ylim(y.min() / 1.6, 1.6 * y.max())
    narrow = len(y) and y.max() < 6 * y.min()
    log_ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5))
    text = f"{fit['n_points']} points: too few to fit"
    if "exponent" in fit:
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, fit["coefficient"] * ends ** fit["exponent"], "--", color=ORANGE, zorder=3)
        text = f"exponent {fit['exponent']:.3f} ± {fit['standard_error']:.3f}\n".replace("-", "−")
        text += f"R² = {fit['r_squared']:.3f}, n = {fit['n_points']}"
    height, va = (0.96, "top") if fit.get("exponent", 0) < 0 else (0.04, "bottom")
    style = {"ha": "right", "va": va, "color": ORANGE, "linespacing": 1.5, "path_effects": HALO}
    axes.text(0.98, height, text, transform=axes.transAxes, **style)
