"""Explanations: what a feature is about in a phrase, and how well the phrase tells its examples.

From half of a feature's highest examples comes the phrase: a judge's, or, where none is named, made
of the words at their peaks, the list or the kind of text that these belong to, and words commoner
around them than elsewhere. It is scored on all other examples, by the judge or by these words:

    detection   is the feature active in this text? half of the texts are others
    fuzzing     are the marked tokens the ones it is active on? in half, others of the text are

A score is the share of pairs, of a yes and a no, that the answers order right (AUC; of answers of
yes or no alone, their balanced accuracy): 0.5 by chance, 1 at best. ``explanation_score`` is the
mean of the two. The phrase of another feature, a random label, tells what chance gives.

Reference: "Automatically Interpreting Millions of Features" (Paulo et al. 2024), and its delphi.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from utils.features.analysis import Analysis, Findings
from utils.features.bootstrap import mean_and_interval
from utils.features.feature_pass import WINDOW, FeaturePass, window_start
from utils.features.judge import Answers, ask_grades, ask_labels
from utils.features.likeness import compare_contexts, open_embedder
from utils.features.phrases import Explanation, explain
from utils.features.questions import (
    DETECTION,
    FUZZING,
    GRADES_TOKENS,
    grade_questions,
    marked_tokens,
    show,
)
from utils.features.studies.neurons import NeuronStore, TopNeurons, draw_neurons, neuron_values
from utils.features.studies.specificity import chosen_from, draw_examples, held_out, word_at
from utils.features.tables import example_table

N_QUIET = 200  # texts that non-activating examples are drawn from
LEAST = 5  # examples to take a phrase from, and to score it on
N_COMPARED = 100  # features, and as many neurons
SCORED = (
    "feature", "explanation", "detection", "fuzzing", "score", "random", "likeness",
    "random_likeness",
)  # fmt: skip
USUAL_LABEL = "the names of countries, rivers and cities in news and travel writing"
QUESTIONS = {"detection": DETECTION, "fuzzing": FUZZING}


# ------------------------------------------------------------------------------------------- trials


class Quiet(NamedTuple):
    """Texts drawn at random: a row a text, and which features are active in it."""

    table: pd.DataFrame  # pieces, peak (a place drawn at random), subset
    active: np.ndarray  # (texts, n_latents), bool


def draw_quiet(
    autoencoder: Any, store: Any, contexts: range, pieces: list[str], seed: int
) -> Quiet:
    """Texts of `WINDOW` tokens, among which each feature finds some that it is not active in."""
    random = np.random.default_rng(seed)
    drawn = contexts.start + np.sort(random.permutation(len(contexts))[:N_QUIET])
    drawn = [context for context in drawn if store["kept"][context].any()]
    active = np.zeros((len(drawn), autoencoder.n_latents), bool)
    rows = []
    for text, context in enumerate(drawn):
        at = np.flatnonzero(store["kept"][context])
        row, feature, *_ = autoencoder.encode_active(store.kept_rows([context]).astype(np.float32))
        position = random.choice(at)
        start = int(window_start(position, store.context_length))
        inside = (at[row] >= start) & (at[row] < start + WINDOW)
        active[text, feature[inside]] = True
        tokens = store["tokens"][context][start : start + WINDOW]
        subset = store.subset_names(context)[position]
        rows.append(([pieces[token] for token in tokens], position - start, subset))
    return Quiet(pd.DataFrame(rows, columns=["pieces", "peak", "subset"]), active)


def make_trials(held: pd.DataFrame, quiet: Quiet, seed: int) -> pd.DataFrame:
    """What to ask about each feature, in an order that tells nothing.

    Returns:
        A row a trial: ``feature``, ``kind`` (detection, fuzzing), ``truth``, and the text:
        ``pieces``, ``marked`` (bool, of their length), ``subset``.
    """
    random = np.random.default_rng(seed)
    rows = []
    for feature, own in held.groupby("feature"):
        silent = random.permutation(np.flatnonzero(~quiet.active[:, feature]))[: len(own)]
        if len(own) < LEAST or len(silent) < LEAST:
            continue
        marks = [marked_tokens(np.asarray(values)) for values in own["activations"]]
        n_marked = int(np.ceil(np.mean([mark.sum() for mark in marks])))
        for row, mark in zip(own.itertuples(), marks, strict=True):
            none, wrong = np.zeros_like(mark), np.zeros_like(mark)
            rows.append((feature, "detection", True, row.pieces, none, row.subset))
            off = np.flatnonzero((np.asarray(row.activations) == 0) & (row.tokens >= 0))
            if len(off):
                wrong[random.permutation(off)[:n_marked]] = True
                rows.append((feature, "fuzzing", True, row.pieces, mark, row.subset))
                rows.append((feature, "fuzzing", False, row.pieces, wrong, row.subset))
        for text in quiet.table.iloc[silent].itertuples():
            none = np.zeros(len(text.pieces), bool)
            rows.append((feature, "detection", False, text.pieces, none, text.subset))
    names = ["feature", "kind", "truth", "pieces", "marked", "subset"]
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
            found = set(row.words)
            fits = bool(found & concept.words) + bool(found & around)
            grades.append(fits + 0.5 * (row.subset == concept.subset))
    return grades


def grade_by_judge(
    trials: pd.DataFrame, shown: list[str], labels: dict[int, str], answers: Answers
) -> np.ndarray:
    """A judge's yes or no to each trial, 1 or 0; NaN where its answer cannot be read."""
    grades = np.full(len(trials), np.nan)
    for kind, question in QUESTIONS.items():
        own = np.flatnonzero((trials["kind"] == kind) & trials["feature"].isin(labels))
        texts = [shown[i] for i in own]
        features = trials["feature"].iloc[own]
        grades[own] = ask_grades(question, kind, features, labels, texts, 1, answers)
    return grades


