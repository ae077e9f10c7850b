"""Search: planted words, likeness and prompts are found, without what a search does not need."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import LAYER, ROOT
from keras import ops

from utils.artifacts import write_json
from utils.autoencoder.saved import load_autoencoder
from utils.features.catalogue import Catalogue
from utils.features.search import (
    by_classifier,
    by_presence,
    choose_features,
    find_like,
    pool_prompts,
)
from utils.language_model import load_language_model, residual_at
from utils.settings import InputError
from utils.steering.generation import prompt_tokens


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Catalogue:
    """Feature 0 peaks at " San" and is like 1; 1 promotes " San"; 2 is labelled so; 3 is dead."""
    folder = tmp_path_factory.mktemp("catalogue")
    peaks = [[" San", " rose"], [" tide"], [" rope"], [" San"]]
    pd.DataFrame(
        {
            "feature": range(4),
            "label": ["rose", "tide", "san francisco", "San"],
            "dead": [False, False, False, True],
            "peak_tokens": peaks,
            "peak_shares": [[0.6, 0.4], [1.0], [1.0], [1.0]],
            "promoted_tokens": [[" x"], [" San", " y"], [" x"], [" San"]],
            "neighbours": [[1, 2], [0], [0], []],
            "neighbour_cosines": [[0.9, 0.1], [0.9], [0.1], []],
        }
    ).to_parquet(folder / "features.parquet")
    write_json(folder / "summary.json", {})
    return Catalogue(folder)


def test_words_are_found_at_peaks_in_labels_and_among_promoted(catalogue):
    found = catalogue.search("San Francisco", 5)
    assert found["feature"].tolist() == [0, 2, 1]
    assert found["match"].tolist() == pytest.approx([0.6, 0.5, 0.1])
    assert catalogue.search("(", 5).empty and catalogue.search("zebra", 5).empty


def test_neighbours(catalogue):
    found = find_like(catalogue, 0, 5)
    assert found["feature"].tolist() == [1, 2] and found["match"].tolist() == [0.9, 0.1]
    for feature in (3, 4):
        with pytest.raises(InputError, match="living feature from 0 to 3"):
            find_like(catalogue, feature, 5)
    with pytest.raises(InputError, match="N_FOUND must be at most 10 with SEARCH_LIKE"):
        find_like(catalogue, 0, 11)


def test_prompts_known_answer():
    positive = np.array([[1.0, 2, 0, 3, 0], [3.0, 2, 1, 1, 0]])
    negative = np.array([[0.0, 1, 0, 0, 0]])
    assert by_presence(positive, negative).tolist() == [2, 0, 0, 2, 0]
    assert by_presence(positive, negative[:0]).tolist() == [2, 2, 0, 2, 0]


def test_a_classifier_weighs_what_tells_the_sets_apart():
    draw = np.random.default_rng(0)
    rows = draw.random((12, 6)) * [1, 1, 100, 1, 1, 1]
    rows[:6, 3], rows[6:, 3] = 0.01, 0  # small, but it tells
    assert by_classifier(rows[:6], rows[6:]).argmax() == 3


def test_prompts_are_pooled_over_positions_or_at_a_token(tiny_run, tiny_model):
    catalogue = Catalogue(tiny_run.folder / "analysis")
    path = catalogue.autoencoder_path(tiny_run.folder / "autoencoder")
    prompts = ["rose tulip spade rain seed", "ship anchor rope tide"]
    language_model, autoencoder = (
        load_language_model(str(tiny_model), LAYER, "float32"),
        load_autoencoder(path),
    )
    tokens = prompt_tokens(language_model, prompts[0])
    residual = residual_at(language_model, tokens, LAYER)[0]
    residual = residual[1:][residual[1:].norm(dim=-1) <= catalogue.summary["outlier_norm"]]
    norms = np.linalg.norm(autoencoder.directions(), axis=1)
    expected = ops.convert_to_numpy(autoencoder.encode(residual)) * norms
    pooled = pool_prompts(catalogue, path, prompts, None)
    assert pooled.shape == (2, 128)
    np.testing.assert_allclose(pooled[0], expected.mean(axis=0), rtol=1e-4, atol=1e-5)
    at_token = pool_prompts(catalogue, path, prompts[:1], "seed")
    np.testing.assert_allclose(at_token[0], expected[-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="SEARCH_TOKEN must be a token of each prompt"):
        pool_prompts(catalogue, path, prompts, "spade")


def test_searching_words_imports_no_framework(catalogue):
    code = (
        "import sys, analyze_features\n"
        f"sys.argv = ['analyze_features.py', '--analysis-dir', {str(catalogue.folder)!r}, "
        "'--search', 'zebra']\n"
        "analyze_features.show_matches = lambda *_: 'found'\n"
        "analyze_features.main()\n"
        "assert not {'torch', 'keras', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "found" in done.stdout, done.stderr


def test_a_number_that_no_feature_has_is_a_word(tiny_run, monkeypatch):
    catalogue = Catalogue(tiny_run.folder / "analysis")
    features = catalogue.features.copy()
    first, second = features.index[~features["dead"]][[3, 5]]
    features.loc[second, "label"] = "1984, 7, 12"
    monkeypatch.setattr(catalogue, "features", features)
    for wanted in (1984, "1984", '"7"', "'12'"):
        assert choose_features(catalogue, [wanted], 3, 80) == [second]
    assert choose_features(catalogue, [int(first)], 3, 80) == [first]
    with pytest.raises(InputError, match=r"from 0 to 127, or a word that some .*; it is '2001'"):
        choose_features(catalogue, [2001], 3, 80)
