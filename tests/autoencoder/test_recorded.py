"""When a step is recorded and what is replayed; that a replay is the step is tested on a card."""

from types import SimpleNamespace

import pytest
import torch

from utils.autoencoder import recorded
from utils.autoencoder.recorded import WARM_UP, Recorder

ONES = torch.ones(3)


@pytest.fixture
def made(monkeypatch):
    """What was recorded: each recording's batch, in order. On a CPU nothing can be."""
    batches = []

    def record(function, batch):
        batches.append(batch)
        return SimpleNamespace(replay=lambda batch: ("replayed", function(batch)))

    monkeypatch.setattr(recorded, "_record", record)
    monkeypatch.setattr(recorded, "_has_room", lambda: True)
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


@pytest.mark.parametrize(("name", "value"), [("_has_room", lambda: False), ("_record", None)])
def test_what_is_not_recorded_is_run(made, monkeypatch, name, value):
    monkeypatch.setattr(recorded, name, value or (lambda function, batch: None))
    recorder = Recorder()
    assert [recorder.run(double, ONES, "a") for _ in range(2 * WARM_UP)] == 2 * WARM_UP * [6.0]
    assert not made


def test_a_failure_is_told_once_and_nothing_is_tried_again(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no such operation\nwhile recording")

    batch = SimpleNamespace(shape=(3,), dtype=torch.float32, sum=lambda: 3.0, to=fails)
    monkeypatch.setattr(recorded, "_has_room", lambda: True)
    monkeypatch.setattr(Recorder, "can_record", True)
    for name in ("CUDAGraph", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for _ in range(2):
        recorder = Recorder()
        runs = [recorder.run(double, batch, "a") for _ in range(2 * WARM_UP)]
        assert runs == 2 * WARM_UP * [6.0]
    printed = capsys.readouterr().out
    assert printed.count("Steps cannot be recorded here") == 1
    assert printed.strip().endswith("no such operation")
