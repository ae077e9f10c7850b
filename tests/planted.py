"""Rows made from a dictionary that is known, so that what an autoencoder finds can be judged."""

from typing import NamedTuple

import numpy as np

# Of trainings that find 256 features in 40,000 rows.
BATCH, N_STEPS = 256, 1_600
WITH_K = "--selection-dtype float32 --learning-rate 0.01 --dead-after 10_000"
FLAGS = {
    "topk": f"--k 7 {WITH_K}",
    # Of its latents more stay dead in so short a training; with an α of 1/32 it finds 0.91.
    "batch_topk": f"--k 8 --auxk-coefficient 1 {WITH_K}",
    # What is planted is 1.4 to 4.2 large once scaled: about the inverse of tanh_scale.
    "jumprelu": "--sparsity-coefficient 4 --sparsity-warmup 0.3 --tanh-scale 0.3 "
    "--learning-rate 0.005",
}


class Planted(NamedTuple):
    """Rows (n_rows, d_model), the unit directions (n_features, d_model) they are sums of, and how
    much of each is in each row (n_rows, n_features)."""

    rows: np.ndarray
    directions: np.ndarray
    coefficients: np.ndarray


def make_planted(
    n_rows: int,
    d_model: int = 64,
    n_features: int = 256,
    n_active: float = 7.0,
    n_pairs: int = 32,
    seed: int = 0,
) -> Planted:
    """Sums of a few unit directions with positive coefficients.

    Frequencies follow Zipf's law, about ``n_active`` features a row. Of ``n_pairs`` neighbours in
    frequency, the second is there in half of the rows that the first is in, besides its own.
    """
    draw = np.random.default_rng(seed)
    directions = draw.normal(size=(n_features, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    frequencies = 1 / (np.arange(n_features) + 8)
    frequencies *= n_active / frequencies.sum()
    active = draw.random((n_rows, n_features)) < frequencies
    firsts = draw.permutation(n_features // 2)[:n_pairs] * 2
    active[:, firsts + 1] |= active[:, firsts] & (draw.random((n_rows, n_pairs)) < 0.5)
    coefficients = active * draw.uniform(0.5, 1.5, active.shape)
    rows = coefficients @ directions
    return Planted(*(array.astype(np.float32) for array in (rows, directions, coefficients)))


def largest_cosines(directions: np.ndarray, decoder_rows: np.ndarray) -> np.ndarray:
    """For each true direction, the largest cosine to a decoder row, shape (n_features,)."""
    norms = np.linalg.norm(decoder_rows, axis=1, keepdims=True)
    return (directions @ (decoder_rows / np.maximum(norms, 1e-12)).T).max(axis=1)
