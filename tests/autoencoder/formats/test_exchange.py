"""What is exported, in the tools themselves: SAELens and sparsify, on real activations."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_disk import small_disk
from keras import ops

from utils import embedded
from utils.activations.store import ActivationStore
from utils.artifacts import AUTOENCODER_FILE
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats import FORMATS, exporting, saelens, sparsify
from utils.autoencoder.formats.folded import Facts, folded, write_files
from utils.autoencoder.formats.source import Source
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.saved import load_autoencoder
from utils.language_model import load_language_model
from utils.settings import FULL, disk_error

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it would decode by it, which needs a GPU

LAYER, N_ROWS = 5, 10_000
PRICE, K = ["--sparsity-coefficient", 2], ["--k", 32]
OF_KIND = {
    "l1": PRICE, "gated": PRICE, "jumprelu": PRICE, "topk": K, "batch_topk": K, "matryoshka": K
}  # fmt: skip
FACTS = Facts("m", "model.layers.3", 64, "d", l0=2.0, fvu=0.5, dead_fraction=0.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run_here) -> SimpleNamespace:
    """Each kind, trained a little on the embedded model's activations and exported, by commands.

    ``rows`` are N_ROWS raw activations; ``folder`` has a folder of each kind.
    """
    folder = tmp_path_factory.mktemp("exchange")
    activations = folder / "activations"
    run_here(
        "save_activations", "--model-name", "embedded", "--dataset", "embedded", "--layer", LAYER,
        "--n-tokens", 10_400, "--context-length", 64, "--activations-dir", activations,
    )  # fmt: skip
    printed = {}
    for kind in OF_KIND:
        tools = ["saelens", "sparsify"] if kind == "topk" else ["saelens"]
        flags = flags_of(folder, kind, folder / kind / "export")
        printed[kind] = run_here("train_autoencoder", *flags, "--export", *tools).stdout
    store = ActivationStore(activations)
    rows = store.kept_rows(range(store.n_contexts)).astype(np.float32)[:N_ROWS]
    assert len(rows) == N_ROWS
    return SimpleNamespace(folder=folder, store=store, rows=rows, printed=printed)


def flags_of(folder: Path, kind: str, export: Path) -> list[object]:
    return [
        "--kind", kind, "--n-latents", 768, "--batch-size", 256, "--n-passes", 1,
        "--backend", "torch", "--pool-gib", 0.02, *OF_KIND[kind],
        "--activations-dir", folder / "activations",
        "--autoencoder-dir", folder / kind / "autoencoder", "--export-dir", export,
    ]  # fmt: skip


def ours_of(exported: SimpleNamespace, kind: str) -> SparseAutoencoder:
    return load_autoencoder(exported.folder / kind / "autoencoder" / AUTOENCODER_FILE)


@torch.no_grad()
def run_here_on(autoencoder: SparseAutoencoder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstructions."""
    return tuple(ops.convert_to_numpy(part(rows)) for part in (autoencoder.encode, autoencoder))


