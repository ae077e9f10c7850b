"""The host's part of the data path alone: no model, no GPU, any machine.

Everything lies on a memory file system and has the width of LLaMA 3.2-3B's residual stream. Each
part takes turns with one thread that does the least that could be done, so that the machine's own
drift falls on both; the medians are printed as one JSON object.

    writer_share            the shard writer, fed with ready arrays (statistics apart), as a share
                            of one thread that writes the same bytes and computes their checksum
    loader_share            the loader, as a share of one thread that reads the bytes by `readinto`
    analysis_us_per_token   the analysis' pass without encoding: 65,536 latents, 64 of them active
                            on a token, after the first million tokens

    python -m tests.benchmarks.data_path
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.analysis import bookkeeping
from utils.activations.batches import ShuffledBatches
from utils.activations.capture import Captured, sums_of
from utils.activations.manifest import Manifest, ShardEntry
from utils.activations.queues import ShardQueue
from utils.activations.shards import ShardWriter, shard_path
from utils.activations.store import ActivationStore

D_MODEL, BATCH_SIZE = 3_072, 4_096
CONTEXT_LENGTH, CONTEXTS_PER_BATCH = 1_024, 16
BATCHES_PER_SHARD, N_SHARDS = 4, 2  # of the writer: 0.8 GB


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a memory disk")
    options = arguments.parse_args()
    rounds = {"writer_share": [], "loader_share": [], "analysis_us_per_token": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.memory) as folder:
            rounds["writer_share"].append(writer_share(Path(folder)))
        with tempfile.TemporaryDirectory(dir=options.memory) as folder:
            rounds["loader_share"].append(loader_share(Path(folder)))
        rounds["analysis_us_per_token"].append(analysis_us_per_token())
    print(json.dumps({name: statistics.median(values) for name, values in rounds.items()}))


def writer_share(folder: Path) -> float:
    """Seconds of the plain thread over seconds of the shard writer, for the same bytes."""
    shape = (CONTEXTS_PER_BATCH, CONTEXT_LENGTH, D_MODEL)
    batch = made_up_batch(shape)
    arrays = [array for name, array in batch.arrays().items() if name != "sums"]
    start = time.perf_counter()
    for shard in range(N_SHARDS):
        with (folder / f"plain-{shard}").open("wb") as file:
            crc32 = 0
            for _ in range(BATCHES_PER_SHARD):
                for array in arrays:
                    file.write(array)
                    crc32 = zlib.crc32(array, crc32)
    plain = time.perf_counter() - start
    for path in folder.iterdir():
        path.unlink()
    start = time.perf_counter()
    with ShardQueue() as queue:
        for shard in range(N_SHARDS):
            contexts = BATCHES_PER_SHARD * CONTEXTS_PER_BATCH
            writer = queue.begin(ShardWriter(folder, shard, (contexts, *shape[1:]), "float16"))
            for _ in range(BATCHES_PER_SHARD):
                queue.append(writer, batch)
            queue.finish(writer)
    return plain / (time.perf_counter() - start)


@functools.cache
def made_up_batch(shape: tuple[int, int, int]) -> Captured:
    """A batch of random activations (batch, context, d_model), ready to be written."""
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 0x7C00, np.prod(shape), np.uint16)  # finite
    activations = torch.from_numpy(bits.view(np.float16).reshape(shape))
    tensors = {name: torch.zeros(shape[:2], dtype=torch.int32) for name in ("tokens", "documents")}
    tensors["norms"] = torch.ones(shape[:2])
    tensors["subsets"] = torch.zeros(shape[:2], dtype=torch.int16)
    counted = torch.ones(shape[:2], dtype=torch.bool)
    sums = sums_of(activations, ~counted, counted)
    return Captured({"activations": activations, "sums": sums, **tensors})


def loader_share(folder: Path) -> float:
    """Seconds of the plain thread over seconds of the loader, for the same bytes.

    Shuffled batches as training takes them, four pools a pass; from the second pool on.
    """
    store = made_up_store(folder)
    pool_gib = store.n_contexts * store.context_length * store.row_bytes / 2**32
    batches = ShuffledBatches(store, range(store.n_contexts), BATCH_SIZE, 0, pool_gib)
    n_first, n_timed = batches.n_steps(0.25), batches.n_steps(8.0)
    with contextlib.closing(batches.from_step(0)) as source:
        marks = [time.perf_counter() for _ in itertools.islice(source, n_first + n_timed)]
    rows = np.empty((BATCH_SIZE, D_MODEL), store.storage_dtype)
    begun = time.perf_counter()
    for shard in store.shards * 8:
        path = shard_path(folder, "activations", shard.number)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(rows):
                pass
    n_bytes = 8 * store.n_contexts * store.context_length * store.row_bytes
    plain = (time.perf_counter() - begun) / n_bytes
    return plain * n_timed * rows.nbytes / (marks[-1] - marks[n_first - 1])


def made_up_store(folder: Path) -> ActivationStore:
    """0.25 GB in four shards of contexts of 1,024 tokens, of which the first is BOS."""
    shape = (10, 1_024)
    rows = np.random.default_rng(0).normal(size=(shape[1], D_MODEL)).astype(np.float16)
    arrays = {
        "activations": np.broadcast_to(rows, (*shape, D_MODEL)),
        "tokens": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "norms": np.ones(shape, np.float32),
        "documents": np.zeros(shape, np.int32),
        "subsets": np.zeros(shape, np.int16),
    }
    manifest = Manifest(
        "made up", None, 0, "float16", D_MODEL, shape[1], "made up", finished=True, bos=0,
        outlier_factor=2.0, sum_squared_norm=1.0, subsets=["made up"],
    )  # fmt: skip
    for number in range(4):
        for name, values in arrays.items():
            np.save(shard_path(folder, name, number), values)
        kept = shape[0] * (shape[1] - 1)
        manifest.shards.append(ShardEntry(number, shape[0], kept, dict.fromkeys(arrays, 0)))
    manifest.write(folder / "manifest.json")
    return ActivationStore(folder)


def analysis_us_per_token() -> float:
    """Microseconds a token of the analysis' pass, without encoding."""
    return bookkeeping().us_per_token()


if __name__ == "__main__":
    main()
