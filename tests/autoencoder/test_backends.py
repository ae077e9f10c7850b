"""Three backends, one answer: chosen latents, gradients of a step, trainings, saved models."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK_TO_COMPILE, ROOT, environment, write_activations
from on_backend import N_STEPS, STEP_KINDS, TRAINED, main, product_inputs, step_inputs

BACKENDS = ("torch", "jax", "tensorflow")


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """What tests/on_backend.py writes on each backend, all from the same activations."""
    folder = tmp_path_factory.mktemp("backends")
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(40, 16))
    shape = (210, 64)
    sparse = draw.random((*shape, 40)) * (draw.random((*shape, 40)) < 0.1)
    zeros = {name: np.zeros(shape, np.int32) for name in ("tokens", "documents", "subsets")}
    arrays = {"activations": sparse @ directions + 0.5, "norms": np.ones(shape), **zeros}
    (folder / "store").mkdir()
    write_activations(folder / "store", arrays, per_shard=80, storage_dtype="float32")
    with ThreadPoolExecutor(1) as pool:
        jax = pool.submit(in_its_own_process, "jax", folder, "compute")
        main("torch", folder, "compute")
        jax.result()
        in_its_own_process("tensorflow", folder, "compute", "load")
        jax = pool.submit(in_its_own_process, "jax", folder, "load")
        main("torch", folder, "load")
        jax.result()
    return folder


def in_its_own_process(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_backend", *map(str, words)], cwd=ROOT,
        env=environment(XLA_FLAGS=QUICK_TO_COMPILE), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------- chosen latents


def dense_products(kept: np.ndarray) -> dict[str, np.ndarray]:
    """The products and their gradients, by a dense (batch, n_latents)."""
    given = product_inputs()
    queries, rows, biases, by_row = (given[n] for n in ("queries", "rows", "biases", "by_row"))
    batch = np.arange(7)[:, None]
    is_chosen = np.zeros((7, 11), np.float32)
    is_chosen[batch, given["indices"]] = kept

    def scattered(values):
        dense = np.zeros((7, 11), np.float32)
        dense[batch, given["indices"]] = values * kept
        return dense

    def gathered(dense):
        return (dense * is_chosen)[batch, given["indices"]]

    by_choice, values = scattered(given["by_choice"]), scattered(given["values"])
    row, latent = np.nonzero(values > 0)
    return {
        "dot": gathered(queries @ rows.T),
        "dot_by_queries": by_choice @ rows,
        "dot_by_rows": by_choice.T @ queries,
        "take": gathered(np.broadcast_to(biases, (7, 11))),
        "take_by_biases": by_choice.sum(0),
        "sum": values @ rows,
        "sum_by_values": gathered(by_row @ rows.T),
        "sum_by_rows": values.T @ by_row,
        "dense": values,
        "active": (values > 0).any(0),
        "positive_places": np.stack([row, latent]),
        "positive": values[row, latent],
    }


@pytest.mark.parametrize("form", ["all", "kept", "parts"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_the_dense_ones(computed, backend, form):
    kept = np.ones((7, 3), bool) if form == "all" else product_inputs()["kept"]
    found = dict(np.load(computed / backend / f"products-{form}.npz"))
    order = np.lexsort((found["latent"], found["row"]))
    assert (np.diff(found["row"]) >= 0).all()
    found["positive_places"] = np.stack([found.pop("row"), found.pop("latent")])[:, order]
    found["positive"] = found["positive"][order]
    expected = dense_products(kept)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------- whole steps


def dense_step(kind: str) -> dict[str, np.ndarray]:
    """Loss and gradients by the equations, in float64, every latent of every row computed."""
    given = {n: torch.tensor(v, dtype=torch.float64) for n, v in step_inputs().items()}
    x, idle = given.pop("x"), given.pop("idle_tokens")
    weights = {name: value.requires_grad_() for name, value in given.items()}
    W_enc, b_enc, W_dec, b_dec = (weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    k, n_prefix = 3, 8
    pre = x @ W_enc.T + b_enc
    smallest = (
        pre.topk(k).values[:, -1:] if kind == "topk" else pre.flatten().topk(k * 12).values[-1]
    )
    latents = pre.relu() * (pre >= smallest)
    assert kind == "topk" or len(set((latents > 0).sum(1).tolist())) > 2
    reconstruction = latents @ W_dec + b_dec
    loss = (x - reconstruction).square().sum(1).mean()
    error = (x - reconstruction).detach()
    if kind == "matryoshka":
        first = latents[:, :n_prefix] @ W_dec[:n_prefix] + b_dec
        loss = (loss + (x - first).square().sum(1).mean()) / 2
    of_dead = pre[:, idle >= 100].relu()
    assert of_dead.shape[1] > 4  # more than d_model / 2, so that choosing matters
    of_dead = of_dead * (of_dead >= of_dead.topk(4).values[:, -1:])
    auxk = (error - of_dead @ W_dec[idle >= 100]).square().sum(1).mean()
    loss = loss + auxk / 32
    loss.backward()
    gradients = {name: weight.grad.numpy() for name, weight in weights.items()}
    return {"loss": loss.detach().numpy()} | gradients


@pytest.mark.parametrize("kind", STEP_KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_step_are_the_dense_ones(computed, backend, kind):
    expected = dense_step(kind)
    with np.load(computed / backend / f"gradients-{kind}.npz") as found:
        assert set(found) == set(expected)
        for name, wanted in expected.items():
            size = np.abs(wanted).max()
            np.testing.assert_allclose(found[name], wanted, atol=1e-5 * size, err_msg=name)


# ----------------------------------------------------------------- batches, trainings, saved models


def test_every_backend_gets_the_same_batches(computed):
    """PyTorch and JAX without another copy; TensorFlow's pipeline makes one."""
    drawn = {backend: np.load(computed / backend / "batches.npz") for backend in BACKENDS}
    rows = drawn["torch"]["rows"]
    assert rows.shape == (9, 256, 16) and len(np.unique(rows[..., 0])) > 2_000
    for backend in BACKENDS:
        assert np.array_equal(drawn[backend]["rows"], rows)
        assert drawn[backend]["in_place"].all() == (backend != "tensorflow")


