"""Scaling laws: how the loss falls with compute, and how compute is best spent.

    compute = n_latents · tokens,   FLOPs = 6 · 2 · d_model · compute

FLOPs is what a dense training costs: 2 · d_model · n_latents weights, six operations a token each.

A grid of sizes and numbers of steps is trained at one learning rate. Runs of one compute are a
budget, and the best of them says on how many latents and steps it is best spent. The best runs are
then trained at other learning rates. What is best follows power laws of compute.

Reference: "Scaling Monosemanticity", Scaling Laws.
"""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from utils import plots
from utils.activations.store import ActivationStore
from utils.artifacts import write_json
from utils.autoencoder.kinds import find_kind
from utils.autoencoder.sweep import Run, Sweep, SweepSettings

MIN_POINTS = 3  # that a law is fitted to
NAMES = {
    "loss": "lowest loss",
    "n_latents": "optimal latents",
    "steps": "optimal steps",
    "learning_rate": "optimal learning rate",
}


class Laws(NamedTuple):
    """What a sweep found.

    Attributes:
        grid: The runs at one learning rate, a row each: ``n_latents, steps, flops, loss`` and more.
        optima: A row a budget, of `optimal_sizes` and `optimal_rates`; the optimal rate is NaN
            where none was sought.
        fits: By what is fitted against FLOPs, keys as in `NAMES`, values of `fit_power_law`.
    """

    grid: pd.DataFrame
    optima: pd.DataFrame
    fits: dict[str, dict[str, float]]


