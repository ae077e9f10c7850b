"""Specificity: is a feature's concept there where the feature is active, and how does that depend
on how active it is?

From half of a feature's highest examples its concept is taken. Where a judge is named it is the
judge's phrase, and the judge scores; else no language model does, and the concept is the words at
their peaks, and what list of known concepts or what kind of text these belong to. All other
examples are then scored by the paper's rubric:

    3  the peak is at one of the concept's words        clean match
    2  one of them stands nearby                        related to the nearby text
    1  the text is of the concept's kind                vaguely related
    0  none of these                                    irrelevant

The same examples scored by another feature's concept tell what chance gives.

Reference: "Scaling Monosemanticity", Specificity, where Claude scores by this rubric.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute

from utils.features.analysis import Analysis, Findings
from utils.features.bootstrap import draw_again, interval
from utils.features.concepts import CONCEPTS
from utils.features.judge import Answers, ask_grades, ask_labels
from utils.features.questions import RUBRIC, marked_tokens, show

NEARBY = 12  # tokens to each side of the peak
SHARE = 0.5  # of these examples, that a list or a kind of text must hold to be the concept
COMMON = 0.3  # a word is of the concept if so large a share of these examples peak at it
N_LEVELS = 5  # equal parts between 0 and a feature's maximum
LISTED = {name: {word.lower() for word in words} for name, words in CONCEPTS.items()}


class Concept(NamedTuple):
    """What a feature seems to be about: words in lower case, a list's name, a corpus subset."""

    words: frozenset[str]
    listed: str | None
    subset: str | None


def word_at(pieces: Sequence[str], place: int) -> str:
    """The whole word that holds the token at ``place``, in lower case; what is no word, as it is.

    Args:
        pieces: Texts of the tokens around it.
    """
    if not pieces[place].strip().isalnum():
        return pieces[place].strip().lower() or repr(pieces[place])
    first, last = place, place
    while first > 0 and pieces[first][:1].isalnum() and pieces[first - 1][-1:].isalnum():
        first -= 1
    while last + 1 < len(pieces) and pieces[last][-1:].isalnum() and pieces[last + 1][:1].isalnum():
        last += 1
    return "".join(pieces[first : last + 1]).strip().lower()


def find_concept(examples: pd.DataFrame, subset_shares: dict[str, float]) -> Concept:
    """The concept of examples, with columns ``word`` and ``subset``.

    Args:
        subset_shares: Share of each subset in all text, for a subset must be twice as common here.
    """
    n = max(1, len(examples))
    counts = Counter(examples["word"])
    words = {word for word, count in counts.items() if count >= max(2, COMMON * n)}
    words |= {counts.most_common(1)[0][0]} if counts else set()
    shares = {name: sum(counts[word] for word in listed) / n for name, listed in LISTED.items()}
    listed = max(shares, key=shares.get)
    listed = listed if shares[listed] > SHARE else None
    if listed:
        words |= LISTED[listed]
    subset, count = Counter(examples["subset"]).most_common(1)[0]
    holds = count / n > max(SHARE, 2 * subset_shares[subset])
    return Concept(frozenset(words), listed, subset if holds else None)


def score(word: str, nearby: frozenset[str], subset: str, concept: Concept) -> int:
    """0 to 3, by the rubric above. Nearby, words of under four letters count for nothing."""
    if word in concept.words:
        return 3
    if any(len(other) > 3 and other in nearby for other in concept.words):
        return 2
    return int(subset == concept.subset)


def draw_examples(
    examples: pyarrow.Table, pieces: list[str], n_features: int, seed: int
) -> pd.DataFrame:
    """The examples of some living features, drawn at random, with the ``pieces`` of their text.

    Args:
        examples: Of `catalogue.example_table`.
        pieces: The text of each token.
        n_features: How many to draw; all of them if there are fewer.
        seed: Of the drawing.
    """
    alive = np.unique(examples["feature"].to_numpy())
    drawn = np.random.default_rng(seed).permutation(alive)[:n_features]
    chosen = pyarrow.compute.is_in(examples["feature"], pyarrow.array(drawn))
    found = examples.filter(chosen).to_pandas()
    text = np.array([*pieces, ""], dtype=object)  # −1, no token, is the last
    return found.assign(pieces=[list(text[tokens]) for tokens in found["tokens"]])


def chosen_from(examples: pd.DataFrame) -> pd.Series:
    """Every other of the highest, so that those scored are as active as those chosen from."""
    return (examples["bucket"] == 0) & (examples["rank"] % 2 == 0)


def held_out(examples: pd.DataFrame) -> pd.DataFrame:
    """Examples that nothing was taken from, one a context.

    The random ones may be among the highest too: a feature's examples are the peaks of contexts.
    """
    source = chosen_from(examples).to_numpy()
    places = pd.MultiIndex.from_frame(examples[["feature", "context"]])
    others = examples[~source & ~places.isin(places[source])]
    return others.drop_duplicates(["feature", "context"])


