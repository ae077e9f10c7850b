"""Activations on disk: the format, its writer, its memory-mapped reader.

A folder holds, for each shard n, arrays whose first axis is the context:

    activations-n.npy  float16 (contexts, context_length, d_model)   the residual stream, raw
    tokens-n.npy       int32   (contexts, context_length)
    kept-n.npy         bool    (contexts, context_length)   False at BOS and at norm outliers
    documents-n.npy    int32   (contexts, context_length)   number of the usable document
    subsets-n.npy      int16   (contexts, context_length)   index into the manifest's subset names

and a manifest, which alone says that a shard is whole: it is written after the shard's files.
"""

import collections
import dataclasses
import errno
import functools
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.artifacts import append_record, fingerprint, missing_stage, read_json, records_of
from utils.settings import InputError, require

ARRAYS = ("activations", "tokens", "kept", "documents", "subsets")
CHECKED = ".checked.jsonl"  # in a stage's folder: the shards that it found whole
CHECKED_TOGETHER = 4  # shards: one thread reads slower than a disk
SPANS_MAPPED = 1_024  # spans read before the memory that they are mapped into is given back
OUTPUTS = ("manifest*.json", *(f"{array}-*.npy" for array in ARRAYS))


def shard_path(folder: Path, array: str, shard: int) -> Path:
    return folder / f"{array}-{shard:05d}.npy"


def checksum(path: Path) -> int:
    """CRC-32 of a file, its header included."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            found = zlib.crc32(block, found)
    return found


def bytes_per_token(d_model: int, storage_dtype: str) -> int:
    """What a token takes on disk: its activation, and 11 bytes of token, kept and source."""
    return d_model * np.dtype(storage_dtype).itemsize + 11


# ---------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one shard: filled batch by batch under names aside, then renamed when it is full."""

    def __init__(self, folder: Path, shard: int, shape: tuple[int, int, int], storage_dtype: str):
        self.folder, self.shard = folder, shard
        dtypes = (np.dtype(storage_dtype), np.int32, np.bool_, np.int32, np.int16)
        self._arrays = {
            array: np.lib.format.open_memmap(
                self._partial(array),
                mode="w+",
                dtype=dtype,
                shape=shape if array == "activations" else shape[:2],
            )
            for array, dtype in zip(ARRAYS, dtypes, strict=True)
        }
        for array in ARRAYS:
            self._reserve(self._partial(array))
        self._filled = 0
        self.sum = np.zeros(shape[2])
        self.sum_squared_norm = 0.0
        self.excluded = collections.Counter()

    def _partial(self, array: str) -> Path:
        path = shard_path(self.folder, array, self.shard)
        return path.with_name(f".partial-{path.name}")

    def _reserve(self, path: Path) -> None:
        """Take a file's space on the disk now: a write to a map that finds none kills the process.

        Raises:
            InputError: There is too little.
        """
        if not hasattr(os, "posix_fallocate"):  # not on Windows and macOS
            return
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self.discard()
                raise InputError(
                    f"The disk of {self.folder} is full. Make room, and run the same command again."
                ) from error

    def discard(self) -> None:
        """Delete what was written so far."""
        self._arrays.clear()
        for array in ARRAYS:
            self._partial(array).unlink(missing_ok=True)

    def append(self, excluded: dict[str, int], **batch: np.ndarray) -> None:
        """Add contexts: one array a name of `ARRAYS`, each of shape (batch, context_length, ...).

        ``excluded`` counts the positions of these contexts that are not kept, by reason.

        Raises:
            InputError: An activation is not finite in the storage dtype.
        """
        stop = self._filled + len(batch["tokens"])
        for array, values in batch.items():
            self._arrays[array][self._filled : stop] = values
        rows = batch["activations"][batch["kept"]].astype(np.float32)
        stored = self._arrays["activations"]
        if not np.isfinite(stored[self._filled : stop]).all():
            self.discard()
            raise InputError(
                f"Activations must be finite; some are not in {stored.dtype} (shard {self.shard}). "
                "If they overflow, use --storage-dtype float32, with --overwrite if there are "
                "shards already; else the model computes NaN."
            )
        self.sum += rows.sum(axis=0, dtype=np.float64)
        self.sum_squared_norm += float(np.einsum("rd,rd->", rows, rows, dtype=np.float64))
        self.excluded.update(excluded)
        self._filled = stop

    def finish(self, crc32: dict[str, int] | None = None) -> dict[str, Any]:
        """Put the shard's files in place; returns its entry for the manifest.

        Raises:
            InputError: ``crc32`` is given, and theirs is another: what was there is left alone.
        """
        entry = {
            "shard": self.shard,
            "contexts": self._filled,
            "kept": int(self._arrays["kept"][: self._filled].sum()),
            "crc32": {},
        }
        for array, values in self._arrays.items():
            values.flush()
            if self._filled < len(values):  # the corpus ended within the shard
                values = np.array(values[: self._filled])
                with open(self._partial(array), "wb") as file:
                    np.save(file, values)
            entry["crc32"][array] = checksum(self._partial(array))
        if crc32 is not None and entry["crc32"] != crc32:
            self.discard()
            raise InputError(
                f"Shard {self.shard} made anew differs from the one recorded: the model, the "
                "corpus or the machine computes otherwise than before. Delete "
                f"{self.folder} to start anew."
            )
        self._arrays.clear()
        for array in ARRAYS:
            self._partial(array).replace(shard_path(self.folder, array, self.shard))
        return entry


