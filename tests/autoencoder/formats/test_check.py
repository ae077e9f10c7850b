"""The check on load: right autoencoders pass; wrong ones do not, and what is wrong is named."""

import dataclasses
import functools
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hand_set import array
from on_backend import stand_in_for_store

from utils.activations.store import ActivationStore
from utils.autoencoder import training
from utils.autoencoder.formats.check import Trial, check
from utils.autoencoder.formats.imported import Imported, Origin
from utils.autoencoder.kinds import KINDS
from utils.language_model import load_language_model, residual_at
from utils.settings import InputError, read_settings

BATCH, N_STEPS = 256, 300
WITH_K = "--k 6 --learning-rate 0.01 --selection-dtype float32"
WITH_PRICE = "--sparsity-coefficient 1 --learning-rate 0.005"
FLAGS = {
    "l1": WITH_PRICE,
    "gated": WITH_PRICE,
    "jumprelu": f"{WITH_PRICE} --sparsity-warmup 0.3",
    "topk": WITH_K,
    "batch_topk": WITH_K,
    "matryoshka": WITH_K,
}
SETTINGS = SimpleNamespace(
    held_out=0.05, n_held_out_tokens=1_000_000, batch_size=1_024, accept_mismatch=False
)


@pytest.fixture(scope="module")
def store(tiny_run) -> ActivationStore:
    """Activations of block 1 of 4, of width 32."""
    return ActivationStore(tiny_run.folder / "activations")


@pytest.fixture(scope="module")
def trained(store):
    """``trained(kind, normalizer)``: an autoencoder trained here as if another tool had been."""
    rows = store.kept_rows(store.split(0.05, 1_000_000).training).astype(np.float32)

    @functools.cache
    def make(kind: str, normalizer: str, n_latents: int = 128) -> Imported:
        return train(rows, kind, normalizer, n_latents)

    return make


def train(rows: np.ndarray, kind: str, normalizer: str, n_latents: int = 128) -> Imported:
    words = ["--kind", kind, "--input-normalizer", normalizer, "--n-latents", str(n_latents)]
    words += ["--batch-size", str(BATCH), *FLAGS[kind].split()]
    settings = read_settings(importlib.import_module("train_autoencoder"), words)
    made = training.build(settings, stand_in_for_store(rows), N_STEPS)
    draw = np.random.default_rng(0)
    batches = ((rows[draw.integers(0, len(rows), BATCH)],) for _ in range(N_STEPS))
    made.fit(batches, steps_per_epoch=N_STEPS, shuffle=False, verbose=0)
    counters = ("step", "idle_tokens")
    weights = {w.name: array(w).copy() for w in made.weights if w.name not in counters}
    options = {"k": made.k} if "k" in KINDS[kind].options() else {}
    return Imported(kind, options, weights, Origin("saelens", "layers.1"))


def with_weights(right: Imported, **changed: np.ndarray) -> Imported:
    return dataclasses.replace(right, weights={**right.weights, **changed})


def stating(imported: Imported, **said) -> Imported:
    return dataclasses.replace(imported, origin=dataclasses.replace(imported.origin, **said))


def refusal(imported: Imported, store: ActivationStore, settings=SETTINGS) -> str:
    """What the check says, which puts the weights back whatever it finds."""
    autoencoder = imported.build()
    before = [array(weight).copy() for weight in autoencoder.weights]
    try:
        with pytest.raises(InputError) as caught:
            check(imported, autoencoder, store, settings)
    finally:
        for weight, earlier in zip(autoencoder.weights, before, strict=True):
            np.testing.assert_array_equal(array(weight), earlier)
    return str(caught.value)


def figures(imported: Imported, store: ActivationStore):
    return Trial(imported.build(), store, SETTINGS).as_read()


@pytest.mark.parametrize("normalizer", ["centered", "scalar"])
@pytest.mark.parametrize("kind", FLAGS)
def test_a_right_one_passes(kind, normalizer, store, trained, capsys):
    right = trained(kind, normalizer)
    reached = figures(right, store)
    right = stating(right, fvu=1.1 * reached.fvu, l0=0.9 * reached.l0, dtype="bfloat16")
    dead_fraction = check(right, right.build(), store, SETTINGS)
    printed = capsys.readouterr().out
    assert f"FVU {reached.fvu:.3f} (its source states {1.1 * reached.fvu:.3g})" in printed
    assert f"{dead_fraction:.2%} of the latents are dead." in printed
    assert "stored in bfloat16" in printed
    assert "could not be tried" not in printed  # other layers were


