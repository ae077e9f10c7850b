"""Text in one large file and in many small ones: seconds and memory of the user's own commands.

    python -m tests.benchmarks.corpora large    # a .txt of 2 GB: up to the first saved context
    python -m tests.benchmarks.corpora many     # 10,000 .txt files, and one file of the same text

``many`` saves and analyses both corpora with a tiny
model, so that reading, packing and bookkeeping are most of the work; its seconds are the
processor's, since those of a clock depend on what else the machine does.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tiny_llama import save_tiny_llama
from utils.activations.corpus import Corpus

ROOT = Path(__file__).resolve().parents[2]
MARK = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("large", "many"))
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the large file")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="saved of many files")
    options = parser.parse_args()
    texts = [document.text for document in Corpus("embedded").documents()]
    with tempfile.TemporaryDirectory() as folder:
        if options.which == "large":
            measure_large(Path(folder), "\n\n".join(texts), int(1e9 * options.gigabytes))
        else:
            measure_many(Path(folder), texts, options.files, options.tokens)


def measure_large(folder: Path, text: str, size: int) -> None:
    """Time from the command to a saved context, and the most memory."""
    content = text.encode()
    with (folder / "large.txt").open("wb") as file:
        for _ in range(-(-size // len(content))):
            file.write(content)
    flags = ["--model-name", "embedded", "--dataset", folder / "large.txt"]
    flags += ["--context-length", 128, "--contexts-per-batch", 1, "--tokens-per-shard", 128]
    flags += ["--activations-dir", folder / "activations"]
    print(f"{(folder / 'large.txt').stat().st_size / 1e9:.2f} GB in one .txt")
    seconds, of_processor, memory = run("save_activations", *flags, "--n-tokens", 128)
    print(
        f"a saved context after {seconds:.0f} s, {of_processor:.0f} s of the processor; "
        f"{memory:.2f} GB of memory at most"
    )


def measure_many(folder: Path, texts: list[str], n_files: int, n_tokens: int) -> None:
    """Processor seconds of each script for many files, over those for one file."""
    # Of equal length, so that the corpora differ in nothing but their files.
    joined = "\n".join(texts).replace(MARK, "")
    length = min(2_000, len(joined) // n_files)
    parts = [joined[start : start + length] for start in range(0, n_files * length, length)]
    (folder / "many").mkdir()
    for number, part in enumerate(parts):
        (folder / "many" / f"{number:06d}.txt").write_bytes(part.encode())
    (folder / "one.txt").write_bytes(MARK.join(parts).encode())
    model = save_tiny_llama(folder / "model", parts[:200])
    one, many = (pipeline(folder, corpus, model, n_tokens) for corpus in ("one", "many"))
    for script, seconds in many.items():
        print(
            f"{script}: {seconds:.1f} processor seconds for {n_files:,} files, {one[script]:.1f} "
            f"for one ({seconds / one[script]:.2f})"
        )


def pipeline(folder: Path, corpus: str, model: Path, n_tokens: int) -> dict[str, float]:
    """Run three scripts on a corpus; the processor seconds of saving and of analysing."""
    out = Path(tempfile.mkdtemp(dir=folder))
    dataset = ["--dataset", folder / "one.txt", "--separator", MARK]
    dataset = dataset if corpus == "one" else ["--dataset", folder / "many"]
    activations = ["--activations-dir", out / "activations"]
    autoencoder = [*activations, "--autoencoder-dir", out / "autoencoder"]
    seconds = {}
    _, seconds["save_activations"], _ = run(
        "save_activations", "--model-name", model, "--layer", 1, "--dtype", "float32",
        "--n-tokens", n_tokens, "--context-length", 128, *dataset, *activations,
    )  # fmt: skip
    run(
        "train_autoencoder", "--n-latents", 512, "--k", 8, "--batch-size", 2_048,
        "--n-passes", 0.2, "--backend", "torch", *autoencoder,
    )  # fmt: skip
    _, seconds["analyze_features"], _ = run(
        "analyze_features", "--studies", "specificity", "completeness", "--no-map-features",
        *autoencoder, "--analysis-dir", out / "analysis",
    )  # fmt: skip
    manifest = json.loads((out / "activations" / "manifest.json").read_text())
    print(f"{corpus}: {len(manifest['subsets'])} subsets, {seconds}", flush=True)
    return seconds


def run(script: str, *flags: object) -> tuple[float, float, float]:
    """Run a user's command; its seconds by the clock and of the processor, its most memory, GB."""
    start = time.perf_counter()
    command = [sys.executable, f"{script}.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    pid = memory = 0
    while not pid:
        time.sleep(0.05)
        # What wait4 says of memory may be that of this process, which started the other.
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = max(memory, *map(int, re.findall(r"VmHWM:\s*(\d+) kB", status)), 0)
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
    if code:
        sys.exit(f"{' '.join(command)} failed.")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, memory * 1024 / 1e9


if __name__ == "__main__":
    main()
