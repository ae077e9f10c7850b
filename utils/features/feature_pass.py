"""One streaming pass over the activations, and what it finds out about each feature.

A feature's examples are kept, while streaming, by `BestPerGroup`: the
highest of each feature, and a random few of each half octave of its activation, from which the
evenly spaced buckets between the maximum and 0 are drawn at the end; `Histograms` counts how often
a feature is how active. Memory is bounded by the number of features, not by the data.
"""

from typing import Protocol

import numpy as np

from utils.activations.store import ActivationStore, ContextBatch
from utils.autoencoder.fidelity import Fidelity
from utils.features.examples import (
    HALF_OCTAVES,
    N_BUCKETS,
    N_PER_BUCKET,
    N_TOP,
    PER_HALF_OCTAVE,
    WINDOW,
    BestPerGroup,
    text_around,
    window_start,
)
from utils.steering.feature_model import ActiveFeatures

N_BINS = 32  # of a feature's histogram, at least half of them up to its maximum
SMALLEST_RANGE = -16  # exponent of 2: histograms begin with bins from 0 to here


class Histograms:
    """Of a stream of positive values in groups, a histogram of each group in equal bins from 0.

    A group's bins reach to a power of two; where a value passes it, pairs of bins become one, so
    that counts are exact whatever comes, and the maximum ends in the upper half of the bins.

    Attributes:
        counts: Shape (n_groups, `N_BINS`).
    """

    def __init__(self, n_groups: int):
        self.counts = np.zeros((n_groups, N_BINS), np.int32)
        self._exponents = np.full(n_groups, SMALLEST_RANGE)

    @property
    def ranges(self) -> np.ndarray:
        """The upper edge of each group's last bin, shape (n_groups,)."""
        return np.exp2(self._exponents)

    def add(self, group: np.ndarray, values: np.ndarray) -> None:
        needed = self._exponents.copy()
        np.maximum.at(needed, group, np.ceil(np.log2(np.maximum(values, 1e-9))).astype(int))
        while len(narrow := np.flatnonzero(self._exponents < needed)):
            pairs = self.counts[narrow].reshape(-1, N_BINS // 2, 2).sum(axis=2)
            self.counts[narrow] = np.pad(pairs, ((0, 0), (0, N_BINS // 2)))
            self._exponents[narrow] += 1
        bins = (values * (N_BINS / self.ranges[group])).astype(int)
        bins = group * N_BINS + np.minimum(bins, N_BINS - 1)  # the upper edge is in the last
        counts = np.bincount(bins, minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape).astype(np.int32)


class Encoder(Protocol):
    """What a pass asks about rows of activations: a `FeatureEncoder`, or neurons in its place."""

    n_latents: int

    def active(self, activations: np.ndarray) -> ActiveFeatures: ...


class FeaturePass:
    """The pass: statistics and examples of every feature, and the fidelity of the autoencoder.

    Args:
        encoder: Of an autoencoder of any kind.
        store: The activations it was trained on.
        seed: Chooses the random examples.
    """

    def __init__(self, encoder: Encoder, store: ActivationStore, seed: int):
        self.encoder, self.store = encoder, store
        n = encoder.n_latents
        self.fidelity = Fidelity(store.d_model)
        self.uses = np.zeros(n, np.int64)
        self.sums = np.zeros(n)
        self.maxima = np.zeros(n)
        self.histograms = Histograms(n)
        self.subset_sums = np.zeros((n, len(store.subset_names)))
        self.subset_tokens = np.zeros(len(store.subset_names), np.int64)
        self.top = BestPerGroup(n, N_TOP)
        self.sampled = BestPerGroup(n * HALF_OCTAVES, PER_HALF_OCTAVE)
        self.random = np.random.default_rng(seed)

    def run(self, contexts: range, batch_size: int) -> None:
        """Stream over ``contexts``, about ``batch_size`` tokens at a time."""
        for batch in self.store.batches(contexts, batch_size, "analysing"):
            self._add(batch)

    def _add(self, batch: ContextBatch) -> None:
        rows = batch.rows
        row, feature, activation, reconstruction = self.encoder.active(rows)
        self.fidelity.add(rows, reconstruction, np.bincount(row, minlength=len(rows)))
        context, position = batch.places(row)
        n = len(self.uses)
        self.uses += np.bincount(feature, minlength=n)
        self.sums += np.bincount(feature, activation, minlength=n)
        self.histograms.add(feature, activation)
        self._add_subsets(batch.subsets, batch.subsets[context, position], feature, activation)
        text = text_around(batch.tokens)
        self._add_examples(batch.contexts[0], text, feature, context, position, activation)

    def _add_subsets(self, subsets, subset, feature, activation) -> None:
        """Add the subsets of all positions, and those of the places where features are active."""
        n = len(self.subset_tokens)
        self.subset_tokens += np.bincount(subsets.ravel(), minlength=n)
        group = feature * n + subset
        sums = np.bincount(group, activation, minlength=self.subset_sums.size)
        self.subset_sums += sums.reshape(self.subset_sums.shape)

    def _add_examples(self, first_context, text, feature, context, position, activation) -> None:
        """Offer the peak of each feature in each context to the kept examples."""
        key = feature.astype(np.int64) * (context.max() + 1 if len(context) else 1) + context
        order = np.argsort(key, kind="stable")
        feature, context, position, activation = (
            values[order] for values in (feature, context, position, activation)
        )
        key = key[order]
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else order
        peaks = np.maximum.reduceat(activation, starts) if len(key) else activation
        of_group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(key)]))
        is_peak = np.flatnonzero(activation == peaks[of_group])
        peak_at = is_peak[np.unique(of_group[is_peak], return_index=True)[1]]
        np.maximum.at(self.maxima, feature[starts], peaks)

        octave = np.clip(2 * np.log2(np.maximum(peaks, 1e-9)) + HALF_OCTAVES / 2, 0, None)
        bins = feature[starts] * HALF_OCTAVES + np.minimum(octave, HALF_OCTAVES - 1).astype(int)
        chance = self.random.random(len(starts), np.float32)
        entries = {
            "feature": feature[starts],
            "activation": peaks,
            "context": (first_context + context[starts]).astype(np.int32),
            "position": position[peak_at].astype(np.int32),
        }
        texts = {"text": text[context[starts], position[peak_at]]}
        for best, group, priority, further in (
            (self.top, feature[starts], peaks, texts),
            (self.sampled, bins, chance, {}),
        ):
            wanted = np.flatnonzero(best.wants(group, priority))
            best.add(
                {
                    "group": group[wanted],
                    "priority": priority[wanted],
                    "window": self._windows(wanted, entries, starts, position, activation),
                    **{name: values[wanted] for name, values in {**entries, **further}.items()},
                }
            )

    def _windows(self, wanted, entries, starts, position, activation) -> np.ndarray:
        """Activations of some groups around their peaks, shape (groups, WINDOW), float16."""
        begins = window_start(entries["position"][wanted], self.store.context_length)
        lengths = np.diff(np.r_[starts, len(position)])[wanted]
        group = np.repeat(np.arange(len(wanted)), lengths)
        first = np.repeat(starts[wanted] - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
        entry = first + np.arange(len(group))
        offset = position[entry] - begins[group]
        inside = (offset >= 0) & (offset < WINDOW)
        windows = np.zeros((len(wanted), WINDOW), np.float16)
        windows[group[inside], offset[inside]] = activation[entry[inside]]
        return windows

    # ---- what was found

    def subset_shares(self) -> dict[str, float]:
        """Share of the tokens gone through that each corpus subset has."""
        shares = self.subset_tokens / max(1, self.subset_tokens.sum())
        return dict(zip(self.store.subset_names, shares.tolist(), strict=True))

    def statistics(self) -> dict[str, np.ndarray | list]:
        """Per feature: frequency, maximum and mean activation, leading corpus subset, histogram.

        ``histogram`` counts the tokens, of those on which the feature is active, in `N_BINS` equal
        bins of activation from 0 to ``histogram_range``.
        """
        uses = np.maximum(self.uses, 1)
        total = np.maximum(self.subset_sums.sum(axis=1), 1e-12)
        return {
            "frequency": self.uses / self.fidelity.n_rows,
            "max_activation": self.maxima,
            "mean_activation": self.sums / uses,
            "dead": self.uses == 0,
            "top_subset": np.array(self.store.subset_names)[self.subset_sums.argmax(axis=1)],
            "top_subset_share": self.subset_sums.max(axis=1) / total,
            "histogram": list(self.histograms.counts),
            "histogram_range": self.histograms.ranges,
        }

    def examples(self) -> dict[str, np.ndarray]:
        """The kept examples by feature, bucket and rank.

        Bucket 0 holds the `N_TOP` highest of different texts; bucket b up to `N_PER_BUCKET` random
        ones whose peak lies in the b-th of `N_BUCKETS` equal parts between the maximum and 0.
        """
        top = dict(self.top.best())
        top["bucket"] = np.zeros(len(top["feature"]), np.int64)
        sampled = dict(self.sampled.best())
        below = 1 - sampled["activation"] / self.maxima[sampled["feature"]]
        sampled["bucket"] = 1 + np.minimum((below * N_BUCKETS).astype(int), N_BUCKETS - 1)
        chosen = BestPerGroup(len(self.uses) * (N_BUCKETS + 1), N_PER_BUCKET)
        sampled["group"] = sampled["feature"] * (N_BUCKETS + 1) + sampled["bucket"]
        chosen.add(sampled)
        sampled = chosen.best()
        order = np.lexsort(
            tuple(np.r_[top[name], sampled[name]] for name in ("rank", "bucket", "feature"))
        )
        names = ("feature", "bucket", "rank", "activation", "context", "position", "window")
        return {name: np.concatenate([top[name], sampled[name]])[order] for name in names}
