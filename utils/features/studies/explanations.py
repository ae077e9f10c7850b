"""Explanations: what a feature is about in a phrase, and how well the phrase tells its examples.

The phrase comes from half of a feature's highest examples: from a judge, or, if none is named, from
the words at their peaks, the list or the kind of text that hold these, and words commoner around
them than elsewhere. The judge or these words then score it on all other examples:

    detection   is the feature active in this text? In half of the texts it is not.
    fuzzing     is it active on the marked tokens? In half of the texts other tokens are marked.

A score is the share of pairs of a yes and a no that the answers order right (AUC; for answers of
yes or no alone, their balanced accuracy): 0.5 by chance, 1 at best. ``explanation_score`` is the
mean of the two. The phrase of another feature, a random label, gives the level of chance.

Reference: "Automatically Interpreting Millions of Features" (Paulo et al. 2024), and its delphi.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from utils import plots
from utils.activations.store import ActivationStore, ContextBatch, Contexts
from utils.characters import whole_characters
from utils.features import questions
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue, example_table
from utils.features.examples import (
    WINDOW,
    draw_examples,
    unused_examples,
    used_for_label,
    window_start,
)
from utils.features.feature_pass import Encoder, FeaturePass
from utils.features.judge import Answers, ask_grades, ask_labels
from utils.features.labels import Explanation, explain, word_at
from utils.features.neurons import (
    NeuronStore,
    NoNeurons,
    TopNeurons,
    draw_neurons,
    neuron_values,
)
from utils.features.sampling import mean_and_interval, p_positive
from utils.settings import Json

N_SILENT = 200  # texts that non-activating examples are drawn from
LEAST = 5  # examples to take a phrase from, and to score it on
N_COMPARED = 100  # features, and as many neurons
COMPARED = ("features, same tokens", "neurons")  # groups of the comparison
SCORED = ("feature", "explanation", "detection", "fuzzing", "score", "random")
USUAL_LABEL = "the names of countries, rivers and cities in news and travel writing"
KINDS = {question.name: question for question in (questions.DETECTION, questions.FUZZING)}


# ------------------------------------------------------------------------------------------- trials


class RandomTexts(NamedTuple):
    """Texts drawn at random, and which features are active in each."""

    table: pd.DataFrame  # token_texts, subset; a row a text
    active: np.ndarray  # (texts, n_latents), bool


def draw_texts(
    encoder: Encoder, store: ActivationStore, contexts: Contexts, token_texts: list[str], seed: int
) -> RandomTexts:
    """Texts of `WINDOW` tokens; each feature has some among them that it is not active in."""
    random = np.random.default_rng(seed)
    drawn = np.asarray(contexts)[np.sort(random.permutation(len(contexts))[:N_SILENT])]
    batches = (ContextBatch(store, [context]) for context in drawn)
    batches = [batch for batch in batches if batch.kept.any()]
    active = np.zeros((len(batches), encoder.n_latents), bool)
    rows = []
    for text, batch in enumerate(batches):
        row, feature, *_ = encoder.active(batch.rows)
        middle = random.choice(np.flatnonzero(batch.kept))
        start = int(window_start(middle, store.context_length))
        position = batch.places(row)[1]
        active[text, feature[(position >= start) & (position < start + WINDOW)]] = True
        tokens = batch.tokens[0, start : start + WINDOW]
        subset = store.subset_names[batch.subsets[0, middle]]
        rows.append((whole_characters([token_texts[token] for token in tokens]), subset))
    return RandomTexts(pd.DataFrame(rows, columns=["token_texts", "subset"]), active)


def make_trials(unused: pd.DataFrame, random_texts: RandomTexts, seed: int) -> pd.DataFrame:
    """The trials of each feature that has enough examples, in random order.

    Returns:
        A row a trial: ``feature``, ``kind`` (detection, fuzzing), ``truth``, and the text:
        ``token_texts``, ``marked`` (bool, of their length), ``subset``.
    """
    random = np.random.default_rng(seed)
    rows = []
    for feature, examples in unused.groupby("feature"):
        silent = np.flatnonzero(~random_texts.active[:, feature])
        silent = random.permutation(silent)[: len(examples)]
        if len(examples) < LEAST or len(silent) < LEAST:
            continue
        marks = [questions.marked_tokens(np.asarray(values)) for values in examples["activations"]]
        n_marked = int(np.ceil(np.mean([mark.sum() for mark in marks])))
        for row, mark in zip(examples.itertuples(), marks, strict=True):
            none, wrong = np.zeros_like(mark), np.zeros_like(mark)
            rows.append((feature, "detection", True, row.token_texts, none, row.subset))
            is_shown = np.array(row.token_texts, object) != ""
            inactive = np.flatnonzero((np.asarray(row.activations) == 0) & is_shown)
            if len(inactive):
                wrong[random.permutation(inactive)[:n_marked]] = True
                rows.append((feature, "fuzzing", True, row.token_texts, mark, row.subset))
                rows.append((feature, "fuzzing", False, row.token_texts, wrong, row.subset))
        for text in random_texts.table.iloc[silent].itertuples():
            none = np.zeros(len(text.token_texts), bool)
            rows.append((feature, "detection", False, text.token_texts, none, text.subset))
    names = ["feature", "kind", "truth", "token_texts", "marked", "subset"]
    trials = pd.DataFrame(rows, columns=names)
    return trials.iloc[random.permutation(len(trials))].reset_index(drop=True)


# ----------------------------------------------------------------------------------------- grading


def grade_by_words(trials: pd.DataFrame, explanations: dict[int, Explanation]) -> list[float]:
    """How well each trial fits the words of an explanation.

    Detection: 1 for a word of the concept in the text, 1 for one of those around, ½ for its kind.
    Fuzzing: the share of the marked tokens whose word is one of the concept's.
    """
    grades = []
    for row in trials.itertuples():
        concept, around, _ = explanations[row.feature]
        if row.kind == "fuzzing":
            places = np.flatnonzero(row.marked)
            grades.append(np.mean([word in concept.words for word in row.words[places]]))
        else:
            words = set(row.words)
            fits = bool(words & concept.words) + bool(words & around)
            grades.append(fits + 0.5 * (row.subset == concept.subset))
    return grades


def grade_by_judge(
    trials: pd.DataFrame, shown: list[str], labels: dict[int, str], answers: Answers
) -> np.ndarray:
    """A judge's yes or no to each trial, 1 or 0; NaN where its answer cannot be read."""
    grades = np.full(len(trials), np.nan)
    for kind, question in KINDS.items():
        rows = np.flatnonzero((trials["kind"] == kind) & trials["feature"].isin(labels))
        texts, features = [shown[i] for i in rows], trials["feature"].iloc[rows]
        grades[rows] = ask_grades(question, features, labels, texts, answers)
    return grades


