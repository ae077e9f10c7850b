"""Every picture: arrays or tables in, a PNG at ``path`` out.

Drawn without pyplot: no display is needed, and no state stays behind.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from utils.artifacts import replacing

FONT = "DejaVu Sans"  # comes with matplotlib, so that pictures look the same everywhere
BLUE, ORANGE, INK, GREY, PALE = "#0072B2", "#D55E00", "#22262B", "#666B73", "#D6D9DE"
# After Paul Tol's "muted" scheme: told apart under every colour blindness, and from pale grey.
SUBSET_COLOURS = ["#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33", "#AA4499", "#44AA99"]
SUBSET_COLOURS += ["#882255", "#999933"]
LEAST_SHOWN = 200  # tokens of a kind of text, below which what it loses may be chance
MIXED, OTHER = "mixed (no subset has half)", "other subsets"
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


def plot_density_histogram(frequency: np.ndarray, n_tokens: int, path: Path) -> None:
    """How often features are active, on a log axis; the dead are counted, not drawn.

    Args:
        frequency: Share of ``n_tokens`` tokens on which a feature is active, shape (n_latents,).
    """
    n, alive = len(frequency), np.array([share for share in frequency if share > 0])
    often = f"1 token in {1 / np.median(alive):,.0f}" if len(alive) else "no token"
    title = f"The median live feature is active on {often} (n = {len(alive):,} of {n:,} features)"
    with picture(path, title, (7.5, 4.4)) as (_, axes):
        lowest, highest = np.log10([1 / n_tokens, alive.max(initial=10 / n_tokens)])
        edges = 10 ** np.arange(lowest - 1 / 16, highest + 1 / 8, 1 / 8)
        axes.hist(alive, edges, color=BLUE, edgecolor="white", linewidth=0.5)
        _mark(axes, 1 / n_tokens, f"one token of {n_tokens:,}")
        note = f"{n - len(alive):,} ({1 - len(alive) / n:.1%}) never active, not drawn"
        axes.set(title=note, xscale="log", ylim=(0, None), ylabel="features")
        axes.set(xlabel="share of tokens on which the feature is active")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _mark(axes: Axes, x: float, text: str) -> None:
    """A dashed vertical line with its meaning beside it, at the top."""
    axes.axvline(x, color=ORANGE, linestyle="--", linewidth=1.2)
    place = {"transform": axes.get_xaxis_transform(), "va": "top"}
    axes.text(x, 0.99, f"  {text}", color=ORANGE, path_effects=HALO, **place)


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
    with picture(path, f"{title} (n = {n_tokens:,} tokens)", (7.5, 4.4)) as (_, axes):
        axes.bar(edges[:-1], bars, width, align="edge", color=BLUE, edgecolor="white")
        _mark(axes, mean, f"mean {mean:,.1f}")
        note, outside = f"exactly {mode:,} on {percent[mode]:.1f}% of tokens", 100 - bars.sum()
        note += f"; {outside:.2f}% not drawn" if outside > 0.005 else ""
        unit = "% of tokens" if width == 1 else f"% of tokens, in bins of {width}"
        axes.set(title=note, xlabel="active latents on a token (L0)", ylabel=unit)
        axes.set(xlim=edges[[0, -1]], ylim=(0, 1.12 * bars.max()))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def plot_fidelity(summary: dict, path: Path) -> None:
    """Next-token cross-entropy of the model untouched, reconstructed and ablated.

    Args:
        summary: Holds ``layer``, ``loss_recovered`` and ``cross_entropy``: ``untouched``,
            ``reconstruction``, ``zero_ablated``, in nats a token, and perhaps ``n_tokens``.
    """
    cross_entropy, layer = summary["cross_entropy"], summary["layer"]
    title = f"The reconstruction recovers {summary['loss_recovered']:.1%} of the loss"
    if "n_tokens" in cross_entropy:
        title += f" (n = {cross_entropy['n_tokens']:,} tokens)"
    names = ("untouched", f"layer {layer}\nreconstructed", f"layer {layer}\nzero-ablated")
    values = [cross_entropy[name] for name in ("untouched", "reconstruction", "zero_ablated")]
    with picture(path, title, (7.5, 3.1)) as (_, axes):
        bars = axes.barh(names, values, 0.62, color=(GREY, BLUE, ORANGE))
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=5, path_effects=HALO)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        note = "100% recovered: as good as the untouched model; 0%: as bad as zeros"
        axes.set(title=note, xlabel="cross-entropy (nats a token)", xlim=(0, 1.12 * max(values)))


def plot_fidelity_by_subset(table: pd.DataFrame, path: Path) -> None:
    """What the reconstruction misses in each kind of text, the least first; dashed, in all text.

    Kinds of fewer than `LEAST_SHOWN` tokens are left out, unless all are.

    Args:
        table: Of `evaluation.measure_losses`, with ``subset`` and ``loss_recovered``.
    """
    every, subsets = table.set_index("subset").loc["all"], table[table.subset != "all"]
    subsets = subsets[subsets.n_tokens >= min(LEAST_SHOWN, subsets.n_tokens.max())]
    subsets = subsets.sort_values("kl")
    title = f"The reconstruction misses least in {subsets.subset.iloc[0]}"
    lost = 100 * (1 - subsets.loss_recovered), 100 * (1 - every.loss_recovered)
    panels = (
        (100 * subsets.fvu, 100 * every.fvu, "Variance unexplained", "% of variance"),
        (*lost, "Loss not recovered", "% of what zeros lose"),
        (subsets.kl, every.kl, "KL from the untouched", "nats a token"),
    )
    names = [f"{row.subset}  (n = {row.n_tokens:,})" for row in subsets.itertuples()]
    about = {"ncols": 3, "sharey": True}
    title = f"{title} (n = {every.n_tokens:,.0f} tokens)"
    with picture(path, title, (10, 1.4 + 0.27 * len(names)), **about) as (_, grid):
        for axes, (values, overall, heading, unit) in zip(grid, panels, strict=True):
            axes.barh(names, values, 0.66, color=BLUE)
            axes.axvline(overall, color=ORANGE, linestyle="--", linewidth=1.2)
            axes.set(title=f"{heading}; all text: {overall:.3g}", xlabel=unit)
            axes.grid(axis="y", visible=False)
        grid[0].invert_yaxis()


def plot_umap(features: pd.DataFrame, path: Path, n_labels: int = 25) -> None:
    """A map of the decoder directions, coloured by the corpus subset a feature belongs to.

    Args:
        features: Columns ``umap_x, umap_y`` (NaN where dead), ``frequency, label, top_subset,
            top_subset_share``. Features with less than half in one subset are grey.
        n_labels: The most labels written.
    """
    # Grey lowest; then the most frequent first, so that no large dot hides a small one.
    drawn = features[features.umap_x.notna()].sort_values("frequency", ascending=False)
    drawn = drawn.sort_values("top_subset_share", key=lambda share: share >= 0.5, kind="stable")
    mixed = drawn.top_subset_share < 0.5
    subsets = drawn.top_subset[~mixed].value_counts().index[: len(SUBSET_COLOURS)]
    colours = dict(zip(subsets, SUBSET_COLOURS, strict=False)) | {OTHER: "#8D939B", MIXED: PALE}
    group = drawn.top_subset.where(drawn.top_subset.isin(subsets), OTHER).mask(mixed, MIXED)
    counts = group.value_counts()
    title = (
        f"{(~mixed).sum():,} of {len(drawn):,} features have half of their activation in one kind "
        "of text"
        if drawn.top_subset.nunique() > 1
        else f"{len(drawn):,} features, all of them active in one kind of text alone"
    )
    with picture(path, title, (11, 8)) as (figure, axes):
        points = drawn[["umap_x", "umap_y"]].to_numpy()
        grown = np.clip(np.log10(drawn.frequency) / 4 + 1.25, 0, 1)  # 1 in 100,000 to 1 in 10
        areas = np.clip(60_000 / max(1, len(drawn)), 3, 40) * (0.4 + 2.4 * grown**1.5)
        axes.scatter(*points.T, areas, group.map(colours).tolist(), alpha=0.85, linewidths=0)
        note = "UMAP of decoder directions by cosine; larger dots: active on more tokens"
        axes.set(title=note, aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        dots = [Line2D([], [], ls="", marker="o", c=colours[name]) for name in counts.index]
        names = [rf"{name}  {n:,}".replace("$", r"\$") for name, n in counts.items()]
        about = {"title": "Top subset, features", "alignment": "left", "labelspacing": 0.8}
        figure.legend(dots, names, loc="outside right upper", **about)
        _write_labels(axes, drawn, points, n_labels)


def _write_labels(axes: Axes, drawn: pd.DataFrame, points: np.ndarray, n_labels: int) -> None:
    """Label features spread over the map, words and the most specific first, covering few dots.

    No label overlaps another one, its line or its dot, and none is written twice.
    """
    axes.figure.draw_without_rendering()  # settles the layout, so that pixels stay where they are
    axes.figure.set_layout_engine("none")
    dots, frame = axes.transData.transform(points), axes.get_window_extent()
    spread = np.sqrt(frame.width * frame.height / max(1, n_labels))
    distance = np.full(len(dots), np.inf)  # pixels to the nearest feature that was tried
    glyphs = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2.5}
    about = {"fontsize": 7.5, "parse_math": False, "path_effects": HALO, "arrowprops": line}
    wordless = ~drawn.label.str.contains(r"[^\W\d_]{3}")
    order, written = np.lexsort((-drawn.top_subset_share, wordless)), {}
    for spacing, i in itertools.product((0.6 * spread, 0.4 * spread, 0.25 * spread), order):
        label = drawn.label.iloc[i]
        label = label if len(label) <= 28 else f"{label[:27].rstrip()}…"
        drawable = label and label not in written and glyphs.keys() >= set(map(ord, label))
        if distance[i] < spacing or len(written) == n_labels or not drawable:
            continue
        distance = np.minimum(distance, np.hypot(*(dots - dots[i]).T))
        text = axes.annotate(label, points[i], (0, 0), textcoords="offset pixels", **about)
        width, height = text.get_window_extent().size
        places = []
        for dx, dy in itertools.product((-3, -1, 1, 3), (-3, -1.5, 0, 1.5, 3)):
            offset = (dx * height - width * (dx < 0), (dy - 0.5) * height)
            box = Bbox.from_bounds(*(dots[i] + offset), width, height)
            whole = Bbox.union([box, Bbox([dots[i] - 3, dots[i] + 3])])  # the line to its dot too
            if frame.count_contains(box.corners()) == 4 and not whole.count_overlaps(
                written.values()
            ):
                places.append((box.count_contains(dots), abs(dx) + abs(dy), offset, whole))
        if places:
            *_, offset, written[label] = min(places, key=lambda place: place[:2])
            text.set_position(offset)
            axes.plot(*points[i], "o", ms=5, mfc="none", mec=INK, mew=0.8)
        else:
            text.remove()
