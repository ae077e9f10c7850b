"""What a training is said to hold in memory is what it holds; what cannot fit is refused."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_backend import stand_in_for_store
from tensor_memory import TensorMemory

import train_autoencoder
from utils.autoencoder import memory, sparse, training
from utils.autoencoder.memory import plan_devices, plan_memory, require_memory
from utils.settings import InputError, Settings, read_settings


def asked(*flags: object) -> Settings:
    return read_settings(train_autoencoder, [str(flag) for flag in flags])


def held(settings: Settings, d_model: int) -> int:
    """The most that is held in two steps, AuxK at work from the first."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(settings.batch_size, d_model)).astype(np.float32)
    with TensorMemory() as counted:
        autoencoder = training.build(settings, stand_in_for_store(rows), 100)
        for _ in range(2):
            autoencoder.train_on_batch(rows)
    return counted.peak


def test_memory_is_counted_while_it_is_held():
    with TensorMemory() as counted:
        first = torch.zeros(1_000)
        view, copy = first[:10], first + 1
        assert counted.held == 8_000
        del first, copy
        assert counted.held == 4_000 and len(view) == 10
        torch.zeros(250)
    assert counted.peak == 8_000 and counted.held == 4_000


LARGE = ("--n-latents", 16_384, "--batch-size", 512)
SMALL = ("--n-latents", 4_096, "--batch-size", 2_048)


@pytest.mark.parametrize(
    ("flags", "d_model"),
    [
        (("--k", 32, *LARGE), 256),
        (("--k", 8, *LARGE), 256),  # few latents a batch: sparse gradients
        (("--k", 8, "--moments-dtype", "bfloat16", *LARGE), 256),
        (("--k", 32, "--selection-dtype", "float32", *SMALL), 128),
        (("--kind", "batch_topk", "--k", 16, *SMALL), 128),
        (("--kind", "matryoshka", "--k", 16, *SMALL), 128),
        (("--kind", "l1", *SMALL), 64),
        (("--kind", "gated", *SMALL), 64),
        (("--kind", "jumprelu", *SMALL), 64),
    ],
)
def test_a_training_holds_what_its_plan_says(flags, d_model):
    settings = asked("--dead-after", 1, *flags)
    assert plan_memory(settings, d_model).total == pytest.approx(held(settings, d_model), rel=0.1)


