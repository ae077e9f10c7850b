"""Drawing at random: features to study; bootstrap samples, for 95% intervals; a test."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

N_DRAWS = 2_000
LEAST_ACTIVE = 30  # tokens of a sample


def draw_again(n: int, seed: int, n_draws: int = N_DRAWS) -> np.ndarray:
    """Bootstrap samples of ``n`` indices, with replacement, (n_draws, n); none if ``n`` is 0."""
    return np.random.default_rng(seed).integers(0, n, (n_draws, n)) if n else np.zeros((0, 0), int)


def interval(estimates: Sequence[float] | np.ndarray) -> list[float]:
    """The two ends of the middle 95% of estimates, one a bootstrap sample."""
    return np.percentile(estimates, [2.5, 97.5]).tolist()


def mean_and_interval(values: np.ndarray, seed: int) -> list[float]:
    """The mean of values, (n,), and the two ends of its interval; empty if there are no values."""
    if not len(values):
        return []
    return [float(np.mean(values)), *interval(values[draw_again(len(values), seed)].mean(axis=1))]


def p_positive(differences: np.ndarray) -> float:
    """How likely chance makes differences as positive: Wilcoxon's signed ranks, one-sided."""
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, alternative="greater").pvalue)


def another_of(features: Sequence[int], seed: int) -> dict[int, int]:
    """For each feature another one, drawn at random; each is drawn once."""
    order = np.random.default_rng(seed).permutation(features).tolist()
    return {feature: order[i - 1] for i, feature in enumerate(order)}


def draw_features(frequency: np.ndarray, n_tokens: int, n_features: int, seed: int) -> np.ndarray:
    """Features drawn at random among those expected on `LEAST_ACTIVE` of ``n_tokens`` tokens.

    The largest of thousands of correlations of a rarer one would be chance.

    Args:
        frequency: Share of tokens on which each feature is active, shape (n_latents,).
    """
    common = np.flatnonzero(frequency * n_tokens >= LEAST_ACTIVE)
    return np.sort(np.random.default_rng(seed).permutation(common)[:n_features])