def auc(trials: pd.DataFrame, grades: Sequence[float] | np.ndarray) -> pd.DataFrame:
    """A row a feature: ``detection``, ``fuzzing`` and their mean, ``score``; NaN where ungraded."""
    graded = trials[["feature", "kind", "truth"]].assign(grade=grades).dropna()
    scores = pd.DataFrame(index=pd.Index(sorted(set(trials["feature"])), name="feature"))
    for kind in KINDS:
        by_feature = graded[graded["kind"] == kind].groupby("feature")
        values = {
            feature: roc_auc_score(group["truth"], group["grade"])
            for feature, group in by_feature
            if group["truth"].nunique() == 2
        }
        scores[kind] = pd.Series(values, dtype=float)
    scores["score"] = scores[[*KINDS]].mean(axis=1, skipna=False)
    return scores


# ------------------------------------------------------------------------------------------- study


def score_group(
    analysis: Analysis, examples: pd.DataFrame, random_texts: RandomTexts, n: int
) -> pd.DataFrame:
    """Explain and score the first ``n`` features of some examples that have enough of them.

    Args:
        examples: Of `draw_examples`; "features" may be neurons.

    Returns:
        A row a feature, columns `SCORED`; ``random`` is the score of another's explanation.
    """
    seed = analysis.settings.seed
    trials = make_trials(unused_examples(examples), random_texts, seed)
    if trials.empty:
        return pd.DataFrame(columns=SCORED)
    order = np.random.default_rng(seed).permutation(np.unique(trials["feature"]))[:n]
    trials = trials[trials["feature"].isin(order)].reset_index(drop=True)
    examples = examples[examples["feature"].isin(order)]
    explanations = explain(examples, analysis.token_texts, analysis.subset_shares)
    phrases = {feature: explanation.text for feature, explanation in explanations.items()}
    other = dict(zip(order, np.roll(order, 1), strict=True))
    if analysis.judge is None:
        trials["words"] = [
            np.array([word_at(texts, i) for i in range(len(texts))])
            for texts in trials["token_texts"]
        ]
        grades = grade_by_words(trials, explanations)
        random = grade_by_words(trials, {f: explanations[other[f]] for f in order})
    else:
        shown = list(map(questions.show, trials["token_texts"], trials["marked"]))
        print_estimate(analysis.judge, trials, shown)
        labels = ask_labels(examples[used_for_label(examples)], analysis.judge)
        phrases |= labels
        grades = grade_by_judge(trials, shown, labels, analysis.judge)
        swapped = {f: labels[other[f]] for f in order if other[f] in labels}
        random = grade_by_judge(trials, shown, swapped, analysis.judge)
    table = auc(trials, grades)
    table.insert(0, "explanation", pd.Series(phrases))
    table["random"] = auc(trials, random)["score"]
    return table.reset_index()


