"""Evidence: does clamping a feature bring its concept into the text, and at what cost in fluency?

Trial prompts show at which strength a feature's texts stop being fluent, and whether the feature
raises its concept at all; one that does not is passed over. The other features, and the methods
that they are compared with (see `texts`), are judged on other prompts. Intervals come from a
bootstrap over features.

Reference: "Scaling Monosemanticity", Influence on Behavior.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils import plots
from utils.features.sampling import mean_and_interval, p_positive
from utils.influence.generations import GenerationSettings
from utils.influence.texts import METHODS, SCORES, STRENGTHS, Texts, Writer
from utils.settings import Json, require
from utils.steering.clamps import Clamp, change_by

TRIAL_PROMPTS = ("I think that", "She opened the letter and", "The best way to")
PROMPTS = (
    "My favourite food is",
    "Once upon a time",
    "The meeting was about",
    "In the city there is",
    "He told me",
)
TRIAL_MARGIN = 2 / 3  # of the perplexity allowed, on trial: on other prompts it may be higher
GREEN = "#117733"
MORE_REPETITION = 0.25  # above the untouched text's: a text that repeats more has collapsed


def relative(table: pd.DataFrame) -> pd.DataFrame:
    """Mean scores over prompts, compared with the untouched texts after the same prompts.

    Returns:
        A row a feature, method and strength: mean ``concept``, ``words`` and ``repetition``; the
        ratio of the geometric means of ``perplexity``; ``untouched_concept``; and
        ``more_repetition``, the difference of the means.
    """
    table = table.assign(perplexity=np.log(table["perplexity"]))
    means = table.groupby(["feature", "method", "strength"])[list(SCORES)].mean().reset_index()
    untouched = means[means["method"] == "untouched"].set_index("feature")
    before = untouched.loc[means["feature"]].reset_index()
    return means.assign(
        perplexity=np.exp(means["perplexity"] - before["perplexity"]),
        more_repetition=means["repetition"] - before["repetition"],
        untouched_concept=before["concept"],
    )


def least_fluent(table: pd.DataFrame) -> pd.DataFrame:
    """As `relative`, with the largest score over prompts instead of the mean."""
    tables = [relative(group) for _, group in table.groupby("prompt")]
    return pd.concat(tables).groupby(["feature", "method", "strength"]).max().reset_index()


def useful_strength(worst: pd.DataFrame, max_perplexity: float) -> tuple[float, int]:
    """The largest strength up to which texts are fluent after every prompt.

    A text is fluent if its perplexity is at most `TRIAL_MARGIN` · ``max_perplexity`` times that of
    the untouched text, and its repetition at most `MORE_REPETITION` above it.

    Args:
        worst: `least_fluent` of one feature and method.

    Returns:
        The strength, the smallest tried if texts are not fluent even there; and how many strengths,
        from the smallest on, give fluent texts.
    """
    worst = worst.sort_values("strength")
    most = TRIAL_MARGIN * max_perplexity
    fluent = (worst["perplexity"] <= most) & (worst["more_repetition"] <= MORE_REPETITION)
    n_fluent = int(fluent.cummin().sum())
    return float(worst["strength"].iloc[max(0, n_fluent - 1)]), n_fluent


class StrengthSettings(GenerationSettings, Protocol):
    """The settings of influence_llm.py that a strength depends on."""

    max_perplexity: float


def find_strength(
    writer: Writer, features: list[int], settings: StrengthSettings
) -> tuple[float, int]:
    """The `useful_strength` of features changed together, tried on `TRIAL_PROMPTS`."""
    trials = list(itertools.product((0.0, *STRENGTHS), TRIAL_PROMPTS))
    strengths, prompts = zip(*trials, strict=True)
    how = settings.intervention
    rows = [
        [Clamp(i, strength, writer.maximum(i), how) for i in features] if strength else []
        for strength in strengths
    ]
    change = change_by(writer.model, rows, writer.model.language_model.device)
    records = writer.write(change, prompts, features[0], settings.where, settings.chat_template)
    table = pd.DataFrame(records).assign(feature=features[0], method="feature", prompt=prompts)
    table["strength"] = strengths
    table.loc[table["strength"] == 0, "method"] = "untouched"
    worst = least_fluent(table)
    return useful_strength(worst[worst["method"] == "feature"], settings.max_perplexity)


def describe_strength(strength: float, n_fluent: int, intervention: str) -> str:
    """The result of `find_strength` in words."""
    unit = "times the activation" if intervention == "scale" else "times the maximum"
    if n_fluent == 0:
        return f"Texts are not fluent even at the smallest strength tried, {strength:g} {unit}."
    note = ", the largest strength tried" if n_fluent == len(STRENGTHS) else ""
    return f"Texts stay fluent up to {strength:g} {unit}{note}."


def steers(texts: Texts, feature: int, max_perplexity: float) -> bool:
    """Whether a feature, clamped at its useful strength, raises its concept on trial prompts."""
    table = texts.table(feature, ("untouched", "feature"), TRIAL_PROMPTS)
    worst = least_fluent(table)
    strength, _ = useful_strength(worst[worst["method"] == "feature"], max_perplexity)
    scores = relative(table).set_index(["method", "strength"]).loc[("feature", strength)]
    return bool(scores["concept"] > scores["untouched_concept"])


def collect(
    texts: Texts, candidates: Sequence[int], n_features: int, max_perplexity: float
) -> tuple[pd.DataFrame, int]:
    """Texts by all methods of the first candidates that steer.

    Returns:
        A row a text, see `Texts.table`; and how many candidates were tried.

    Raises:
        InputError: None of them steers.
    """
    tables, n_tried = [], 0
    with tqdm(total=n_features, desc="steering", unit="feature") as bar:
        for feature in candidates:
            if len(tables) == n_features:
                break
            n_tried += 1
            if steers(texts, feature, max_perplexity):
                tables.append(texts.table(feature, METHODS, TRIAL_PROMPTS + PROMPTS))
                bar.update()
    require(
        len(tables) > 0,
        f"Evidence needs features that bring their concept into a text; none of {n_tried} proposed "
        "does. Try more with --n-tried, or longer texts with --max-new-tokens.",
    )
    return pd.concat(tables, ignore_index=True), n_tried


def at_useful_strength(table: pd.DataFrame, max_perplexity: float) -> pd.DataFrame:
    """The scores of each method at its useful strength, on the prompts that are not for trial.

    Returns:
        A row a feature and method, see `relative`. The methods that are compared with the feature
        have a second row, ``... at the feature's strength``.
    """
    is_trial = table["prompt"].isin(TRIAL_PROMPTS)
    trial, judged = least_fluent(table[is_trial]), relative(table[~is_trial])
    judged = judged.set_index(["feature", "method", "strength"], drop=False)
    rows = []
    for feature, worst in trial.groupby("feature"):
        strengths = {
            method: useful_strength(worst[worst["method"] == method], max_perplexity)[0]
            for method in METHODS
        }
        rows += [judged.loc[(feature, *pair)] for pair in strengths.items()]
        for method in METHODS[3:]:
            row = judged.loc[(feature, method, strengths["feature"])].copy()
            row["method"] = f"{method} at the feature's strength"
            rows.append(row)
    return pd.DataFrame(rows).reset_index(drop=True)


def mean_scores(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean scores over features of each method at each strength, on the prompts not for trial.

    Returns:
        A row a method and strength: ``n`` features; ``concept``, ``words`` and ``perplexity``, each
        with its 95% interval ``_low``, ``_high``. Perplexities are relative, their mean geometric.
    """
    rows = []
    scores = relative(table[~table["prompt"].isin(TRIAL_PROMPTS)])
    for (method, strength), group in scores.groupby(["method", "strength"]):
        row = {"method": method, "strength": strength, "n": len(group)}
        for name in ("concept", "words", "perplexity"):
            is_ratio = name == "perplexity"
            values = np.log(group[name]) if is_ratio else group[name]
            values = mean_and_interval(values.to_numpy(), seed)
            values = np.exp(values) if is_ratio else values
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def summarise(
    best: pd.DataFrame, n_tried: int, max_perplexity: float, seed: int
) -> dict[str, Json]:
    """Shares, means with 95% intervals and p-values, from `at_useful_strength`.

    A p-value is Wilcoxon's signed-rank test of the feature's concept against another method's.
    """
    methods = {method: group.set_index("feature") for method, group in best.groupby("method")}
    clamped = methods["feature"]
    raised = clamped["concept"] > clamped["untouched_concept"]
    fluent = clamped["perplexity"] < max_perplexity
    summary = {
        "n_tried": n_tried,
        "n_features": len(clamped),
        "share_raised": float(raised.mean()),
        "median_strength": float(clamped["strength"].median()),
        "perplexity": float(np.exp(np.log(clamped["perplexity"]).mean())),
        "share_fluent": float(fluent.mean()),
        "share_both": float((raised & fluent).mean()),
        "concept": {},
        "p_feature_greater": {},
    }
    for method, scores in methods.items():
        summary["concept"][method] = mean_and_interval(scores["concept"].to_numpy(), seed)
        if method != "feature":
            differences = clamped["concept"] - scores["concept"].loc[clamped.index]
            summary["p_feature_greater"][method] = p_positive(differences.to_numpy())
    return summary


