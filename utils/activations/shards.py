"""Shards: activations on disk, written atomically, with checksums, read as memory-mapped arrays.

A folder holds, for each shard n, arrays whose first axis is the context:

    activations-n.npy  float16 (contexts, context_length, d_model)   the residual stream, raw
    tokens-n.npy       int32   (contexts, context_length)
    norms-n.npy        float32 (contexts, context_length)   of the activations as stored
    documents-n.npy    int32   (contexts, context_length)   number of the usable document
    subsets-n.npy      int16   (contexts, context_length)   index into the manifest's subset names

and a manifest, written after a shard's files: only shards that are listed there are whole. Earlier
versions wrote no norms but ``kept-n.npy``, bool, False at BOS and at norm outliers.
"""

import collections
import errno
import functools
import mmap
import os
from pathlib import Path

import numpy as np

from utils.activations.manifest import ShardEntry
from utils.artifacts import checksum
from utils.settings import InputError

Places = int | tuple[int | slice, ...]  # an index of an array's contexts and positions

DTYPES = {
    "activations": None,  # the storage dtype
    "tokens": np.int32,
    "norms": np.float32,
    "kept": np.bool_,
    "documents": np.int32,
    "subsets": np.int16,
}
ARRAYS = tuple(name for name in DTYPES if name != "kept")
EARLIER_ARRAYS = tuple(name for name in DTYPES if name != "norms")
SMALLEST = 2**-16  # root mean square that float16 holds to a few thousandths
OUTPUTS = ("manifest*.json", *(f"{array}-*.npy" for array in DTYPES))


def shard_path(folder: Path, array: str, shard: int) -> Path:
    return folder / f"{array}-{shard:05d}.npy"


def bytes_per_token(d_model: int, storage_dtype: str) -> int:
    """Size of a token on disk: its activation, and 14 bytes in the other arrays."""
    return d_model * np.dtype(storage_dtype).itemsize + 14


