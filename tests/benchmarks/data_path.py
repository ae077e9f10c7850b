"""The host's part of the data path alone: no model, no GPU, any machine.

Everything lies on a memory file system and has the width of LLaMA 3.2-3B's residual stream. Each
part takes turns with one thread that does the least that could be done, so that the machine's own
drift falls on both; the medians are printed as one JSON object.

    writer_share            the shard writer, fed with ready arrays (statistics apart), as a share
                            of one thread that writes the same bytes and computes their checksum
    loader_share            the loader, as a share of one thread that reads the bytes by `readinto`
    analysis_us_per_token   what the analysis keeps of a token of 65,536 latents, 64 active

    python -m tests.benchmarks.data_path
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from utils.activations.capture import Captured, sums_of
from utils.activations.queues import ShardQueue
from utils.activations.shards import ShardWriter

D_MODEL = 3072
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
    """Seconds of the plain thread over seconds of the loader, for the same bytes."""
    raise NotImplementedError


def analysis_us_per_token() -> float:
    """Microseconds a token of the analysis' pass, without encoding."""
    raise NotImplementedError


if __name__ == "__main__":
    main()
