"""The activations' format: written, read, checked, shuffled."""

import dataclasses
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BOS, ROOT, excluded_of, write_activations
from keras import ops

from tests.benchmarks import data_path
from tests.benchmarks.gpu import write_store
from utils.activations import batches as batches_module
from utils.activations import store as module
from utils.activations import torch_pools
from utils.activations.batches import (
    ShuffledBatches,
    default_pool_gib,
    piece_size,
    require_pools_fit,
)
from utils.activations.manifest import Manifest
from utils.activations.shards import ARRAYS, EARLIER_ARRAYS, Shard, shard_path
from utils.activations.store import (
    CHECKED,
    DOCUMENT_HASH,
    LAST_CONTEXTS,
    ActivationStore,
    hash_numbers,
    is_finite,
)
from utils.activations.torch_pools import DevicePool, TensorPool
from utils.artifacts import write_json
from utils.settings import InputError

D_MODEL = 4
CONTEXT = 40  # more than the piece that is shuffled, and no multiple of it


def make_arrays(n_contexts: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Contexts whose position 0 is BOS and whose kept rows all differ, by their first entry."""
    draw = np.random.default_rng(seed)
    shape = (n_contexts, CONTEXT)
    kept = draw.random(shape) < 0.8
    kept[:, 0] = False
    activations = draw.normal(size=(*shape, D_MODEL)).astype(np.float16)
    activations[..., 0] = 1 + np.arange(kept.size).reshape(shape)
    tokens = draw.integers(0, BOS, shape, np.int32)
    tokens[:, 0] = BOS
    return {
        "activations": activations,
        "tokens": tokens,
        "norms": np.where(kept, 1, 51).astype(np.float32),
        "kept": kept,
        "documents": np.sort(draw.integers(0, 9, shape, np.int32)),
        "subsets": draw.integers(0, 2, shape, np.int16),
    }


@pytest.fixture(params=[ARRAYS, EARLIER_ARRAYS], ids=["norms", "kept"])
def arrays(request) -> dict[str, np.ndarray]:
    """Of both layouts; ``kept`` is what should count."""
    arrays = make_arrays(10)
    return arrays if "norms" in request.param else without_norms(arrays)


def without_norms(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in arrays.items() if name != "norms"}


@pytest.fixture
def store(arrays, tmp_path) -> ActivationStore:
    """Ten contexts in shards of three, so that the last shard is not full."""
    write_activations(tmp_path, arrays)
    return ActivationStore(tmp_path)


# ------------------------------------------------------------------------------ writing, reading


def test_known_scale_and_mean(tmp_path):
    # Kept rows (3, 4, 0, 0) and (-5, 0, 0, 0): E‖x‖² is 25, so that the scale is √(4 / 25).
    activations = np.zeros((1, CONTEXT, D_MODEL), np.float16)
    activations[0, :3] = [[1000, 0, 0, 0], [3, 4, 0, 0], [-5, 0, 0, 0]]
    kept = np.zeros((1, CONTEXT), bool)
    kept[0, 1:3] = True
    zeros = {name: np.zeros((1, CONTEXT), np.int16) for name in ("tokens", "documents", "subsets")}
    write_activations(tmp_path, {"activations": activations, "kept": kept, **zeros})
    store = ActivationStore(tmp_path)
    assert store.scale == pytest.approx(0.4)
    assert store.mean.tolist() == [-1, 2, 0, 0]
    assert store.n_tokens == 2


def test_what_is_written_is_read(store, arrays, tmp_path):
    assert [shard.contexts for shard in store.shards] == [3, 3, 3, 1]
    assert store.n_contexts == 10 and store.context_length == CONTEXT
    for name in arrays:
        for context in range(10 if name in ("kept", *store.shards[0].crc32) else 0):
            assert np.array_equal(store.read(name, [context])[0], arrays[name][context])
    assert store.storage_dtype == np.float16 and store.subset_names == ["a", "b"]
    assert not list(tmp_path.glob(".partial-*"))
    store.verify(tmp_path)


def test_counts_scale_and_mean_are_of_the_kept_rows(store, arrays):
    rows = arrays["activations"][arrays["kept"]].astype(np.float64)
    assert store.n_tokens == len(rows) == arrays["kept"].sum()
    assert store.excluded == excluded_of(arrays)
    assert store.n_tokens + sum(store.excluded.values()) == 10 * CONTEXT
    assert np.square(rows * store.scale).sum(axis=1).mean() == pytest.approx(D_MODEL)
    np.testing.assert_allclose(store.mean, rows.mean(axis=0), rtol=1e-5)
    assert np.array_equal(store.kept_rows(range(10)), rows)


def test_one_outlier_norm_of_all_shards_and_processes(tmp_path, monkeypatch):
    # The first shards are of norm 60, above 50 times the 1 of most others.
    arrays = make_arrays(20)
    arrays["norms"] = np.where(arrays["kept"], 1, 2).astype(np.float32)
    arrays["norms"][:6] = 60
    arrays["norms"][:, 0] = 1e6  # BOS
    arrays["norms"][11, 7] = 51
    write_activations(tmp_path, arrays)
    kept = (arrays["tokens"] != BOS) & (arrays["norms"] <= 50)
    rows = arrays["activations"][kept].astype(np.float64)
    one = ActivationStore(tmp_path)
    manifest = Manifest.read(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").unlink()
    for rank in range(2):  # the same shards, as of two processes
        part = dataclasses.replace(manifest, shards=manifest.shards[rank::2], world_size=2)
        nothing = {"sum": 0.0, "sum_squared_norm": 0.0, "excluded": {"bos": 0, "outlier_norm": 0}}
        part = dataclasses.replace(part, **nothing) if rank else part
        part.write(tmp_path / f"manifest-{rank:05d}.json")
    monkeypatch.setattr(module, "MEDIAN_SAMPLE", 100)
    for store in (one, ActivationStore(tmp_path)):
        assert store.outlier_norm == 50
        assert store.excluded == {"bos": 20, "outlier_norm": 6 * (CONTEXT - 1) + 1}
        assert store.n_tokens == len(rows)
        assert np.array_equal(store.read("kept", range(20)), kept)
        assert np.array_equal(store.kept_rows(range(20)), rows)
        np.testing.assert_allclose(store.mean, rows.mean(axis=0), rtol=1e-6)
        assert np.square(rows * store.scale).sum(axis=1).mean() == pytest.approx(D_MODEL, rel=1e-9)
    before = store.fingerprint
    for rank in range(2):
        part = Manifest.read(tmp_path / f"manifest-{rank:05d}.json")
        part.outlier_factor = 70.0
        part.write(tmp_path / f"manifest-{rank:05d}.json")
    store = ActivationStore(tmp_path)
    assert store.outlier_norm == 70 and store.fingerprint != before


@pytest.mark.parametrize("contexts", [range(2, 9), [8, 3, 4, 0]])
def test_batches_hold_contexts_in_order(store, arrays, contexts):
    batches = list(store.batches(contexts, 3 * CONTEXT + 1))
    sizes = [3, 3, 1] if len(contexts) == 7 else [3, 1]
    assert [len(batch.contexts) for batch in batches] == sizes
    for name in ("tokens", "kept", "documents", "subsets"):
        values = np.concatenate([getattr(batch, name) for batch in batches])
        assert np.array_equal(values, arrays[name][contexts]), name
    rows = np.concatenate([batch.rows for batch in batches])
    kept = arrays["kept"][contexts]
    assert rows.dtype == np.float32 and np.array_equal(rows, arrays["activations"][contexts][kept])
    context, position = batches[0].places(np.arange(len(batches[0].rows)))
    numbers = np.array(batches[0].contexts)[context]
    assert np.array_equal(arrays["activations"][numbers, position], batches[0].rows)


def test_windows(store, arrays):
    contexts, starts = np.array([9, 0, 4]), np.array([CONTEXT - 2, 3, 0])
    windows = store.windows("tokens", contexts, starts, 4)
    assert windows[0].tolist() == [*arrays["tokens"][9, -2:], -1, -1]
    assert np.array_equal(windows[1:], [arrays["tokens"][0, 3:7], arrays["tokens"][4, :4]])


def test_subsets_of_several_processes_are_numbered_alike(arrays, tmp_path):
    write_activations(tmp_path, arrays)
    manifest = Manifest.read(tmp_path / "manifest.json")
    last = manifest.shards.pop()
    manifest.world_size = 2
    manifest.write(tmp_path / "manifest-00000.json")
    manifest.shards, manifest.subsets = [last], ["b", "c"]
    manifest.write(tmp_path / "manifest-00001.json")
    (tmp_path / "manifest.json").unlink()
    store = ActivationStore(tmp_path)
    assert store.subset_names == ["a", "b", "c"]
    assert np.array_equal(store.read("subsets", [8]), arrays["subsets"][[8]])
    assert np.array_equal(store.read("subsets", [9]), arrays["subsets"][[9]] + 1)


def test_a_file_that_may_not_be_as_large_is_named(arrays, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_activations(tmp_path, arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(error.value.filename) == tmp_path / "activations-00000.npy"
    assert not list(tmp_path.glob("*.npy"))


def test_a_damaged_manifest_is_named(store, tmp_path):
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text())
    torn = {**written, "shards": [{"shard": 0}]}
    for content in (torn, {"finished": True}, [1], {**written, "x": 1}):
        write_json(path, content)
        with pytest.raises(InputError, match=r"manifest\.json is damaged .*Delete"):
            Manifest.read(path)


def test_a_sample_is_of_all_contexts(store):
    assert store.sample(None) == range(10)
    assert list(store.sample(CONTEXT + 1)) == [0, 5]
    assert list(store.sample(6 * CONTEXT)) == [0, 1, 3, 5, 6, 8]
    assert list(store.sample(10**9)) == list(range(10))


def test_the_last_contexts_are_held_out_as_in_earlier_versions(store):
    for share, n in ((0.3, 3), (1e-9, 1)):
        split = store.split(share, None)
        assert list(split.training) == list(range(10 - n)) and split.rule == LAST_CONTEXTS
        assert list(split.held_out) == list(range(10 - n, 10))
    with pytest.raises(InputError, match="too few to hold any out"):
        store.split(0.99, None)


def test_whole_documents_are_held_out_by_a_hash_of_their_numbers(tmp_path):
    # Documents of 1 to 7 contexts, in order; the token at BOS may be of the one before.
    draw = np.random.default_rng(0)
    owner = np.repeat(np.arange(150), draw.integers(1, 8, 150))
    arrays = make_arrays(len(owner))
    arrays["documents"] = np.broadcast_to(owner[:, None], arrays["tokens"].shape).astype(np.int32)
    arrays["documents"] = arrays["documents"].copy()
    arrays["documents"][:, 0] = 9_999
    for name in "abc":
        (tmp_path / name).mkdir()
    write_activations(tmp_path / "a", arrays, per_shard=50)
    store = ActivationStore(tmp_path / "a")
    training, held_out, rule = store.split(0.1, 10**9)
    assert rule == DOCUMENT_HASH and len(held_out) == round(0.1 * len(owner))
    assert sorted([*training, *held_out]) == list(range(len(owner)))
    assert not set(owner[training]) & set(owner[held_out])
    places = held_out / len(owner)  # of all the data, not of its end
    assert places.min() < 0.2 and places.max() > 0.8 and 0.3 < places.mean() < 0.7
    # Documents are held out wherever they are: here in two processes' shards, in another order.
    order = draw.permutation(len(owner))
    write_activations(tmp_path / "b", {name: v[order] for name, v in arrays.items()}, per_shard=7)
    mixed = ActivationStore(tmp_path / "b").split(0.1, 10**9)
    assert set(owner[order][mixed.held_out]) == set(owner[held_out])
    assert len(store.split(0.1, 12 * CONTEXT + 1).held_out) == 12
    # A text that is one document has no other to hold out.
    arrays["documents"][:] = 0
    write_activations(tmp_path / "c", arrays)
    split = ActivationStore(tmp_path / "c").split(0.1, 10 * CONTEXT)
    assert split.rule == LAST_CONTEXTS and list(split.held_out) == [*range(len(owner))][-10:]


def test_a_known_hash():
    # SplitMix64 of seed 0, as published.
    numbers = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_numbers(np.arange(3)).tolist() == numbers


def test_float16_overflow_is_refused_with_the_remedy(arrays, tmp_path):
    activations = arrays["activations"].astype(np.float32)
    activations[4, 2, 1] = 70_000
    large = {**arrays, "activations": activations}
    with np.errstate(over="ignore"), pytest.raises(InputError, match="--storage-dtype float32"):
        write_activations(tmp_path, large)
    assert not (tmp_path / "activations-00001.npy").exists()
    write_activations(tmp_path, large, storage_dtype="float32")
    store = ActivationStore(tmp_path)
    assert store.read("activations", [4])[0, 2, 1] == 70_000


# ----------------------------------------------------------------------------------------- damage


def spoil(path: Path, byte: int, value: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[byte] = content[byte] ^ 1 if value is None else value
    path.write_bytes(content)


def repair(path: Path) -> str:
    return f"run save_activations.py again with the settings in {path.parent / 'settings.json'}"


LAYOUTS = [*((name, ARRAYS) for name in ARRAYS), ("kept", EARLIER_ARRAYS)]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_truncated_or_missing_file_is_named_with_its_repair(tmp_path, name, layout):
    arrays = make_arrays(10)
    write_activations(tmp_path, {array: arrays[array] for array in layout})
    path = shard_path(tmp_path, name, 2)
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(InputError) as error:
            ActivationStore(tmp_path)
        assert str(path) in str(error.value) and repair(path) in str(error.value)
        path.unlink(missing_ok=True)


def test_a_file_of_another_length_is_named(arrays, tmp_path):
    write_activations(tmp_path, arrays)
    path = shard_path(tmp_path, "subsets", 0)
    np.save(path, np.load(path)[:2])
    with pytest.raises(InputError, match=r"subsets-00000\.npy holds 2 contexts instead of 3"):
        ActivationStore(tmp_path)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_flipped_bit_is_found(tmp_path, name, layout):
    arrays = make_arrays(10)
    write_activations(tmp_path, {array: arrays[array] for array in layout})
    path = shard_path(tmp_path, name, 1)
    spoil(path, -3)
    with pytest.raises(InputError, match="does not match its checksum") as error:
        ActivationStore(tmp_path).verify(tmp_path)
    assert str(path) in str(error.value) and repair(path) in str(error.value)


def test_shards_are_checked_once_while_they_are_as_they_were(store, tmp_path, monkeypatch):
    read, log = [], tmp_path / CHECKED
    verify = Shard.verify
    monkeypatch.setattr(Shard, "verify", lambda shard: (read.append(shard.number), verify(shard)))
    store.verify(tmp_path)
    store.verify(tmp_path)
    assert sorted(read) == [shard.number for shard in store.shards]
    os.utime(shard_path(tmp_path, "tokens", 1))
    store.verify(tmp_path)
    assert read[len(store.shards) :] == [1]
    log.write_text(log.read_text()[:-5])  # killed while it wrote
    store.verify(tmp_path)
    assert read[len(store.shards) + 1 :] == [1]
    log.unlink()
    read.clear()
    store.verify(tmp_path, [store.n_contexts - 1, 0])
    assert read == [0, store.shards[-1].number]


def test_nan_is_named_by_shard_and_place(arrays, tmp_path):
    arrays["kept"][4, 5] = True
    arrays.get("norms", arrays["kept"])[4, 5] = 1
    write_activations(tmp_path, arrays)
    path = shard_path(tmp_path, "activations", 1)
    values = np.load(path)
    values[1, 5, 2] = np.nan
    np.save(path, values)
    store = ActivationStore(tmp_path)
    with pytest.raises(InputError) as error:
        store.kept_rows(range(10))
    assert f"{path} holds NaN or infinity at context 1, position 5" in str(error.value)
    with pytest.raises(InputError, match="context 1, position 5"):
        list(itertools.islice(ShuffledBatches(store, range(10), 8, seed=0).from_step(0), 20))
    assert len(store.kept_rows(range(4))) > 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_finite_or_not_is_told_by_bits(dtype):
    limits = np.finfo(dtype)
    numbers = [0, -0.0, 1, -1, limits.max, limits.min, limits.smallest_subnormal]
    for values in (numbers, numbers[2:3], [-1], []):
        assert is_finite(np.array(values, dtype))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not is_finite(np.array([*numbers, bad], dtype))
        assert not is_finite(np.array([[bad, -1]], dtype))


def test_what_is_not_kept_may_be_anything(tmp_path):
    arrays = make_arrays(10)
    write_activations(tmp_path, arrays)
    path = shard_path(tmp_path, "activations", 1)
    values = np.load(path)
    values[~arrays["kept"][3:6]] = np.nan
    np.save(path, values)
    kept = arrays["activations"][arrays["kept"]]
    assert np.array_equal(ActivationStore(tmp_path).kept_rows(range(10)), kept)


def test_unfinished_and_absent_activations(store, tmp_path):
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "finished": False})
    with pytest.raises(InputError, match=r"unfinished \(0 of 1 .*\)\. Run save_activations\.py"):
        ActivationStore(tmp_path)
    with pytest.raises(InputError, match=r"No activations in .*Run save_activations\.py first"):
        ActivationStore(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------- shuffling


@pytest.fixture(params=[2**20, 600, 1], ids=["one pool", "some pools", "pools of a piece"])
def batches(request, arrays, tmp_path) -> ShuffledBatches:
    write_activations(tmp_path, arrays)
    store = ActivationStore(tmp_path)
    return ShuffledBatches(store, range(1, 9), 7, seed=3, pool_gib=request.param / 2**30)


def numbers(batches) -> list[int]:
    """The rows of some batches, by their first entry, of which each kept row has its own."""
    return np.concatenate([batch[:, 0] for batch in batches]).astype(int).tolist()


def test_every_kept_row_comes_once_a_pass(batches, arrays):
    rows = arrays["activations"][1:9][arrays["kept"][1:9]][:, 0].astype(int).tolist()
    n = len(rows)
    assert batches.n_rows == n and batches.n_steps(2) == 2 * n // 7
    stream = numbers(itertools.islice(batches.from_step(0), 3 * n // 7 + 1))
    passes = [stream[n * i : n * (i + 1)] for i in range(3)]
    for one in passes:
        assert sorted(one) == sorted(rows)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != sorted(rows)


def test_batches_of_contexts_that_are_not_neighbours(store, arrays):
    contexts = np.array([0, 3, 4, 9])
    batches = ShuffledBatches(store, contexts, 7, seed=0)
    rows = arrays["activations"][contexts][arrays["kept"][contexts]][:, 0].astype(int).tolist()
    stream = numbers(itertools.islice(batches.from_step(0), len(rows) // 7 + 1))
    assert sorted(stream[: len(rows)]) == sorted(rows)


def test_from_any_step_on_it_is_the_uninterrupted_stream(batches):
    whole = list(itertools.islice(batches.from_step(0), 90))
    assert all(batch.shape == (7, D_MODEL) and batch.dtype == np.float16 for batch in whole)
    assert batches.n_steps(2) < 85
    for step in (1, 2, 33, 34, 35, 36, 50, 71, 88):
        rest = list(itertools.islice(batches.from_step(step), 90 - step))
        assert np.array_equal(rest, whole[step:]), step


def test_the_order_depends_on_the_seed(store):
    first, again, other = (
        numbers(itertools.islice(ShuffledBatches(store, range(10), 7, seed).from_step(0), 5))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_rows_of_the_whole_set_are_mixed(tmp_path):
    write_activations(tmp_path, make_arrays(50))
    batches = ShuffledBatches(
        ActivationStore(tmp_path), range(50), 50, seed=0, pool_gib=4_000 / 2**30
    )
    for batch in itertools.islice(batches.from_step(0), 10):
        contexts = batch[:, 0].astype(int) // CONTEXT
        assert len(set(contexts)) >= 5 and contexts.max() - contexts.min() > 15


@pytest.mark.parametrize(
    ("pool_bytes", "step", "first"),
    [
        (2**20, 0, [158, 177, 326, 69, 193, 347, 70, 183, 305, 160, 85, 291, 239, 304]),
        (2**20, 60, [183, 263, 113, 239, 208, 304, 229, 348, 47, 223, 215, 44, 233, 83]),
        (600, 0, [360, 356, 273, 278, 274, 354, 357, 355, 353, 359, 77, 237, 239, 234]),
        (600, 60, [212, 310, 210, 291, 294, 282, 297, 316, 313, 274, 319, 315, 318, 317]),
    ],
)
def test_the_order_is_that_of_earlier_versions(tmp_path, pool_bytes, step, first):
    write_activations(tmp_path, make_arrays(10))
    store = ActivationStore(tmp_path)
    batches = ShuffledBatches(store, range(1, 9), 7, seed=3, pool_gib=pool_bytes / 2**30)
    assert numbers(itertools.islice(batches.from_step(step), 2)) == first


def test_the_order_is_the_same_whoever_reads_first(batches, monkeypatch):
    expected = list(itertools.islice(batches.from_step(0), 60))
    monkeypatch.setattr(module, "SHARE_BYTES", 100)  # 12 rows
    draw, read_share, shares = random.Random(0), batches.store.read_share, []

    def late(share, rows):
        time.sleep(draw.random() / 1_000)
        shares.append(share)
        read_share(share, rows)

    monkeypatch.setattr(batches.store, "read_share", late)
    for readers in (1, 2, 7):
        monkeypatch.setattr(batches_module, "READERS", readers)
        assert np.array_equal(list(itertools.islice(batches.from_step(0), 60)), expected)
    assert max(share[-1].to + share[-1].n_rows - share[0].to for share in shares) <= 12 + 32


@pytest.mark.parametrize("pool", [TensorPool, DevicePool])
def test_pools_of_pytorch_give_the_same_batches(batches, monkeypatch, pool):
    expected = list(itertools.islice(batches.from_step(3), 60))
    assert all(batch.ctypes.data % 64 == 0 for batch in expected[:2])  # as JAX wants it
    batches.device = "cpu"
    if pool is DevicePool:  # as on a GPU
        monkeypatch.setattr(torch_pools, "torch_pool", DevicePool)
    found = list(itertools.islice(batches.from_step(3), 60))
    assert all(ops.convert_to_tensor(batch) is batch for batch in found)  # no copy of Keras'
    assert np.array_equal([batch.numpy() for batch in found], expected)


def test_a_larger_pool_is_read_in_larger_pieces(tmp_path):
    sizes = [piece_size(gib, 1_024) for gib in (1e-9, 0.5, 0.9, 1, 2, 4, 7.9, 1e6)]
    assert sizes == [32, 32, 32, 64, 128, 256, 256, 1_024]
    assert piece_size(1e6, 40) == 64  # all of a context
    write_activations(tmp_path, make_arrays(10))
    large = ShuffledBatches(ActivationStore(tmp_path), range(10), 7, seed=0, pool_gib=1)
    rows = numbers(itertools.islice(large.from_step(0), large.n_steps(1)))
    assert len(set(rows)) == len(rows) > large.n_rows - 7


def test_a_process_ends_in_silence_in_the_middle_of_the_data(store):
    code = (
        "from utils.activations.batches import ShuffledBatches\n"
        "from utils.activations.store import ActivationStore\n"
        f"store = ActivationStore({str(store.folder)!r})\n"
        "source = ShuffledBatches(store, range(10), 7, 0, 600 / 2**30).from_step(0)\n"
        "print(next(source).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (f"(7, {D_MODEL})\n", "")


def test_the_loader_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data_path, "D_MODEL", 48)  # 4 MB
    assert 0 < data_path.loader_share(tmp_path) < 2


def test_too_large_a_pool_is_refused_with_what_fits():
    large = SimpleNamespace(n_contexts=10**9, context_length=1_024, row_bytes=6_144)
    with pytest.raises(InputError, match="POOL_GIB must fit 2 times into memory") as error:
        require_pools_fit(1e5, large, None)
    fits = float(re.search(r"it is 100000\. At most ([\d.]+) fits now", str(error.value))[1])
    require_pools_fit(0.9 * fits, large, None)
    small = SimpleNamespace(n_contexts=10, context_length=1_024, row_bytes=6_144)
    require_pools_fit(1e5, small, None)  # holds no more than there is
    assert default_pool_gib("cpu") == default_pool_gib(None) == 0.5


def test_too_large_a_batch_and_too_few_passes(store):
    with pytest.raises(InputError, match="BATCH_SIZE must be at most the number of training token"):
        ShuffledBatches(store, range(10), 10 * CONTEXT, seed=0).n_steps(1)
    with pytest.raises(InputError, match="N_PASSES must be enough for a batch of 7"):
        ShuffledBatches(store, range(10), 7, seed=0).n_steps(0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is mapped")
def test_what_was_read_is_not_held(tmp_path):
    def mapped(kind: str = "RssFile") -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{kind}:")[1].split()[0]) / 1e3  # MB

    shape = (1_000, 64, 512)  # 66 MB
    rows = np.random.default_rng(0).integers(0, 2**14, shape, np.uint16).view(np.float16)
    store = write_store(tmp_path, rows)
    before = mapped()
    for start in range(0, len(rows), 100):
        kept = store.kept_rows(range(start, start + 100))
        assert np.array_equal(kept, rows[start : start + 100].reshape(-1, 512))
    assert mapped() - before < 40
    # Nor by the loader: two pools, and what two batches take.
    batches = ShuffledBatches(store, range(len(rows)), 512, seed=0, pool_gib=2**-8)  # 4 MB
    before, held = mapped("VmRSS"), []
    for _ in itertools.islice(batches.from_step(0), batches.n_steps(1)):
        held.append(mapped("VmRSS"))
    assert max(held) - before < 40


def test_subsets_that_were_numbers_or_lists_are_names(tmp_path):
    write_activations(tmp_path, make_arrays(4))
    path = tmp_path / "manifest.json"
    for subsets, names in (([7, "a"], ["7", "a"]), ([["x"], "a"], ["['x']", "a"])):
        write_json(path, json.loads(path.read_text()) | {"subsets": subsets})  # as once written
        assert ActivationStore(tmp_path).subset_names == names
