"""Splitting: the features of larger dictionaries that one feature of a small one becomes.

A feature's parent is the feature of the next smaller dictionary whose decoder row has the highest
cosine to the feature's, if that is at least `CLOSE`. All features of one ancestor in the smallest
dictionary are a family.

Reference: "Scaling Monosemanticity", Feature Splitting: "San Francisco" is one feature of 1M, two
of 4M and eleven of 34M.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from keras import ops

from utils import plots
from utils.activations.store import ActivationStore, Contexts, spread
from utils.characters import is_word
from utils.features.analysis import Analysis, Findings
from utils.features.best import BestPerGroup
from utils.features.catalogue import Catalogue
from utils.features.examples import text_at
from utils.features.feature_pass import Encoder
from utils.features.geometry import map_directions, nearest
from utils.features.labels import BESIDE, make_label
from utils.settings import Json
from utils.steering.feature_model import FeatureEncoder

CLOSE = 0.5  # cosine to a parent; that of unrelated rows is below 0.2 in hundreds of dimensions
N_TOKENS = 131_072  # read for the labels of all dictionaries
N_PEAKS = 10  # tokens that a label is made from
COHERENT = 0.5  # share of them that must be one word, for a feature to count as that word's
N_SHOWN = 14  # relatives in the largest dictionary that a picture has room for
N_MAPPED = 5_000  # features of each dictionary on the map


def find_parents(sizes: list[np.ndarray], alive: list[np.ndarray]) -> pd.DataFrame:
    """The parent of every living feature of some dictionaries.

    Args:
        sizes: Decoder rows, (n_latents, d_model) each, the smallest dictionary first.
        alive: Which features are alive, bool, (n_latents,) each.

    Returns:
        A row a feature, smallest dictionary first: ``n_latents, feature``; ``parent`` in the next
        smaller dictionary, −1 if none is close, and the ``cosine`` to the nearest, NaN in the
        smallest; ``ancestor`` in the smallest dictionary, −1 if it descends from none.
    """
    smallest = np.flatnonzero(alive[0])
    levels = [_level(len(alive[0]), smallest, -1, np.nan, smallest)]
    ancestors = np.where(alive[0], np.arange(len(alive[0])), -1)
    for i in range(1, len(sizes)):
        candidates, features = np.flatnonzero(alive[i - 1]), np.flatnonzero(alive[i])
        neighbours = nearest(sizes[i - 1][candidates], sizes[i][features], 1)
        index, cosines = (array[:, 0] for array in neighbours)
        parents = np.where(cosines >= CLOSE, candidates[index], -1)
        descent = np.where(parents >= 0, ancestors[parents], -1)
        levels.append(_level(len(sizes[i]), features, parents, cosines, descent))
        ancestors = np.full(len(sizes[i]), -1)
        ancestors[features] = descent
    return pd.concat(levels, ignore_index=True)


def _level(n_latents: int, feature, parent, cosine, ancestor) -> pd.DataFrame:
    columns = {"feature": feature, "parent": parent, "cosine": cosine, "ancestor": ancestor}
    return pd.DataFrame({"n_latents": n_latents, **columns})


def label_features(
    encoder: Encoder,
    store: ActivationStore,
    contexts: Contexts,
    token_texts: list[str],
    batch_size: int,
) -> pd.DataFrame:
    """A row a feature: its ``label``, and the ``word`` that most of its peaks are, or ""."""
    peaks = BestPerGroup(encoder.n_latents, N_PEAKS)
    for batch in store.batches(contexts, batch_size, "labelling"):
        row, feature, activation, _ = encoder.active(batch.rows)
        wanted = peaks.wants(torch.from_numpy(feature), torch.from_numpy(activation)).numpy()
        entries = {"group": feature, "priority": activation}
        context, position = batch.places(row)
        padded = np.pad(batch.tokens, ((0, 0), (BESIDE, BESIDE)), constant_values=-1)
        beside = position[:, None] + np.arange(2 * BESIDE + 1)
        entries["tokens"] = padded[context[:, None], beside]
        peaks.add({name: values[wanted] for name, values in entries.items()})
    best = peaks.best()
    text = pd.Series([text_at(token_texts, tokens, BESIDE) for tokens in best["tokens"]], dtype=str)
    labels = text.groupby(best["group"]).agg(lambda texts: make_label(texts.value_counts().index))
    words = text.str.strip().str.lower().groupby(best["group"]).agg(_common_word)
    table = pd.DataFrame({"label": labels, "word": words}).reindex(range(encoder.n_latents))
    return table.fillna("")


def _common_word(words: pd.Series) -> str:
    counts = words.value_counts(normalize=True)
    word = counts.index[0]
    return word if counts.iloc[0] >= COHERENT and is_word(word) and len(word) > 2 else ""


def choose_family(table: pd.DataFrame) -> int | None:
    """Of families that fit into a picture, the ancestor of the one with the most different words.

    Words are those of features in the largest dictionary; None if no family has two.

    Args:
        table: Of `find_parents`, with a ``word`` each.
    """
    largest = table[(table.n_latents == table.n_latents.max()) & (table.ancestor >= 0)]
    sizes = largest.groupby("ancestor").size()
    fitting = largest[largest.ancestor.isin(sizes.index[sizes <= N_SHOWN]) & (largest.word != "")]
    n_words = fitting.groupby("ancestor")["word"].nunique()
    return int(n_words.idxmax()) if n_words.max() > 1 else None


def summarise(table: pd.DataFrame) -> dict[str, Json]:
    """How many features have a parent, and into how many features one splits.

    Returns:
        ``n_latents`` of the smallest dictionary; ``levels``, for each larger dictionary
        ``n_latents``, ``n_alive``, the share ``with_parent``, the median ``cosine``, the mean
        number of ``relatives`` of a feature of the smallest, and the share ``split`` of features
        of the smallest with more than one.
    """
    levels = []
    n_smallest = int((table.n_latents == table.n_latents.min()).sum())
    for n_latents, group in list(table.groupby("n_latents"))[1:]:
        counts = group[group.ancestor >= 0].groupby("ancestor").size()
        level = {"n_latents": int(n_latents), "n_alive": len(group)}
        level |= {"with_parent": float((group.parent >= 0).mean())}
        level |= {"cosine": float(group.cosine.median()), "relatives": counts.sum() / n_smallest}
        levels.append(level | {"split": float((counts > 1).sum() / n_smallest)})
    return {"n_latents": int(table.n_latents.min()), "levels": levels}


def map_sizes(table: pd.DataFrame, sizes: list[np.ndarray], seed: int) -> pd.DataFrame:
    """Places of the features of all dictionaries on one map, columns ``x`` and ``y``.

    Of each dictionary at most `N_MAPPED`, drawn at random; NaN for the others.
    """
    by_size = {len(rows): rows for rows in sizes}
    order = np.random.default_rng(seed).permutation(len(table))
    shown = table.iloc[order].groupby("n_latents").head(N_MAPPED).index.sort_values()
    rows = np.stack([by_size[row.n_latents][row.feature] for row in table.loc[shown].itertuples()])
    places = pd.DataFrame(np.nan, table.index, ["x", "y"])
    places.loc[shown] = map_directions(rows, np.ones(len(rows), bool), seed)
    return places


def study(analysis: Analysis) -> Findings:
    """Families over the analysed dictionary and ``OTHER_AUTOENCODERS``; nothing without these."""
    store, settings, autoencoders = analysis.store, analysis.settings, analysis.all_sizes
    if len(autoencoders) == 1:
        return Findings(None)
    sizes = [one.directions() for one in autoencoders]
    table = find_parents(sizes, [~ops.convert_to_numpy(one.dead()) for one in autoencoders])
    contexts = spread(analysis.contexts, -(-N_TOKENS // store.context_length))
    texts, batch_size = analysis.token_texts, settings.batch_size
    labels = {
        one.n_latents: label_features(FeatureEncoder(one), store, contexts, texts, batch_size)
        for one in autoencoders
    }
    keys = ["n_latents", "feature"]
    table = table.join(pd.concat(labels, names=keys), on=keys)
    summary = {**summarise(table), "family": choose_family(table)}
    if settings.map_features:
        table = table.join(map_sizes(table, sizes, settings.seed))
    last = summary["levels"][-1]
    words = f"Splitting: {last['split']:.0%} of {summary['n_latents']:,} features are more than "
    words += f"one among {last['n_latents']:,}."
    return Findings(summary, words, {"splitting": table})


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The family that splits most, and the map of all dictionaries, where the study has them."""
    # A label may be "null" or "None", which would count as missing.
    numbers = dict.fromkeys(("cosine", "x", "y"), "")
    table = catalogue.table("splitting", keep_default_na=False, na_values=numbers)
    family, pictures = catalogue.summary["splitting"]["family"], {}
    if family is not None:
        path = catalogue.folder / "family.png"
        plot_family(table, family, path)
        pictures["What does a feature become in larger dictionaries?"] = path
    if "x" in table:
        path = catalogue.folder / "sizes.png"
        plot_sizes(table, family, path)
        pictures["Where are the features of larger dictionaries?"] = path
    return pictures


