"""Autoencoders that other libraries trained on the tiny run's activations, kept with their outputs.

tests/data/make_peer_autoencoders.py made them.
"""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hand_set import array

from utils.activations.store import ActivationStore
from utils.autoencoder.formats.check import check
from utils.autoencoder.formats.importing import find, require_fits
from utils.autoencoder.formats.source import Source
from utils.autoencoder.saved import open_autoencoder

KINDS = {
    "dictionary_learning-batch_topk": "batch_topk",
    "dictionary_learning-matryoshka": "matryoshka",
    "saelens-topk": "topk",
    "saelens-jumprelu": "jumprelu",
    "saelens-gated": "gated",
    "sparsify-topk": "topk",
}
FOLDERS = ("autoencoder", "analysis", "influence")
SETTINGS = SimpleNamespace(
    held_out=0.05, n_held_out_tokens=1_000_000, batch_size=1_024, accept_mismatch=False
)


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    with tarfile.open(ROOT / "tests" / "data" / "peers.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "peers"


@pytest.mark.parametrize("name", KINDS)
def test_it_gives_what_its_library_gave(peers, tiny_run, name):
    rows, latents, reconstruction = (
        np.load(peers / name / f"{array}.npy") for array in ("rows", "latents", "reconstruction")
    )
    imported = find(Source(str(peers / name)), None)
    assert imported.kind == KINDS[name]
    made = imported.build()
    assert 2 < (latents > 0).sum(axis=1).mean() < 12
    close = {"rtol": 1e-5, "atol": 1e-5 * abs(latents).max()}
    np.testing.assert_allclose(array(made.encode(rows)), latents, **close)
    np.testing.assert_allclose(array(made(rows)), reconstruction, **close)
    np.testing.assert_allclose(array(made.decode(latents, rows)), reconstruction, **close)
    # And it is found right on activations, by the figures that its source states too.
    store = ActivationStore(tiny_run.folder / "activations")
    require_fits(imported, store, False)
    assert check(imported, made, store, SETTINGS) < 0.2


@pytest.fixture(scope="module")
def imported(peers, tiny_run, run_here, tmp_path_factory) -> SimpleNamespace:
    """BatchTopK of dictionary_learning, imported by the command; its ``flags``, what it said."""
    folder = tmp_path_factory.mktemp("imported")
    source = peers / "dictionary_learning-batch_topk"
    flags = ["--import-from", source, "--backend", "torch"]
    flags += ["--activations-dir", tiny_run.folder / "activations"]
    flags += ["--autoencoder-dir", folder / "autoencoder"]
    printed = run_here("train_autoencoder", *flags).stdout
    return SimpleNamespace(folder=folder, source=source, flags=flags, printed=printed)


def test_the_command_writes_what_a_training_writes(imported, tiny_run, run_here):
    folder = imported.folder / "autoencoder"
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = np.load(imported.source / "rows.npy")
    error = rows - np.load(imported.source / "reconstruction.npy")
    fvu = np.square(error).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert metrics["fvu"] == pytest.approx(fvu, rel=0.15)  # of other rows
    assert metrics["l0"] == pytest.approx(4, rel=0.1) and metrics["dead_fraction"] < 0.2
    assert metrics["kind"] == "batch_topk" and metrics["k"] == 4
    origin = metrics["imported"]
    assert origin["source"] == str(imported.source) and origin["revision"] is None
    assert (origin["format"], origin["model_name"], origin["layer"]) == (
        "dictionary_learning", "tiny", 1,
    )  # fmt: skip
    store = ActivationStore(tiny_run.folder / "activations")
    autoencoder, trained = open_autoencoder(folder, store)
    assert trained["held_out"] == 0.05 and trained["kind"] == "batch_topk"
    latents = np.load(imported.source / "latents.npy")
    np.testing.assert_allclose(array(autoencoder.encode(rows)), latents, rtol=1e-5, atol=1e-4)
    settings = json.loads((folder / "settings.json").read_text())
    assert set(settings) == {
        "script", "import_from", "hookpoint", "held_out", "n_held_out_tokens", "activations",
    }  # fmt: skip
    for said in ("Importing . of", "batch_topk with 96 latents of width 32", "On 2,"):
        assert said in imported.printed


def test_a_finished_import_is_shown_and_no_other_is_mixed_in(imported, peers, run_here):
    folder = imported.folder / "autoencoder"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}
    printed = run_here("train_autoencoder", *imported.flags).stdout
    assert "is finished" in printed and "batch_topk with 96 latents" in printed
    other = [*imported.flags, "--import-from", peers / "sparsify-topk"]
    ended = run_here("train_autoencoder", *other, check=False)
    assert "holds a run with other settings" in ended.message and "IMPORT_FROM: " in ended.message
    ended = run_here("train_autoencoder", *imported.flags[2:], check=False)
    assert "IMPORT_FROM: " in ended.message and "None now" in ended.message
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix} == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--n-latents", 96, "--learning-rate", 1], "N_LATENTS, LEARNING_RATE is of training"),
        (["--import-from", "None", "--hookpoint", "a"], "HOOKPOINT is for IMPORT_FROM, which is"),
        (["--hookpoint", "a"], "HOOKPOINT must be one that"),
        (["--import-from", "nothing here"], "there is no folder 'nothing here', and a repository"),
    ],
)
def test_wrong_settings_of_an_import(imported, run_here, tmp_path, flags, says):
    flags = [*imported.flags, "--autoencoder-dir", tmp_path / "out", *flags]
    ended = run_here("train_autoencoder", *flags, check=False)
    assert ended.returncode == 1 and says in ended.message
    assert not list(tmp_path.glob("out/*.keras"))


def test_it_is_analysed_steered_and_attributed(imported, tiny_run, run_here):
    places = [f"--{name}-dir={imported.folder / name}" for name in FOLDERS]
    activations = f"--activations-dir={tiny_run.folder / 'activations'}"
    run_here(
        "analyze_features", *places[:2], activations, "--n-loss-tokens", 512, "--n-reported", 5,
        "--studies", "outputs", "directions", "--no-map-features", "--n-neuron-tokens", 2_048,
    )  # fmt: skip
    summary = json.loads((imported.folder / "analysis" / "summary.json").read_text())
    assert summary["kind"] == "batch_topk" and summary["n_latents"] == 96
    assert 0 < summary["fvu"] < 0.3 and summary["l0"] == pytest.approx(4, rel=0.1)
    assert summary["directions"] and summary["outputs"]["n_features"] > 20
    assert (imported.folder / "analysis" / "browser" / "index.html").exists()
    printed = run_here(
        "influence_llm", *places, "--prompt", "rose tulip ship", "--max-new-tokens", 30,
        "--strength", 0, 8,
    ).stdout  # fmt: skip
    lines = (imported.folder / "influence" / "generations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["steered"] != records[-1]["untouched"] and "untouched" in printed
    run_here(
        "influence_llm", *places, activations, "--study", "attribute", "--prompt",
        "rose tulip ship", "--n-ablated", 5, "--n-prompts", 2, "--features-per-prompt", 4,
    )  # fmt: skip
    attributed = pd.read_csv(imported.folder / "influence" / "attribution.csv")
    assert len(attributed) == 5 and attributed["attribution"].abs().gt(0).all()
    assert np.sign(attributed["attribution"].iloc[0]) == np.sign(attributed["ablation"].iloc[0])
