"""Completeness: words found in text, planted features for some of them, the sigmoid."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_activations

from utils.activations.store import ActivationStore
from utils.autoencoder.kinds import L1Autoencoder
from utils.features.studies import completeness
from utils.features.studies.completeness import OTHER, find_features, find_occurrences, fit_sigmoid
from utils.steering.feature_model import FeatureEncoder

PIECES = [" gold", " Ir", "on", " the", " he", ".", " garden"]
GOLD, IR, ON, THE, HE, STOP, GARDEN = range(7)
WIDTH = 4  # feature 0 is active on "gold", 1 on the second token of "iron", 2 on everything


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """Twelve contexts of eight tokens; in six of them gold, in all iron, the, and garden."""
    rows = [[STOP, GOLD if i % 2 else HE, IR, ON, THE, GARDEN, HE, STOP] for i in range(12)]
    tokens = np.array(rows, np.int32)
    active = np.stack([tokens == GOLD, tokens == ON, tokens >= 0, tokens < 0], axis=-1)
    kept = np.ones(tokens.shape, bool)
    kept[:, 0] = False
    folder = tmp_path_factory.mktemp("planted")
    write_activations(
        folder,
        {
            "activations": np.where(active, np.float16(2), np.float16(-1)),
            "tokens": tokens,
            "kept": kept,
            "documents": np.zeros_like(tokens),
            "subsets": np.zeros(tokens.shape, np.int16),
        },
        per_shard=5,
    )
    return ActivationStore(folder)


@pytest.fixture(scope="module")
def identity() -> L1Autoencoder:
    made = L1Autoencoder(d_model=WIDTH, n_latents=WIDTH)
    made.W_enc.assign(np.eye(WIDTH))
    made.W_dec.assign(np.eye(WIDTH))
    return made


def test_words_are_found_where_they_are(store):
    found = find_occurrences(store, range(12), PIECES, seed=0)
    assert dict(zip(found.words.tolist(), found.listed.tolist(), strict=True)) == {
        "gold": "chemical elements",
        "iron": "chemical elements",
        "the": OTHER,
        "garden": OTHER,
    }  # "he" is too short
    at = np.where(found.at < 0, -1, found.word_of[found.at])
    gold, iron, the, garden = map(found.words.tolist().index, ("gold", "iron", "the", "garden"))
    assert at[1].tolist() == [-1, gold, iron, iron, the, garden, -1, -1]
    assert at[0].tolist() == [-1, -1, iron, iron, the, garden, -1, -1]


def test_other_words_are_drawn_evenly_over_log_frequency(monkeypatch):
    monkeypatch.setattr(completeness, "N_DRAWN", 2)
    counts = np.array([4, 5, 5, 5, 5, 1_000, 6, 1_000_000])
    chosen = completeness._choose(counts, np.arange(8) == 3, seed=0)
    assert {3, 5, 7} < set(chosen.tolist()) and 0 not in chosen and len(chosen) == 3 + 2 + 1


def test_words_get_the_features_that_are_planted(store, identity):
    found = find_occurrences(store, range(12), PIECES, seed=0)
    table, n_alive = find_features(FeatureEncoder(identity), store, range(12), found, batch_size=24)
    assert n_alive == 3
    table = table.set_index("word")
    assert table.n.to_dict() == {"gold": 6, "iron": 12, "the": 12, "garden": 12}
    names = ["feature", "recall", "precision", "covered"]
    assert table.loc["gold", names].tolist() == [0, 1, 1, True]
    assert table.loc["iron", names].tolist() == [1, 1, 1, True]
    # Feature 2 is active on all of the 84 kept tokens, alike.
    assert table.loc["the", names].tolist() == [2, 1, pytest.approx(12 / 84), False]


def test_the_sigmoid_that_words_were_drawn_from_is_found():
    draw = np.random.default_rng(0)
    frequency = 10 ** draw.uniform(-6, -2, 4_000)
    covered = draw.random(4_000) < 1 / (1 + np.exp(-3 * (np.log10(frequency) + 4)))
    fit = fit_sigmoid(frequency, covered, seed=0)
    assert fit["slope"] == pytest.approx(3, rel=0.1) and fit["half"] == pytest.approx(1e-4, rel=0.1)
    assert 0.8e-4 < fit["half_low"] < fit["half"] < fit["half_high"] < 1.25e-4


def test_no_sigmoid_where_all_words_are_alike():
    assert fit_sigmoid(np.array([0.1, 0.2]), np.array([True, True]), seed=0) is None


def test_text_without_words_is_nothing_to_study(store, identity, tmp_path):
    settings = SimpleNamespace(seed=0, batch_size=24)
    texts = [" .", " 12", "a", " ab", "", ".", " 3"]
    analysis = SimpleNamespace(
        store=store, settings=settings, contexts=range(12), token_texts=texts, all_sizes=[identity]
    )
    findings = completeness.study(analysis)
    assert findings.summary == [] and not findings.tables
    assert findings.words.startswith("Completeness: no word of 3 letters or more is 5 times")
