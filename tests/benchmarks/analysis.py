"""The analysis' pass over activations: how fast beside bare encoding, and how much memory it takes.

    python -m tests.benchmarks.analysis

The activations are random: rows of every size, so that a feature's examples fill as many of its
bins as they can, which is the most that the pass ever has to keep. Pass and bare encoding (read,
encode, throw away) take turns, so that the machine's own drift falls on both.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.gpu import write_store
from utils.backend import peak_memory, use_backend

use_backend("torch", keep_memory=True)  # as analyze_features.py

from utils.autoencoder.kinds import TopKAutoencoder  # noqa: E402
from utils.features.feature_pass import FeaturePass  # noqa: E402
from utils.steering.feature_model import ActiveFeatures, FeatureEncoder  # noqa: E402

CONTEXT_LENGTH = 128
N_TURNS = 16
SHARE_ENCODED = 0.25  # of the tokens of a turn that bare encoding goes through


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-tokens", type=int, default=2_000_000)
    parser.add_argument("--n-latents", type=int, default=65_536)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8_192)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = (options.n_tokens // CONTEXT_LENGTH, CONTEXT_LENGTH, options.d_model)
        rows = draw.standard_normal(shape, np.float32)
        rows *= np.exp(1.5 * draw.standard_normal((*shape[:2], 1), np.float32))
        store = write_store(Path(folder), rows)
        del rows
        autoencoder = TopKAutoencoder(
            d_model=options.d_model, n_latents=options.n_latents, k=options.k
        )
        zero = np.zeros(options.d_model)
        autoencoder.initialize(store.scale, zero, zero, decoder_norm=1.0, seed=0)
        before = peak_memory()["peak_memory_gb"]
        found = FeaturePass(FeatureEncoder(autoencoder), store, seed=0)
        seconds = {"encoding": 0.0, "pass": 0.0}
        turns = np.array_split(np.arange(store.n_contexts), N_TURNS)
        for turn in turns:
            some = range(turn[0], turn[0] + int(SHARE_ENCODED * len(turn)))
            start = time.perf_counter()
            for batch in store.batches(some, options.batch_size):
                autoencoder.encode_active(batch.rows)
            middle = time.perf_counter()
            found.run(range(turn[0], turn[-1] + 1), options.batch_size)
            seconds["pass"] += time.perf_counter() - middle
            seconds["encoding"] += (middle - start) * len(turn) / len(some)
        n_examples = len(found.examples()["feature"])
    rates = {name: options.n_tokens / value for name, value in seconds.items()}
    print(
        f"{options.n_latents:,} latents, {options.n_tokens:,} tokens: bare encoding "
        f"{rates['encoding']:,.0f} tokens/s, the pass {rates['pass']:,.0f}, "
        f"{rates['pass'] / rates['encoding']:.2f} of it. {n_examples:,} examples kept; "
        f"most memory {peak_memory()['peak_memory_gb']:.1f} GB, {before:.1f} GB before the pass."
    )


class MadeUp:
    """Active features that are made up, in place of an encoder.

    Feature i is drawn as often as i^(−1/3), which makes some a hundred times as frequent as others.
    """

    n_latents, k = 65_536, 64

    def __init__(self, n_rows: int):
        self.draw, self.shape = np.random.default_rng(0), (n_rows, self.k)
        self.batches: list[ActiveFeatures] = []

    def prepare(self, n_batches: int) -> None:
        row = torch.arange(self.shape[0], dtype=torch.int32).repeat_interleave(self.k)
        for _ in range(n_batches):
            feature = self.n_latents * self.draw.random(len(row), np.float32) ** 1.5
            activation = 1e-3 + self.draw.standard_exponential(len(row), np.float32)
            found = torch.from_numpy(feature).int(), torch.from_numpy(activation)
            self.batches.append(ActiveFeatures(row, *found, None))

    def active_tensors(self, activations: torch.Tensor) -> ActiveFeatures:
        return self.batches.pop()._replace(reconstruction=activations)


class Bookkeeping:
    """What the pass does with features that are ready, after a million tokens, as in most of a run.

    Until then examples fill up and are compared often: the first 131,072 tokens take six times as
    long each, and the median over the first million twice as long.
    """

    n_batches, batch_size, context_length, n_rounds_before = 16, 8_192, 1_024, 8

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        shape = (self.n_batches * self.batch_size // self.context_length, self.context_length, 4)
        rows = np.random.default_rng(0).standard_normal(shape, np.float32)
        self.store = write_store(Path(self.folder.name), rows)
        self.encoder = MadeUp(self.batch_size)
        self.feature_pass = FeaturePass(self.encoder, self.store, seed=0)
        for _ in range(self.n_rounds_before):
            self.us_per_token()

    def us_per_token(self) -> float:
        """Microseconds for each of 131,072 further tokens."""
        self.encoder.prepare(self.n_batches)
        start = time.perf_counter()
        self.feature_pass.run(range(self.store.n_contexts), self.batch_size)
        seconds = time.perf_counter() - start
        return 1e6 * seconds / (self.store.n_contexts * self.context_length)


@functools.cache
def bookkeeping() -> Bookkeeping:
    """The one of this process."""
    return Bookkeeping()


if __name__ == "__main__":
    main()
