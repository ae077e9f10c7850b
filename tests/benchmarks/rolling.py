"""A folder bounded to a tenth of the data, written and trained on at once, killed at random.

    python -m tests.benchmarks.rolling --folder /tmp/rolling

The embedded model's activations of two million tokens are saved twice: all of them, and with
MAX_DISK_GB a tenth of their size beside a training that follows. One of the two processes, drawn
each time, is killed and started again, twenty times in all. Reported are the most bytes that the
folder held, looked at every second at least, and the FVU of both trainings on text that neither
has seen. On two cores it takes half an hour.

A window here holds some 150 documents, and what was learnt in one is partly forgotten in the next.
So both train at half the rate that is the default, and let it fall from the first step on: a small
rate remembers longer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils import embedded
from utils.activations.store import ActivationStore

ROOT = Path(__file__).resolve().parents[2]
N_TOKENS, N_UNSEEN, A_SHARD, D_MODEL = 2_097_152, 65_536, 8_192, 576
LAYER = 5  # a low one, for its activations are there sooner
BYTES = N_TOKENS * (2 * D_MODEL + 14)
KILLED_AFTER = 5.0, 30.0  # seconds, from the last kill on


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder, in which files come and go."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def at_random(n_kills: int) -> Callable[[int], bool]:
    """For `run_together`: as many kills, each some seconds after the last one."""
    draw, state = random.Random(1), {}

    def is_due(n_killed: int) -> bool:
        if n_killed not in state:
            state[n_killed] = time.monotonic() + draw.uniform(*KILLED_AFTER)
        return n_killed < n_kills and time.monotonic() > state[n_killed]

    return is_due


def run_together(
    commands: list[list[str]], activations: Path, is_due: Callable[[int], bool]
) -> tuple[int, int]:
    """Run commands side by side to their ends; one, drawn each time, is killed and started again.

    Args:
        is_due: Whether to kill one now, after so many were.

    Returns:
        The most bytes that the activations' folder held, and the number of kills.

    Raises:
        RuntimeError: A command failed; with what it printed.
    """
    draw, most, n_killed = random.Random(0), 0, 0

    def begin(command: list[str]) -> subprocess.Popen:
        # A file, for a pipe that nobody reads fills.
        with open(activations.parent / f"{Path(command[1]).stem}.log", "a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    running = {number: begin(command) for number, command in enumerate(commands)}
    while running:
        time.sleep(0.05)
        most = max(most, folder_bytes(activations))
        for number, process in list(running.items()):
            if process.poll() is not None:
                if process.returncode:
                    log = activations.parent / f"{Path(commands[number][1]).stem}.log"
                    raise RuntimeError(log.read_text())
                del running[number]
        if running and is_due(n_killed):
            number = draw.choice(sorted(running))
            running[number].kill()
            running[number].wait()
            running[number] = begin(commands[number])
            n_killed += 1
    return most, n_killed


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, f"{script}.py", *map(str, flags)]


def saving(folder: Path, *flags: object) -> list[str]:
    return command(
        "save_activations", "--model-name", "embedded", "--dataset", "embedded", "--layer", LAYER,
        "--n-tokens", N_TOKENS, "--context-length", 128, "--tokens-per-shard", A_SHARD,
        "--activations-dir", folder / "activations", *flags,
    )  # fmt: skip


def training(folder: Path, *flags: object) -> list[str]:
    return command(
        "train_autoencoder", "--n-latents", 2_304, "--k", 32, "--batch-size", 512, "--n-passes", 1,
        "--learning-rate", 1.7e-3, "--learning-rate-decay", 1.0, "--log-every", 20,
        "--backup-every", 10, "--dead-after", 100_000, "--n-held-out-tokens", 16_384,
        "--activations-dir", folder / "activations", "--autoencoder-dir",
        folder / "autoencoder", *flags,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="to write to; 3 GB")
    parser.add_argument("--n-kills", type=int, default=20)
    options = parser.parse_args()
    whole, rolling, unseen = (options.folder / name for name in ("whole", "rolling", "unseen"))
    for folder in (whole, rolling, unseen):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    last_file = sorted(embedded.pile_folder().glob("*.jsonl.zst"))[-1]  # the others begin before
    of_it = ["--dataset", last_file, "--n-tokens", N_UNSEEN]
    for one in (saving(whole), training(whole), saving(unseen, *of_it)):
        subprocess.run(one, cwd=ROOT, check=True)
    bound = BYTES / 10 / 1e9
    commands = [
        saving(rolling, "--max-disk-gb", bound, "--keep-gb", bound / 8),
        training(rolling, "--follow"),
    ]
    most, n_killed = run_together(commands, rolling / "activations", at_random(options.n_kills))
    same = [
        path.read_bytes() == (whole / "activations" / path.name).read_bytes()
        for path in (rolling / "activations").glob("*-0*.npy")
    ]
    fvu = fvus(unseen / "activations", whole / "autoencoder", rolling / "autoencoder")
    print(
        json.dumps(
            {
                "bytes": BYTES,
                "bound": round(bound * 1e9),
                "most": most,
                "n_killed": n_killed,
                "kept_files": len(same),
                "kept_files_equal": sum(same),
                "fvu": dict(zip(("whole", "rolling"), fvu, strict=True)),
            },
            indent=1,
        )
    )


def fvus(activations: Path, *autoencoders: Path) -> list[float]:
    """FVU of each autoencoder on all of a folder's tokens."""
    from utils.backend import use_backend

    use_backend("torch")
    from utils.autoencoder.fidelity import measure_fidelity
    from utils.autoencoder.saved import load_autoencoder

    store, values = ActivationStore(activations), []
    for folder in autoencoders:
        autoencoder = load_autoencoder(folder / "autoencoder.keras")
        batches = (store.kept_rows([context]) for context in range(store.n_contexts))
        values.append(measure_fidelity(autoencoder, batches).fvu)
    return values


if __name__ == "__main__":
    main()
