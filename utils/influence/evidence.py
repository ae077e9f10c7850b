"""Evidence: does clamping a feature bring its concept into the text, and at what price?

The useful range of a strength ends where fluency breaks, which is found on some prompts, the trial.
A feature that does not raise its concept there merely reads, and is passed over; what the others
do, and what other methods do in their place (`texts` says which), is judged on other prompts.
Intervals come from drawing features again (bootstrap).

Reference: "Scaling Monosemanticity", Influence on Behavior.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib import ticker
from scipy import stats
from tqdm import tqdm

from utils import plots
from utils.features.sampling import mean_and_interval
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
TRIAL_MARGIN = 2 / 3  # of the perplexity allowed; other prompts come out higher, or lower
GREEN = "#117733"
MORE_REPETITION = 0.25  # than untouched, at which a text has collapsed


def relative(table: pd.DataFrame) -> pd.DataFrame:
    """Mean scores over prompts beside those of the untouched texts after the same prompts.

    Returns:
        A row a feature, method and strength: mean ``concept``, ``words`` and ``repetition``;
        ``perplexity``, its geometric mean over that of the untouched texts; ``untouched_concept``
        and ``more_repetition``, than theirs.
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
    """As `relative`, but each score the largest of any prompt."""
    each = [relative(own) for _, own in table.groupby("prompt")]
    return pd.concat(each).groupby(["feature", "method", "strength"]).max().reset_index()


def useful_strength(worst: pd.DataFrame, max_perplexity: float) -> tuple[float, int]:
    """Where the useful range of a feature and method ends: the last strength before fluency breaks.

    It breaks where after any prompt the perplexity is above `TRIAL_MARGIN` of ``max_perplexity``
    times the untouched, or the text is more repetitive by `MORE_REPETITION`.

    Args:
        worst: Of `least_fluent`, of one feature and method.

    Returns:
        The strength, the least if fluency is broken already there; and at how many strengths, from
        the least on, it is not.
    """
    worst = worst.sort_values("strength")
    most = TRIAL_MARGIN * max_perplexity
    fluent = (worst["perplexity"] <= most) & (worst["more_repetition"] <= MORE_REPETITION)
    n_fluent = int(fluent.cummin().sum())
    return float(worst["strength"].iloc[max(0, n_fluent - 1)]), n_fluent


class StrengthSettings(Protocol):
    """How features are changed, of the settings of influence_llm.py."""

    intervention: str
    where: str | tuple[int, ...]
    chat_template: bool
    max_perplexity: float


def find_strength(
    writer: Writer, features: list[int], settings: StrengthSettings
) -> tuple[float, int]:
    """The `useful_strength` of features changed together, tried on `TRIAL_PROMPTS`."""
    places = list(itertools.product((0.0, *STRENGTHS), TRIAL_PROMPTS))
    how = settings.intervention
    rows = [
        [Clamp(i, strength, writer.maximum(i), how) for i in features] if strength else []
        for strength, _ in places
    ]
    change = change_by(writer.model, rows, writer.model.language_model.device)
    prompts = [prompt for _, prompt in places]
    records = writer.write(change, prompts, features[0], settings.where, settings.chat_template)
    table = pd.DataFrame(records).assign(feature=features[0], method="feature", prompt=prompts)
    table["strength"] = [strength for strength, _ in places]
    table.loc[table["strength"] == 0, "method"] = "untouched"
    worst = least_fluent(table)
    return useful_strength(worst[worst["method"] == "feature"], settings.max_perplexity)


def describe_strength(strength: float, n_fluent: int, intervention: str) -> str:
    """What `find_strength` found, as a sentence."""
    unit = "times what is there" if intervention == "scale" else "times the maximum"
    if n_fluent == 0:
        return f"Texts fall apart already at {strength:g} {unit}, the least tried; this is there."
    rest = ", the most tried" if n_fluent == len(STRENGTHS) else ""
    return f"Texts stay fluent up to {strength:g} {unit}{rest}."


def steers(texts: Texts, feature: int, max_perplexity: float) -> bool:
    """Whether a clamp at the strength found for it raises a feature's concept on trial."""
    table = texts.of(feature, ("untouched", "feature"), TRIAL_PROMPTS)
    worst = least_fluent(table)
    strength, _ = useful_strength(worst[worst["method"] == "feature"], max_perplexity)
    found = relative(table).set_index(["method", "strength"]).loc[("feature", strength)]
    return bool(found["concept"] > found["untouched_concept"])


