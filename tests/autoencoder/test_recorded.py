"""When a step is recorded and what is replayed; that a replay is the step is tested on a card."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from on_backend import stand_in_for_store

import train_autoencoder
from utils.autoencoder import recorded, training
from utils.autoencoder.callbacks import Rounds
from utils.autoencoder.recorded import WARM_UP, Recorder
from utils.settings import read_settings

ONES = torch.ones(3)


@pytest.fixture
def made(monkeypatch):
    """What was recorded: each recording's batch, in order. On a CPU nothing can be."""
    batches = []

    def record(function, batch):
        batches.append(batch)
        return SimpleNamespace(replay=lambda batch: ("replayed", function(batch)))

    monkeypatch.setattr(recorded, "_record", record)
    monkeypatch.setattr(recorded, "_has_room", lambda besides: True)
    return batches


def double(batch):
    return 2 * float(batch.sum())


def test_the_third_run_of_a_form_is_recorded(made):
    recorder = Recorder()
    runs = [recorder.run(double, n * ONES, "a") for n in range(WARM_UP + 2)]
    assert runs == [0.0, 6.0, ("replayed", 12.0), ("replayed", 18.0)]
    assert len(made) == 1
    assert recorder.run(double, ONES, "b") == 6.0
    assert recorder.run(double, torch.ones(4), "a") == 8.0
    assert recorder.run(double, ONES.half(), "a") == 6.0
    recorder.clear()
    assert recorder.run(double, ONES, "a") == 6.0


@pytest.mark.parametrize(
    ("name", "value"), [("_has_room", lambda besides: False), ("_record", None)]
)
def test_what_is_not_recorded_is_run(made, monkeypatch, name, value):
    monkeypatch.setattr(recorded, name, value or (lambda function, batch: None))
    recorder = Recorder()
    assert [recorder.run(double, ONES, "a") for _ in range(2 * WARM_UP)] == 2 * WARM_UP * [6.0]
    assert not made


def test_a_failure_is_told_once_and_nothing_is_tried_again(made, monkeypatch, capsys):
    recorder = Recorder()
    for _ in range(WARM_UP + 1):
        last = recorder.run(double, ONES, "recorded")
    assert last == ("replayed", 6.0)

    def fails(*_, **__):
        try:
            raise RuntimeError("no such operation\nwhile recording")
        finally:
            raise RuntimeError("the recording has ended")

    monkeypatch.undo()
    monkeypatch.setattr(recorded, "_has_room", lambda besides: True)
    monkeypatch.setattr(Recorder, "can_record", True)
    for name in ("CUDAGraph", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    batch = SimpleNamespace(shape=(3,), dtype=torch.float32, sum=lambda: 3.0, to=fails)
    for one in (recorder, Recorder()):
        runs = [one.run(double, batch, "a") for _ in range(2 * WARM_UP)]
        assert runs == 2 * WARM_UP * [6.0]
    assert recorder.run(double, ONES, "recorded") == 6.0
    printed = capsys.readouterr().out
    assert printed.count("Steps cannot be recorded here") == 1
    assert printed.strip().endswith("no such operation")


@pytest.mark.parametrize(("free", "has_room"), [(19, False), (20, True)])
@pytest.mark.parametrize("besides", [0, 10])
def test_a_recording_leaves_room(monkeypatch, free, has_room, besides):
    held = {"max_memory_allocated": 110, "memory_allocated": 100, "empty_cache": None}
    for name, value in (held | {"mem_get_info": (free, 1_000)}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert recorded._has_room(besides) == has_room
    assert not recorded._has_room(free)


def test_measuring_before_the_first_step_changes_nothing(tmp_path, monkeypatch):
    """As a training on a card does, to know how much memory that takes."""
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    settings = read_settings(train_autoencoder, "--n-latents 64 --k 2 --dead-after 64".split())
    ends, rounds = [], Rounds(2, 5)
    monkeypatch.setattr(recorded, "most_taken", lambda: 7)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(training, "torch_device", lambda device=device: device)
        autoencoder = training.build(settings, stand_in_for_store(rows.numpy()), 10)
        batches = (rows.roll(step, 1) for step in itertools.count())
        data = training.TrainingData(lambda step, batches=batches: batches, rows.numpy(), 32)
        (tmp_path / device).mkdir()
        training.train(autoencoder, data, rounds, tmp_path / device, 5)
        log = pd.read_csv(tmp_path / device / "training_log.csv").drop(columns="seconds")
        ends.append([log.to_numpy(), *(weight.numpy() for weight in autoencoder.weights)])
    assert autoencoder.recorder.besides == 7
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