def print_estimate(answers: Answers, trials: pd.DataFrame, shown: list[str]) -> None:
    """Print before the first question what all of them will cost, with labels of usual length."""
    prompts = []
    for (_, kind), group in trials.groupby(["feature", "kind"]):
        texts = [shown[i] for i in group.index]
        prompts += questions.grade_questions(KINDS[kind], USUAL_LABEL, texts)
    once = answers.estimate(prompts, questions.GRADES_TOKENS)
    n_features = trials["feature"].nunique()
    print(
        f"To explain {n_features:,} features: {n_features:,} labels, and twice, for own and random "
        f"labels, {once}."
    )


def study(analysis: Analysis) -> Findings:
    """Explanations of all features; scores of ``N_EXPLAINED``; features against neurons.

    Nothing if no feature is ever active.
    """
    if not analysis.examples.num_rows:
        return Findings({})
    settings, store, texts = analysis.settings, analysis.store, analysis.token_texts
    explanations = explain(analysis.examples.to_pandas(), texts, analysis.subset_shares)
    phrases = {feature: explanation.text for feature, explanation in explanations.items()}
    random_texts = draw_texts(analysis.encoder, store, analysis.contexts, texts, settings.seed)
    drawn = draw_examples(analysis.examples, texts, 2 * settings.n_explained, settings.seed)
    scored = score_group(analysis, drawn, random_texts, settings.n_explained)
    compared, left_out = scored.iloc[:0].assign(group=""), []
    try:
        compared = compare_with_neurons(analysis)
    except NoNeurons as missing:
        left_out.append(str(missing))
    phrases |= dict(zip(scored["feature"], scored["explanation"], strict=True))
    features = range(len(analysis.features))
    scores = scored.set_index("feature")["score"].reindex(features)
    columns = {
        "explanation": np.array([phrases.get(feature, "") for feature in features], object),
        "explanation_score": scores.to_numpy(float),
    }
    summary = summarise(scored, compared, settings.seed)
    table = pd.concat([scored.assign(group="features"), compared])
    words = "\n".join(filter(None, [in_words(summary), *left_out]))
    return Findings(summary, words, {"explanations": table}, columns)


def in_words(summary: dict[str, Json]) -> str:
    """The summary of `study`, a sentence a line."""
    lines = []
    if "score" in summary:
        score, random = summary["score"][0], summary["random"][0]
        lines.append(
            f"Explanations, 1 at best, 0.5 by chance: {score:.2f} for {summary['n_features']:,} "
            f"features; with another feature's {random:.2f}."
        )
    if "p_neurons" in summary:
        features, neurons = (summary["groups"][name][0] for name in COMPARED)
        words = f"{features:.2f} for features, {neurons:.2f} for neurons."
        lines.append(f"Over the same tokens: {words}")
    return "\n".join(lines)


