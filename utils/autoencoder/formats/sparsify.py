"""EleutherAI sparsify: ``cfg.json`` and ``sae.safetensors`` in a folder for each hook point.

    f = TopK(ReLU((a − b_dec) Wᵀ + b)),   x̂ = f W_dec + b_dec

with W, ``encoder.weight``, and W_dec both (num_latents, d_in); b is ``encoder.bias``. The folder
above may hold ``config.json``, the settings of the training.

Reference: eai-sparsify 1.3.3, ``sparsify/sparse_coder.py`` and ``fused_encoder.py``.
"""

import fnmatch
from pathlib import Path, PurePosixPath

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats.folded import Facts, folded, write_config, write_files
from utils.autoencoder.formats.hooks import layer_of
from utils.autoencoder.formats.imported import Imported, Origin, without_decoder_bias
from utils.autoencoder.formats.source import Source, arrays, count, dtype_of, folders_with, inside
from utils.settings import Json, require

NAME = "sparsify"
CONFIG, WEIGHTS, RUN_CONFIG = "cfg.json", "sae.safetensors", "config.json"
REFUSED = {  # options of a sparse coder
    "signed": "has latents below 0",
    "transcode": "computes a module's output from its input",
    "skip_connection": "adds the input times a matrix",
}


# ------------------------------------------------------------------------------------------- read


def hookpoints(source: Source) -> list[str]:
    """The folders of a source with an autoencoder of sparsify; ``"."`` is the source itself."""
    return folders_with(source, CONFIG, WEIGHTS)


def read(source: Source, hookpoint: str) -> Imported:
    """An autoencoder of sparsify, folded into one of ours.

    Raises:
        InputError: No kind of ours computes the same, or a file is damaged.
    """
    file, weights_file = inside(hookpoint, CONFIG), inside(hookpoint, WEIGHTS)
    config = source.json(file)
    for option, reason in REFUSED.items():
        require(
            not config.get(option),
            f"{file} has {option}: it {reason}, which no kind here does. Take one without it.",
        )
    activation = config.get("activation", "topk")
    require(
        activation == "topk",
        f"The activation of {file} is {activation!r}, which no kind here has. Take one with topk.",
    )
    d_in = count(config, "d_in", file)
    if config.get("num_latents"):
        n = count(config, "num_latents", file)
    else:
        n = d_in * count({"expansion_factor": 32, **config}, "expansion_factor", file)
    k = count({"k": 32, **config}, "k", file)
    require(k <= n, f"k in {file} must be at most its {n} latents; it is {k}.")
    shapes = {
        "encoder.weight": (n, d_in), "encoder.bias": (n,), "W_dec": (n, d_in), "b_dec": (d_in,)
    }  # fmt: skip
    tensors = source.tensors(weights_file)
    found = arrays(tensors, shapes, weights_file)
    W_enc, b_enc, b_dec = found["encoder.weight"], found["encoder.bias"], found["b_dec"]
    weights = {
        "W_enc": W_enc,
        "b_enc": without_decoder_bias(W_enc, b_enc, b_dec),
        "W_dec": found["W_dec"],
        "b_dec": b_dec,
    }
    return Imported("topk", {"k": k}, weights, _origin(source, hookpoint, dtype_of(tensors)))


def _origin(source: Source, hookpoint: str, dtype: str) -> Origin:
    """What the folders' names and the settings of the training say."""
    place = PurePosixPath(source.name if hookpoint == "." else hookpoint)
    layer, notes = layer_of(place.name)
    file = str(PurePosixPath(hookpoint).parent / RUN_CONFIG)
    run = source.json(file) if hookpoint != "." and file in source.files else {}
    patterns = run.get("hookpoints") or ["*"]
    if not any(fnmatch.fnmatchcase(place.name, pattern) for pattern in patterns):
        run = {}  # of others, that were written there later
    return Origin(
        format=NAME,
        hookpoint=hookpoint,
        model_name=run.get("model"),
        layer=layer,
        context_length=run.get("ctx_len"),
        dtype=dtype,
        notes=notes,
    )


# ------------------------------------------------------------------------------------------ write


def refusal(kind: str, standardizes: bool) -> str | None:
    """Why sparsify cannot hold an autoencoder, if it cannot."""
    if kind != "topk":
        return f"has topk alone, and the autoencoder is {kind}"
    return "has no standardised tokens, and the autoencoder's are" if standardizes else None


def write(autoencoder: SparseAutoencoder, facts: Facts, folder: Path) -> str:
    """Write a TopK autoencoder for sparsify, to a folder in ``folder`` that is named by its block.

    Returns:
        What was written, in words.
    """
    weights = folded(autoencoder)
    n_latents, d_model = weights["W_dec"].shape
    hookpoint = facts.block.partition(".")[2]  # of the model without its head
    tensors = {
        "encoder.weight": weights["W_enc"],
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    config: dict[str, Json] = {
        "activation": "topk",
        "expansion_factor": max(1, round(n_latents / d_model)),
        "normalize_decoder": False,
        "num_latents": n_latents,
        "k": autoencoder.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_model,
    }
    coder = folder / hookpoint
    write_files(coder / WEIGHTS, tensors, coder / CONFIG, config)
    run = {"model": facts.model_name, "dataset": facts.dataset, "ctx_len": facts.context_length}
    write_config(folder / RUN_CONFIG, {**run, "hookpoints": [hookpoint], "sae": config})
    return f"{coder}, for sparsify"
