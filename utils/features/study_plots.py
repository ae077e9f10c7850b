"""Pictures of the studies, one of analyze_features.py or influence_llm.py each."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker

from utils.plots import BLUE, GREY, INK, ORANGE, PALE, picture

N_SHOWN = 5  # features of a token
N_POSITIONS = 30  # tokens of a prompt whose attributions are drawn
GREEN = "#117733"


def plot_specificity(levels: pd.DataFrame, path: Path) -> None:
    """Scores of examples against how active a feature is on them.

    Args:
        levels: Of `specificity.by_level`.
    """
    first, last = levels.iloc[0], levels.iloc[-1]
    title = f"Specificity: a mean score of {first['mean']:.2f} where features are weakest, "
    title += f"{last['mean']:.2f} where strongest"
    title += f" (n = {levels.n.sum():,} examples of {levels.n_features.max():,} features)"
    names = ("irrelevant", "vaguely related", "related text nearby", "clean match")
    middle, width = 100 * (levels.low + levels.high) / 2, 100 * (last.high - last.low)
    with picture(path, title, (9, 3.9), ncols=2) as (_, (left, right)):
        under = np.zeros(len(levels))
        for score, colour in enumerate((PALE, "#F6C7A4", "#EC8F4B", ORANGE)):
            share = 100 * levels[f"share_{score}"]
            left.bar(middle, share, 0.92 * width, under, color=colour, label=names[score])
            under += share
        left.set(title="Scores at each level", ylabel="% of examples", ylim=(0, 100))
        left.legend(
            *[part[::-1] for part in left.get_legend_handles_labels()],
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            ncols=2,
        )
        interval = [levels["mean"] - levels.mean_low, levels.mean_high - levels["mean"]]
        right.errorbar(
            middle,
            levels["mean"],
            interval,
            fmt="o-",
            color=ORANGE,
            capsize=3,
            label="its own concept, 95% interval",
        )
        right.plot(middle, levels.chance, "o--", color=GREY, label="another feature's concept")
        right.set(title="Mean score", ylabel="score, 0 to 3", ylim=(0, 3))
        right.legend(loc="upper left")
        for axes in (left, right):
            axes.set(xlabel="activation, % of the feature's maximum", xlim=(0, 100))


def plot_completeness(table: pd.DataFrame, fits: list[dict], path: Path) -> None:
    """Share of words that have a feature against how frequent they are, with the fitted sigmoids.

    Args:
        table: A row a word and dictionary: ``n_latents, frequency, covered``.
        fits: Of `completeness.study`.
    """
    most = fits[-1]
    title = f"Completeness: {most['n_covered']:,} of {most['n_words']:,} words, the frequent ones, "
    title += f"have a feature among {most['n_alive']:,}"
    colours = (BLUE, ORANGE, "#117733", "#AA4499", "#88CCEE")
    with picture(path, title, (9, 3.9), ncols=2, sharey=True) as (_, (left, right)):
        for fit, colour in zip(fits, itertools.cycle(colours)):
            own = table[table.n_latents == fit["n_latents"]]
            bins = np.round(4 * np.log10(own.frequency)) / 4
            points = own.groupby(bins).agg(covered=("covered", "mean"))
            for axes, factor in ((left, 1e6), (right, fit["n_alive"])):
                axes.plot(
                    10**points.index * factor,
                    100 * points.covered,
                    "o",
                    ms=4,
                    color=colour,
                    label=f"{fit['n_latents']:,} latents",
                )
                if "half" in fit:
                    x = np.logspace(*np.log10([own.frequency.min(), own.frequency.max()]), 200)
                    steepness = fit["slope"] * np.log10(x / fit["half"])
                    axes.plot(x * factor, 100 / (1 + np.exp(-steepness)), color=colour)
        left.set(title="By frequency", xlabel="occurrences per million tokens")
        left.set(ylabel="% of words with a feature")
        left.legend(loc="upper left")
        right.axvline(1, color=GREY, linestyle="--", linewidth=1)
        right.set(title="Rescaled by living features")
        right.set(xlabel="occurrences a token × living features")
        for axes in (left, right):
            axes.set(xscale="log", ylim=(-2, 102))


def plot_neurons(correlations: np.ndarray, path: Path) -> None:
    """The largest correlation of each feature with a neuron."""
    share = (correlations <= 0.3).mean()
    title = f"{share:.0%} of features correlate at most 0.3 with any neuron"
    with picture(path, f"{title} (n = {len(correlations):,} features)", (7.5, 3.6)) as (_, axes):
        bins = np.arange(0, 1.0001, 0.025)
        _, _, bars = axes.hist(correlations, bins, edgecolor="white", linewidth=0.5)
        for bar, start in zip(bars, bins, strict=False):
            bar.set_facecolor(BLUE if start < 0.3 - 1e-9 else PALE)
        axes.axvline(0.3, color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="largest Pearson correlation with a neuron of the blocks up to the layer")
        axes.set(xlim=(0, 1), ylabel="features")


def plot_directions(found: list[dict], path: Path) -> None:
    """What changes when features, and other directions, are moved along by as much.

    Args:
        found: Of `directions.summarise`.
    """
    table = pd.DataFrame(found).set_index(["direction", "change"])
    title = "What ablating and doubling a feature changes, beside like changes elsewhere"
    names = {
        "feature": "the feature's own",
        "covariance": "drawn with the\ncovariance of activations",
        "random": "drawn at random",
    }
    panels = (("kl", "Divergence from the untouched predictions (KL)"), ("rise", "Rise in loss"))
    title += f" (n = {table.n_features.iloc[0]} features)"
    with picture(path, title, (10, 3.6), ncols=2, sharey=True) as (figure, grid):
        for axes, (measure, heading) in zip(grid, panels, strict=True):
            for offset, change, factor, colour in (
                (-0.19, "ablated", "× 0", BLUE),
                (0.19, "doubled", "× 2", ORANGE),
            ):
                own = table[measure].xs(change, level="change")[list(names)]
                mean, low, high = np.array(own.tolist()).T
                about = {"xerr": [mean - low, high - mean], "capsize": 3, "ecolor": GREY}
                about |= {"color": colour, "label": f"{change} ({factor}), 95% interval"}
                axes.barh(np.arange(len(names)) + offset, mean, 0.36, **about)
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.set(title=heading, xlabel="nats for each position moved")
            axes.locator_params(axis="x", nbins=6)
        grid[0].set_yticks(range(len(names)), names.values())
        grid[0].invert_yaxis()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def plot_family(table: pd.DataFrame, ancestor: int, path: Path) -> None:
    """What one feature of the smallest dictionary becomes in the larger ones, as a tree.

    Args:
        table: Of `splitting.study`.
        ancestor: The feature.
    """
    sizes = sorted(table.n_latents.unique())
    family = table[table.ancestor == ancestor]
    rows = {size: family[family.n_latents == size] for size in sizes}
    heights, n_leaves = {}, 0

    def place(level: int, feature: int) -> float:
        """A leaf gets the next line, a parent the middle of its children."""
        nonlocal n_leaves
        children = []
        if level + 1 < len(sizes):
            below = rows[sizes[level + 1]]
            children = below[below.parent == feature].sort_values("label").feature.tolist()
        own = [place(level + 1, child) for child in children]
        n_leaves += not own
        heights[level, feature] = (own[0] + own[-1]) / 2 if own else n_leaves - 1
        return heights[level, feature]

    place(0, ancestor)
    counts = " → ".join(str(len(rows[size])) for size in sizes)
    title = f"Splitting: “{rows[sizes[0]].label.iloc[0]}” is {counts} features"
    with picture(path, title.replace("$", r"\$"), (10, 1.6 + 0.3 * n_leaves)) as (_, axes):
        for level, size in enumerate(sizes):
            for row in rows[size].itertuples():
                y = heights[level, row.feature]
                if level:
                    up = heights[level - 1, row.parent]
                    x = np.linspace(level - 0.38, level, 30)
                    bend = (1 - np.cos(np.linspace(0, np.pi, 30))) / 2
                    axes.plot(x, up + (y - up) * bend, color=BLUE, linewidth=4 * row.cosine**2)
                cosine = f"  {row.cosine:.2f}" if level else ""
                text = f"{row.feature} “{row.label[:22]}”{cosine}".replace("$", r"\$")
                axes.text(level + 0.02, y, text, va="center", fontsize=8)
        names = [f"{size:,} latents" for size in sizes]
        axes.set_xticks(range(len(sizes)), names, ha="left", color=GREY)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(0, len(sizes) - 0.3), ylim=(n_leaves - 0.5, -0.5), yticks=[])
        axes.set_xlabel("number, tokens at the peaks, cosine to the parent", loc="left", color=GREY)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)


def plot_sizes(table: pd.DataFrame, ancestor: int | None, path: Path) -> None:
    """The features of several dictionaries on one map, those of one family ringed.

    Args:
        table: Of `splitting.study`, with ``x`` and ``y``.
        ancestor: Of that family.
    """
    drawn = table[table.x.notna()]
    sizes = sorted(drawn.n_latents.unique())
    title = f"{len(sizes)} dictionaries on one map (n = {len(drawn):,} features)"
    with picture(path, title, (9, 7.4)) as (figure, axes):
        colours = [ORANGE, BLUE, "#8FB8D3", PALE][: len(sizes)]
        for size, colour in reversed(list(zip(sizes, itertools.cycle(colours)))):
            own = drawn[drawn.n_latents == size]
            area = np.clip(30_000 / len(own), 3, 16)
            label = f"{size:,} latents, {len(own):,} drawn"
            axes.scatter(own.x, own.y, area, color=colour, linewidths=0, label=label)
        family = drawn[drawn.ancestor == ancestor]
        if len(family):
            name = str(family.label.iloc[0]).replace("$", r"\$")
            ring = {"facecolors": "none", "edgecolors": INK, "linewidths": 1}
            axes.scatter(family.x, family.y, 60, label=f"the family of “{name}”", **ring)
        axes.set(title="UMAP of decoder directions by cosine", aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        figure.legend(loc="outside lower center", ncols=2, markerscale=1.6)


def plot_explanations(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Scores of explanations: of features, by another's explanation, of features and of neurons.

    Args:
        table: A row a feature: ``group, score, random``.
        summary: Of `explanation.summarise`.
    """
    own, same, neurons = (
        table[table.group == name].dropna(subset=["score", "random"])
        for name in ("features", "features, same tokens", "neurons")
    )
    title = f"A feature's explanation tells its examples at {own.score.mean():.2f}, another's at "
    title += f"{own.random.mean():.2f}; 0.5 is chance (n = {len(own):,} features)"
    panels = (
        ("Against random labels", (own.score, "own"), (own.random, "another's")),
        ("Against neurons", (same.score, "features"), (neurons.score, "neurons")),
    )
    p_values = (summary["p_random"], summary.get("p_neurons"))
    bins = np.linspace(0, 1, 26)
    with picture(path, title, (9, 3.9), ncols=2) as (_, axes):
        for panel, (name, *groups), p in zip(axes, panels, p_values, strict=True):
            for (scores, label), colour in zip(groups, (ORANGE, GREY), strict=True):
                shares = np.full(len(scores), 100 / max(1, len(scores)))
                shown = f"{label}: {scores.mean():.2f}, n = {len(scores)}"
                panel.hist(scores, bins, weights=shares, color=colour, alpha=0.55, label=shown)
                panel.axvline(scores.mean(), color=colour, linewidth=1.5)
            panel.axvline(0.5, color=INK, linestyle=":", linewidth=1)
            tested = "" if p is None else f" (p = {p:.1g})"
            panel.set(title=name + tested, xlim=(0.2, 1))
            panel.set(xlabel="explanation score (mean of detection and fuzzing)")
            panel.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.2), ncols=2, columnspacing=1)
        axes[0].set(ylabel="% of each group")