def measure_laws(settings: SweepSettings, store: ActivationStore, folder: Path) -> Laws:
    """Make the sweep, going on with what the folder has of it, and fit the laws.

    Writes scaling_laws.csv, a line a run, as runs finish; then scaling_laws.json and the picture.

    Args:
        settings: Of train_autoencoder.py.
        store: The activations.
        folder: Where all is written.
    """
    grid_of = settings.sweep_latents, settings.sweep_steps
    sweep = Sweep(settings, store, folder)
    middle = [values[len(values) // 2] for values in grid_of]
    # A sweep that is widened keeps its rate, though its middle moves.
    rate = settings.learning_rate or sweep.main_rate()
    rate = rate or find_kind(settings.kind).default_learning_rate(*middle)
    sweep.train([Run(*sizes, rate) for sizes in itertools.product(*grid_of)], "sizes, steps")
    grid = sweep.table().query("learning_rate == @rate")
    best = optimal_sizes(grid).query("not at_edge")
    sweep.train(
        [
            Run(int(n_latents), int(steps), factor * rate)
            for n_latents, steps in zip(best.n_latents, best.steps, strict=True)
            for factor in settings.sweep_learning_rates
        ],
        "learning rates",
    )
    sweep.remove_backups()
    optima = optimal_sizes(grid).join(optimal_rates(sweep.table()), ["n_latents", "steps"])
    fits = fit_laws(optima)
    content = {"d_model": store.d_model, "learning_rate": rate, "fits": fits}
    budgets = json.loads(optima.to_json(orient="records", double_precision=15))
    write_json(folder / "scaling_laws.json", {"unit": "FLOPs", **content, "budgets": budgets})
    laws = Laws(grid, optima, fits)
    plot_scaling_laws(laws, folder / "scaling_laws.png")
    return laws


def lowest(x: pd.Series, y: pd.Series) -> tuple[float, bool]:
    """Where a parabola of y against log x, through the lowest point and its neighbours, is lowest.

    Args:
        x: Positive and rising.
        y: As many.

    Returns:
        The place, and whether the lowest point is the first or last: then it is the place itself.
    """
    at = int(np.argmin(y))
    if at in (0, len(y) - 1):
        return float(x.iloc[at]), True
    near = slice(at - 1, at + 2)
    a, b, _ = np.polyfit(np.log(x.iloc[near]), y.iloc[near], 2)
    return math.exp(-b / (2 * a)), False


def optimal_sizes(grid: pd.DataFrame) -> pd.DataFrame:
    """The best run of each budget that has at least two, and where between runs the optimum is.

    Returns:
        Columns ``flops, compute, n_latents, steps, loss`` of the best run; ``optimal_latents,
        optimal_steps``; ``at_edge``: the grid ends at the best run, so the optimum may be beyond.
    """
    columns = ["flops", "compute", "n_latents", "steps", "loss"]
    rows = []
    for _, runs in grid.dropna(subset="loss").sort_values("n_latents").groupby("compute"):
        if len(runs) > 1:
            best = runs.loc[runs.loss.idxmin(), columns]
            latents, at_edge = lowest(runs.n_latents, runs.loss)
            rows.append([*best, latents, best.n_latents * best.steps / latents, at_edge])
    optima = pd.DataFrame(rows, columns=[*columns, "optimal_latents", "optimal_steps", "at_edge"])
    return optima.astype({"at_edge": bool})


def optimal_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Optimal learning rates of the sizes that were trained at more than one.

    Returns:
        Indexed by ``n_latents, steps``; columns ``optimal_rate`` and ``rate_at_edge``.
    """
    by_size = (
        runs.dropna(subset="loss").sort_values("learning_rate").groupby(["n_latents", "steps"])
    )
    rows = [
        [*sizes, *lowest(group.learning_rate, group.loss)]
        for sizes, group in by_size
        if len(group) > 1
    ]
    columns = ["n_latents", "steps", "optimal_rate", "rate_at_edge"]
    return pd.DataFrame(rows, columns=columns).set_index(["n_latents", "steps"])


def fit_power_law(x: pd.Series, y: pd.Series) -> dict[str, float]:
    """y = coefficient · x^exponent by least squares of logarithms, with R² of these.

    Of fewer than `MIN_POINTS` points, only ``n_points`` is returned.
    """
    if len(x) < MIN_POINTS:
        return {"n_points": len(x)}
    line = stats.linregress(np.log(x.astype(float)), np.log(y.astype(float)))
    return {
        "n_points": len(x),
        "exponent": float(line.slope),
        "standard_error": float(line.stderr),
        "coefficient": float(np.exp(line.intercept)),
        "r_squared": float(line.rvalue**2),
    }


def fit_laws(optima: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Power laws of FLOPs, keys as in `NAMES`, of the optima that are not at an edge.

    The losses are those of the best runs: the lower envelope of all, where it is well inside.
    """
    inside = optima[~optima.at_edge]
    rated = optima[optima.rate_at_edge.eq(False)]  # not where it is missing either
    return {
        "loss": fit_power_law(inside.flops, inside.loss),
        "n_latents": fit_power_law(inside.flops, inside.optimal_latents),
        "steps": fit_power_law(inside.flops, inside.optimal_steps),
        "learning_rate": fit_power_law(rated.flops, rated.optimal_rate),
    }


def describe(laws: Laws) -> str:
    """The laws in words."""
    lines = []
    for name, fit in laws.fits.items():
        if fit["n_points"] < MIN_POINTS:
            lines.append(
                f"{NAMES[name]}: {fit['n_points']} points, too few to fit; widen SWEEP_LATENTS and "
                "SWEEP_STEPS, rising by one factor, so that they share budgets."
            )
        else:
            lines.append(
                f"{NAMES[name]} ∝ FLOPs^({fit['exponent']:.3f} ± {fit['standard_error']:.3f}), "
                f"R² {fit['r_squared']:.3f}, {fit['n_points']} points"
            )
    optima = laws.optima
    edges = f"{optima.at_edge.sum()} of {len(optima)} budgets are best spent at an edge of the grid"
    rates = f"{optima.rate_at_edge.eq(True).sum()} optimal learning rates are at an edge of theirs"
    return "\n".join([*lines, f"{edges}, and {rates}: these are left out of the fits."])


def plot_scaling_laws(laws: Laws, path: Path) -> None:
    """Loss against compute, a line a size; optimal latents, steps and learning rate against it."""
    grid, optima, fits = laws
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
    with plots.picture(path, title, (10, 7.5), nrows=2, ncols=2, sharex=True) as (_, axes):
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
            panel.plot(fitted.flops, fitted[column], "o", c=plots.BLUE, label="optimum")
            style = {
                "c": plots.GREY,
                "mfc": "white",
                "label": "at an edge of the sweep: not fitted",
            }
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
    plots.log_ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5))
    text = f"{fit['n_points']} points: too few to fit"
    if "exponent" in fit:
        ends = np.array([x.min(), x.max()])
        axes.plot(
            ends, fit["coefficient"] * ends ** fit["exponent"], "--", color=plots.ORANGE, zorder=3
        )
        text = f"exponent {fit['exponent']:.3f} ± {fit['standard_error']:.3f}\n".replace("-", "−")
        text += f"R² = {fit['r_squared']:.3f}, n = {fit['n_points']}"
    height, va = (0.96, "top") if fit.get("exponent", 0) < 0 else (0.04, "bottom")
    style = {
        "ha": "right",
        "va": va,
        "color": plots.ORANGE,
        "linespacing": 1.5,
        "path_effects": plots.HALO,
    }
    axes.text(0.98, height, text, transform=axes.transAxes, **style)
