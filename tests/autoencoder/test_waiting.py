"""Within a round of steps the host never waits for the device, counted on a CPU.

What would wait on a graphics card: a number read from a tensor, an array of a size that depends on
numbers, and a number of Python's that is brought to the device.
"""

import collections
import itertools

import numpy as np
import pytest
import torch
from on_backend import stand_in_for_store
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_autoencoder
from utils.autoencoder import sparse, training
from utils.autoencoder.callbacks import Rounds
from utils.autoencoder.kinds import KINDS
from utils.settings import read_settings

BATCH, D_MODEL = 32, 8
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Reads(TorchDispatchMode):
    """Counts operations whose result the host must wait for, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        is_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or is_mask:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class FromHost(TorchFunctionMode):
    """Counts numbers and arrays that are made into tensors."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def counts(kind: str, steps: int, folder) -> tuple[collections.Counter, collections.Counter]:
    """Of a training of two rounds, in the second of which AuxK is at work."""
    draw = np.random.default_rng(0)
    rows = torch.tensor(draw.normal(size=(BATCH, D_MODEL)), dtype=torch.float32)
    words = ["--kind", kind, "--n-latents", "64", "--k", "2", "--dead-after", str(steps * BATCH)]
    settings = read_settings(train_autoencoder, words)
    store = stand_in_for_store(rows.numpy())
    rounds = Rounds(2, steps)
    autoencoder = training.build(settings, store, rounds.total_steps)
    held_out = rows[:8].numpy()
    data = training.TrainingData(lambda step: (rows for _ in itertools.count()), held_out, BATCH)
    folder.mkdir()
    with Reads() as reads, FromHost() as brought:
        training.train(autoencoder, data, rounds, folder, 5)
    return reads.counts, brought.counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_round_reads_no_more(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sparse, "_is_on_cpu", lambda tensor: False)  # as on an accelerator
    steps = (10, 100) if kind == "topk" else (2, 12)
    few, many = (counts(kind, n, tmp_path / str(n)) for n in steps)
    assert many == few
    assert few[0]["aten::_local_scalar_dense"] > 0  # the metrics of a round are read