def rows_on_a_card(n_latents: int) -> int:
    """As `sparse.chunk_rows` there."""
    return max(sparse.LEAST_ROWS, sparse.CHUNK_VALUES // n_latents)


def test_the_papers_smallest_dictionary_fits_on_a_card_of_80_gb(monkeypatch):
    monkeypatch.setattr(
        sparse, "chunk_rows", lambda n: max(sparse.LEAST_ROWS, sparse.CHUNK_VALUES // n)
    )
    size = ("--n-latents", 2**20, "--batch-size", 8_192, "--selection-dtype", "bfloat16")
    plan = plan_memory(asked(*size, "--moments-dtype", "bfloat16"), 3_072)
    assert plan.weights == 2 * 2**20 * 3_072 * 4 and plan.moments == plan.weights
    assert plan.weights + plan.moments + plan.choosing <= plan.total < 76e9
    assert plan_memory(asked(*size), 3_072).total > 80e9


@pytest.mark.parametrize(
    ("batch", "moments", "n_latents", "held_gb"),
    [
        (4_096, "float32", 65_536, 7.551504896),
        (8_192, "float32", 65_536, 7.709899776),
        (16_384, "float32", 65_536, 8.210758656),
        (8_192, "bfloat16", 2**20, 71.291829248),  # no latent was dead yet
    ],
)
def test_the_plan_is_what_an_h100_held(monkeypatch, batch, moments, n_latents, held_gb):
    """Measured by tests.benchmarks.gpu at 9d51c65, width 3,072, k 64; it held four batches."""
    monkeypatch.setattr(memory, "torch_device", lambda: "cuda")
    monkeypatch.setattr(
        sparse, "chunk_rows", lambda n: max(sparse.LEAST_ROWS, sparse.CHUNK_VALUES // n)
    )
    flags = ("--n-latents", n_latents, "--batch-size", batch, "--moments-dtype", moments)
    settings = asked("--k", 64, "--selection-dtype", "bfloat16", *flags)
    plan = plan_memory(settings, 3_072, pool_bytes=4 * batch * 2 * 3_072)
    assert plan.total / 1e9 == pytest.approx(held_gb, rel=0.06)


@pytest.mark.parametrize(
    ("free_gb", "remedies"), [(0.2, ["BATCH_SIZE", "N_LATENTS"]), (0.1, ["N_LATENTS"])]
)
def test_what_cannot_fit_is_refused_and_what_is_named_fits(monkeypatch, free_gb, remedies):
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free_gb * 1e9))
    asked_for = ("--kind", "l1", "--n-latents", 4_096, "--batch-size", 1_024)
    with pytest.raises(InputError, match=r"must fit into the 0\.\d0 GB that are free") as refused:
        require_memory(asked(*asked_for), 1_024)
    named = re.findall(r"(BATCH_SIZE|N_LATENTS) ([\d,]+\d)", str(refused.value))
    assert [name for name, _ in named] == remedies
    for name, size in named:
        flags = [*asked_for, f"--{name.lower().replace('_', '-')}", size.replace(",", "")]
        assert require_memory(asked(*flags), 1_024).startswith("\nMemory: ")


def test_a_card_keeps_more_for_what_it_records(monkeypatch):
    size, settings = 2**40, asked("--k", 64, "--n-latents", 65_536)
    monkeypatch.setattr(memory, "free_memory", lambda device: size)
    assert "Recorded" not in require_memory(settings, 3_072)
    monkeypatch.setattr(memory, "torch_device", lambda: "cuda")
    plan = plan_memory(settings, 3_072)
    assert plan.passing == max(plan.choosing, plan.reviving, plan.updating) > 2 * 4 * 65_536 * 3_072
    expected = f"Recorded steps keep up to {2 * plan.passing / 1e9:.2f} GB more"
    assert expected in require_memory(settings, 3_072)


def test_the_largest_batch_that_fits_is_named(monkeypatch):
    settings = asked("--kind", "l1", "--n-latents", 16_384, "--batch-size", 4_096)
    most = plan_memory(asked("--kind", "l1", "--n-latents", 16_384, "--batch-size", 640), 64).total
    monkeypatch.setattr(memory, "free_memory", lambda device: most)
    with pytest.raises(InputError, match="BATCH_SIZE 640, or N_LATENTS"):
        require_memory(settings, 64)


def test_memory_that_runs_out_is_told_with_its_remedy():
    remedy = r"The last backup stays.*lower BATCH_SIZE"
    with pytest.raises(InputError, match=remedy), training.out_of_memory_told():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), training.out_of_memory_told():
        raise RuntimeError("something else")


def test_bfloat16_is_refused_on_a_card_without_it(monkeypatch):
    card = SimpleNamespace(is_available=lambda: True, is_bf16_supported=lambda **_: False)
    monkeypatch.setattr(torch, "cuda", card)
    training.check_options(asked(), train_autoencoder)
    assert sparse.fastest_dtype() == "float32"
    with pytest.raises(InputError, match="SELECTION_DTYPE bfloat16 needs a graphics card"):
        training.check_options(asked("--selection-dtype", "bfloat16"), train_autoencoder)


@pytest.mark.parametrize("n_latents, n_devices", [(2**21, 4), (2**22, 8), (34_000_000, 64)])
def test_what_one_card_cannot_hold_is_planned_over_several(n_latents, n_devices):
    settings = asked("--n-latents", n_latents, "--batch-size", 8_192)
    plan = plan_devices(settings, 3_072, 80_000_000_000)
    assert plan.n_devices == n_devices
    weights = 4 * n_latents * 3_072 / n_devices
    assert 8 * weights < plan.bytes_each < min(80e9, 8 * weights + 12e9)
    assert plan.bytes_moved == 4 * 4 * 8_192 * 3_072 + 8 * 8_192 * 64 * n_devices
    # Twice the rows of the batch that was measured, and a share of the latents.
    assert plan.seconds == pytest.approx(0.048 * 2 * n_latents / n_devices / 65_536, rel=1e-3)
    assert f"would take {n_devices} such devices" in str(plan)


def test_a_batch_that_no_device_holds_is_told():
    words = plan_devices(asked("--batch-size", 2**20), 3_072, 10**9)
    assert words == "No number of such devices holds it: the batch alone does not fit."


def test_the_refusal_says_how_many_devices_would_do(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 80_000_000_000)
    with pytest.raises(InputError, match=r"DISTRIBUTION model\) it would take 8 such devices, 6"):
        require_memory(asked("--n-latents", 2**22, "--batch-size", 8_192), 3_072)
