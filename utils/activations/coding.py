"""Activations in int8 on the disk, about half of their size in float16.

A row is cut into blocks of `BLOCK` numbers. It is stored as these, each times 127 / the block's
largest |number|, and after them the largest of each block, as the two bytes of a float16. So a huge
dimension, of which language models have a few, makes only its own block coarse.

PyTorch is imported where it is needed: a training on another framework reads floats without it.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK = 128  # numbers that share a scale
MOST = 127  # of int8
SMALLEST = 2.0**-24  # number of float16 above 0


def stored_width(d_model: int, storage_dtype: str) -> int:
    """Numbers of a row on disk: in int8 with the two bytes of each block's largest."""
    return d_model + (2 * -(-d_model // BLOCK) if storage_dtype == "int8" else 0)


def encoded(rows: "torch.Tensor") -> "torch.Tensor":
    """Rows in float16, (..., d_model), as stored: int8, (..., width).

    What is not finite in a row makes `decoded` give such numbers, too.
    """
    import torch

    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK))
    largest = padded.unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)  # (..., blocks)
    factor = _of_numbers(MOST / largest.float().clamp_min(SMALLEST), rows.shape[-1])
    numbers = (rows * factor).round_().to(torch.int8)
    return torch.cat([numbers, largest.view(torch.int8)], dim=-1)


def decoded(stored: "torch.Tensor") -> "torch.Tensor":
    """Stored rows, (..., width), in float16, (..., d_model)."""
    import torch

    n_blocks = -(-stored.shape[-1] // stored_width(BLOCK, "int8"))
    d_model = stored.shape[-1] - 2 * n_blocks
    largest = stored[..., d_model:].contiguous().view(torch.float16)
    factor = _of_numbers(largest.float() / MOST, d_model)
    return (factor * stored[..., :d_model]).half()


def _of_numbers(of_blocks: "torch.Tensor", d_model: int) -> "torch.Tensor":
    """What each block has, for each of its numbers."""
    return of_blocks[..., None].expand(*of_blocks.shape, BLOCK).flatten(-2)[..., :d_model]


def as_floats(stored: np.ndarray) -> np.ndarray:
    """Stored activations (..., width) as they are read, (..., d_model): int8 becomes float16."""
    if stored.dtype != np.int8:
        return stored
    import torch

    return decoded(torch.from_numpy(np.require(stored, requirements=["C", "W"]))).numpy()
