"""An autoencoder of another tool in this project's terms."""

import dataclasses

import numpy as np
from keras import ops

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.kinds import find_kind
from utils.settings import Json


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a source says of one of its autoencoders; None where it says nothing.

    Attributes:
        format: The name of the format's module, as ``"saelens"``.
        hookpoint: As the source names it.
        model_name: The language model.
        layer: The decoder block whose output it reads, counted from 0.
        context_length: Tokens of its training contexts.
        prepends_bos: Whether these began with BOS.
        dtype: Of the stored weights.
        l0, fvu, dead_fraction: Its quality, as stated.
        notes: What was changed on the way and should be known, a sentence each.
    """

    format: str
    hookpoint: str
    model_name: str | None = None
    layer: int | None = None
    context_length: int | None = None
    prepends_bos: bool | None = None
    dtype: str = "float32"
    l0: float | None = None
    fvu: float | None = None
    dead_fraction: float | None = None
    notes: tuple[str, ...] = ()


def without_decoder_bias(W_enc: np.ndarray, b_enc: np.ndarray, b_dec: np.ndarray) -> np.ndarray:
    """b_enc − W_enc b_dec: the encoder's bias where a format subtracts b_dec from its input."""
    return b_enc - products(W_enc, b_dec)


def products(W_enc: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """W_enc (n_latents, d_model) times a vector, in float64: a few rows at a time are turned."""
    blocks = range(0, len(W_enc), 4_096)
    vector = vector.astype(np.float64)
    return np.concatenate([W_enc[i : i + 4_096].astype(np.float64) @ vector for i in blocks])


def log_threshold(threshold: np.ndarray) -> np.ndarray:
    """The logarithm that the kind jumprelu keeps of thresholds; below 0 they are as good as 0."""
    return np.log(np.maximum(threshold, np.finfo(np.float32).tiny))


@dataclasses.dataclass(frozen=True)
class Imported:
    """An autoencoder of another tool, its conventions folded into weights of our kinds.

    Attributes:
        kind: One of `kinds.KINDS`.
        options: Arguments of the kind's constructor besides ``d_model`` and ``n_latents``.
        weights: By name and shape of the kind's own weights, float32: ``W_enc`` and ``W_dec``
            (n_latents, d_model), ``b_enc``, ``b_dec``; ``scale`` () and ``center`` (d_model,) where
            these are not 1 and 0; and the kind's further ones.
        origin: What the source says of it.
    """

    kind: str
    options: dict[str, Json]
    weights: dict[str, np.ndarray]
    origin: Origin

    def build(self) -> SparseAutoencoder:
        """The autoencoder itself, which encodes and decodes as the tool's own does."""
        n_latents, d_model = self.weights["W_enc"].shape
        made = find_kind(self.kind)(d_model=d_model, n_latents=n_latents, **self.options)
        for name, values in self.weights.items():
            getattr(made, name).assign(ops.convert_to_tensor(values, "float32"))
        return made
