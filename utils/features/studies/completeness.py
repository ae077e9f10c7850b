"""Completeness: of the concepts of a list, for which is there a feature, and how does that depend
on how often they are spoken of?

A word is covered if some feature finds it: with r the share of its occurrences on which the feature
is active, and p the share of the feature's activation that is on them, F1 = 2 r p / (r + p) is at
least `COVERED`. The share of words that are covered is a sigmoid of the logarithm of their
frequency.

Reference: "Scaling Monosemanticity", Feature Completeness, where a feature's examples are looked
through for the concept, and the sigmoids of dictionaries of several sizes fall on one another once
frequencies are multiplied by the number of living features.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from keras import ops
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features.analysis import Analysis, Findings
from utils.features.bootstrap import draw_again, interval
from utils.features.concepts import CONCEPTS

COVERED = 0.5
LEAST = 5  # occurrences of a word, below which what is found may be chance
SHORTEST = 3  # letters
WORD = re.compile(rf"(?<!\w)[^\W\d_]{{{SHORTEST},}}(?!\w)")
N_DRAWN = 40  # words that are in no list, of each quarter decade of frequency
OTHER = "other words"
N_DRAWS = 200  # of the words, for the interval of a fit


class Occurrences(NamedTuple):
    """Where words are: ``words`` (n_words,) and ``listed`` (n_words,), the list that one is of;
    ``word_of`` (n_occurrences,), a number each, or −1; ``at`` (n_contexts, context_length), the
    occurrence that a token is part of, or −1."""

    words: np.ndarray
    listed: np.ndarray
    word_of: np.ndarray
    at: np.ndarray


def find_occurrences(
    store: ActivationStore, contexts: range, pieces: list[str], seed: int
) -> Occurrences:
    """Where the words of the lists are, and other words, drawn evenly over log frequency.

    A word stands alone, in upper or lower case, has `SHORTEST` letters or more and is there `LEAST`
    times. The lists' own are nearly all rare.

    Args:
        pieces: The text of each token.
        seed: Of the drawing.
    """
    numbers: dict[str, int] = {}
    text, word_of = np.array(pieces, dtype=object), []
    at = np.full((len(contexts), store.context_length), -1, np.int32)
    for row, context in enumerate(contexts):
        spelt = text[store["tokens"][context]]
        ends = np.cumsum([len(piece) for piece in spelt])
        for match in WORD.finditer("".join(spelt)):
            first, last = np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
            at[row, first : last + 1] = len(word_of)
            word_of.append(numbers.setdefault(match.group().lower(), len(numbers)))
    words, word_of = np.array(list(numbers)), np.array(word_of, np.int64)
    counts = np.bincount(word_of, minlength=len(words))
    list_of = {word.lower(): name for name, words in CONCEPTS.items() for word in words}
    listed = np.array([list_of.get(word, OTHER) for word in words])
    chosen = _choose(counts, listed != OTHER, seed)
    renumbered = np.full(len(words), -1)
    renumbered[chosen] = np.arange(len(chosen))
    return Occurrences(words[chosen], listed[chosen], renumbered[word_of], at)


def _choose(counts: np.ndarray, listed: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of the listed words that occur often enough, and of as many drawn in each quarter
    decade of frequency."""
    decade = (4 * np.log10(np.maximum(counts, 1))).astype(int)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(~listed & (counts >= LEAST)))
    drawn = [shuffled[decade[shuffled] == part][:N_DRAWN] for part in np.unique(decade)]
    return np.sort(np.concatenate([np.flatnonzero(listed & (counts >= LEAST)), *drawn]))


