"""Drawing at random: features to study; samples again, for 95% intervals (bootstrap)."""

from collections.abc import Sequence

import numpy as np

N_DRAWS = 2_000
LEAST_ACTIVE = 30  # tokens of a sample


def draw_again(n: int, seed: int, n_draws: int = N_DRAWS) -> np.ndarray:
    """Which of ``n`` each draw has, with replacement, (n_draws, n); no draws where ``n`` is 0."""
    return np.random.default_rng(seed).integers(0, n, (n_draws, n)) if n else np.zeros((0, 0), int)


def interval(found: Sequence[float] | np.ndarray) -> list[float]:
    """The two ends of the middle 95% of what the draws gave."""
    return np.percentile(found, [2.5, 97.5]).tolist()


def mean_and_interval(values: np.ndarray, seed: int) -> list[float]:
    """The mean of values, (n,), and the two ends of its interval; empty where there are none."""
    if not len(values):
        return []
    return [float(np.mean(values)), *interval(values[draw_again(len(values), seed)].mean(axis=1))]


def draw_features(frequency: np.ndarray, n_tokens: int, n_features: int, seed: int) -> np.ndarray:
    """Features drawn at random among those expected on `LEAST_ACTIVE` of ``n_tokens`` tokens.

    Of a rarer one, the largest of thousands of correlations would be chance.

    Args:
        frequency: Share of tokens on which each feature is active, shape (n_latents,).
    """
    common = np.flatnonzero(frequency * n_tokens >= LEAST_ACTIVE)
    return np.sort(np.random.default_rng(seed).permutation(common)[:n_features])