def plot_outputs(table: pd.DataFrame, path: Path) -> None:
    """How much likelier features make their own tokens, and another's.

    Args:
        table: Of `outputs.output_scores`.
    """
    times = np.exp(table.score.mean())
    title = f"Clamped, features make the tokens they peak at {times:.1f} times as likely"
    title += f" (n = {len(table):,} features)"
    bins = np.linspace(-3, 5, 81)
    with picture(path, title, (7.5, 3.9)) as (_, axes):
        for scores, label, colour in (
            (table.score, "its own tokens", ORANGE),
            (table.others, "another feature's", GREY),
        ):
            shares = np.full(len(scores), 100 / max(1, len(scores)))
            shown = f"{label}: {scores.mean():+.2f} nats"
            within = scores.clip(bins[0], bins[-1])
            axes.hist(within, bins, weights=shares, color=colour, alpha=0.55, label=shown)
            axes.axvline(scores.mean(), color=colour, linewidth=1.5)
        axes.set(xlim=(bins[0], bins[-1]), ylabel="% of features")
        axes.set(xlabel="output score: rise in the log probability that one comes next, nats")
        axes.legend(loc="upper right")


def plot_attribution(found: Any, words: list[str], labels: pd.Series, path: Path) -> None:
    """The tokens of a prompt, and at each the features that most add to the difference of logits.

    Args:
        found: Of `attribution.attribute`.
        words: Texts of the two tokens that are compared, then of the prompt's.
        labels: Of features, by number.
    """
    first, second, *prompt = (repr(word)[1:-1] for word in words)
    title = f"What makes “{first.strip()}” likelier than “{second.strip()}”: "
    title += f"{found.difference:.2f} logits"
    places = found.places.sort_values("attribution", key=abs, ascending=False)
    total = places["attribution"].abs().groupby(places["position"]).sum()
    total = total.reindex(range(len(prompt)), fill_value=0.0)
    positions = sorted(total.nlargest(N_POSITIONS).index)
    some = f"; of {len(prompt)} tokens the {N_POSITIONS} that count most" * (
        len(prompt) > N_POSITIONS
    )
    height = 1.2 + 0.34 * len(positions)
    with picture(path, title, (9, height)) as (_, axes):
        for position, token in enumerate(positions):
            own = places[places.position == token].head(N_SHOWN)
            ends = {True: 0.0, False: 0.0}
            for value in own.attribution:
                colour = ORANGE if value > 0 else BLUE
                axes.barh(position, value, 0.7, ends[value > 0], color=colour, edgecolor="white")
                ends[value > 0] += value
            named = [f"{feature} “{str(labels[feature])[:18]}”" for feature in own.feature]
            place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
            text = "; ".join(named[:2]).replace("$", r"\$")
            axes.text(1.02, position, text, color=GREY, **place)
        axes.axvline(0, color=GREY, linewidth=0.8)
        shown = [prompt[token].replace("$", r"\$") for token in positions]
        axes.set_yticks(range(len(shown)), shown)
        axes.set(xlabel="attribution (logits); orange adds, blue takes away")
        axes.set(title=f"At each token its {N_SHOWN} largest; named are the two largest{some}")
        axes.set_ylim(len(positions) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)


