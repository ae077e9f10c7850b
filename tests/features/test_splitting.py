"""Splitting: planted families are found, with their words."""

import numpy as np
import pandas as pd
import pytest
from conftest import write_activations

from utils.activations.store import ActivationStore
from utils.autoencoder.kinds import L1Autoencoder
from utils.features.studies.splitting import choose_family, find_parents, label_features, summarise
from utils.steering.feature_model import FeatureEncoder

D_MODEL = 64
PIECES = [" rose", " tulip", " spade", " ship"]


@pytest.fixture(scope="module")
def planted() -> tuple[list[np.ndarray], dict[int, int]]:
    """Dictionaries of 4, 8 and 16 rows: each row of one has two children in the next, shuffled.

    Row 3 of the first is dead, so that half of its line has no parent; the last row of the largest
    is unlike all.
    """
    draw = np.random.default_rng(0)
    sizes, parents = [np.linalg.qr(draw.normal(size=(D_MODEL, 4)))[0].T], []
    for _ in range(2):
        parents.append(draw.permutation(np.repeat(np.arange(len(sizes[-1])), 2)))
        noise = draw.normal(size=(len(parents[-1]), D_MODEL)) / 16
        sizes.append(3 * (sizes[-1][parents[-1]] + noise))
        sizes[-1] /= np.linalg.norm(sizes[-1], axis=1, keepdims=True)
    sizes[-1][-1] = draw.normal(size=D_MODEL)
    return sizes, parents


def test_planted_families_are_found(planted):
    sizes, (first, second) = planted
    alive = [np.ones(len(rows), bool) for rows in sizes]
    alive[0][3] = False
    table = find_parents([rows * 2 for rows in sizes], alive)  # norms do not matter
    levels = [own.set_index("feature") for _, own in table.groupby("n_latents")]
    assert levels[0].index.tolist() == [0, 1, 2] == levels[0].ancestor.tolist()
    assert levels[1].parent.tolist() == np.where(first == 3, -1, first).tolist()
    assert levels[2].parent.tolist() == [*second[:-1], -1]
    descent = np.where(first == 3, -1, first)[second]
    assert levels[2].ancestor.tolist() == [*descent[:-1], -1]
    assert (levels[1].cosine[levels[1].parent >= 0] > 0.8).all() and levels[2].cosine[15] < 0.5

    found = summarise(table)
    assert found["n_latents"] == 4 and [level["n_alive"] for level in found["levels"]] == [8, 16]
    assert [level["with_parent"] for level in found["levels"]] == [6 / 8, 15 / 16]
    assert found["levels"][0]["split"] == 1 and found["levels"][0]["relatives"] == 2


def test_the_family_of_the_most_words_is_chosen():
    table = pd.DataFrame(
        {
            "n_latents": [2, 2, 2, *[9] * 24],
            "ancestor": [0, 1, 2, 0, 0, 0, 1, 1, 1, *[2] * 18],
            "word": ["", "", "", "a", "b", "b", "a", "b", "c", *map(str, range(18))],
        }
    )
    assert choose_family(table) == 1  # 2 has more, but too many for a picture
    assert choose_family(table.assign(word="")) is None


def test_labels_are_the_tokens_that_a_feature_peaks_at(tmp_path):
    draw = np.random.default_rng(0)
    shape = (20, 16)
    tokens = draw.integers(0, 4, shape, np.int32)
    active = tokens[..., None] == np.arange(4)
    arrays = {
        "activations": (active * draw.uniform(1, 2, (*shape, 4))).astype(np.float16),
        "tokens": tokens,
        "kept": draw.random(shape) < 0.9,
        "documents": np.zeros(shape, np.int32),
        "subsets": np.zeros(shape, np.int16),
    }
    arrays["kept"][:, 0] = False
    write_activations(tmp_path, arrays)
    autoencoder = L1Autoencoder(d_model=4, n_latents=5)
    autoencoder.W_enc.assign(np.eye(5, 4))
    store = ActivationStore(tmp_path)
    found = label_features(FeatureEncoder(autoencoder), store, range(20), PIECES, 64)
    assert found.word.tolist() == ["rose", "tulip", "spade", "ship", ""]  # the last never active
    assert found.label.tolist() == found.word.tolist()
