"""What every autoencoder shares: scaling, starting weights, dead latents, the paper's recipe."""

import importlib

import keras
import numpy as np
import pytest
from hand_set import ACTIVATIONS, array, hand_set
from on_backend import loss_and_gradients, stand_in_for_store

from utils.autoencoder import training
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.callbacks import Rounds
from utils.autoencoder.kinds import KINDS
from utils.settings import read_settings


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """2,000 rows of width 16, sums of a few of 32 directions, far from the origin."""
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(32, 16))
    sparse = draw.random((2_000, 32)) * (draw.random((2_000, 32)) < 0.1)
    return (sparse @ directions + 2).astype(np.float32)


def built(rows: np.ndarray, *flags: object, total_steps: int = 20) -> SparseAutoencoder:
    """The autoencoder that train_autoencoder.py makes for these flags."""
    script = importlib.import_module("train_autoencoder")
    words = ["--n-latents", "48", "--k", "4", "--selection-dtype", "float32", *map(str, flags)]
    return training.build(read_settings(script, words), stand_in_for_store(rows), total_steps)


# ------------------------------------------------------------------------------ weights and scaling


def test_activations_are_centered_and_scaled():
    made = hand_set("l1")
    made.center.assign([-2.0, 4.0])
    moved = ACTIVATIONS + np.array([-2, 4], np.float32)  # so that x is what it is above
    assert array(made.normalise(moved)).tolist() == [[2, 3], [-1, 4]]
    assert array(made.denormalise(made.normalise(moved))).tolist() == moved.tolist()
    assert array(made.encode(moved)).tolist() == [[2, 2.5], [0, 3.5]]
    assert array(made(moved)).tolist() == [[9 - 2, 2.5 + 4], [1 - 2, 3.5 + 4]]


def test_decoder_norms_and_directions():
    made = hand_set("l1")
    made.W_dec.assign([[3.0, 4.0], [0.0, -2.0]])
    assert array(made.decoder_norms()).tolist() == [5, 2]
    assert made.directions().tolist() == [[3, 4], [0, -2]]


def test_initial_weights():
    mean, center = np.array([[1.0, 2.0, 0.0, -1.0], [1.0, 0.0, 0.0, 0.0]], np.float32)
    made = KINDS["l1"](d_model=4, n_latents=6)
    made.initialize(0.5, center, mean, decoder_norm=0.1, seed=3)
    np.testing.assert_allclose(array(made.decoder_norms()), 0.1, rtol=1e-6)
    assert np.array_equal(array(made.W_enc), array(made.W_dec))
    assert array(made.b_dec).tolist() == [0, 1, 0, -0.5]
    # The mean's pre-activations are zero: the encoder sees centred data.
    x = made.normalise(mean[None])
    np.testing.assert_allclose(array(made.pre_activations(x)), 0, atol=1e-7)
    again = KINDS["l1"](d_model=4, n_latents=6)
    again.initialize(0.5, center, mean, decoder_norm=0.1, seed=4)
    assert not np.array_equal(array(made.W_dec), array(again.W_dec))


@pytest.mark.parametrize("name", ["centered", "scalar", "none"])
def test_normalisers(rows, name):
    made = built(rows, "--kind", "l1", "--input-normalizer", name)
    x = array(made.normalise(rows))
    size = np.square(x).sum(1).mean()
    if name == "none":
        assert np.array_equal(x, rows)
    else:
        assert size == pytest.approx(16, rel=1e-4)
    expected = {"centered": np.zeros(16), "none": rows.mean(0)}
    expected["scalar"] = rows.mean(0) * np.sqrt(16 / np.square(rows).sum(1).mean())
    np.testing.assert_allclose(x.mean(0), expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(made.b_dec), x.mean(0), atol=1e-5)
    np.testing.assert_allclose(array(made.denormalise(x)), rows, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- dead latents


def test_a_silent_latent_is_dead_after_so_many_tokens():
    made = hand_set("topk", k=1, dead_after=5, auxk_coefficient=0.0)
    made.compile(optimizer=keras.optimizers.SGD(0.0))
    for tokens, dead in ((2, False), (4, False), (6, True)):
        made.train_on_batch(ACTIVATIONS)  # two tokens, on which latent 1 is active
        assert array(made.idle_tokens).tolist() == [tokens, 0]
        assert array(made.dead()).tolist() == [dead, False]
    made.evaluate(ACTIVATIONS, verbose=0)  # counts nothing
    assert array(made.idle_tokens).tolist() == [6, 0] and int(made.step) == 3
    made.train_on_batch(np.array([[4.0, 0.0]], np.float32))
    assert array(made.idle_tokens).tolist() == [0, 1]


def test_auxk_revives_dead_latents():
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(32, 16)).astype(np.float32)
    sparse = draw.random((4_096, 32)) * (draw.random((4_096, 32)) < 0.08)
    rows = (sparse @ directions).astype(np.float32)
    dead = {}
    for coefficient in (0.0, 1 / 32):
        made = KINDS["topk"](
            d_model=16, n_latents=32, k=3, dead_after=1_024, auxk_coefficient=coefficient
        )
        made.initialize(1.0, np.zeros(16), rows.mean(axis=0), decoder_norm=1.0, seed=0)
        weak = np.where(np.arange(32) < 16, 1.0, 0.01)[:, None].astype(np.float32)
        made.W_enc.assign(array(made.W_enc) * weak)  # half of them are never among the top three
        made.b_enc.assign(-array(made.W_enc) @ array(made.b_dec))
        made.compile(optimizer=keras.optimizers.Adam(3e-3))
        made.fit(rows, batch_size=128, epochs=4, verbose=0)
        dead[coefficient] = int(array(made.dead()).sum())
    assert dead[0.0] >= 12
    assert dead[1 / 32] <= 6


