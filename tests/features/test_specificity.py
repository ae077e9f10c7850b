"""Specificity: words, concepts and scores of examples that are planted."""

import numpy as np
import pandas as pd
import pytest
from reader import Reader

from utils.features.judge import Answers
from utils.features.labels import Concept, find_concept, word_at
from utils.features.studies.specificity import (
    by_level,
    feature_scores,
    judge_specificity,
    measure_specificity,
    score,
)

SHARES = {"Garden": 0.5, "Harbour": 0.5}


@pytest.mark.parametrize(
    ("place", "word"),
    [(0, "unhappily"), (1, "unhappily"), (2, "unhappily"), (3, ","), (4, "'\\n'"), (5, "42nd")],
)
def test_the_word_of_a_token(place, word):
    assert word_at([" Un", "happ", "ily", ",", "\n", "42", "nd"], place) == word


@pytest.mark.parametrize(
    ("words", "subsets", "expected"),
    [
        (["war"] * 6 + ["the"] * 4, "GGGGGHHHHH", Concept({"war", "the"}, None, None)),
        (["war"] * 8 + ["the"] * 2, "GGGGGHHHHH", Concept({"war"}, None, None)),
        ([*"abcdefghij"], "HHHHHHHHHH", Concept({"a"}, None, None)),
    ],
)
def test_the_concept_of_words(words, subsets, expected):
    names = {"G": "Garden", "H": "Harbour"}
    examples = pd.DataFrame({"word": words, "subset": [names[letter] for letter in subsets]})
    assert find_concept(examples, SHARES) == expected


def test_the_concept_is_a_list_where_most_words_are_of_one():
    words = ["France", "Peru", "Chad", "Spain", "the"]
    examples = pd.DataFrame({"word": map(str.lower, words), "subset": "Garden"})
    found = find_concept(examples, {"Garden": 0.2})
    assert found.listed == "countries" and found.subset == "Garden"
    assert {"france", "italy", "japan"} < found.words and "the" not in found.words


def test_scores_by_the_rubric():
    concept = Concept(frozenset({"rose", "a"}), None, "Garden")
    assert score("rose", frozenset(), "Harbour", concept) == 3
    assert score("ship", frozenset({"rose"}), "Harbour", concept) == 2
    assert score("ship", frozenset({"a"}), "Garden", concept) == 1  # too short to count nearby
    assert score("ship", frozenset({"a"}), "Harbour", concept) == 0


@pytest.fixture(scope="module")
def examples() -> pd.DataFrame:
    """Of two features: one peaks at "rose" where it is strong, at "ship" where it is weak; the
    other at "tide" wherever it is."""
    rows = []
    for feature, strong, weak in ((3, " rose", " ship"), (7, " tide", " tide")):
        for rank in range(20):
            rows.append((feature, 0, rank, 10 - rank / 10, strong))
        rows += [(feature, 5, rank, 1.0, weak) for rank in range(3)]
    table = pd.DataFrame(rows, columns=["feature", "bucket", "rank", "activation", "token"])
    table["token_texts"] = [["x", token, "."] for token in table.pop("token")]
    return table.assign(peak=1, subset=["Garden", "Harbour"] * 23, context=range(46))


def test_planted_features_get_planted_scores(examples):
    scores = measure_specificity(examples, SHARES, seed=0)
    assert len(scores) == 2 * (10 + 3)  # every other of the highest is what the concept is from
    assert (scores[scores.feature == 7].score == 3).all()
    assert scores[scores.feature == 3].score.tolist() == [3] * 10 + [0] * 3
    assert (scores.chance == 0).all()
    by_feature = feature_scores(scores, 9)
    assert by_feature[[3, 7]].tolist() == [3, 3] and np.isnan(by_feature[0])


def test_nothing_is_scored_twice_nor_where_the_concept_is_from(examples):
    drawn = examples[examples["bucket"] == 0].groupby("feature").head(4)  # at random, but the same
    again = pd.concat([examples, drawn.assign(bucket=1)], ignore_index=True)
    expected = measure_specificity(examples, SHARES, seed=0)
    pd.testing.assert_frame_equal(measure_specificity(again, SHARES, seed=0), expected)


def test_levels(examples):
    levels = by_level(measure_specificity(examples, SHARES, seed=0), seed=0)
    assert levels[["low", "high", "n", "n_features"]].values.tolist() == [
        [0, 0.2, 6, 2],
        [0.8, 1, 20, 2],
    ]
    assert levels["mean"].tolist() == [1.5, 3] and levels.share_0.tolist() == [0.5, 0]
    assert levels.mean_low[0] == 0 and levels.mean_high[0] == 3  # of two features drawn again
    assert levels.mean_low[1] == levels.mean_high[1] == 3


def test_a_judge_scores_in_the_place_of_words(examples, tmp_path):
    values = [np.array([0, value, 0]) for value in examples["activation"]]
    answers = Answers(Reader(grade=3), tmp_path / "judge.jsonl")
    scores = judge_specificity(examples.assign(activations=values), answers, seed=0)
    expected = measure_specificity(examples, SHARES, seed=0)
    names = ["feature", "level", "score", "chance"]
    found = scores[names].sort_values(names).to_numpy(float)
    np.testing.assert_allclose(found, expected[names].sort_values(names).to_numpy(float))
    assert answers.asked == {"labels": 2, "rubric": 2 * 2 * 3}
    scores.loc[scores["level"] < 0.5, "score"] = np.nan  # could not be read
    assert by_level(scores, seed=0)["low"].tolist() == [0.8]


def test_no_examples_no_levels(examples):
    assert by_level(measure_specificity(examples[:0], SHARES, seed=0), seed=0).empty
