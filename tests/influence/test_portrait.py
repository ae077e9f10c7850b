"""The picture of a feature, read back as pixels."""

import numpy as np
import pytest
from pictures import drawn

from utils.features.catalogue import Catalogue
from utils.influence.portrait import READ, _read, draw_portrait
from utils.terminal import one_line


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


def test_what_is_marked_most_strongly_is_the_token_at_the_peak(catalogue):
    features = catalogue.features[~catalogue.features["dead"]].index[:20]
    for feature in features:
        examples = catalogue.examples_of([feature])
        top = examples[examples["bucket"] == 0].sort_values("rank").drop_duplicates("document")
        lines = list(_read(catalogue, feature, 5))
        assert len(lines) == min(5, len(top)) > 0
        for (line, shades), example in zip(lines, top.itertuples(), strict=False):
            assert len(line) == len(shades) <= READ
            peak = one_line(example.token_texts[example.peak])
            at = 3 * READ // 5  # where every peak begins
            assert line[at : at + len(peak)] == peak
            assert shades[at] == shades.max() == max(example.activations)


def test_a_label_that_looks_like_mathematics_is_drawn(catalogue, tmp_path):
    catalogue.features["label"] = r"$\foo$, $x"
    draw_portrait(catalogue, [record_of(0, "so")], tmp_path / "feature.png")
    drawn(tmp_path / "feature.png")
