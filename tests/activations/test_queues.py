"""Extraction in threads and batches: what waits for what, what fails, what memory holds."""

import dataclasses
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import settings_of
from tiny_llama import LAYER, tiny_language_model

from utils.activations.capture import HostCopies, sums_of
from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.activations.manifest import Manifest
from utils.activations.queues import QUEUED, read_ahead
from utils.activations.shards import Shard, ShardWriter
from utils.activations.store import ActivationStore
from utils.activations.torch_pools import DevicePool
from utils.artifacts import write_json
from utils.settings import InputError

CONTEXT, PER_SHARD, N_SHARDS = 16, 12, 4
SETTINGS = settings_of(
    "save_activations",
    model_name="tiny",
    dataset="text",
    n_tokens=CONTEXT * PER_SHARD * N_SHARDS,
    context_length=CONTEXT,
    storage_dtype="float32",
    tokens_per_shard=CONTEXT * PER_SHARD,
)


@pytest.fixture(scope="module")
def model():
    """A model whose activations show the batch that a context was in, as the last bits may."""
    model = tiny_language_model()
    model.blocks[0].register_forward_hook(lambda _module, _inputs, out: out + 1e-5 * len(out))
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = (" ".join(f"w{n}" for n in draw.integers(2, 300, 50)) for _ in range(40))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return path


@pytest.fixture
def extract(model, text, tmp_path):
    """Extract into a folder below ``tmp_path``; ``per_batch`` as of CONTEXTS_PER_BATCH."""

    def run(name: str, per_batch: int | None, **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = dataclasses.replace(SETTINGS, contexts_per_batch=per_batch, **changes)
        extraction = Extraction({LAYER: folder}, settings, Ranks())
        if not extraction.is_finished():
            extraction.begin(model, Corpus(str(text)))
            extraction.run()
        return folder

    return run


def shards_of(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


def files_of(folder: Path, shard: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"*-{shard:05d}.npy")}


@pytest.fixture
def watched(model) -> Iterator[SimpleNamespace]:
    """The number of contexts in each call of the model; ``before`` is done within each."""
    seen = SimpleNamespace(calls=[], before=lambda contexts: None)

    def watch(_module, inputs, options):
        contexts = len(options["input_ids"] if "input_ids" in options else inputs[0])
        seen.before(contexts)
        seen.calls.append(contexts)

    handle = model.model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    yield seen
    handle.remove()


def run_out_of_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # the real error, of any machine


# ------------------------------------------------------------------------------- ahead and behind


def test_what_is_read_ahead_keeps_its_order_and_its_error():
    taken = []

    def numbers():
        for number in range(10):
            taken.append(number)
            yield number
        raise InputError("no more")

    ahead = read_ahead(numbers(), 3)
    assert list(itertools.islice(ahead, 4)) == [0, 1, 2, 3]
    time.sleep(0.1)
    assert len(taken) == 4 + 3
    assert [next(ahead) for _ in range(6)] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match="no more"):
        next(ahead)
    before = threading.active_count()
    ahead = read_ahead(itertools.count(), 3)
    assert next(ahead) == 0 and threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


def test_what_waits_in_the_thread_ahead_is_told_to_stop():
    """As where Ctrl-C comes while an extraction waits for room on the disk."""
    stopped = threading.Event()

    def waiting():
        yield 0
        stopped.wait(30)

    ahead, begun = read_ahead(waiting(), stop=stopped.set), time.monotonic()
    assert next(ahead) == 0
    ahead.close()
    assert time.monotonic() - begun < 10