def plot_family(table: pd.DataFrame, ancestor: int, path: Path) -> None:
    """What a feature of the smallest dictionary becomes in the larger ones, as a tree."""
    sizes = sorted(table.n_latents.unique())
    family = table[table.ancestor == ancestor]
    rows = {size: family[family.n_latents == size] for size in sizes}
    heights, n_leaves = {}, 0

    def place(level: int, feature: int) -> float:
        """A leaf gets the next line, a parent the middle of its children."""
        nonlocal n_leaves
        children = []
        if level + 1 < len(sizes):
            larger = rows[sizes[level + 1]]
            children = larger[larger.parent == feature].sort_values("label").feature.tolist()
        below = [place(level + 1, child) for child in children]
        n_leaves += not below
        heights[level, feature] = (below[0] + below[-1]) / 2 if below else n_leaves - 1
        return heights[level, feature]

    place(0, ancestor)
    counts = " → ".join(str(len(rows[size])) for size in sizes)
    title = f"Splitting: “{rows[sizes[0]].label.iloc[0]}” is {counts} features"
    with plots.picture(path, title, (10, 1.6 + 0.3 * n_leaves)) as (_, axes):
        for level, size in enumerate(sizes):
            for row in rows[size].itertuples():
                y = heights[level, row.feature]
                if level:
                    start = heights[level - 1, row.parent]
                    x = np.linspace(level - 0.38, level, 30)
                    curve = start + (y - start) * (1 - np.cos(np.linspace(0, np.pi, 30))) / 2
                    axes.plot(x, curve, color=plots.BLUE, linewidth=4 * row.cosine**2)
                cosine = f"  {row.cosine:.2f}" if level else ""
                text = f"{row.feature} “{row.label[:22]}”{cosine}".replace("$", r"\$")
                axes.text(level + 0.02, y, text, va="center", fontsize=8)
        names = [f"{size:,} latents" for size in sizes]
        axes.set_xticks(range(len(sizes)), names, ha="left", color=plots.GREY)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(0, len(sizes) - 0.3), ylim=(n_leaves - 0.5, -0.5), yticks=[])
        note = "number, tokens at the peaks, cosine to the parent"
        axes.set_xlabel(note, loc="left", color=plots.GREY)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)


