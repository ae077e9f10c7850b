"""A pool: the memory in which rows are shuffled together, here the host's."""

import contextlib
from collections.abc import Iterator

import numpy as np

ALIGNMENT = 64  # JAX reads an array that begins at a multiple of it where it lies, on a CPU


class HostPool:
    """Rows (n_rows, d_model) in host memory, of which batches are gathered as NumPy arrays.

    A pool is filled in parts, by several threads, after `begin`; then rows are taken, in an order
    that `put` was given, until the next `begin`.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype):
        self.rows = np.empty(shape, dtype)

    def begin(self) -> None:
        """Have what was taken so far be gathered before a row is overwritten."""

    @contextlib.contextmanager
    def filling(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yield an array (last − first, d_model); what it holds afterwards is in the pool."""
        yield self.rows[first:last]

    def put(self, order: np.ndarray) -> np.ndarray:
        """An order of rows, as numbers, where `take` needs it."""
        return order

    def new_batch(self, n_rows: int) -> np.ndarray:
        """An empty array (n_rows, d_model)."""
        size = n_rows * self.rows[:1].nbytes
        memory = np.empty(size + ALIGNMENT, np.uint8)
        begin = -memory.ctypes.data % ALIGNMENT
        return memory[begin : begin + size].view(self.rows.dtype).reshape(n_rows, -1)

    def take(self, order: np.ndarray, to: np.ndarray) -> None:
        """Copy rows by number to (rows of) a batch."""
        np.take(self.rows, order, axis=0, out=to, mode="clip")  # to check them would be a copy more
