"""Splitting: what one feature of a small dictionary becomes in larger ones.

A feature's parent is the feature of the next smaller dictionary whose decoder row has the highest
cosine to its own, if that is at least `CLOSE`; those of one ancestor in the smallest dictionary are
a family.

Reference: "Scaling Monosemanticity", Feature Splitting: "San Francisco" is one feature of 1M, two
of 4M and eleven of 34M.
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from keras import ops

from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features.analysis import Analysis, Findings
from utils.features.feature_pass import BestPerGroup
from utils.features.neighbours import nearest
from utils.features.tables import make_label, map_directions

CLOSE = 0.5  # cosine to a parent; that of unrelated rows is below 0.2 in hundreds of dimensions
N_TOKENS = 131_072  # gone through for the labels of the other dictionaries
N_PEAKS = 10  # tokens that a label is made from
COHERENT = 0.5  # share of them that must be one word, for a feature to count as that word's
N_SHOWN = 14  # relatives in the largest dictionary that a picture has room for
N_MAPPED = 5_000  # features of each dictionary on the map


def find_parents(sizes: list[np.ndarray], alive: list[np.ndarray]) -> pd.DataFrame:
    """The parent of every living feature of some dictionaries.

    Args:
        sizes: Decoder rows, (n_latents, d_model) each, the smallest dictionary first.
        alive: Which of them count, (n_latents,) each.

    Returns:
        A row a feature, smallest dictionary first: ``n_latents, feature``; ``parent`` in the next
        smaller dictionary, −1 if none is close, and the ``cosine`` to the nearest, NaN in the
        smallest; ``ancestor`` in the smallest dictionary, −1 if it descends from none.
    """
    smallest = np.flatnonzero(alive[0])
    levels = [_level(len(alive[0]), smallest, -1, np.nan, smallest)]
    ancestors = np.where(alive[0], np.arange(len(alive[0])), -1)
    for (small, large), (there, own) in zip(
        itertools.pairwise(sizes), itertools.pairwise(alive), strict=True
    ):
        candidates, numbers = np.flatnonzero(there), np.flatnonzero(own)
        found, cosines = (array[:, 0] for array in nearest(small[candidates], large[numbers], 1))
        parents = np.where(cosines >= CLOSE, candidates[found], -1)
        descent = np.where(parents >= 0, ancestors[parents], -1)
        levels.append(_level(len(large), numbers, parents, cosines, descent))
        ancestors = np.full(len(large), -1)
        ancestors[numbers] = descent
    return pd.concat(levels, ignore_index=True)


def _level(n_latents: int, feature, parent, cosine, ancestor) -> pd.DataFrame:
    columns = {"feature": feature, "parent": parent, "cosine": cosine, "ancestor": ancestor}
    return pd.DataFrame({"n_latents": n_latents, **columns})


def label_features(
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    pieces: list[str],
    batch_size: int,
) -> pd.DataFrame:
    """A row a feature: its ``label``, and the ``word`` that it is of, empty if it is of none."""
    peaks = BestPerGroup(autoencoder.n_latents, N_PEAKS)
    per_batch = max(1, batch_size // store.context_length)
    for start in range(contexts.start, contexts.stop, per_batch):
        some = range(start, min(start + per_batch, contexts.stop))
        kept = np.stack([store["kept"][c] for c in some])
        tokens = np.stack([store["tokens"][c] for c in some])[kept]
        rows = store.kept_rows(some).astype(np.float32)
        row, feature, latents, _ = autoencoder.encode_active(rows)
        wanted = peaks.wants(feature, latents)
        entries = {"group": feature, "priority": latents, "token": tokens[row]}
        peaks.add({name: values[wanted] for name, values in entries.items()})
    best = peaks.best()
    text = pd.Series(np.array(pieces, dtype=object)[best["token"]])
    labels = text.groupby(best["group"]).agg(lambda own: make_label(own.value_counts().index))
    words = text.str.strip().str.lower()
    words = words.groupby(best["group"]).agg(_common_word)
    table = pd.DataFrame({"label": labels, "word": words}).reindex(range(autoencoder.n_latents))
    return table.fillna("")


def _common_word(words: pd.Series) -> str:
    counts = words.value_counts(normalize=True)
    word = counts.index[0]
    return word if counts.iloc[0] >= COHERENT and word.isalpha() and len(word) > 2 else ""


def choose_family(table: pd.DataFrame) -> int | None:
    """The ancestor whose relatives in the largest dictionary are of the most different words.

    Of families that fit into a picture; None if none has two words.

    Args:
        table: Of `find_parents`, with a ``word`` each.
    """
    largest = table[(table.n_latents == table.n_latents.max()) & (table.ancestor >= 0)]
    sizes = largest.groupby("ancestor").size()
    fitting = largest[largest.ancestor.isin(sizes.index[sizes <= N_SHOWN]) & (largest.word != "")]
    n_words = fitting.groupby("ancestor")["word"].nunique()
    return int(n_words.idxmax()) if n_words.max() > 1 else None


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """By dictionary: how many features have a parent, and into how many a parent's line splits.

    Returns:
        ``levels``, for each larger dictionary ``n_latents``, ``n_alive``, ``with_parent`` and
        ``cosine``, share and median; ``relatives``, how many of a feature of the smallest are in
        it on average, and ``split``, for how large a share more than one; and the ``family`` that
        is shown.
    """
    levels = []
    n_smallest = int((table.n_latents == table.n_latents.min()).sum())
    for n_latents, own in list(table.groupby("n_latents"))[1:]:
        counts = own[own.ancestor >= 0].groupby("ancestor").size()
        level = {"n_latents": int(n_latents), "n_alive": len(own)}
        level |= {"with_parent": float((own.parent >= 0).mean())}
        level |= {"cosine": float(own.cosine.median()), "relatives": counts.sum() / n_smallest}
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
    if not analysis.others:
        return Findings(None)
    store, settings = analysis.store, analysis.settings
    autoencoders = sorted([analysis.autoencoder, *analysis.others], key=lambda one: one.n_latents)
    sizes = [one.directions() for one in autoencoders]
    alive = [~ops.convert_to_numpy(one.dead()) for one in autoencoders]
    table = find_parents(sizes, alive)
    contexts = range(min(len(analysis.contexts), -(-N_TOKENS // store.context_length)))
    labels = [
        label_features(one, store, contexts, analysis.pieces, settings.batch_size)
        for one in autoencoders
    ]
    labels = pd.concat(labels, keys=[len(rows) for rows in sizes], names=["n_latents", "feature"])
    table = table.join(labels, on=["n_latents", "feature"])
    found = {**summarise(table), "family": choose_family(table)}
    if settings.map_features:
        table = table.join(map_sizes(table, sizes, settings.seed))
    last = found["levels"][-1]
    words = (
        f"Splitting: {last['split']:.0%} of {found['n_latents']:,} features are more than one "
        f"among {last['n_latents']:,}."
    )
    return Findings(found, words, {"splitting": table})
