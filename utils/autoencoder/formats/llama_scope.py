"""Llama Scope 1 and 2, by lm-saes, now llamascopium: a folder for each autoencoder.

    1   hyperparams.json, checkpoints/final.safetensors: encoder.weight (n, d), encoder.bias,
        decoder.weight (d, n), decoder.bias; one jump_relu_threshold in the .json
    2   config.json, sae_weights.safetensors: W_E (d, n), b_E, W_D (n, d), b_D, for jumprelu
        activation_function.log_jumprelu_threshold (n,), and a number
        dataset_average_activation_norm.HOOK; at first (R1-Distill) with the names of 1 and
        log_jumprelu_threshold

    x = √d / norm · activations     norm: the dataset's average, if norm_activation is dataset-wise
    π = encoder.weight x + encoder.bias
    f = π where π · ‖decoder row‖ > θ (jumprelu), is among the k largest (topk), or > 0 (relu)
    reconstruction = norm / √d · (decoder.weight f + decoder.bias)

The row's norm counts if sparsity_include_decoder_norm; the decoder's bias is subtracted from x if
apply_decoder_bias_to_pre_encoder, which is not published. Version 1 compares its θ after √d / norm
is folded into the weights, so that here θ is multiplied by it.
"""

import math

import numpy as np

from utils.autoencoder.formats.hooks import layer_of
from utils.autoencoder.formats.imported import (
    Imported,
    Origin,
    log_threshold,
    without_decoder_bias,
)
from utils.autoencoder.formats.source import (
    Source,
    Tensors,
    arrays,
    count,
    dtype_of,
    entry,
    folders_with,
    inside,
    matrix_shape,
)
from utils.settings import Json, require

