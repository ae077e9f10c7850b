"""The analysis of 1,048,576 latents of width 16, on any machine: how long it takes, and its memory.

    python -m tests.benchmarks.million FOLDER

A tiny random LLaMA reads the tests' made-up text; the dictionary is trained for a few steps, so
that part of its latents are alive. FOLDER, on a disk with 20 GB free, keeps all of it, and what is
finished there is not made again. Prints a JSON object: seconds, and the most memory in GB of the
analysis' process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the tests find each other

from conftest import LAYER, make_texts, save_tiny_model

N_LATENTS, D_MODEL = 2**20, 16
N_TOKENS, N_ANALYSED = 131_072, 32_768  # at most; the text has fewer
OF_TESTS = ("OMP_NUM_THREADS", "KERAS_BACKEND")  # set by conftest


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, text = folder / "model", folder / "text.jsonl"
    if not model.exists():
        records = ({"text": text, "meta": {"pile_set_name": name}} for text, name in make_texts())
        text.write_text("".join(json.dumps(record) + "\n" for record in records))
        save_tiny_model(model, d_model=D_MODEL)
    activations, autoencoder = folder / "activations", folder / "autoencoder"
    run(
        "save_activations", "--model-name", model, "--layer", LAYER, "--dtype", "float32",
        "--dataset", text, "--n-tokens", N_TOKENS, "--context-length", 64,
        "--activations-dir", activations,
    )  # fmt: skip
    run(
        "train_autoencoder", "--n-latents", N_LATENTS, "--k", 32, "--batch-size", 512,
        "--n-passes", 0.1, "--backend", "torch", "--activations-dir", activations,
        "--autoencoder-dir", autoencoder,
    )  # fmt: skip
    seconds, peak = run(
        "analyze_features", "--n-tokens", N_ANALYSED, "--n-loss-tokens", 512, "--studies",
        "specificity", "--batch-size", 1_024, "--activations-dir", activations,
        "--autoencoder-dir", autoencoder,
        "--analysis-dir", folder / "analysis",
    )  # fmt: skip
    print(json.dumps({"seconds": round(seconds), "peak_memory_gb": round(peak, 2)}))


def run(script: str, *flags: object) -> tuple[float, float]:
    """Run a script; returns its seconds, and the most memory it held in GB."""
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name not in OF_TESTS}
    process = subprocess.Popen([sys.executable, f"{script}.py", *map(str, flags)], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{script}.py failed.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
