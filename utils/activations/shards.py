"""Shards: activations on disk, written atomically, with checksums, read as memory-mapped arrays.

A folder holds, for each shard n, arrays whose first axis is the context:

    activations-n.npy  float16 (contexts, context_length, d_model)   the residual stream, raw
    tokens-n.npy       int32   (contexts, context_length)
    norms-n.npy        float32 (contexts, context_length)   of the activations as stored
    documents-n.npy    int32   (contexts, context_length)   number of the usable document
    subsets-n.npy      int16   (contexts, context_length)   index into the manifest's subset names

and a manifest, written after a shard's files: only shards that are listed there are whole. Earlier
versions wrote no norms but ``kept-n.npy``, bool, False at BOS and at norm outliers. Activations are
in float32, or in int8 (see `coding`), if STORAGE_DTYPE says so.
"""

import collections
import contextlib
import errno
import functools
import io
import mmap
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.activations.coding import as_floats, stored_width
from utils.activations.manifest import ShardEntry
from utils.artifacts import checksum
from utils.settings import InputError, require

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
OUTPUTS = (
    "manifest*.json", "cursor*.json", "freed.jsonl", "first_window.json",
    *(f"{array}-*.npy" for array in DTYPES),
)  # fmt: skip


def shard_path(folder: Path, array: str, shard: int) -> Path:
    return folder / f"{array}-{shard:05d}.npy"


def bytes_per_token(d_model: int, storage_dtype: str) -> int:
    """Size of a token on disk: its activation, and 14 bytes in the other arrays."""
    return stored_width(d_model, storage_dtype) * np.dtype(storage_dtype).itemsize + 14


# ---------------------------------------------------------------------------------------- writing


