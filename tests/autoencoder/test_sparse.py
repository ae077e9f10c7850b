"""Choosing the largest pre-activations: exact, whatever the ties, sizes and chunks."""

import numpy as np
import pytest
import torch
from on_backend import STEP_KINDS, loss_and_gradients, step_inputs

from utils.autoencoder import sparse
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.sparse import ChosenLatents, exact_top_latents, top_latents


def drawn(n_latents: int, n_rows: int = 13, largest: int = 1_000):
    """Whole numbers, so that every sum is exact: x (n_rows, 6), rows and biases."""
    draw = np.random.default_rng(n_latents)
    shapes = ((n_rows, 6), (n_latents, 6), (n_latents,))
    return [
        torch.tensor(draw.integers(-largest, largest + 1, shape), dtype=torch.float32)
        for shape in shapes
    ]


def assert_the_largest(x, rows, biases, k: int) -> None:
    values, indices = top_latents(x, rows, biases, k)
    exact = x @ rows.T + biases
    assert values.shape == indices.shape == (len(x), k)
    assert indices.dtype == torch.int32 and values.dtype == torch.float32
    assert torch.equal(exact.gather(1, indices.long()), values)
    expected = exact.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize(
    ("n_latents", "k"),
    [
        (2_048, 4),  # groups of groups
        (1_024, 32),  # the fewest that are grouped
        (1_016, 32),  # one group too few
        (1_021, 4),  # not divisible
        (1_028, 4),  # divisible by 4, not by 8
        (64, 60),
        (64, 64),
        (64, 1),
        (1, 1),
    ],
)
def test_top_latents_are_the_largest(monkeypatch, n_latents, k, chunk):
    monkeypatch.setattr(sparse, "CHUNK_ROWS", chunk)
    assert_the_largest(*drawn(n_latents), k)


@pytest.mark.parametrize(("n_latents", "k"), [(2_048, 16), (1_021, 16), (64, 33)])
def test_top_latents_among_ties(monkeypatch, n_latents, k):
    monkeypatch.setattr(sparse, "CHUNK_ROWS", 4)
    assert_the_largest(*drawn(n_latents, largest=1), k)
    x, rows, biases = drawn(n_latents, largest=0)
    assert not (x @ rows.T + biases).any()  # all of them alike
    assert_the_largest(x, rows, biases, k)


def test_the_largest_may_share_a_group():
    x, rows, biases = torch.ones(1, 1), torch.arange(2_048.0)[:, None] % 256, torch.zeros(2_048)
    # 255 is at 255, 511, ..., which are members of one group; it also comes 8 times.
    values, indices = top_latents(x, rows, biases, 8)
    assert values.tolist() == [[255.0] * 8]
    assert sorted(indices[0].tolist()) == list(range(255, 2_048, 256))


def test_bfloat16_differs_among_near_ties_only():
    draw = np.random.default_rng(0)
    x, rows = (torch.tensor(draw.normal(size=(n, 64)), dtype=torch.float32) for n in (40, 2_048))
    biases = torch.zeros(2_048)
    values, indices = top_latents(x, rows, biases, 32, "bfloat16")
    assert values.dtype == torch.float32
    exact = x @ rows.T
    near = 2**-7 * exact.abs().max()
    torch.testing.assert_close(values, exact.gather(1, indices.long()), rtol=0, atol=near.item())
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(1, indices.long(), True)
    edge = exact.topk(32).values[:, -1:]
    assert (chosen.sum(1) == 32).all()
    assert chosen[exact > edge + near].all() and not chosen[exact < edge - near].any()
    assert not torch.equal(chosen, exact >= edge)  # some did change places


def with_candidates(monkeypatch, bias: float = 0.0, n_rows: int = 300) -> list[tuple[int, str]]:
    """Find the 32 largest of 4,096 latents, and return the rows and the precision of each search.

    They are asserted to be the largest.
    """
    monkeypatch.setattr(sparse, "fastest_dtype", lambda: "bfloat16")
    draw, calls, plain = torch.Generator().manual_seed(0), [], sparse.top_latents
    x, rows = (torch.randn(n, 64, generator=draw) for n in (n_rows, 4_096))
    x += 3 * torch.randn(64, generator=draw)  # a mean that all rows share
    biases = bias + 0.1 * torch.randn(4_096, generator=draw)

    def counted(x, rows, biases, k, dtype="float32"):
        calls.append((len(x), dtype))
        return plain(x, rows, biases, k, dtype)

    monkeypatch.setattr(sparse, "top_latents", counted)
    values, indices = exact_top_latents(x, rows, biases, 32)
    assert indices.dtype == torch.int32 and values.shape == indices.shape == (n_rows, 32)
    exact = x @ rows.T + biases
    tolerance = {"rtol": 0, "atol": 2e-6 * exact.abs().max().item()}
    torch.testing.assert_close(values, exact.gather(1, indices.long()), **tolerance)
    expected = exact.topk(32).values
    torch.testing.assert_close(values.sort(1, True).values, expected, **tolerance)
    return calls


