"""The four scripts as a user runs them: on a tiny model, on the embedded one, on bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SCRIPTS, SUBSETS, Flags, save_tiny_model
from full_disk import small_disk

from utils.activations.store import ActivationStore
from utils.artifacts import CHECKSUMS_FILE, write_json
from utils.features.analysis import missing_in_words
from utils.features.catalogue import Catalogue, save_features

FOLDERS = ("activations", "autoencoder", "analysis", "influence")
FINISHED = {  # what each says of a run that is
    "save_activations": "activations holds 49,152 tokens",
    "train_autoencoder": "autoencoder is finished",
    "analyze_features": "analysis is finished",
    "influence_llm": "the model was not loaded",
}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file below a folder, locks apart; of a feature's picture, which is
    drawn again, the content alone."""
    return {
        str(path.relative_to(folder)): (
            0 if path.match("feature-*.png") else path.stat().st_mtime_ns,
            path.read_bytes(),
        )
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


@pytest.fixture
def copied(tiny_run, tiny_model, tiny_text, tmp_path) -> Flags:
    """The flags of a copy of the tiny run, which a test may spoil; its ``folder`` too."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    flags = Flags(folder, tiny_model, tiny_text)
    flags.folder = folder
    return flags


@pytest.fixture(scope="session")
def refused(run_here):
    """Run a command that must end in one message, and return the message."""

    def run(name: str, *flags: object) -> str:
        ended = run_here(name, *flags, check=False)
        assert ended.returncode == 1, ended.stdout
        assert ended.message.strip().startswith(f"{name}.py: ")
        return ended.message

    return run


# ------------------------------------------------------------------------------- what is written


def test_activations(tiny_run):
    folder = tiny_run.folder / "activations"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["finished"] and manifest["d_model"] == 32 and manifest["layer"] == 1
    assert len(manifest["shards"]) == 48
    assert np.load(folder / "activations-00000.npy").shape == (32, 32, 32)
    kept = int(re.search(r"kept ([\d,]+)", tiny_run.printed[SCRIPTS[0]])[1].replace(",", ""))
    assert kept == sum(shard["kept"] for shard in manifest["shards"])
    assert kept + sum(manifest["excluded"].values()) == 49_152


def test_autoencoder(tiny_run):
    folder = tiny_run.folder / "autoencoder"
    metrics = json.loads((folder / "metrics.json").read_text())
    log = pd.read_csv(folder / "training_log.csv")
    assert 0 < metrics["fvu"] < 0.6
    assert metrics["l0"] == pytest.approx(4, abs=0.1)
    assert 0 <= metrics["dead_fraction"] < 0.5
    assert metrics["n_tokens"] == log["tokens"].iloc[-1] == metrics["n_steps"] * 64
    assert metrics["tokens_per_second"] > 0
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    assert (folder / "autoencoder.keras").exists()
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_whole_documents_are_held_out(tiny_run):
    metrics = json.loads((tiny_run.folder / "autoencoder" / "metrics.json").read_text())
    store = ActivationStore(tiny_run.folder / "activations")
    training, held_out, rule = store.split(0.05, 1_000_000)
    assert metrics["split"] == rule == "document hash"
    assert metrics["n_held_out_tokens"] == len(store.kept_rows(held_out))
    owners = store.read("documents", range(store.n_contexts))[:, 1]
    assert not set(owners[training]) & set(owners[held_out])
    assert len(held_out) == round(0.05 * store.n_contexts)
    assert held_out.min() < 0.2 * store.n_contexts and held_out.max() > 0.8 * store.n_contexts


def test_an_analysis_of_a_part_is_of_all_the_data(tiny_run, run_here, tmp_path):
    flags = ["--n-tokens", 3_200, "--studies", "specificity", "--n-neuron-tokens", 3_200]
    flags = [*tiny_run.flags.analyze_features, *flags, "--analysis-dir", tmp_path]
    printed = run_here("analyze_features", *flags).stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    contexts = pd.read_parquet(tmp_path / "examples.parquet")["context"]
    assert set(contexts) <= {n * 1_536 // 100 for n in range(100)}
    assert contexts.min() < 200 and contexts.max() > 1_400
    assert summary["share_analysed"] == pytest.approx(100 / 1_536)
    assert "Analysed: 6.5% of the saved contexts, evenly spaced over all; N_TOKENS" in printed
    summary["subset_shares"] |= {"Desert": 0.0, "Sea": 0.0}
    assert "and nothing of Desert, Sea; N_TOKENS" in missing_in_words(summary)[0]
    assert missing_in_words({"subset_shares": {"a": 0.0}}) == []  # of an earlier version


def test_analysis(tiny_run):
    folder = tiny_run.folder / "analysis"
    summary = json.loads((folder / "summary.json").read_text())
    features = pd.read_parquet(folder / "features.parquet")
    examples = pd.read_parquet(folder / "examples.parquet")
    assert summary["n_latents"] == len(features) == 128
    assert summary["n_alive"] == (~features["dead"]).sum() > 0
    assert 0 < summary["fvu"] < 0.6
    assert set(features["top_subset"]) == {"Garden", "Harbour"}
    assert set(examples["bucket"]) == {0, 1, 2, 3, 4, 5}
    assert features["umap_x"].isna().all()  # no map was asked for
    pictures = {"density", "l0", "fidelity", "fidelity_by_subset", "specificity", "completeness"}
    pictures |= {"neurons", "directions", "explanations", "outputs"}
    assert {path.stem for path in folder.glob("*.png")} == pictures
    shown = {path.stem for path in (folder / "browser" / "pictures").iterdir()}
    assert shown == pictures and (folder / "browser" / "index.html").exists()
    assert "Garden" in (folder / "browser" / "data" / "index.js").read_text()
    assert features["neighbours"].map(len).eq(10).sum() == summary["n_alive"]


def test_studies(tiny_run):
    folder = tiny_run.folder / "analysis"
    summary = json.loads((folder / "summary.json").read_text())
    features = pd.read_parquet(folder / "features.parquet")
    scores = pd.read_csv(folder / "specificity.csv")
    assert set(scores["feature"]) == set(features["feature"][~features["dead"]])
    assert features["specificity"].between(0, 3).sum() == len(set(scores["feature"]))
    levels = summary["specificity"]
    assert levels[-1]["mean"] > levels[-1]["chance"] and levels[-1]["n_features"] > 20
    words = pd.read_csv(folder / "completeness.csv")
    assert set(words["word"]) >= {word for words in SUBSETS.values() for word in words}
    [fit] = summary["completeness"]  # of words that a context's end cuts, too
    assert 16 <= fit["n_words"] == len(words) and fit["n_alive"] == summary["n_alive"]
    neurons = pd.read_csv(folder / "neurons.csv")
    assert summary["neurons"]["n_features"] == len(neurons) > 20
    assert neurons["block"].isin([0, 1]).all() and neurons["correlation"].between(0, 1.001).all()
    fidelity = pd.read_csv(folder / "fidelity.csv", index_col="subset")
    assert set(fidelity.index) == {"all", "Garden", "Harbour"} and (fidelity["kl"] > 0).all()
    reconstruction = summary["cross_entropy"]["reconstruction"]
    assert isinstance(summary["cross_entropy"]["n_tokens"], int)
    assert fidelity["reconstruction"]["all"] == pytest.approx(reconstruction, rel=1e-4)
    assert len(summary["directions"]) == 6 and "splitting" not in summary  # no other size
    printed = tiny_run.printed["analyze_features"]
    assert "Special directions: ablating a feature changes predictions by" in printed
    assert "Specificity, 0 to 3: " in printed and f"of {len(words)} words have" in printed


def test_influence(tiny_run):
    lines = (tiny_run.folder / "influence" / "generations.jsonl").read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    assert len(records) == 6
    assert len({record["untouched"] for record in records}) == 1
    assert records[-1]["steered"] != records[-1]["untouched"]
    printed = tiny_run.printed["influence_llm"]
    assert "Prompt: rose tulip ship" in printed and "ablation" in printed


def test_finished_scripts_do_nothing(copied, run_here):
    before = files_of(copied.folder)
    for _ in range(2):
        for name, words in FINISHED.items():
            assert words in run_here(name, *getattr(copied, name)).stdout
        assert files_of(copied.folder) == before


def test_a_backup_left_by_a_kill_at_the_very_end_goes(copied, run_here):
    left = copied.folder / "autoencoder" / "backup.keras"
    left.write_bytes(b"of a finished training")
    run_here("train_autoencoder", *copied.train_autoencoder)
    assert not left.exists()


# ----------------------------------------------------------------------------- the embedded model


def test_embedded_model_end_to_end(tmp_path, run_script, embedded_model, embedded_pile):
    places = {name: [f"--{name}-dir", tmp_path / name] for name in FOLDERS}
    printed = run_script(
        "save_activations", "--model-name", "embedded", "--dataset", "embedded", "--layer", 7,
        "--n-tokens", 16_384, "--context-length", 64, *places["activations"], OMP_NUM_THREADS="2",
    ).stdout  # fmt: skip
    assert "holds 16,384 tokens" in printed
    run_script(
        "train_autoencoder", "--n-latents", 512, "--k", 16, "--batch-size", 256, "--n-passes", 6,
        "--log-every", 50, *places["activations"], *places["autoencoder"],
    )  # fmt: skip
    metrics = json.loads((tmp_path / "autoencoder" / "metrics.json").read_text())
    assert metrics["fvu"] < 0.65
    run_script(
        "analyze_features", "--n-loss-tokens", 1_024, "--n-studied", 100, "--n-explained", 30,
        "--n-neuron-tokens", 4_096, *places["activations"], *places["autoencoder"],
        *places["analysis"], OMP_NUM_THREADS="2",
    )  # fmt: skip
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    assert 0 < summary["loss_recovered"] < 1
    losses = summary["cross_entropy"]
    assert losses["untouched"] < losses["reconstruction"] < losses["zero_ablated"]
    features = pd.read_parquet(tmp_path / "analysis" / "features.parquet")
    assert (features["umap_x"].notna() == ~features["dead"]).all()
    assert len(set(features["top_subset"])) >= 4
    assert (tmp_path / "analysis" / "umap.png").exists()
    run_script(
        "influence_llm", "--strength", 10, "--max-new-tokens", 16, *places["autoencoder"],
        *places["analysis"], *places["influence"],
    )  # fmt: skip
    record = json.loads((tmp_path / "influence" / "generations.jsonl").read_text())
    assert record["untouched"].strip() and record["untouched"] != record["steered"]


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "flags", "rule"),
    [
        ("save_activations", ["--n-tokens", 0], "N_TOKENS must be greater than 0; it is 0"),
        ("train_autoencoder", ["--k", 129, "--n-latents", 128], "K must be at most N_LATENTS, 128"),
        ("analyze_features", ["--n-reported", 0], "N_REPORTED must be greater than 0; it is 0"),
        ("influence_llm", ["--prompt", " "], "PROMPT must hold some text; it is empty"),
    ],
)
def test_a_mistake_ends_the_process_with_one_line(run_script, name, flags, rule):
    done = run_script(name, *flags, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip().startswith(f"{name}.py: {rule}")
    assert done.stderr.strip().count("\n") == 0


def test_hub_model_without_a_network(run_script, tmp_path):
    done = run_script(
        "save_activations", "--model-name", "meta-llama/no-such-model", "--activations-dir",
        tmp_path / "out", check=False, HF_HUB_OFFLINE="1", HF_TOKEN="",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in ("meta-llama/no-such-model", "cannot be reached", "--model-name embedded"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--layer", 4], "LAYER must be between 0 and 3 for .*; it is 4"),
        (["--layer", -1], "LAYER must be between 0 and 3 for .*; it is -1"),
        (["--n-tokens", -5], "N_TOKENS must be greater than 0; it is -5"),
        (["--context-length", 1], "CONTEXT_LENGTH must be at least 2"),
        (["--context-length", 257], "CONTEXT_LENGTH must be at most 256 for .*; it is 257"),
        (["--outlier-factor", 1.0], "OUTLIER_FACTOR must be greater than 1; it is 1.0"),
        (["--dataset", "/no/such/file"], "no file or folder '/no/such/file'"),
    ],
)
def test_wrong_settings_of_save_activations(refused, tiny_run, tmp_path, flags, rule):
    words = [*tiny_run.flags.save_activations, "--activations-dir", tmp_path / "out", *flags]
    assert re.search(rule, refused("save_activations", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.jsonl", b"", "must hold documents with a text; it holds no record"),
        ("latin.txt", b"caf\xe9", "must be UTF-8; byte 3 is not"),
        ("short.txt", b"rose", "fewer tokens than CONTEXT_LENGTH, 32"),
    ],
)
def test_useless_text(refused, tiny_run, tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    flags = ["--dataset", tmp_path / name, "--activations-dir", tmp_path / "out"]
    message = refused("save_activations", *tiny_run.flags.save_activations, *flags)
    assert str(tmp_path / name) in message and rule in message
    assert not list(tmp_path.glob("out/*.npy"))


def test_records_without_a_text_are_skipped_and_reported(run_here, tiny_run, tiny_text, tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = tiny_text.read_text().splitlines()[:20]
    path.write_text("\n".join(['{"title": "no text"}', lines[0], "no json", *lines[1:]]))
    printed = {
        dataset: run_here(
            "save_activations", *tiny_run.flags.save_activations, "--dataset", dataset,
            "--n-tokens", 640, "--activations-dir", tmp_path / dataset.stem,
        ).stdout
        for dataset in (path, tiny_text)
    }  # fmt: skip
    assert "Skipped 1 records without a text." in printed[path]
    assert "Skipped 1 records not JSON." in printed[path]
    assert "Skipped" not in printed[tiny_text]
    tokens = [np.load(tmp_path / name / "tokens-00000.npy") for name in ("mixed", "tiny")]
    assert np.array_equal(*tokens)


@pytest.mark.parametrize(("name", "folder"), list(zip(SCRIPTS, FOLDERS, strict=True)))
def test_an_output_that_cannot_be_written(refused, tiny_run, tmp_path, name, folder):
    (tmp_path / "file").write_text("of the user's")
    out = tmp_path / "file" / "out"
    message = refused(name, *getattr(tiny_run.flags, name), f"--{folder}-dir", out)
    assert f"Cannot write to {out}" in message
    assert (tmp_path / "file").read_text() == "of the user's"


@pytest.mark.parametrize(
    ("name", "flags", "differing"),
    [
        ("save_activations", ["--layer", 2], "LAYER: 1 there, 2 now"),
        ("train_autoencoder", ["--k", 8], "K: 4 there, 8 now"),
        ("analyze_features", ["--seed", 1], "SEED: 0 there, 1 now"),
    ],
)
def test_other_settings_are_refused(refused, copied, name, flags, differing):
    before = files_of(copied.folder)
    message = refused(name, *getattr(copied, name), *flags)
    assert differing in message and "--overwrite" in message
    assert files_of(copied.folder) == before


@pytest.mark.parametrize(
    ("name", "flag", "first"),
    [
        ("train_autoencoder", "--activations-dir", "save_activations.py"),
        ("analyze_features", "--activations-dir", "save_activations.py"),
        ("analyze_features", "--autoencoder-dir", "train_autoencoder.py"),
        ("influence_llm", "--analysis-dir", "analyze_features.py"),
        ("influence_llm", "--autoencoder-dir", "train_autoencoder.py"),
    ],
)
def test_a_missing_input_names_the_script_that_makes_it(refused, copied, name, flag, first):
    flags = [*getattr(copied, name), flag, copied.folder / "nowhere"]
    output = {"train_autoencoder": "autoencoder", "analyze_features": "analysis"}
    if name in output:
        flags += [f"--{output[name]}-dir", copied.folder / "out"]
    if flag == "--autoencoder-dir" and name == "train_autoencoder":
        flags = flags[:-2]
    message = refused(name, *flags)
    assert f"Run {first} first" in message and "nowhere" in message
    assert not (copied.folder / "nowhere").exists() and not (copied.folder / "out").exists()


def test_training_refuses_what_cannot_work(refused, tiny_run, tmp_path):
    for flags, rule in (
        (["--kind", "topp"], "it is 'topp'. Did you mean 'topk'?"),
        (["--held-out", 1.0], "HELD_OUT must be between 0 and 1; it is 1.0"),
        (["--batch-size", 10**6], "BATCH_SIZE must be at most the number of training tokens"),
        (["--n-passes", 1e-5], "N_PASSES must be enough for a batch of 64 of the"),
        (["--learning-rate", -1.0], "LEARNING_RATE must be greater than 0; it is -1.0"),
        (["--learning-rate-decay", 2.0], "LEARNING_RATE_DECAY must be a share from 0 to 1; it is"),
        (["--seed", -1], "SEED must not be negative; it is -1"),
        (["--n-passes", "inf"], "N_PASSES must be a finite number; it is inf"),
        (["--dead-after", 3 * 10**9], "DEAD_AFTER must be at most 1,073,741,824 tokens"),
        (["--decoder-norm", 0.5], "DECODER_NORM is for rows that are not held at norm 1"),
        (["--sweep-latents", 64, "--sweep-steps", 8], "N_LATENTS, N_PASSES, LOG_EVERY, BACKUP_EV"),
    ):
        words = [*tiny_run.flags.train_autoencoder, "--autoencoder-dir", tmp_path / "out", *flags]
        assert rule in refused("train_autoencoder", *words)
        assert not list(tmp_path.glob("out/*.*s*v*"))


def test_a_loss_that_is_not_a_number_ends_training(refused, tiny_run, tmp_path):
    flags = ["--learning-rate", 1e30, "--autoencoder-dir", tmp_path]
    message = refused("train_autoencoder", *tiny_run.flags.train_autoencoder, *flags)
    assert "The loss is nan in round" in message and "Lower LEARNING_RATE" in message
    assert not list(tmp_path.glob("*.keras")) and not (tmp_path / "metrics.json").exists()


def test_activations_that_the_autoencoder_is_not_for(run_here, refused, copied, tmp_path):
    def save(name, *flags):
        words = ["--n-tokens", 2_048, *flags, "--activations-dir", tmp_path / name]
        run_here("save_activations", *copied.save_activations, *words)
        words = ["--activations-dir", tmp_path / name, "--analysis-dir", tmp_path / "out"]
        return refused("analyze_features", *copied.analyze_features, *words)

    assert "was trained with layer 1, and the activations in" in save("layer", "--layer", 2)
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert "trained with model_name" in save("model", "--model-name", other)
    assert "trained on other activations" in save("less")
    # A model of another width that took the place of the one analysed.
    path = copied.folder / "autoencoder" / "metrics.json"
    write_json(path, {**json.loads(path.read_text()), "d_model": 48})
    assert "trained with d_model 48" in save("width")
    assert not (tmp_path / "out").exists()


def test_training_on_a_disk_that_becomes_full_goes_on_when_there_is_room(
    run_here, refused, tiny_run, tmp_path
):
    folder = tmp_path / "disk"
    flags = [*tiny_run.flags.train_autoencoder, "--autoencoder-dir", folder]
    with small_disk(folder, 249_856, 60_000) as make_room:
        message = refused("train_autoencoder", *flags)
        assert re.search(
            f"Cannot write backup.keras in {folder}: .* What was saved before", message
        )
        assert not list(folder.glob(".partial-*"))
        n_lines = len((folder / "training_log.csv").read_text().splitlines())
        was_backed_up = (folder / "backup.keras").exists()
        make_room()
        printed = run_here("train_autoencoder", *flags).stdout
        assert ("Going on from step" in printed) == was_backed_up
        log = pd.read_csv(folder / "training_log.csv")
    whole = pd.read_csv(tiny_run.folder / "autoencoder" / "training_log.csv")
    assert 1 < n_lines < len(log) == len(whole)
    assert log["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=1e-4)


def test_a_truncated_shard_is_named_with_its_repair(refused, copied):
    path = copied.folder / "activations" / "activations-00003.npy"
    path.write_bytes(path.read_bytes()[:-1000])
    for name, folder in (("train_autoencoder", "autoencoder"), ("analyze_features", "analysis")):
        flags = [*getattr(copied, name), f"--{folder}-dir", copied.folder / "out"]
        message = refused(name, *flags)
        assert str(path) in message and "run save_activations.py again" in message
    assert not (copied.folder / "out" / "metrics.json").exists()


def test_what_save_activations_says(run_here, tiny_run, copied):
    """Sizes, rates and times with units that suit them; a repair within its bar; the end, once."""
    printed = tiny_run.printed["save_activations"]
    assert re.search(r"\(d_model 32\): 3\.83 MB of [\d,.]+ [MGT]B free\.$", printed, re.MULTILINE)
    assert re.search(
        r"runs [\d,.]+ tokens/s: about (a|[\d.]+) seconds? in all\.$", printed, re.MULTILINE
    )
    assert re.search(
        r"left out [\d,]+ at BOS, [\d,]+ outliers \(norm above [\d.]+\)\.$", printed.strip()
    )
    for shard in (3, 7):
        (copied.folder / "activations" / f"activations-{shard:05d}.npy").unlink()
    printed = run_here("save_activations", *copied.save_activations).stdout
    bars = re.findall(r"extracting: *(\d+)%.*?([\d.]+)k/([\d.]+)k", printed)
    assert bars[0] == ("96", "49.2", "51.2") and bars[-1] == ("100", "51.2", "51.2")
    printed = run_here("save_activations", *copied.save_activations).stdout
    assert printed.count("Nothing to do") == printed.count("49,152 tokens") == 1


def test_damaged_autoencoders_are_named_with_the_remedy(refused, copied):
    folder = copied.folder / "autoencoder"
    whole = (folder / "autoencoder.keras").read_bytes()
    (folder / "autoencoder.keras").write_bytes(whole[:-100])
    flags = ["--analysis-dir", copied.folder / "out"]
    message = refused("analyze_features", *copied.analyze_features, *flags)
    assert f"{folder / 'autoencoder.keras'} is damaged" in message and "Delete" in message
    (folder / "metrics.json").unlink()
    (folder / "backup.keras").write_bytes(whole[:-100])
    message = refused("train_autoencoder", *copied.train_autoencoder)
    assert f"{folder / 'backup.keras'} is damaged" in message
    assert "Delete it to train from the start" in message
    assert (folder / "backup.keras").exists()


READ_BY = {
    "activations/manifest.json": ["train_autoencoder", "analyze_features", "save_activations"],
    "autoencoder/settings.json": ["train_autoencoder", "analyze_features"],
    "autoencoder/metrics.json": ["train_autoencoder", "analyze_features"],
    "autoencoder/autoencoder.keras": ["train_autoencoder", "analyze_features", "influence_llm"],
    "analysis/settings.json": ["analyze_features"],
    "analysis/summary.json": ["analyze_features", "influence_llm"],
    "analysis/features.parquet": ["analyze_features", "influence_llm"],
    "analysis/examples.parquet": ["analyze_features"],
    "analysis/vocabulary.json": ["analyze_features"],
    "analysis/specificity.csv": ["analyze_features"],
    "analysis/pass.json": ["analyze_features"],  # these are read if the analysis is unfinished
    "analysis/pass.parquet": ["analyze_features"],
    "analysis/study-outputs.json": ["analyze_features"],
    "analysis/study-outputs.parquet": ["analyze_features"],
}


def flip(content: bytes) -> bytes:
    """The last digit of a number that has several, or the bit of a byte, changed."""
    place = len(content) // 2
    if numbers := list(re.finditer(rb"\d\.\d+(?=[,\s])", content)):
        place = numbers[-1].end() - 1
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("name", READ_BY)
def test_a_changed_bit_is_named_with_the_remedy(refused, copied, name):
    """In every file that is read again; and in one that is cut, empty or missing."""
    path = copied.folder / name
    if re.search("pass|study", name):
        (copied.folder / "analysis" / "browser" / "index.html").unlink()
    whole = path.read_bytes()
    for content in (flip(whole), whole[:-9], b"", None):
        if content is None and name.endswith(("settings.json", "manifest.json", "metrics.json")):
            continue  # then the folder holds no run, or an unfinished one
        if content is None and re.search("summary|pass.json|study.*json|csv", name):
            continue  # as the last, no analysis; it is made again
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for script in READ_BY[name]:
            message = refused(script, *getattr(copied, script))
            assert str(path if content is not None else path.parent) in message
            assert re.search("Delete|Run", message)
        path.write_bytes(whole)


def test_folders_without_checksums_are_valid(run_here, copied):
    for log in copied.folder.rglob(CHECKSUMS_FILE):
        log.unlink()
    for name, words in FINISHED.items():
        assert words in run_here(name, *getattr(copied, name)).stdout


def test_features_that_cannot_be_clamped(refused, copied):
    path = copied.folder / "analysis" / "features.parquet"
    features = pd.read_parquet(path)
    features.loc[7, "dead"] = True
    save_features(path, features)
    before = files_of(copied.folder)
    for feature, rule in (
        (128, "FEATURE must be from 0 to 127"),
        (-1, "it is -1"),
        (7, "7 was active on no token"),
        ("zebra", "it is 'zebra', and none was found"),
    ):
        assert rule in refused("influence_llm", *copied.influence_llm, "--feature", feature)
    assert files_of(copied.folder) == before


def test_texts_of_another_encoding_are_refused(refused, tiny_run, tmp_path):
    """What a terminal of another encoding gives, as Python holds it."""
    for script, flag, name in (
        ("influence_llm", "--prompt", "PROMPT"),
        ("influence_llm", "--feature", "FEATURE"),
        ("analyze_features", "--search", "SEARCH"),
        ("analyze_features", "--search-prompt", "SEARCH_PROMPT"),
    ):
        message = refused(script, *getattr(tiny_run.flags, script), flag, "caf\udce9")
        assert f"{name} must be UTF-8; 'caf\\udce9' is not. Convert it" in message


def test_an_analysis_of_another_autoencoder(run_here, refused, copied):
    flags = ["--seed", 1, "--autoencoder-dir", copied.folder / "other"]
    run_here("train_autoencoder", *copied.train_autoencoder, *flags, "--n-passes", 0.1)
    message = refused("influence_llm", *copied.influence_llm, *flags[2:])
    assert "Run analyze_features.py for this autoencoder" in message


def test_other_dictionaries_must_be_of_other_sizes(refused, copied):
    flags = ["--other-autoencoders", copied.folder / "autoencoder"]
    message = refused("analyze_features", *copied.analyze_features, *flags, "--overwrite")
    assert "OTHER_AUTOENCODERS must be of other sizes" in message


def test_a_word_finds_a_feature(run_here, tiny_run, tmp_path):
    catalogue = Catalogue(tiny_run.folder / "analysis")
    feature = catalogue.search("anchor", 1)["feature"].item()
    printed = run_here(
        "influence_llm", *tiny_run.flags.influence_llm, "--feature", "anchor", "--strength", 5,
        "--max-new-tokens", 5, "--influence-dir", tmp_path,
    ).stdout  # fmt: skip
    assert f"Feature {feature} is taken," in printed and "anchor" in printed
