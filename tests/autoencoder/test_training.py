"""A training and what it writes: losses by name, kinds of one's own, backups of early versions."""

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
import torch
from hand_set import array
from keras import ops
from on_backend import stand_in_for_store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from utils import backend
from utils.activations import batches as loading
from utils.artifacts import RunRecord, open_stage, write_json
from utils.autoencoder import training
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.callbacks import Rounds
from utils.autoencoder.kinds import KINDS, L1Autoencoder, kind
from utils.autoencoder.optimizer import Adam
from utils.settings import InputError, TimeIsUp, read_settings

BATCH, D_MODEL = 32, 4
ROUNDS = Rounds(10, 2)


def batches() -> np.ndarray:
    """The rows of a whole training, (steps, batch, d_model)."""
    draw = np.random.default_rng(0)
    sparse = draw.random((ROUNDS.total_steps, BATCH, 8)) * (
        draw.random((ROUNDS.total_steps, BATCH, 8)) < 0.3
    )
    return (sparse @ draw.normal(size=(8, D_MODEL))).astype(np.float32)


def train(name: str, folder: Path, *flags: object, tensorboard: bool = False) -> SparseAutoencoder:
    """Train as train_autoencoder.py does, writing to a folder that may hold half of it."""
    folder.mkdir(exist_ok=True)
    script = importlib.import_module("train_autoencoder")
    words = ["--kind", name, "--n-latents", 8, "--learning-rate", 0.01, *flags]
    settings = read_settings(script, [str(word) for word in words])
    rows = batches()
    store = stand_in_for_store(rows.reshape(-1, D_MODEL))
    return training.train(
        training.begin(settings, store, len(rows), folder),
        training.TrainingData(lambda step: (batch for batch in rows[step:]), rows[0], BATCH),
        ROUNDS,
        folder,
        5,
        tensorboard,
    )


def log_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "training_log.csv")


# ----------------------------------------------------------------------------------------- the pool


def test_a_run_goes_on_with_the_pool_that_it_began_with(tmp_path, monkeypatch):
    script = importlib.import_module("train_autoencoder")
    settings = read_settings(script, [])
    record = RunRecord.of(settings, script.NOT_RECORDED)
    store = SimpleNamespace(n_contexts=10, context_length=1_024, row_bytes=6_144)

    def pool() -> float:
        with open_stage(tmp_path, record, script.OUTPUTS) as folder:
            return script.as_begun(settings, folder, store).pool_gib

    on_gpu = {"name": "default_pool_gib", "value": lambda device: 2.0}
    monkeypatch.setattr(loading, **on_gpu)
    assert pool() == 2
    (tmp_path / "training_log.csv").touch()
    monkeypatch.undo()
    assert pool() == 2  # on a CPU too
    (tmp_path / "training_log.csv").unlink()
    assert pool() == 0.5  # nothing had been trained
    (tmp_path / "training_log.csv").touch()
    monkeypatch.setattr(loading, **on_gpu)
    assert pool() == 0.5
    earlier = {name: v for name, v in record.content.items() if name != "pool_gib"}
    write_json(tmp_path / "settings.json", earlier)
    (tmp_path / "chosen.json").unlink()
    assert pool() == 0.5  # which earlier versions had
    store.n_contexts = 10**9
    settings = dataclasses.replace(settings, pool_gib=1e5)
    write_json(tmp_path / "settings.json", record.content | {"pool_gib": 1e5})
    with pytest.raises(
        InputError, match=r"POOL_GIB must fit .* it is 100000\. At most [\d.]+ fits"
    ):
        script.as_begun(settings, tmp_path, store)


# --------------------------------------------------------------------------------- losses by name