def test_candidates_of_bfloat16_hold_the_largest(monkeypatch):
    calls = with_candidates(monkeypatch)
    assert calls[0] == (300, "bfloat16")
    assert len(calls) == 1 or calls[1][0] < 30  # rows of which it is not sure


def test_rows_in_which_bfloat16_may_be_wrong_are_done_again(monkeypatch):
    """As it is of all beside a bias that is a thousand times as large as they differ."""
    calls = with_candidates(monkeypatch, bias=1e4)
    assert [dtype for _, dtype in calls] == ["bfloat16", "float32"]
    assert calls[1][0] > 250


def test_few_rows_are_not_worth_a_copy_of_the_weights(monkeypatch):
    assert with_candidates(monkeypatch, n_rows=3) == [(3, "float32")]


def test_an_autoencoder_gives_the_same_by_way_of_bfloat16(monkeypatch):
    draw = np.random.default_rng(0)
    made = KINDS["topk"](d_model=64, n_latents=4_096, k=32)
    made.initialize(1.0, np.zeros(64), np.ones(64), 1.0, 0)
    rows = draw.normal(size=(300, 64)).astype(np.float32)
    found = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(sparse, "fastest_dtype", lambda dtype=dtype: dtype)
        found.append((made.encode(rows), made(rows), *made.reconstruct_and_count(rows)))
    for expected, values in zip(*found, strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_nothing_is_differentiated_through_the_choice():
    x, rows, biases = drawn(64)
    values, _ = top_latents(x.requires_grad_(), rows.requires_grad_(), biases, 4)
    assert not values.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_stand_for_numbers_of_either_sign(dtype):
    values = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:, 3] = torch.inf
    values[:, 4] = -torch.inf
    for k in (1, 25, 40):  # more than are positive
        found, indices = sparse._topk(values, k)
        assert torch.equal(found, values.gather(1, indices))
        expected = values.sort(dim=1, descending=True).values[:, :k]
        assert torch.equal(found.sort(dim=1, descending=True).values, expected)


# ------------------------------------------------------- forms for accelerators and few latents


def step_of(kind: str) -> dict[str, np.ndarray]:
    """Loss and gradients of a step in which AuxK is at work."""
    given = step_inputs()
    made = KINDS[kind](d_model=8, n_latents=32, k=3, dead_after=100)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "idle_tokens"):
        getattr(made, name).assign(given[name])
    found = loss_and_gradients(made, given["x"])
    weights = made.W_enc.value, made.W_dec.value
    return found | {"is_sparse": [weight.grad.is_sparse for weight in weights]}


@pytest.mark.parametrize("kind", STEP_KINDS)
@pytest.mark.parametrize(("is_few", "on_cpu"), [(True, True), (False, False), (True, False)])
def test_a_step_in_other_forms_is_the_same(monkeypatch, kind, is_few, on_cpu):
    expected = step_of(kind)
    assert expected.pop("is_sparse") == [False, False]
    monkeypatch.setattr(sparse, "FEW", 0 if is_few else 2)
    monkeypatch.setattr(sparse, "_is_on_cpu", lambda tensor: on_cpu)
    found = step_of(kind)
    assert found.pop("is_sparse") == [is_few, is_few]
    for name, wanted in expected.items():
        size = np.abs(wanted).max()
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * size, err_msg=name)


def test_of_an_accelerator_the_number_kept_is_not_asked(monkeypatch):
    monkeypatch.setattr(sparse, "_is_on_cpu", lambda tensor: False)
    indices = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    kept = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    for n_kept, latents in ((3, [1, 3, 8]), (2, [1, 3]), (5, [0, 1, 2, 3, 8])):
        chosen = ChosenLatents(indices, 12, kept, n_kept)
        assert chosen.latent.tolist() == latents
        assert chosen.row.tolist() == [latent // 4 for latent in latents]
        assert chosen.starts.tolist() == [0, *np.cumsum(np.bincount(chosen.row, minlength=3))]
        assert chosen.of(indices).tolist() == latents
