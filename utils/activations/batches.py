"""Shuffled batches of activations, for training."""

import concurrent.futures
from collections.abc import Iterator

import numpy as np

from utils.activations.store import ActivationStore, Contexts
from utils.settings import require

PIECE = 32  # neighbouring positions, read together; fewer are mixed better, and read more slowly
POOL_BYTES = 512 * 2**20  # size of the rows in memory, which are shuffled together


class ShuffledBatches:
    """Batches of ``batch_size`` kept activations, in an order that depends on seed and step alone.

    Each pass permutes pieces of all contexts, and shuffles together the rows of as many pieces as
    fit into ``pool_bytes``, while a thread reads the next ones. Memory does not grow with the data,
    and training can start at any step without the batches before it.

    Raises:
        InputError: ``batch_size`` is larger than the data.
    """

    def __init__(
        self,
        store: ActivationStore,
        contexts: Contexts,
        batch_size: int,
        seed: int,
        pool_bytes: int = POOL_BYTES,
    ):
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self._starts = np.arange(0, store.context_length, PIECE)
        self._kept = store.kept_counts(contexts, self._starts).ravel()
        self._contexts = np.asarray(contexts)
        self.n_rows = int(self._kept.sum())
        require(
            batch_size <= self.n_rows,
            f"BATCH_SIZE must be at most the number of training tokens, {self.n_rows:,}; "
            f"it is {batch_size:,}.",
        )
        piece_bytes = PIECE * store.d_model * store.storage_dtype.itemsize
        self._pool_pieces = max(1, pool_bytes // piece_bytes)
        self.pool_bytes = 2 * min(self._pool_pieces, len(self._kept)) * piece_bytes

    def n_steps(self, n_passes: float) -> int:
        """The number of whole batches in ``n_passes`` passes over the rows."""
        steps = int(n_passes * self.n_rows) // self.batch_size
        require(
            steps > 0,
            f"N_PASSES must be enough for a batch of {self.batch_size:,} of the {self.n_rows:,} "
            f"training tokens; it is {n_passes}.",
        )
        return steps

    def from_step(self, step: int) -> Iterator[np.ndarray]:
        """Batches without end, shape (batch_size, d_model), raw, as stored, from ``step`` on."""
        carried = np.empty((0, self.store.d_model), self.store.storage_dtype)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            places = self._pools_from(step * self.batch_size)
            upcoming = reader.submit(self._read_pool, *next(places))
            while True:
                pool = upcoming.result()
                upcoming = reader.submit(self._read_pool, *next(places))
                end = self.batch_size - len(carried)
                if len(pool) < end:
                    carried = np.concatenate([carried, pool])
                    continue
                yield np.concatenate([carried, pool[:end]])
                while end + self.batch_size <= len(pool):
                    yield pool[end : end + self.batch_size]
                    end += self.batch_size
                carried = pool[end:]

    def _pools_from(self, skip: int) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """Yield (pass, number, pieces, rows to skip) of each pool, from row ``skip`` of the run."""
        n_pass, skip = divmod(skip, self.n_rows)
        while True:
            order = np.random.default_rng([self.seed, n_pass]).permutation(len(self._kept))
            for number, start in enumerate(range(0, len(order), self._pool_pieces)):
                pieces = order[start : start + self._pool_pieces]
                rows = int(self._kept[pieces].sum())
                if skip >= rows:
                    skip -= rows
                    continue
                yield n_pass, number, pieces, skip
                skip = 0
            n_pass += 1

    def _read_pool(self, n_pass: int, number: int, pieces: np.ndarray, skip: int) -> np.ndarray:
        """The rows of a pool in shuffled order, read in the order of the disk."""
        places = zip(*np.divmod(np.sort(pieces), len(self._starts)), strict=True)
        spans = ((self._contexts[c], self._starts[p], PIECE) for c, p in places)
        rows = self.store.kept_spans(spans)
        order = np.random.default_rng([self.seed, n_pass, number]).permutation(len(rows))
        return rows[order[skip:]]
