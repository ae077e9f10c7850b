"""Adam in one pass: by Triton's kernels what it is plainly, sparse gradients, moments in bfloat16.

The kernels run in Triton's interpreter, which needs no graphics card, in a process of its own: the
interpreter is chosen when they are first imported.
"""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment

from utils.autoencoder import kernels
from utils.autoencoder.kernels import AdamStep, Trained, plain_step
from utils.autoencoder.optimizer import makes_the_plain_step

N_STEPS = 3
CASES = [  # sparse gradients, rows of norm 1, moments in bfloat16
    (False, True, False), (True, False, False), (True, True, True), (False, False, True),
]  # fmt: skip


def weights(is_unit: bool, rounded: bool) -> list[Trained]:
    """A matrix of 12 latents of width 20, and a vector, with moments of some steps."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(12, 20, generator=draw))
    moments = 0.1 * torch.randn(12, 20, generator=draw), torch.rand(12, 20, generator=draw) / 100
    dtype = torch.bfloat16 if rounded else torch.float32
    vector = torch.randn(12, generator=draw), torch.zeros(12), torch.zeros(12), torch.zeros(12)
    matrix = Trained(rows, rows, *(moment.to(dtype) for moment in moments), is_unit)
    return [matrix, Trained(*vector)]


def gradients(step: int, is_sparse: bool) -> list[torch.Tensor]:
    """Of `weights`; a sparse one has two entries for a row, as AuxK's and the chosen latents'."""
    draw = torch.Generator().manual_seed(step)
    size = 10.0 ** (1 - step)  # clipped, and not clipped
    matrix, vector = torch.randn(12, 20, generator=draw), torch.randn(12, generator=draw)
    if is_sparse:
        rows = torch.tensor([[3, 7, 3, 0, 11]])
        matrix = torch.sparse_coo_tensor(rows, matrix[:5], (12, 20), check_invariants=True)
    return [size * matrix, size * vector]


def dense_gradients(step: int, is_sparse: bool) -> list[torch.Tensor]:
    return [gradient.to_dense() for gradient in gradients(step, is_sparse)]


def after_steps(
    make_step, is_sparse: bool, is_unit: bool, rounded: bool, gradients=gradients
) -> list[torch.Tensor]:
    trained = weights(is_unit, rounded)
    for step in range(1, N_STEPS + 1):
        pairs = zip(trained, gradients(step, is_sparse), strict=True)
        trained = [dataclasses.replace(one, gradient=gradient) for one, gradient in pairs]
        make_step(trained, AdamStep(step, 0.01, 0.9, 0.999, 1e-7, 1.0))
    return [
        tensor.float() for one in trained for tensor in (one.weight, one.momentum, one.velocity)
    ]


def interpret(path: str) -> None:
    """What the kernels make of each case, to a file; run by the test below."""
    from utils.autoencoder import triton_kernels

    torch.save([after_steps(triton_kernels.adam_step, *case) for case in CASES], path)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
def test_tritons_kernels_are_the_plain_form(tmp_path):
    path = tmp_path / "kernels.pt"
    command = [
        sys.executable,
        "-c",
        "import sys, test_kernels; test_kernels.interpret(sys.argv[1])",
    ]
    folders = f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"
    done = subprocess.run(
        [*command, str(path)], cwd=ROOT, capture_output=True, text=True,
        env=environment(TRITON_INTERPRET="1", PYTHONPATH=folders),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in zip(CASES, torch.load(path, weights_only=True), strict=True):
        expected = after_steps(plain_step, *case)
        assert not torch.equal(expected[0], weights(*case[1:])[0].weight)
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6, msg=str(case))


@pytest.mark.parametrize("is_unit", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_sparse_gradient_is_one_whose_other_rows_are_zero(monkeypatch, is_unit, rows):
    monkeypatch.setattr(kernels, "BLOCK_NUMBERS", 20 * rows)
    found = after_steps(plain_step, True, is_unit, False)
    expected = after_steps(plain_step, True, is_unit, False, dense_gradients)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)


def test_moments_are_rounded_to_their_neighbours_and_right_on_average():
    value = torch.full((100_000,), 1 + 1 / 512)  # a quarter of the way from 1 to 1 + 1/128
    bits = kernels._chance(7, len(value), kernels.seed(3, 1), value.device)
    for half in (bits & 0xFFFF, bits >> 16):
        found = kernels._rounded(value, half)
        assert set(found.tolist()) == {1.0, 1 + 1 / 128}
        assert torch.equal(found, found.bfloat16().float())
        assert found.mean().item() == pytest.approx(1 + 1 / 512, abs=1e-4)
    exact = torch.tensor([0.0, -2.5, 1e-30, float("inf")]).bfloat16().float()
    assert torch.equal(kernels._rounded(exact, torch.full((4,), 0xFFFF)), exact)


def test_chance_differs_by_step_weight_and_place():
    bits = [kernels._chance(0, 1_000, kernels.seed(*at), torch.device("cpu")) for at in
            ((1, 0), (2, 0), (1, 1))]  # fmt: skip
    assert len(torch.cat(bits).unique()) > 2_990
    assert torch.equal(kernels._chance(500, 500, kernels.seed(1, 0), "cpu"), bits[0][500:])
    ones = torch.stack([(bits[0] >> place) & 1 for place in range(32)]).float().mean(1)
    assert ((ones - 0.5).abs() < 0.08).all()


def test_kernels_that_give_other_numbers_are_not_used():
    def unclipped(trained, step):
        plain_step(trained, dataclasses.replace(step, clip_norm=None))

    cpu = torch.device("cpu")
    assert makes_the_plain_step(plain_step, cpu) and not makes_the_plain_step(unclipped, cpu)
