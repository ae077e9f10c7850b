"""The picture of a training: what its log says, over tokens."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from utils import plots


def plot_training_curves(log: pd.DataFrame, path: Path) -> None:
    """Variance unexplained, the loss and its terms, L0, dead latents, learning rate over tokens.

    Args:
        log: One row a logged step: ``step, tokens, loss, fvu, l0, dead_fraction, learning_rate``;
            a term of the loss in each column ``loss_...``, of which there may be none; ``val_fvu``,
            which may be missing. NaN is not drawn.
    """
    held_out = log.val_fvu.dropna() if "val_fvu" in log else log.fvu[:0]
    last, last_fvu = log.iloc[-1], (log.fvu if held_out.empty else held_out).iloc[-1]
    which = "Training" if held_out.empty else "Held-out"
    title = f"{which} variance unexplained ends at {last_fvu:.1%}, with L0 at {last.l0:,.1f}"
    title += f" (n = {last.tokens:,.0f} tokens)"
    panels = (
        (100 * log.fvu, "Variance unexplained (FVU)", "% of variance", 3),
        (log.l0, "L0", "active latents on a token", 20),
        (100 * log.dead_fraction, "Dead latents", "% of latents", None),
        (log.learning_rate, "Learning rate", "learning rate", None),
    )
    line = "o-" if len(log) < 30 else "-"
    with plots.picture(path, title, (11, 6), nrows=2, ncols=3, sharex=True) as (_, grid):
        for axes, (values, name, unit, wide) in zip(grid[:, :2].flat, panels, strict=True):
            axes.plot(log.tokens, values, line, ms=4, color=plots.BLUE, label="training")
            axes.set(title=name, ylabel=unit)
            _scale(axes, values[np.isfinite(values)], wide)
        if not held_out.empty:
            at = log.tokens[held_out.index]
            grid[0, 0].plot(at, 100 * held_out, "o-", ms=4, color=plots.ORANGE, label="held out")
            grid[0, 0].legend()
        _plot_loss(grid[0, 2], log, line)
        grid[1, 2].set_axis_off()
        grid[1, 2].legend(*grid[0, 2].get_legend_handles_labels(), loc="upper left")
        for axes in (*grid[1, :2], grid[0, 2]):
            axes.set(xlabel="training tokens", xlim=(0, 1.03 * last.tokens))
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axes.tick_params(labelbottom=True)


def _plot_loss(axes: Axes, log: pd.DataFrame, line: str) -> None:
    """The loss, and each of its terms that the log has."""
    terms = [name for name in log if name.startswith("loss_") and log[name].notna().any()]
    axes.plot(log.tokens, log.loss, line, lw=4, ms=7, color=plots.PALE, label="loss, the sum")
    for name, colour in zip(terms, plots.COLOURS, strict=False):
        label = name.removeprefix("loss_")
        axes.plot(log.tokens, log[name], line, ms=4, color=colour, label=label)
    axes.set(title="Loss and its terms", ylabel="loss, a mean over tokens")
    values = log[["loss", *terms]].stack()
    _scale(axes, values[np.isfinite(values) & (values > 0)], 20)


def _scale(axes: Axes, values: pd.Series, wide: float | None) -> None:
    """A log axis if the values span more than a factor of ``wide``, else one that starts at 0."""
    if wide and 0 < wide * values.min() < values.max():
        axes.set_yscale("log")
        subs = (1, 2, 3, 5) if values.max() < 1_000 * values.min() else (1,)
        plots.log_ticks(axes.yaxis, subs)
    else:
        axes.set_ylim(0, 1.08 * max(values, default=1) or 1)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
