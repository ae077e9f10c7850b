"""The store: all activations of a folder, with their tokens, documents and subsets."""

import functools
import io
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.activations.coding import as_floats
from utils.activations.manifest import Manifest
from utils.activations.places import DocumentPlaces
from utils.activations.rolling import STATISTICS_FILE, Rolling
from utils.activations.shards import Shard, damaged_shard, shard_path
from utils.artifacts import (
    SETTINGS_FILE,
    append_record,
    fingerprint,
    missing_stage,
    read_json,
    read_log,
    write_json,
)
from utils.settings import Json, require

CHECKED = ".checked.jsonl"  # in a stage's folder: the shards that it has checked
CHECK_THREADS = 4  # one thread reads slower than a disk
SHARE_BYTES = 2**23  # about what a thread reads before it takes the next: much for a disk
MEDIAN_SAMPLE = 2**24  # norms, evenly spaced, that the median is taken of
ADDED_TOGETHER = 2**13  # tokens

Contexts = Sequence[int] | np.ndarray  # numbers of contexts of a store


class Split(NamedTuple):
    """Contexts of a store for training and held out of it, and the rule: a constant below."""

    training: np.ndarray
    held_out: np.ndarray
    rule: str


class Run(NamedTuple):
    """Rows that are neighbours on the disk: in which shard, from which row on, and where to."""

    shard: int  # its place among the store's
    row: int
    to: int  # the first one's place in all that is read
    n_rows: int


DOCUMENT_HASH, LAST_CONTEXTS = "document hash", "last contexts"
KEPT_SHARDS = "document hash in kept shards"