class ArrayFile:
    """A ``.npy`` file that is written piece by piece, and its checksum on the way.

    Args:
        shape: Of the whole array; fewer rows may follow.
        checking: A thread that computes checksums while this one writes.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], checking: Executor):
        self.path, self._dtype, self._shape, self._checking = path, dtype, shape, checking
        self.n_rows = self.crc32 = 0
        self._file = path.open("wb")
        self._put(self._header(shape[0]))

    def append(self, rows: np.ndarray) -> None:
        self._put(np.ascontiguousarray(rows, self._dtype))
        self.n_rows += len(rows)

    def finish(self) -> None:
        """Close the file when all of it is on the disk."""
        if self.n_rows < self._shape[0]:  # the corpus ended within the shard
            self._file.seek(0)
            self._file.write(self._header(self.n_rows))  # as long as the one it replaces
            self._file.flush()
            self.crc32 = checksum(self.path)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):  # what was not written yet may not find room
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _put(self, content: bytes | np.ndarray) -> None:
        crc32 = self._checking.submit(zlib.crc32, content, self.crc32)
        self._file.write(content)
        self.crc32 = crc32.result()

    def _header(self, n_rows: int) -> bytes:
        header = io.BytesIO()
        shape = (n_rows, *self._shape[1:])
        description = np.lib.format.dtype_to_descr(self._dtype)
        facts = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)
        return header.getvalue()


class ShardWriter:
    """Writes one shard, batch by batch under temporary names; renames its files when finished.

    If anything fails, its files are deleted; a full disk is an `InputError`.

    Args:
        shape: Contexts, context_length and d_model; fewer contexts may follow.
        arrays: `ARRAYS`, or `EARLIER_ARRAYS` to go on with a folder of an earlier version.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        shape: tuple[int, int, int],
        storage_dtype: str,
        arrays: tuple[str, ...] = ARRAYS,
    ):
        self.folder, self.shard, self._dtype = folder, shard, np.dtype(storage_dtype)
        self._checking = ThreadPoolExecutor(1, "checksums")
        self._files: dict[str, ArrayFile] = {}
        width = stored_width(shape[2], storage_dtype)
        self._n_summed = 0
        self.sum = np.zeros(shape[2])
        self.sum_squared_norm = 0.0
        self.excluded = collections.Counter()
        with self._discarding():
            for array in arrays:
                self._files[array] = ArrayFile(
                    self._partial(array),
                    np.dtype(DTYPES[array] or storage_dtype),
                    (*shape[:2], width) if array == "activations" else shape[:2],
                    self._checking,
                )

    def _partial(self, array: str) -> Path:
        path = shard_path(self.folder, array, self.shard)
        return path.with_name(f".partial-{path.name}")

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"The disk of {self.folder} is full. Make room, and run the same command again."
                ) from error
            if isinstance(error, OSError) and error.errno == errno.EFBIG:  # which names no file
                path = shard_path(self.folder, "activations", self.shard)
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise

    def discard(self) -> None:
        """Delete the unfinished files."""
        self._checking.shutdown()
        for file in self._files.values():
            file.discard()
        self._files.clear()

    def append(self, sums: np.ndarray, **batch: np.ndarray) -> None:
        """Add contexts: each of the shard's arrays, of shape (batch, context_length, ...).

        Args:
            sums: Of these contexts, as of `capture.sums_of`.

        Raises:
            InputError: An activation is not finite in the storage dtype, or they are too small
                for it; or the disk is full.
        """
        with self._discarding():
            self._add_sums(batch["tokens"].size, sums)
            for array, values in batch.items():
                self._files[array].append(values)

    def _add_sums(self, n_positions: int, sums: np.ndarray) -> None:
        (n_bos, n_summed), squares, total = sums[:2].astype(int), sums[2], sums[3:]
        require(
            np.isfinite(sums).all(),
            f"Activations must be finite; some are not in {self._dtype} (shard {self.shard}). "
            "If they overflow, use --storage-dtype float32, with --overwrite if there are "
            "shards already; else the model computes NaN.",
        )
        typical = np.sqrt(squares / max(1, n_summed * len(total)))
        require(
            n_summed == 0 or self._dtype == np.float32 or typical >= SMALLEST,
            f"Activations are of {typical:.1g} (root mean square; shard {self.shard}), too "
            f"small for {self._dtype}, which needs {SMALLEST:.0e}. Use --storage-dtype float32, "
            "with --overwrite if there are shards already.",
        )
        self.sum += total
        self.sum_squared_norm += float(squares)
        self._n_summed += int(n_summed)
        self.excluded.update(bos=int(n_bos), outlier_norm=int(n_positions - n_bos - n_summed))

    def finish(self, crc32: dict[str, int] | None = None) -> ShardEntry:
        """Rename the shard's files to their final names; returns its entry for the manifest.

        Args:
            crc32: The checksums that arrays must have, by their names.

        Raises:
            InputError: One differs; the earlier files are kept.
        """
        with self._discarding():
            for file in self._files.values():
                file.finish()
            found = {array: file.crc32 for array, file in self._files.items()}
            require(
                found | (crc32 or {}) == found,
                f"Shard {self.shard} made anew differs from the one recorded: the model, the "
                "corpus or the machine computes otherwise than before. Delete "
                f"{self.folder} to start anew.",
            )
        contexts = self._files["tokens"].n_rows
        for array, file in self._files.items():
            file.path.replace(shard_path(self.folder, array, self.shard))
        self._checking.shutdown()
        self._files.clear()
        return ShardEntry(self.shard, contexts, self._n_summed, found)


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

    def activations(self, places: Places = ()) -> np.ndarray:
        """The activations at an index of the arrays, as floats, (..., d_model)."""
        return as_floats(self["activations"][places])

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
        """Unmap the pages of arrays that were read; the system's cache may keep them."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for array in self.crc32:
                self[array]._mmap.madvise(mmap.MADV_DONTNEED)

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


def close_arrays() -> None:
    """Close the arrays that reading has left open."""
    _open_array.cache_clear()


def damaged_shard(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path} {problem}. To repair it, run save_activations.py again with the settings in "
        f"{path.parent / 'settings.json'}: it makes damaged and missing shards anew."
    )
