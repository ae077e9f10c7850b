"""Shuffled batches of activations, for training."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from utils.activations.pools import HostPool
from utils.activations.store import ActivationStore, Contexts, Run
from utils.backend import Tensor, free_memory
from utils.settings import require

PIECE = 32  # neighbouring positions, read together; fewer are mixed better, and read more slowly
POOL_GIB, LARGEST_GIB = 0.5, 4.0  # of the pool where POOL_GIB is None; on a GPU up to the second
POOLS = 2  # one is filled while batches are taken from the other
READERS = 4  # threads: one reads slower than a disk; more hold up the one that trains


class ShuffledBatches:
    """Batches of ``batch_size`` kept activations, in an order that only seed, pool and step decide.

    Each pass permutes pieces of all contexts, and shuffles together the rows of as many pieces as
    fit into the pool. Threads read the next pool in the order of the disk while batches are
    gathered from this one. Memory does not grow with the data, but for three bits a position, and
    training can start at any step without the batches before it.

    Args:
        pool_gib: Size of the pool, in GiB. Pieces of a larger one are larger, so that a batch holds
            as many rows of one text as ever.
        device: Where the pool lies: a PyTorch device, of which batches are tensors; None for host
            memory, with batches as NumPy arrays.

    Raises:
        InputError: There are no rows.
    """

    def __init__(
        self,
        store: ActivationStore,
        contexts: Contexts,
        batch_size: int,
        seed: int,
        pool_gib: float = POOL_GIB,
        device: str | None = None,
    ):
        self.store, self.batch_size, self.seed, self.device = store, batch_size, seed, device
        self._piece = piece_size(pool_gib, store.context_length)
        self._contexts, kept = np.asarray(contexts), store.kept_bits(contexts, self._piece)
        self._n_parts = kept.shape[1]  # of a context
        self._kept = kept.reshape(-1, kept.shape[2])
        self.n_rows = int(np.bitwise_count(self._kept).sum())
        require(self.n_rows > 0, f"{store.folder} has no training tokens. Save more.")
        self._pool_pieces = max(1, int(pool_gib * 2**30) // (self._piece * store.row_bytes))
        pieces = min(self._pool_pieces, len(self._kept))
        self._pool_rows = pieces * min(self._piece, store.context_length)
        self.pool_bytes = POOLS * self._pool_rows * store.row_bytes

    def n_steps(self, n_passes: float) -> int:
        """The number of whole batches in ``n_passes`` passes over the rows.

        Raises:
            InputError: There is none, or a batch is larger than the data.
        """
        require(
            self.batch_size <= self.n_rows,
            f"BATCH_SIZE must be at most the number of training tokens, {self.n_rows:,}; "
            f"it is {self.batch_size:,}.",
        )
        steps = int(n_passes * self.n_rows) // self.batch_size
        require(
            steps > 0,
            f"N_PASSES must be enough for a batch of {self.batch_size:,} of the {self.n_rows:,} "
            f"training tokens; it is {n_passes}.",
        )
        return steps

    def to_measure(self) -> ActivationStore:
        """The store to measure on after the training."""
        return self.store

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Batches without end, shape (batch_size, d_model), raw, as stored, from ``step`` on."""
        filled = 0
        for pool, order in self._filled_pools(step * self.batch_size):
            while len(order):
                if not filled:
                    batch = pool.new_batch(self.batch_size)
                n_rows = min(len(order), self.batch_size - filled)
                pool.take(order[:n_rows], batch[filled : filled + n_rows])
                order, filled = order[n_rows:], filled + n_rows
                if filled == self.batch_size:
                    yield batch
                    filled = 0

    def _filled_pools(self, skip: int) -> Iterator[tuple[HostPool, Tensor]]:
        """Pools in turn, from row ``skip`` of the run on, each with the order of its rows.

        A pool is filled anew when the one after it is asked for.
        """
        pools = itertools.cycle([self._new_pool() for _ in range(POOLS)])
        begun = None
        with ThreadPoolExecutor(READERS) as readers:
            for seed, pieces, skipped in self._contents_from(skip):
                earlier, begun = begun, self._begin(readers, next(pools), seed, pieces, skipped)
                if earlier is None:
                    continue
                pool, ordering, reading = earlier
                try:
                    for share in reading:
                        share.result()  # raises a reader's error
                    yield pool, ordering.result()
                except BaseException:  # nothing more is wanted, or can be had
                    for share in (*reading, *begun[2]):
                        share.cancel()
                    raise

    def _begin(
        self,
        readers: ThreadPoolExecutor,
        pool: HostPool,
        seed: list[int],
        pieces: np.ndarray,
        skip: int,
    ) -> tuple[HostPool, Future, list[Future]]:
        """Begin to fill a pool; returns it, what will be its order, and the shares being read."""
        pool.begin()
        context, part = np.divmod(pieces, self._n_parts)
        shares = self.store.shares(self._contexts[context], part * self._piece, self._piece)
        ordering = readers.submit(self._order, pool, seed, pieces, skip)
        return pool, ordering, [readers.submit(self._read, pool, share) for share in shares]

    def _new_pool(self) -> HostPool:
        shape = (self._pool_rows, self.store.d_model)
        if self.device is None:
            return HostPool(shape, self.store.storage_dtype)
        from utils.activations.torch_pools import torch_pool

        return torch_pool(shape, self.store.storage_dtype, self.device)

    def _contents_from(self, skip: int) -> Iterator[tuple[list[int], np.ndarray, int]]:
        """Yield (seed, sorted pieces, rows to skip) of each pool, from row ``skip`` of the run."""
        n_pass, skip = divmod(skip, self.n_rows)
        while True:
            order = np.random.default_rng([self.seed, n_pass]).permutation(len(self._kept))
            for number, start in enumerate(range(0, len(order), self._pool_pieces)):
                pieces = np.sort(order[start : start + self._pool_pieces])
                rows = int(np.bitwise_count(self._kept[pieces]).sum())
                if skip >= rows:
                    skip -= rows
                    continue
                yield [self.seed, n_pass, number], pieces, skip
                skip = 0
            n_pass += 1

    def _read(self, pool: HostPool, share: list[Run]) -> None:
        first, last = share[0].to, share[-1].to + share[-1].n_rows
        with pool.filling(first, last) as rows:
            self.store.read_share(share, rows)

    def _order(self, pool: HostPool, seed: list[int], pieces: np.ndarray, skip: int) -> Tensor:
        """Where the kept rows lie in a pool of these pieces, shuffled, without the first."""
        starts = pieces % self._n_parts * self._piece
        lengths = np.minimum(self._piece, self.store.context_length - starts)
        kept = np.flatnonzero(np.unpackbits(self._kept[pieces], axis=1))
        piece, position = np.divmod(kept, self._piece)
        places = (np.cumsum(lengths) - lengths)[piece] + position
        order = np.random.default_rng(seed).permutation(len(places))
        return pool.put(places[order[skip:]])


