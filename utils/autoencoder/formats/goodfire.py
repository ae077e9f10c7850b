"""Goodfire: a ``.pth`` or ``.pt`` file each, named MODEL-SAE-lLAYER.

    f = ReLU(encoder_linear.weight x + encoder_linear.bias)
    reconstruction = decoder_linear.weight f + decoder_linear.bias

encoder_linear.weight (n, d), decoder_linear.weight (d, n); the decoder's bias is not subtracted
from the input. Published for LLaMA 3.1 8B and 3.3 70B.
"""

import re

from utils.autoencoder.formats.imported import Imported, Origin
from utils.autoencoder.formats.source import Source, arrays, dtype_of, matrix_shape

NAME = re.compile(r"(?P<model>[^/]+)-SAE-l(?P<layer>\d+)\.pth?$")
WEIGHTS = {
    "W_enc": "encoder_linear.weight",
    "b_enc": "encoder_linear.bias",
    "W_dec": "decoder_linear.weight",
    "b_dec": "decoder_linear.bias",
}


def hookpoints(source: Source) -> list[str]:
    """The files that are named so."""
    return [file for file in source.files if NAME.search(file)]


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder of a file; raises `InputError` if it is not as above."""
    tensors = source.tensors(hookpoint)
    n, d = matrix_shape(tensors, WEIGHTS["W_enc"], hookpoint)
    shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (d, n), "b_dec": (d,)}
    held = arrays(tensors, {WEIGHTS[our]: shape for our, shape in shapes.items()}, hookpoint)
    weights = {our: held[theirs] for our, theirs in WEIGHTS.items()}
    weights["W_dec"] = weights["W_dec"].T
    named = NAME.search(hookpoint)
    origin = Origin(
        format="goodfire",
        hookpoint=hookpoint,
        model_name=f"meta-llama/{named['model']}",
        layer=int(named["layer"]),
        dtype=dtype_of(tensors),
    )
    return Imported("l1", {}, weights, origin)
