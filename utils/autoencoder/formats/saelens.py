"""SAELens 6: ``cfg.json`` and ``sae_weights.safetensors`` in a folder.

With s the input a, scaled or standardised as ``normalize_activations`` says, less b_dec where
``apply_b_dec_to_input``:

    standard   f = ReLU(π)              π = s W_enc + b_enc,   x̂ = f W_dec + b_dec
    topk       f = ReLU(TopK(π))
    jumprelu   f = ReLU(π) · 1[π > threshold]
    gated      f = 1[s W_enc + b_gate > 0] · ReLU(s (W_enc · exp(r_mag)) + b_mag)

with W_enc (d_in, d_sae) and W_dec (d_sae, d_in). Where ``rescale_acts_by_decoder_norm``, π counts
times ‖W_dec,i‖ and f is divided by it when decoded. batchtopk and matryoshka_batchtopk are jumprelu
once they are trained; a checkpoint of a training has their one threshold, ``topk_threshold``.

Reference: sae-lens 6.54.12, ``sae_lens/saes/`` and ``loading/pretrained_sae_loaders.py``.
"""

from pathlib import Path

import numpy as np

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats.folded import Facts, as_array, folded, write_files
from utils.autoencoder.formats.hooks import layer_of
from utils.autoencoder.formats.imported import Imported, Origin, log_threshold, products
from utils.autoencoder.formats.source import (
    Source,
    arrays,
    count,
    dtype_of,
    folders_with,
    inside,
)
from utils.autoencoder.kinds import (
    BatchTopKAutoencoder,
    GatedAutoencoder,
    JumpReLUAutoencoder,
    L1Autoencoder,
    TopKAutoencoder,
)
from utils.settings import Json, require

NAME = "saelens"
VERSION = "6.54.12"  # whose layout this is; loaders take one without a version for an early one
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"

KINDS = {  # by architecture
    "standard": "l1",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "gated",
}
TRANSCODER = "computes one place's activations from another's"
REFUSED = {
    "abstopk": "has latents below 0",
    "matching_pursuit": "chooses each latent for what those before it left",
    "temporal": "encodes a token by those before it",
    "transcoder": TRANSCODER,
    "skip_transcoder": TRANSCODER,
    "jumprelu_transcoder": TRANSCODER,
    "jumprelu_skip_transcoder": TRANSCODER,
    "crosscoder": "encodes several layers at once",
}
NORMALIZATIONS = ("none", "layer_norm", "expected_average_only_in")


# ------------------------------------------------------------------------------------------- read


def hookpoints(source: Source) -> list[str]:
    """The folders of a source with an autoencoder of SAELens; ``"."`` is the source itself."""
    return folders_with(source, CONFIG, WEIGHTS)


def read(source: Source, hookpoint: str) -> Imported:
    """An autoencoder of SAELens, folded into one of ours.

    Raises:
        InputError: No kind of ours computes the same, or a file is damaged.
    """
    file, weights_file = inside(hookpoint, CONFIG), inside(hookpoint, WEIGHTS)
    config = _as_of_6(source.json(file))
    architecture = str(config.get("architecture", "standard"))
    _require_known(architecture, config, file)
    standardizes, scale = _normalization(source, hookpoint, config)
    tensors = source.tensors(weights_file)
    weights = arrays(tensors, _shapes(config, architecture, file), weights_file)
    options: dict[str, Json] = {"standardize_tokens": True} if standardizes else {}
    if architecture == "topk":
        options["k"] = count(config, "k", file)
        most = config["d_sae"]
        require(options["k"] <= most, f"k in {file} must be at most d_sae, {most}.")
    return Imported(
        KINDS[architecture],
        options,
        _folded_into_ours(weights, config) | {"scale": np.float32(scale)},
        _origin(hookpoint, config["metadata"], dtype_of(tensors)),
    )


def _as_of_6(config: dict[str, Json]) -> dict[str, Json]:
    """A configuration as of version 6; earlier ones had one level and named TopK otherwise."""
    if isinstance(config.get("metadata"), dict):
        return config
    config = {**config, "metadata": config}
    if "topk" in (config.get("activation_fn"), config.get("activation_fn_str")):
        config["architecture"] = "topk"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k")
    return config


def _require_known(architecture: str, config: dict[str, Json], file: str) -> None:
    """Refuse what no kind of ours computes."""
    known = f"Take one of {', '.join(KINDS)}."
    reason = REFUSED.get(architecture, "is not known here")
    require(
        architecture in KINDS,
        f"The architecture {architecture!r} of {file} {reason}, which no kind here does. {known}",
    )
    head = config["metadata"].get("hook_head_index")
    require(
        head is None and config.get("reshape_activations") in (None, "none"),
        f"{file} is of an attention head's output, and kinds here read the residual stream. Take "
        "one of blocks.N.hook_resid_post or model.layers.N.",
    )