# ---------------------------------------------------------------------------- each fault by itself


def b_dec_forgotten(right: Imported) -> Imported:
    """As a tool that subtracts b_dec stores it: its b_enc is ours + W_enc b_dec."""
    of_b_dec = right.weights["W_enc"] @ right.weights["b_dec"]
    return with_weights(right, b_enc=right.weights["b_enc"] + of_b_dec)


def b_dec_taken_twice(right: Imported) -> Imported:
    of_b_dec = right.weights["W_enc"] @ right.weights["b_dec"]
    return with_weights(right, b_enc=right.weights["b_enc"] - of_b_dec)


def scale_forgotten(right: Imported) -> Imported:
    return with_weights(right, scale=np.float32(1))


def centre_forgotten(right: Imported) -> Imported:
    return with_weights(right, center=np.zeros_like(right.weights["center"]))


def both_forgotten(right: Imported) -> Imported:
    return centre_forgotten(scale_forgotten(right))


def threshold_too_high(right: Imported) -> Imported:
    """That of unscaled activations, which are larger here."""
    if "threshold" in right.weights:
        return with_weights(right, threshold=right.weights["threshold"] / right.weights["scale"])
    log_threshold = right.weights["log_threshold"] - np.log(right.weights["scale"])
    return with_weights(right, log_threshold=log_threshold)


def threshold_too_low(right: Imported) -> Imported:
    return with_weights(right, threshold=right.weights["threshold"] * right.weights["scale"])


SCALED = "activations are scaled to E‖x‖² = d_model"
CENTRED = "the mean of the activations is subtracted from them"
HIGHER, LOWER = "thresholds are those of scaled", "thresholds are those of unscaled"
FAULTS = [
    (b_dec_forgotten, "topk scalar", "b_dec is subtracted from the input"),
    (b_dec_forgotten, "l1 scalar", "b_dec is subtracted from the input"),
    (b_dec_taken_twice, "jumprelu scalar", "b_dec is not subtracted from the input"),
    (scale_forgotten, "l1 scalar", SCALED),
    (scale_forgotten, "topk scalar", SCALED),
    (centre_forgotten, "topk centered", CENTRED),
    (centre_forgotten, "gated centered", CENTRED),
    (both_forgotten, "l1 centered", f"{CENTRED} and {SCALED}"),
    (threshold_too_high, "jumprelu scalar", f"{LOWER} activations"),
    (threshold_too_high, "batch_topk centered", f"{LOWER} activations"),
    (threshold_too_low, "matryoshka scalar", f"{HIGHER} activations"),
]


