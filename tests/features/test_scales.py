"""Activations of any size, norms of 1e-3 to 1e6: the same results, or refused in words."""

import numpy as np
import pytest
import torch
from conftest import write_activations
from tiny_llama import tiny_language_model

from utils.activations.capture import sums_of
from utils.activations.shards import ShardWriter
from utils.activations.store import ActivationStore
from utils.autoencoder.fidelity import Fidelity
from utils.autoencoder.kinds import TopKAutoencoder
from utils.autoencoder.training import input_normalizer
from utils.features.catalogue import example_table
from utils.features.feature_pass import FeaturePass
from utils.features.neurons import neuron_values, neurons_of
from utils.features.questions import marked_tokens
from utils.features.search import by_classifier
from utils.features.studies.neurons import Correlations
from utils.language_model import residual_at
from utils.settings import InputError
from utils.steering.feature_model import FeatureEncoder

N_CONTEXTS = 400
SCALES = (2.0**-15, 1.0, 2.0**15)  # powers of two, by which float32 is scaled exactly


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[float, ActivationStore]:
    """Activations of the tiny model, multiplied by each of the scales."""
    tokens = np.random.default_rng(0).integers(2, 300, (N_CONTEXTS, 32)).astype(np.int32)
    residual = residual_at(tiny_language_model(), torch.from_numpy(tokens).long(), 1).numpy()
    arrays = {"tokens": tokens, "kept": tokens > 20, "documents": tokens, "subsets": tokens % 2}
    stores = {}
    for scale in SCALES:
        folder = tmp_path_factory.mktemp("scaled")
        scaled = residual * np.float32(scale)
        write_activations(folder, {**arrays, "activations": scaled}, 100, "float32")
        stores[scale] = ActivationStore(folder)
    norms = [
        float(np.median(np.linalg.norm(store.kept_rows(range(50)), axis=1)))
        for store in stores.values()
    ]
    assert norms[0] < 2e-3 and norms[-1] > 5e5
    return stores


def run_pass(store: ActivationStore, normalizer: str) -> FeaturePass:
    autoencoder = TopKAutoencoder(d_model=store.d_model, n_latents=128, k=4)
    autoencoder.initialize(*input_normalizer(normalizer, store), store.mean, 0.5, seed=0)
    done = FeaturePass(FeatureEncoder(autoencoder), store, seed=0)
    done.run(range(N_CONTEXTS), 1_024)
    return done


@pytest.mark.parametrize("normalizer", ["centered", "scalar", "none"])
@pytest.mark.parametrize("scale", [SCALES[0], SCALES[-1]])
def test_a_pass_over_activations_of_any_size(stores, normalizer, scale):
    usual, scaled = (run_pass(stores[one], normalizer) for one in (1.0, scale))
    times = scale if normalizer == "none" else 1.0
    assert scaled.fidelity.fvu == pytest.approx(usual.fidelity.fvu, rel=1e-6)
    assert scaled.fidelity.cosine == pytest.approx(usual.fidelity.cosine, rel=1e-6)
    assert scaled.fidelity.l0 == usual.fidelity.l0
    expected, statistics = usual.statistics(), scaled.statistics()
    for name in ("frequency", "dead", "top_subset", "top_subset_share"):
        np.testing.assert_array_equal(statistics[name], expected[name], err_msg=name)
    alive = ~expected["dead"]
    assert alive.sum() > 50
    np.testing.assert_array_equal(statistics["histogram"], expected["histogram"])
    for name in ("max_activation", "mean_activation", "histogram_range"):
        np.testing.assert_array_equal(
            statistics[name][alive], times * expected[name][alive], err_msg=name
        )
    tables = [example_table(one.examples(), one.store).to_pandas() for one in (usual, scaled)]
    for name in ("feature", "bucket", "rank", "context", "peak", "document", "subset"):
        assert tables[0][name].tolist() == tables[1][name].tolist(), name
    np.testing.assert_array_equal(tables[1]["activation"], times * tables[0]["activation"])
    windows = [np.stack(table["activations"]) for table in tables]
    np.testing.assert_array_equal(windows[1], np.float32(times) * windows[0])
    peaks = windows[1].max(axis=1)
    np.testing.assert_allclose(peaks, tables[1]["activation"], rtol=1e-3)  # of float16


