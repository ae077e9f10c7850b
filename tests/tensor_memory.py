"""How much memory PyTorch's tensors hold at once, counted operation by operation."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made in its block, ``peak`` the most at a time.

    What an operation holds only while it runs is not seen.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return returned

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.is_sparse:
            self._add(tensor._indices())
            return self._add(tensor._values())
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, storage.nbytes())
        return None

    def _release(self, n_bytes: int) -> None:
        self.held -= n_bytes
