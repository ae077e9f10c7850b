"""The kinds: known answers of each, its gradients, its options."""

import importlib

import keras
import numpy as np
import pytest
from hand_set import ACTIVATIONS, array, hand_set
from keras import ops
from on_backend import loss_and_gradients, stand_in_for_store
from planted import make_planted

from utils.autoencoder import training
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.kinds import KINDS, find_kind
from utils.autoencoder.saved import load_autoencoder, save_autoencoder
from utils.settings import InputError, read_settings

# Of `hand_set`: x = [[5, 6], [1, 2]], and the pre-activations are [[5, 5.5], [1, 1.5]].
UNEVEN = np.array([[10.0, 12.0], [2.0, 4.0]], np.float32)


def trained_on(made: SparseAutoencoder, activations) -> dict[str, np.ndarray]:
    """What a training step computes of raw activations, as NumPy arrays.

    The ``losses`` too, numbers by name, which are those that the kind declares.
    """
    x = made.normalise(activations)
    passed = made.forward_pass(x)
    losses = {name: float(array(term)) for name, term in made.loss_terms(x, passed).items()}
    assert tuple(losses) == made.loss_names
    return {"losses": losses} | {
        name: array(value) for name, value in passed.items() if name != "prefixes"
    }


# ----------------------------------------------------------------------------------- known answers


def test_l1():
    made = hand_set("l1", sparsity_coefficient=5.0)
    assert array(made.encode(ACTIVATIONS)).tolist() == [[2, 2.5], [0, 3.5]]
    # x̂ = [[0.5 + 4, 1.25], [0.5, 1.75]], and raw it is twice that.
    assert array(made(ACTIVATIONS)).tolist() == [[9, 2.5], [1, 3.5]]
    passed = trained_on(made, ACTIVATIONS)
    assert passed["reconstruction"].tolist() == [[4.5, 1.25], [0.5, 1.75]]
    # ‖x − x̂‖²: 6.25 + 3.0625 and 2.25 + 5.0625; Σ f ‖W_dec‖: 4 + 1.25 and 1.75.
    expected = {"reconstruction": (9.3125 + 7.3125) / 2, "sparsity": 5 * (5.25 + 1.75) / 2}
    assert passed["losses"] == pytest.approx(expected)
    assert passed["l0"] == 1.5 and passed["active"].tolist() == [True, True]


def test_evaluating_gives_squared_error_and_fvu():
    made = hand_set("l1", sparsity_coefficient=5.0)
    made.compile(optimizer=keras.optimizers.SGD(0.0))
    measured = made.evaluate(ACTIVATIONS, batch_size=64, verbose=0, return_dict=True)
    assert measured["loss"] == pytest.approx((9.3125 + 7.3125) / 2)
    # Around its mean (0.5, 3.5), x has squares 2.25 + 0.25 twice.
    assert measured["fvu"] == pytest.approx((9.3125 + 7.3125) / 5)


def test_gated():
    made = hand_set("gated", sparsity_coefficient=5.0)
    # m = 2 · (2, -1) + 3 = (7, 1) and (3, 4) - 3 = (0, 1); latent 0 is gated off in row 1, where
    # its π is -1, and latent 1 is silent in row 0, where its π is 2.5.
    assert array(made.encode(ACTIVATIONS)).tolist() == [[7, 0], [0, 1]]
    assert array(made(ACTIVATIONS)).tolist() == [[29, 0], [1, 1]]
    passed = trained_on(made, ACTIVATIONS)
    assert passed["reconstruction"].tolist() == [[14.5, 0], [0.5, 0.5]]
    assert passed["l0"] == 1
    # ‖x − x̂‖²: 156.25 + 9 and 2.25 + 12.25; of π as latents: what `l1` has, error and penalty.
    assert passed["losses"] == pytest.approx(
        {
            "reconstruction": (165.25 + 14.5) / 2,
            "sparsity": 5 * (5.25 + 1.75) / 2,
            "auxiliary": (9.3125 + 7.3125) / 2,
        }
    )