def find_features(
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    occurrences: Occurrences,
    batch_size: int,
) -> tuple[pd.DataFrame, int]:
    """For each word the feature that finds it best.

    Memory is 8 bytes for each pair of a word and a feature, whatever the number of tokens.

    Args:
        occurrences: Of the same contexts.

    Returns:
        A row a word: ``word``, ``list``, ``n``, how often it is there; ``feature``, −1 for none,
        ``recall`` r, ``precision`` p, ``f1``; ``covered``. And the number of living features.
    """
    norms = ops.convert_to_numpy(autoencoder.decoder_norms())
    n = autoencoder.n_latents
    totals = np.zeros(n)
    active = np.zeros((len(occurrences.words), n), np.int32)  # occurrences that a feature is on
    mass = np.zeros(active.shape, np.float32)  # its activation on them
    length = store.context_length
    per_batch = max(1, batch_size // length)
    with tqdm(
        total=len(contexts) * length, desc="seeking concepts", unit="tok", unit_scale=True
    ) as progress:
        for start in range(0, len(contexts), per_batch):
            chosen = contexts[start : start + per_batch]
            kept = np.stack([store["kept"][context] for context in chosen])
            rows = store.kept_rows(chosen).astype(np.float32)
            row, feature, latents, _ = autoencoder.encode_active(rows)
            activation = latents * norms[feature]
            totals += np.bincount(feature, activation, minlength=n)
            occurrence = occurrences.at[start : start + per_batch][kept][row].astype(np.int64)
            word = np.where(occurrence < 0, -1, occurrences.word_of[occurrence])
            hit = word >= 0
            word, feature, occurrence = word[hit], feature[hit], occurrence[hit]
            np.add.at(mass, (word, feature), activation[hit])
            once = np.unique(occurrence * n + feature, return_index=True)[1]
            np.add.at(active, (word[once], feature[once]), 1)
            progress.update(len(chosen) * length)
    return _best_features(active, mass, totals, occurrences), int((totals > 0).sum())


def _best_features(
    active: np.ndarray, mass: np.ndarray, totals: np.ndarray, occurrences: Occurrences
) -> pd.DataFrame:
    words = occurrences.words
    counts = np.bincount(occurrences.word_of + 1, minlength=len(words) + 1)[1:]
    rows = []
    for word, n in enumerate(counts):
        recall, precision = active[word] / n, mass[word] / np.maximum(totals, 1e-12)
        f1 = 2 * recall * precision / np.maximum(recall + precision, 1e-12)
        best = int(f1.argmax())
        rows.append((best if f1[best] else -1, recall[best], precision[best], f1[best]))
    table = pd.DataFrame({"word": words, "list": occurrences.listed, "n": counts})
    best = pd.DataFrame(rows, columns=["feature", "recall", "precision", "f1"])
    best.loc[best["feature"] < 0, ["recall", "precision"]] = 0.0
    table = table.join(best)
    table["covered"] = table["f1"] >= COVERED
    return table.sort_values("n", ascending=False, ignore_index=True)


def fit_sigmoid(frequency: np.ndarray, covered: np.ndarray, seed: int) -> dict[str, Any] | None:
    """P(covered) = 1 / (1 + exp(−slope · (log10 frequency − middle))), by maximum likelihood.

    Args:
        frequency: Of each word, occurrences a token.
        covered: Whether there is a feature for it, bool.
        seed: Of the words drawn again for the interval (bootstrap).

    Returns:
        ``slope``; ``half``, the frequency at which half of the words are covered, with its 95%
        interval ``half_low``, ``half_high``; or None if all words are covered, or none.
    """
    if covered.all() or not covered.any():
        return None
    middles = [
        _fit(frequency[draw], covered[draw])[1]
        for draw in draw_again(len(covered), seed, N_DRAWS)
        if covered[draw].any() and not covered[draw].all()
    ]
    slope, middle = _fit(frequency, covered)
    low, high = interval(middles)
    half = {"half": 10**middle, "half_low": 10**low, "half_high": 10**high}
    return {"slope": slope, **{name: float(value) for name, value in half.items()}}


def _fit(frequency: np.ndarray, covered: np.ndarray) -> tuple[float, float]:
    found = LogisticRegression(C=1e4).fit(np.log10(frequency)[:, None], covered)
    slope = float(found.coef_[0, 0])
    return slope, float(-found.intercept_[0] / slope)


def study(analysis: Analysis) -> Findings:
    """Which words each of some dictionaries has a feature for, and the sigmoid of it.

    Returns:
        For each dictionary ``n_latents``, ``n_alive``, ``n_words``, ``n_covered`` and the sigmoid;
        and the table of `find_features`, with ``n_latents`` and ``frequency``, occurrences a token.
    """
    store, settings = analysis.store, analysis.settings
    occurrences = find_occurrences(store, analysis.contexts, analysis.pieces, settings.seed)
    n_tokens = occurrences.at.size
    tables, fits = [], []
    autoencoders = [analysis.autoencoder, *analysis.others]
    for autoencoder in sorted(autoencoders, key=lambda autoencoder: autoencoder.n_latents):
        table, n_alive = find_features(
            autoencoder, store, analysis.contexts, occurrences, settings.batch_size
        )
        table = table.assign(n_latents=autoencoder.n_latents, frequency=table["n"] / n_tokens)
        covered = table["covered"].to_numpy()
        sigmoid = fit_sigmoid(table["frequency"].to_numpy(), covered, settings.seed) or {}
        counts = {"n_words": len(table), "n_covered": int(covered.sum())}
        fits.append({"n_latents": autoencoder.n_latents, "n_alive": n_alive, **counts, **sigmoid})
        tables.append(table)
    words = "\n".join(map(in_words, fits))
    return Findings(fits, words, {"completeness": pd.concat(tables, ignore_index=True)})


def in_words(fit: dict[str, Any]) -> str:
    """What was found in one dictionary, as a sentence."""
    half = (
        f"; half of those that make up {fit['half']:.1e} of all tokens, "
        f"{fit['half'] * fit['n_alive']:.1f} times a feature's share"
        if "half" in fit
        else ""
    )
    return (
        f"Completeness: {fit['n_covered']:,} of {fit['n_words']:,} words have a feature among "
        f"{fit['n_alive']:,}{half}."
    )
