"""The report of an analysis: its pictures, and the browser that shows them and every feature."""

from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from utils import plots
from utils.artifacts import writing
from utils.embedded import TITLES
from utils.features import studies
from utils.features.browser import write_browser
from utils.features.catalogue import Catalogue

N_RANDOM = 10  # features drawn at random, shown beside the selected ones for a fair impression


def make_report(folder: Path, n_selected: int, seed: int) -> None:
    """Draw the pictures of a saved catalogue and write its browser, the last files of a run."""
    catalogue = Catalogue(folder)
    alive = catalogue.features["feature"][~catalogue.features["dead"]].to_numpy(copy=True)
    shown = {
        "random": sorted(np.random.default_rng(seed).permutation(alive)[:N_RANDOM].tolist()),
        "selected": catalogue.propose(n_selected)["feature"].tolist(),
    }
    named = {key: title for key, title in TITLES.items() if catalogue.summary[key] == "embedded"}
    summary = {**catalogue.summary, **named}
    pictures = draw_pictures(catalogue)
    for path in {*folder.glob("*.png"), *folder.glob("browser/pictures/*")} - {*pictures.values()}:
        path.unlink()  # of a study that is left out now
    with writing(folder / "browser"):
        write_browser(folder / "browser", catalogue, summary, pictures, shown)


def draw_pictures(catalogue: Catalogue) -> dict[str, Path]:
    """Draw every picture into the catalogue's folder; returns their paths by caption."""
    made = filter(catalogue.summary.get, studies.NAMES)
    first, *rest = studies.in_order(made)
    pictures = studies.load(first).draw(catalogue) | draw_pass(catalogue)
    for name in rest:
        pictures |= studies.load(name).draw(catalogue)
    return pictures


def draw_pass(catalogue: Catalogue) -> dict[str, Path]:
    """The pictures of the pass over the activations, by their captions."""
    density, l0 = catalogue.folder / "density.png", catalogue.folder / "l0.png"
    frequency, summary = catalogue.features["frequency"].to_numpy(), catalogue.summary
    plot_density_histogram(frequency, summary["n_tokens"], density)
    plot_l0_histogram(np.array(summary["l0_counts"]), l0)
    return {"How often features fire": density, "How many features a token has": l0}


def plot_density_histogram(frequency: np.ndarray, n_tokens: int, path: Path) -> None:
    """How often features are active, on a log axis; the dead are counted, not drawn.

    Args:
        frequency: Share of ``n_tokens`` tokens on which a feature is active, shape (n_latents,).
    """
    n, alive = len(frequency), np.array([share for share in frequency if share > 0])
    often = f"1 token in {1 / np.median(alive):,.0f}" if len(alive) else "no token"
    title = f"The median live feature is active on {often} (n = {len(alive):,} of {n:,} features)"
    with plots.picture(path, title, (7.5, 4.4)) as (_, axes):
        lowest, highest = np.log10([1 / n_tokens, alive.max(initial=10 / n_tokens)])
        edges = 10 ** np.arange(lowest - 1 / 16, highest + 1 / 8, 1 / 8)
        axes.hist(alive, edges, color=plots.BLUE, edgecolor="white", linewidth=0.5)
        _mark(axes, 1 / n_tokens, f"one token of {n_tokens:,}")
        note = f"{n - len(alive):,} ({1 - len(alive) / n:.1%}) never active, not drawn"
        axes.set(title=note, xscale="log", ylim=(0, None), ylabel="features")
        axes.set(xlabel="share of tokens on which the feature is active")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _mark(axes: Axes, x: float, text: str) -> None:
    """A dashed vertical line with its meaning beside it, at the top."""
    axes.axvline(x, color=plots.ORANGE, linestyle="--", linewidth=1.2)
    place = {"transform": axes.get_xaxis_transform(), "va": "top"}
    axes.text(x, 0.99, f"  {text}", color=plots.ORANGE, path_effects=plots.HALO, **place)


def plot_l0_histogram(l0_counts: np.ndarray, path: Path) -> None:
    """How many latents are active on a token.

    Args:
        l0_counts: Number of tokens with 0, 1, 2, ... active latents.
    """
    n_tokens, l0 = np.sum(l0_counts), np.arange(len(l0_counts))
    percent = 100 * np.asarray(l0_counts) / n_tokens
    mean, mode = l0 @ percent / 100, percent.argmax()
    low, high = np.searchsorted(np.cumsum(percent), [0.05, 99.95])
    width = int(np.ceil((high - low + 1) / 60))
    edges = np.arange(max(0, low - 5 * width), high + 6 * width, width) - 0.5
    bars, _ = np.histogram(l0, edges, weights=percent)
    title = f"A token has {mean:,.1f} active features on average"
    with plots.picture(path, f"{title} (n = {n_tokens:,} tokens)", (7.5, 4.4)) as (_, axes):
        axes.bar(edges[:-1], bars, width, align="edge", color=plots.BLUE, edgecolor="white")
        _mark(axes, mean, f"mean {mean:,.1f}")
        note, outside = f"exactly {mode:,} on {percent[mode]:.1f}% of tokens", 100 - bars.sum()
        note += f"; {outside:.2f}% not drawn" if outside > 0.005 else ""
        unit = "% of tokens" if width == 1 else f"% of tokens, in bins of {width}"
        axes.set(title=note, xlabel="active latents on a token (L0)", ylabel=unit)
        axes.set(xlim=edges[[0, -1]], ylim=(0, 1.12 * bars.max()))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
