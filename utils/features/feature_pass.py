"""One streaming pass over the activations: statistics and examples of each feature.

While streaming, `BestPerGroup` keeps the highest examples of each feature, and a random few of each
half octave of its activation. From these, evenly spaced buckets between the maximum and 0 are drawn
at the end. Memory is bounded by the number of features, not by the data.

All that grows with the number of active features stays on the device that encodes. What comes home
of a batch are the examples that beat those kept so far.
"""

import collections
import json
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse
import torch

from utils.activations.queues import read_ahead
from utils.activations.store import ActivationStore, ContextBatch, Contexts
from utils.autoencoder.fidelity import Fidelity
from utils.features.best import BestPerGroup, indices_where
from utils.features.examples import (
    HALF_OCTAVES,
    N_BUCKETS,
    N_PER_BUCKET,
    N_TOP,
    PER_HALF_OCTAVE,
    WINDOW,
    text_around,
    window_start,
)
from utils.features.pass_backup import PassBackup, State, inside, of_part
from utils.language_model import pick_device
from utils.steering.feature_model import ActiveFeatures

N_BINS = 32  # of a feature's histogram, at least half of them up to its maximum
EMPTY_RANGE = 2.0**-16  # where the bins of a histogram without values end
HEADROOM = 14  # exponent of 2: windows are kept in float16 with their peaks scaled to here
FEATURES_TOGETHER = 2_048  # whose examples are put together at once
PARTS = ("fidelity", "histograms", "subset_sums", "top", "sampled")  # of a pass, with a state each
COUNTS = ("l0_counts", "uses", "sums", "subset_tokens")
DENSE_SUMS = 2**27  # pairs of a feature and a subset that have a place each: 1 GiB


