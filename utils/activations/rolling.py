"""A folder of bounded size: its shards are written, trained on and freed, a window at a time.

The shards of the whole run are cut into windows. save_activations.py begins a shard when the window
two before its own was freed, so that never more than two are there; train_autoencoder.py with
FOLLOW trains on one after another. Evenly spaced shards are never freed: what is held out of
training, and what is analysed, is of these.

freed.jsonl         windows that were freed, a line each, written before their files are deleted
first_window.json   outlier norm, scale and mean: those of the first window, which hold for all
"""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.activations.shards import DTYPES, shard_path
from utils.artifacts import append_record, read_log
from utils.settings import require

FREED_FILE, STATISTICS_FILE = "freed.jsonl", "first_window.json"
BESIDES = 2**22  # bytes of a folder that are not in shards, and of headers
GB = 1e9


class Rolling(NamedTuple):
    """How the shards of a run are cut into windows, and how many of them are kept."""

    n_shards: int
    n_windows: int
    n_kept: int

    @classmethod
    def plan(cls, n_shards: int, shard_bytes: int, max_gb: float, keep_gb: float) -> "Rolling":
        """The largest windows of which two fit beside what is kept.

        Raises:
            InputError: Not even two shards fit; names the least MAX_DISK_GB that would do.
        """
        n_kept = min(n_shards, int(keep_gb * GB) // shard_bytes)
        require(
            n_kept > 0,
            f"KEEP_GB must hold a shard, {shard_bytes / GB:.3g} GB; it is {keep_gb:g}. Raise it, "
            "or lower TOKENS_PER_SHARD.",
        )
        a_window = ((int(max_gb * GB) - BESIDES) // shard_bytes - n_kept) // 2
        least = ((n_kept + 2) * shard_bytes + BESIDES) / GB
        require(
            a_window > 0,
            f"MAX_DISK_GB must hold what is kept (KEEP_GB) and two windows of a shard; it is "
            f"{max_gb:g}. At least {least:.3g} would do, or a lower KEEP_GB or TOKENS_PER_SHARD.",
        )
        return cls(n_shards, -(-n_shards // a_window), n_kept)

    def shards(self, window: int) -> range:
        """The numbers of a window's shards; windows differ by one shard at most."""
        first, end = (w * self.n_shards // self.n_windows for w in (window, window + 1))
        return range(first, end)

    def window_of(self, shard: int) -> int:
        return ((shard + 1) * self.n_windows - 1) // self.n_shards

    @property
    def kept(self) -> frozenset[int]:
        """The numbers of the shards that are never freed, the first among them."""
        return frozenset(i * self.n_shards // self.n_kept for i in range(self.n_kept))

    def freed(self, folder: Path) -> frozenset[int]:
        """The numbers of the shards that were freed."""
        windows = freed_windows(folder)
        return frozenset(n for w in windows for n in self.shards(w)) - self.kept

    def files(self, folder: Path, window: int) -> Iterator[Path]:
        """The files of a window's shards that are not kept."""
        for shard in set(self.shards(window)) - self.kept:
            yield from (shard_path(folder, array, shard) for array in DTYPES)

    def has_room(self, folder: Path, shard: int) -> bool:
        """Whether a shard may be begun: the window two before its own is gone."""
        earlier = self.window_of(shard) - 2
        return earlier < 0 or (
            earlier in freed_windows(folder)
            and not any(path.exists() for path in self.files(folder, earlier))
        )


def freed_windows(folder: Path) -> Container[int]:
    """The windows of a folder that were freed."""
    log = folder / FREED_FILE
    return {record["window"] for record in read_log(log, ["window"])} if log.exists() else set()


def record_freed(folder: Path, window: int) -> None:
    """Record that a window is freed; its files may be deleted from here on."""
    append_record(folder / FREED_FILE, {"window": window})