@torch.no_grad()
def run_in_saelens(folder: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    latents = sae.encode(torch.from_numpy(rows))
    return latents.numpy(), sae.decode(latents).numpy()


@torch.no_grad()
def run_in_sparsify(folder: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    values, indices, _ = coder.encode(torch.from_numpy(rows))
    latents = torch.zeros(len(rows), coder.num_latents).scatter(1, indices, values)
    return latents.numpy(), coder.decode(values, indices).numpy()


# --------------------------------------------------------------------------------- same function


def margins(autoencoder: SparseAutoencoder, rows: np.ndarray) -> np.ndarray:
    """How much of a row's largest pre-activation the choice of its latents hangs on, in float64."""
    weights = {weight.name: ops.convert_to_numpy(weight) for weight in autoencoder.weights}
    x = (rows.astype(np.float64) - weights["center"]) * weights["scale"]
    values = x @ weights["W_enc"].T.astype(np.float64) + weights["b_enc"]
    largest = np.abs(values).max(axis=1)
    if hasattr(autoencoder, "k") and "threshold" not in weights:
        ordered = np.sort(values, axis=1)
        return (ordered[:, -autoencoder.k] - ordered[:, -autoencoder.k - 1]) / largest
    threshold = weights.get("threshold", np.exp(weights.get("log_threshold", -np.inf)))
    above = values - threshold
    if "r_mag" in weights:  # gated: what passes the gate is active above 0
        magnitudes = np.exp(weights["r_mag"]) * (values - weights["b_enc"]) + weights["b_mag"]
        above = np.minimum(np.abs(above), np.abs(magnitudes))
    return np.abs(above).min(axis=1) / largest


def require_same(autoencoder, rows, found, expected, tolerance: float) -> None:
    """Row for row, relative; but for rows whose choice of latents hangs on less than 1e-5."""
    differs = ((found[0] > 0) != (expected[0] > 0)).any(axis=1)
    assert differs.mean() < 1e-3
    assert (margins(autoencoder, rows[differs]) < 1e-5).all()
    for one, other in zip(found, expected, strict=True):
        error = np.linalg.norm(one - other, axis=1) / np.linalg.norm(other, axis=1)
        assert error[~differs].max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_computes_the_same(exported, kind):
    ours, expected = ours_of(exported, kind), run_here_on(ours_of(exported, kind), exported.rows)
    assert 1 < (expected[0] > 0).sum(1).mean() < 400  # trained: neither none is active nor all
    folder = exported.folder / kind / "export/saelens"
    require_same(ours, exported.rows, run_in_saelens(folder, exported.rows), expected, 1e-5)
    assert f"Exported to {folder}, for SAELens: " in exported.printed[kind]
    says_so = "jumprelu, which batch_topk and matryoshka are once" in exported.printed[kind]
    assert says_so == (kind in ("batch_topk", "matryoshka"))


def test_sparsify_computes_the_same(exported):
    ours = ours_of(exported, "topk")
    folder = exported.folder / f"topk/export/sparsify/layers.{LAYER}"
    found = run_in_sparsify(folder, exported.rows)
    require_same(ours, exported.rows, found, run_here_on(ours, exported.rows), 1e-5)


@pytest.mark.parametrize(("kind", "tool"), [*((k, saelens) for k in KINDS), ("topk", sparsify)])
def test_what_comes_back_is_the_same_function(exported, kind, tool):
    """In float64 the weights' own difference shows, and not how a product in float32 is rounded."""
    source = Source(str(exported.folder / kind / "export" / tool.NAME))
    (hookpoint,) = tool.hookpoints(source)
    assert sum(hookpoint in one.hookpoints(source) for one in FORMATS) == 1
    imported = tool.read(source, hookpoint)
    ours, back, rows = ours_of(exported, kind), imported.build(), exported.rows[:2_000]
    assert imported.kind == ("jumprelu" if kind in ("batch_topk", "matryoshka") else kind)
    require_same(ours, rows, run_here_on(back, rows), run_here_on(ours, rows), 5e-6)
    before, after = (exactly(each, rows) for each in (ours, back))
    for one, other in zip(after, before, strict=True):
        assert np.linalg.norm(one - other) < 1e-6 * np.linalg.norm(other)
    origin = imported.origin
    assert (origin.format, origin.layer, origin.dtype) == (tool.NAME, LAYER, "float32")
    assert origin.context_length == 64 and origin.model_name == str(embedded.FOLDER / "model")


def exactly(autoencoder: SparseAutoencoder, rows: np.ndarray) -> list[np.ndarray]:
    """What an autoencoder is made of, in float64: pre-activations, thresholds, raw decoder."""
    weights = {
        weight.name: ops.convert_to_numpy(weight).astype(np.float64)
        for weight in autoencoder.weights
    }
    x = (rows - weights["center"]) * weights["scale"]
    found = [x @ weights["W_enc"].T + weights["b_enc"], weights["W_dec"] / weights["scale"]]
    found.append(weights["b_dec"] / weights["scale"] + weights["center"])
    if "r_mag" in weights:
        gain = np.exp(weights["r_mag"])
        found.append(gain * (found[0] - weights["b_enc"]) + weights["b_mag"])
    if "log_threshold" in weights:
        found.append(np.exp(weights["log_threshold"]))
    elif "threshold" in weights:
        found.append(np.full(autoencoder.n_latents, weights["threshold"]))
    return found


def test_standardised_tokens_are_saelens_layer_norm(exported, tmp_path):
    rows, draw = exported.rows[:500], np.random.default_rng(0)
    made = KINDS["topk"](d_model=rows.shape[1], n_latents=96, k=8, standardize_tokens=True)
    made.initialize(0.8, draw.normal(size=rows.shape[1]), np.zeros(rows.shape[1]), 0.5, seed=0)
    saelens.write(made, FACTS, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == "layer_norm"
    expected = run_here_on(made, rows)
    for found in (
        run_in_saelens(tmp_path, rows),
        run_here_on(saelens.read(Source(str(tmp_path)), ".").build(), rows),
    ):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("rescales", [False, True])
def test_a_checkpoint_of_saelens_is_what_it_becomes(tmp_path, rescales):
    """SAELens folds the factor, and turns its BatchTopK into JumpReLU, when the training ends.

    Where decoder norms count, it divides them, and with them the latents, by the factor.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.activation_scaler import ActivationScaler

    torch.manual_seed(0)
    config = BatchTopKTrainingSAEConfig(
        d_in=12, d_sae=40, k=5, rescale_acts_by_decoder_norm=rescales,
        normalize_activations="expected_average_only_in",
    )  # fmt: skip
    trained, rows = BatchTopKTrainingSAE(config), torch.randn(50, 12).numpy()
    for weight in trained.parameters():
        weight.data = 0.5 * torch.randn_like(weight)
    trained.topk_threshold.fill_(1.2)
    trained.save_model(tmp_path / "checkpoint")
    ActivationScaler(1.7).save(str(tmp_path / "checkpoint" / saelens.SCALER))
    trained.fold_activation_norm_scaling_factor(1.7)
    trained.save_inference_model(tmp_path / "final")
    latents, reconstruction = run_in_saelens(tmp_path / "final", rows)
    assert 0.02 < (latents > 0).mean() < 0.5
    for folder, factor in (("checkpoint", 1.7 if rescales else 1), ("final", 1)):
        found = run_here_on(saelens.read(Source(str(tmp_path)), folder).build(), rows)
        np.testing.assert_allclose(found[0], factor * latents, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], reconstruction, rtol=1e-4, atol=1e-5)


def test_saelens_evaluates_as_we_do(exported):
    """On text of the embedded model, with the class and the place that the export names."""
    from tests.benchmarks import exchange

    language_model = load_language_model("embedded", LAYER, "float32")
    tokens = exchange.contexts_without_outliers(exported.store, language_model, exchange.BATCH)
    tokens = tokens[:, :32]
    ours = exchange.evaluate_here(ours_of(exported, "topk"), language_model, LAYER, tokens)
    folder = exported.folder / "topk/export/saelens"
    theirs = exchange.evaluate_in_saelens(folder, str(embedded.model_folder()), tokens)
    assert tokens.size == 256 and 0.3 < ours.variance_explained < 0.99
    assert 0.3 < ours.loss_recovered < 1
    assert theirs == pytest.approx(ours, rel=1e-3)


# --------------------------------------------------------------------------------- the command


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_finished_training_is_exported_by_the_same_command(exported, run_here, tmp_path):
    flags = flags_of(exported.folder, "topk", tmp_path)
    printed = run_here("train_autoencoder", *flags, "--export", "saelens", "sparsify").stdout
    assert "is finished" in printed and printed.count("Exported to") == 2
    written = files_in(tmp_path)
    assert written == files_in(exported.folder / "topk/export")
    coder = f"sparsify/layers.{LAYER}"
    assert set(written) == {
        "saelens/cfg.json", "saelens/sae_weights.safetensors", "sparsify/config.json",
        f"{coder}/cfg.json", f"{coder}/sae.safetensors",
    }  # fmt: skip
    said = json.loads(written["saelens/cfg.json"])["metadata"]
    assert said["hook_name"] == f"model.layers.{LAYER}" and said["prepend_bos"] is True
    assert (said["context_size"], said["model_class_name"]) == (64, "AutoModelForCausalLM")
    metrics = json.loads((exported.folder / "topk/autoencoder/metrics.json").read_text())
    assert said["l0"] == metrics["l0"] and said["fvu"] == metrics["fvu"]


def test_what_was_imported_is_exported_in_turn(exported, run_here, tmp_path):
    """From SAELens' files to sparsify's, by way of ours."""
    printed = run_here(
        "train_autoencoder", "--import-from", exported.folder / "topk/export/saelens",
        "--activations-dir", exported.folder / "activations", "--batch-size", 256,
        "--backend", "torch", "--autoencoder-dir", tmp_path / "imported", "--export", "sparsify",
        "--export-dir", tmp_path / "export",
    ).stdout  # fmt: skip
    folder = tmp_path / f"export/sparsify/layers.{LAYER}"
    assert f"Exported to {folder}, for sparsify." in printed
    ours, rows = ours_of(exported, "topk"), exported.rows[:1_000]
    require_same(ours, rows, run_in_sparsify(folder, rows), run_here_on(ours, rows), 1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--kind", "batch_topk", "--export", "sparsify"],
            "EXPORT cannot be sparsify, which has topk alone, and the autoencoder is batch_topk",
        ),
        (
            ["--export", "saelens", "--sweep-latents", "64", "128", "--sweep-steps", "8", "16"],
            "must be empty in a sweep",
        ),
        (["--export", "saelens", "--export-dir", "/proc/none"], "Cannot write to /proc/none"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    exported, run_here, tmp_path, flags, says
):
    ended = run_here(
        "train_autoencoder", "--backend", "torch", *flags, "--autoencoder-dir", tmp_path / "a",
        "--activations-dir", exported.folder / "activations", check=False,
    )  # fmt: skip
    assert says in ended.message and not (tmp_path / "a").exists()


def test_a_training_on_tensorflow_is_exported_too(exported, run_script, tmp_path):
    """Which crashes, if transformers is imported then."""
    flags = flags_of(exported.folder, "topk", tmp_path / "export")
    flags[flags.index("--autoencoder-dir") + 1] = tmp_path / "autoencoder"
    flags[flags.index("torch")], flags[flags.index(768)] = "tensorflow", 64
    run_script("train_autoencoder", *flags, "--n-passes", 0.03, "--export", "saelens")
    latents, _ = run_in_saelens(tmp_path / "export/saelens", exported.rows[:10])
    assert latents.shape == (10, 64)


def test_activations_of_an_earlier_version_do_not_say_their_block(exported):
    facts = {"folder": exported.folder, "model_name": "embedded", "layer": LAYER}
    assert exported.store.block == f"model.layers.{LAYER}"
    assert exporting.block_of(SimpleNamespace(**facts, block=None)) == exported.store.block


def test_sparsify_has_no_standardised_tokens():
    assert sparsify.refusal("topk", False) is None
    assert "no standardised tokens" in sparsify.refusal("topk", True)


def test_a_full_disk_leaves_no_configuration_that_does_not_fit(tmp_path):
    """No tool opens weights without one; what is there of an earlier export is not mixed up."""
    made, disk = KINDS["l1"](d_model=64, n_latents=512), tmp_path / "disk"
    with small_disk(disk, size=200_000, file_size=100_000):
        write_files(disk / "w", {"a": np.zeros(9)}, disk / "cfg.json", {})
        assert (disk / "cfg.json").exists()
        with pytest.raises(Exception) as error:
            write_files(disk / "w", folded(made), disk / "cfg.json", {})
        assert disk_error(error.value).errno in FULL
        assert [path.name for path in disk.iterdir()] == ["w"]