def piece_size(pool_gib: float, context_length: int) -> int:
    """Positions of a piece: doubled with the pool, up to a context."""
    size = PIECE
    while 2 * size * POOL_GIB <= PIECE * pool_gib and size < context_length:
        size *= 2
    return size


def default_pool_gib(device: str | None) -> float:
    """`POOL_GIB`; on a GPU doubled up to a 16th of the free memory, and to `LARGEST_GIB`."""
    gib = POOL_GIB
    free = free_memory(device) if device == "cuda" else 0
    while 2 * gib <= min(LARGEST_GIB, free / 2**30 / 16):
        gib *= 2
    return gib


def require_pools_fit(pool_gib: float, store: ActivationStore, device: str | None) -> None:
    """Refuse a pool that does not fit into memory as often as it is needed.

    Raises:
        InputError: Names the largest that would.
    """
    free = free_memory(device)
    if free is None:
        return
    gib, data_gib = free / 2**30, store.n_contexts * store.context_length * store.row_bytes / 2**30
    require(
        POOLS * min(pool_gib, data_gib) <= gib,
        f"POOL_GIB must fit {POOLS} times into memory, of which {gib:.1f} GiB are free; it is "
        f"{pool_gib:g}. At most {math.floor(gib / POOLS * 100) / 100:g} fits now.",
    )
