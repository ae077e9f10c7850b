"""Features: one streaming pass over the activations, and what it finds out about each of them.

An activation is f_i · ‖W_dec,i‖. Its examples are kept, while streaming, by `BestPerGroup`: the
highest of each feature, and a random few of each half octave of its activation, from which the
evenly spaced buckets between the maximum and 0 are drawn at the end; `Histograms` counts how often
a feature is how active. Memory is bounded by the number of features, not by the data.
"""

from typing import Any

import numpy as np
from keras import ops
from tqdm import tqdm

from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import Fidelity

N_TOP = 20  # highest examples of a feature ("Scaling Monosemanticity" shows 20)
N_BUCKETS = 5  # evenly spaced between the maximum and 0
N_PER_BUCKET = 3  # random examples of each
WINDOW = 48  # tokens of an example
WINDOW_BEFORE = 32  # of these, before the peak
HALF_OCTAVES = 32  # bins of activation, 2^-8 to 2^8, that random examples are kept for
PER_HALF_OCTAVE = 4
AROUND = 12  # tokens to each side of a peak; examples that have them all alike are the same text
N_BINS = 32  # of a feature's histogram, at least half of them up to its maximum
SMALLEST_RANGE = -16  # exponent of 2: histograms begin with bins from 0 to here


def window_start(position: np.ndarray, context_length: int) -> np.ndarray:
    """Where the window around a peak begins in its context."""
    return np.clip(position - WINDOW_BEFORE, 0, max(0, context_length - WINDOW))


