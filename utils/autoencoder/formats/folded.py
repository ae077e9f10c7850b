"""An autoencoder of this project in the terms that other tools share, and its files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from keras import ops
from safetensors.numpy import save_file

from utils.artifacts import replacing
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats.imported import products
from utils.backend import Tensor
from utils.settings import Json


@dataclasses.dataclass(frozen=True)
class Facts:
    """What other tools are told about an autoencoder.

    Attributes:
        model_name: A hub name or a folder, which transformers can load.
        block: The module whose output it reads, as ``"model.layers.15"``.
        context_length: Tokens of the contexts that it was trained on, the first of them BOS.
        dataset: A hub name or a folder.
        l0, fvu, dead_fraction: As measured here.
    """

    model_name: str
    block: str
    context_length: int
    dataset: str
    l0: float
    fvu: float
    dead_fraction: float


def folded(autoencoder: SparseAutoencoder) -> dict[str, np.ndarray]:
    """Weights that take raw activations a, without scale and center, float32.

        π = W_enc (a − b_dec) + b_enc,   â = b_dec + f W_dec

    with the latents f unchanged. That b_dec is subtracted first keeps sums, and so their rounding,
    small where the mean of the activations is large. If the kind standardises tokens, a is what
    that gives.

    Returns:
        ``W_enc`` and ``W_dec`` (n_latents, d_model), ``b_enc``, ``b_dec``, and ``b_mag`` of gated.
    """
    W_enc, W_dec, b_enc, b_dec, scale, center = (
        as_array(getattr(autoencoder, name))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "scale", "center")
    )
    exact = b_dec.astype(np.float64) / scale + center
    b_dec = exact.astype(np.float32)
    # Of b_dec as it is in float32, so that π does not feel how it was rounded.
    shift = products(W_enc, scale * (b_dec.astype(np.float64) - center))
    weights = {
        "W_enc": W_enc * scale,
        "W_dec": W_dec / scale,
        "b_enc": (b_enc + shift).astype(np.float32),
        "b_dec": b_dec,
    }
    if hasattr(autoencoder, "b_mag"):
        r_mag, b_mag = as_array(autoencoder.r_mag), as_array(autoencoder.b_mag)
        weights["b_mag"] = (b_mag + np.exp(r_mag.astype(np.float64)) * shift).astype(np.float32)
    return weights


def as_array(weight: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(weight)


def write_files(
    weights_path: Path, weights: dict[str, np.ndarray], config_path: Path, config: dict[str, Json]
) -> None:
    """Write weights, and then their configuration, without which no tool opens them.

    So a kill leaves an earlier pair, a whole new one, or no configuration.
    """
    weights_path.parent.mkdir(parents=True, exist_ok=True)
    config_path.unlink(missing_ok=True)
    with replacing(weights_path, is_whole=False) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, partial)
    write_config(config_path, config)


def write_config(path: Path, config: dict[str, Json]) -> None:
    """Write a JSON file, atomically; without a checksum, which is none of another tool's files."""
    with replacing(path, is_whole=False) as partial:
        partial.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
