"""Activations in int8: what is lost, what is read, and what an autoencoder loses by it."""

import json

import numpy as np
import pytest
import torch
from conftest import Flags

from utils.activations.batches import ShuffledBatches
from utils.activations.coding import BLOCK, as_floats, decoded, encoded, stored_width
from utils.activations.shards import bytes_per_token
from utils.activations.store import ActivationStore

N_TOKENS = 16_384


@pytest.mark.parametrize("d_model", [1, 32, 127, 128, 129, 300, 576])
def test_a_number_is_off_by_at_most_half_a_step_of_its_block(d_model):
    torch.manual_seed(d_model)
    rows = (torch.randn(3, 5, d_model) * torch.logspace(-3, 3, 5)[:, None]).half()
    rows[0, 0], rows[1, 1, 0] = 0, 60_000  # a huge dimension
    stored = encoded(rows)
    assert stored.dtype == torch.int8 and stored.shape == (3, 5, stored_width(d_model, "int8"))
    read = decoded(stored)
    assert read.dtype == torch.float16 and read.shape == rows.shape
    assert np.array_equal(as_floats(stored.numpy()), read.numpy())
    for start in range(0, d_model, BLOCK):
        block = slice(start, start + BLOCK)
        most = rows[..., block].float().abs().amax(dim=-1, keepdim=True)
        off = (read[..., block].float() - rows[..., block].float()).abs()
        assert (off <= most * (0.5 / 127 + 2**-11)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    rows = torch.randn(2, 200).half()
    rows[1, 150] = bad
    read = decoded(encoded(rows))
    assert read[0].isfinite().all() and read[1, :BLOCK].isfinite().all()
    assert not read[1].isfinite().all()


def test_half_of_the_disk():
    assert bytes_per_token(3_072, "int8") / bytes_per_token(3_072, "float16") < 0.51


@pytest.fixture(scope="module")
def saved(run_here, tiny_model, tiny_text, tmp_path_factory):
    """Flags of runs that store the same activations in float16 and in int8, by dtype."""
    runs = {}
    for dtype in ("float16", "int8"):
        runs[dtype] = Flags(tmp_path_factory.mktemp(dtype), tiny_model, tiny_text)
        flags = ["--storage-dtype", dtype, "--n-tokens", N_TOKENS, "--outlier-factor", 1.4]
        runs[dtype].save_activations += flags
        run_here("save_activations", *runs[dtype].save_activations)
    return runs


def folder_of(run: Flags):
    return run.save_activations[run.save_activations.index("--activations-dir") + 1]


def test_later_stages_read_floats_without_knowing(saved):
    plain, coded = (ActivationStore(folder_of(saved[dtype])) for dtype in ("float16", "int8"))
    assert coded.shards[0]["activations"].dtype == np.int8
    assert coded.storage_dtype == np.float16 and coded.row_bytes == plain.row_bytes
    contexts = [0, 5, 31, 32, 400]
    stored, read = (store.read("activations", contexts) for store in (plain, coded))
    assert read.dtype == np.float16 and read.shape == stored.shape
    step = np.abs(stored.astype(np.float32)).max(axis=-1, keepdims=True) / 127
    assert (np.abs(read.astype(np.float32) - stored) <= 0.6 * step).all()
    kept = coded.read("kept", contexts)
    assert np.array_equal(coded.kept_rows(contexts), read[kept]) and 0 < kept.mean() < 0.97
    # Sums and norms are of what is read, so that leaving out outliers is exact.
    rows = coded.kept_rows(range(coded.n_contexts)).astype(np.float64)
    assert coded.scale == pytest.approx((coded.d_model / (rows**2).sum(axis=1).mean()) ** 0.5)
    np.testing.assert_allclose(coded.mean, rows.mean(axis=0), atol=1e-5)
    norms = np.linalg.norm(read.astype(np.float32), axis=-1)
    np.testing.assert_allclose(coded.read("norms", contexts), norms, rtol=1e-5)
    assert coded.scale == pytest.approx(plain.scale, rel=1e-3)
    batches = ShuffledBatches(coded, range(coded.n_contexts), 64, seed=0)
    every = np.concatenate(
        [batch for batch, _ in zip(batches.from_step(0), range(9), strict=False)]
    )
    known = {row.tobytes() for row in rows.astype(np.float16)}
    assert every.dtype == np.float16 and all(row.tobytes() in known for row in every)


def test_a_damaged_shard_is_made_anew(saved, run_here):
    path = folder_of(saved["int8"]) / "activations-00001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    printed = run_here("save_activations", *saved["int8"].save_activations).stdout
    assert "Shard 1 is damaged or missing" in printed and path.read_bytes() == whole


def test_an_autoencoder_explains_as_much(saved, run_here):
    fvu = {}
    for dtype, run in saved.items():
        flags = [*run.train_autoencoder, "--n-passes", 0.75, "--log-every", 96]
        run_here("train_autoencoder", *flags)
        folder = flags[flags.index("--autoencoder-dir") + 1]
        fvu[dtype] = json.loads((folder / "metrics.json").read_text())["fvu"]
    assert 0 < fvu["float16"] < 0.9
    assert fvu["int8"] <= fvu["float16"] + 0.01
