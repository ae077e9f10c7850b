"""Adam on PyTorch, clipping and rows of norm 1: its plain form; `triton_kernels` do the same.

A step of a matrix (n, d) with moments m, v and gradient g, whose rows w may be held at norm 1:

    g ← g − (g·w) w                                     where rows are held at norm 1
    g ← g / max(1, ‖all g‖ / clip norm)
    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
    w ← w − rate √(1 − β₂^t) / (1 − β₁^t) · m / (√v + ε)
    w ← w / ‖w‖                                         where rows are held at norm 1

A gradient may be a sparse tensor of some rows; the others are zero, and still decay and move.
bfloat16 moments are rounded up or down at random, by as much as is lost: β₂ moves the second by a
thousandth in a step, and bfloat16 has steps of a 256th, so that rounded to the nearest it would
stay as it is for ever. Chance comes from a hash of step and place, so that a training that goes on
from a backup is the same.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

BLOCK_NUMBERS = 2**21  # of a matrix, that are worked on at once where float32 copies are needed
MIX, STEP_SEED = (0x7FEB352D, 0x846CA68B), 0x9E3779B9  # of the hash; the golden ratio of 2**32


@dataclasses.dataclass(frozen=True)
class Trained:
    """A weight, its gradient and moments; ``is_unit``: its rows are held at norm 1."""

    weight: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor
    velocity: torch.Tensor
    is_unit: bool = False

    @property
    def is_simple(self) -> bool:
        """Whether PyTorch's own kernel can take it: all in float32, all rows' gradients there."""
        return self.momentum.dtype == torch.float32 and not self.gradient.is_sparse


@dataclasses.dataclass(frozen=True)
class AdamStep:
    """The numbers of a step, the ``step``-th from 1; ``clip_norm`` None: no clipping."""

    step: int
    rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    clip_norm: float | None

    @property
    def start_correction(self) -> float:
        """√(1 − β₂^t), by which the second moment's root is too small at the start."""
        return math.sqrt(1 - self.beta_2**self.step)

    def divisor(self, squared_norms: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What all gradients are divided by, given their squared norms; stays on the device."""
        if self.clip_norm is None:
            return None
        norm = torch.stack(list(squared_norms)).sum().sqrt()
        return (norm / self.clip_norm).clamp(min=1.0)


def plain_step(trained: list[Trained], step: AdamStep) -> None:
    """Make a step with all weights, in place, by PyTorch's own kernels; gradients are used up."""
    trained = [_coalesced(one) for one in trained]
    for one in trained:
        if one.is_unit:
            _remove_parallel_part(one)
    norms = torch._foreach_norm([_numbers(one.gradient) for one in trained])
    divisor = step.divisor([norm.square() for norm in norms])
    fused([one for one in trained if one.is_simple], step, divisor)
    for number, one in enumerate(trained):
        if not one.is_simple:
            for block in _blocks(one, step, number):
                fused([block], step, divisor)
    for one in trained:
        if one.is_unit:
            norms = torch.linalg.vector_norm(one.weight, dim=1, keepdim=True)
            one.weight.div_(norms.clamp_(min=1e-7))


def dot_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of each row of one matrix with the same row of another, shape (rows,)."""
    row = torch.arange(len(left), dtype=torch.int32, device=left.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, row, row, row, mode=0
    )


def _coalesced(one: Trained) -> Trained:
    """With each row's gradient in one place."""
    if not one.gradient.is_sparse:
        return one
    return dataclasses.replace(one, gradient=one.gradient.coalesce())


def _numbers(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.values() if gradient.is_sparse else gradient


def _remove_parallel_part(one: Trained) -> None:
    gradient, rows = _numbers(one.gradient), one.weight
    if one.gradient.is_sparse:
        rows = rows[one.gradient.indices()[0]]
    gradient.addcmul_(dot_rows(gradient, rows)[:, None], rows, value=-1)


def fused(trained: list[Trained], step: AdamStep, divisor: torch.Tensor | None) -> None:
    """A step with weights that `Trained.is_simple`, in PyTorch's kernel."""
    if not trained:
        return
    steps = torch.full((), step.step, dtype=torch.float32, device=trained[0].weight.device)
    torch._fused_adam_(
        [one.weight for one in trained],
        [one.gradient for one in trained],
        [one.momentum for one in trained],
        [one.velocity for one in trained],
        [],
        [steps.clone() for _ in trained],
        lr=step.rate,
        beta1=step.beta_1,
        beta2=step.beta_2,
        weight_decay=0.0,
        # Keras adds ε before the second moments are corrected for their start, PyTorch after.
        eps=step.epsilon / step.start_correction,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=None,
    )


def _blocks(one: Trained, step: AdamStep, number: int) -> Iterator[Trained]:
    """Yield some rows at a time as dense float32; what was done with them is put back."""
    n_rows, d = one.weight.shape
    size = max(1, BLOCK_NUMBERS // d)
    edges = [*range(0, n_rows, size), n_rows]
    if one.gradient.is_sparse:
        numbers = one.gradient.indices()[0]
        at = torch.searchsorted(numbers, torch.tensor(edges, device=numbers.device)).tolist()
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        rows = slice(first, last)
        if one.gradient.is_sparse:
            gradient = one.weight.new_zeros(last - first, d)
            some = slice(at[i], at[i + 1])
            gradient[numbers[some] - first] = one.gradient.values()[some]
        else:
            gradient = one.gradient[rows]
        moments = one.momentum[rows], one.velocity[rows]
        block = Trained(one.weight[rows], gradient, *(moment.float() for moment in moments))
        yield block
        if moments[0].dtype != torch.float32:
            chance = _chance(first * d, gradient.numel(), seed(step.step, number), gradient.device)
            moments[0].copy_(_rounded(block.momentum, chance & 0xFFFF))
            moments[1].copy_(_rounded(block.velocity, chance >> 16))


def seed(step: int, number: int) -> int:
    """What the hash starts from in a step, for the weight of a number; 31 bits."""
    return (step * STEP_SEED + number * MIX[0]) % 2**31


def _chance(first: int, n: int, seed: int, device: torch.device) -> torch.Tensor:
    """32 random bits for each of n numbers, the first of which has the place ``first``."""
    bits = (torch.arange(first, first + n, device=device) + seed) & 0xFFFFFFFF
    for factor, shift in zip(MIX, (16, 15), strict=True):
        bits ^= bits >> shift
        bits = (bits * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def _rounded(values: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """float32 whose last 16 bits are zero, so bfloat16; ``chance``: 16 random bits for each."""
    bits = values.reshape(-1).view(torch.int32) + chance.int()
    return (bits & -(2**16)).view(torch.float32).view(values.shape)
