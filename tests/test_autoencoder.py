"""Autoencoders: known answers, what the paper's recipe does at each step, three backends."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment
from keras import ops
from on_backend import KINDS, main, product_inputs

from utils.autoencoder import L1Autoencoder, SparseAutoencoder, TopKAutoencoder, find_kind
from utils.settings import InputError
from utils.training import LinearDecay, Rounds

BACKENDS = ("torch", "jax", "tensorflow")


def hand_set(cls: type, **options) -> SparseAutoencoder:
    """Two latents of width two, with every weight and the scale in its place."""
    made = cls(d_model=2, n_latents=2, **options)
    made.W_enc.assign([[1.0, 0.0], [0.0, 1.0]])
    made.b_enc.assign([0.0, -0.5])
    made.W_dec.assign([[2.0, 0.0], [0.0, 0.5]])
    made.b_dec.assign([0.5, 0.0])
    made.scale.assign(0.5)
    return made


# x = [[2, 3], [-1, 4]], and the pre-activations are [[2, 2.5], [-1, 3.5]].
ACTIVATIONS = np.array([[4.0, 6.0], [-2.0, 8.0]], np.float32)


def array(values) -> np.ndarray:
    return ops.convert_to_numpy(values)


def measure(autoencoder: SparseAutoencoder, activations: np.ndarray) -> dict[str, float]:
    """Loss and metrics as `evaluate` gives them."""
    autoencoder.compile(optimizer=keras.optimizers.SGD(0.0))
    return autoencoder.evaluate(activations, batch_size=64, verbose=0, return_dict=True)


# ---------------------------------------------------------------------------------- known answers


def test_l1_known_answer():
    made = hand_set(L1Autoencoder, l1_coefficient=5.0)
    assert array(made.encode(ACTIVATIONS)).tolist() == [[2, 2.5], [0, 3.5]]
    # x̂ = [[0.5 + 4, 1.25], [0.5, 1.75]], and raw it is twice that.
    assert array(made(ACTIVATIONS)).tolist() == [[9, 2.5], [1, 3.5]]
    # ‖x − x̂‖²: 6.25 + 3.0625 and 2.25 + 5.0625; Σ f ‖W_dec‖: 4 + 1.25 and 1.75.
    measured = measure(made, ACTIVATIONS)
    assert measured["loss"] == pytest.approx((9.3125 + 7.3125) / 2 + 5 * (5.25 + 1.75) / 2)
    assert measured["l0"] == 1.5
    # Around its mean (0.5, 3.5), x has squares 2.25 + 0.25 twice.
    assert measured["fvu"] == pytest.approx((9.3125 + 7.3125) / 5)


def test_topk_known_answer():
    made = hand_set(TopKAutoencoder, k=1)
    values, indices = made.encode_sparse(ACTIVATIONS)
    assert array(values).tolist() == [[2.5], [3.5]] and array(indices).tolist() == [[1], [1]]
    assert array(made.encode(ACTIVATIONS)).tolist() == [[0, 2.5], [0, 3.5]]
    assert array(made(ACTIVATIONS)).tolist() == [[1, 2.5], [1, 3.5]]
    measured = measure(made, ACTIVATIONS)
    assert measured["loss"] == pytest.approx((2.25 + 3.0625 + 2.25 + 5.0625) / 2)
    assert measured["l0"] == 1
    # The largest pre-activation may be negative: then nothing is active.
    silent = np.array([[-2.0, 0.0]], np.float32)
    assert array(made.encode(silent)).tolist() == [[0, 0]]
    assert array(made(silent)).tolist() == [[1, 0]]


@pytest.mark.parametrize("cls", [L1Autoencoder, TopKAutoencoder])
def test_active_latents_are_the_dense_ones(cls):
    made = cls(d_model=6, n_latents=24, **({"k": 3} if cls is TopKAutoencoder else {}))
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 1
    made.initialize(0.7, rows.mean(axis=0), 0.5, seed=0)
    row, feature, values, reconstruction = made.encode_active(rows)
    latents = array(made.encode(rows))
    dense = np.zeros_like(latents)
    dense[row, feature] = values
    np.testing.assert_allclose(dense, latents, atol=1e-6)
    assert (values > 0).all() and (np.diff(row) >= 0).all() and len(row) == (latents > 0).sum()
    np.testing.assert_allclose(reconstruction, array(made(rows)), rtol=1e-4, atol=1e-5)


def test_decoder_norms_and_directions():
    made = hand_set(L1Autoencoder)
    made.W_dec.assign([[3.0, 4.0], [0.0, -2.0]])
    assert array(made.decoder_norms()).tolist() == [5, 2]
    assert made.directions().tolist() == [[3, 4], [0, -2]]


def test_initial_weights():
    made = L1Autoencoder(d_model=4, n_latents=6)
    mean = np.array([1.0, 2.0, 0.0, -1.0], np.float32)
    made.initialize(0.5, mean, decoder_norm=0.1, seed=3)
    np.testing.assert_allclose(array(made.decoder_norms()), 0.1, rtol=1e-6)
    assert np.array_equal(array(made.W_enc), array(made.W_dec))
    assert array(made.b_dec).tolist() == [0.5, 1, 0, -0.5]
    # The mean's pre-activations are zero: the encoder sees centred data.
    np.testing.assert_allclose(array(made.pre_activations(0.5 * mean[None])), 0, atol=1e-7)
    again = L1Autoencoder(d_model=4, n_latents=6)
    again.initialize(0.5, mean, decoder_norm=0.1, seed=4)
    assert not np.array_equal(array(made.W_dec), array(again.W_dec))


def test_an_unknown_kind_suggests_the_nearest():
    assert find_kind("topk") is TopKAutoencoder
    with pytest.raises(InputError, match=r"one of l1, topk; it is 'topkk'\. Did you mean 'topk'"):
        find_kind("topkk")
    with pytest.raises(InputError, match=r"it is 'relu'\.$"):
        find_kind("relu")


# ------------------------------------------------------------------------------------- the recipe


def test_the_price_of_activity_rises_over_its_warmup():
    made = hand_set(L1Autoencoder, l1_coefficient=5.0, sparsity_warmup=4)
    made.compile(optimizer=keras.optimizers.SGD(0.0))
    losses = []
    for _ in range(7):
        losses.append(made.train_on_batch(ACTIVATIONS, return_dict=True)["loss"])
        made.reset_metrics()
    lambdas = [(loss - 8.3125) / 3.5 for loss in losses]
    assert lambdas == pytest.approx([0, 1.25, 2.5, 3.75, 5, 5, 5])
    assert int(made.step) == 7


def test_learning_rate_is_constant_then_falls_to_zero():
    paper = LinearDecay(2.0, total_steps=10, decay_share=0.2)
    assert [float(paper(step)) for step in range(11)] == pytest.approx([2] * 9 + [1, 0])
    both = LinearDecay(1.0, total_steps=10, warmup_share=0.4, decay_share=0.5)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]
    assert [float(both(step)) for step in range(11)] == pytest.approx(expected)
    copy = LinearDecay.from_config(both.get_config())
    assert float(copy(7)) == pytest.approx(0.6)


def test_rounds_are_alike_and_drop_at_most_one():
    assert Rounds.cut(1_000, 100) == Rounds(10, 100)
    assert Rounds.cut(7, 100) == Rounds(1, 7)
    for total in range(1, 400):
        rounds = Rounds.cut(total, 20)
        assert total - rounds.n_rounds < rounds.total_steps <= total
        assert rounds.steps <= 2 * 20


def test_a_silent_latent_is_dead_after_so_many_tokens():
    made = hand_set(TopKAutoencoder, k=1, dead_after=5, auxk_coefficient=0.0)
    made.compile(optimizer=keras.optimizers.SGD(0.0))
    for tokens, dead in ((2, False), (4, False), (6, True)):
        made.train_on_batch(ACTIVATIONS)  # two tokens, on which latent 1 is active
        assert array(made.idle_tokens).tolist() == [tokens, 0]
        assert array(made.dead()).tolist() == [dead, False]
    measure(made, ACTIVATIONS)  # counts nothing
    assert array(made.idle_tokens).tolist() == [6, 0]
    made.train_on_batch(np.array([[4.0, 0.0]], np.float32))
    assert array(made.idle_tokens).tolist() == [0, 1]


def test_auxk_known_answer():
    made = TopKAutoencoder(d_model=2, n_latents=3, k=1, auxk_coefficient=1.0, dead_after=100)
    made.W_enc.assign([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    made.W_dec.assign([[0.1, 0.0], [5.0, 5.0], [0.0, 0.5]])
    made.b_dec.assign([10.0, 0.0])
    x = np.array([[12.0, 1.0]], np.float32)
    # Latent 0 gives x̂ = (11.2, 0), so that e = (0.8, 1) and the loss is 1.64.
    assert measure(made, x)["loss"] == pytest.approx(1.64)
    # Dead latents 1 and 2 have pre-activations 0 and 1: ê = (0, 0.5), without b_dec.
    made.idle_tokens.assign([0, 100, 100])
    assert measure(made, x)["loss"] == pytest.approx(1.64 + 0.64 + 0.25, rel=1e-5)
    # Latent 2 alive: nothing left to explain e with.
    made.idle_tokens.assign([0, 100, 99])
    assert measure(made, x)["loss"] == pytest.approx(1.64 + 1.64, rel=1e-5)


def test_auxk_revives_dead_latents():
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(32, 16)).astype(np.float32)
    sparse = draw.random((4_096, 32)) * (draw.random((4_096, 32)) < 0.08)
    rows = (sparse @ directions).astype(np.float32)
    dead = {}
    for coefficient in (0.0, 1 / 32):
        made = TopKAutoencoder(
            d_model=16, n_latents=32, k=3, dead_after=1_024, auxk_coefficient=coefficient
        )
        made.initialize(1.0, rows.mean(axis=0), decoder_norm=1.0, seed=0)
        weak = np.where(np.arange(32) < 16, 1.0, 0.01)[:, None].astype(np.float32)
        made.W_enc.assign(array(made.W_enc) * weak)  # half of them are never among the top three
        made.b_enc.assign(-array(made.W_enc) @ array(made.b_dec))
        made.compile(optimizer=keras.optimizers.Adam(3e-3))
        made.fit(rows, batch_size=128, epochs=6, verbose=0)
        dead[coefficient] = int(array(made.dead()).sum())
    assert dead[0.0] >= 12
    assert dead[1 / 32] <= 6


# --------------------------------------------------------------------------------- three backends


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What tests/on_backend.py writes on each backend, all from the same batches."""
    folder = tmp_path_factory.mktemp("backends")
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(40, 16))
    sparse = draw.random((50, 512, 40)) * (draw.random((50, 512, 40)) < 0.1)
    np.save(folder / "batches.npy", (sparse @ directions + 0.5).astype(np.float32))
    main("torch", folder, "train")
    in_its_own_process("jax", folder, "train")
    in_its_own_process("tensorflow", folder, "train", "load")
    in_its_own_process("jax", folder, "load")
    main("torch", folder, "load")
    return folder