def _normalization(source: Source, hookpoint: str, config: dict[str, Json]) -> tuple[bool, float]:
    """Whether tokens are standardised, and the factor that activations are multiplied by."""
    how = config.get("normalize_activations") or "none"
    file = inside(hookpoint, CONFIG)
    require(
        inside(hookpoint, WHITENING) not in source.files and how != "covariance_whitening",
        f"{file} is of a checkpoint that whitens activations. Take what SAELens saved when the "
        "training ended: the whitening is in its weights.",
    )
    require(
        how != "constant_norm_rescale",
        f"normalize_activations of {file} is {how}: each token is divided by its own norm, which "
        "no kind here does. Take an autoencoder with none, layer_norm or expected_average_only_in.",
    )
    require(
        how in NORMALIZATIONS,
        f"normalize_activations of {file} must be one of {', '.join(NORMALIZATIONS)}; it is "
        f"{how!r}.",
    )
    if how != "expected_average_only_in":
        return how == "layer_norm", 1.0
    scaler = inside(hookpoint, SCALER)
    factor = source.json(scaler).get("scaling_factor") if scaler in source.files else None
    require(
        isinstance(factor, (int, float)) and factor > 0,
        f"{file} multiplies activations by a factor that is in {scaler} while SAELens trains, and "
        f"in the weights when it has; it is in neither ({factor!r}). Take what SAELens saved when "
        "the training ended.",
    )
    return False, factor


def _shapes(config: dict[str, Json], architecture: str, file: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture, by name and shape."""
    d_in, d_sae = count(config, "d_in", file), count(config, "d_sae", file)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    names = {
        "jumprelu": ("b_enc", "threshold"),
        "gated": ("b_gate", "b_mag", "r_mag"),
    }.get(architecture, ("b_enc",))
    shapes |= dict.fromkeys(names, (d_sae,))
    if "batchtopk" in architecture:
        shapes["topk_threshold"] = ()
    return shapes


def _folded_into_ours(
    weights: dict[str, np.ndarray], config: dict[str, Json]
) -> dict[str, np.ndarray]:
    """Weights of our kinds, by their names and in their conventions."""
    weights = {**weights, "W_enc": np.ascontiguousarray(weights["W_enc"].T)}
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    if config.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(weights["W_dec"].astype(np.float64), axis=1)
        weights["W_enc"] *= norms[:, None]
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / np.where(norms > 0, norms, 1.0)[:, None]
    if "topk_threshold" in weights:
        weights["threshold"] = np.full_like(weights["b_enc"], weights.pop("topk_threshold"))
    if "threshold" in weights:
        weights["log_threshold"] = log_threshold(weights.pop("threshold"))
    if config.get("apply_b_dec_to_input", True):
        subtracted = products(weights["W_enc"], weights["b_dec"])
        weights["b_enc"] = weights["b_enc"] - subtracted
        if "b_mag" in weights:
            weights["b_mag"] = weights["b_mag"] - np.exp(weights["r_mag"]) * subtracted
    return weights


def _origin(hookpoint: str, said: dict[str, Json], dtype: str) -> Origin:
    """What the metadata says."""
    hook = said.get("hook_name") or said.get("hook_point") or said.get("hf_hook_name")
    layer, notes = layer_of(str(hook)) if hook else (None, ())
    return Origin(
        format=NAME,
        hookpoint=hookpoint,
        model_name=said.get("model_name"),
        layer=layer,
        context_length=said.get("context_size"),
        prepends_bos=said.get("prepend_bos"),
        dtype=dtype,
        l0=said.get("l0"),
        fvu=said.get("fvu"),
        dead_fraction=said.get("dead_fraction"),
        notes=notes,
    )


# ------------------------------------------------------------------------------------------ write


def write(autoencoder: SparseAutoencoder, facts: Facts, folder: Path) -> str:
    """Write an autoencoder for SAELens to a folder; returns what was written, in words."""
    weights = folded(autoencoder)
    architecture, more, words = _architecture_of(autoencoder, weights)
    n_latents, d_model = weights["W_dec"].shape
    config = {
        "architecture": architecture,
        "d_in": d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if autoencoder.standardize_tokens else "none",
        "reshape_activations": "none",
        **more,
        "metadata": _metadata(facts),
    }
    weights["W_enc"] = np.ascontiguousarray(weights["W_enc"].T)
    write_files(folder / WEIGHTS, weights, folder / CONFIG, config)
    return f"{folder}, for SAELens: {architecture}{words}"


def _architecture_of(
    autoencoder: SparseAutoencoder, weights: dict[str, np.ndarray]
) -> tuple[str, dict[str, Json], str]:
    """SAELens' name of a kind, its options, and what should be known; completes the weights."""
    match autoencoder:
        case BatchTopKAutoencoder():
            weights["threshold"] = np.full_like(weights["b_enc"], as_array(autoencoder.threshold))
            return "jumprelu", {}, ", which batch_topk and matryoshka are once they are trained"
        case TopKAutoencoder():
            return "topk", {"k": autoencoder.k, "rescale_acts_by_decoder_norm": False}, ""
        case JumpReLUAutoencoder():
            weights["threshold"] = as_array(autoencoder.threshold())
            return "jumprelu", {}, ""
        case GatedAutoencoder():
            weights["b_gate"] = weights.pop("b_enc")
            weights["r_mag"] = as_array(autoencoder.r_mag)
            return "gated", {}, ""
        case L1Autoencoder():
            return "standard", {}, ""
    raise TypeError(f"SAELens' architecture for {type(autoencoder).__name__} must be named here")


def _metadata(facts: Facts) -> dict[str, Json]:
    """What SAELens' loaders, evaluation and dashboards look up, and the quality."""
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": facts.model_name,
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {},
        "hook_name": facts.block,
        "hf_hook_name": facts.block,
        "hook_head_index": None,
        "context_size": facts.context_length,
        "prepend_bos": True,
        "dataset_path": facts.dataset,
        "exclude_special_tokens": True,
        "seqpos_slice": None,
        "sequence_separator_token": "bos",
        "disable_concat_sequences": False,
        "neuronpedia_id": None,
        "l0": facts.l0,
        "fvu": facts.fvu,
        "dead_fraction": facts.dead_fraction,
    }
