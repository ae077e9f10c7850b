"""Autoencoders as files: saved, loaded on any backend, opened with their metrics."""

from pathlib import Path

import keras
import pandas as pd

import utils.autoencoder.kinds  # noqa: F401  tells Keras the kinds
from utils import artifacts
from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import Fidelity
from utils.backend import peak_memory
from utils.settings import Json, require


def save_autoencoder(autoencoder: SparseAutoencoder, path: Path) -> None:
    """Write the weights and configuration as one ``.keras`` file, atomically.

    A copy is saved, for Keras writes the optimiser of a compiled model too, twice its size.
    """
    copy = type(autoencoder).from_config(autoencoder.get_config())
    copy.set_weights(autoencoder.get_weights())
    with artifacts.replacing(path) as partial:
        copy.save(partial)


def _remedy(folder: Path) -> str:
    return f"Delete {folder} and train it again."


def load_autoencoder(path: Path) -> SparseAutoencoder:
    """Load a saved autoencoder, ready to encode and decode, on whatever backend is in use."""
    with artifacts.reading(path, _remedy(path.parent)):
        return keras.saving.load_model(path, compile=False)


def metrics_of(
    autoencoder: SparseAutoencoder,
    fidelity: Fidelity,
    log: pd.DataFrame | None,
    store: ActivationStore,
    backend: str,
) -> dict[str, Json]:
    """What `metrics.json` says of a finished training; ``log`` is None of an imported one."""
    trained = {}
    if log is not None:
        last = log.iloc[-1]
        trained = {
            "dead_fraction": float(keras.ops.mean(keras.ops.cast(autoencoder.dead(), "float32"))),
            "dead_after": autoencoder.dead_after,
            "n_tokens": int(last["tokens"]),
            "n_steps": int(last["step"]),
            "seconds": float(last["seconds"]),
            "tokens_per_second": float(last["tokens"] / last["seconds"]),
        }
    return {
        "fvu": fidelity.fvu,
        "l0": fidelity.l0,
        "cosine": fidelity.cosine,
        "n_held_out_tokens": fidelity.n_rows,
        **trained,
        "backend": backend,
        **peak_memory(),
        "model_name": store.model_name,
        "revision": store.revision,
        "layer": store.layer,
        "context_length": store.context_length,
        "d_model": store.d_model,
        "n_latents": autoencoder.n_latents,
    }


def open_autoencoder(
    folder: str | Path, store: ActivationStore
) -> tuple[SparseAutoencoder, dict[str, Json]]:
    """The autoencoder of a finished training, and what `read_trained` says of it."""
    trained = read_trained(folder, store)
    return load_autoencoder(Path(folder) / artifacts.AUTOENCODER_FILE), trained


def read_trained(folder: str | Path, store: ActivationStore) -> dict[str, Json]:
    """The metrics of a finished training, with its settings and the autoencoder's fingerprint.

    Raises:
        InputError: There is none, it is unfinished, or it was trained on other activations.
    """
    folder = Path(folder)
    if not (folder / artifacts.METRICS_FILE).exists():
        raise artifacts.missing_stage(folder, "finished autoencoder", "train_autoencoder.py")
    metrics = artifacts.read_json(folder / artifacts.METRICS_FILE)
    for name in ("model_name", "layer", "d_model"):
        trained_with, stored = metrics[name], getattr(store, name)
        require(
            trained_with == stored,
            f"The autoencoder in {folder} was trained with {name} {trained_with!r}, and the "
            f"activations in {store.folder} have {stored!r}. Name folders that belong together.",
        )
    settings = artifacts.read_json(folder / artifacts.SETTINGS_FILE)
    require(
        settings["activations"] == store.fingerprint,
        f"The autoencoder in {folder} was trained on other activations than those now in "
        f"{store.folder}. Train it again with --overwrite, or name the folder it was trained on.",
    )
    with artifacts.reading(folder / artifacts.AUTOENCODER_FILE, _remedy(folder)) as path:
        trained = {**settings, **metrics, "fingerprint": artifacts.fingerprint(path)}
    # The setting, where the metric of that name is the number held out; earlier versions had none.
    trained["most_held_out_tokens"] = settings.get("n_held_out_tokens")
    return trained
