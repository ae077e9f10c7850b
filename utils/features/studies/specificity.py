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
from utils.features.sampling import draw_again, interval

NEARBY = 12  # tokens to each side of the peak
N_LEVELS = 5  # equal parts between 0 and a feature's maximum
CAPTION = "Is what a feature is about there where it is active?"


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
    """Scores of the examples of some features.

    Args:
        examples: Of `draw_examples`: the highest are bucket 0, by rank.
        subset_shares: Share of each corpus subset in all text.
        seed: Of which feature's concept each one's examples are scored by for comparison.

    Returns:
        A row an example of `unused_examples`: ``feature``, ``level`` (activation as a
        share of the feature's maximum), ``score``, ``chance``, and ``listed``, the concept's list.
    """
    examples = examples.reset_index(drop=True)
    places = [
        (list(token_texts), int(peak))
        for token_texts, peak in zip(examples["token_texts"], examples["peak"], strict=True)
    ]
    examples["word"] = [word_at(*place) for place in places]
    examples["nearby"] = [_words_near(*place) for place in places]
    examples["subset"] = examples["subset"].astype(str)
    concepts = {
        feature: find_concept(group, subset_shares)
        for feature, group in examples[used_for_label(examples)].groupby("feature")
    }
    shuffled = np.random.default_rng(seed).permutation(list(concepts))
    other = dict(zip(shuffled, np.roll(shuffled, 1), strict=True))
    scored = unused_examples(examples)
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
    labels = ask_labels(examples[used_for_label(examples)], answers)
    shuffled = np.random.default_rng(seed).permutation(list(labels))
    other = {f: labels[of] for f, of in zip(shuffled, np.roll(shuffled, 1), strict=True)}
    scored = unused_examples(examples)
    scored = scored[scored["feature"].isin(labels)].reset_index(drop=True)
    marks = map(marked_tokens, map(np.asarray, scored["activations"]))
    shown = list(map(show, scored["token_texts"], marks))
    maxima = examples.groupby("feature")["activation"].max()
    table = scored[["feature"]].assign(
        level=scored["activation"] / scored["feature"].map(maxima),
        score=ask_grades(RUBRIC, scored["feature"], labels, shown, answers),
        chance=ask_grades(RUBRIC, scored["feature"], other, shown, answers),
    )
    return table.assign(listed=None)


def _words_near(token_texts: list[str], peak: int) -> frozenset[str]:
    start = max(0, peak - NEARBY)
    near = token_texts[start : peak + NEARBY + 1]
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
    drawn = draw_examples(
        analysis.examples, analysis.token_texts, settings.n_studied, settings.seed
    )
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


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The picture of a finished study, by its caption."""
    levels = pd.DataFrame(catalogue.summary["specificity"])
    plot_specificity(levels, catalogue.folder / "specificity.png")
    return {CAPTION: catalogue.folder / "specificity.png"}


def plot_specificity(levels: pd.DataFrame, path: Path) -> None:
    """Scores of examples against how active a feature is on them.

    Args:
        levels: Of `by_level`.
    """
    first, last = levels.iloc[0], levels.iloc[-1]
    title = f"Specificity: a mean score of {first['mean']:.2f} where features are weakest, "
    title += f"{last['mean']:.2f} where strongest"
    title += f" (n = {levels.n.sum():,} examples of {levels.n_features.max():,} features)"
    names = ("irrelevant", "vaguely related", "related text nearby", "clean match")
    middle, width = 100 * (levels.low + levels.high) / 2, 100 * (last.high - last.low)
    with plots.picture(path, title, (9, 3.9), ncols=2) as (_, (left, right)):
        under = np.zeros(len(levels))
        for score, colour in enumerate((plots.PALE, "#F6C7A4", "#EC8F4B", plots.ORANGE)):
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
            color=plots.ORANGE,
            capsize=3,
            label="its own concept, 95% interval",
        )
        right.plot(
            middle, levels.chance, "o--", color=plots.GREY, label="another feature's concept"
        )
        right.set(title="Mean score", ylabel="score, 0 to 3", ylim=(0, 3))
        right.legend(loc="upper left")
        for axes in (left, right):
            axes.set(xlabel="activation, % of the feature's maximum", xlim=(0, 100))