def test_the_model_never_waits_for_a_write_until_the_queue_is_full(extract, watched, monkeypatch):
    """A writer of half the model's rate: one batch for every two calls of the model."""
    may_write, written, append = threading.Semaphore(0), [], ShardWriter.append

    def slowed(writer, sums, **batch):
        may_write.acquire()
        append(writer, sums, **batch)
        written.append(writer.shard)

    monkeypatch.setattr(ShardWriter, "append", slowed)
    n_speed = 2  # calls by which the speed is measured

    def before(contexts):
        if len(watched.calls) > n_speed and (len(watched.calls) - n_speed) % 2:
            may_write.release()

    watched.before = before
    run = threading.Thread(target=extract, args=("slow", 1), daemon=True)
    run.start()
    # Of 2n calls n are written and n wait; the last call's batch is one too many.
    n_free, deadline = 2 * QUEUED + 1, time.monotonic() + 30
    while len(watched.calls) < n_speed + n_free and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    n_calls, n_written = len(watched.calls) - n_speed, len(written)
    for _ in range(PER_SHARD * N_SHARDS):
        may_write.release()
    run.join()
    assert (n_calls, n_written) == (n_free, QUEUED)
    assert len(watched.calls) == n_speed + len(written) == n_speed + PER_SHARD * N_SHARDS


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
@pytest.mark.parametrize("array", ["activations", "tokens"], ids=["writing", "finishing"])
def test_a_full_disk_stops_the_run_and_keeps_what_is_whole(extract, tmp_path, array):
    whole, broken = extract("whole", 3), tmp_path / "broken"
    broken.mkdir()
    (broken / f".partial-{array}-00002.npy").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"The disk of .*broken is full\. Make room"):
        extract("broken", 3)
    assert shards_of(broken) == shards_of(whole)[:2]
    assert len(list(broken.glob("*.npy"))) == 2 * 5 and not list(broken.glob(".partial*"))
    extract("broken", 3)
    assert (broken / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_a_shard_is_recorded_after_its_files_and_in_order(extract, monkeypatch):
    written = []
    write = Manifest.write

    def checked(manifest, path):
        for entry in manifest.shards:
            Shard(path.parent, entry).verify()
        written.append([entry.shard for entry in manifest.shards])
        write(manifest, path)

    monkeypatch.setattr(Manifest, "write", checked)
    extract("checked", 5)
    assert written == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


# ---------------------------------------------------------------------------- batches and memory


def test_memory_that_runs_out_halves_the_batch(extract, watched, capsys):
    bits = {per_batch: extract(f"by {per_batch}", per_batch) for per_batch in (6, 3)}
    assert shards_of(bits[6])[2]["crc32"] != shards_of(bits[3])[2]["crc32"]
    n_calls = len(watched.calls)

    def before(contexts):  # in the middle of the third shard
        if contexts > 3 and len(watched.calls) - n_calls >= 2 + 2 * 2 + 1:
            run_out_of_memory()

    watched.before = before
    capsys.readouterr()
    folder = extract("halved", 6)
    assert "Memory ran out: CONTEXTS_PER_BATCH is 3 from here on." in capsys.readouterr().out
    assert [entry["contexts_per_batch"] for entry in shards_of(folder)] == [6, 6, 3, 3]
    for shard, per_batch in enumerate([6, 6, 3, 3]):
        assert files_of(folder, shard) == files_of(bits[per_batch], shard)
    store = ActivationStore(folder)
    assert store.scale == pytest.approx(ActivationStore(bits[6]).scale, rel=1e-6)
    assert store.n_contexts == PER_SHARD * N_SHARDS


def test_a_context_that_does_not_fit_is_told_and_nothing_is_lost(extract, watched, tmp_path):
    def before(contexts):
        if len(watched.calls) >= 2 + 2 * 2 + 1:
            run_out_of_memory()

    watched.before = before
    rule = r"Memory must hold the model and a context of 16 tokens.*CONTEXT_LENGTH.*stays"
    with pytest.raises(InputError, match=rule):
        extract("short", 6)
    assert [entry["shard"] for entry in shards_of(tmp_path / "short")] == [0, 1]
    assert not list(tmp_path.glob("short/.partial*"))
    watched.before = lambda contexts: None
    folder, whole = extract("short", 6), extract("whole", 6)
    assert (folder / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    watched.before = lambda contexts: run_out_of_memory()
    with pytest.raises(InputError, match=rule):
        extract("none", None)


def test_a_repair_uses_the_batch_that_was_recorded(extract, watched):
    folder = extract("by 5", 5)
    whole = files_of(folder, 1)
    manifest = (folder / "manifest.json").read_bytes()
    assert shards_of(folder)[1]["crc32"] != shards_of(extract("by 3", 3))[1]["crc32"]
    (folder / "activations-00001.npy").unlink()
    watched.before = lambda contexts: contexts > 3 and run_out_of_memory()
    with pytest.raises(InputError, match="shard 1 must be made anew in batches of 5 contexts"):
        extract("by 5", 3)
    watched.before = lambda contexts: None
    extract("by 5", 3)
    assert files_of(folder, 1) == whole
    assert (folder / "manifest.json").read_bytes() == manifest
    # Earlier versions recorded the batch of the whole folder.
    content = json.loads(manifest)
    for entry in content["shards"]:
        del entry["contexts_per_batch"]
    write_json(folder / "manifest.json", content)
    write_json(folder / "settings.json", {"contexts_per_batch": 5})
    (folder / "tokens-00001.npy").unlink()
    extract("by 5", None)
    assert files_of(folder, 1) == whole


def test_the_size_of_a_shard_does_not_depend_on_the_batch(extract):
    sizes = {
        tuple(entry["contexts"] for entry in shards_of(extract(f"by {per_batch}", per_batch)))
        for per_batch in (None, 1, 5, 100)
    }
    assert sizes == {(PER_SHARD,) * N_SHARDS}
    assert {entry["contexts_per_batch"] for entry in shards_of(extract("by 100", 100))} == {12}


def test_a_run_goes_on_with_the_batch_of_its_last_shard(extract):
    folder = extract("half", 5, n_tokens=SETTINGS.n_tokens // 2)
    content = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", content | {"finished": False})
    extract("half", None)
    assert (folder / "manifest.json").read_bytes() == (
        extract("whole", 5) / "manifest.json"
    ).read_bytes()


# ---------------------------------------------------------------------- statistics and the copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_those_of_numpy_in_float64(dtype):
    torch.manual_seed(0)
    activations = (torch.randn(3, 700, 512) * 30).to(dtype)  # more than one piece
    is_bos, counted = torch.rand(2, 3, 700) < torch.tensor([0.1, 0.8])[:, None, None]
    sums = sums_of(activations, is_bos, counted).numpy()
    rows = activations[counted].double().numpy()
    assert sums[:2].tolist() == [is_bos.sum(), counted.sum()]
    np.testing.assert_allclose(sums[2], np.square(rows).sum(), rtol=1e-13)
    np.testing.assert_allclose(sums[3:], rows.sum(axis=0), rtol=1e-10, atol=1e-10)
    for bad in (np.nan, np.inf):
        spoiled = activations.clone()
        spoiled[1, int((~counted[1]).nonzero()[0]), 7] = bad  # where it is not counted
        assert not np.isfinite(sums_of(spoiled, is_bos, counted).numpy()[2:]).all()


def test_without_pinned_memory_copies_go_on_and_it_is_said_once(capsys):
    copies = HostCopies(torch.device("cpu"))
    rooms = [copies.host_memory(torch.zeros(2, 3)) for _ in range(2)]
    assert [room.shape for room in rooms] == [(2, 3), (2, 3)]
    assert len(re.findall("No pinned memory .*slower", capsys.readouterr().out)) == 1


def test_a_gpu_is_not_given_batches_it_is_far_from(monkeypatch):
    waited = []

    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            assert stream == "the one that computes"

        def synchronize(self):
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the one that computes")
    pool = DevicePool((8, 3), np.float16, "cpu")
    pool.stream = "the one that copies"
    counts = []
    for _ in range(5):
        pool.new_batch(2)
        counts.append(len(waited))
    assert counts == [0, 0, 1, 2, 3] and len(set(waited)) == 3
