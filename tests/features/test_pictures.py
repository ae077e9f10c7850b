"""The pictures of an analysis: what each shows, and that awkward input does not spoil it."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from pictures import drawn, share_of

from utils.features import report
from utils.features.studies import cross_entropy, places
from utils.plots import BLUE, COLOURS, ORANGE

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
    report.plot_density_histogram(frequency, 100_000, tmp_path / "density.png")
    assert (share_of(drawn(tmp_path / "density.png"), BLUE) > 0) == (n_alive > 0)


@pytest.mark.parametrize("k", [0, 32])
def test_l0_histogram_of_topk_is_one_bar(tmp_path, k):
    report.plot_l0_histogram(np.bincount([k] * 5000), tmp_path / "l0.png")
    blue = (drawn(tmp_path / "l0.png") == list(bytes.fromhex(BLUE[1:]))).all(axis=-1)
    columns = np.flatnonzero(blue.sum(axis=0) > 100)
    width = columns[-1] - columns[0] + 1
    assert 0.02 < width / blue.shape[1] < 0.2
    assert blue.any(axis=1).mean() > 0.5


def test_l0_histogram_of_a_wide_distribution(tmp_path):
    l0 = np.random.default_rng(0).gamma(4, 60, 20_000).astype(int)
    report.plot_l0_histogram(np.bincount(l0), tmp_path / "l0.png")
    assert share_of(drawn(tmp_path / "l0.png"), BLUE) > 0.1


def test_fidelity_bars(tmp_path):
    losses = {"untouched": 3.1, "reconstruction": 3.4, "zero_ablated": 11.3}
    summary = {"layer": 15, "loss_recovered": 0.963, "cross_entropy": losses}
    cross_entropy.plot_fidelity(summary, tmp_path / "fidelity.png")
    picture = drawn(tmp_path / "fidelity.png")
    lengths = [share_of(picture, colour) for colour in (BLUE, ORANGE)]
    assert lengths[1] / lengths[0] == pytest.approx(11.3 / 3.4, rel=0.05)


def test_umap_leaves_out_dead_features(tmp_path):
    features = feature_table()
    features.loc[1:, ["umap_x", "umap_y"]] = np.nan
    features["top_subset_share"] = 0.9
    places.plot_umap(features, tmp_path / "map.png")
    picture = drawn(tmp_path / "map.png")
    assert 0 < share_of(picture, COLOURS[0]) < 0.001
    assert share_of(picture, COLOURS[1]) == 0


def test_umap_of_more_subsets_than_colours_and_of_awkward_labels(tmp_path):
    features = feature_table()
    features["top_subset"] = [f"_subset ${i % 30}$" for i in range(len(features))]
    features["label"] = [("", "$x$ and $y", "日本語", "long " * 30)[i % 4] for i in features.index]
    places.plot_umap(features, tmp_path / "map.png")
    drawn(tmp_path / "map.png")


def test_umap_labels_do_not_overlap_one_another():
    features = feature_table(800)
    points = features[["umap_x", "umap_y"]].to_numpy()
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*points.T)
    places._write_labels(axes, features, points, n_labels=25)
    figure.draw_without_rendering()
    assert 12 <= len(axes.texts) <= 25
    assert len({label.get_text() for label in axes.texts}) == len(axes.texts)
    boxes = [label.get_window_extent() for label in axes.texts]
    frame = axes.get_window_extent()
    assert all(frame.count_contains(box.corners()) == 4 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