def show_evidence(summary: dict[str, Json], max_perplexity: float) -> str:
    """The result of `summarise` in words."""
    concept, p = summary["concept"], summary["p_feature_greater"]
    n = f"{summary['n_features']} features, of {summary['n_tried']} proposed"
    median = f"median {summary['median_strength']:g} × the maximum"
    lines = [
        f"{n} the first that steer on trial prompts,",
        f"clamped at the strength found there ({median}), judged on other prompts:",
        f"  concept score above the untouched text's for {summary['share_raised']:.0%}",
        f"  perplexity {summary['perplexity']:.2f} × the untouched on average, below "
        f"{max_perplexity:g} × for {summary['share_fluent']:.0%}; "
        f"both for {summary['share_both']:.0%}",
        "",
        f"{'':44s}  concept score, % of the maximum",
    ]
    for method, values in concept.items():
        mean, low, high = (100 * value for value in values)
        line = f"  {method:42s}  {mean:5.1f}  ({low:.1f} to {high:.1f})"
        lines.append(line + (f"  p = {p[method]:.1e}" if method in p else ""))
    return "\n".join(lines)


def plot_evidence(scores: pd.DataFrame, max_perplexity: float, path: Path) -> None:
    """Draw `mean_scores`: concept and perplexity by method and strength, one against the other."""
    methods = {"feature": plots.ORANGE, "mean difference": plots.BLUE, "random": plots.GREY}
    flat = {"untouched": (plots.GREY, ":"), "reconstruction": (GREEN, "--")}
    n = scores["n"].max()
    title = "Clamping a feature brings its concept into the text, until fluency breaks"
    with plots.picture(path, f"{title} (n = {n} features)", (11, 3.9), ncols=3) as (figure, axes):
        concept, fluency, frontier = axes
        for method, colour in methods.items():
            rows = scores[scores["method"] == method].sort_values("strength")
            for panel, name, factor in ((concept, "concept", 100), (fluency, "perplexity", 1)):
                low, mean, high = (factor * rows[f"{name}{end}"] for end in ("_low", "", "_high"))
                panel.plot(rows["strength"], mean, "o-", ms=4, color=colour, label=method)
                panel.fill_between(rows["strength"], low, high, color=colour, alpha=0.15, lw=0)
            frontier.plot(rows["perplexity"], 100 * rows["concept"], "o-", ms=4, color=colour)
        for method, (colour, style) in flat.items():
            (row,) = scores[scores["method"] == method].itertuples()
            concept.axhline(100 * row.concept, color=colour, linestyle=style, label=method)
            fluency.axhline(row.perplexity, color=colour, linestyle=style)
            frontier.plot(row.perplexity, 100 * row.concept, "s", ms=5, color=colour)
        fluency.axhline(max_perplexity, color=plots.INK, linewidth=0.8)
        frontier.axvline(max_perplexity, color=plots.INK, linewidth=0.8)
        fluency.set(yscale="log", title=f"Perplexity of the text; line: {max_perplexity:g} ×")
        fluency.set(ylabel="times that of the untouched text")
        concept.set(title="Concept in the text", ylabel="activation, % of maximum")
        frontier.set(xscale="log", title="One against the other", ylabel=concept.get_ylabel())
        frontier.set(xlabel="perplexity, times that of the untouched text")
        for panel in (concept, fluency):
            panel.set(xlabel="strength, multiples of the maximum")
        for axis in (fluency.yaxis, frontier.xaxis):
            plots.log_ticks(axis, (1, 2, 5))
        style = {"title": "method; bands: 95% over features", "loc": "outside lower center"}
        figure.legend(*concept.get_legend_handles_labels(), ncols=5, **style)
