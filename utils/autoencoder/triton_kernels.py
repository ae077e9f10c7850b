"""The steps of `utils.autoencoder.kernels` on a graphics card, in Triton: a program for each row.

A row of the weights, its moments and gradient are in registers from reading to writing. What the
gradients are divided by must be known before, so that they are read once more, for their norm.
"""

import torch
import triton
import triton.language as tl

from utils.autoencoder.kernels import MIX, AdamStep, Trained, fused, seed

MIX_1, MIX_2 = (tl.constexpr(factor) for factor in MIX)


@triton.jit
def _gradient(
    at_row, row, column, is_column, w, gradients, starts, order, d,
    UNIT: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of the gradient without its part along w; a sparse one is the sum of its entries."""
    if SPARSE:
        gradient = tl.zeros((BLOCK,), tl.float32)
        for place in range(tl.load(starts + row), tl.load(starts + row + 1)):
            entry = tl.load(order + place).to(tl.int64)
            gradient += tl.load(gradients + entry * d + column, is_column, 0.0)
    else:
        gradient = tl.load(gradients + at_row + column, is_column, 0.0)
    if UNIT:
        gradient -= tl.sum(gradient * w) * w
    return gradient


@triton.jit
def _squares_kernel(
    weights, gradients, starts, order, squares, d,
    UNIT: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < d
    w = tl.zeros((BLOCK,), tl.float32)
    if UNIT:
        w = tl.load(weights + row * d + column, is_column, 0.0)
    gradient = _gradient(
        row * d, row, column, is_column, w, gradients, starts, order, d, UNIT, SPARSE, BLOCK
    )
    tl.store(squares + row, tl.sum(gradient * gradient))


@triton.jit
def _chance(place, seed):
    """The hash of `kernels._chance`."""
    bits = place.to(tl.uint32) + seed.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * MIX_1
    bits = (bits ^ (bits >> 15)) * MIX_2
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(values, chance):
    """bfloat16, up or down by 16 random bits."""
    bits = values.to(tl.uint32, bitcast=True) + chance
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def _adam_kernel(
    weights, momenta, velocities, gradients, starts, order, divisor,
    rate, weight_1, weight_2, epsilon, seed, d,
    UNIT: tl.constexpr, SPARSE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < d
    place = row * d + column
    w = tl.load(weights + place, is_column, 0.0)
    gradient = _gradient(
        row * d, row, column, is_column, w, gradients, starts, order, d, UNIT, SPARSE, BLOCK
    )
    gradient /= tl.load(divisor)
    m = tl.load(momenta + place, is_column, 0.0).to(tl.float32)
    v = tl.load(velocities + place, is_column, 0.0).to(tl.float32)
    m += weight_1 * (gradient - m)
    v += weight_2 * (gradient * gradient - v)
    w -= rate * m / (tl.sqrt(v) + epsilon)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w)), 1e-7)
    tl.store(weights + place, w, is_column)
    if ROUNDED:
        chance = _chance(place, seed)
        tl.store(momenta + place, _rounded(m, chance & 0xFFFF), is_column)
        tl.store(velocities + place, _rounded(v, chance >> 16), is_column)
    else:
        tl.store(momenta + place, m, is_column)
        tl.store(velocities + place, v, is_column)


def adam_step(trained: list[Trained], step: AdamStep) -> None:
    """`kernels.plain_step`, by a kernel for each matrix; PyTorch's for what is no matrix."""
    entries = [_entries(one) for one in trained]
    squares = [
        _squares(one, entry) if one.weight.dim() == 2 else one.gradient.square().sum()
        for one, entry in zip(trained, entries, strict=True)
    ]
    divisor = step.divisor(squares)
    if divisor is None:
        divisor = torch.ones((), device=trained[0].weight.device)
    correction = step.start_correction
    rate = step.rate * correction / (1 - step.beta_1**step.step)
    for number, (one, entry) in enumerate(zip(trained, entries, strict=True)):
        if one.weight.dim() == 2:
            n_rows, d = one.weight.shape
            _adam_kernel[(n_rows,)](
                one.weight, one.momentum, one.velocity, *entry, divisor,
                rate, 1 - step.beta_1, 1 - step.beta_2, step.epsilon, seed(step.step, number), d,
                UNIT=one.is_unit, SPARSE=one.gradient.is_sparse,
                ROUNDED=one.momentum.dtype == torch.bfloat16, **_shape(d),
            )  # fmt: skip
    fused([one for one in trained if one.weight.dim() != 2], step, divisor)


def _entries(one: Trained) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gradient's numbers; of a sparse one also where each row's entries start, and their order.

    Both are stand-ins for a dense one.
    """
    gradient = one.gradient
    if not gradient.is_sparse:
        return (gradient.contiguous(),) * 3
    numbers, order = gradient._indices()[0].sort()
    edges = torch.arange(len(one.weight) + 1, device=numbers.device)
    return gradient._values(), torch.searchsorted(numbers, edges, out_int32=True), order.int()


def _squares(one: Trained, entries: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The squared norm of a gradient, without its parts along rows held at norm 1."""
    n_rows, d = one.weight.shape
    squares = torch.empty(n_rows, device=one.weight.device)
    _squares_kernel[(n_rows,)](
        one.weight, *entries, squares, d,
        UNIT=one.is_unit, SPARSE=one.gradient.is_sparse, **_shape(d),
    )  # fmt: skip
    return squares.sum()


def _shape(d: int) -> dict[str, int]:
    """The size of a program: all of a row at once, about 8 numbers for each thread."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