def measure_specificity(
    examples: pd.DataFrame, subset_shares: dict[str, float], seed: int
) -> pd.DataFrame:
    """Scores of the examples of some features.

    Args:
        examples: Of `draw_examples`: the highest are bucket 0, by rank.
        subset_shares: Share of each corpus subset in all text.
        seed: Of which feature's concept each one's examples are scored by for comparison.

    Returns:
        A row an example of `held_out`: ``feature``, ``level`` (activation as a
        share of the feature's maximum), ``score``, ``chance``, and ``listed``, the concept's list.
    """
    examples = examples.reset_index(drop=True)
    places = [
        (list(pieces), int(peak))
        for pieces, peak in zip(examples["pieces"], examples["peak"], strict=True)
    ]
    examples["word"] = [word_at(*place) for place in places]
    examples["nearby"] = [_words_near(*place) for place in places]
    examples["subset"] = examples["subset"].astype(str)
    concepts = {
        feature: find_concept(group, subset_shares)
        for feature, group in examples[chosen_from(examples)].groupby("feature")
    }
    shuffled = np.random.default_rng(seed).permutation(list(concepts))
    other = dict(zip(shuffled, np.roll(shuffled, 1), strict=True))
    scored = held_out(examples)
    maxima = examples.groupby("feature")["activation"].max()
    rows = [
        {
            "feature": row.feature,
            "level": row.activation / maxima[row.feature],
            "score": score(row.word, row.nearby, row.subset, concepts[row.feature]),
            "chance": score(row.word, row.nearby, row.subset, concepts[other[row.feature]]),
            "listed": concepts[row.feature].listed,
        }
        for row in scored.itertuples()
    ]
    return pd.DataFrame(rows, columns=["feature", "level", "score", "chance", "listed"])


def judge_specificity(examples: pd.DataFrame, answers: Answers, seed: int) -> pd.DataFrame:
    """As `measure_specificity`, by a judge; scores are NaN where its answer cannot be read."""
    labels = ask_labels(examples[chosen_from(examples)], answers)
    shuffled = np.random.default_rng(seed).permutation(list(labels))
    other = {f: labels[of] for f, of in zip(shuffled, np.roll(shuffled, 1), strict=True)}
    scored = held_out(examples)
    scored = scored[scored["feature"].isin(labels)].reset_index(drop=True)
    shown = [
        show(row.pieces, marked_tokens(np.asarray(row.activations))) for row in scored.itertuples()
    ]
    maxima = examples.groupby("feature")["activation"].max()
    table = scored[["feature"]].assign(
        level=scored["activation"] / scored["feature"].map(maxima),
        score=ask_grades(RUBRIC, "rubric", scored["feature"], labels, shown, 3, answers),
        chance=ask_grades(RUBRIC, "rubric", scored["feature"], other, shown, 3, answers),
    )
    return table.assign(listed=None)


def _words_near(pieces: list[str], peak: int) -> frozenset[str]:
    start = max(0, peak - NEARBY)
    near = pieces[start : peak + NEARBY + 1]
    return frozenset(word_at(near, place) for place in range(len(near)))


def of_features(scores: pd.DataFrame, n_latents: int) -> np.ndarray:
    """Mean score over the upper half of a feature's activation, 0 to 3; NaN where there is none."""
    high = scores[scores["level"] >= 0.5]
    return high.groupby("feature")["score"].mean().reindex(range(n_latents)).to_numpy()


def by_level(scores: pd.DataFrame, seed: int, n_draws: int = 1_000) -> pd.DataFrame:
    """What `measure_specificity` found at each level of activation.

    Scores that a judge did not give are left out.

    Returns:
        A row a level: ``low`` and ``high``, its edges; ``n`` and ``n_features``; ``mean`` score,
        its 95% interval ``mean_low``, ``mean_high`` over features drawn again (bootstrap);
        ``chance``; and ``share_0`` to ``share_3``.
    """
    scores = scores.dropna(subset=["score", "chance"])
    level = np.minimum((scores["level"] * N_LEVELS).astype(int), N_LEVELS - 1)
    features, number = np.unique(scores["feature"], return_inverse=True)
    draws = draw_again(len(features), seed, n_draws)
    rows = []
    for part in range(N_LEVELS):
        own = scores[level == part]
        if own.empty:
            continue
        at = number[level == part]
        sums = np.bincount(at, own["score"], len(features))[draws].sum(axis=1)
        counts = np.bincount(at, minlength=len(features))[draws].sum(axis=1)
        low, high = interval(sums / np.maximum(1, counts))
        shares = {f"share_{value}": (own["score"] == value).mean() for value in range(4)}
        rows.append(
            {"low": part / N_LEVELS, "high": (part + 1) / N_LEVELS, "n": len(own)}
            | {"n_features": own["feature"].nunique()}
            | {"mean": own["score"].mean(), "mean_low": low, "mean_high": high}
            | {"chance": own["chance"].mean(), **shares}
        )
    return pd.DataFrame(rows)


def study(analysis: Analysis) -> Findings:
    """Scores of the examples of ``N_STUDIED`` features, their levels, and a score a feature."""
    settings = analysis.settings
    drawn = draw_examples(analysis.examples, analysis.pieces, settings.n_studied, settings.seed)
    scores = (
        measure_specificity(drawn, analysis.subset_shares, settings.seed)
        if analysis.judge is None
        else judge_specificity(drawn, analysis.judge, settings.seed)
    )
    levels = by_level(scores, settings.seed).to_dict("records")
    return Findings(
        levels,
        in_words(levels),
        {"specificity": scores},
        {"specificity": of_features(scores, len(analysis.features))},
    )


def in_words(levels: list[dict]) -> str:
    """What `by_level` found, as a sentence."""
    if not levels:
        return ""
    first, last = levels[0], levels[-1]
    return (
        f"Specificity, 0 to 3: {first['mean']:.2f} where features are weakest, {last['mean']:.2f} "
        f"where strongest; by another feature's concept {last['chance']:.2f}."
    )