def auc(trials: pd.DataFrame, grades: Any) -> pd.DataFrame:
    """A row a feature: ``detection``, ``fuzzing`` and their mean, ``score``; NaN where ungraded."""
    graded = trials[["feature", "kind", "truth"]].assign(grade=grades).dropna()
    scores = pd.DataFrame(index=pd.Index(sorted(set(trials["feature"])), name="feature"))
    for kind in ("detection", "fuzzing"):
        own = graded[graded["kind"] == kind].groupby("feature")
        values = {
            feature: roc_auc_score(group["truth"], group["grade"])
            for feature, group in own
            if group["truth"].nunique() == 2
        }
        scores[kind] = pd.Series(values, dtype=float)
    scores["score"] = scores[["detection", "fuzzing"]].mean(axis=1, skipna=False)
    return scores


# ------------------------------------------------------------------------------------------- study


def score_group(analysis: Analysis, examples: pd.DataFrame, quiet: Quiet, n: int) -> pd.DataFrame:
    """Explain and score the first ``n`` features of some examples that have enough of them.

    Args:
        examples: Of `specificity.draw_examples`; "features" may be neurons.

    Returns:
        A row a feature, columns `SCORED`: ``random`` is the score of another's explanation,
        ``likeness`` and ``random_likeness`` are of contexts.
    """
    settings = analysis.settings
    held = held_out(examples)
    trials = make_trials(held, quiet, settings.seed)
    able = set(trials["feature"])
    if not able:
        return pd.DataFrame(columns=SCORED)
    order = np.random.default_rng(settings.seed).permutation(sorted(able))[:n]
    trials = trials[trials["feature"].isin(order)].reset_index(drop=True)
    examples = examples[examples["feature"].isin(order)]
    explanations = explain(examples, analysis.pieces, analysis.subset_shares)
    texts = {feature: explanation.text for feature, explanation in explanations.items()}
    other = dict(zip(order, np.roll(order, 1), strict=True))
    if analysis.judge is None:
        words = [np.array([word_at(p, i) for i in range(len(p))]) for p in trials["pieces"]]
        trials["words"] = words
        own = grade_by_words(trials, explanations)
        random = grade_by_words(trials, {f: explanations[other[f]] for f in order})
    else:
        shown = [show(row.pieces, row.marked) for row in trials.itertuples()]
        announce(analysis.judge, trials, shown)
        labels = ask_labels(examples[chosen_from(examples)], analysis.judge)
        texts |= labels
        own = grade_by_judge(trials, shown, labels, analysis.judge)
        swapped = {f: labels[other[f]] for f in order if other[f] in labels}
        random = grade_by_judge(trials, shown, swapped, analysis.judge)
    table = auc(trials, own)
    table.insert(0, "explanation", pd.Series(texts))
    table["random"] = auc(trials, random)["score"]
    held = held[held["feature"].isin(order)]
    source = examples[chosen_from(examples)]
    embed = open_embedder(settings.sentence_model)
    table = table.join(compare_contexts(embed, source, held, quiet.table, quiet.active, other))
    return table.reset_index()


