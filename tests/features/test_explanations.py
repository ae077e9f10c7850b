"""Explanations: of planted features phrases and scores are known; by words and by a judge."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_activations
from reader import Reader
from tiny_llama import tiny_language_model

from utils.activations.store import ActivationStore
from utils.features.examples import WINDOW, unused_examples, used_for_label
from utils.features.feature_pass import FeaturePass
from utils.features.judge import Answers
from utils.features.labels import Concept, explain, phrase, words_around
from utils.features.neurons import NeuronStore, TopNeurons, draw_neurons, neuron_values, neurons_of
from utils.features.studies.explanations import (
    SCORED,
    RandomTexts,
    auc,
    draw_texts,
    make_trials,
    score_group,
    summarise,
)
from utils.language_model import residual_at
from utils.settings import InputError

PIECES = [" the", " rose", " tide", " garden", " harbour", " of", " is", " roses", "."]
THE, ROSE, TIDE, GARDEN, HARBOUR, OF, IS, ROSES, STOP = range(9)
SHARES = {"Garden": 0.5, "Harbour": 0.5}


def make_examples() -> pd.DataFrame:
    """Feature 0 fires on " rose" among gardens, 1 on " tide" among harbours: 20 highest and 9."""
    rows = []
    for feature, word, place in ((0, ROSE, GARDEN), (1, TIDE, HARBOUR)):
        for n in range(29):
            tokens = np.full(WINDOW, -1)
            tokens[:7] = [THE, OF, word, IS, THE, place, STOP]
            activations = np.where(np.arange(WINDOW) == 2, 9.0 - n / 10, 0)
            bucket, rank = (0, n) if n < 20 else (1 + n % 3, n)
            subset = ["Garden", "Harbour"][feature]
            rows.append((feature, bucket, rank, 100 * feature + n, 2, subset, tokens, activations))
    names = "feature bucket rank context peak subset tokens activations".split()
    table = pd.DataFrame(rows, columns=names)
    texts = np.array([*PIECES, ""], object)
    return table.assign(token_texts=[list(texts[tokens]) for tokens in table["tokens"]])


@pytest.fixture
def examples() -> pd.DataFrame:
    return make_examples()


@pytest.fixture
def random_texts() -> RandomTexts:
    """Of 24 texts the first is one that feature 0 is active in."""
    texts = pd.DataFrame({"token_texts": [[" the", " of", " is", "."]] * 24})
    active = np.zeros((24, 2), bool)
    active[0, 0] = True
    return RandomTexts(texts.assign(subset=["Garden", "Harbour"] * 12), active)


# ---------------------------------------------------------------------------------------- phrases


def test_phrases_of_planted_features(examples):
    found = explain(examples, PIECES, {"Garden": 0.3, "Harbour": 0.7})
    assert found[0].concept == Concept(frozenset({"rose"}), None, "Garden")
    assert found[0].text == "“rose”, in Garden" and found[1].text == "“tide”"


def test_words_around_are_those_that_other_features_lack(examples):
    many = [examples.assign(feature=examples["feature"] + 2 * n) for n in range(4)]
    for own, word in zip(many[1:], (OF, IS, STOP), strict=True):  # no gardens, no harbours
        own["tokens"] = [np.where(t >= GARDEN, word, t) for t in own["tokens"]]
    found = words_around(pd.concat(many), PIECES)
    assert found[0] == ["garden"] and found[1] == ["harbour"] and 2 not in found


@pytest.mark.parametrize(
    ("words", "listed", "subset", "around", "scattered", "text"),
    [
        (["feel", "feels", "feeling"], None, None, [], False, "forms of “feel”"),
        (["war", "warm"], None, None, [], False, "“war”, “warm”"),
        (["peru", "chad"], "countries", None, [], False, "countries such as “peru”, “chad”"),
        (["a", "b"], None, "X", ["c"], True, "various words such as “a”, “b” near “c”, in X"),
        (["'\\n'"], None, None, [], False, "“↵”"),
    ],
)  # fmt: skip
def test_phrases(words, listed, subset, around, scattered, text):
    assert phrase(words, Concept(frozenset(words), listed, subset), around, scattered) == text


# ----------------------------------------------------------------------------------------- trials


def test_held_out_examples_share_no_context_with_the_source(examples):
    examples.loc[examples["rank"] == 21, "context"] = 0  # of feature 0's highest
    examples.loc[examples["rank"] == 23, "context"] = 22  # as another of feature 0's
    held = unused_examples(examples)
    assert len(held) == (10 + 7) + (10 + 9)
    assert not held[held["feature"] == 0]["context"].isin([0, 2, 4]).any()
    assert not held.duplicated(["feature", "context"]).any() and not used_for_label(held).any()


def test_trials(examples, random_texts):
    trials = make_trials(unused_examples(examples), random_texts, seed=0)
    counts = trials.groupby(["feature", "kind", "truth"]).size()
    assert (counts == 19).all() and len(counts) == 8
    marked = trials[trials["kind"] == "fuzzing"]
    places = marked["marked"].map(np.flatnonzero)
    assert (places.map(len) == 1).all()
    assert (places[marked["truth"]].map(lambda at: at[0]) == 2).all()
    wrong = places[~marked["truth"]].map(lambda at: at[0])
    assert wrong.isin([0, 1, 3, 4, 5, 6]).all() and wrong.nunique() > 3  # no padding
    silent = trials[(trials["kind"] == "detection") & ~trials["truth"]]
    assert silent["token_texts"].map(len).eq(4).all()
    assert not trials["truth"].is_monotonic_increasing


def test_features_with_too_little_to_ask_are_left_out(examples, random_texts):
    random_texts.active[:20, 1] = True
    few = examples[(examples["feature"] == 1) | (examples["rank"] < 8)]
    assert make_trials(unused_examples(few), random_texts, seed=0).empty
    none = score_group(make_analysis(), few, random_texts, 2)
    assert none.empty and list(none.columns) == list(SCORED)
    assert summarise(none, none.assign(group="features"), 0) == {}


def test_scores_are_balanced_accuracies_of_answers_of_yes_and_no():
    trials = pd.DataFrame({"feature": 5, "kind": "detection", "truth": [1, 1, 1, 0, 0]})
    trials = pd.concat([trials, trials.assign(kind="fuzzing")], ignore_index=True)
    found = auc(trials, [1, 1, 0, 0, 1, 1, np.nan, np.nan, np.nan, 0])
    assert found.loc[5].tolist() == pytest.approx([(2 / 3 + 1 / 2) / 2, 1, (7 / 12 + 1) / 2])
    assert auc(trials, [1, 1, 0, 0, 1, *[np.nan] * 5]).loc[5].isna().tolist() == [False, True, True]


# ------------------------------------------------------------------------------------------ groups


def make_analysis(judge=None) -> SimpleNamespace:
    settings = SimpleNamespace(seed=0)
    return SimpleNamespace(settings=settings, judge=judge, token_texts=PIECES, subset_shares=SHARES)


def test_planted_features_are_explained_by_words(examples, random_texts):
    table = score_group(make_analysis(), examples, random_texts, 2).set_index("feature")
    assert table["explanation"].tolist() == ["“rose”", "“tide”"]
    assert (table[["detection", "fuzzing", "score"]] == 1).all(axis=None)
    assert (table["random"] == 0.5).all()


def test_planted_features_are_explained_by_a_judge(examples, random_texts, tmp_path, capsys):
    judge = Answers(Reader(), tmp_path / "judge.jsonl")
    table = score_group(make_analysis(judge), examples, random_texts, 2).set_index("feature")
    assert table["explanation"].tolist() == ["rose", "tide"]
    assert (table["score"] == 1).all() and (table["random"] == 0.5).all()
    questions = 2 * 2 * 8  # own and random labels, two features, 38 texts in fives
    assert judge.asked == {"labels": 2, "detection": questions, "fuzzing": questions}
    assert judge.unparsed.total() == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("To explain 2 features: 2 labels, and twice") and "32 questions" in said


def test_a_judge_without_sense_fails_the_study(examples, random_texts, tmp_path):
    class Mumbler:
        name = earlier_name = "mumbler"

        def ask(self, prompts, max_tokens):
            return ((place, "well") for place in range(len(prompts)))

    judge = Answers(Mumbler(), tmp_path / "judge.jsonl")
    with pytest.raises(InputError, match=r"\(detection\).* not in the form asked for \(16\)"):
        score_group(make_analysis(judge), examples, random_texts, 2)
    assert judge.unparsed == {"labels": 0, "detection": 16}


def test_summary_tests_features_against_chance_and_neurons():
    draw = np.random.default_rng(0)
    scored = pd.DataFrame({"score": draw.uniform(0.7, 0.9, 50), "random": 0.5})
    for name in ("detection", "fuzzing"):
        scored[name] = 0.6
    low = scored.assign(score=draw.uniform(0.5, 0.7, 50), group="neurons")
    compared = pd.concat([scored.assign(group="features, same tokens"), low])
    found = summarise(scored, compared, seed=0)
    assert found["p_random"] < 1e-8 and found["p_neurons"] < 1e-8 and found["n_features"] == 50
    mean, lowest, highest = found["score"]
    assert mean == pytest.approx(scored["score"].mean()) and 0.7 < lowest < mean < highest < 0.9
    same = scored.assign(random=scored["score"])
    assert summarise(same, compared, seed=0)["p_random"] == 1


# ----------------------------------------------------------------------------- neurons and texts


def test_quiet_texts_and_neurons_in_the_place_of_latents(tmp_path):
    model = tiny_language_model()
    draw = np.random.default_rng(0)
    tokens = draw.integers(2, 300, (12, 8)).astype(np.int32)
    kept = np.ones((12, 8), bool)
    kept[:, 0] = False
    rows = draw.normal(size=(12, 8, 32)).astype(np.float16)
    subsets = np.repeat(np.array([0, 1], np.int16), 6)[:, None].repeat(8, axis=1)
    arrays = {"activations": rows, "tokens": tokens, "kept": kept, "subsets": subsets}
    write_activations(tmp_path, {**arrays, "documents": np.zeros((12, 8), np.int32)})
    store = ActivationStore(tmp_path)

    chosen = draw_neurons(model, 1, 20, seed=0)
    values = neuron_values(model, store, range(12), chosen, k=8)
    with neurons_of(model, 2) as found:
        residual_at(model, torch.from_numpy(tokens).long(), 1)
    expected = found[1].float().numpy()
    eighth = np.sort(expected, axis=-1)[..., -8, None]
    expected = np.where(expected >= eighth, expected.clip(0), 0)[..., chosen]
    np.testing.assert_allclose(values, expected, rtol=1e-3)  # of float16

    neurons, rows = TopNeurons(20), NeuronStore(store, values, range(12))
    found = FeaturePass(neurons, rows, seed=0)
    found.run(range(12), 32)
    masked = np.where(kept[..., None], values, 0)
    assert found.uses.tolist() == (masked > 0).sum(axis=(0, 1)).tolist()
    np.testing.assert_allclose(found.maxima, masked.max(axis=(0, 1)))

    random_texts = draw_texts(neurons, rows, range(12), [f"w{i}" for i in range(300)], seed=0)
    assert (
        random_texts.active.tolist() == (masked > 0).any(axis=1).tolist()
    )  # a window holds a context
    assert random_texts.table["subset"].tolist() == ["a"] * 6 + ["b"] * 6
    assert random_texts.table["token_texts"][3] == [f"w{token}" for token in tokens[3]]