def test_gated_decoder_learns_from_its_own_error_alone():
    made = hand_set("gated", sparsity_coefficient=5.0)
    found = loss_and_gradients(made, 0.5 * ACTIVATIONS)
    # Σ_rows f (x̂ − x), as the 2 of the square cancels the 2 rows: x̂ − x = (12.5, −3), (1.5, −3.5).
    np.testing.assert_allclose(found["W_dec"], [[87.5, -21], [1.5, -3.5]], rtol=1e-6)
    np.testing.assert_allclose(found["b_dec"], [14, -6.5], rtol=1e-6)
    # Through f: (x̂ − x) · W_dec = 25 for latent 0 in row 0, and −1.75 for latent 1 in row 1.
    np.testing.assert_allclose(found["b_mag"], [25, -1.75], rtol=1e-6)
    np.testing.assert_allclose(found["r_mag"], [25 * 4, -1.75 * 4], rtol=1e-6)
    # π learns from the penalty, λ ‖W_dec‖ / 2 for each row it is active in, and as latents of its
    # own, whose x̂ − x is (2.5, −1.75) and (1.5, −2.25): 5 + 2.5 · 2 and
    # 1.25 + 1.25 − (1.75 + 2.25) · 0.5. The magnitudes leave b_enc alone.
    np.testing.assert_allclose(found["b_enc"], [10, 0.5], rtol=1e-6)


def jumprelu(**options) -> SparseAutoencoder:
    """θ = (1.1, 3.4), so that π − θ is [[0.9, −0.9], [−2.1, 0.1]]; the ramp is from −1 to 1."""
    return hand_set("jumprelu", bandwidth=2.0, tanh_scale=0.25, **options)


def test_jumprelu():
    made = jumprelu(sparsity_coefficient=5.0, preactivation_coefficient=0.1)
    assert array(made.encode(ACTIVATIONS)).tolist() == [[2, 0], [0, 3.5]]
    assert array(made(ACTIVATIONS)).tolist() == [[9, 0], [1, 3.5]]
    passed = trained_on(made, ACTIVATIONS)
    assert passed["reconstruction"].tolist() == [[4.5, 0], [0.5, 1.75]]
    assert passed["l0"] == 1
    # ‖x − x̂‖²: 6.25 + 9 and 2.25 + 5.0625. f ‖W_dec‖: 4 and 1.75.
    # ReLU(θ − π) ‖W_dec‖: 0.9 · 0.5 and 2.1 · 2.
    assert passed["losses"] == pytest.approx(
        {
            "reconstruction": (15.25 + 7.3125) / 2,
            "sparsity": 5 * (np.tanh(0.25 * 4) + np.tanh(0.25 * 1.75)) / 2,
            "preactivation": 0.1 * (0.45 + 4.2) / 2,
        }
    )


def test_jumprelu_gradient_is_that_of_the_ramp():
    made = jumprelu(sparsity_coefficient=0.0, preactivation_coefficient=0.1)
    found = loss_and_gradients(made, 0.5 * ACTIVATIONS)
    # By f, (x̂ − x) · W_dec: [[2.5 · 2, −3 · 0.5], [1.5 · 2, −2.25 · 0.5]].
    # f by θ is −π / 2 within the ramp: [[−1, −1.25], [0, −1.75]]; and θ by its logarithm is θ.
    # λ_P adds ‖W_dec‖ / 2 for each row below the threshold: one each.
    by_threshold = [5 * -1 + 0.1, -1.5 * -1.25 - 1.125 * -1.75 + 0.1 * 0.25]
    np.testing.assert_allclose(
        found["log_threshold"], np.multiply(by_threshold, [1.1, 3.4]), rtol=1e-5
    )
    # f by π is the step and π / 2 within the ramp: [[1 + 1, 1.25], [0, 1 + 1.75]].
    by_pre_activation = np.array([[5 * 2, -1.5 * 1.25 - 0.025], [-0.1, -1.125 * 2.75]])
    np.testing.assert_allclose(found["b_enc"], by_pre_activation.sum(0), rtol=1e-5)
    np.testing.assert_allclose(found["W_enc"], by_pre_activation.T @ [[2, 3], [-1, 4]], rtol=1e-5)


def test_jumprelu_price_moves_thresholds_up():
    found = [
        loss_and_gradients(
            jumprelu(sparsity_coefficient=price, preactivation_coefficient=0.0), 0.5 * ACTIVATIONS
        )["log_threshold"]
        for price in (0.0, 1.0)
    ]
    # tanh(c f ‖W_dec‖) by f is c ‖W_dec‖ / cosh², which at f = 0 is c ‖W_dec‖; by θ as above.
    by_latent = [
        0.5 / np.cosh(1.0) ** 2 * -1,
        0.125 * -1.25 + 0.125 / np.cosh(0.4375) ** 2 * -1.75,
    ]
    expected = np.multiply(by_latent, [1.1, 3.4]) / 2  # a mean of two rows
    np.testing.assert_allclose(found[1] - found[0], expected, rtol=1e-5)
    assert (expected < 0).all()  # downhill is up


