"""Several autoencoders by one command."""

import json
import shutil
import sys
import time

import numpy as np
import pytest

import train_autoencoder
from utils import settings as settings_module
from utils.autoencoder import several
from utils.autoencoder.saved import load_autoencoder
from utils.autoencoder.several import Job, jobs_of, train_several
from utils.settings import InputError, TimeIsUp, read_settings


def settings_of(folder, *words):
    flags = ["--activations-dir", folder, "--autoencoder-dir", folder / "trained", *words]
    return read_settings(train_autoencoder, list(map(str, flags)))


@pytest.fixture
def layers(tmp_path):
    for name in ("layer-1", "layer-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
    return tmp_path


def test_each_layer_and_size_is_one(layers):
    assert jobs_of(settings_of(layers / "layer-1")) == []
    assert jobs_of(settings_of(layers)) == [
        Job("layer-1-65536", layers / "layer-1", 65_536),
        Job("layer-3-65536", layers / "layer-3", 65_536),
    ]
    sizes = jobs_of(settings_of(layers / "layer-1", "--n-latents", 8, 16))
    assert [job.name for job in sizes] == ["8", "16"]
    assert len(jobs_of(settings_of(layers, "--n-latents", 8, 16))) == 4
    (layers / "layer-5").mkdir()  # save_activations.py has made it, and not yet begun there
    (layers / "layer-7.log").write_text("")
    for flags, names in (([], ["1", "3"]), (["--follow"], ["1", "3", "5"])):
        jobs = jobs_of(settings_of(layers, *flags))
        assert [job.activations_dir.name for job in jobs] == [f"layer-{n}" for n in names]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--n-latents", 8, 8], r"N_LATENTS must be one size or several different ones; it is \(8"),
        (["--n-latents", 8, 16, "--follow"], "FOLLOW frees what it has used"),
        (["--export", "saelens"], "EXPORT is of one autoencoder"),
        (["--import-from", "x"], "IMPORT_FROM is of one autoencoder"),
        (["--sweep-latents", 8, 16], "SWEEP_LATENTS is of one autoencoder"),
    ],
)
def test_what_is_of_one_is_refused(layers, words, says):
    with pytest.raises(InputError, match=says):
        jobs_of(settings_of(layers, *words))


STAND_IN = """
import os, sys, time
words = dict(zip(sys.argv[4::2], sys.argv[5::2]))
begun = time.time()
time.sleep(0.5)
card, end = os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()
hours = [words["--max-hours"]] if "--max-hours" in words else []
print(begun, end, card, words["--n-latents"], *hours, flush=True)
sys.exit(int(sys.argv[1]) if words["--n-latents"] == "16" else 0)
"""


def run(tmp_path, monkeypatch, status, n_cards, *flags):
    """A script that waits, in place of training; begin, end, card and size of each."""
    script = tmp_path / "script.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", [str(script), str(status), "--n-latents", "4"])
    monkeypatch.setattr(several, "count_cards", lambda: n_cards)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    settings = settings_of(tmp_path, "--n-latents", 8, 16, 32, *flags)
    train_several(settings, jobs_of(settings))
    logs = sorted((tmp_path / "trained").glob("*.log"))
    return [log.read_text().split() for log in logs]


def test_as_many_run_at_once_as_there_are_cards_each_on_its_own(tmp_path, monkeypatch):
    ran = sorted(run(tmp_path, monkeypatch, 0, 2))
    assert {size for *_, size in ran} == {"8", "16", "32"}
    begun, ended = ([float(one[i]) for one in ran] for i in (0, 1))
    assert begun[1] < ended[0] and begun[2] >= min(ended[:2])
    assert {ran[0][2], ran[1][2]} == {"5", "7"}


def test_one_that_fails_is_named_and_the_others_are_finished(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"1 of 3 failed.*trained/16\.log\.$"):
        run(tmp_path, monkeypatch, 1, 1)
    assert len(list((tmp_path / "trained").glob("*.log"))) == 3


def test_time_is_up_for_all_of_them(tmp_path, monkeypatch):
    """Each gets what is left, and none begins when nothing is."""
    monkeypatch.setattr(settings_module, "STARTED", time.monotonic())
    with pytest.raises(TimeIsUp):
        run(tmp_path, monkeypatch, 0, 1, "--max-hours", 0.3 / 3_600)
    (log,) = (tmp_path / "trained").glob("*.log")
    assert 0 < float(log.read_text().split()[-1]) * 3_600 < 0.3


def test_each_is_what_a_command_for_it_alone_writes(tiny_run, run_script, tmp_path):
    for name in ("layer-1", "layer-2"):
        shutil.copytree(tiny_run.folder / "activations", tmp_path / name)
    flags = [*tiny_run.flags.train_autoencoder, "--activations-dir", tmp_path, "--autoencoder-dir"]
    printed = run_script("train_autoencoder", *flags, tmp_path / "trained").stdout
    assert printed.count("variance explained") == 2
    alone = load_autoencoder(tiny_run.folder / "autoencoder" / "autoencoder.keras").get_weights()
    for name in ("layer-1-128", "layer-2-128"):
        folder = tmp_path / "trained" / name
        assert json.loads((folder / "settings.json").read_text())["n_latents"] == 128
        for one, other in zip(
            alone, load_autoencoder(folder / "autoencoder.keras").get_weights(), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
