"""Folders that commit d597169 wrote: finished ones stay as they are, half-finished ones go on."""

import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from tests.compare_runs import Rule, read_json, unequal
from utils.activations.shards import EARLIER_ARRAYS
from utils.activations.store import LAST_CONTEXTS, ActivationStore
from utils.autoencoder.fidelity import measure_fidelity
from utils.autoencoder.saved import open_autoencoder

ARCHIVE = ROOT / "tests" / "data" / "d597169.tar.xz"
RETIRED_COLUMNS = {"context_likeness"}  # of features.parquet, that later versions do not write

# The flags of tests/data/make_fixture.sh, without the folders that are written to.
ACTIVATIONS = [
    "--model-name", "model", "--layer", 1, "--dtype", "float32", "--dataset", "text.jsonl",
    "--n-tokens", 3_072, "--context-length", 32, "--contexts-per-batch", 4,
    "--tokens-per-shard", 512,
]  # fmt: skip
TRAINING = [
    "--activations-dir", "activations", "--held-out", 0.2, "--batch-size", 64,
    "--dead-after", 2_000, "--backend", "torch",
]  # fmt: skip
ROUNDS = ["--learning-rate", 1e-3, "--n-passes", 10, "--log-every", 20, "--backup-every", 4]
TOPK = [*TRAINING, *ROUNDS, "--k", 4, "--n-latents", 64]
SMALL = [*TRAINING, *ROUNDS, "--k", 4, "--n-latents", 32]
L1 = [*TRAINING, *ROUNDS, "--kind", "l1", "--sparsity-coefficient", 0.3, "--n-latents", 64]
SWEEP = [
    *TRAINING, "--k", 4, "--learning-rate-decay", 0.5, "--sweep-latents", 8, 16,
    "--sweep-steps", 32, 64, 128, "--sweep-learning-rates", 0.5, 1, 2,
]  # fmt: skip
ANALYSIS = [
    "--activations-dir", "activations", "--autoencoder-dir", "autoencoder",
    "--n-loss-tokens", 512, "--n-reported", 5, "--batch-size", 1_024, "--no-map-features",
    "--other-autoencoders", "autoencoder-small",
]  # fmt: skip
INFLUENCE = [
    "--autoencoder-dir", "autoencoder", "--analysis-dir", "analysis",
    "--influence-dir", "influence",
]  # fmt: skip
STEERING = [
    *INFLUENCE, "--prompt", "rose tulip ship", "--feature", "anchor", "--max-new-tokens", 12,
    "--strength", 0, 1, 2,
]  # fmt: skip
EVIDENCE = [*INFLUENCE, "--study", "evidence", "--n-features", 1, "--max-new-tokens", 16]


