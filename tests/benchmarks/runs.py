"""Runs of training, ours and peers', made once and kept; for `tests.benchmarks.training`."""

import argparse
import csv
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from utils.activations.batches import ShuffledBatches
from utils.activations.store import ActivationStore
from utils.artifacts import read_json, write_json
from utils.language_model import load_language_model, replaced_output

K = 32
WITH_K = ("topk", "batch_topk", "matryoshka")
HELD_OUT = 0.05  # as in train_autoencoder.py and peers.py
N_HELD_OUT_TOKENS = 1_000_000
N_CONTEXTS = 64  # held-out contexts on which the loss recovered is measured
DEAD_AFTER = 500_000  # as in peers.py

PEERS = {
    "sparsify": ("--peer", "sparsify"),
    "sparsify-signum": ("--peer", "sparsify", "--optimizer", "signum"),
    "dictionary_learning": ("--peer", "dictionary_learning"),
    "saelens": ("--peer", "saelens"),
}


class Benchmark:
    """Makes runs, ours and peers', and keeps their results."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = ActivationStore(options.activations)
        self.training, self.held_out, _ = self.store.split(HELD_OUT, N_HELD_OUT_TOKENS)
        threads = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
        self.environment = {**os.environ, **dict.fromkeys(threads, str(options.threads))}
        self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self._made = set()

    def batches(self, batch_size: int) -> ShuffledBatches:
        return ShuffledBatches(self.store, self.training, batch_size, seed=0)

    def results(self, what: str) -> list[dict]:
        return [read_json(path) for path in sorted(self.folder.glob(f"{what}-*.json"))]

    def kept(self, name: str, make: Callable[[], dict], **facts) -> dict:
        """The result of that name; made and written, with ``facts``, if it is not there yet."""
        path = self.folder / f"{name}.json"
        if not path.exists() or (self.options.overwrite and name not in self._made):
            result = facts | make()
            write_json(path, result)
            self._made.add(name)
            shown = ("fvu", "l0", "dead_fraction", "loss_recovered", "tokens_per_second")
            values = [f"{key} {result[key]:.4g}" for key in shown if key in result]
            print(f"{name}: {', '.join(values)}", flush=True)
        return read_json(path)

    def peer(self, who: str, flags: dict[str, object], switches: tuple[str, ...] = ()) -> dict:
        """Train a peer's autoencoder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            output, reconstruction = Path(folder) / "result.json", Path(folder) / "saved.npy"
            flags = {**flags, "k": K, "threads": self.options.threads, "output": output}
            flags["activations"] = self.options.activations
            if "--speed-only" not in switches:
                flags["reconstruction"] = reconstruction
            command = [self.options.peers_python, "-m", "tests.benchmarks.peers", *PEERS[who]]
            self._call([*command, *as_flags(flags), *switches])
            result = read_json(output)
            if reconstruction.exists():
                result["loss_recovered"] = self.loss_recovered(np.load(reconstruction))
        return result

    def ours(self, name: str, flags: dict[str, object], extra: tuple[str, ...] = ()) -> dict:
        """Train our autoencoder with the user's command; its metrics, its log, its memory."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        flags = {**flags, "dead_after": DEAD_AFTER, "held_out": HELD_OUT}
        if flags["kind"] in WITH_K:
            flags["k"] = K
        flags |= {"activations_dir": self.options.activations, "autoencoder_dir": folder}
        peak = self._call([sys.executable, "train_autoencoder.py", *as_flags(flags), *extra])
        with open(folder / "training_log.csv") as file:
            log = list(csv.DictReader(file))
        metrics = read_json(folder / "metrics.json")
        return {**metrics, "log": log, "peak_rss_bytes": peak, "extra": list(extra)}

    def _call(self, command: list[str]) -> int:
        """Run a command; returns the most memory it held, in bytes."""
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                sys.stderr.write(errors.read()[-4_000:])
                raise subprocess.CalledProcessError(process.returncode, command)
        return usage.ru_maxrss * 1024

    # ---- loss recovered

    @functools.cached_property
    def language_model(self):
        store = self.store
        return load_language_model(store.model_name, store.layer, store.dtype)

    def loss_recovered(self, reconstruction: np.ndarray) -> float:
        """As `fidelity.loss_recovered`, for a saved raw reconstruction of the contexts."""
        limits = self.folder / "cross-entropy.json"
        if not limits.exists():
            zeros = self.cross_entropy(np.zeros_like(reconstruction))
            write_json(limits, {"untouched": self.cross_entropy(None), "zero_ablated": zeros})
        limits = read_json(limits)
        lost = limits["zero_ablated"] - limits["untouched"]
        return (limits["zero_ablated"] - self.cross_entropy(reconstruction)) / lost

    @torch.inference_mode()
    def cross_entropy(self, replacement: np.ndarray | None) -> float:
        """Mean loss of the next token, the kept positions' residual replaced by what was saved."""
        model, store, total, n = self.language_model, self.store, 0.0, 0
        for start in range(0, N_CONTEXTS, 8):
            chosen = self.held_out[start : start + 8]
            tokens = torch.from_numpy(store.read("tokens", chosen)).long()
            kept = torch.from_numpy(store.read("kept", chosen))[..., None]
            saved = None if replacement is None else torch.from_numpy(replacement[start:][:8])

            def replace(residual, saved=saved, kept=kept):
                return None if saved is None else torch.where(kept, saved.to(residual), residual)

            with replaced_output(model.blocks[store.layer], replace):
                logits = model.model(tokens, use_cache=False).logits[:, :-1]
            counted = tokens[:, 1:] != model.bos
            losses = cross_entropy(logits[counted].float(), tokens[:, 1:][counted], reduction="sum")
            total, n = total + float(losses), n + int(counted.sum())
        return total / n

    def our_reconstruction(self, path: Path) -> np.ndarray:
        """What a peer saves, of our saved autoencoder."""
        from utils.backend import use_backend

        use_backend("torch")
        from keras import ops

        from utils.autoencoder.saved import load_autoencoder

        autoencoder = load_autoencoder(path)
        contexts = self.store.read("activations", self.held_out[:N_CONTEXTS]).astype(np.float32)
        return np.stack([ops.convert_to_numpy(autoencoder(context)) for context in contexts])


def as_flags(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in (dashed(name), str(value))]


def dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