def collect(
    texts: Texts, candidates: Sequence[int], n_features: int, max_perplexity: float
) -> tuple[pd.DataFrame, int]:
    """Texts by all methods of the first candidates that steer.

    Returns:
        A row a text, as of `Texts.of`, and how many candidates were tried.

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
                tables.append(texts.of(feature, METHODS, TRIAL_PROMPTS + PROMPTS))
                bar.update()
    require(
        len(tables) > 0,
        f"Evidence needs features that bring what they are about into a text; none of {n_tried} "
        "proposed does. Let it try more with --n-tried, or write more with --max-new-tokens.",
    )
    return pd.concat(tables, ignore_index=True), n_tried


def at_useful_strength(table: pd.DataFrame, max_perplexity: float) -> pd.DataFrame:
    """What each feature does at the strength found for it, judged on the prompts not used for that.

    Returns:
        A row a feature and method, as of `relative`; of ``random at the feature's strength`` and
        ``mean difference at the feature's strength`` too.
    """
    is_trial = table["prompt"].isin(TRIAL_PROMPTS)
    trial, judged = least_fluent(table[is_trial]), relative(table[~is_trial])
    judged = judged.set_index(["feature", "method", "strength"], drop=False)
    rows = []
    for feature, worst in trial.groupby("feature"):
        found = {
            method: useful_strength(worst[worst["method"] == method], max_perplexity)[0]
            for method in METHODS
        }
        rows += [judged.loc[(feature, *place)] for place in found.items()]
        for method in METHODS[3:]:
            same = judged.loc[(feature, method, found["feature"])].copy()
            same["method"] = f"{method} at the feature's strength"
            rows.append(same)
    return pd.DataFrame(rows).reset_index(drop=True)


def curves(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean scores over features at each strength of each method, on the prompts judged.

    Returns:
        A row a method and strength: ``n`` features; ``concept``, ``words`` and ``perplexity``, each
        with its 95% interval ``_low``, ``_high``. Perplexities are relative, their mean geometric.
    """
    rows = []
    means = relative(table[~table["prompt"].isin(TRIAL_PROMPTS)])
    for (method, strength), own in means.groupby(["method", "strength"]):
        row = {"method": method, "strength": strength, "n": len(own)}
        for name in ("concept", "words", "perplexity"):
            is_ratio = name == "perplexity"
            values = np.log(own[name]) if is_ratio else own[name]
            values = mean_and_interval(values.to_numpy(), seed)
            values = np.exp(values) if is_ratio else values
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def summarise(
    best: pd.DataFrame, n_tried: int, max_perplexity: float, seed: int
) -> dict[str, Json]:
    """What the evidence says, from `at_useful_strength`: shares, means with intervals, tests.

    The tests are Wilcoxon's, of the feature's concept against another method's, paired by feature.
    """
    of = {method: own.set_index("feature") for method, own in best.groupby("method")}
    own = of["feature"]
    raised, fluent = own["concept"] > own["untouched_concept"], own["perplexity"] < max_perplexity
    found = {
        "n_tried": n_tried,
        "n_features": len(own),
        "share_raised": float(raised.mean()),
        "median_strength": float(own["strength"].median()),
        "perplexity": float(np.exp(np.log(own["perplexity"]).mean())),
        "share_fluent": float(fluent.mean()),
        "share_both": float((raised & fluent).mean()),
        "concept": {},
        "p_feature_greater": {},
    }
    for method, other in of.items():
        found["concept"][method] = mean_and_interval(other["concept"].to_numpy(), seed)
        if method != "feature":
            differences = (own["concept"] - other["concept"].loc[own.index]).to_numpy()
            test = stats.wilcoxon(differences, alternative="greater") if differences.any() else None
            found["p_feature_greater"][method] = float(test.pvalue) if test else 1.0
    return found


def show_evidence(summary: dict[str, Json], max_perplexity: float) -> str:
    """The result of `summarise` in a few lines."""
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


def plot_evidence(curves: pd.DataFrame, max_perplexity: float, path: Path) -> None:
    """How much of a concept a text has, and how fluent it is, by method and strength.

    Args:
        curves: Of `curves`.
        max_perplexity: Times the untouched, marked as the end of fluency.
    """
    methods = {"feature": plots.ORANGE, "mean difference": plots.BLUE, "random": plots.GREY}
    flat = {"untouched": (plots.GREY, ":"), "reconstruction": (GREEN, "--")}
    n = curves["n"].max()
    title = "Clamping a feature brings its concept into the text, until fluency breaks"
    with plots.picture(path, f"{title} (n = {n} features)", (11, 3.9), ncols=3) as (figure, axes):
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
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        legend = "method; bands: 95% over features"
        figure.legend(
            *concept.get_legend_handles_labels(), title=legend, ncols=5, loc="outside lower center"
        )
