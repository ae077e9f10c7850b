"""Specificity: does a feature's concept fit the text where it is active, by how active it is?

The concept comes from half of a feature's highest examples. A judge, if one is named, describes
these in a phrase and scores. Else the concept is the words at their peaks, with the list of known
concepts and the kind of text that hold most of these. All other examples are then scored by the
paper's rubric:

    3  the peak is at one of the concept's words        clean match
    2  one of them stands nearby                        related to the nearby text
    1  the text is of the concept's kind                vaguely related
    0  none of these                                    irrelevant

The same examples scored by another feature's concept give the level of chance.

Reference: "Scaling Monosemanticity", Specificity, where Claude scores by this rubric.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from utils import plots
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.examples import draw_examples, unused_examples, used_for_label
from utils.features.judge import Answers, ask_grades, ask_labels
from utils.features.labels import Concept, find_concept, word_at
from utils.features.questions import RUBRIC, marked_tokens, show
from utils.features.sampling import another_of, draw_again, interval

NEARBY = 12  # tokens to each side of the peak
N_LEVELS = 5  # equal parts between 0 and a feature's maximum


def score(word: str, nearby: frozenset[str], subset: str, concept: Concept) -> int:
    """0 to 3, by the rubric above. Nearby, words of under four letters count for nothing."""
    if word in concept.words:
        return 3
    if any(len(other) > 3 and other in nearby for other in concept.words):
        return 2
    return int(subset == concept.subset)


def measure_specificity(
    examples: pd.DataFrame, subset_shares: dict[str, float], seed: int
) -> pd.DataFrame:
    """Scores of the examples of some features, by words.

    Args:
        examples: Of `draw_examples`.
        subset_shares: Share of each corpus subset in all text.

    Returns:
        A row an example of `unused_examples`: ``feature``, ``level`` (activation as a share of the
        feature's maximum), ``score``, ``chance`` (the score by another feature's concept), and
        ``listed``, the concept's list.
    """
    places = zip(map(list, examples["token_texts"]), examples["peak"].astype(int), strict=True)
    words = [word_at(*place) for place in places]
    examples = examples.assign(word=words, subset=examples["subset"].astype(str))
    concepts = {
        feature: find_concept(group, subset_shares)
        for feature, group in examples[used_for_label(examples)].groupby("feature")
    }
    other = another_of(list(concepts), seed)
    scored = unused_examples(examples)
    rows = [
        (
            score(row.word, nearby, row.subset, concepts[row.feature]),
            score(row.word, nearby, row.subset, concepts[other[row.feature]]),
            concepts[row.feature].listed,
        )
        for row in scored.itertuples()
        for nearby in [_words_near(list(row.token_texts), int(row.peak))]
    ]
    scores = pd.DataFrame(rows, columns=["score", "chance", "listed"])
    return _with_levels(scored, examples).join(scores)


def judge_specificity(examples: pd.DataFrame, answers: Answers, seed: int) -> pd.DataFrame:
    """As `measure_specificity`, by a judge; scores are NaN where its answer cannot be read."""
    labels = ask_labels(examples[used_for_label(examples)], answers)
    other = {feature: labels[i] for feature, i in another_of(list(labels), seed).items()}
    scored = unused_examples(examples)
    scored = scored[scored["feature"].isin(labels)]
    marks = map(marked_tokens, map(np.asarray, scored["activations"]))
    shown = list(map(show, scored["token_texts"], marks))
    return _with_levels(scored, examples).assign(
        score=ask_grades(RUBRIC, scored["feature"], labels, shown, answers),
        chance=ask_grades(RUBRIC, scored["feature"], other, shown, answers),
        listed=None,
    )


def _with_levels(scored: pd.DataFrame, examples: pd.DataFrame) -> pd.DataFrame:
    """The ``feature`` of scored examples, and their ``level``, from those of all examples."""
    maxima = examples.groupby("feature")["activation"].max()
    level = scored["activation"] / scored["feature"].map(maxima)
    return scored[["feature"]].assign(level=level).reset_index(drop=True)


def _words_near(token_texts: list[str], peak: int) -> frozenset[str]:
    start = max(0, peak - NEARBY)
    near = token_texts[start : peak + NEARBY + 1]
    return frozenset(word_at(near, place) for place in range(len(near)))


def feature_scores(scores: pd.DataFrame, n_latents: int) -> np.ndarray:
    """Mean score over the upper half of each feature's activation, 0 to 3; NaN if unscored."""
    high = scores[scores["level"] >= 0.5]
    return high.groupby("feature")["score"].mean().reindex(range(n_latents)).to_numpy()