def plot_sizes(table: pd.DataFrame, ancestor: int | None, path: Path) -> None:
    """The features of several dictionaries on one map, those of one ancestor ringed."""
    drawn = table[table.x.notna()]
    sizes = sorted(drawn.n_latents.unique())
    title = f"{len(sizes)} dictionaries on one map (n = {len(drawn):,} features)"
    with plots.picture(path, title, (9, 7.4)) as (figure, axes):
        colours = [plots.ORANGE, plots.BLUE, "#8FB8D3", plots.PALE][: len(sizes)]
        for size, colour in reversed(list(zip(sizes, itertools.cycle(colours)))):
            points = drawn[drawn.n_latents == size]
            area = np.clip(30_000 / len(points), 3, 16)
            label = f"{size:,} latents, {len(points):,} drawn"
            axes.scatter(points.x, points.y, area, color=colour, linewidths=0, label=label)
        family = drawn[drawn.ancestor == ancestor]
        if len(family):
            name = str(family.label.iloc[0]).replace("$", r"\$")
            ring = {"facecolors": "none", "edgecolors": plots.INK, "linewidths": 1}
            axes.scatter(family.x, family.y, 60, label=f"the family of “{name}”", **ring)
        axes.set(title="UMAP of decoder directions by cosine", aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        figure.legend(loc="outside lower center", ncols=2, markerscale=1.6)