@pytest.fixture
def more_kinds():
    """Kinds that a test registers are gone after it."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


def test_every_term_of_every_kind_is_a_column(tmp_path):
    for name, cls in KINDS.items():
        flags = ("--k", 2, "--n-latents", 64, "--dead-after", 32) if "k" in cls.options() else ()
        train(name, tmp_path / name, *flags)
        log = log_of(tmp_path / name)
        terms = log[[f"loss_{term}" for term in cls.loss_names]]
        np.testing.assert_allclose(terms.sum(axis=1), log["loss"], rtol=1e-5)
        assert (terms.max() > 0).all(), name


def test_a_kind_of_ones_own_has_its_losses_in_the_log(tmp_path, more_kinds):
    @kind("ridge")
    class Ridge(L1Autoencoder):
        """A dense kind whose encoder rows are kept small."""

        loss_names = ("reconstruction", "ridge")

        def loss_terms(self, x, passed):
            squares = ops.sum(ops.square(self.W_enc))
            return {
                **SparseAutoencoder.loss_terms(self, x, passed),
                "ridge": self.sparsity_coefficient * squares,
            }

    made = train("ridge", tmp_path, "--sparsity-coefficient", 0.01, tensorboard=True)
    log = log_of(tmp_path)
    assert list(log)[2:5] == ["loss", "loss_reconstruction", "loss_ridge"] and len(log) == 10
    np.testing.assert_allclose(log.loss, log.loss_reconstruction + log.loss_ridge, rtol=1e-5)
    # The last line is of the last two steps, before each of which the rows were a little different.
    ridge = 0.01 * float(np.square(array(made.W_enc)).sum())
    assert log.loss_ridge.iloc[-1] == pytest.approx(ridge, rel=0.1)
    shown = EventAccumulator(str(tmp_path)).Reload()
    scalars = [make_ndarray(event.tensor_proto) for event in shown.Tensors("loss_ridge")]
    np.testing.assert_allclose(scalars, log.loss_ridge, rtol=1e-6)
    assert "val_loss_ridge" not in shown.Tags()["tensors"]  # not measured


def test_an_option_without_a_constant_is_refused(tmp_path, more_kinds):
    @kind("leaky")
    class Leaky(L1Autoencoder):
        def __init__(self, slope: float = 0.1, **kwargs):
            super().__init__(**kwargs)
            self.slope = slope

    rule = r"KIND 'leaky' has the option slope, .* Add one there, .*: SLOPE = \.\.\."
    with pytest.raises(InputError, match=rule):
        train("leaky", tmp_path)
    script = importlib.import_module("train_autoencoder")
    with pytest.raises(InputError, match=rule):
        training.check_options(read_settings(script, ["--kind", "leaky"]), script)


def test_losses_that_are_not_the_declared_ones_are_refused(tmp_path, more_kinds):
    @kind("undeclared")
    class Undeclared(L1Autoencoder):
        def loss_terms(self, x, passed):
            return {**super().loss_terms(x, passed), "ridge": ops.sum(ops.square(self.W_enc))}

    rule = (
        r"Undeclared.loss_terms returned reconstruction, sparsity, ridge, and its loss_names are "
        r"reconstruction, sparsity\. Name the same terms in both"
    )
    with pytest.raises(InputError, match=rule):
        train("undeclared", tmp_path)


def test_a_loss_that_is_not_a_number_names_its_terms(tmp_path, more_kinds):
    @kind("diverging")
    class Diverging(L1Autoencoder):
        def loss_terms(self, x, passed):
            return {**super().loss_terms(x, passed), "sparsity": ops.sum(x) * 0 + np.inf}

    rule = r"is inf in round 1 \(reconstruction [\d.]+, sparsity inf\)\. Lower LEARNING_RATE"
    with pytest.raises(InputError, match=rule):
        train("diverging", tmp_path)
    assert len(log_of(tmp_path)) == 0


# ------------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_that_goes_on_is_the_one_that_was_not_interrupted(tmp_path, dtype):
    flags = ("--k", 2, "--moments-dtype", dtype)
    whole = train("topk", tmp_path, *flags)
    (tmp_path / "training_log.csv").unlink()
    again = train("topk", tmp_path, *flags)  # from the backup in the middle
    assert len(log_of(tmp_path)) == 5
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_array_equal(array(getattr(again, name)), array(getattr(whole, name)))
    moments = again.optimizer._momentums + again.optimizer._velocities
    assert [moment.dtype for moment in moments] == [dtype, "float32"] * 4


def test_other_moments_need_pytorch(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(InputError, match="MOMENTS_DTYPE bfloat16 needs BACKEND torch; it is jax"):
        Adam(0.1, moments_dtype="bfloat16")


def test_what_batches_raise_is_not_wrapped():
    """TensorFlow raises an error of its own in the place of what a generator raises."""

    def batches():
        yield 1
        raise TimeIsUp("all is saved.")

    with pytest.raises(TimeIsUp, match=r"all is saved\.$"), training._as_it_was() as watched:
        try:
            list(watched(batches()))
        except TimeIsUp as error:
            raise RuntimeError("wrapped") from error
    with pytest.raises(RuntimeError, match="another"), training._as_it_was():
        raise RuntimeError("another")


def test_float32_products_of_a_step_are_quick_on_a_gpu_and_no_others(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    script = importlib.import_module("train_autoencoder")
    settings = read_settings(script, ["--n-latents", "32", "--k", "2"])
    autoencoder = training.build(settings, stand_in_for_store(rows), 10)
    monkeypatch.setattr(backend, "torch_device", lambda: "cuda")
    precisions = []

    def noted(x):
        precisions.append(torch.get_float32_matmul_precision())
        return type(autoencoder).normalise(autoencoder, x)

    monkeypatch.setattr(autoencoder, "normalise", noted)
    autoencoder.train_on_batch(rows)
    assert set(precisions) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
    precisions.clear()
    autoencoder.encode(rows)
    assert precisions == ["highest"]
    with pytest.raises(InputError), backend.quick_products():
        raise InputError("stopped")
    assert torch.get_float32_matmul_precision() == "highest"