# ------------------------------------------------------------------------------------- the recipe


def test_the_price_of_activity_rises_over_its_warmup():
    made = hand_set("l1", sparsity_coefficient=5.0, sparsity_warmup=4)
    made.compile(optimizer=keras.optimizers.SGD(0.0))
    losses = []
    for _ in range(7):
        losses.append(made.train_on_batch(ACTIVATIONS, return_dict=True)["loss"])
        made.reset_metrics()
    # The squared error is 8.3125 and Σ f ‖W_dec‖ 3.5, as test_kinds.py works out.
    lambdas = [(loss - 8.3125) / 3.5 for loss in losses]
    assert lambdas == pytest.approx([0, 1.25, 2.5, 3.75, 5, 5, 5])
    assert int(made.step) == 7


def test_the_papers_recipe_step_by_step(rows):
    made = built(
        rows, "--kind", "l1", "--input-normalizer", "scalar", "--sparsity-coefficient", 5,
        "--learning-rate", 5e-5, total_steps=20,
    )  # fmt: skip
    np.testing.assert_allclose(array(made.decoder_norms()), 0.1, rtol=1e-5)
    x = array(made.normalise(rows[:100]))
    seen = []
    for step in range(20):
        seen.append((float(made.coefficient()), float(made.optimizer.learning_rate)))
        before = loss_and_gradients(made, x) if step == 1 else None
        momenta = [array(m) for m in getattr(made.optimizer, "_momentums", [])]
        made.train_on_batch(rows[:100])
        if before:
            assert_clipped(made, before, momenta)
    # λ rises in the first of the 20 steps, and the learning rate falls in the last 4.
    assert [price for price, _ in seen] == [0] + 19 * [5]
    expected = [5e-5] * 17 + [5e-5 * share for share in (0.75, 0.5, 0.25)]
    assert [rate for _, rate in seen] == pytest.approx(expected, rel=1e-5)


def assert_clipped(made, found: dict[str, np.ndarray], momenta: list[np.ndarray]) -> None:
    """Adam's momenta took a tenth of the gradient, which all in all had its norm cut to 1."""
    gradients = [found[weight.name] for weight in made.trainable_variables]
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients))
    assert norm > 1.5
    for gradient, before, after in zip(gradients, momenta, made.optimizer._momentums, strict=True):
        taken = (array(after) - 0.9 * before) / 0.1
        np.testing.assert_allclose(taken, gradient / norm, rtol=1e-3, atol=1e-5)


def test_default_learning_rates():
    l1, topk = (KINDS[kind].default_learning_rate for kind in ("l1", "topk"))
    assert l1(65_536, 200_000) == pytest.approx(5e-5)
    assert l1(65_536, 200_000 / 32) == pytest.approx(5e-5 * 32**0.875)
    assert l1(1_024, 275) == pytest.approx(1.6e-2, rel=0.01)
    assert topk(4_096, 10_000) == pytest.approx(2e-3)
    assert topk(65_536, 160_000) == pytest.approx(2e-3 / 4 / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_are_unit_where_the_kind_needs_it(rows, kind):
    norms = {
        given: array(built(rows, "--kind", kind, *flags).decoder_norms())
        for given, flags in {
            "nothing": [],
            "norm": ["--unit-decoder", False, "--decoder-norm", 0.3],
            "unit": ["--unit-decoder", True, "--decoder-norm", 0.3],
        }.items()
    }
    expected = {"nothing": 0.1 if kind in ("l1", "gated") else 1, "norm": 0.3, "unit": 1}
    for given, norm in expected.items():
        np.testing.assert_allclose(norms[given], norm, rtol=1e-5)


def test_rounds_are_alike_and_drop_less_than_a_step_each():
    assert Rounds.cut(1_000, 100) == Rounds(10, 100)
    assert Rounds.cut(7, 100) == Rounds(1, 7)
    assert Rounds.cut(199, 2) == Rounds(99, 2)
    for total in range(1, 400):
        rounds = Rounds.cut(total, 20)
        assert total - rounds.n_rounds < rounds.total_steps <= total
        assert rounds.steps < 2 * 20 and (rounds.steps >= 20 or rounds.n_rounds == 1)


# ------------------------------------------------------------------------------------ unit decoder


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_unit_decoder_stay_at_norm_1(rows, kind):
    made = built(rows, "--kind", kind, "--unit-decoder", True, "--learning-rate", 0.01)
    start = array(made.W_dec)
    for _ in range(3):
        made.train_on_batch(rows[:200])
        np.testing.assert_allclose(array(made.decoder_norms()), 1, rtol=1e-5)
    assert np.abs(array(made.W_dec) - start).max() > 0.01
