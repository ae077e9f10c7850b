"""How faithful reconstructions are to activations: variance explained, cosine, L0."""

from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from utils.autoencoder.autoencoder import SparseAutoencoder


class Fidelity:
    """Running sums for FVU, cosine, L0, over batches of raw activations.

    FVU, the fraction of variance unexplained, is Σ‖x − x̂‖² / Σ‖x − mean‖²; the variance explained
    is 1 − FVU. Sums over rows are float64, those within a row the rows' own float32, which is five
    times as fast; the mean is that of the very rows that are measured. The variance is summed about
    the mean of the first batch: where the mean is large, its square would drown it in rounding.
    """

    def __init__(self, d_model: int):
        self.n_rows = 0
        self.l0_counts = np.zeros(0, np.int64)
        self._error = self._squares = self._cosines = 0.0
        self._origin: np.ndarray | None = None
        self._sum = np.zeros(d_model)

    def add(self, rows: np.ndarray, reconstruction: np.ndarray, active_per_row: np.ndarray) -> None:
        """Add raw activations and reconstructions (batch, d_model), active counts (batch,)."""
        self.n_rows += len(rows)
        if self._origin is None:
            self._origin = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
        centred = rows - self._origin
        self._sum += np.ones(len(rows), rows.dtype) @ centred
        self._squares += float(_dots(centred, centred).sum())
        squares, across = _dots(rows, rows), _dots(rows, reconstruction)
        norms = np.sqrt(squares * _dots(reconstruction, reconstruction))
        self._cosines += float((across[norms > 0] / norms[norms > 0]).sum())
        error = rows - reconstruction
        self._error += float(_dots(error, error).sum())
        counts = np.bincount(active_per_row)
        longer = max(len(counts), len(self.l0_counts))
        self.l0_counts = np.pad(self.l0_counts, (0, longer - len(self.l0_counts)))
        self.l0_counts[: len(counts)] += counts

    @property
    def fvu(self) -> float:
        variance = self._squares - float(self._sum @ self._sum) / self.n_rows
        return self._error / variance

    @property
    def cosine(self) -> float:
        return self._cosines / self.n_rows

    @property
    def l0(self) -> float:
        return float(np.arange(len(self.l0_counts)) @ self.l0_counts) / self.n_rows


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("rd,rd->r", a, b).astype(np.float64)


def measure_fidelity(autoencoder: SparseAutoencoder, batches: Iterable[np.ndarray]) -> Fidelity:
    """FVU, cosine and L0 of an autoencoder over batches of raw activations (batch, d_model)."""
    fidelity = Fidelity(autoencoder.d_model)
    for rows in tqdm(batches, desc="measuring", unit="batch", leave=False):
        row, _, _, reconstruction = autoencoder.encode_active(rows)
        fidelity.add(rows, reconstruction, np.bincount(row, minlength=len(rows)))
    return fidelity


def loss_recovered(cross_entropy: dict[str, float]) -> float:
    """Share of the loss from zero-ablation that the reconstruction wins back; 1 is the identity."""
    lost = cross_entropy["zero_ablated"] - cross_entropy["untouched"]
    return (cross_entropy["zero_ablated"] - cross_entropy["reconstruction"]) / lost
