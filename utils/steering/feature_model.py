"""A language model with an autoencoder in it, which everything after training works with.

With raw residual stream x_raw = x / scale + center and latents f_i,

    feature activation    a_i = f_i · ‖W_dec,i‖                 reported, plotted and clamped
    direction             d_i = W_dec,i / (‖W_dec,i‖ · scale)   raw
    reconstruction        x̂_raw = b_dec / scale + center + Σ_i a_i d_i
    error                 x_raw − x̂_raw

Some imported autoencoders standardise each token by its own mean μ and deviation σ
(``standardize_tokens``). There x_raw = σ · (x / scale + center) + μ, and a direction is σ times as
long at the token. Wherever features are changed or attributed, σ is taken as a constant of the
token, as `FeatureEncoder.token_scale` gives it.

Shapes: residual (..., d_model) with any leading axes.

Reference: "Scaling Monosemanticity", Sparse Autoencoders and Influence on Behavior.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import keras
import numpy as np
import torch
from keras import ops

from utils.autoencoder.autoencoder import SparseAutoencoder, token_moments
from utils.autoencoder.saved import load_autoencoder
from utils.backend import Tensor
from utils.language_model import LanguageModel, load_language_model, replaced_output, residual_at


class ActiveFeatures(NamedTuple):
    """The active features of rows of activations, in order of row.

    Attributes:
        row, feature, activation: Shape (n,); the feature activation in float32.
        reconstruction: Of every row, raw, shape (rows, d_model).
    """

    row: np.ndarray | torch.Tensor
    feature: np.ndarray | torch.Tensor
    activation: np.ndarray | torch.Tensor
    reconstruction: np.ndarray | torch.Tensor

    def numpy(self) -> Self:
        """The same as NumPy arrays."""
        return ActiveFeatures(*map(ops.convert_to_numpy, self))


class FeatureEncoder:
    """A trained autoencoder that gives feature activations, on the torch backend of Keras."""

    def __init__(self, autoencoder: SparseAutoencoder):
        assert keras.backend.backend() == "torch", "needs use_backend('torch')"
        self.autoencoder = autoencoder
        self.n_latents, self.d_model = autoencoder.n_latents, autoencoder.d_model
        self.norms = _as_torch(autoencoder.decoder_norms())
        self.scale = float(autoencoder.scale)

    @torch.no_grad()
    def active_tensors(self, activations: np.ndarray | torch.Tensor) -> ActiveFeatures:
        """The active features of raw activations, shape (rows, d_model), on the device."""
        row, feature, latents, reconstruction = self.autoencoder.active_latents(activations)
        return ActiveFeatures(row, feature, latents * self.norms[feature], reconstruction)

    def active(self, activations: np.ndarray | torch.Tensor) -> ActiveFeatures:
        """`active_tensors` as NumPy arrays."""
        return self.active_tensors(activations).numpy()

    @torch.no_grad()
    def encode(self, residual: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """Feature activations of a raw residual stream, float32, shape (..., n_latents).

        With ``features``, only these are computed, shape (..., len(features)).
        """
        rows = residual.float().reshape(-1, residual.shape[-1])
        features = None if features is None else features.to(self.norms.device)
        latents = _as_torch(self.autoencoder.encode(rows, features))
        values = latents * (self.norms if features is None else self.norms[features])
        return values.reshape(*residual.shape[:-1], values.shape[-1]).to(residual.device)

    @torch.no_grad()
    def reconstruct(self, residual: torch.Tensor) -> torch.Tensor:
        """The reconstruction of a raw residual stream, of its shape, float32."""
        rows = residual.float().reshape(-1, residual.shape[-1])
        return _as_torch(self.autoencoder(rows)).reshape(residual.shape).to(residual.device)

    @torch.no_grad()
    def token_scale(self, residual: torch.Tensor) -> torch.Tensor | float:
        """What `directions` are multiplied by at each token of a raw residual stream, (..., 1).

        Its deviation with ``standardize_tokens``, else 1.
        """
        if not self.autoencoder.standardize_tokens:
            return 1.0
        return _as_torch(token_moments(residual.float())[1]).to(residual.device)

    @torch.no_grad()
    def directions(self, features: torch.Tensor) -> torch.Tensor:
        """The raw direction of each feature, (len(features), d_model), on their device.

        Where tokens are standardised, that at a token of deviation 1; see `token_scale`.
        """
        rows = _as_torch(ops.take(self.autoencoder.W_dec, features, axis=0)).to(features.device)
        return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12) / self.scale


class FeatureModel(FeatureEncoder):
    """A language model with an autoencoder of the output of block ``layer``.

    Positions of a raw norm larger than ``outlier_norm`` were kept out of training.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layer: int,
        autoencoder: SparseAutoencoder,
        outlier_norm: float,
    ):
        super().__init__(autoencoder)
        self.language_model, self.layer, self.outlier_norm = language_model, layer, outlier_norm

    @classmethod
    def load(cls, summary: dict, autoencoder_path: Path, dtype: str | None = None) -> Self:
        """Load the model that the summary of an analysis names, and a ``.keras`` autoencoder.

        Args:
            summary: Holds ``model_name``, ``layer``, ``dtype`` and ``outlier_norm``.
            dtype: In place of the summary's.
        """
        name, layer = summary["model_name"], summary["layer"]
        language_model = load_language_model(name, layer, dtype or summary["dtype"])
        autoencoder = load_autoencoder(autoencoder_path)
        return cls(language_model, layer, autoencoder, summary["outlier_norm"])

    def residual(self, tokens: torch.Tensor) -> torch.Tensor:
        """The raw residual stream at the layer, (batch, context, d_model); see `residual_at`."""
        return residual_at(self.language_model, tokens, self.layer)

    def replaced(
        self, replace: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> contextlib.AbstractContextManager[None]:
        """While open, pass the residual stream through ``replace``; see `replaced_output`."""
        return replaced_output(self.language_model.blocks[self.layer], replace)

    def trained_positions(self, tokens: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Whether autoencoders are trained on a position: it is neither BOS nor a norm outlier.

        Bool, of the shape of ``tokens``; ``residual`` is raw, of that shape and d_model.
        """
        is_bos = tokens.to(residual.device) == self.language_model.bos
        return ~is_bos & (residual.float().norm(dim=-1) <= self.outlier_norm)


def _as_torch(values: Tensor) -> torch.Tensor:
    """A Keras tensor or weight as a torch tensor, detached; nothing is copied."""
    return ops.convert_to_tensor(values).detach()