class Histograms:
    """Of a stream of positive values in groups, a histogram of each group in equal bins from 0.

    A group's bins reach to a power of two. When a value passes it, pairs of bins are merged, so
    that counts stay exact and the maximum lies in the upper half of the bins.

    Attributes:
        counts: Shape (n_groups, `N_BINS`).
        ranges: The upper edge of each group's last bin, shape (n_groups,).
        maxima: The largest value of each group, 0 if it has none.
    """

    def __init__(self, n_groups: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros((n_groups, N_BINS), dtype=torch.int32, device=device)
        self.ranges = torch.full((n_groups,), EMPTY_RANGE, device=device)
        self.maxima = torch.zeros(n_groups, device=device)

    def state(self) -> State:
        return {"counts": self.counts, "ranges": self.ranges, "maxima": self.maxima}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.counts, self.ranges, self.maxima = (
            torch.from_numpy(state[name]).to(self.counts.device)
            for name in ("counts", "ranges", "maxima")
        )

    def add(self, group: torch.Tensor, values: torch.Tensor) -> None:
        is_empty = self.maxima == 0
        self.maxima.scatter_reduce_(0, group.long(), values, "amax")
        mantissa = torch.frexp(self.maxima).mantissa  # 1/2 of a power of two
        needed = torch.where(mantissa == 0.5, self.maxima, self.maxima / mantissa)
        self.ranges = torch.where(is_empty & (self.maxima > 0), needed, self.ranges)
        narrow = torch.nonzero(self.ranges < needed)[:, 0]
        if len(narrow):
            factors = (needed[narrow] / self.ranges[narrow]).clamp_max(N_BINS).int()
            bins = torch.arange(N_BINS, device=factors.device) // factors[:, None]
            merged = torch.zeros_like(self.counts[narrow])
            self.counts[narrow] = merged.scatter_add_(1, bins, self.counts[narrow])
            self.ranges[narrow] = needed[narrow]
        bins = (values * (N_BINS / self.ranges).index_select(0, group)).int()
        bins.clamp_max_(N_BINS - 1)  # the upper edge is in the last bin
        self.counts.view(-1).index_add_(0, group * N_BINS + bins, torch.ones_like(bins))


class SubsetSums:
    """Sums of a stream of activations by feature and corpus subset.

    Where features times subsets are many, only the sums that are not 0 are kept.
    """

    def __init__(self, n_features: int, n_subsets: int, device: torch.device | str = "cpu"):
        self.shape = n_features, n_subsets
        self._dense = n_features * n_subsets <= DENSE_SUMS
        n = n_features * n_subsets if self._dense else 0
        options = {"device": device}
        self._sums = torch.zeros(n, dtype=torch.float64, **options)
        # Where few are kept: feature · n_subsets + subset, of each sum.
        self._pairs = torch.zeros(0, dtype=torch.int64, **options)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, feature: torch.Tensor, subset: torch.Tensor, activation: torch.Tensor) -> None:
        pair = feature.long() * self.shape[1] + subset
        if self._dense:
            self._sums.index_add_(0, pair, activation.double())
            return
        self._pending.append((pair, activation.double()))
        if sum(len(pair) for pair, _ in self._pending) > max(2**24, len(self._pairs)):
            self._merge()

    def state(self) -> State:
        if self._pending:
            self._merge()
        return {"pairs": self._pairs, "sums": self._sums}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self._pairs, self._sums = (
            torch.from_numpy(state[name]).to(self._sums.device) for name in ("pairs", "sums")
        )

    def _merge(self) -> None:
        pairs, sums = zip((self._pairs, self._sums), *self._pending, strict=True)
        self._pairs, place = torch.cat(pairs).unique(return_inverse=True)
        self._sums = torch.zeros(len(self._pairs), dtype=torch.float64, device=place.device)
        self._sums.index_add_(0, place, torch.cat(sums))
        self._pending = []

    def leading(self) -> tuple[np.ndarray, np.ndarray]:
        """The subset with most of each feature's activation, and its share; 0 of a dead one."""
        if self._dense:
            sums = self._sums.view(self.shape).cpu().numpy()
            leading, largest, total = sums.argmax(axis=1), sums.max(axis=1), sums.sum(axis=1)
        else:
            leading, largest, total = self._leading_of_few()
        return leading, largest / np.where(total > 0, total, 1.0)

    def _leading_of_few(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._pending:
            self._merge()
        feature, subset = np.divmod(self._pairs.cpu().numpy(), self.shape[1])
        sums = self._sums.cpu().numpy()
        leading, largest = np.zeros(self.shape[0], np.int64), np.zeros(self.shape[0])
        np.maximum.at(largest, feature, sums)
        at = np.flatnonzero(sums == largest[feature])[::-1]  # of equal ones the first stays
        leading[feature[at]] = subset[at]
        return leading, largest, np.bincount(feature, sums, minlength=self.shape[0])


def _scales(peaks: np.ndarray) -> np.ndarray:
    """The powers of 2 by which windows with these peaks are divided, float32."""
    return np.ldexp(np.float32(1), np.frexp(peaks)[1] - HEADROOM)


class Encoder(Protocol):
    """Gives the active features of rows of activations: a `FeatureEncoder`, or `TopNeurons`."""

    n_latents: int

    def active_tensors(self, activations: torch.Tensor) -> ActiveFeatures: ...

    def active(self, activations: np.ndarray) -> ActiveFeatures: ...


class Active(NamedTuple):
    """A batch's active features in order of feature, then of row; tensors of one length.

    ``group`` numbers the pairs of a feature and a context, ``start`` is where each of them begins.
    """

    feature: torch.Tensor
    context: torch.Tensor
    position: torch.Tensor
    activation: torch.Tensor
    group: torch.Tensor
    start: torch.Tensor


def by_feature(
    row: torch.Tensor, feature: torch.Tensor, activation: torch.Tensor, n_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, feature and activation, of `ActiveFeatures`, in order of feature, then of row."""
    if feature.device.type != "cpu":
        order = feature.sort(stable=True).indices
        return row[order], feature[order], activation[order]
    # Turning rows into columns is a sort by counting, many times faster than others on a CPU.
    starts = np.r_[0, np.bincount(row).cumsum()].astype(np.int32)
    shape = len(starts) - 1, n_features
    columns = scipy.sparse.csr_array((activation.numpy(), feature.numpy(), starts), shape).tocsc()
    feature = np.repeat(np.arange(n_features, dtype=np.int32), np.diff(columns.indptr))
    return tuple(map(torch.from_numpy, (columns.indices, feature, columns.data)))


def _peaks(active: Active) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest activation of each group, and where it is first reached among the entries."""
    last = len(active.group) - 1
    place = torch.arange(last, -1, -1, device=active.group.device)
    # One number that is larger the higher, then the earlier: bits of positive floats are in order.
    key = (active.activation.view(torch.int32).long() << 32) | place
    best = key.new_zeros(len(active.start)).scatter_reduce_(0, active.group, key, "amax")
    return (best >> 32).int().view(torch.float32), last - (best & 0xFFFFFFFF)


class FeaturePass:
    """The pass: statistics and examples of every feature, and the fidelity of the autoencoder.

    ``seed`` chooses the random examples.
    """

    def __init__(self, encoder: Encoder, store: ActivationStore, seed: int):
        self.encoder, self.store = encoder, store
        n, n_subsets = encoder.n_latents, len(store.subset_names)
        encoding = pick_device()
        device = "cpu" if encoding.type == "mps" else encoding  # which has no float64
        self._encoding, self._device = encoding, device
        self.fidelity = Fidelity(store.d_model)
        self.l0_counts = torch.zeros(n + 1, dtype=torch.int64, device=device)
        self.uses = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums = torch.zeros(n, dtype=torch.float64, device=device)
        self.histograms = Histograms(n, device)
        self.subset_sums = SubsetSums(n, n_subsets, device)
        self.subset_tokens = torch.zeros(n_subsets, dtype=torch.int64, device=device)
        self.top = BestPerGroup(n, N_TOP, device)
        self.sampled = BestPerGroup(n * HALF_OCTAVES, PER_HALF_OCTAVE, device)
        self.random = np.random.default_rng(seed)
        self._unit: int | None = None  # exponent of 2 in the middle of the half octaves

    @property
    def maxima(self) -> np.ndarray:
        """The largest activation of each feature, float64, shape (n_latents,)."""
        return self.histograms.maxima.cpu().numpy().astype(np.float64)

    def run(self, contexts: Contexts, batch_size: int, backup: PassBackup | None = None) -> None:
        """Stream over ``contexts``, about ``batch_size`` tokens at a time.

        With a backup it goes on from there, in batches of the same contexts.
        """
        n_done = backup.restore(self, contexts) if backup else 0
        for batch, rows in read_ahead(self._read(contexts[n_done:], batch_size)):
            self._add(batch, rows)
            n_done += len(batch.contexts)
            if backup:
                backup.keep(self, contexts, n_done)

    def state(self) -> State:
        """All that it has gathered, to be taken over by `restore`."""
        parts = (inside(name, getattr(self, name).state()) for name in PARTS)
        random = np.array(json.dumps([self.random.bit_generator.state, self._unit]))
        counts = {name: getattr(self, name) for name in COUNTS}
        return dict(collections.ChainMap(*parts), **counts, random=random)

    def restore(self, state: dict[str, np.ndarray]) -> None:
        for name in PARTS:
            getattr(self, name).restore(of_part(name, state))
        for name in COUNTS:
            setattr(self, name, torch.from_numpy(state[name]).to(self._device))
        self.random.bit_generator.state, self._unit = json.loads(str(state["random"]))

    def _read(
        self, contexts: Contexts, batch_size: int
    ) -> Iterator[tuple[ContextBatch, torch.Tensor]]:
        """Batches, and their rows on the device that encodes."""
        for batch in self.store.batches(contexts, batch_size, "analysing"):
            stored = torch.from_numpy(self.store.kept_rows(batch.contexts))
            yield batch, stored.to(self._encoding).float()

    def _add(self, batch: ContextBatch, rows: torch.Tensor) -> None:
        found = self.encoder.active_tensors(rows)
        row, feature, activation = (values.to(self._device) for values in found[:3])
        n_active = torch.bincount(row, minlength=len(rows))
        self.fidelity.add(rows, found.reconstruction, n_active.to(rows.device))
        self.l0_counts.index_add_(0, n_active, torch.ones_like(n_active))
        n_subsets = len(self.subset_tokens)
        subset_tokens = np.bincount(batch.subsets.ravel(), minlength=n_subsets)
        self.subset_tokens += torch.from_numpy(subset_tokens).to(self._device)

        row, feature, activation = by_feature(row, feature, activation, len(self.uses))
        context, position = batch.places(np.arange(len(rows)))
        places = context, position, batch.subsets[context, position]
        context, position, subset = (
            torch.from_numpy(values.astype(np.int32)).to(self._device).index_select(0, row)
            for values in places
        )
        self.uses.index_add_(0, feature, torch.ones_like(feature, dtype=torch.int64))
        self.sums.index_add_(0, feature, activation.double())
        self.subset_sums.add(feature, subset, activation)
        self.histograms.add(feature, activation)
        is_first = torch.ones(len(feature), dtype=torch.bool, device=feature.device)
        is_first[1:] = (feature[1:] != feature[:-1]) | (context[1:] != context[:-1])
        group, start = is_first.cumsum(0) - 1, indices_where(is_first)
        self._add_examples(batch, Active(feature, context, position, activation, group, start))

    def _add_examples(self, batch: ContextBatch, active: Active) -> None:
        """Offer the peak of each feature in each context to the kept examples."""
        peak, first = _peaks(active)
        feature = active.feature[active.start]
        chance = torch.from_numpy(self.random.random(len(peak), np.float32)).to(peak.device)
        text = text_around(batch.tokens)
        for best, group, priority in (
            (self.top, feature, peak),
            (self.sampled, feature.long() * HALF_OCTAVES + self._half_octave(peak), chance),
        ):
            wanted = best.wants(group, priority)
            entries = {
                "group": group[wanted],
                "priority": priority[wanted],
                "feature": feature[wanted],
                "activation": peak[wanted],
                "context": active.context[active.start[wanted]],
                "position": active.position[first[wanted]],
            }
            entries["window"] = self._windows(active, wanted, entries)
            home = {name: values.cpu().numpy() for name, values in entries.items()}
            if best is self.top:
                home["text"] = text[home["context"], home["position"]]
            home["context"] = np.asarray(batch.contexts)[home["context"]].astype(np.int32)
            best.add(home)

    def _half_octave(self, peak: torch.Tensor) -> torch.Tensor:
        """The bin of activation of each peak, 0 to `HALF_OCTAVES` − 1; mostly about the middle."""
        if self._unit is None and len(peak):
            highest = math.frexp(float(peak.max()))[1] - 1
            usual = range(-HALF_OCTAVES // 8, HALF_OCTAVES // 4)
            self._unit = 0 if highest in usual else highest - HALF_OCTAVES // 8
        mantissa, exponent = torch.frexp(peak)  # ½ ≤ mantissa < 1
        octave = 2 * (exponent - 1 - (self._unit or 0)) + (mantissa >= math.sqrt(0.5))
        return (octave + HALF_OCTAVES // 2).clamp(0, HALF_OCTAVES - 1)

    def _windows(
        self, active: Active, wanted: torch.Tensor, entries: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Activations of the wanted groups around their peaks, (wanted, WINDOW), float16.

        Divided by `_scales`, for float16 ends at 65,504 and holds nothing below 6e-8.
        """
        begins = window_start(entries["position"], self.store.context_length)
        ends = torch.cat([active.start[1:], active.start.new_tensor([len(active.group)])])
        lengths = (ends - active.start)[wanted]
        group = torch.repeat_interleave(lengths)
        skipped = lengths.cumsum(0) - lengths
        entry = torch.arange(len(group), device=group.device)
        entry += (active.start[wanted] - skipped)[group]
        offset = active.position[entry] - begins[group]
        inside = indices_where((offset >= 0) & (offset < WINDOW))
        group, entry, offset = group[inside], entry[inside], offset[inside]
        scale = torch.from_numpy(_scales(entries["activation"].cpu().numpy())).to(group.device)
        windows = torch.zeros((len(wanted), WINDOW), dtype=torch.float16, device=group.device)
        windows[group, offset] = (active.activation[entry] / scale[group]).half()
        return windows

    # ---- results

    def subset_shares(self) -> dict[str, float]:
        """Share of the analysed tokens by corpus subset."""
        tokens = self.subset_tokens.cpu().numpy()
        shares = tokens / max(1, tokens.sum())
        return dict(zip(self.store.subset_names, shares.tolist(), strict=True))

    def statistics(self) -> dict[str, np.ndarray | list]:
        """Per feature: frequency, maximum and mean activation, leading corpus subset, histogram.

        ``histogram`` counts the tokens, of those on which the feature is active, in `N_BINS` equal
        bins of activation from 0 to ``histogram_range``.
        """
        uses, sums = self.uses.cpu().numpy(), self.sums.cpu().numpy()
        subset, share = self.subset_sums.leading()
        return {
            "frequency": uses / self.fidelity.n_rows,
            "max_activation": self.maxima,
            "mean_activation": sums / np.maximum(uses, 1),
            "dead": uses == 0,
            "top_subset": np.array(self.store.subset_names)[subset],
            "top_subset_share": share,
            "histogram": self.histograms.counts.cpu().numpy(),
            "histogram_range": self.histograms.ranges.cpu().numpy().astype(np.float64),
        }

    def examples(self) -> dict[str, np.ndarray]:
        """The kept examples by feature, bucket and rank.

        Bucket 0 holds the `N_TOP` highest of different texts; bucket b up to `N_PER_BUCKET` random
        ones whose peak lies in the b-th of `N_BUCKETS` equal parts between the maximum and 0.
        """
        blocks = list(self.example_blocks())
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def example_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """`examples` of `FEATURES_TOGETHER` features at a time."""
        maxima = self.maxima
        kept = self.top.best(), self.sampled.best()
        for first in range(0, len(maxima), FEATURES_TOGETHER):
            some = range(first, first + FEATURES_TOGETHER)
            edges = [np.searchsorted(one["feature"], [some.start, some.stop]) for one in kept]
            top, sampled = (
                {name: values[slice(*edge)] for name, values in one.items()}
                for one, edge in zip(kept, edges, strict=True)
            )
            top["bucket"] = np.zeros(len(top["feature"]), np.int64)
            sampled = _draw(sampled, first, maxima)
            names = ("feature", "bucket", "rank", "activation", "context", "position", "window")
            columns = {name: np.concatenate([top[name], sampled[name]]) for name in names}
            scales = _scales(columns["activation"])[:, None]
            columns["window"] = columns["window"].astype(np.float32) * scales
            order = np.lexsort([columns[name] for name in ("rank", "bucket", "feature")])
            yield {name: values[order] for name, values in columns.items()}


def _draw(sampled: dict[str, np.ndarray], first: int, maxima: np.ndarray) -> dict[str, np.ndarray]:
    """Of examples sampled from half octaves, those of each bucket; features are ``first`` on."""
    below = 1 - sampled["activation"] / maxima[sampled["feature"]]
    sampled["bucket"] = 1 + np.minimum((below * N_BUCKETS).astype(int), N_BUCKETS - 1)
    chosen = BestPerGroup(FEATURES_TOGETHER * (N_BUCKETS + 1), N_PER_BUCKET)
    sampled["group"] = (sampled["feature"] - first) * (N_BUCKETS + 1) + sampled["bucket"]
    chosen.add(sampled)
    return chosen.best()
