"""A dictionary of 1,048,576 latents, of width 16, trained on a CPU: its memory, under 12 GB.

    python -m tests.benchmarks.million

Few steps by train_autoencoder.py, on made-up activations; what it plans is printed beside what the
process held at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.gpu import write_store

N_LATENTS, D_MODEL, CONTEXTS, CONTEXT_LENGTH, BATCH = 2**20, 16, 128, 512, 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--moments-dtype", default="float32")
    parser.add_argument("--folder", help="where activations and autoencoder are left; else nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        draw = np.random.default_rng(0)
        rows = draw.standard_normal((CONTEXTS, CONTEXT_LENGTH, D_MODEL), np.float32)
        (folder / "activations").mkdir(parents=True)
        store = write_store(folder / "activations", rows)
        n_training = sum(len(batch.rows) for batch in store.batches(range(CONTEXTS), BATCH))
        flags = {
            "activations-dir": store.folder, "autoencoder-dir": folder / "autoencoder",
            "kind": "topk", "n-latents": N_LATENTS, "k": 64, "batch-size": BATCH,
            "n-passes": 1.1 * options.steps * BATCH / n_training, "log-every": 2,
            "moments-dtype": options.moments_dtype, "backend": "torch",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "train_autoencoder.py", *words], check=True)
        metrics = json.loads((folder / "autoencoder" / "metrics.json").read_text())
    print(
        f"{metrics['n_latents']:,} latents of width {metrics['d_model']}: "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, FVU {metrics['fvu']:.3f}, at most "
        f"{metrics['peak_memory_gb']:.2f} GB."
    )


if __name__ == "__main__":
    main()
