"""Training on four virtual devices does what it does on one. JAX only, as in Keras."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK_TO_COMPILE, ROOT, environment
from on_devices import BACKUP_AT, KINDS, NEW_KIND

from utils.autoencoder.devices import use_devices
from utils.autoencoder.saved import load_autoencoder
from utils.settings import InputError

pytest.importorskip("jax")
N_STEPS, BATCH, D_MODEL = 24, 32, 16
DISTRIBUTIONS = ("data", "model")
# More devices than cores wait for one another; on a busy machine for more than XLA's 40 seconds.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder that all distributions wrote to, "single" last, for it goes on with "model"."""
    folder = tmp_path_factory.mktemp("devices")
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, D_MODEL))
    batches = (draw.random((N_STEPS, BATCH, 40)) < 0.1) @ features
    np.save(folder / "batches.npy", batches.astype(np.float32))

    def train(name: str) -> None:
        n_devices = 1 if name == "single" else 4
        flags = f"--xla_force_host_platform_device_count={n_devices} {PATIENT} {QUICK_TO_COMPILE}"
        done = subprocess.run(
            [sys.executable, "-m", "tests.on_devices", name, folder], cwd=ROOT,
            env=environment(XLA_FLAGS=flags), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(len(DISTRIBUTIONS)) as pool:
        list(pool.map(train, DISTRIBUTIONS))
    train("single")
    return folder


def log_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "training_log.csv").drop(columns="seconds")


def assert_same_training(one: Path, other: Path, leave_out: tuple[str, ...] = ()) -> None:
    logs = [log_of(folder).drop(columns=list(leave_out)) for folder in (one, other)]
    assert len(logs[0]) == N_STEPS
    pd.testing.assert_frame_equal(*logs, check_exact=False, rtol=1e-4)


@pytest.mark.parametrize("kind", (*KINDS, NEW_KIND))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_trains_as_one_device_does(trained, distribution, kind):
    # 48 instead of 50 rows are evaluated where four devices share them.
    leave_out = ("val_fvu",) if distribution == "data" else ()
    assert_same_training(trained / "single" / kind, trained / distribution / kind, leave_out)
    losses = log_of(trained / distribution / kind)["loss"]
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean()


def test_dead_latents_are_trained_meanwhile(trained):
    log = log_of(trained / "single" / "topk")
    assert log["dead_fraction"].max() > 0 and log["loss_auxiliary"].max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_what_was_saved_encodes_the_same(trained, distribution, kind):
    """Loaded on one device, on another backend, what four devices encoded."""
    activations = np.load(trained / "batches.npy")[0][:-1]
    autoencoder = load_autoencoder(trained / distribution / kind / "autoencoder.keras")
    latents = np.load(trained / distribution / kind / "latents.npy")
    assert (latents > 0).any()
    found = autoencoder.encode(activations).detach().numpy()
    np.testing.assert_allclose(found, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["single/topk", "data/topk", "model/topk"])
def test_goes_on_from_a_backup(trained, where):
    assert N_STEPS / 2 < BACKUP_AT < N_STEPS
    assert_same_training(trained / where, trained / f"{where}-resumed")


def test_one_device_goes_on_with_what_several_began(trained):
    assert_same_training(trained / "model" / "topk", trained / "model" / "topk-resumed-by-one")


def test_latents_and_moments_are_split(trained):
    """By device under "model": every weight with latents, and its moments; nothing else."""
    layouts = json.loads((trained / "model" / "layouts.json").read_text())
    split = {path for path, layout in layouts.items() if "latents" in layout}
    names = "W_enc b_enc W_dec idle_tokens r_mag b_mag log_threshold gain".split()
    expected = {path for path in layouts if any(name in path for name in names)}
    assert split == expected
    for name in ("/gain", "_gain_momentum", "_W_dec_velocity"):
        assert {path for path in split if path.endswith(name)}, name


def test_refuses_what_devices_cannot_share(trained):
    said = json.loads((trained / "data" / "refusals.json").read_text())
    assert said == [
        "BATCH_SIZE must be a multiple of the 4 devices that share it; it is 30.",
        "N_LATENTS must be a multiple of the 4 devices that share it; it is 66.",
    ]
    said = json.loads((trained / "single" / "refusals.json").read_text())
    assert len(said) == 2 and all("JAX sees one" in message for message in said)


def test_refuses_other_backends():
    with pytest.raises(InputError, match=r"needs BACKEND jax.*it is torch"):
        use_devices("data", 32, (64,))
