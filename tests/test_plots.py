import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from pictures import drawn, share_of

from utils import plots
from utils.features import study_plots

SUBSETS = ["Github", "ArXiv", "Wikipedia (en)"]


def feature_table(n=300):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "frequency": 10 ** rng.uniform(-5, -1, n),
            "label": [f"feature of kind {i}" for i in range(n)],
            "top_subset": rng.choice(SUBSETS, n),
            "top_subset_share": rng.uniform(0.2, 1, n),
            "umap_x": rng.normal(size=n),
            "umap_y": rng.normal(size=n),
        }
    )


@pytest.mark.parametrize("n_alive", [0, 1, 1000])
def test_density_histogram_draws_live_features_only(tmp_path, n_alive):
    frequency = np.zeros(1000)
    frequency[:n_alive] = np.geomspace(1e-5, 1e-1, 1000)[:n_alive]
    plots.plot_density_histogram(frequency, 100_000, tmp_path / "density.png")
    assert (share_of(drawn(tmp_path / "density.png"), plots.BLUE) > 0) == (n_alive > 0)


@pytest.mark.parametrize("k", [0, 32])
def test_l0_histogram_of_topk_is_one_bar(tmp_path, k):
    plots.plot_l0_histogram(np.bincount([k] * 5000), tmp_path / "l0.png")
    blue = (drawn(tmp_path / "l0.png") == list(bytes.fromhex(plots.BLUE[1:]))).all(axis=-1)
    columns = np.flatnonzero(blue.sum(axis=0) > 100)
    width = columns[-1] - columns[0] + 1
    assert 0.02 < width / blue.shape[1] < 0.2
    assert blue.any(axis=1).mean() > 0.5


def test_l0_histogram_of_a_wide_distribution(tmp_path):
    l0 = np.random.default_rng(0).gamma(4, 60, 20_000).astype(int)
    plots.plot_l0_histogram(np.bincount(l0), tmp_path / "l0.png")
    assert share_of(drawn(tmp_path / "l0.png"), plots.BLUE) > 0.1


def test_fidelity_bars(tmp_path):
    cross_entropy = {"untouched": 3.1, "reconstruction": 3.4, "zero_ablated": 11.3}
    summary = {"layer": 15, "loss_recovered": 0.963, "cross_entropy": cross_entropy}
    plots.plot_fidelity(summary, tmp_path / "fidelity.png")
    picture = drawn(tmp_path / "fidelity.png")
    lengths = [share_of(picture, colour) for colour in (plots.BLUE, plots.ORANGE)]
    assert lengths[1] / lengths[0] == pytest.approx(11.3 / 3.4, rel=0.05)


def test_umap_leaves_out_dead_features(tmp_path):
    features = feature_table()
    features.loc[1:, ["umap_x", "umap_y"]] = np.nan
    features["top_subset_share"] = 0.9
    plots.plot_umap(features, tmp_path / "map.png")
    picture = drawn(tmp_path / "map.png")
    assert 0 < share_of(picture, plots.SUBSET_COLOURS[0]) < 0.001
    assert share_of(picture, plots.SUBSET_COLOURS[1]) == 0


def test_umap_of_more_subsets_than_colours_and_of_awkward_labels(tmp_path):
    features = feature_table()
    features["top_subset"] = [f"_subset ${i % 30}$" for i in range(len(features))]
    features["label"] = [("", "$x$ and $y", "日本語", "long " * 30)[i % 4] for i in features.index]
    plots.plot_umap(features, tmp_path / "map.png")
    drawn(tmp_path / "map.png")


def test_umap_labels_overlap_neither_each_other_nor_the_dots_they_name():
    features = feature_table(800)
    points = features[["umap_x", "umap_y"]].to_numpy()
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*points.T)
    plots._write_labels(axes, features, points, n_labels=25)
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert 15 <= len(labels) <= 25
    assert len({label.get_text() for label in labels}) == len(labels)
    frame = axes.get_window_extent()
    boxes = [super(Annotation, label).get_window_extent() for label in labels]
    assert all(frame.count_contains(box.corners()) == 4 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    named = axes.transData.transform([label.xy for label in labels])
    assert not any(box.count_contains(named) for box in boxes)


def test_attribution_of_a_long_prompt_shows_the_tokens_that_count(tmp_path):
    def shown(n: int, strong: int | None):
        values = np.where(np.arange(n) == strong, 2.0, 0.001)
        places = pd.DataFrame({"position": range(n), "feature": range(n), "attribution": values})
        found = SimpleNamespace(difference=1.0, places=places)
        labels = pd.Series([f"label {i}" for i in range(n)])
        words = ["a", "b", *(f"w{i}" for i in range(n))]
        study_plots.plot_attribution(found, words, labels, tmp_path / "attribution.png")
        return drawn(tmp_path / "attribution.png")

    long, short = shown(200, 150), shown(study_plots.N_POSITIONS, None)
    assert len(long) <= 1.05 * len(short)
    orange = [share_of(picture, plots.ORANGE) for picture in (long, shown(200, None))]
    assert orange[0] > 0.002 and orange[0] < orange[1]  # one bar, not thirty of equal length
