"""Pools for PyTorch: in the host's memory, or a GPU's."""

import collections
import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch

from utils.activations.pools import HostPool
from utils.settings import InputError

AHEAD = 2  # batches that are in a GPU's queue while the next is taken


def torch_pool(shape: tuple[int, int], dtype: np.dtype, device: str) -> HostPool:
    """A pool whose batches are tensors on ``device``, where its rows lie."""
    return TensorPool(shape, dtype) if device == "cpu" else DevicePool(shape, dtype, device)


class TensorPool(HostPool):
    """Rows in host memory; batches are tensors."""

    def new_batch(self, n_rows: int) -> torch.Tensor:
        return torch.from_numpy(super().new_batch(n_rows))

    def take(self, order: np.ndarray, to: torch.Tensor) -> None:
        super().take(order, to.numpy())


class DevicePool(HostPool):
    """Rows on a device. They are read into pinned memory, of each thread its own, and copied from
    there beside what the device computes: on a GPU, on a stream of the pool's.

    The next batch is given out when a GPU has come to this pool's last but `AHEAD`. With more in
    its queue the driver's buffer of commands would be full, and copies to the other pool wait.

    Raises:
        InputError: The device has too little memory.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, device: str):
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        try:
            self.rows = torch.empty(shape, dtype=self.dtype, device=device)
            self.order = torch.empty(shape[0], dtype=torch.int64, device=device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                "The GPU's memory holds no two pools besides the autoencoder. Choose a smaller "
                "POOL_GIB, with --overwrite or in another folder, for the order depends on it."
            ) from error
        self.stream = torch.cuda.Stream(device) if self.rows.is_cuda else None
        self.landing = threading.local()
        self._given: collections.deque[torch.cuda.Event] = collections.deque()

    def begin(self) -> None:
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.rows.device))

    @contextlib.contextmanager
    def filling(self, first: int, last: int) -> Iterator[np.ndarray]:
        landed = self._landing(last - first)
        yield landed.numpy()
        self._copy(landed, self.rows[first:last])

    def put(self, order: np.ndarray) -> torch.Tensor:
        return self._copy(torch.from_numpy(order), self.order[: len(order)])

    def new_batch(self, n_rows: int) -> torch.Tensor:
        if self.stream:
            self._wait_for_earlier()
        return self.rows.new_empty(n_rows, self.rows.shape[1])

    def _wait_for_earlier(self) -> None:
        """Until the device has come to all batches but the last `AHEAD`."""
        reached = torch.cuda.Event(blocking=True)
        reached.record(torch.cuda.current_stream(self.rows.device))
        self._given.append(reached)
        if len(self._given) > AHEAD:
            self._given.popleft().synchronize()

    def take(self, order: torch.Tensor, to: torch.Tensor) -> None:
        torch.index_select(self.rows, 0, order, out=to)

    def _landing(self, n_rows: int) -> torch.Tensor:
        """This thread's rows of host memory, pinned where the system allows it."""
        rows = getattr(self.landing, "rows", None)
        if rows is None or len(rows) < n_rows:
            shape = (n_rows, self.rows.shape[1])
            try:
                rows = torch.empty(shape, dtype=self.dtype, pin_memory=self.rows.is_cuda)
            except RuntimeError:  # too little memory may be pinned: copied through the driver's
                rows = torch.empty(shape, dtype=self.dtype)
            self.landing.rows = rows
        return rows[:n_rows]

    def _copy(self, rows: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """Copy to the device, and wait: this thread reads into ``rows`` again."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            to.copy_(rows, non_blocking=True)
        if self.stream:  # waited for without keeping a core busy
            landed = torch.cuda.Event(blocking=True)
            landed.record(self.stream)
            landed.synchronize()
        return to