def in_its_own_process(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_backend", *map(str, words)], cwd=ROOT,
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_products_are_the_plain_ones(trained, backend):
    given = product_inputs()
    queries, rows, values = given["queries"], given["rows"], given["values"]
    gathered = rows[given["indices"]]  # (batch, k, d_model)

    def scattered(weights, by):
        gradient = np.zeros_like(rows)
        np.add.at(gradient, given["indices"], np.einsum("bk,bd->bkd", weights, by))
        return gradient

    weights = given["weights_of_gathered_dot"]
    expected = {
        "gathered_dot": [
            np.einsum("bd,bkd->bk", queries, gathered),
            np.einsum("bk,bkd->bd", weights, gathered),
            scattered(weights, queries),
        ]
    }
    weights = given["weights_of_weighted_rows"]
    expected["weighted_rows"] = [
        np.einsum("bk,bkd->bd", values, gathered),
        np.einsum("bd,bkd->bk", weights, gathered),
        scattered(values, weights),
    ]
    for name, arrays in expected.items():
        with np.load(trained / backend / f"{name}.npz") as found:
            for number, wanted in enumerate(arrays):
                np.testing.assert_allclose(found[f"arr_{number}"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_train_alike(trained, kind):
    logs = {b: pd.read_csv(trained / b / kind / "training_log.csv") for b in BACKENDS}
    torch = logs["torch"]
    assert len(torch) == 50 and torch["fvu"].iloc[-1] < 0.9 * torch["fvu"].iloc[0]
    assert kind == "l1" or (torch["dead_fraction"] > 0.1).all()  # so that AuxK is at work
    for backend in BACKENDS[1:]:
        for name in ("loss", "fvu", "learning_rate"):
            np.testing.assert_allclose(logs[backend][name], torch[name], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saver", BACKENDS)
def test_a_model_saved_on_one_backend_is_the_same_on_the_others(trained, saver, kind):
    loaded = [np.load(trained / loader / f"of-{saver}-{kind}.npz") for loader in BACKENDS]
    for name in ("latents", "reconstruction"):
        first, *others = (found[name] for found in loaded)
        assert np.abs(first).max() > 1
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)
