"""Memory of writing and of reading activations, by their number: it should not grow with it.

    python -m tests.benchmarks.resident

Rows of width 64 are written in shards of 65,536, and gone through once in shuffled batches with a
pool of 5 MB, each in a process of its own. Reported is the most memory that was resident, in MB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

D_MODEL, CONTEXT, A_SHARD, BATCH = 64, 128, 65_536, 4_096
POOL_GIB = 5 / 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--stage", choices=["write", "read"], help="do it in this process")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.stage:
        {"write": write, "read": read}[options.stage](options.folder, options.rows[0])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_000)
        return
    held = {"write": {}, "read": {}}
    for n_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for stage, by_rows in held.items():
                command = [sys.executable, "-m", "tests.benchmarks.resident", "--stage", stage]
                words = ["--folder", folder, "--rows", str(n_rows)]
                done = subprocess.run(
                    [*command, *words], check=True, capture_output=True, text=True
                )
                by_rows[n_rows] = int(done.stdout.split()[-1])
    print(json.dumps(held, indent=1))


def write(folder: Path, n_rows: int) -> None:
    """Finished shards of made-up rows, as an extraction writes them."""
    import torch

    from utils.activations.capture import sums_of
    from utils.activations.manifest import Manifest
    from utils.activations.shards import ShardWriter

    facts = dict.fromkeys(("model_name", "dtype", "dataset"), "made up")
    manifest = Manifest(
        **facts, revision=None, layer=0, d_model=D_MODEL, context_length=CONTEXT, bos=0,
        outlier_factor=50.0, subsets=["made up"], finished=True,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    for shard in range(-(-n_rows // A_SHARD)):
        shape = (A_SHARD // CONTEXT, CONTEXT, D_MODEL)
        writer = ShardWriter(folder, shard, shape, "float16")
        for _ in range(0, shape[0], 64):
            activations = draw.standard_normal((64, CONTEXT, D_MODEL), np.float32).astype(
                np.float16
            )
            tokens = np.ones((64, CONTEXT), np.int32)
            tokens[:, 0] = 0
            is_bos = torch.from_numpy(tokens == 0)
            sums = sums_of(torch.from_numpy(activations), is_bos, ~is_bos).numpy()
            norms = np.linalg.norm(activations.astype(np.float32), axis=-1)
            others = {name: np.zeros_like(tokens) for name in ("documents", "subsets")}
            writer.append(sums, activations=activations, tokens=tokens, norms=norms, **others)
        entry = writer.finish()
        manifest.add(entry, writer.sum, writer.sum_squared_norm, writer.excluded)
    manifest.write(folder / "manifest.json")


def read(folder: Path, n_rows: int) -> None:
    """One pass of shuffled batches."""
    from utils.activations.batches import ShuffledBatches
    from utils.activations.store import ActivationStore

    store = ActivationStore(folder)
    batches = ShuffledBatches(store, range(store.n_contexts), BATCH, 0, POOL_GIB, "cpu")
    steps = batches.from_step(0)
    for _ in range(batches.n_steps(1)):
        next(steps)


if __name__ == "__main__":
    main()
