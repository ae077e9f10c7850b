import itertools
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from utils import plots
from utils.features import study_plots

SUBSETS = ["Github", "ArXiv", "Wikipedia (en)"]


def drawn(path):
    """The picture, uint8 of shape (height, width, 3), after a check that it shows something."""
    picture = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(np.uint8)
    assert min(picture.shape[:2]) >= 3 * 150
    assert (picture != 255).any(axis=-1).mean() > 0.005
    assert list(path.parent.iterdir()) == [path]  # nothing half-written stays behind
    return picture


def share_of(picture, colour):
    """The share of a picture's pixels that have a colour, "#rrggbb"."""
    return (picture == list(bytes.fromhex(colour[1:]))).all(axis=-1).mean()


def training_log(n=40):
    progress = np.linspace(0.01, 1, n)
    return pd.DataFrame(
        {
            "step": np.arange(n) * 100,
            "tokens": np.arange(n) * 204_800,
            "loss": 200 / progress,
            "fvu": 0.2 / progress**0.5,
            "l0": np.full(n, 32.0),
            "dead_fraction": 0.1 * progress,
            "learning_rate": 3e-4 * (1 - progress),
        }
    )


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


def test_training_curves_show_held_out_variance(tmp_path):
    path = tmp_path / "training.png"
    log = training_log()
    held_out = log.fvu.where(log.index % 10 == 9)
    plots.plot_training_curves(log.assign(val_fvu=held_out), path)
    assert share_of(drawn(path), plots.ORANGE) > 0


def test_training_curves_of_one_step_that_diverged_without_validation(tmp_path):
    log = training_log().tail(1).assign(fvu=np.nan)
    plots.plot_training_curves(log, tmp_path / "training.png")
    picture = drawn(tmp_path / "training.png")
    assert share_of(picture, plots.BLUE) > 0
    assert share_of(picture, plots.ORANGE) == 0


@pytest.mark.parametrize("n_early", [0, 20, 40])
def test_training_curves_show_each_term_of_the_loss(tmp_path, n_early):
    """Of a log whose first lines are of an early version, which had no terms."""
    log = training_log()
    late = log.index >= n_early
    log["loss_reconstruction"] = (0.7 * log.loss).where(late)
    log["loss_sparsity"] = (0.3 * log.loss).where(late)
    plots.plot_training_curves(log, tmp_path / "training.png")
    picture = drawn(tmp_path / "training.png")
    shown = [share_of(picture, colour) > 0 for colour in plots.SUBSET_COLOURS[:3]]
    assert shown == [n_early < 40, n_early < 40, False]


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
