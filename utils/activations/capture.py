"""Batches of contexts through the language model, and from its device to the host.

Whatever is computed of activations is computed where they lie. From a GPU they are copied on a
stream of their own, into memory that cannot be swapped out, while the next batch is computed.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from utils.activations.coding import decoded, encoded
from utils.language_model import LanguageModel, residuals_at

CPU_SUMMED, GPU_SUMMED = 2**20, 2**24  # activations that are in float64 at a time, 8 and 134 MB
CPU_BATCH, GPU_BATCH = 2_048, 16_384  # tokens in a batch; more were not faster
USED_MEMORY = 0.5  # of a GPU's free memory, by a batch; others wait on it for being copied


@dataclasses.dataclass(frozen=True)
class Captured:
    """A batch for `ShardWriter.append`, in the host's memory or on its way there."""

    tensors: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The batch as arrays, after waiting until it has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class HostCopies:
    """Copies from a device to the host that run beside its computing, where it is a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_pinned = True

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A host's array on the device."""
        tensor = torch.from_numpy(array)
        if self._stream is None:
            return tensor.to(self.device)
        pinned = self.host_memory(tensor).copy_(tensor)
        return pinned.to(self.device, non_blocking=True)

    def download(self, tensors: dict[str, torch.Tensor]) -> Captured:
        """Begin to copy a batch to the host, after all that the device was given to do so far."""
        if self._stream is None:
            return Captured({name: tensor.cpu() for name, tensor in tensors.items()})
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name] = self.host_memory(tensor).copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # not to be given away before it is copied
            arrived = self._stream.record_event(torch.cuda.Event(blocking=True))
        return Captured(copies, arrived)

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Room for a tensor, pinned (PyTorch keeps such memory to use it again) if there is any."""
        if self._is_pinned:
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:
                self._is_pinned = False
                reason = str(error).split("\n")[0]
                print(f"No pinned memory ({reason}): copies from the GPU will be slower.")
        return torch.empty(like.shape, dtype=like.dtype)


class Capture:
    """Runs contexts through a model up to the deepest of some layers, for `ShardWriter.append`.

    ``storage_dtype`` is that of the activations on disk: ``"float16"``, ``"float32"``, ``"int8"``.
    """

    def __init__(self, language_model: LanguageModel, storage_dtype: str):
        self.language_model = language_model
        self._is_coded = storage_dtype == "int8"
        self._dtype = torch.float16 if self._is_coded else getattr(torch, storage_dtype)
        self._copies = HostCopies(language_model.device)

    @torch.inference_mode()
    def run(
        self, tokens: np.ndarray, layers: Mapping[int, float | None], **arrays: np.ndarray
    ) -> list[Captured]:
        """A batch of tokens (batch, context) at each layer, with ``arrays`` that go along with it.

        On a GPU it returns before the batch is computed. An error for which `ran_out_of_memory`
        holds says that the batch is too large.

        Args:
            layers: None for each; to go on with a folder of an earlier version, the norm above
                which its positions are not kept.
        """
        on_device = self._copies.upload(tokens)
        residuals = residuals_at(self.language_model, on_device, layers)
        here = {name: torch.from_numpy(array) for name, array in arrays.items()}
        here["tokens"] = torch.from_numpy(tokens)
        captured = []
        for residual, outlier_norm in zip(residuals, layers.values(), strict=True):
            copied = self._copies.download(self._stored(residual, on_device, outlier_norm))
            captured.append(Captured({**copied.tensors, **here}, copied.arrived))
        return captured

    def _stored(
        self, residual: torch.Tensor, tokens: torch.Tensor, outlier_norm: float | None
    ) -> dict[str, torch.Tensor]:
        """What is stored of a residual stream, and its sums."""
        stored = values = residual.to(self._dtype)
        if self._is_coded:
            stored = encoded(values)
            values = decoded(stored)  # as a reader has them
        is_bos = tokens == self.language_model.bos
        # Of what is stored, so that a shard that is made anew has the same if its activations are
        # the same.
        if outlier_norm is None:
            counted, facts = ~is_bos, {"norms": values.float().norm(dim=-1)}
        else:
            counted = ~is_bos & ~(residual.float().norm(dim=-1) > outlier_norm)
            facts = {"kept": counted}
        return {"activations": stored, **facts, "sums": sums_of(values, is_bos, counted)}

    def contexts_that_fit(self, context_length: int, layers: Mapping[int, float | None]) -> int:
        """Contexts of `CPU_BATCH` or `GPU_BATCH` tokens, or as many as memory holds in a batch.

        The latter on CUDA, by what one context takes; elsewhere free memory is not known.
        """
        device = self.language_model.device
        good = max(1, (CPU_BATCH if device.type == "cpu" else GPU_BATCH) // context_length)
        if device.type != "cuda":
            return good
        context = np.zeros((1, context_length), np.int32)
        arrays_of(self.run(context, layers))  # libraries take memory once
        release_memory(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        arrays_of(self.run(context, layers))
        taken = torch.cuda.max_memory_allocated(device) - before
        fitting = int(USED_MEMORY * torch.cuda.mem_get_info(device)[0] / taken)
        return max(1, min(fitting, good))


def arrays_of(captured: list[Captured]) -> list[dict[str, np.ndarray]]:
    """A batch at each layer as arrays, after waiting until it has arrived."""
    return [one.arrays() for one in captured]


def sums_of(activations: torch.Tensor, is_bos: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sums over a batch in float64, on its device: shape (d_model + 3,).

    Positions at BOS, positions that are ``counted``, and over the latter Σ‖x‖² and Σx. The last
    two are not finite if any activation is not, counted or not.

    Args:
        activations: Shape (batch, context, d_model).
        is_bos, counted: Bool, shape (batch, context).
    """
    if activations.device.type == "mps":  # has no float64
        activations, is_bos, counted = activations.cpu(), is_bos.cpu(), counted.cpu()
    d_model = activations.shape[-1]
    squares = torch.zeros((), dtype=torch.float64, device=activations.device)
    total = torch.zeros(d_model, dtype=torch.float64, device=activations.device)
    n_rows = max(1, (GPU_SUMMED if activations.is_cuda else CPU_SUMMED) // d_model)
    pieces = activations.reshape(-1, d_model).split(n_rows)
    for piece, mask in zip(pieces, counted.reshape(-1, 1).split(n_rows), strict=True):
        rows = piece.double().mul_(mask)
        total += rows.sum(dim=0)
        squares += rows.square_().sum()
    return torch.cat([torch.stack([is_bos.sum(), counted.sum(), squares]), total])


def release_memory(device: torch.device) -> None:
    """Give back the memory that PyTorch holds on a GPU without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