def announce(answers: Answers, trials: pd.DataFrame, shown: list[str]) -> None:
    """Say before the first question what all of them will take, with labels of a usual length."""
    prompts = [
        prompt
        for (_, kind), own in trials.groupby(["feature", "kind"])
        for prompt in grade_questions(QUESTIONS[kind], USUAL_LABEL, [shown[i] for i in own.index])
    ]
    once = answers.estimate(prompts, GRADES_TOKENS)
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
    settings, store, pieces = analysis.settings, analysis.store, analysis.pieces
    if analysis.judge is not None:
        analysis.judge.count_anew()
    every = analysis.examples.to_pandas()
    phrases = {f: e.text for f, e in explain(every, pieces, analysis.subset_shares).items()}
    quiet = draw_quiet(analysis.autoencoder, store, analysis.contexts, pieces, settings.seed)
    drawn = draw_examples(analysis.examples, pieces, 2 * settings.n_explained, settings.seed)
    scored = score_group(analysis, drawn, quiet, settings.n_explained)
    compared = compare_with_neurons(analysis)
    phrases |= dict(zip(scored["feature"], scored["explanation"], strict=True))
    by_feature = scored.set_index("feature").reindex(range(len(analysis.features)))
    columns = {
        "explanation": np.array(
            [phrases.get(f, "") for f in range(len(analysis.features))], object
        ),
        "explanation_score": by_feature["score"].to_numpy(float),
        "context_likeness": by_feature["likeness"].to_numpy(float),
    }
    summary = summarise(scored, compared, settings.seed)
    if analysis.judge is not None:
        summary |= analysis.judge.summary()
    table = pd.concat([scored.assign(group="features"), compared])
    return Findings(summary, in_words(summary), {"explanations": table}, columns)


def in_words(found: dict[str, Any]) -> str:
    """What `study` found, a sentence a line."""
    lines = []
    if "score" in found:
        lines.append(
            f"Explanations, 0.5 by chance: {found['score'][0]:.2f} for {found['n_features']:,} "
            f"features, {found['random'][0]:.2f} by another's."
        )
    if "p_neurons" in found:
        names = "features, same tokens", "neurons"
        features, neurons = (found["groups"][name][0] for name in names)
        lines.append(
            f"Over the same tokens: {features:.2f} for features, {neurons:.2f} for neurons."
        )
    for what, n in found.get("unparsed", {}).items():
        asked = f"{found['asked'][what]:,} answers ({what})"
        lines.append(f"Judge: {n:,} of {asked} could not be read.")
    return "\n".join(lines)


def compare_with_neurons(analysis: Analysis) -> pd.DataFrame:
    """The same procedure on features and on neurons of the block, from the same tokens.

    Of each token the neurons count as active that are largest, as many as features are (L0), as
    delphi does: an MLP's neurons are all a little active everywhere.
    """
    settings, store = analysis.settings, analysis.store
    n = min(N_COMPARED, settings.n_explained)
    contexts = store.first(settings.n_neuron_tokens)
    neurons = draw_neurons(analysis.language_model, store.layer, 2 * n, settings.seed)
    k = max(1, round(analysis.summary["l0"]))
    values = neuron_values(analysis.language_model, store, contexts, neurons, k)
    groups = {
        "features, same tokens": (analysis.autoencoder, store),
        "neurons": (TopNeurons(len(neurons)), NeuronStore(store, values)),
    }
    tables = []
    for name, (latents, rows) in groups.items():
        found = FeaturePass(latents, rows, settings.seed)
        found.run(contexts, settings.batch_size)
        examples = example_table(found, store)
        drawn = draw_examples(examples, analysis.pieces, 2 * n, settings.seed)
        quiet = draw_quiet(latents, rows, contexts, analysis.pieces, settings.seed)
        scored = score_group(analysis, drawn, quiet, n)
        if name == "neurons":
            scored["feature"] = neurons[scored["feature"].to_numpy(int)]
        tables.append(scored.assign(group=name))
    return pd.concat(tables)


def summarise(scored: pd.DataFrame, compared: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Means with 95% intervals, and how likely chance would give as large differences.

    Nothing if no feature could be scored.
    """
    both = scored.dropna(subset=["score", "random"])
    if both.empty:
        return {}
    compared = compared.dropna(subset=["score"])
    groups = {name: own["score"] for name, own in compared.groupby("group")}
    columns = ("score", "detection", "fuzzing", "random", "likeness", "random_likeness")
    summary = {name: mean_and_interval(scored[name].dropna().to_numpy(), seed) for name in columns}
    summary |= {"n_features": len(both), "groups": {}}
    differ = (both["score"] != both["random"]).any()  # else there is no test to make
    test = stats.wilcoxon(both["score"], both["random"], alternative="greater") if differ else None
    summary["p_random"] = float(test.pvalue) if differ else 1.0
    summary["groups"] = {
        name: mean_and_interval(values.to_numpy(), seed) for name, values in groups.items()
    }
    summary["n_groups"] = {name: len(values) for name, values in groups.items()}
    if len(groups) == 2:
        features, neurons = groups["features, same tokens"], groups["neurons"]
        test = stats.mannwhitneyu(features, neurons, alternative="greater")
        summary["p_neurons"] = float(test.pvalue)
    return summary