@pytest.fixture(autouse=True)
def earlier(tmp_path, monkeypatch) -> Path:
    """The folders of the archive, in the folder where the scripts are run from."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, locks and checksums apart."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".lock", ".checksums"))
    }


def read_log(folder: str) -> pd.DataFrame:
    return pd.read_csv(Path(folder) / "training_log.csv")


# ------------------------------------------------------------------------------- what is finished


# By script: its flags for a finished folder, and what it says of that.
FINISHED = (
    ("save_activations", [*ACTIVATIONS, "--activations-dir", "activations"], "3,072 tokens"),
    ("train_autoencoder", [*TOPK, "--autoencoder-dir", "autoencoder"], "is finished"),
    (
        "train_autoencoder",
        [*TOPK, "--n-held-out-tokens", "None", "--autoencoder-dir", "autoencoder"],
        "is finished",
    ),
    ("train_autoencoder", [*SMALL, "--autoencoder-dir", "autoencoder-small"], "is finished"),
    ("train_autoencoder", [*L1, "--autoencoder-dir", "autoencoder-l1"], "is finished"),
    ("analyze_features", [*ANALYSIS, "--analysis-dir", "analysis"], "is finished"),
    ("influence_llm", STEERING, "the model was not loaded"),
)


def test_finished_folders_stay_as_they_are(earlier, run_here):
    before = files_of(earlier)
    for name, flags, words in FINISHED:
        assert words in run_here(name, *flags).stdout
        after = files_of(earlier)
        after.pop("influence/feature-38.png", None)  # which that version did not draw
        assert after == before


def test_overwrite_deletes_no_run_of_the_same_settings(earlier, run_here):
    before = files_of(earlier)
    for name, flags, words in FINISHED[:-1]:
        assert words in run_here(name, *flags, "--overwrite").stdout
        assert files_of(earlier) == before


@pytest.mark.parametrize("folder", ["autoencoder", "autoencoder-small", "autoencoder-l1"])
def test_autoencoders_reconstruct_as_they_did(folder):
    store = ActivationStore("activations")
    autoencoder, trained = open_autoencoder(folder, store)
    split = store.split(trained["held_out"], trained["most_held_out_tokens"])
    assert split.rule == LAST_CONTEXTS and "split" not in trained
    held_out = split.held_out
    fidelity = measure_fidelity(autoencoder, (batch.rows for batch in store.batches(held_out, 64)))
    assert fidelity.fvu == pytest.approx(trained["fvu"], rel=1e-3)
    assert fidelity.l0 == pytest.approx(trained["l0"], rel=1e-3)


def test_an_analysis_is_searched(run_here):
    request = json.loads(Path("influence/generations.jsonl").read_text().split("\n")[0])["request"]
    printed = run_here(
        "analyze_features", "--search", "anchor", "--analysis-dir", "analysis"
    ).stdout
    assert re.search(rf"\b{request['features'][0]}\b", printed) and "anchor" in printed


def test_a_finished_sweep_is_not_trained_again(run_here):
    before = files_of(Path("sweep"))
    printed = run_here("train_autoencoder", *SWEEP, "--autoencoder-dir", "sweep").stdout
    assert "lowest loss" in printed and "step/s" not in printed
    after = files_of(Path("sweep"))
    assert after.pop("scaling_laws.png").startswith(b"\x89PNG")  # the archive has no pictures
    names = ("settings.json", "scaling_laws.csv", "scaling_laws.json")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert set(after) == set(before)


@pytest.mark.parametrize(
    ("name", "flags", "differing"),
    [
        ("save_activations", [*ACTIVATIONS, "--layer", 2, "--activations-dir", "activations-half"],
         "LAYER: 1 there, 2 now"),
        ("train_autoencoder", [*TOPK, "--seed", 1, "--autoencoder-dir", "autoencoder-half"],
         "SEED: 0 there, 1 now"),
        ("train_autoencoder",
         [*TOPK, "--n-held-out-tokens", 512, "--autoencoder-dir", "autoencoder-half"],
         "N_HELD_OUT_TOKENS: None there, 512 now"),
        ("analyze_features", [*ANALYSIS, "--seed", 1, "--analysis-dir", "analysis-half"],
         "SEED: 0 there, 1 now"),
        ("analyze_features", [*ANALYSIS, "--n-studied", 5, "--analysis-dir", "analysis"],
         "N_STUDIED: 1000 there, 5 now"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(earlier, run_here, name, flags, differing):
    before = files_of(earlier)
    ended = run_here(name, *flags, check=False)
    assert ended.returncode == 1
    assert re.findall(r"^  (\w+: .*)$", ended.message, re.MULTILINE) == [differing]
    assert files_of(earlier) == before


# --------------------------------------------------------------------------- what is half-finished


def test_activations_go_on(run_here):
    whole, half = Path("activations"), Path("activations-half")
    begun = read_json(half / "manifest.json")
    written = {f"{entry['shard']:05d}" for entry in begun["shards"]}
    assert 0 < len(written) < 6 and not begun["finished"]
    printed = run_here("save_activations", *ACTIVATIONS, "--activations-dir", half).stdout
    assert "3,072 tokens" in printed and "making it anew" not in printed
    assert set(files_of(half)) == set(files_of(whole))
    for path in whole.glob("*.npy"):
        if path.stem.rpartition("-")[2] in written:
            assert (half / path.name).read_bytes() == path.read_bytes()
        # Another machine's activations may be rounded otherwise, to float16.
        np.testing.assert_allclose(np.load(half / path.name), np.load(path), rtol=2e-3, atol=1e-5)
    manifests = read_json(whole / "manifest.json"), read_json(half / "manifest.json")
    assert manifests[1]["shards"][: len(written)] == begun["shards"]
    for entry in manifests[1]["shards"][len(written) :]:
        assert entry.pop("contexts_per_batch") == 4
    for manifest in manifests:
        manifest["position"] = manifest["position"][:2]  # without places, which are new
        for entry in manifest["shards"]:
            entry["start"] = entry["start"][:2]
            assert set(entry.pop("crc32")) == set(EARLIER_ARRAYS)
    assert not [place for place in unequal(*manifests, Rule(None)) if place.relative > 1e-3]


def test_training_goes_on(run_here):
    folder = Path("autoencoder-half")
    earlier_log = read_log(folder)
    assert (folder / "backup.keras").exists() and not (folder / "metrics.json").exists()
    printed = run_here("train_autoencoder", *TOPK, "--autoencoder-dir", folder).stdout
    begun = re.search(r"Going on from step (\d+)", printed)
    assert begun
    log, whole = read_log(folder), read_log("autoencoder")
    n_kept = int((log["step"] <= int(begun[1])).sum())
    assert 0 < n_kept <= len(earlier_log) < len(log) == len(whole)
    pd.testing.assert_frame_equal(log[:n_kept][[*earlier_log]], earlier_log[:n_kept], rtol=1e-12)
    terms = log[["loss_reconstruction", "loss_auxiliary"]]  # an earlier log has no such columns
    assert terms[:n_kept].isna().all(axis=None) and terms[n_kept:].notna().all(axis=None)
    log, whole = (one[[*earlier_log]].drop(columns="seconds") for one in (log, whole))
    pd.testing.assert_frame_equal(log, whole, check_exact=False, rtol=0.02)
    metrics = read_json(folder / "metrics.json"), read_json(Path("autoencoder") / "metrics.json")
    for name in ("fvu", "l0", "cosine", "dead_fraction", "n_tokens", "n_steps"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=0.02), name
    assert metrics[0]["split"] == LAST_CONTEXTS  # as it was begun
    assert not (folder / "backup.keras").exists()


def test_a_backup_with_averaged_weights_is_refused(run_here):
    path = Path("autoencoder-half") / "backup.keras"
    with zipfile.ZipFile(path) as backup:
        parts = {name: backup.read(name) for name in backup.namelist()}
    config = parts["config.json"]
    parts["config.json"] = config.replace(b'"use_ema": false', b'"use_ema": true')
    assert parts["config.json"] != config
    with zipfile.ZipFile(path, "w") as backup:
        for name, content in parts.items():
            backup.writestr(name, content)
    ended = run_here("train_autoencoder", *TOPK, "--autoencoder-dir", path.parent, check=False)
    assert re.search(r"no use_ema.*Delete it to train from the start", ended.message)


def test_a_sweep_goes_on(run_here):
    folder = Path("sweep-half")
    finished = pd.read_csv(folder / "scaling_laws.csv")
    backups = list(folder.glob("sweep-*.keras"))
    assert 0 < len(finished) < 6 and backups
    printed = run_here("train_autoencoder", *SWEEP, "--autoencoder-dir", folder).stdout
    begun = re.search(r"sizes, steps: +(\d+)%", printed)
    assert begun and int(begun[1]) > 0  # from where the backups were
    table, whole = (pd.read_csv(Path(f) / "scaling_laws.csv") for f in (folder, "sweep"))
    sizes = ["n_latents", "steps", "learning_rate"]
    pd.testing.assert_frame_equal(table.merge(finished[sizes]), finished.sort_values(sizes))
    table, whole = (one.drop(columns="seconds") for one in (table, whole))
    pd.testing.assert_frame_equal(table, whole, check_exact=False, rtol=0.02)
    assert not list(folder.glob("*.keras"))


def test_an_analysis_goes_on(run_here):
    whole, half = Path("analysis"), Path("analysis-half")
    before = files_of(half)
    kept = [name for name in before if re.fullmatch(r"study-.*|pass\..*|examples\..*", name)]
    assert "pass.json" in kept and any(name.startswith("study-") for name in kept)
    assert "summary.json" not in before and "browser/index.html" not in before
    printed = run_here("analyze_features", *ANALYSIS, "--analysis-dir", half).stdout
    assert "variance explained" in printed
    assert {name: files_of(half)[name] for name in kept} == {name: before[name] for name in kept}
    tables = [pd.read_parquet(folder / "features.parquet") for folder in (half, whole)]
    missing = set(tables[1]) - set(tables[0])
    assert missing <= RETIRED_COLUMNS
    pd.testing.assert_frame_equal(tables[0], tables[1].drop(columns=missing), rtol=1e-3)
    summaries = [read_json(folder / "summary.json") for folder in (half, whole)]
    assert (
        set(summaries[0]) - {"made_of"}
        == set(summaries[1])
        >= {"explanations", "outputs", "splitting"}
    )
    for name in ("n_alive", "fvu", "loss_recovered", "n_tokens"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], rel=1e-3), name
    assert (half / "browser" / "index.html").exists() and not list(half.glob(".partial-*"))


# ---------------------------------------------------------------------------------- what is added


def test_studies_of_an_analysis_are_left_out(run_here):
    before = files_of(Path("analysis"))
    flags = [*ANALYSIS, "--analysis-dir", "analysis", "--studies", "outputs", "splitting"]
    assert "Kept, and not shown" in run_here("analyze_features", *flags).stdout
    kept = [name for name in before if re.match(r"study-|pass\.|settings|examples", name)]
    after = files_of(Path("analysis"))
    assert len(kept) > 10 and all(after[name] == before[name] for name in kept)
    summary = read_json(Path("analysis") / "summary.json")
    assert "splitting" in summary and "explanations" not in summary
    assert "is finished" in run_here("analyze_features", *flags).stdout


def test_a_text_is_added(run_here):
    log = Path("influence/generations.jsonl")
    before = log.read_bytes()
    printed = run_here("influence_llm", *STEERING[:-3], 0, 1.5).stdout
    assert "was not loaded" not in printed
    assert log.read_bytes().startswith(before)
    old, new = (json.loads(line) for line in log.read_text().split("\n")[2:4])
    assert new["request"] == old["request"] | {"strength": 1.5}
    assert new["untouched"] == old["untouched"]


def test_evidence_is_not_written_again(run_here):
    names = ("evidence.jsonl", "evidence.json", "evidence_features.csv", "evidence_curves.csv")
    before = files_of(Path("influence"))
    run_here("influence_llm", *EVIDENCE)
    after = files_of(Path("influence"))
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