def test_variance_about_a_large_mean():
    draw = np.random.default_rng(0)
    rows = (3e3 + draw.normal(size=(4_000, 64))).astype(np.float32)
    reconstruction = (rows - 0.5 * draw.normal(size=rows.shape)).astype(np.float32)
    fidelity = Fidelity(64)
    for start in range(0, 4_000, 1_000):
        part = slice(start, start + 1_000)
        fidelity.add(rows[part], reconstruction[part], np.zeros(1_000, int))
    error = rows.astype(float) - reconstruction
    variance = np.square(rows - rows.mean(axis=0, dtype=float)).sum()
    assert fidelity.fvu == pytest.approx(np.square(error).sum() / variance, rel=1e-5)


def test_activations_that_do_not_vary_are_refused(stores):
    store = ActivationStore(stores[1.0].folder)
    store.mean = np.full(store.d_model, 1 / store.scale, np.float32)
    with pytest.raises(InputError, match=r"must vary.* INPUT_NORMALIZER"):
        input_normalizer("centered", store)


def test_activations_that_float16_cannot_hold_are_refused(tmp_path):
    shape = (1, 4, 8)
    counted = torch.ones((1, 4), dtype=torch.bool)
    batch = dict.fromkeys(("tokens", "norms", "documents", "subsets"), np.zeros((1, 4)))
    for dtype in ("float16", "float32"):
        for size, words in {3e-6: "too small for float16", 1e5: "overflow, use"}.items():
            writer = ShardWriter(tmp_path, 0, shape, dtype)
            activations = torch.full(shape, size).to(getattr(torch, dtype))
            sums = sums_of(activations, ~counted, counted).numpy()
            batch["activations"] = activations.numpy()
            if dtype == "float32":
                writer.append(sums, **batch)
                continue
            with pytest.raises(InputError, match=f"(?s){words}.*--storage-dtype float32"):
                writer.append(sums, **batch)
            assert not list(tmp_path.iterdir())


def test_large_neurons_are_not_cut(tmp_path):
    model = tiny_language_model()
    model.model.get_decoder().layers[1].mlp.up_proj.weight.data *= 2.0**20
    tokens = np.random.default_rng(0).integers(2, 300, (4, 8)).astype(np.int32)
    zeros = np.zeros_like(tokens)
    arrays = {"activations": np.ones((4, 8, 32)), "tokens": tokens, "kept": zeros == 0}
    write_activations(tmp_path, {**arrays, "subsets": zeros, "documents": zeros})
    values = neuron_values(model, ActivationStore(tmp_path), range(4), np.arange(64), k=8)
    with neurons_of(model, 2) as neurons:
        residual_at(model, torch.from_numpy(tokens).long(), 1)
    largest = neurons[1].float().topk(1, dim=-1).values[..., 0].numpy()
    assert largest.max() > 1e5
    np.testing.assert_allclose(values.max(axis=-1), largest, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_small_values_are_no_zeros(size):
    draw = np.random.default_rng(0)
    values = np.array([0, 0.1, 1.0, 0.4])
    assert marked_tokens(size * values).tolist() == [False, False, True, True]
    positive, negative = draw.random((20, 3)), draw.random((20, 3)) + np.eye(3)[1]
    weights = by_classifier(size * positive, size * negative)
    np.testing.assert_allclose(weights, by_classifier(positive, negative), rtol=1e-6)
    assert weights[1] < 0
    left = draw.normal(size=(500, 2)).astype(np.float32)
    correlations = Correlations(2, 2, torch.device("cpu"))
    right = left @ np.float32([[1, 0], [1, 0]]) * np.float32(size) + np.float32([0, 3 * size])
    correlations.add(torch.from_numpy(left * np.float32(size)), torch.from_numpy(right))
    expected = [np.corrcoef(left[:, i], left.sum(axis=1))[0, 1] for i in range(2)]
    np.testing.assert_allclose(correlations.pearson()[:, 0], expected, atol=1e-4)
    assert correlations.pearson()[:, 1].tolist() == [0, 0]  # does not vary
