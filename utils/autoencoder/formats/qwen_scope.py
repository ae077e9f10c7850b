"""Qwen-Scope: a ``layerN.sae.pt`` for each block, in a repository named SAE-Res-MODEL-WnK-L0_k.

    f = the k largest of W_enc x + b_enc
    reconstruction = W_dec f + b_dec

W_enc (n, d), W_dec (d, n), b_enc (n,), b_dec (d,); b_dec is not subtracted from the input. k is in
the repository's name alone. Where fewer than k are positive, theirs keeps negative ones; here these
are 0.
"""

import re
from pathlib import Path

from utils.autoencoder.formats.imported import Imported, Origin
from utils.autoencoder.formats.source import Source, arrays, dtype_of, matrix_shape
from utils.settings import InputError

FILE = re.compile(r"(?:.*/)?layer(\d+)\.sae\.pt$")
REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W\d+K-L0_(?P<k>\d+)")


def hookpoints(source: Source) -> list[str]:
    """The files that are named so."""
    return [file for file in source.files if FILE.match(file)]


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder of a file.

    Raises:
        InputError: The source's name does not say k, or the file is not as above.
    """
    named = REPOSITORY.search(source.name) or REPOSITORY.search(str(Path(source.name).resolve()))
    if named is None:
        raise InputError(
            f"The folder of {hookpoint} must have its repository's name, such as "
            f"SAE-Res-Qwen3-8B-Base-W64K-L0_50, which alone says k; it is {source.name}. Rename it."
        )
    tensors = source.tensors(hookpoint)
    n, d = matrix_shape(tensors, "W_enc", hookpoint)
    shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (d, n), "b_dec": (d,)}
    weights = arrays(tensors, shapes, hookpoint)
    weights["W_dec"] = weights["W_dec"].T
    origin = Origin(
        format="qwen_scope",
        hookpoint=hookpoint,
        model_name=f"Qwen/{named['model']}",
        layer=int(FILE.match(hookpoint)[1]),
        dtype=dtype_of(tensors),
    )
    return Imported("topk", {"k": int(named["k"])}, weights, origin)
