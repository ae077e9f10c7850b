"""Completeness: which words of lists of concepts have a feature, and how frequent are these?

A feature's recall r of a word is the share of the word's occurrences on which the feature is
active, its precision p the share of the feature's activation that is on them. A word is covered if
some feature has F1 = 2 r p / (r + p) of at least `COVERED`. The share of words that are covered is
a sigmoid of the logarithm of their frequency.

Reference: "Scaling Monosemanticity", Feature Completeness, which searches a feature's examples for
the concept. There the sigmoids of dictionaries of several sizes fall on one another once
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
from utils.activations.store import ActivationStore, Contexts
from utils.characters import IDEOGRAPH, WORD, whole_characters
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.concepts import CONCEPTS
from utils.features.feature_pass import Encoder
from utils.features.sampling import draw_again, interval
from utils.settings import Json
from utils.steering.feature_model import FeatureEncoder
from utils.terminal import significant

COVERED = 0.5
LEAST = 5  # occurrences of a word; a feature that fits fewer may fit by chance
SHORTEST = 3  # letters, but for scripts in which a character is a word
N_DRAWN = 40  # words that are in no list, of each quarter decade of frequency
OTHER = "other words"
TOGETHER = 65_536  # tokens whose words are searched together
N_DRAWS = 200  # of the words, for the interval of a fit


class Occurrences(NamedTuple):
    """Where words occur."""

    words: np.ndarray  # (n_words,)
    listed: np.ndarray  # (n_words,), the name of the list that holds the word
    word_of: np.ndarray  # (n_occurrences,), the index of its word, or −1
    at: np.ndarray  # (n_contexts, context_length), the occurrence a token is part of, or −1


def find_occurrences(
    store: ActivationStore, contexts: Contexts, token_texts: list[str], seed: int
) -> Occurrences:
    """Where the words of the lists are, and other words, drawn evenly over log frequency.

    A word stands alone, in upper or lower case, has `SHORTEST` letters or more and occurs `LEAST`
    times. Other words are added since those of the lists are nearly all rare.
    """
    numbers: dict[str, int] = {}
    text, word_of = np.array(token_texts, dtype=object), []
    at = np.full((len(contexts), store.context_length), -1, np.int32)
    tokens = (tokens for batch in store.batches(contexts, TOGETHER) for tokens in batch.tokens)
    for row, parts in enumerate(text[context] for context in tokens):
        spelt = whole_characters(parts)
        ends = np.cumsum([len(piece) for piece in spelt])
        for match in WORD.finditer("".join(spelt)):
            is_short = len(match[0]) < SHORTEST and not IDEOGRAPH.match(match[0])
            if is_short or re.search(r"[\d_]", match[0]):
                continue
            first, last = np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
            while first and not spelt[first - 1] and parts[first - 1]:  # begins its first character
                first -= 1
            at[row, first : last + 1] = len(word_of)
            word_of.append(numbers.setdefault(match.group().lower(), len(numbers)))
    words, word_of = np.array(list(numbers), str), np.array(word_of, np.int64)
    counts = np.bincount(word_of, minlength=len(words))
    list_of = {word.lower(): name for name, words in CONCEPTS.items() for word in words}
    listed = np.array([list_of.get(word, OTHER) for word in words], str)
    chosen = _choose(counts, listed != OTHER, seed)
    renumbered = np.full(len(words), -1)
    renumbered[chosen] = np.arange(len(chosen))
    return Occurrences(words[chosen], listed[chosen], renumbered[word_of], at)


def _choose(counts: np.ndarray, listed: np.ndarray, seed: int) -> np.ndarray:
    """Indices of frequent enough listed words, and of others drawn by quarter decade of count."""
    decade = (4 * np.log10(np.maximum(counts, 1))).astype(int)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(~listed & (counts >= LEAST)))
    drawn = [shuffled[decade[shuffled] == quarter][:N_DRAWN] for quarter in np.unique(decade)]
    return np.sort(np.concatenate([np.flatnonzero(listed & (counts >= LEAST)), *drawn]))


def find_features(
    encoder: Encoder,
    store: ActivationStore,
    contexts: Contexts,
    occurrences: Occurrences,
    batch_size: int,
) -> tuple[pd.DataFrame, int]:
    """For each word of ``occurrences``, in the same contexts, the feature of the highest F1.

    Memory is 8 bytes for each pair of a word and a feature, whatever the number of tokens.

    Returns:
        A row a word: ``word``, ``list``, ``n`` occurrences; ``feature``, −1 for none, its
        ``recall``, ``precision`` and ``f1``; ``covered``. And the number of living features.
    """
    n = encoder.n_latents
    totals = np.zeros(n)
    active = np.zeros((len(occurrences.words), n), np.int32)  # occurrences a feature is active on
    mass = np.zeros(active.shape, np.float32)  # its summed activation on them
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
        recall, precision = active[word] / n, mass[word] / np.where(totals > 0, totals, 1)
        f1 = 2 * recall * precision / np.maximum(recall + precision, 1e-12)
        best = int(f1.argmax())
        rows.append((best if f1[best] else -1, recall[best], precision[best], f1[best]))
    table = pd.DataFrame({"word": words, "list": occurrences.listed, "n": counts})
    table = table.join(pd.DataFrame(rows, columns=["feature", "recall", "precision", "f1"]))
    table.loc[table["feature"] < 0, ["recall", "precision"]] = 0.0
    table["covered"] = table["f1"] >= COVERED
    return table.sort_values("n", ascending=False, ignore_index=True)


def fit_sigmoid(frequency: np.ndarray, covered: np.ndarray, seed: int) -> dict[str, Json] | None:
    """P(covered) = 1 / (1 + exp(−slope · (log10 frequency − middle))), by maximum likelihood.

    Args:
        frequency: Of each word, occurrences a token.
        covered: Whether there is a feature for it, bool.

    Returns:
        ``slope``; ``half``, the frequency at which half of the words are covered, with its 95%
        bootstrap interval ``half_low``, ``half_high``; or None if all words are covered, or none.
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
    """Which words each dictionary has a feature for, and the sigmoid of its coverage."""
    store, settings = analysis.store, analysis.settings
    occurrences = find_occurrences(store, analysis.contexts, analysis.token_texts, settings.seed)
    if not len(occurrences.words):
        words = f"no word of {SHORTEST} letters or more is {LEAST} times in the analysed text."
        return Findings([], f"Completeness: {words}")
    n_tokens = occurrences.at.size
    tables, fits = [], []
    for autoencoder in analysis.all_sizes:
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
    """The result in one dictionary as a sentence."""
    words = f"Completeness: {fit['n_covered']:,} of {fit['n_words']:,} words have a feature among "
    words += f"{fit['n_alive']:,}"
    if "half" in fit:
        words += f"; half of those as frequent as {significant(1e6 * fit['half'])} in a million "
        words += f"tokens ({fit['half'] * fit['n_alive']:.1f} times the share if all were alike)"
    return words + "."


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """Share of words that have a feature against how frequent they are, with the sigmoids."""
    table, fits = catalogue.table("completeness"), catalogue.summary["completeness"]
    path, largest = catalogue.folder / "completeness.png", fits[-1]
    title = f"Completeness: {largest['n_covered']:,} of {largest['n_words']:,} words, the frequent "
    title += f"ones, have a feature among {largest['n_alive']:,}"
    colours = itertools.cycle((plots.BLUE, plots.ORANGE, "#117733", "#AA4499", "#88CCEE"))
    with plots.picture(path, title, (9, 3.9), ncols=2, sharey=True) as (_, (left, right)):
        for fit, colour in zip(fits, colours, strict=False):
            words = table[table.n_latents == fit["n_latents"]]
            bins = np.round(4 * np.log10(words.frequency)) / 4
            covered = 100 * words.covered.groupby(bins).mean()
            style = {"color": colour, "label": f"{fit['n_latents']:,} latents"}
            for axes, factor in ((left, 1e6), (right, fit["n_alive"])):
                axes.plot(10**covered.index * factor, covered, "o", ms=4, **style)
                if "half" in fit:
                    x = np.logspace(*np.log10([words.frequency.min(), words.frequency.max()]), 200)
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
    return {"Which words have a feature?": path}