def compare_with_neurons(analysis: Analysis) -> pd.DataFrame:
    """The same procedure on features and on neurons of the block, from the same tokens.

    On each token the largest neurons count as active, as many as there are active features (L0),
    as in delphi: an MLP's neurons are all a little active everywhere.
    """
    settings, store, texts = analysis.settings, analysis.store, analysis.token_texts
    n = min(N_COMPARED, settings.n_explained)
    contexts = store.sample(settings.n_neuron_tokens)
    neurons = draw_neurons(analysis.language_model, store.layer, 2 * n, settings.seed)
    k = max(1, round(analysis.summary["l0"]))
    values = neuron_values(analysis.language_model, store, contexts, neurons, k)
    groups = (
        (analysis.encoder, store),
        (TopNeurons(len(neurons)), NeuronStore(store, values, contexts)),
    )
    tables = []
    for name, (encoder, rows) in zip(COMPARED, groups, strict=True):
        feature_pass = FeaturePass(encoder, rows, settings.seed)
        feature_pass.run(contexts, settings.batch_size)
        examples = example_table(feature_pass.examples(), store)
        drawn = draw_examples(examples, texts, 2 * n, settings.seed)
        random_texts = draw_texts(encoder, rows, contexts, texts, settings.seed)
        scored = score_group(analysis, drawn, random_texts, n)
        if name == "neurons":
            scored["feature"] = neurons[scored["feature"].to_numpy(int)]
        tables.append(scored.assign(group=name))
    return pd.concat(tables)


def summarise(scored: pd.DataFrame, compared: pd.DataFrame, seed: int) -> dict[str, Json]:
    """Means with 95% intervals, and p-values of the differences; {} if no feature was scored."""
    both = scored.dropna(subset=["score", "random"])
    if both.empty:
        return {}
    compared = compared.dropna(subset=["score"])
    groups = {name: group["score"] for name, group in compared.groupby("group")}
    columns = ("score", "detection", "fuzzing", "random")
    summary = {name: mean_and_interval(scored[name].dropna().to_numpy(), seed) for name in columns}
    summary["n_features"] = len(both)
    summary["groups"] = {
        name: mean_and_interval(values.to_numpy(), seed) for name, values in groups.items()
    }
    summary["p_random"] = p_positive(both["score"] - both["random"])
    summary["n_groups"] = {name: len(values) for name, values in groups.items()}
    if len(groups) == 2:
        test = stats.mannwhitneyu(*(groups[name] for name in COMPARED), alternative="greater")
        summary["p_neurons"] = float(test.pvalue)
    return summary


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """Scores of features by their own and another's explanation, and of features and neurons.

    No picture if no feature was scored.
    """
    summary, path = catalogue.summary["explanations"], catalogue.folder / "explanations.png"
    if "score" not in summary:
        return {}
    table = catalogue.table("explanations").dropna(subset=["score", "random"])
    features = table[table.group == "features"]
    same, neurons = (table.score[table.group == name] for name in COMPARED)
    title = f"A feature's explanation tells its examples at {features.score.mean():.2f}, another's "
    title += f"at {features.random.mean():.2f}; 0.5 is chance (n = {len(features):,} features)"
    by_label = {"own": features.score, "another's": features.random}
    panels = [("Against random labels", "p_random", by_label)]
    if len(neurons):
        groups = {"features": same, "neurons": neurons}
        panels.append(("Against neurons", "p_neurons", groups))
    grid = {"ncols": len(panels), "squeeze": False}
    with plots.picture(path, title, (9, 3.9), **grid) as (_, (axes,)):
        for panel, (name, p, groups) in zip(axes, panels, strict=True):
            labelled = {
                f"{label}: {scores.mean():.2f}, n = {len(scores)}": scores
                for label, scores in groups.items()
            }
            plots.compare(panel, labelled, np.linspace(0, 1, 26))
            panel.axvline(0.5, color=plots.INK, linestyle=":", linewidth=1)
            panel.set(title=name + (f" (p = {summary[p]:.1g})" if p in summary else ""))
            panel.set(xlabel="explanation score (mean of detection and fuzzing)", xlim=(0.2, 1))
            panel.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.2), ncols=2, columnspacing=1)
        axes[0].set(ylabel="% of each group")
    return {"Does a phrase tell what a feature fires on?": path}
