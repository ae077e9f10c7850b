"""The picture of a feature, read back as pixels."""

import numpy as np
import pytest
from pictures import drawn

from utils.features.catalogue import Catalogue
from utils.influence.portrait import draw_portrait


@pytest.fixture(scope="module")
def catalogue(tiny_run):
    return Catalogue(tiny_run.folder / "analysis")


def record_of(feature: int, steered: str) -> dict:
    request = {"features": [feature], "prompt": "$x$ is", "strength": 2.0, "intervention": "clamp"}
    return {"request": request, "untouched": "untouched . " * 40, "steered": steered}


def marked(path) -> tuple[float, float]:
    """The shares of coloured pixels in the left and right half of a picture."""
    picture = drawn(path).astype(int)
    coloured = picture.max(axis=-1) - picture.min(axis=-1) > 40
    left, right = np.split(coloured[:, : coloured.shape[1] // 2 * 2], 2, axis=1)
    return left.mean(), right.mean()


def test_what_a_feature_reads_and_the_words_it_writes_are_marked(catalogue, tmp_path):
    alive = catalogue.features[~catalogue.features["dead"]]
    words = alive["peak_tokens"].map(
        lambda tokens: [t.strip() for t in tokens if t.strip().isalpha()]
    )
    feature = int(words.map(len).idxmax())
    word = words[feature][0]
    shares = {}
    for name, text in {"with": f"so {word}, and {word}s", "without": "so <1>, and <2>"}.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "feature.png"
        draw_portrait(catalogue, [record_of(feature, text)], path)
        shares[name] = marked(path)
    assert shares["with"][0] == shares["without"][0] > 0.002
    assert shares["with"][1] > shares["without"][1] == 0