@pytest.mark.parametrize(
    ("spoil", "which", "convention"), FAULTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_fault_is_named(spoil, which, convention, store, trained):
    message = refusal(spoil(trained(*which.split())), store)
    assert f" It fits if {convention}: " in message
    assert message.endswith("To take it as it is read: --accept-mismatch.")


def test_a_transposed_decoder_is_named(store, trained):
    right = trained("topk", "scalar", 32)
    check(right, right.build(), store, SETTINGS)
    wrong = with_weights(right, W_dec=right.weights["W_dec"].T.copy())
    assert " It fits if W_dec is transposed: " in refusal(wrong, store)


@pytest.fixture(scope="module")
def of_next_block(store) -> Imported:
    """An autoencoder of block 2, where the activations are those of block 1."""
    language_model = load_language_model(store.model_name, 2, "float32")
    tokens = torch.from_numpy(store.read("tokens", range(store.n_contexts)))
    kept = torch.from_numpy(store.read("kept", range(store.n_contexts)))
    return train(residual_at(language_model, tokens, 2)[kept].numpy(), "topk", "scalar")


def test_another_layer_is_named(store, of_next_block):
    assert " It fits if it reads the output of block 2, which --layer 2 saves: " in refusal(
        of_next_block, store
    )


def test_where_the_model_is_missing_other_layers_are_not_tried(store, of_next_block, capsys):
    elsewhere = ActivationStore(store.folder)
    elsewhere.model_name = str(store.folder / "none")
    check(of_next_block, of_next_block.build(), elsewhere, SETTINGS)
    assert "Other layers could not be tried. " in capsys.readouterr().out


# ------------------------------------------------------------------------------- stated figures


def test_only_a_stated_l0_tells_that_a_jumprelu_has_too_low_thresholds(store, trained):
    """With lower ones it reconstructs better."""
    right = trained("jumprelu", "centered")
    low = right.weights["log_threshold"] + np.log(right.weights["scale"])
    wrong = with_weights(right, log_threshold=low)
    assert figures(wrong, store).fvu < figures(right, store).fvu
    check(wrong, wrong.build(), store, SETTINGS)
    l0 = figures(right, store).l0
    message = refusal(stating(wrong, l0=l0), store)
    assert f"and its source states {l0:.3g}. It fits if {HIGHER} activations: " in message


def test_a_stated_figure_that_nothing_explains(store, trained, capsys):
    right = stating(trained("topk", "scalar"), fvu=0.01)
    message = refusal(right, store)
    assert "and its source states 0.01. None of the conventions tried explains it" in message
    accepting = SimpleNamespace(**{**vars(SETTINGS), "accept_mismatch": True})
    check(right, right.build(), store, accepting)
    assert f"Accepted: {message.removesuffix(' To take it as it is read: --accept-mismatch.')}" in (
        capsys.readouterr().out
    )


def test_a_lower_fvu_than_stated_is_no_fault_for_as_many_latents(store, trained):
    right = trained("jumprelu", "scalar")
    reached = figures(right, store)
    stated = stating(right, fvu=1.5 * reached.fvu)
    check(stating(stated, l0=reached.l0), right.build(), store, SETTINGS)
    assert f"and its source states {1.5 * reached.fvu:.3g}" in refusal(stated, store)


def test_figures_of_a_source_that_counts_bos_and_outliers(store, trained, capsys):
    right = trained("topk", "centered")
    calmer = ActivationStore(store.folder)
    for shard in calmer.shards:
        shard.outlier_norm = 0.9 * float(np.median(shard["norms"]))
    everywhere = Trial(right.build(), calmer, SETTINGS).with_bos()
    assert abs(figures(right, calmer).fvu / everywhere.fvu - 1) > 0.2
    stated = stating(right, fvu=everywhere.fvu)
    check(stated, stated.build(), calmer, SETTINGS)
    assert f"With BOS and outliers, which its source counts, it has {everywhere}, as stated." in (
        capsys.readouterr().out
    )


def test_stated_dead_latents_that_are_active_are_a_fault(store, trained):
    right = trained("topk", "scalar")
    check(stating(right, dead_fraction=0.0), right.build(), store, SETTINGS)
    assert "its source states 99.0%" in refusal(stating(right, dead_fraction=0.99), store)


def test_weights_that_do_nothing(store, trained):
    right = trained("jumprelu", "scalar")
    silent = with_weights(right, log_threshold=right.weights["log_threshold"] + 50)
    message = refusal(silent, store)
    assert "no latent is active" in message and "None of the conventions" in message


def test_conventions_that_these_activations_do_not_tell_apart(store, trained):
    """Latents that are `scale` times as large, with decoder rows of norm 1 / scale.

    Their thresholds, left as they were, may be those of unscaled activations, or not divided by
    norms: here the two are the same.
    """
    right = trained("jumprelu", "scalar")
    scale = right.weights["scale"]
    larger = {name: right.weights[name] * scale for name in ("W_enc", "b_enc")}
    message = refusal(with_weights(right, **larger, W_dec=right.weights["W_dec"] / scale), store)
    assert f" It fits if {LOWER} activations: " in message
    assert "do not tell that from: thresholds are those of latents times their decoder" in message


def test_an_import_on_tensorflow_loads_the_language_model_too(tiny_run, run_script, tmp_path):
    """PyTorch's libraries crash where TensorFlow's are loaded first."""
    own, folder = tiny_run.folder, tmp_path / "autoencoder"
    run_script(
        "train_autoencoder", "--import-from", own / "autoencoder", "--backend", "tensorflow",
        "--activations-dir", own / "activations", "--autoencoder-dir", folder,
    )  # fmt: skip
    imported, trained = (
        json.loads((one / "metrics.json").read_text()) for one in (folder, own / "autoencoder")
    )
    assert imported["fvu"] == pytest.approx(trained["fvu"], rel=1e-4)