LEAST_NORM = 1e-12  # of a decoder row; one of zeros stays so
FILES = (  # configuration and weights, of version 1 and 2
    ("hyperparams.json", "checkpoints/final.safetensors"),
    ("config.json", "sae_weights.safetensors"),
)
KINDS = {"jumprelu": "jumprelu", "topk": "topk", "relu": "l1"}
# Our names of the weights, theirs in version 1 and 2, and which of these are turned round.
LINEAR = {
    "W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}  # fmt: skip
PLAIN = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
THRESHOLD, NORM = "log_jumprelu_threshold", "dataset_average_activation_norm"
MODELS = {"Llama3_1-8B-Base-": "meta-llama/Llama-3.1-8B"}  # by the beginning of folders' names


def hookpoints(source: Source) -> list[str]:
    """The folders that hold an autoencoder; "." is the source's own."""
    return [*_folders(source)]


def _folders(source: Source) -> dict[str, tuple[str, str]]:
    """The names of configuration and weights by folder."""
    return {folder: names for names in FILES for folder in folders_with(source, *names)}


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder of a folder.

    Raises:
        InputError: It is of a kind that is not known here, or not of a block's output; or its
            files are not as above.
    """
    config_file, file = (inside(hookpoint, name) for name in _folders(source)[hookpoint])
    config = source.json(config_file)
    _require_supported(config, config_file)
    layer, notes = layer_of(config["hook_point_in"])
    tensors = {
        name.removeprefix("activation_function."): values
        for name, values in source.tensors(file).items()
    }
    norms = config.get(NORM) or {}
    for name in [name for name in tensors if name.startswith(f"{NORM}.")]:
        norms[name.removeprefix(f"{NORM}.")] = tensors.pop(name).item()
    held = _held(config, tensors, file)
    scale = _scale(config, norms, len(held["b_dec"]), config_file)
    models = [model for beginning, model in MODELS.items() if beginning in hookpoint]
    origin = Origin(
        format="llama_scope",
        hookpoint=hookpoint,
        model_name=models[0] if models else None,
        layer=layer,
        dtype=dtype_of(tensors),
        notes=notes,
    )
    kind, options = KINDS[_activation(config)], {}
    if kind == "topk":
        options["k"] = count(config, "top_k", config_file)
    return Imported(kind, options, _folded(kind, config, held, scale), origin)


def _activation(config: dict[str, Json]) -> str:
    """The act_fn; version 1 takes a topk for which it states a threshold as jumprelu."""
    return "jumprelu" if config.get("jump_relu_threshold") else config["act_fn"]


def _require_supported(config: dict[str, Json], file: str) -> None:
    """Refuse what there is no kind for, by name."""
    kind, place = config.get("sae_type", "sae"), entry(config, file, "hook_point_in")
    target, activation = config.get("hook_point_out", place), entry(config, file, "act_fn")
    require(
        kind == "sae" and place == target,
        f"{file} must be of an autoencoder; it is a {kind} from {place} to {target}, and "
        "transcoders and dictionaries of attention or of several layers have no counterpart here.",
    )
    require(
        activation in KINDS,
        f"{file} must have {', '.join(KINDS)} as its act_fn; it is {activation}. llamascopium "
        "itself turns batchtopk into jumprelu.",
    )
    norm = config.get("norm_activation", "dataset-wise")
    require(
        norm in ("dataset-wise", "inference"),
        f"{file} must have dataset-wise or inference as its norm_activation; {norm}, by which each "
        "token or batch is brought to one length, has no counterpart here.",
    )
    require(
        not config.get("use_glu_encoder"),
        f"{file} must have use_glu_encoder false, for a gated linear unit has no counterpart here.",
    )


def _held(config: dict[str, Json], tensors: Tensors, file: str) -> dict[str, np.ndarray]:
    """Their tensors by our names, rows of latents, and ``threshold`` (n,) if it is among them."""
    is_first = LINEAR["W_enc"] in tensors
    names, turned = (LINEAR, "W_dec") if is_first else (PLAIN, "W_enc")
    n, d = matrix_shape(tensors, names["W_enc"], file)[:: 1 if is_first else -1]
    sizes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), turned: (d, n)}
    if not config.get("use_decoder_bias", True):
        del sizes["b_dec"]
    shapes = {names[our]: shape for our, shape in sizes.items()}
    if _activation(config) == "jumprelu" and not config.get("jump_relu_threshold"):
        shapes[THRESHOLD] = (n,)
    given = arrays(tensors, shapes, file)
    held = {"b_dec": np.zeros(d, np.float32)} | {our: given[names[our]] for our in sizes}
    held[turned] = held[turned].T
    if THRESHOLD in given:
        held["threshold"] = np.exp(given[THRESHOLD].astype(np.float64))
    return held


def _scale(config: dict[str, Json], norms: dict[str, float], d_model: int, file: str) -> float:
    """√d / norm."""
    if config.get("norm_activation", "dataset-wise") == "inference":
        return 1.0
    norm = norms.get(config["hook_point_in"], norms.get("in"))
    require(
        bool(norm) and norms.get("out", norm) == norm,
        f"{file} must say one {NORM} for what goes in and comes out, or the weights must, for its "
        f"norm_activation is dataset-wise; they say {norms}. Get the files that belong together.",
    )
    return math.sqrt(d_model) / norm


def _folded(
    kind: str, config: dict[str, Json], held: dict[str, np.ndarray], scale: float
) -> dict[str, np.ndarray]:
    """The weights of our kind."""
    weights = held | {"scale": np.array(scale)}
    if config.get("apply_decoder_bias_to_pre_encoder"):
        weights["b_enc"] = without_decoder_bias(held["W_enc"], held["b_enc"], held["b_dec"])
    norms = np.ones(len(held["b_enc"]))
    if config.get("sparsity_include_decoder_norm", True):
        norms = np.linalg.norm(held["W_dec"], axis=1).astype(np.float64).clip(LEAST_NORM)
    if kind == "jumprelu":
        threshold = weights.pop("threshold", None)
        if threshold is None:
            threshold = config["jump_relu_threshold"] * scale
        weights["log_threshold"] = log_threshold(threshold / norms)
    if kind == "topk":  # rows of norm 1, so that the largest latents are those to be chosen
        weights["W_enc"] = weights["W_enc"] * norms[:, None]
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    return weights
