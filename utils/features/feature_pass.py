"""One streaming pass over the activations: statistics and examples of each feature.

While streaming, `BestPerGroup` keeps the highest examples of each feature, and a random few of each
half octave of its activation. From these, evenly spaced buckets between the maximum and 0 are drawn
at the end. Memory is bounded by the number of features, not by the data.
"""

from typing import Protocol

import numpy as np

from utils.activations.store import ActivationStore, ContextBatch, Contexts
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
EMPTY_RANGE = -16  # exponent of 2: where the bins of a histogram without values end
HEADROOM = 14  # exponent of 2: windows are kept in float16 with their peaks scaled to here


class Histograms:
    """Of a stream of positive values in groups, a histogram of each group in equal bins from 0.

    A group's bins reach to a power of two. When a value passes it, pairs of bins are merged, so
    that counts stay exact and the maximum lies in the upper half of the bins.

    Attributes:
        counts: Shape (n_groups, `N_BINS`).
    """

    def __init__(self, n_groups: int):
        self.counts = np.zeros((n_groups, N_BINS), np.int32)
        self._exponents = np.full(n_groups, EMPTY_RANGE)

    @property
    def ranges(self) -> np.ndarray:
        """The upper edge of each group's last bin, shape (n_groups,)."""
        return np.exp2(self._exponents)

    def add(self, group: np.ndarray, values: np.ndarray) -> None:
        is_empty = ~self.counts.any(axis=1)
        self._exponents[group[is_empty[group]]] = np.iinfo(int).min
        needed = self._exponents.copy()
        np.maximum.at(needed, group, np.ceil(np.log2(values)).astype(int))
        self._exponents[is_empty] = needed[is_empty]
        while len(narrow := np.flatnonzero(self._exponents < needed)):
            pairs = self.counts[narrow].reshape(-1, N_BINS // 2, 2).sum(axis=2)
            self.counts[narrow] = np.pad(pairs, ((0, 0), (0, N_BINS // 2)))
            self._exponents[narrow] += 1
        bins = (values * (N_BINS / self.ranges[group])).astype(int)
        bins = group * N_BINS + np.minimum(bins, N_BINS - 1)  # the upper edge is in the last
        counts = np.bincount(bins, minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape).astype(np.int32)


def _exponents(peaks: np.ndarray) -> np.ndarray:
    """The powers of 2 by which windows with these peaks are divided."""
    return np.frexp(peaks)[1] - HEADROOM


class Encoder(Protocol):
    """Gives the active features of rows of activations: a `FeatureEncoder`, or `TopNeurons`."""

    n_latents: int

    def active(self, activations: np.ndarray) -> ActiveFeatures: ...


class FeaturePass:
    """The pass: statistics and examples of every feature, and the fidelity of the autoencoder.

    ``seed`` chooses the random examples.
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
        self._unit: int | None = None  # exponent of 2 in the middle of the half octaves

    def run(self, contexts: Contexts, batch_size: int) -> None:
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
        self._add_examples(np.asarray(batch.contexts), text, feature, context, position, activation)

    def _add_subsets(self, subsets, subset, feature, activation) -> None:
        """Add the subsets of all positions, and those of the places where features are active."""
        n = len(self.subset_tokens)
        self.subset_tokens += np.bincount(subsets.ravel(), minlength=n)
        group = feature * n + subset
        sums = np.bincount(group, activation, minlength=self.subset_sums.size)
        self.subset_sums += sums.reshape(self.subset_sums.shape)

    def _add_examples(self, numbers, text, feature, context, position, activation) -> None:
        """Offer the peak of each feature in each context to the kept examples."""
        key = feature.astype(np.int64) * (context.max() + 1 if len(context) else 1) + context
        order = np.argsort(key, kind="stable")
        feature, context, position, activation = (
            values[order] for values in (feature, context, position, activation)
        )
        key = key[order]
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else order
        peaks = np.maximum.reduceat(activation, starts) if len(key) else activation
        group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(key)]))
        is_peak = np.flatnonzero(activation == peaks[group])
        first_peak = is_peak[np.unique(group[is_peak], return_index=True)[1]]
        np.maximum.at(self.maxima, feature[starts], peaks)

        if self._unit is None and len(peaks):
            highest = int(np.floor(np.log2(peaks.max())))
            usual = range(-HALF_OCTAVES // 8, HALF_OCTAVES // 4)
            self._unit = 0 if highest in usual else highest - HALF_OCTAVES // 8
        octave = np.clip(2 * (np.log2(peaks) - (self._unit or 0)) + HALF_OCTAVES / 2, 0, None)
        bins = feature[starts] * HALF_OCTAVES + np.minimum(octave, HALF_OCTAVES - 1).astype(int)
        chance = self.random.random(len(starts), np.float32)
        entries = {
            "feature": feature[starts],
            "activation": peaks,
            "context": numbers[context[starts]].astype(np.int32),
            "position": position[first_peak].astype(np.int32),
        }
        top = {"group": feature[starts], "priority": peaks}
        top["text"] = text[context[starts], position[first_peak]]
        sampled = {"group": bins, "priority": chance}
        for best, keys in ((self.top, top), (self.sampled, sampled)):
            wanted = np.flatnonzero(best.wants(keys["group"], keys["priority"]))
            columns = {name: values[wanted] for name, values in {**keys, **entries}.items()}
            columns["window"] = self._windows(wanted, entries, starts, position, activation)
            best.add(columns)

    def _windows(self, wanted, entries, starts, position, activation) -> np.ndarray:
        """Activations of some groups around their peaks, shape (groups, WINDOW), float16.

        Scaled as `_exponents` says, for float16 ends at 65,504 and holds nothing below 6e-8.
        """
        begins = window_start(entries["position"][wanted], self.store.context_length)
        lengths = np.diff(np.r_[starts, len(position)])[wanted]
        group = np.repeat(np.arange(len(wanted)), lengths)
        first = np.repeat(starts[wanted] - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
        entry = first + np.arange(len(group))
        offset = position[entry] - begins[group]
        inside = (offset >= 0) & (offset < WINDOW)
        windows = np.zeros((len(wanted), WINDOW), np.float16)
        scaled = np.ldexp(activation[entry], -_exponents(entries["activation"][wanted])[group])
        windows[group[inside], offset[inside]] = scaled[inside]
        return windows

    # ---- results

    def subset_shares(self) -> dict[str, float]:
        """Share of the analysed tokens by corpus subset."""
        shares = self.subset_tokens / max(1, self.subset_tokens.sum())
        return dict(zip(self.store.subset_names, shares.tolist(), strict=True))

    def statistics(self) -> dict[str, np.ndarray | list]:
        """Per feature: frequency, maximum and mean activation, leading corpus subset, histogram.

        ``histogram`` counts the tokens, of those on which the feature is active, in `N_BINS` equal
        bins of activation from 0 to ``histogram_range``.
        """
        uses = np.maximum(self.uses, 1)
        total = np.where(self.uses, self.subset_sums.sum(axis=1), 1.0)
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
        names = ("feature", "bucket", "rank", "activation", "context", "position", "window")
        columns = {name: np.concatenate([top[name], sampled[name]]) for name in names}
        exponents = _exponents(columns["activation"])[:, None]
        columns["window"] = np.ldexp(columns["window"].astype(np.float32), exponents)
        order = np.lexsort([columns[name] for name in ("rank", "bucket", "feature")])
        return {name: values[order] for name, values in columns.items()}
