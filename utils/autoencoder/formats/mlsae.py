"""mlsae: one autoencoder for the outputs of several blocks, ``config.json`` and
``model.safetensors``.

    x = (activations − μ) / (σ + 1e-5) of each token by itself, if the configuration standardises
    f = ReLU(TopK(encoder.weight (x − pre_encoder_bias)))
    reconstruction = σ · (decoder.weight f + pre_encoder_bias) + μ

encoder.weight (n, d), decoder.weight (d, n), pre_encoder_bias (d,), last_nonzero (n,), a count. A
layer is the output of a block, counted from 0.

Reference: Lawson et al. 2024, "Residual stream analysis with multi-layer SAEs".
"""

import numpy as np

from utils.autoencoder.formats.imported import Imported, Origin, without_decoder_bias
from utils.autoencoder.formats.source import Source, arrays, count, dtype_of
from utils.settings import require

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ALL_LAYERS = "all layers"  # of a version that does not say which


def hookpoints(source: Source) -> list[str]:
    """A hook point for each block that it was trained on."""
    if not {WEIGHTS, CONFIG} <= set(source.files):
        return []
    config = source.json(CONFIG)
    if not {"n_inputs", "n_latents", "k"} <= set(config):
        return []  # of some language model
    layers = config.get("layers")
    return [f"layers.{layer}" for layer in layers] if layers else [ALL_LAYERS]


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder, for a block.

    Raises:
        InputError: It has transforms of its own for each layer; or its files are not as above.
    """
    config = source.json(CONFIG)
    require(
        not config.get("lens"),
        f"{CONFIG} of {source.name} must have no lens, a matrix of its own for each layer, which "
        "is not supported. Take the version without, or multiply the layer's into the weights.",
    )
    d_model, n_latents, k = (count(config, one, CONFIG) for one in ("n_inputs", "n_latents", "k"))
    tensors = source.tensors(WEIGHTS)
    shapes = {
        "encoder.weight": (n_latents, d_model),
        "decoder.weight": (d_model, n_latents),
        "pre_encoder_bias": (d_model,),
        "last_nonzero": (n_latents,),
    }
    held = arrays(tensors, shapes, WEIGHTS)
    W_enc, b_dec = held["encoder.weight"], held["pre_encoder_bias"]
    weights = {
        "W_enc": W_enc,
        "b_enc": without_decoder_bias(W_enc, np.zeros(n_latents), b_dec),
        "W_dec": held["decoder.weight"].T,
        "b_dec": b_dec,
    }
    options = {"k": k, "standardize_tokens": config.get("standardize", True)}
    origin = Origin(
        format="mlsae",
        hookpoint=hookpoint,
        layer=None if hookpoint == ALL_LAYERS else int(hookpoint.rpartition(".")[2]),
        dtype=dtype_of(tensors),
    )
    return Imported("topk", options, weights, origin)
