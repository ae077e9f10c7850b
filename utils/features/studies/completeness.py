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

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from utils import plots
from utils.activations.store import ActivationStore
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.concepts import CONCEPTS
from utils.features.feature_pass import Encoder
from utils.features.sampling import draw_again, interval
from utils.settings import Json
from utils.steering.feature_model import FeatureEncoder

COVERED = 0.5
LEAST = 5  # occurrences of a word, below which what is found may be chance
SHORTEST = 3  # letters
WORD = re.compile(rf"(?<!\w)[^\W\d_]{{{SHORTEST},}}(?!\w)")
N_DRAWN = 40  # words that are in no list, of each quarter decade of frequency
OTHER = "other words"
CAPTION = "Which words have a feature?"
TOGETHER = 65_536  # tokens whose words are sought together
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
    store: ActivationStore, contexts: range, token_texts: list[str], seed: int
) -> Occurrences:
    """Where the words of the lists are, and other words, drawn evenly over log frequency.

    A word stands alone, in upper or lower case, has `SHORTEST` letters or more and is there `LEAST`
    times. The lists' own are nearly all rare.

    Args:
        token_texts: The text of each token.
        seed: Of the drawing.
    """
    numbers: dict[str, int] = {}
    text, word_of = np.array(token_texts, dtype=object), []
    at = np.full((len(contexts), store.context_length), -1, np.int32)
    tokens = (tokens for batch in store.batches(contexts, TOGETHER) for tokens in batch.tokens)
    for row, spelt in enumerate(text[context] for context in tokens):
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
    encoder: Encoder,
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
    n = encoder.n_latents
    totals = np.zeros(n)
    active = np.zeros((len(occurrences.words), n), np.int32)  # occurrences that a feature is on
    mass = np.zeros(active.shape, np.float32)  # its activation on them
    first = 0  # context of the batch
    for batch in store.batches(contexts, batch_size, "seeking concepts"):
        row, feature, activation, _ = encoder.active(batch.rows)
        totals += np.bincount(feature, activation, minlength=n)
        context, position = batch.places(row)
        occurrence = occurrences.at[first + context, position].astype(np.int64)
        first += len(batch.contexts)
        word = np.where(occurrence < 0, -1, occurrences.word_of[occurrence])
        hit = word >= 0
        word, feature, occurrence = word[hit], feature[hit], occurrence[hit]
        np.add.at(mass, (word, feature), activation[hit])
        once = np.unique(occurrence * n + feature, return_index=True)[1]
        np.add.at(active, (word[once], feature[once]), 1)
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


def fit_sigmoid(frequency: np.ndarray, covered: np.ndarray, seed: int) -> dict[str, Json] | None:
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
    sigmoid = LogisticRegression(C=1e4).fit(np.log10(frequency)[:, None], covered)
    slope = float(sigmoid.coef_[0, 0])
    return slope, float(-sigmoid.intercept_[0] / slope)


def study(analysis: Analysis) -> Findings:
    """Which words each of some dictionaries has a feature for, and the sigmoid of it.

    Returns:
        For each dictionary ``n_latents``, ``n_alive``, ``n_words``, ``n_covered`` and the sigmoid;
        and the table of `find_features`, with ``n_latents`` and ``frequency``, occurrences a token.
    """
    store, settings = analysis.store, analysis.settings
    occurrences = find_occurrences(store, analysis.contexts, analysis.token_texts, settings.seed)
    n_tokens = occurrences.at.size
    tables, fits = [], []
    autoencoders = [analysis.autoencoder, *analysis.others]
    for autoencoder in sorted(autoencoders, key=lambda autoencoder: autoencoder.n_latents):
        table, n_alive = find_features(
            FeatureEncoder(autoencoder), store, analysis.contexts, occurrences, settings.batch_size
        )
        table = table.assign(n_latents=autoencoder.n_latents, frequency=table["n"] / n_tokens)
        covered = table["covered"].to_numpy()
        sigmoid = fit_sigmoid(table["frequency"].to_numpy(), covered, settings.seed) or {}
        counts = {"n_words": len(table), "n_covered": int(covered.sum())}
        fits.append({"n_latents": autoencoder.n_latents, "n_alive": n_alive, **counts, **sigmoid})
        tables.append(table)
    words = "\n".join(map(in_words, fits))
    return Findings(fits, words, {"completeness": pd.concat(tables, ignore_index=True)})


def in_words(fit: dict[str, Json]) -> str:
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


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The picture of a finished study, by its caption."""
    path = catalogue.folder / "completeness.png"
    plot_completeness(catalogue.table("completeness"), catalogue.summary["completeness"], path)
    return {CAPTION: path}


def plot_completeness(table: pd.DataFrame, fits: list[dict], path: Path) -> None:
    """Share of words that have a feature against how frequent they are, with the fitted sigmoids.

    Args:
        table: A row a word and dictionary: ``n_latents, frequency, covered``.
        fits: Of `study`.
    """
    most = fits[-1]
    title = f"Completeness: {most['n_covered']:,} of {most['n_words']:,} words, the frequent ones, "
    title += f"have a feature among {most['n_alive']:,}"
    colours = (plots.BLUE, plots.ORANGE, "#117733", "#AA4499", "#88CCEE")
    with plots.picture(path, title, (9, 3.9), ncols=2, sharey=True) as (_, (left, right)):
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
        right.axvline(1, color=plots.GREY, linestyle="--", linewidth=1)
        right.set(title="Rescaled by living features")
        right.set(xlabel="occurrences a token × living features")
        for axes in (left, right):
            axes.set(xscale="log", ylim=(-2, 102))