@pytest.mark.parametrize("kind", TRAINED)
def test_backends_train_alike(computed, kind):
    logs = {b: pd.read_csv(computed / b / kind / "training_log.csv") for b in BACKENDS}
    torch = logs["torch"]
    assert torch["step"].iloc[-1] == N_STEPS
    assert torch["fvu"].iloc[-1] < 0.9 * torch["fvu"].iloc[0]
    if kind in STEP_KINDS:
        assert (torch["dead_fraction"] > 0.1).all()  # so that AuxK is at work
    for backend in BACKENDS[1:]:
        losses = [name for name in torch if name.startswith("loss")]
        for name in (*losses, "fvu", "l0", "val_fvu", "learning_rate"):
            np.testing.assert_allclose(logs[backend][name], torch[name], rtol=1e-3)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("saver", BACKENDS)
def test_a_model_saved_on_one_backend_is_the_same_on_the_others(computed, saver, kind):
    loaded = [np.load(computed / loader / f"of-{saver}-{kind}.npz") for loader in BACKENDS]
    for name in ("latents", "reconstruction"):
        first = loaded[0][name]
        assert np.abs(first).max() > 1
        for found in loaded:
            np.testing.assert_allclose(found[name], first, rtol=1e-5, atol=1e-5)
            of_active = found["active" if name == "latents" else "reconstruction_of_active"]
            np.testing.assert_allclose(of_active, first, rtol=1e-5, atol=1e-5)


def test_the_peak_is_that_of_this_process_and_not_of_its_parent():
    held = np.ones(2**25)  # 0.27 GB, far more than the child needs
    code = "from utils.backend import peak_memory; print(peak_memory()['peak_memory_gb'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment() | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert 0.01 < float(run.stdout) < 0.2 < held.nbytes / 1e9