class BestPerGroup:
    """Of a stream of entries, the ``size`` of highest priority in each group.

    Entries are dictionaries of arrays of equal length, among them ``group`` and ``priority``. Of a
    group's entries with the same ``text``, where they have that, only the best is kept.
    """

    def __init__(self, n_groups: int, size: int):
        self.size = size
        self.threshold = np.full(n_groups, -np.inf, np.float32)
        self._parts: list[dict[str, np.ndarray]] = []
        self._pending = 0

    def wants(self, group: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Which entries could still be among the best, bool, of the entries' length."""
        return priority > self.threshold[group]

    def add(self, entries: dict[str, np.ndarray]) -> None:
        self._parts.append(entries)
        self._pending += len(entries["group"])
        if self._pending > max(100_000, self.size * len(self.threshold) // 4):
            self.best()

    def best(self) -> dict[str, np.ndarray]:
        """The best entries so far, by group and falling priority, with their ``rank``."""
        parts, self._parts = self._parts, []
        names = [name for name in parts[0] if name != "rank"]

        def join(name):  # a column at a time, for the largest are most of the memory
            return np.concatenate([part.pop(name) for part in parts])

        columns = {name: join(name) for name in ("group", "priority")}
        order = np.lexsort((-columns["priority"], columns["group"]))
        if "text" in names:
            columns["text"] = join("text")
            order = order[_first_of_each(columns["group"][order], columns["text"][order])]
        group = columns["group"][order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else order
        lengths = np.diff(np.r_[starts, len(group)])
        rank = np.arange(len(group)) - np.repeat(starts, lengths)
        last = rank == self.size - 1
        self.threshold[group[last]] = columns["priority"][order][last]
        kept = order[rank < self.size]
        best = {name: (columns[name] if name in columns else join(name))[kept] for name in names}
        best["rank"] = rank[rank < self.size]
        self._parts, self._pending = [best], 0
        return dict(best)


def _first_of_each(*keys: np.ndarray) -> np.ndarray:
    """The places, rising, at which combinations of keys occur for the first time."""
    order = np.lexsort(keys)  # stable: of equal keys the first stays first
    changes = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    return np.sort(order[np.r_[True, changes]]) if len(order) else order


def text_around(tokens: np.ndarray) -> np.ndarray:
    """A number for the `AROUND` tokens to each side of every position, alike for like texts.

    Args:
        tokens: Shape (contexts, context_length).

    Returns:
        Of that shape, uint64; what lies outside of the context counts as a token of its own.
    """
    padded = np.pad(tokens.astype(np.int64) + 1, ((0, 0), (AROUND, AROUND))).astype(np.uint64)
    text = np.zeros(tokens.shape, np.uint64)
    for offset in range(2 * AROUND + 1):
        text = text * np.uint64(0x9E3779B97F4A7C15) + padded[:, offset : offset + tokens.shape[1]]
    return text


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


class FeaturePass:
    """The pass: statistics and examples of every feature, and the fidelity of the autoencoder.

    Args:
        autoencoder: Any kind.
        store: The activations it was trained on.
        seed: Chooses the random examples.
    """

    def __init__(self, autoencoder: SparseAutoencoder, store: ActivationStore, seed: int):
        self.autoencoder, self.store = autoencoder, store
        n = autoencoder.n_latents
        self.norms = ops.convert_to_numpy(autoencoder.decoder_norms())
        self.subsets = sorted({name for shard in store.shards for name in shard.subset_names})
        self.fidelity = Fidelity(store.d_model)
        self.uses = np.zeros(n, np.int64)
        self.sums = np.zeros(n)
        self.maxima = np.zeros(n)
        self.histograms = Histograms(n)
        self.subset_sums = np.zeros((n, len(self.subsets)))
        self.subset_tokens = np.zeros(len(self.subsets), np.int64)
        self.top = BestPerGroup(n, N_TOP)
        self.sampled = BestPerGroup(n * HALF_OCTAVES, PER_HALF_OCTAVE)
        self.random = np.random.default_rng(seed)

    def run(self, contexts: range, batch_size: int) -> None:
        """Stream over ``contexts``, about ``batch_size`` tokens at a time."""
        per_batch = max(1, batch_size // self.store.context_length)
        with tqdm(
            total=len(contexts) * self.store.context_length,
            desc="analysing",
            unit="tok",
            unit_scale=True,
        ) as progress:
            for start in range(contexts.start, contexts.stop, per_batch):
                chosen = range(start, min(start + per_batch, contexts.stop))
                self._add(chosen)
                progress.update(len(chosen) * self.store.context_length)

    def _add(self, contexts: range) -> None:
        kept = np.stack([self.store["kept"][c] for c in contexts])
        rows = self.store.kept_rows(contexts).astype(np.float32)
        row, feature, latents, reconstruction = self.autoencoder.encode_active(rows)
        self.fidelity.add(rows, reconstruction, np.bincount(row, minlength=len(rows)))
        at = np.flatnonzero(kept)[row]  # place of each entry among all positions of the contexts
        context, position = np.divmod(at, self.store.context_length)
        activation = (latents * self.norms[feature]).astype(np.float32)
        n = len(self.norms)
        self.uses += np.bincount(feature, minlength=n)
        self.sums += np.bincount(feature, activation, minlength=n)
        self.histograms.add(feature, activation)
        self._add_subsets(contexts, at, feature, activation)
        text = text_around(np.stack([self.store["tokens"][c] for c in contexts]))
        self._add_examples(contexts.start, text, feature, context, position, activation)

    def _add_subsets(self, contexts: range, at, feature, activation) -> None:
        numbers = np.concatenate([self._subset_numbers(c) for c in contexts])
        self.subset_tokens += np.bincount(numbers, minlength=len(self.subsets))
        group = feature * len(self.subsets) + numbers[at]
        sums = np.bincount(group, activation, minlength=self.subset_sums.size)
        self.subset_sums += sums.reshape(self.subset_sums.shape)

    def _subset_numbers(self, context: int) -> np.ndarray:
        shard, row = self.store.locate(context)
        numbers = np.array([self.subsets.index(name) for name in shard.subset_names])
        return numbers[shard["subsets"][row]]

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
        for best, group, priority, own in (
            (self.top, feature[starts], peaks, texts),
            (self.sampled, bins, chance, {}),
        ):
            wanted = np.flatnonzero(best.wants(group, priority))
            best.add(
                {
                    "group": group[wanted],
                    "priority": priority[wanted],
                    "window": self._windows(wanted, entries, starts, position, activation),
                    **{name: values[wanted] for name, values in {**entries, **own}.items()},
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
        return dict(zip(self.subsets, shares.tolist(), strict=True))

    def statistics(self) -> dict[str, Any]:
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
            "top_subset": np.array(self.subsets)[self.subset_sums.argmax(axis=1)],
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
        chosen = BestPerGroup(len(self.norms) * (N_BUCKETS + 1), N_PER_BUCKET)
        sampled["group"] = sampled["feature"] * (N_BUCKETS + 1) + sampled["bucket"]
        chosen.add(sampled)
        sampled = chosen.best()
        order = np.lexsort(
            tuple(np.r_[top[name], sampled[name]] for name in ("rank", "bucket", "feature"))
        )
        names = ("feature", "bucket", "rank", "activation", "context", "position", "window")
        return {name: np.concatenate([top[name], sampled[name]])[order] for name in names}
