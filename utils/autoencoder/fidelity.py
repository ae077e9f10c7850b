"""How faithful reconstructions are to activations: variance explained, cosine, L0."""

from collections.abc import Iterable

import numpy as np
from keras import ops
from tqdm import tqdm

from utils.activations.queues import read_ahead
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.backend import Tensor


class Fidelity:
    """Running sums for FVU, cosine, L0, over batches of raw activations, on their device.

    FVU, the fraction of variance unexplained, is Σ‖x − x̂‖² / Σ‖x − mean‖²; the variance explained
    is 1 − FVU. The mean is that of the very rows that are measured. The variance is summed about
    the mean of the first batch: where the mean is large, its square would drown it in rounding.
    Sums over batches carry along what float32 loses of them, since not every device has float64.
    Nothing is read from the device before a result is asked for.
    """

    def __init__(self, d_model: int):
        self.n_rows, self.d_model = 0, d_model
        self._origin: Tensor | None = None
        self._sums: Tensor | float = 0.0
        self._lost: Tensor | float = 0.0

    def add(self, rows: Tensor, reconstruction: Tensor, active_per_row: Tensor) -> None:
        """Add raw activations and reconstructions (batch, d_model), active counts (batch,).

        Tensors of the backend, or NumPy arrays; float32.
        """
        self.n_rows += len(rows)
        rows, reconstruction = map(ops.stop_gradient, map(_tensor, (rows, reconstruction)))
        if self._origin is None:
            self._origin = ops.mean(rows, axis=0)
        centred, error = rows - self._origin, rows - reconstruction
        lengths = ops.sqrt(_dots(rows, rows)) * ops.sqrt(_dots(reconstruction, reconstruction))
        cosines = _dots(rows, reconstruction) / ops.where(lengths > 0, lengths, 1.0)
        n_active = ops.cast(_tensor(active_per_row), "float32")
        scalars = _dots(centred, centred), _dots(error, error), cosines, n_active
        scalars = ops.stack([ops.sum(values) for values in scalars])
        self._add(ops.concatenate([ops.sum(centred, axis=0), scalars]))

    def _add(self, values: Tensor) -> None:
        """Knuth's exact sum of two numbers: what rounding takes from it is added up apart."""
        total = values + self._sums
        kept = total - values
        self._lost = self._lost + ((values - (total - kept)) + (self._sums - kept))
        self._sums = total

    def _total(self) -> np.ndarray:
        sums, lost = (ops.convert_to_numpy(part).astype(float) for part in (self._sums, self._lost))
        return sums + lost

    def state(self) -> dict[str, Tensor]:
        """All that was summed, to be taken over by `restore`."""
        n_rows = np.int64(self.n_rows)
        return {"n_rows": n_rows, "origin": self._origin, "sums": self._sums, "lost": self._lost}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.n_rows = int(state["n_rows"])
        self._origin, self._sums, self._lost = (
            _tensor(state[name]) for name in ("origin", "sums", "lost")
        )

    @property
    def fvu(self) -> float:
        total = self._total()
        centred, (squares, error, *_) = total[: self.d_model], total[self.d_model :]
        return float(error / (squares - centred @ centred / self.n_rows))

    @property
    def cosine(self) -> float:
        return float(self._total()[-2] / self.n_rows)

    @property
    def l0(self) -> float:
        return float(self._total()[-1] / self.n_rows)


def _tensor(values: Tensor) -> Tensor:
    return ops.convert_to_tensor(values)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return ops.sum(a * b, axis=1)


def measure_fidelity(autoencoder: SparseAutoencoder, batches: Iterable[np.ndarray]) -> Fidelity:
    """FVU, cosine and L0 of an autoencoder over batches of raw activations (batch, d_model).

    The next batch is read while one is measured.
    """
    fidelity = Fidelity(autoencoder.d_model)
    for rows in tqdm(read_ahead(batches), desc="measuring", unit="batch", leave=False):
        rows = ops.cast(_tensor(rows), "float32")  # on the device, where that is quick
        fidelity.add(rows, *autoencoder.reconstruct_and_count(rows))
    return fidelity


def loss_recovered(cross_entropy: dict[str, float]) -> float:
    """Share of the loss from zero-ablation that the reconstruction wins back; 1 is the identity."""
    lost = cross_entropy["zero_ablated"] - cross_entropy["untouched"]
    return (cross_entropy["zero_ablated"] - cross_entropy["reconstruction"]) / lost