def spread(contexts: Contexts, n: int) -> Contexts:
    """``n`` evenly spaced contexts, so that all parts of the corpus are among them; at most all."""
    n = min(n, len(contexts))
    return np.asarray(contexts)[np.arange(n) * len(contexts) // max(1, n)]


def hash_numbers(numbers: np.ndarray) -> np.ndarray:
    """A hash of each number, uint64: the mixing of SplitMix64."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def in_hashed_documents(document: np.ndarray, n: int) -> np.ndarray:
    """Which contexts belong to the first documents by hash that hold at most ``n``, bool.

    Args:
        document: The number of each context's document; none is taken of a negative one.
    """
    numbers, index, counts = np.unique(document, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(numbers), bool)
    for i in np.argsort(hash_numbers(numbers), kind="stable"):
        if counts[i] <= n and numbers[i] >= 0:
            chosen[i] = True
            n -= counts[i]
        if n == 0:
            break
    return chosen[index]


def is_finite(values: np.ndarray) -> bool:
    """Whether no float is NaN or infinite, told by bits: `numpy.isfinite` of float16 is slow.

    These have the largest exponent. So, read as integers, they are above all other numbers of
    their sign; signed integers show the positive ones, unsigned integers the negative ones.
    """
    infinities = np.array([np.inf, -np.inf], values.dtype)
    return all(
        values.view(integer).max(initial=0) < infinities.view(integer)[sign]
        for sign, integer in enumerate((f"i{values.itemsize}", f"u{values.itemsize}"))
    )


class ContextBatch:
    """A batch of contexts of a store.

    Attributes:
        contexts: Their numbers.
        tokens, documents: int32, shape (contexts, context_length).
        kept: Whether a position is neither BOS nor a norm outlier; bool, of that shape.
        subsets: Index into the store's ``subset_names``, of that shape.
    """

    def __init__(self, store: "ActivationStore", contexts: Contexts):
        self.store, self.contexts = store, contexts
        self.tokens, self.kept, self.documents, self.subsets = (
            store.read(array, contexts) for array in ("tokens", "kept", "documents", "subsets")
        )

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Raw activations of the kept positions, float32, shape (rows, d_model)."""
        return self.store.kept_rows(self.contexts).astype(np.float32)

    def places(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The context of rows, as an index into this batch, and their position in it."""
        return np.divmod(np.flatnonzero(self.kept)[row], self.kept.shape[1])


class ActivationStore:
    """All finished shards of a folder, but for those that were freed.

    Args:
        among: Only those of these numbers; the folder may be unfinished then.

    Attributes:
        rolling: How the shards are freed, where the folder is of bounded size.
        storage_dtype, row_bytes: Of the activations as they are read; the size of one.
        scale: The factor that gives activations E‖x‖² = d_model over kept positions ("Scaling
            Monosemanticity", Training).
        mean: Raw mean over kept positions, shape (d_model,).
        outlier_norm: Positions of a larger raw norm are excluded.
        excluded: Number of positions that are not kept, by reason.
        n_tokens: Number of kept positions.
        skipped: Number of records of the corpus that could not be used, by reason.
        subset_names: Names of the corpus subsets, sorted.
    """

    def __init__(self, folder: str | Path, among: Container[int] | None = None):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("manifest*.json"))
        if not paths:
            layers = sorted({path.parent for path in self.folder.glob("layer-*/manifest*.json")})
            require(
                not layers,
                f"{self.folder} holds several layers. Name one of them with ACTIVATIONS_DIR: "
                f"{', '.join(map(str, layers))}.",
            )
            raise missing_stage(self.folder, "activations", "save_activations.py")
        manifests = [Manifest.read(path) for path in paths]
        first = max(manifests, key=lambda one: (one.finished, sum(one.skipped.values())))
        self.rolling = Rolling(*first.rolling) if first.rolling else None
        if among is None:
            self._require_finished(manifests)
        # The manifests of a rolling folder change while it is used.
        self.fingerprint = fingerprint(*([self.folder / SETTINGS_FILE] if self.rolling else paths))
        self.model_name, self.revision = first.model_name, first.revision
        self.layer, self.block, self.dtype = first.layer, first.block, first.dtype
        self._outlier_factor = first.outlier_factor
        self.d_model, self.context_length = first.d_model, first.context_length
        self.dataset, self.skipped = first.dataset, first.skipped
        self.excluded = {
            reason: sum(manifest.excluded[reason] for manifest in manifests)
            for reason in first.excluded
        }
        self._open_shards(manifests, among)
        if self.rolling:
            self._take_statistics()
        else:
            self._add_up(manifests)

    def _add_up(self, manifests: list[Manifest]) -> None:
        """Set the outlier norm and the statistics that follow from the manifests' sums."""
        self._set_outlier_norm(manifests)
        n_outliers, outlier_sum, outlier_squares = self._sum_outliers()
        self.excluded["outlier_norm"] += n_outliers
        n_summed = sum(entry.kept for manifest in manifests for entry in manifest.shards)
        self.n_tokens = n_summed - n_outliers
        squares = sum(manifest.sum_squared_norm for manifest in manifests) - outlier_squares
        self.scale = float(np.sqrt(self.d_model * self.n_tokens / squares))
        total = sum((np.asarray(manifest.sum) for manifest in manifests), -outlier_sum)
        self.mean = (total / self.n_tokens).astype(np.float32)

    def _take_statistics(self) -> None:
        """Set the statistics of a folder of bounded size: those of its first window."""
        recorded = self.folder / STATISTICS_FILE
        if recorded.exists():
            self._set(**read_json(recorded))
        else:
            self._set(**self._of_first_window())
        self.n_tokens = sum(int(shard.kept().sum()) for shard in self.shards)
        self.excluded["outlier_norm"] += sum(int(shard.outliers().sum()) for shard in self.shards)

    def _set(self, outlier_norm: float, scale: float, mean: list[float]) -> None:
        self.outlier_norm, self.scale, self.mean = outlier_norm, scale, np.array(mean, np.float32)
        for shard in self.shards:
            shard.outlier_norm = outlier_norm

    def _of_first_window(self) -> dict[str, Json]:
        """Outlier norm, scale and mean of the first window, all of which must be there."""
        shards = [s for s in self.shards if s.number in self.rolling.shards(0)]
        outlier_norm = self._outlier_factor * _median_norm(shards)
        for shard in shards:
            shard.outlier_norm = outlier_norm
        n, squares, total = 0, 0.0, np.zeros(self.d_model)
        contexts = range(sum(shard.contexts for shard in shards))
        for batch in self.batches(contexts, ADDED_TOGETHER, "adding up the first window"):
            rows = batch.rows.astype(np.float64)
            n += len(rows)
            squares += np.vdot(rows, rows)
            total += rows.sum(axis=0)
        scale = float(np.sqrt(self.d_model * n / squares))
        return {"outlier_norm": outlier_norm, "scale": scale, "mean": (total / n).tolist()}

    def keep_statistics(self) -> None:
        """Record the statistics of the first window, before any shard of it is freed."""
        path = self.folder / STATISTICS_FILE
        if not path.exists():
            values = {"outlier_norm": self.outlier_norm, "scale": self.scale}
            write_json(path, {**values, "mean": self.mean.tolist()})

    def _require_finished(self, manifests: list[Manifest]) -> None:
        world_size = manifests[0].world_size
        finished = sum(manifest.finished for manifest in manifests)
        require(
            finished >= world_size,  # 1 but where ranks had shares of the documents
            f"The activations in {self.folder} are unfinished ({finished} of {world_size} "
            "processes are done). Run save_activations.py again with the same settings: it goes "
            "on where it stopped.",
        )

    def _open_shards(self, manifests: list[Manifest], among: Container[int] | None) -> None:
        """Open every array, which finds damaged headers; number subsets across manifests."""
        freed = self.rolling.freed(self.folder) if self.rolling else ()
        self._a_shard = max(entry.contexts for m in manifests for entry in m.shards)
        # Early versions wrote numbers and lists where records held such.
        names = [list(map(str, manifest.subsets)) for manifest in manifests]
        self.subset_names = sorted(set(itertools.chain(*names)))
        number_of = {name: number for number, name in enumerate(self.subset_names)}
        shards = []
        for manifest, subsets in zip(manifests, names, strict=True):
            numbers = np.array([number_of[name] for name in subsets], np.int16)
            shards += [
                (Shard(self.folder, entry, manifest.bos), numbers)
                for entry in manifest.shards
                if entry.shard not in freed and (among is None or entry.shard in among)
            ]
        shards.sort(key=lambda pair: pair[0].number)
        self.shards = [shard for shard, _ in shards]
        n_twice = len(self.shards) - len({shard.number for shard in self.shards})
        require(
            not n_twice,
            f"{self.folder} must have each shard in one manifest; {n_twice} are in two. Delete one "
            "of them, and run save_activations.py again with the same settings.",
        )
        self._subset_numbers = {shard.number: numbers for shard, numbers in shards}
        self._ends = np.cumsum([shard.contexts for shard in self.shards])
        for shard in self.shards:
            for array in shard.crc32:
                shard[array]
        self._offsets = [shard["activations"].offset for shard in self.shards]
        # One row, for its dtype and width; a copy, for a view would keep the file open.
        self._stored = np.array(self.shards[0]["activations"][:1, 0])
        self.storage_dtype = as_floats(self._stored).dtype
        self.row_bytes = self.d_model * self.storage_dtype.itemsize

    def _set_outlier_norm(self, manifests: list[Manifest]) -> None:
        """Set one threshold for all shards with norms, a multiple of the median over all of them.

        It depends on the shards alone, so that every stage and process has the same.
        """
        earlier = [m.outlier_norm for m in manifests if m.outlier_norm is not None]
        self.outlier_norm = max(earlier, default=0.0)
        shards = [shard for shard in self.shards if shard.has_norms]
        if shards:
            (factor,) = {m.outlier_factor for m in manifests if m.outlier_norm is None}
            self.outlier_norm = factor * _median_norm(shards)
        for shard in shards:
            shard.outlier_norm = self.outlier_norm

    def _sum_outliers(self) -> tuple[int, np.ndarray, float]:
        """Number of outliers in shards with norms, and their sums of activations and of ‖x‖²."""
        n, total, squares = 0, np.zeros(self.d_model), 0.0
        for shard in self.shards:
            outliers = shard.outliers() if shard.has_norms else np.zeros((0, 0), bool)
            for row in np.flatnonzero(outliers.any(axis=1)):
                values = shard.activations(row)[outliers[row]].astype(np.float64)
                total += values.sum(axis=0)
                squares += float(np.square(values).sum())
            n += int(outliers.sum())
            shard.release()
        return n, total, squares

    @property
    def n_contexts(self) -> int:
        return int(self._ends[-1])

    # ---- choosing contexts

    def sample(self, n_tokens: int | None) -> Contexts:
        """Evenly spaced contexts that hold ``n_tokens``; all contexts for None."""
        every = range(self.n_contexts)
        return every if n_tokens is None else spread(every, -(-n_tokens // self.context_length))

    def split(self, held_out: float, n_tokens: int | None) -> Split:
        """Hold out a share ``held_out`` of the contexts, of at most ``n_tokens``, in their order.

        A context belongs to the document of its first token after BOS. Documents are held out in
        the order of a hash of their numbers, as far as they fit. If none does, or ``n_tokens`` is
        None, as in earlier versions, the last contexts are held out.

        Raises:
            InputError: There are too few contexts to train on others.
        """
        if self.rolling:
            return self._split_kept(held_out, n_tokens)
        most = self.n_contexts if n_tokens is None else n_tokens // self.context_length
        wanted = max(1, min(round(held_out * self.n_contexts), most))
        require(
            wanted < self.n_contexts,
            f"{self.folder} has {self.n_contexts} contexts: too few to hold any out.",
        )
        is_held_out, rule = np.zeros(self.n_contexts, bool), DOCUMENT_HASH
        if n_tokens is not None:
            document = np.concatenate([shard["documents"][:, 1] for shard in self.shards])
            is_held_out = in_hashed_documents(document, wanted)
        if not is_held_out.any():
            is_held_out[-wanted:], rule = True, LAST_CONTEXTS
        return Split(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), rule)

    def _split_kept(self, held_out: float, n_tokens: int | None) -> Split:
        """Hold out contexts of each shard that is kept, as many of each, the same at any time.

        Documents that reach beyond a shard are trained on, for the rest of them may have been.
        """
        total = self.rolling.n_shards * self._a_shard
        most = total if n_tokens is None else n_tokens // self.context_length
        wanted = max(1, min(round(held_out * total), most) // self.rolling.n_kept)
        is_held_out, kept = np.zeros(self.n_contexts, bool), self.rolling.kept
        for shard, end in zip(self.shards, self._ends, strict=True):
            if shard.number in kept:
                document = np.array(shard["documents"][:, 1])
                inside = (document != document[0]) & (document != shard["documents"][-1, -1])
                chosen = in_hashed_documents(np.where(inside, document, -1), wanted)
                is_held_out[end - shard.contexts : end] = chosen
        require(
            bool(is_held_out.any()) or not kept & {shard.number for shard in self.shards},
            "KEEP_GB must leave shards with whole documents to hold out; no document lies within "
            "one of them. Save anew with a larger TOKENS_PER_SHARD.",
        )
        return Split(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), KEPT_SHARDS)

    # ---- reading

    def batches(self, contexts: Contexts, n_tokens: int, title: str = "") -> Iterator[ContextBatch]:
        """Batches of about ``n_tokens`` positions, with a progress bar if there is a title."""
        size = max(1, n_tokens // self.context_length)
        total = len(contexts) * self.context_length
        with tqdm(None, title, total, unit="tok", unit_scale=True, disable=not title) as progress:
            for start in range(0, len(contexts), size):
                batch = ContextBatch(self, contexts[start : start + size])
                yield batch
                progress.update(batch.tokens.size)

    def read(self, array: str, contexts: Iterable[int]) -> np.ndarray:
        """An array of the given contexts, or ``"kept"``, (contexts, context_length, ...)."""
        return np.stack([self._row(array, context) for context in contexts])

    def windows(
        self, array: str, contexts: np.ndarray, starts: np.ndarray, width: int
    ) -> np.ndarray:
        """A window of each context from its start on, int32, shape (len(contexts), width).

        Positions beyond the end of a context are −1.
        """
        values = np.full((len(contexts), width), -1, np.int32)
        index = np.searchsorted(self._ends, contexts, side="right")
        for number in np.unique(index):
            chosen, shard = np.flatnonzero(index == number), self.shards[number]
            row = np.asarray(contexts)[chosen] - (self._ends[number] - shard.contexts)
            position = starts[chosen, None] + np.arange(width)
            inside = position < self.context_length
            window = shard[array][row[:, None], np.where(inside, position, 0)]
            if array == "subsets":
                window = self._subset_numbers[shard.number][window]
            values[chosen] = np.where(inside, window, -1)
        return values

    def kept_bits(self, contexts: Contexts, size: int) -> np.ndarray:
        """Which positions are kept, a bit each, by pieces of ``size``, a multiple of 8.

        Returns:
            uint8, shape (contexts, pieces, size / 8); beyond a context's end nothing is kept.
        """
        n_pieces = -(-self.context_length // size)
        beyond = ((0, 0), (0, n_pieces * size - self.context_length))
        bits = []
        for shard in self.shards:
            bits.append(np.packbits(np.pad(shard.kept(), beyond), axis=1))
            shard.release()
        chosen = np.concatenate(bits)[np.asarray(contexts)]
        return chosen.reshape(len(chosen), n_pieces, size // 8)

    def kept_rows(self, contexts: Iterable[int]) -> np.ndarray:
        """The kept activations of contexts, shape (rows, d_model), in the storage dtype.

        Raises:
            InputError: One is NaN or infinite; names the shard and the position.
        """
        contexts = np.fromiter(contexts, np.int64)
        shape = (len(contexts), self.context_length)
        kept, rows = np.empty(shape, bool), np.empty((*shape, self.d_model), self.storage_dtype)
        for share in self.shares(contexts, np.zeros_like(contexts), self.context_length):
            first, n_rows = share[0].to, share[-1].to + share[-1].n_rows - share[0].to
            self.read_share(share, rows.reshape(-1, self.d_model)[first : first + n_rows])
        for i, context in enumerate(contexts):
            kept[i] = self._row("kept", context)
        return rows[kept]

    def shares(self, contexts: np.ndarray, starts: np.ndarray, length: int) -> list[list[Run]]:
        """Cut the reading of spans into shares of about `SHARE_BYTES`, each for `read_share`.

        A span is the ``length`` positions of a context from its start on, or those to its end.
        Spans that lie one after another on the disk are one run.
        """
        if not len(contexts):
            return []
        lengths = np.minimum(length, self.context_length - starts)
        shards = np.searchsorted(self._ends, contexts, side="right")
        firsts = self._ends - [shard.contexts for shard in self.shards]
        rows = (contexts - firsts[shards]) * self.context_length + starts
        to = np.cumsum(lengths) - lengths
        number = to * self.row_bytes // SHARE_BYTES
        joined = (np.diff(shards) == 0) & (np.diff(number) == 0) & (np.diff(rows) == lengths[:-1])
        begins = np.flatnonzero(np.append(True, ~joined))
        columns = shards[begins], rows[begins], to[begins], np.add.reduceat(lengths, begins)
        runs = map(Run._make, zip(*(column.tolist() for column in columns), strict=True))
        of_share = zip(number[begins].tolist(), runs, strict=True)
        grouped = itertools.groupby(of_share, key=lambda pair: pair[0])
        return [[run for _, run in pairs] for _, pairs in grouped]

    def read_share(self, share: list[Run], rows: np.ndarray) -> None:
        """Read all rows of a share into an array (rows, d_model), kept or not.

        A plain read, for a memory map stops at each page, and counts as this process's memory.

        Raises:
            InputError: One that is kept is NaN or infinite, or a file cannot be read.
        """
        stored, is_coded = rows, self._stored.dtype != self.storage_dtype
        if is_coded:
            stored = np.empty((len(rows), self._stored.shape[1]), self._stored.dtype)
        raw, row_bytes = memoryview(stored.reshape(-1).view(np.uint8)), stored[:1].nbytes
        for index, runs in itertools.groupby(share, key=lambda run: run.shard):
            path = shard_path(self.folder, "activations", self.shards[index].number)
            try:
                with open(path, "rb", buffering=0) as file:
                    for run in runs:
                        file.seek(self._offsets[index] + run.row * row_bytes)
                        begin = (run.to - share[0].to) * row_bytes
                        _read_all(file, raw[begin : begin + run.n_rows * row_bytes])
            except OSError as error:
                raise damaged_shard(path, f"cannot be read: {error}") from error
        if is_coded:
            rows[:] = as_floats(stored)
        if not is_finite(rows):
            self._refuse_not_finite(share, rows)

    def _locate(self, context: int) -> tuple[Shard, int]:
        """The shard of a context, and the context's row in it."""
        index = int(np.searchsorted(self._ends, context, side="right"))
        shard = self.shards[index]
        return shard, int(context - (self._ends[index] - shard.contexts))

    def _row(self, array: str, context: int) -> np.ndarray:
        shard, row = self._locate(context)
        if array in ("kept", "activations"):
            return getattr(shard, array)(row)
        values = shard[array][row]
        return self._subset_numbers[shard.number][values] if array == "subsets" else values

    def _refuse_not_finite(self, share: list[Run], rows: np.ndarray) -> None:
        """Raise an error if a kept row of a share is not finite; others are not used."""
        for run in share:
            begin = run.to - share[0].to
            finite = np.isfinite(rows[begin : begin + run.n_rows]).all(axis=1)
            places = np.divmod(run.row + np.flatnonzero(~finite), self.context_length)
            shard = self.shards[run.shard]
            kept = shard.kept(places)
            if kept.any():
                context, position = (int(place[kept][0]) for place in places)
                path = shard_path(self.folder, "activations", shard.number)
                place = f"context {context}, position {position}"
                raise damaged_shard(path, f"holds NaN or infinity at {place}")

    @functools.cached_property
    def places(self) -> DocumentPlaces:
        """Where in its document each token is."""
        return DocumentPlaces(self.shards, self.context_length)

    # ---- checking

    def verify(self, folder: Path, contexts: Iterable[int] | None = None) -> None:
        """Check the shards of ``contexts``, or all, against their checksums, with a progress bar.

        A log in ``folder``, the stage's, spares checking a shard again while it is unchanged.

        Raises:
            InputError: A shard is damaged; names the file.
        """
        log = folder / CHECKED
        log.touch()
        whole = {record["whole"] for record in read_log(log, ["whole"])}
        contexts = range(self.n_contexts) if contexts is None else contexts
        numbers = np.searchsorted(self._ends, np.fromiter(contexts, np.int64), side="right")
        shards = [self.shards[number] for number in np.unique(numbers)]
        shards = [shard for shard in shards if shard.state() not in whole]
        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            checks = zip(shards, pool.map(Shard.verify, shards), strict=True)
            bar = {"total": len(shards), "unit": "shard", "leave": False}
            for shard, _ in tqdm(checks, "checking shards", **bar):
                append_record(log, {"whole": shard.state()})


def _median_norm(shards: list[Shard]) -> float:
    """The median of the norms in shards, of an even sample where there are very many.

    In two passes, so that not all are held: positive floats are in the order of their bits, whose
    upper half tells which of them can be in the middle.
    """
    step = -(-sum(shard["norms"].size for shard in shards) // MEDIAN_SAMPLE)

    def norms() -> Iterator[np.ndarray]:
        for shard in shards:
            yield shard["norms"][shard["tokens"] != shard.bos][::step]
            shard.release()

    counts = np.zeros(2**16, np.int64)
    for values in norms():
        counts += np.bincount(values.view(np.uint32) >> 16, minlength=len(counts))
    ends = np.cumsum(counts)
    middle = np.array([(ends[-1] - 1) // 2, ends[-1] // 2])  # places of the two in the middle
    first, last = np.searchsorted(ends, middle, side="right")
    inside = []
    for values in norms():
        half = values.view(np.uint32) >> 16
        inside.append(values[(half >= first) & (half <= last)])
    below = ends[first] - counts[first]
    return float(np.mean(np.sort(np.concatenate(inside))[middle - below]))


def _read_all(file: io.RawIOBase, to: memoryview) -> None:
    """Fill ``to``; a single read may end early."""
    while len(to):
        n = file.readinto(to)
        if not n:
            raise OSError("it ends too early")
        to = to[n:]