def plot_evidence(curves: pd.DataFrame, max_perplexity: float, path: Path) -> None:
    """How much of a concept a text has, and how fluent it is, by method and strength.

    Args:
        curves: Of `evidence.curves`.
        max_perplexity: Times the untouched, marked as the end of fluency.
    """
    methods = {"feature": ORANGE, "mean difference": BLUE, "random": GREY}
    flat = {"untouched": (GREY, ":"), "reconstruction": (GREEN, "--")}
    n = curves["n"].max()
    title = "Clamping a feature brings its concept into the text, until fluency breaks"
    with picture(path, f"{title} (n = {n} features)", (11, 3.9), ncols=3) as (figure, axes):
        concept, fluency, frontier = axes
        for method, colour in methods.items():
            own = curves[curves["method"] == method].sort_values("strength")
            for panel, name, factor in ((concept, "concept", 100), (fluency, "perplexity", 1)):
                low, middle, high = (factor * own[f"{name}{end}"] for end in ("_low", "", "_high"))
                panel.plot(own["strength"], middle, "o-", ms=4, color=colour, label=method)
                panel.fill_between(own["strength"], low, high, color=colour, alpha=0.15, lw=0)
            frontier.plot(own["perplexity"], 100 * own["concept"], "o-", ms=4, color=colour)
        for method, (colour, style) in flat.items():
            (own,) = curves[curves["method"] == method].itertuples()
            concept.axhline(100 * own.concept, color=colour, linestyle=style, label=method)
            fluency.axhline(own.perplexity, color=colour, linestyle=style)
            frontier.plot(own.perplexity, 100 * own.concept, "s", ms=5, color=colour)
        fluency.axhline(max_perplexity, color=INK, linewidth=0.8)
        frontier.axvline(max_perplexity, color=INK, linewidth=0.8)
        fluency.set(yscale="log", title=f"Perplexity of the text; line: {max_perplexity:g} ×")
        fluency.set(ylabel="times that of the untouched text")
        concept.set(title="Concept in the text", ylabel="activation, % of maximum")
        frontier.set(xscale="log", title="One against the other", ylabel=concept.get_ylabel())
        frontier.set(xlabel="perplexity, times that of the untouched text")
        for panel in (concept, fluency):
            panel.set(xlabel="strength, multiples of the maximum")
        for axis in (fluency.yaxis, frontier.xaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        legend = "method; bands: 95% over features"
        figure.legend(
            *concept.get_legend_handles_labels(), title=legend, ncols=5, loc="outside lower center"
        )
