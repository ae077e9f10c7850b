"""A dictionary that is known, looked for by us and by SAELens on the same rows.

    python -m tests.benchmarks.planted

Prints, for each kind, the mean over true features of the largest cosine to a decoder row. Ours has
the settings of tests/planted.py; theirs is the best of three learning rates, and for jumprelu
of as many coefficients and two scales of the tanh, with the recipes of `tests.benchmarks.peers`.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.gpu import write_store
from tests.benchmarks.runs import as_flags
from tests.planted import BATCH, FLAGS, N_STEPS, largest_cosines, make_planted
from utils.backend import use_backend

N_LATENTS, CONTEXT_LENGTH = 320, 64
K = {"topk": 7, "batch_topk": 8}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
PENALTIES = [
    {"sparsity_coefficient": coefficient, "tanh_scale": scale}
    for coefficient, scale in itertools.product((1.0, 4.0, 10.0), (0.3, 4.0))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", default=".venv-peers/bin/python")
    options = parser.parse_args()
    use_backend("torch")
    planted = make_planted(40_000)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shape = (len(planted.rows) // CONTEXT_LENGTH, CONTEXT_LENGTH, planted.rows.shape[1])
        write_store(folder, planted.rows.reshape(shape))
        print("| kind | ours | SAELens | its settings |\n|---|---|---|---|", flush=True)
        for kind in FLAGS:
            ours = largest_cosines(planted.directions, train_ours(folder, kind)).mean()
            trainings = [
                (largest_cosines(planted.directions, directions).mean(), chosen)
                for chosen, directions in train_theirs(folder, kind, options.peers_python)
            ]
            best, chosen = max(trainings, key=lambda pair: pair[0])
            settings = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
            print(f"| {kind} | {ours:.3f} | {best:.3f} | {settings} |", flush=True)


def train_ours(folder: Path, kind: str) -> np.ndarray:
    """Our decoder rows, after as many steps as theirs."""
    flags = {"kind": kind, "n_latents": N_LATENTS, "batch_size": BATCH, "backend": "torch"}
    flags |= {"activations_dir": folder, "autoencoder_dir": folder / kind}
    flags |= {"n_passes": N_STEPS * BATCH / (0.95 * 40_000)}
    command = [sys.executable, "train_autoencoder.py", *as_flags(flags), *FLAGS[kind].split()]
    subprocess.run(command, check=True, capture_output=True)
    from utils.autoencoder.saved import load_autoencoder

    return load_autoencoder(folder / kind / "autoencoder.keras").directions()


def train_theirs(folder: Path, kind: str, python: str):
    """Yield the settings and the decoder rows of each training."""
    penalties = PENALTIES if kind == "jumprelu" else [{}]
    for rate, penalty in itertools.product(LEARNING_RATES, penalties):
        chosen = {"learning_rate": rate, **penalty}
        flags = {"peer": "saelens", "kind": kind, "n_latents": N_LATENTS, "k": K.get(kind, 1)}
        flags |= {"dead_after": 10_000, "threads": os.cpu_count()}
        flags |= {"steps": N_STEPS, "batch_size": BATCH, "activations": folder, **chosen}
        flags |= {"output": folder / "result.json", "directions": folder / "directions.npy"}
        command = [python, "-m", "tests.benchmarks.peers", *as_flags(flags)]
        subprocess.run(command, check=True, capture_output=True)
        yield chosen, np.load(folder / "directions.npy")


if __name__ == "__main__":
    main()