# ---------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one shard, batch by batch under temporary names; renames its files when finished.

    ``arrays`` are `ARRAYS`, or `EARLIER_ARRAYS` to go on with a folder of an earlier version.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        shape: tuple[int, int, int],
        storage_dtype: str,
        arrays: tuple[str, ...] = ARRAYS,
    ):
        self.folder, self.shard = folder, shard
        self._arrays = {
            array: np.lib.format.open_memmap(
                self._partial(array),
                mode="w+",
                dtype=DTYPES[array] or storage_dtype,
                shape=shape if array == "activations" else shape[:2],
            )
            for array in arrays
        }
        for array in arrays:
            self._reserve(self._partial(array))
        self._filled = self._n_summed = 0
        self.sum = np.zeros(shape[2])
        self.sum_squared_norm = 0.0
        self.excluded = collections.Counter()

    def _partial(self, array: str) -> Path:
        path = shard_path(self.folder, array, self.shard)
        return path.with_name(f".partial-{path.name}")

    def _reserve(self, path: Path) -> None:
        """Allocate a file's disk space now, because a memory map without space kills the process.

        Raises:
            InputError: The disk is full.
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
        """Delete the unfinished files."""
        for array in self._arrays:
            self._partial(array).unlink(missing_ok=True)
        self._arrays.clear()

    def append(self, excluded: dict[str, int], summed: np.ndarray, **batch: np.ndarray) -> None:
        """Add contexts: each of the shard's arrays, of shape (batch, context_length, ...).

        Args:
            excluded: Number by reason of their positions that are not in the sums.
            summed: Which positions are; bool, shape (batch, context_length).

        Raises:
            InputError: An activation is not finite in the storage dtype.
        """
        stop = self._filled + len(batch["tokens"])
        for array, values in batch.items():
            self._arrays[array][self._filled : stop] = values
        rows = batch["activations"][summed].astype(np.float32)
        stored = self._arrays["activations"]
        if not np.isfinite(stored[self._filled : stop]).all():
            self.discard()
            raise InputError(
                f"Activations must be finite; some are not in {stored.dtype} (shard {self.shard}). "
                "If they overflow, use --storage-dtype float32, with --overwrite if there are "
                "shards already; else the model computes NaN."
            )
        squares = float(np.einsum("rd,rd->", rows, rows, dtype=np.float64))
        typical = np.sqrt(squares / max(1, rows.size))
        if len(rows) and stored.dtype == np.float16 and typical < SMALLEST:
            self.discard()
            raise InputError(
                f"Activations are of {typical:.1g} (root mean square; shard {self.shard}), too "
                f"small for float16, which needs {SMALLEST:.0e}. Use --storage-dtype float32, with "
                "--overwrite if there are shards already."
            )
        self.sum += rows.sum(axis=0, dtype=np.float64)
        self.sum_squared_norm += squares
        self.excluded.update(excluded)
        self._filled, self._n_summed = stop, self._n_summed + len(rows)

    def finish(self, crc32: dict[str, int] | None = None) -> ShardEntry:
        """Rename the shard's files to their final names; returns its entry for the manifest.

        Raises:
            InputError: The checksums differ from ``crc32``; the earlier files are kept.
        """
        entry = ShardEntry(self.shard, self._filled, self._n_summed, crc32={})
        for array, values in self._arrays.items():
            values.flush()
            if self._filled < len(values):  # the corpus ended within the shard
                values = np.array(values[: self._filled])
                with open(self._partial(array), "wb") as file:
                    np.save(file, values)
            entry.crc32[array] = checksum(self._partial(array))
        if crc32 is not None and entry.crc32 != crc32:
            self.discard()
            raise InputError(
                f"Shard {self.shard} made anew differs from the one recorded: the model, the "
                "corpus or the machine computes otherwise than before. Delete "
                f"{self.folder} to start anew."
            )
        self._arrays.clear()
        for array in entry.crc32:
            self._partial(array).replace(shard_path(self.folder, array, self.shard))
        return entry


# ---------------------------------------------------------------------------------------- reading


class Shard:
    """The finished shard of a manifest's entry; ``shard["tokens"]`` is a memory-mapped array.

    Attributes:
        bos: The token that is never kept.
        outlier_norm: Positions of a larger norm are not kept. Set by the store.
    """

    outlier_norm = np.inf

    def __init__(self, folder: Path, entry: ShardEntry, bos: int | None = None):
        self.folder, self.number, self.bos = folder, entry.shard, bos
        self.contexts, self.crc32 = entry.contexts, entry.crc32

    def __getitem__(self, array: str) -> np.ndarray:
        return _open_array(shard_path(self.folder, array, self.number), self.contexts)

    @property
    def has_norms(self) -> bool:
        """Whether outliers are chosen on reading; earlier versions chose them while writing."""
        return "norms" in self.crc32

    def kept(self, places: Places = ()) -> np.ndarray:
        """Whether positions are neither BOS nor norm outliers; bool, at an index of the arrays."""
        if not self.has_norms:
            return self["kept"][places]
        return (self["tokens"][places] != self.bos) & (self["norms"][places] <= self.outlier_norm)

    def outliers(self) -> np.ndarray:
        """Which positions are norm outliers; bool, shape (contexts, context_length)."""
        return (self["tokens"][()] != self.bos) & (self["norms"][()] > self.outlier_norm)

    def verify(self) -> None:
        """Compare every array with its checksum; raises `InputError` naming a damaged file."""
        for array in self.crc32:
            self[array]
            path = shard_path(self.folder, array, self.number)
            if checksum(path) != self.crc32[array]:
                raise damaged_shard(path, "does not match its checksum")

    def release(self) -> None:
        """Unmap the pages of activations that were read; the system's cache may keep them."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self["activations"]._mmap.madvise(mmap.MADV_DONTNEED)

    def state(self) -> str:
        """Path, size and modification time of every file, to recognise a checked shard."""
        paths = [shard_path(self.folder, array, self.number).resolve() for array in self.crc32]
        return " ".join(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths)


@functools.lru_cache(maxsize=64)  # each map holds a file descriptor, whose number is limited
def _open_array(path: Path, contexts: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can raise any error
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise
        raise damaged_shard(path, f"cannot be read: {error}") from error
    if len(values) != contexts:
        raise damaged_shard(path, f"holds {len(values)} contexts instead of {contexts}")
    return values


def damaged_shard(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path} {problem}. To repair it, run save_activations.py again with the settings in "
        f"{path.parent / 'settings.json'}: it makes damaged and missing shards anew."
    )