def test_topk():
    made = hand_set("topk", k=1)
    chosen, values = made.encode_chosen(ACTIVATIONS)
    assert array(values).tolist() == [2.5, 3.5] and array(chosen.latent).tolist() == [1, 1]
    assert array(made.encode(ACTIVATIONS)).tolist() == [[0, 2.5], [0, 3.5]]
    assert array(made(ACTIVATIONS)).tolist() == [[1, 2.5], [1, 3.5]]
    passed = trained_on(made, ACTIVATIONS)
    assert passed["reconstruction"].tolist() == [[0.5, 1.25], [0.5, 1.75]]
    expected = {"reconstruction": (2.25 + 3.0625 + 2.25 + 5.0625) / 2, "auxiliary": 0}
    assert passed["losses"] == pytest.approx(expected)
    assert passed["l0"] == 1 and passed["active"].tolist() == [False, True]


def test_topk_whose_largest_is_negative_is_silent():
    made = hand_set("topk", k=1)
    silent = np.array([[-2.0, 0.0]], np.float32)  # pre-activations (-1, -0.5)
    assert array(made.encode(silent)).tolist() == [[0, 0]]
    assert array(made(silent)).tolist() == [[1, 0]]
    passed = trained_on(made, silent)
    assert passed["l0"] == 0 and not passed["active"].any()
    assert passed["losses"]["reconstruction"] == pytest.approx(1.5**2)