# ---------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished shard; ``shard["tokens"]`` is a memory-mapped array of it."""

    folder: Path
    number: int
    contexts: int
    crc32: dict[str, int]
    subset_names: tuple[str, ...]

    def __getitem__(self, array: str) -> np.ndarray:
        return _open_array(shard_path(self.folder, array, self.number), self.contexts)

    def verify(self) -> None:
        """Compare every array with its checksum; raises `InputError` naming a damaged file."""
        for array in ARRAYS:
            self[array]
            path = shard_path(self.folder, array, self.number)
            if checksum(path) != self.crc32[array]:
                raise damaged_shard(path, "does not match its checksum")

    def release(self) -> None:
        """Give back the memory of what was read: it stays in the system's cache alone."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self["activations"]._mmap.madvise(mmap.MADV_DONTNEED)

    def state(self) -> str:
        """The path, size and time of change of every file: what was checked is known by it."""
        paths = [shard_path(self.folder, array, self.number).resolve() for array in ARRAYS]
        return " ".join(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths)


@functools.lru_cache(maxsize=64)  # a map holds a file descriptor, and those are few
def _open_array(path: Path, contexts: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever its parser runs into
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise
        raise damaged_shard(path, f"cannot be read: {error}") from error
    if len(values) != contexts:
        raise damaged_shard(path, f"holds {len(values)} contexts instead of {contexts}")
    return values


def damaged_shard(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} {what}. To repair it, run save_activations.py again with the settings in "
        f"{path.parent / 'settings.json'}: it makes damaged and missing shards anew."
    )


def spread(contexts: range, n: int) -> range:
    """``n`` contexts evenly over others, for neighbours may be of one document; all of fewer."""
    return contexts[:: max(1, len(contexts) // n)][:n]


class ActivationStore:
    """All finished shards of a folder.

    Attributes:
        folder: Where the shards are.
        model_name, revision, layer, dtype: The model and place they were taken from.
        d_model, context_length: Their widths.
        scale: The scalar by which activations are multiplied so that E‖x‖² = d_model over kept
            positions ("Scaling Monosemanticity", Training).
        mean: Raw mean over kept positions, shape (d_model,).
        outlier_norm: Positions of a larger raw norm are excluded.
        excluded: Number of positions left out, by reason.
        n_tokens: Kept positions.
        skipped: Number of records of the corpus that could not be used, by reason.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("manifest*.json"))
        if not paths:
            raise missing_stage(self.folder, "activations", "save_activations.py")
        manifests = [read_json(path) for path in paths]
        first = manifests[0]
        self._require_finished(manifests)
        self.fingerprint = fingerprint(*paths)
        self.model_name, self.revision = first["model_name"], first["revision"]
        self.layer, self.dtype = first["layer"], first["dtype"]
        self.d_model, self.context_length = first["d_model"], first["context_length"]
        self.dataset = first["dataset"]
        self.outlier_norm = max(manifest["outlier_norm"] for manifest in manifests)
        entries = [entry for manifest in manifests for entry in manifest["shards"]]
        self.n_tokens = sum(entry["kept"] for entry in entries)
        sum_squared_norm = sum(manifest["sum_squared_norm"] for manifest in manifests)
        self.scale = float(np.sqrt(self.d_model * self.n_tokens / sum_squared_norm))
        total = np.sum([manifest["sum"] for manifest in manifests], axis=0)
        self.mean = (total / self.n_tokens).astype(np.float32)
        self.excluded = {
            reason: sum(manifest["excluded"][reason] for manifest in manifests)
            for reason in first["excluded"]
        }
        self.skipped = first["skipped"]
        self.shards = sorted(
            (
                Shard(
                    self.folder,
                    entry["shard"],
                    entry["contexts"],
                    entry["crc32"],
                    tuple(manifest["subsets"]),
                )
                for manifest in manifests
                for entry in manifest["shards"]
            ),
            key=lambda shard: shard.number,
        )
        self._ends = np.cumsum([shard.contexts for shard in self.shards])
        for shard in self.shards:
            for array in ARRAYS:
                shard[array]

    def _require_finished(self, manifests: list[dict]) -> None:
        world_size = manifests[0]["world_size"]
        finished = sum(manifest["finished"] for manifest in manifests)
        require(
            finished == world_size,
            f"The activations in {self.folder} are unfinished ({finished} of {world_size} "
            "processes are done). Run save_activations.py again with the same settings: it goes "
            "on where it stopped.",
        )

    @property
    def n_contexts(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, array: str) -> "ContextArray":
        """One of `ARRAYS` over all shards, indexed by context."""
        return ContextArray(self, array)

    def locate(self, context: int) -> tuple[Shard, int]:
        """The shard of a context, and the context's row in it."""
        at = int(np.searchsorted(self._ends, context, side="right"))
        shard = self.shards[at]
        return shard, int(context - (self._ends[at] - shard.contexts))

    def subset_names(self, context: int) -> list[str]:
        """The name of the corpus subset of each token of a context."""
        shard, row = self.locate(context)
        return [shard.subset_names[i] for i in shard["subsets"][row]]

    def first(self, n_tokens: int | None) -> range:
        """The first contexts that hold ``n_tokens``; all of them for None."""
        if n_tokens is None:
            return range(self.n_contexts)
        return range(min(self.n_contexts, -(-n_tokens // self.context_length)))

    def verify(self, folder: Path, contexts: Iterable[int] | None = None) -> None:
        """Check shards against their checksums, with a progress bar.

        Args:
            folder: Of the stage, which keeps there what it found whole: that is not read again
                while it is as it was.
            contexts: Those whose shards are checked; None for all.

        Raises:
            InputError: One is damaged; names the file.
        """
        log = folder / CHECKED
        log.touch()
        whole = {record["whole"] for record in records_of(log, ["whole"])}
        shards = self.shards
        if contexts is not None:
            of = np.searchsorted(self._ends, np.fromiter(contexts, np.int64), side="right")
            shards = [self.shards[number] for number in np.unique(of)]
        shards = [shard for shard in shards if shard.state() not in whole]
        with ThreadPoolExecutor(CHECKED_TOGETHER) as pool:
            checks = zip(shards, pool.map(Shard.verify, shards), strict=True)
            bar = {"total": len(shards), "unit": "shard", "leave": False}
            for shard, _ in tqdm(checks, "checking shards", **bar):
                append_record(log, {"whole": shard.state()})

    def split(self, held_out: float) -> tuple[range, range]:
        """Contexts for training and, at the end of the corpus, the share held out of it."""
        n_train = self.n_contexts - max(1, round(held_out * self.n_contexts))
        require(
            n_train > 0, f"{self.folder} has {self.n_contexts} contexts: too few to hold any out."
        )
        return range(n_train), range(n_train, self.n_contexts)

    def kept_rows(self, contexts: Iterable[int]) -> np.ndarray:
        """The kept activations of some contexts, shape (rows, d_model), in the storage dtype."""
        return self.kept_spans((context, 0, self.context_length) for context in contexts)

    def kept_spans(self, spans: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """The kept activations of spans (context, start, length), shape (rows, d_model).

        Raises:
            InputError: One is NaN or infinite; names the shard and the place.
        """
        rows, last = [], None
        for number, (context, start, length) in enumerate(spans, 1):
            shard, row = self.locate(context)
            if last is not None and (shard is not last or number % SPANS_MAPPED == 0):
                last.release()
            last = shard
            kept = shard["kept"][row, start : start + length]
            rows.append(shard["activations"][row, start : start + length][kept])
            if not np.isfinite(rows[-1]).all():
                self._raise_not_finite(context)
        if last is not None:
            last.release()
        return np.concatenate(rows) if rows else np.empty((0, self.d_model), np.float16)

    def batches(self, contexts: range, batch_size: int) -> Iterator[np.ndarray]:
        """Kept activations in order, about ``batch_size`` rows at a time, float32."""
        per_batch = max(1, batch_size // self.context_length)
        for start in range(contexts.start, contexts.stop, per_batch):
            chosen = range(start, min(start + per_batch, contexts.stop))
            yield self.kept_rows(chosen).astype(np.float32)

    def _raise_not_finite(self, context: int) -> None:
        shard, row = self.locate(context)
        bad = ~np.isfinite(shard["activations"][row]).all(axis=-1)
        path = shard_path(self.folder, "activations", shard.number)
        at = f"context {row}, position {int(bad.argmax())}"
        raise damaged_shard(path, f"holds NaN or infinity at {at}")


class ContextArray:
    """One array over all shards of a store: ``[context]`` is a row, memory-mapped."""

    def __init__(self, store: ActivationStore, array: str):
        self._store, self._array = store, array

    def __getitem__(self, context: int) -> np.ndarray:
        shard, row = self._store.locate(context)
        return shard[self._array][row]


# --------------------------------------------------------------------------------------- manifest


def new_manifest(**facts: Any) -> dict[str, Any]:
    """A manifest without shards; ``facts`` say what the activations are of."""
    return {
        **facts,
        "finished": False,
        "skipped": {},
        "outlier_norm": None,
        "excluded": {"bos": 0, "outlier_norm": 0},
        "sum": 0.0,
        "sum_squared_norm": 0.0,
        "subsets": [],
        "shards": [],
    }