def by_level(scores: pd.DataFrame, seed: int, n_draws: int = 1_000) -> pd.DataFrame:
    """Scores of `measure_specificity` at each level of activation, NaN ones left out.

    Returns:
        A row a level: its edges ``low`` and ``high``; ``n`` and ``n_features``; ``mean`` score with
        its 95% interval ``mean_low``, ``mean_high`` over features (bootstrap); ``chance``; and
        ``share_0`` to ``share_3``.
    """
    scores = scores.dropna(subset=["score", "chance"])
    level = np.minimum((scores["level"] * N_LEVELS).astype(int), N_LEVELS - 1)
    features, number = np.unique(scores["feature"], return_inverse=True)
    draws = draw_again(len(features), seed, n_draws)
    rows = []
    for i in range(N_LEVELS):
        group, group_number = scores[level == i], number[level == i]
        if group.empty:
            continue
        sums = np.bincount(group_number, group["score"], len(features))[draws].sum(axis=1)
        counts = np.bincount(group_number, minlength=len(features))[draws].sum(axis=1)
        low, high = interval(sums / np.maximum(1, counts))
        shares = {f"share_{value}": (group["score"] == value).mean() for value in range(4)}
        rows.append(
            {"low": i / N_LEVELS, "high": (i + 1) / N_LEVELS, "n": len(group)}
            | {"n_features": group["feature"].nunique()}
            | {"mean": group["score"].mean(), "mean_low": low, "mean_high": high}
            | {"chance": group["chance"].mean(), **shares}
        )
    return pd.DataFrame(rows)


def study(analysis: Analysis) -> Findings:
    """Scores of the examples of ``N_STUDIED`` features, their levels, and a score a feature."""
    n, seed = analysis.settings.n_studied, analysis.settings.seed
    examples = draw_examples(analysis.examples, analysis.token_texts, n, seed)
    if analysis.judge is None:
        scores = measure_specificity(examples, analysis.subset_shares, seed)
    else:
        scores = judge_specificity(examples, analysis.judge, seed)
    levels = by_level(scores, seed).to_dict("records")
    column = feature_scores(scores, len(analysis.features))
    return Findings(levels, in_words(levels), {"specificity": scores}, {"specificity": column})


def in_words(levels: list[dict]) -> str:
    """The rows of `by_level` as a sentence."""
    if not levels:
        return ""
    first, last = levels[0], levels[-1]
    return (
        f"Specificity, 0 to 3: {first['mean']:.2f} where features are weakest, {last['mean']:.2f} "
        f"where strongest; by another feature's concept {last['chance']:.2f}."
    )


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """Scores of examples against how active a feature is on them."""
    levels = pd.DataFrame(catalogue.summary["specificity"])
    path, first, last = catalogue.folder / "specificity.png", levels.iloc[0], levels.iloc[-1]
    title = f"Specificity: a mean score of {first['mean']:.2f} where features are weakest, "
    title += f"{last['mean']:.2f} where strongest"
    title += f" (n = {levels.n.sum():,} examples of {levels.n_features.max():,} features)"
    names = ("irrelevant", "vaguely related", "related text nearby", "clean match")
    middle, width = 100 * (levels.low + levels.high) / 2, 100 * (last.high - last.low)
    with plots.picture(path, title, (9, 3.9), ncols=2) as (_, (left, right)):
        under = np.zeros(len(levels))
        for value, colour in enumerate((plots.PALE, "#F6C7A4", "#EC8F4B", plots.ORANGE)):
            share = 100 * levels[f"share_{value}"]
            left.bar(middle, share, 0.92 * width, under, color=colour, label=names[value])
            under += share
        left.set(title="Scores at each level", ylabel="% of examples", ylim=(0, 100))
        handles, labels = (part[::-1] for part in left.get_legend_handles_labels())
        left.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
        errors = [levels["mean"] - levels.mean_low, levels.mean_high - levels["mean"]]
        style = {"color": plots.ORANGE, "label": "its own concept, 95% interval"}
        right.errorbar(middle, levels["mean"], errors, fmt="o-", capsize=3, **style)
        style = {"color": plots.GREY, "label": "another feature's concept"}
        right.plot(middle, levels.chance, "o--", **style)
        right.set(title="Mean score", ylabel="score, 0 to 3", ylim=(0, 3))
        right.legend(loc="upper left")
        for axes in (left, right):
            axes.set(xlabel="activation, % of the feature's maximum", xlim=(0, 100))
    return {"Is what a feature is about there where it is active?": path}
