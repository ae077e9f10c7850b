"""dictionary_learning 0.1: ``ae.pt`` and ``config.json`` in a folder for each autoencoder.

    AutoEncoderTopK, BatchTopKSAE     encoder.weight (n, d), encoder.bias, decoder.weight (d, n),
                                      b_dec, k, threshold
    MatryoshkaBatchTopKSAE            W_enc (d, n), b_enc, W_dec (n, d), b_dec, k, threshold,
                                      group_sizes
    JumpReluAutoEncoder               W_enc (d, n), b_enc, W_dec (n, d), b_dec, threshold (n,)
    AutoEncoder                       encoder.weight, encoder.bias, decoder.weight, bias
    AutoEncoderNew                    the same with decoder.bias in place of bias
    GatedAutoEncoder                  encoder.weight, gate_bias, mag_bias, r_mag, decoder.weight,
                                      decoder_bias

with n latents of width d. All but JumpReluAutoEncoder and AutoEncoderNew subtract the decoder's
bias from the input. After training, BatchTopK and Matryoshka keep what is above their threshold;
TopK keeps the k largest, and stores a threshold that it does not use.
"""

import numpy as np

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
)
from utils.settings import InputError, Json, require

WEIGHTS, CONFIG = "ae.pt", "config.json"
# Our names of their tensors.
TOP_K = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec",
    "b_dec": "b_dec", "k": "k", "threshold": "threshold",
}  # fmt: skip
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
NAMES = {
    "AutoEncoderTopK": TOP_K,
    "BatchTopKSAE": TOP_K,
    "MatryoshkaBatchTopKSAE": PLAIN
    | {"k": "k", "threshold": "threshold", "group_sizes": "group_sizes"},
    "JumpReluAutoEncoder": PLAIN | {"threshold": "threshold"},
    "AutoEncoder": {
        "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec",
        "bias": "b_dec",
    },
    "AutoEncoderNew": {
        "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec",
        "decoder.bias": "b_dec",
    },
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc", "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
        "decoder.weight": "W_dec", "decoder_bias": "b_dec",
    },
}  # fmt: skip
KIND = {
    "AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk", "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoder": "l1", "AutoEncoderNew": "l1",
    "GatedAutoEncoder": "gated",
}  # fmt: skip
KEEPS_BIAS = ("JumpReluAutoEncoder", "AutoEncoderNew")  # in the input of the encoder


def hookpoints(source: Source) -> list[str]:
    """The folders that hold an autoencoder; "." is the source's own."""
    return folders_with(source, WEIGHTS)


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder of a folder.

    Raises:
        InputError: It is of a kind that is not known here, is not of a block's output, or its
            files are not as above.
    """
    file, config_file = inside(hookpoint, WEIGHTS), inside(hookpoint, CONFIG)
    config = source.json(config_file)
    name = entry(config, config_file, "trainer", "dict_class")
    if name not in NAMES:
        raise InputError(
            f"{config_file} must name one of {', '.join(NAMES)} as its dict_class; it is {name}, "
            "which has no counterpart here. Take another autoencoder, or write its kind in "
            "utils/autoencoder/kinds.py."
        )
    _require_output_of_block(config, config_file)
    tensors, trainer = source.tensors(file), config["trainer"]
    n, d = (count(trainer, size, config_file) for size in ("dict_size", "activation_dim"))
    held = _held(name, (n, d), tensors, file)
    if "k" in NAMES[name] and "k" not in held:
        held["k"] = count(trainer, "k", config_file)
    origin = Origin(
        format="dictionary_learning",
        hookpoint=hookpoint,
        model_name=trainer.get("lm_name"),
        layer=trainer.get("layer"),
        context_length=config.get("buffer", {}).get("ctx_len"),
        dtype=dtype_of(tensors),
    )
    return Imported(KIND[name], _options(held), _folded(name, held), origin)


def _held(name: str, shape: tuple[int, int], tensors: Tensors, file: str) -> dict[str, np.ndarray]:
    """Their tensors by our names, rows of latents; ``shape`` is that of W_enc, (n, d)."""
    names, (n, d) = NAMES[name], shape
    # A `Linear` has its matrix turned round.
    turned = "W_dec" if "encoder.weight" in names else "W_enc"
    sizes = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,), "k": (), turned: (d, n)}
    sizes["threshold"] = (n,) if KIND[name] == "jumprelu" else ()
    if "group_sizes" in tensors:
        sizes["group_sizes"] = tuple(tensors["group_sizes"].shape)
    # Earlier versions did not store k, nor the threshold that TopK does not use.
    spare = {"k", "threshold"} if KIND[name] == "topk" else {"k"}
    shapes = {
        theirs: sizes.get(our, (n,))
        for theirs, our in names.items()
        if theirs in tensors or our not in spare
    }
    held = {names[theirs]: values for theirs, values in arrays(tensors, shapes, file).items()}
    held[turned] = held[turned].T
    return held


def _require_output_of_block(config: dict[str, Json], file: str) -> None:
    """Refuse what reads something else than the residual stream after a block, by what it says."""
    place = config["trainer"].get("submodule_name") or "resid_post"
    require(
        place.startswith("resid_post"),
        f"{file} must be of the residual stream after a block; its submodule_name is {place}.",
    )
    io = config.get("buffer", {}).get("io", "out")
    require(
        io == "out",
        f"{file} must be of an autoencoder of a block's output; its io is {io}, as of what reads "
        "an input, or of a transcoder. Neither can be changed within one residual stream.",
    )


def _options(held: dict[str, np.ndarray | int]) -> dict[str, Json]:
    """The options of the kind, which are taken out of the tensors that are ``held``."""
    options: dict[str, Json] = {}
    if "k" in held:
        options["k"] = int(held.pop("k"))
    if "group_sizes" in held:
        ends = held.pop("group_sizes").cumsum(dtype=np.float64)
        options["prefixes"] = tuple((ends / ends[-1]).tolist())
    return options


def _folded(name: str, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of our kind, from theirs by our names."""
    weights = dict(held)
    if name not in KEEPS_BIAS:
        weights["b_enc"] = without_decoder_bias(held["W_enc"], held["b_enc"], held["b_dec"])
    if KIND[name] == "gated":  # m = exp(r_mag) · W_enc (x − b_dec) + b_mag
        subtracted = held["b_enc"] - weights["b_enc"]
        weights["b_mag"] = held["b_mag"] - np.exp(held["r_mag"].astype(np.float64)) * subtracted
    if KIND[name] == "jumprelu":
        weights["log_threshold"] = log_threshold(weights.pop("threshold"))
    if KIND[name] == "topk":
        weights.pop("threshold", None)
    return weights
