"""Export: a steering vector as a file for other programs.

Other programs add a constant vector at every position:

    v = Σ_i c_i · max_i · W_dec,i / ‖W_dec,i‖ / scale    raw residual stream, shape (d_model,)

for features i at c_i times their maxima. A clamp also subtracts the features' present activations,
so the two agree where the features are not active; elsewhere v comes on top. And v is added to BOS
and other outliers too, which `steered` leaves alone.

.safetensors   ``steering_vector`` (d_model,) in float32, its settings in the metadata
.gguf          a control vector of llama.cpp: run it with ``--control-vector FILE``
.json          arguments of NPVector.new in the package neuronpedia; strength 1 adds v

llama.cpp adds tensor ``direction.N`` to the output of its block N, counted from 0 (`build_cvec`
after the block's last addition), which is our layer N; it has no direction for block 0.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from utils.artifacts import replacing
from utils.autoencoder.saved import load_autoencoder
from utils.features.dashboards import model_id
from utils.language_model import read_config
from utils.settings import Json, require
from utils.steering.clamps import Clamp, change_by
from utils.steering.feature_model import FeatureEncoder

FORMATS = (".safetensors", ".gguf", ".json")


def require_exportable(paths: Sequence[str], layer: int) -> None:
    """Refuse paths with an unknown ending or that cannot be written to, and layer 0 for llama.cpp.

    Raises:
        InputError: A path is refused.
    """
    for path in map(Path, paths):
        require(
            path.suffix in FORMATS, f"SAVE_VECTOR must end in {' or '.join(FORMATS)}; it is {path}."
        )
        require(
            path.parent.is_dir() and os.access(path.parent, os.W_OK),
            f"SAVE_VECTOR must be in a folder that exists and can be written to; {path} is not.",
        )
        require(not path.is_dir(), f"SAVE_VECTOR must be a file; {path} is a folder.")
        require(
            path.suffix != ".gguf" or layer > 0,
            "llama.cpp has no control vector for layer 0. Save a .safetensors instead.",
        )


def steering_vector(encoder: FeatureEncoder, clamps: Sequence[Clamp]) -> torch.Tensor:
    """The change that clamps make where their features are inactive: raw, float32, (d_model,).

    Raises:
        InputError: The change differs from token to token; or a strength is so large that the
            vector is not finite.
    """
    require(
        not encoder.autoencoder.standardize_tokens,
        "SAVE_VECTOR needs a change that is the same at every token; this autoencoder standardises "
        "each token, so that a feature's change is as long as the token's own deviation. Leave it "
        "out: the script's own texts and the playground do it right.",
    )
    added = [dataclasses.replace(clamp, how="add") for clamp in clamps]
    vector = change_by(encoder, added)(torch.zeros(encoder.d_model))
    require(
        bool(vector.isfinite().all()),
        f"STRENGTH must keep a saved vector finite; at {[clamp.strength for clamp in clamps]} it "
        "is not. −10 to 10 is the useful range.",
    )
    return vector


def save_vectors(
    paths: Sequence[str], clamps: Sequence[Clamp], summary: dict[str, Json], autoencoder_path: Path
) -> None:
    """Save the steering vector of clamps to every path; the paths' endings choose the formats.

    Args:
        summary: The catalogue's, for the model's name and the layer.

    Raises:
        InputError: As for `steering_vector`.
    """
    name, layer = summary["model_name"], summary["layer"]
    architecture = read_config(name, layer).get_text_config().model_type
    vector = steering_vector(FeatureEncoder(load_autoencoder(autoencoder_path)), clamps)
    for path in map(Path, paths):
        save_vector(path, vector, clamps, name, architecture, layer)
        print(f"Saved {path}: norm {vector.norm():.4g}, for the output of block {layer}.")


def save_vector(
    path: Path,
    vector: torch.Tensor,
    clamps: Sequence[Clamp],
    model_name: str,
    architecture: str,
    layer: int,
) -> None:
    """Save the `steering_vector` of clamps, to be added to the output of block ``layer``.

    ``architecture`` is the model's as llama.cpp names it, such as "llama".
    """
    settings = {
        "model_name": model_name,
        "layer": str(layer),
        "features": json.dumps([clamp.feature for clamp in clamps]),
        "strengths": json.dumps([clamp.strength for clamp in clamps]),
        "maxima": json.dumps([clamp.maximum for clamp in clamps]),
        "unit": "raw residual stream, added to the output of the block at every position",
    }
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            save_file({"steering_vector": vector.contiguous()}, partial, metadata=settings)
        elif path.suffix == ".json":
            partial.write_text(json.dumps(as_np_vector(vector, clamps, model_name, layer)), "utf-8")
        else:
            _write_control_vector(partial, vector.numpy(), settings, architecture, layer)


def as_np_vector(
    vector: torch.Tensor, clamps: Sequence[Clamp], model_name: str, layer: int
) -> dict[str, Json]:
    """The arguments of ``NPVector.new`` of neuronpedia 1.2, which makes a vector on Neuronpedia."""
    return {
        "label": ", ".join(f"feature {clamp.feature} at {clamp.strength:g}" for clamp in clamps),
        "model_id": model_id(model_name),
        "layer_num": layer,
        "hook_type": "hook_resid_post",
        "vector": vector.tolist(),
        "default_steer_strength": 1.0,
    }


def _write_control_vector(
    path: Path, vector: np.ndarray, settings: dict[str, str], architecture: str, layer: int
) -> None:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", architecture)
    writer.add_uint32("controlvector.layer_count", 1)  # of the directions in the file
    for name, value in settings.items():
        writer.add_string(f"controlvector.{name}", value)  # for people: llama.cpp ignores them
    writer.add_tensor(f"direction.{layer}", vector.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