def test_auxk_is_made_of_dead_latents_without_the_bias():
    made = KINDS["topk"](d_model=2, n_latents=3, k=1, auxk_coefficient=1.0, dead_after=100)
    made.W_enc.assign([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    made.W_dec.assign([[0.1, 0.0], [5.0, 5.0], [0.0, 0.5]])
    made.b_dec.assign([10.0, 0.0])
    x = np.array([[12.0, 1.0]], np.float32)
    for idle, auxiliary in (
        ([0, 0, 0], 0),
        # Latent 0 gives x̂ = (11.2, 0), so that e = (0.8, 1).
        # Dead latents 1 and 2 have pre-activations 0 and 1: ê = (0, 0.5), without b_dec.
        ([0, 100, 100], 0.64 + 0.25),
        # Latent 2 alive: nothing left to explain e with.
        ([0, 100, 99], 1.64),
    ):
        made.idle_tokens.assign(idle)
        losses = trained_on(made, x)["losses"]
        assert losses == pytest.approx({"reconstruction": 1.64, "auxiliary": auxiliary}, rel=1e-5)


def test_batch_topk_shares_its_latents_among_the_rows():
    made = hand_set("batch_topk", k=1)
    passed = trained_on(made, UNEVEN)  # both are the first row's
    assert passed["reconstruction"].tolist() == [[10.5, 2.75], [0.5, 0]]
    # ‖x − x̂‖²: 5.5² + 3.25² and 0.25 + 4.
    assert passed["losses"]["reconstruction"] == pytest.approx((30.25 + 10.5625 + 0.25 + 4) / 2)
    assert passed["l0"] == 1
    assert float(made.threshold) == 5  # the smaller of them
    made.step.assign(1)
    trained_on(made, ACTIVATIONS)  # chooses 2.5 and 3.5
    assert float(made.threshold) == 3.75
    made.step.assign(1_000)
    trained_on(made, UNEVEN)
    assert float(made.threshold) == pytest.approx(3.75 + (5 - 3.75) / 20)


def test_batch_topk_encodes_by_its_threshold():
    made = hand_set("batch_topk", k=1)
    made.threshold.assign(2.25)
    assert array(made.encode(ACTIVATIONS)).tolist() == [[0, 2.5], [0, 3.5]]
    assert array(made(ACTIVATIONS)).tolist() == [[1, 2.5], [1, 3.5]]
    made.threshold.assign(2.5)  # what is just as large is not above it
    assert array(made.encode(ACTIVATIONS)).tolist() == [[0, 0], [0, 3.5]]
    assert array(made.encode(UNEVEN)).tolist() == [[5, 5.5], [0, 0]]
    trained_on(made, UNEVEN)
    fixed = float(made.threshold)
    made(ACTIVATIONS), made.encode_active(ACTIVATIONS)
    assert float(made.threshold) == fixed == 5


def test_batch_topk_gives_a_row_at_most_4_k():
    made = KINDS["batch_topk"](d_model=8, n_latents=8, k=1)
    made.W_enc.assign(np.eye(8))
    x = np.full((6, 8), -1.0, np.float32)
    x[0] = np.arange(10, 18)
    x[1:, 0] = [1, 2, 3, 4, 5]
    active = np.zeros((6, 8))
    active[0, 4:], active[4:, 0] = x[0, 4:], [4, 5]
    chosen = made.choose(ops.convert_to_tensor(x))[0]
    dense = array(chosen.dense(chosen.dot(ops.convert_to_tensor(x), made.W_enc)))
    assert dense.tolist() == active.tolist()


def test_batch_topk_chooses_nothing_that_is_not_positive():
    made = hand_set("batch_topk", k=1)
    rows = np.array(
        [[4.0, -2.0], [-2.0, -4.0]], np.float32
    )  # pre-activations (2, −1.5), (−1, −2.5)
    assert trained_on(made, rows)["l0"] == 0.5
    assert float(made.threshold) == 0
    found = loss_and_gradients(made, 0.5 * rows[1:])  # none is chosen
    assert found["loss"] == pytest.approx(1.5**2 + 4)
    assert not found["W_enc"].any() and not found["W_dec"].any() and found["b_dec"].all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_topk_chooses_as_many_in_either_precision(dtype):
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    made = KINDS["batch_topk"](d_model=16, n_latents=96, k=5, selection_dtype=dtype)
    made.initialize(1.0, np.zeros(16), np.zeros(16), 1.0, seed=0)
    passed = trained_on(made, x)
    assert passed["l0"] == 5
    per_row = (array(made.encode(x)) >= float(made.threshold)).sum(1)
    assert len(set(per_row.tolist())) > 3


def test_matryoshka():
    made = hand_set("matryoshka", k=1, prefixes=(0.5, 1.0))
    passed = trained_on(made, UNEVEN)
    assert passed["reconstruction"].tolist() == [[10.5, 2.75], [0.5, 0]]
    # Without latent 1, x̂ = [[10.5, 0], [0.5, 0]]: 5.5² + 6² and 0.25 + 4.
    whole, first = (30.25 + 10.5625 + 4.25) / 2, (30.25 + 36 + 4.25) / 2
    assert passed["losses"] == pytest.approx(
        {"reconstruction": (whole + first) / 2, "auxiliary": 0}
    )
    assert float(made.threshold) == 5
    assert array(made.encode(UNEVEN)).tolist() == [[0, 5.5], [0, 0]]


# -------------------------------------------------------------------------------------- every kind


def initialised(kind: str, rows: np.ndarray, n_latents: int = 24) -> SparseAutoencoder:
    options = {"k": 3} if "k" in KINDS[kind].options() else {}
    made = KINDS[kind](d_model=rows.shape[1], n_latents=n_latents, **options)
    mean = rows.mean(axis=0)
    made.initialize(0.7, 0.5 * mean, mean, 0.5, seed=0)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_active_latents_are_the_dense_ones(kind):
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 1
    made = initialised(kind, rows)
    row, feature, values, reconstruction = made.encode_active(rows)
    latents = array(made.encode(rows))
    dense = np.zeros_like(latents)
    dense[row, feature] = values
    np.testing.assert_allclose(dense, latents, atol=1e-6)
    assert (values > 0).all() and (np.diff(row) >= 0).all() and len(row) == (latents > 0).sum()
    np.testing.assert_allclose(reconstruction, array(made(rows)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_has_its_options_and_weights(kind, tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 1
    made = initialised(kind, rows)
    made.compile(optimizer=keras.optimizers.Adam(0.01))
    made.train_on_batch(rows)
    save_autoencoder(made, tmp_path / "autoencoder.keras")
    loaded = load_autoencoder(tmp_path / "autoencoder.keras")
    assert type(loaded) is type(made)
    for option in made.options():
        assert getattr(loaded, option) == getattr(made, option), option
    assert np.array_equal(array(loaded(rows)), array(made(rows)))


def test_trained_thresholds_differ_and_rise():
    rows = make_planted(2_000, d_model=16, n_features=48, n_active=3, n_pairs=0).rows
    made = KINDS["jumprelu"](d_model=16, n_latents=48, sparsity_coefficient=1.0, tanh_scale=4)
    made.initialize(stand_in_for_store(rows).scale, np.zeros(16), rows.mean(axis=0), 0.1, seed=0)
    made.compile(optimizer=keras.optimizers.Adam(0.01))
    made.fit(rows, batch_size=100, epochs=3, verbose=0)
    found = array(made.threshold())
    assert np.median(found) > 0.12 and found.std() > 0.01  # all were 0.1


def test_fewer_latents_are_active_the_higher_their_price():
    rows = make_planted(1_000, d_model=16, n_features=48, n_active=3, n_pairs=0).rows
    script = importlib.import_module("train_autoencoder")
    for kind in ("l1", "gated", "jumprelu"):
        active = []
        for price in (2, 5, 10):
            flags = ["--kind", kind, "--n-latents", "64", "--sparsity-coefficient", str(price)]
            settings = read_settings(script, [*flags, "--learning-rate", "0.01"])
            made = training.build(settings, stand_in_for_store(rows), 60)
            made.fit(rows, batch_size=100, epochs=6, verbose=0)
            active.append(float((array(made.encode(rows)) > 0).sum(1).mean()))
        assert active[0] > 1.1 * active[1] > 1.1**2 * active[2] > 0, (kind, active)


# ----------------------------------------------------------------------------------------- options


def test_an_unknown_kind_suggests_the_nearest():
    assert find_kind("topk") is KINDS["topk"]
    names = "l1, gated, jumprelu, topk, batch_topk, matryoshka"
    for given, near in (("topkk", "topk"), ("batchtopk", "batch_topk"), ("jumpreu", "jumprelu")):
        rule = rf"one of {names}; it is '{given}'\. Did you mean '{near}'\?"
        with pytest.raises(InputError, match=rule):
            find_kind(given)
    with pytest.raises(InputError, match=r"it is 'vanilla'\.$"):
        find_kind("vanilla")


def check_options(*flags: str) -> None:
    script = importlib.import_module("train_autoencoder")
    training.check_options(read_settings(script, list(flags)), script)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("--kind l1 --k 16", "K is an option of topk, batch_topk, matryoshka; KIND is 'l1', and"),
        ("--kind topk --bandwidth 1", "BANDWIDTH is an option of jumprelu; KIND is 'topk'"),
        ("--kind topk --sparsity-coefficient 4", "SPARSITY_COEFFICIENT is an option of l1, gated,"),
        ("--kind batch_topk --prefixes 0.5 1", "PREFIXES is an option of matryoshka; KIND is"),
        ("--kind gated --selection-dtype float32", "SELECTION_DTYPE is an option of topk, batch_"),
        ("--kind topkk", "Did you mean 'topk'"),
        ("--kind topk --k 129 --n-latents 128", "K must be at most N_LATENTS, 128; it is 129"),
        ("--kind matryoshka --n-latents 32", "K must be at most N_LATENTS, 32; it is 64"),
    ],
)
def test_options_that_the_kind_cannot_have_are_refused(flags, rule):
    with pytest.raises(InputError, match=rule):
        check_options(*flags.split())


@pytest.mark.parametrize("kind", KINDS)
def test_options_at_their_default_and_of_the_kind_pass(kind):
    check_options("--kind", kind, "--k", "64", "--bandwidth", "2.0")
    if "k" not in KINDS[kind].options():
        check_options("--kind", kind, "--n-latents", "32")  # fewer than K's default
    own = {"k": ["--k", "5"], "sparsity_coefficient": ["--sparsity-coefficient", "4"]}
    for option, flags in own.items():
        if option in KINDS[kind].options():
            check_options("--kind", kind, *flags)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("--learning-rate 0", "LEARNING_RATE must be greater than 0; it is 0.0"),
        ("--learning-rate -0.1", "LEARNING_RATE must be greater than 0"),
        ("--k 0", "K must be greater than 0; it is 0"),
        ("--bandwidth 0", "BANDWIDTH must be greater than 0"),
        ("--sparsity-coefficient -1", "SPARSITY_COEFFICIENT must not be negative; it is -1.0"),
        ("--sparsity-warmup 1.1", "SPARSITY_WARMUP must be a share from 0 to 1; it is 1.1"),
        ("--learning-rate-decay -0.1", "LEARNING_RATE_DECAY must be a share from 0 to 1"),
        ("--held-out 0", "HELD_OUT must be between 0 and 1; it is 0.0"),
        ("--prefixes 0.5 0.25 1", r"PREFIXES must be shares that rise to 1; they are \(0.5, 0.25"),
        ("--prefixes 0.5 0.75", r"PREFIXES must be shares that rise to 1; they are \(0.5, 0.75\)"),
        ("--prefixes 0 1", "PREFIXES must be shares that rise to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, rule):
    script = importlib.import_module("train_autoencoder")
    script.check(read_settings(script, []))
    with pytest.raises(InputError, match=rule):
        script.check(read_settings(script, flags.split()))


def test_prefixes_are_given_as_numbers():
    script = importlib.import_module("train_autoencoder")
    settings = read_settings(script, ["--kind", "matryoshka", "--prefixes", "0.25", "1"])
    script.check(settings)
    assert settings.prefixes == (0.25, 1.0)
