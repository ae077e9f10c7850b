"""Shuffled batches of a folder that is still being written, and that is of bounded size."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from utils.activations.batches import ShuffledBatches
from utils.activations.manifest import Manifest
from utils.activations.rolling import Rolling, freed_windows, record_freed
from utils.activations.shards import close_arrays
from utils.activations.store import ActivationStore
from utils.backend import Tensor
from utils.settings import InputError, TimeIsUp, TimeLimit, require

POLL = 0.5  # seconds between looks at the folder
TOLD_AFTER = 30.0  # seconds of waiting
PATIENCE = 3_600.0  # seconds without a new shard

ShuffledOf = Callable[[ActivationStore, int], ShuffledBatches]  # of a window's store and number


def written_shards(folder: Path) -> set[int]:
    """The numbers of all shards that were written, freed or not."""
    manifests = [Manifest.read(path) for path in folder.glob("manifest*.json")]
    return {entry.shard for manifest in manifests for entry in manifest.shards}


def await_window(folder: Path, window: int | None, limit: TimeLimit) -> Rolling:
    """Wait until all shards of a window were written, or the corpus has ended before; None: for it.

    Raises:
        InputError: The folder is of another kind; or no shard was added for `PATIENCE`.
        TimeIsUp: The limit has come.
    """
    begun, seen, is_told = time.monotonic(), -1, False
    while True:
        manifests = [Manifest.read(path) for path in sorted(folder.glob("manifest*.json"))]
        written = {entry.shard for manifest in manifests for entry in manifest.shards}
        if manifests:
            require(
                manifests[0].rolling is not None,
                f"FOLLOW is for activations saved with MAX_DISK_GB; those in {folder} are not. "
                "Leave FOLLOW out.",
            )
            rolling = Rolling(*manifests[0].rolling)
            all_ended = sum(m.finished for m in manifests) >= manifests[0].world_size
            if all_ended or (window is not None and written.issuperset(rolling.shards(window))):
                return rolling
        require(
            bool(manifests) or not any(folder.glob("layer-*")),
            f"{folder} holds several layers. Run the same command again: it trains on each.",
        )
        if len(written) > seen:
            begun, seen = time.monotonic(), len(written)
        waited = time.monotonic() - begun
        wanted = "the last shards" if window is None else f"the shards of window {window + 1}"
        wanted += f" in {folder}, which save_activations.py writes"
        require(
            waited < PATIENCE,
            f"FOLLOW waits for {wanted}; none was added for {waited / 60:.0f} minutes. Start it, "
            "and run the same command again to go on.",
        )
        if limit.is_over():
            raise TimeIsUp(f"Training waits for {wanted}; all up to the last backup is saved.")
        if waited > TOLD_AFTER and not is_told:
            tqdm.write(f"Waiting for {wanted}.")
            is_told = True
        time.sleep(POLL)
        limit.leave_out(POLL)


def open_first_window(folder: str | Path, limit: TimeLimit) -> ActivationStore:
    """The first window of a folder, or what is kept of it; waits until it is there."""
    rolling = await_window(Path(folder), 0, limit)
    store = ActivationStore(folder, rolling.shards(0))
    store.keep_statistics()
    return store


def free_window(folder: Path, rolling: Rolling, window: int) -> None:
    """Delete a window's shards but the kept ones; done again, it deletes what a kill left."""
    if window not in freed_windows(folder):
        record_freed(folder, window)
    close_arrays()  # the disk keeps a deleted file as long as it is open
    for path in rolling.files(folder, window):
        path.unlink(missing_ok=True)


def free_all(folder: str | Path) -> None:
    """Free every window, when a training has ended."""
    rolling = await_window(Path(folder), None, TimeLimit(None))
    for window in range(rolling.n_windows):
        free_window(Path(folder), rolling, window)


@dataclasses.dataclass
class FollowedBatches:
    """Batches of one window after another, in an order that only seed, pool and step decide.

    A window gives a number of steps that is known before: as many as ``n_passes`` over the first
    one's rows take, by its number of shards, counted through all windows. Rows that are left over
    are not used; where some are missing, as they are held out or a batch has room for them, the
    window is begun again. Where the corpus ends early, so is the last window.

    Attributes:
        store: Of the first window, or what is kept of it.
        folder: The stage's own: its shards are checked before they are used.
        rows_a_shard: Kept rows of the first window, by its number of shards.
        pool_bytes: Of the activations that are shuffled together, at most.
        shuffled: Makes the batches of a window's training contexts.
        limit: Of the time; it may come while a window is waited for.
        is_counted_through: Else each window drops a last batch that is not full, as in trainings
            that an earlier version began.
        ends: The step at which each window ends; after `n_steps`.
        saved: The latest step from which training can go on.
        gone: The windows that were freed since this process began.
    """

    store: ActivationStore
    folder: Path
    batch_size: int
    rows_a_shard: float
    pool_bytes: int
    shuffled: ShuffledOf
    limit: TimeLimit
    is_counted_through: bool = True
    ends: list[int] = dataclasses.field(default_factory=list)
    saved: int = 0
    gone: set[int] = dataclasses.field(default_factory=set)

    @property
    def rolling(self) -> Rolling:
        return self.store.rolling

    def claim(self) -> None:
        """Keep other trainings from using the folder, as long as this object is there.

        Raises:
            InputError: Another one follows it.
        """
        self._lock = FileLock(self.store.folder / ".lock-follow", blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"Another training follows {self.store.folder}, and frees what it has used. Wait "
                "until it ends, or save the activations a second time for this one."
            ) from None

    def n_steps(self, n_passes: float) -> int:
        """The number of steps in ``n_passes`` passes over each window."""
        windows = [self.rolling.shards(window) for window in range(self.rolling.n_windows)]
        rows = n_passes * self.rows_a_shard
        if self.is_counted_through:
            self.ends = [int(rows * shards.stop) // self.batch_size for shards in windows]
        else:
            steps = (int(rows * len(shards)) // self.batch_size for shards in windows)
            self.ends = list(itertools.accumulate(steps))
        require(
            self.ends[0] > 0,
            f"MAX_DISK_GB and N_PASSES must leave a batch of {self.batch_size:,} in a window; it "
            f"has {int(rows * len(windows[0])):,} rows. Lower BATCH_SIZE, or save with a larger "
            "MAX_DISK_GB.",
        )
        return self.ends[-1]

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Batches (batch_size, d_model), raw, as stored, from ``step`` on; waits for them."""
        self.saved = step
        for window, end in enumerate(self.ends):
            begin = self.ends[window - 1] if window else 0
            if step < end:
                batches = self._batches_of(window).from_step(step - begin)
                yield from itertools.islice(batches, end - step)
                batches.close()
                step = end

    def _batches_of(self, window: int) -> ShuffledBatches:
        folder = self.store.folder
        await_window(folder, window, self.limit)
        self.free(self.saved)  # the window before, if this one was not there at the last backup
        written = written_shards(folder)
        while written.isdisjoint(self.rolling.shards(window)):
            window -= 1
        require(
            window not in freed_windows(folder),
            f"Window {window + 1} of {folder} was used and freed by another training, so that this "
            "one cannot begin with it. Go on with that one's AUTOENCODER_DIR and settings, or save "
            "the activations anew with --overwrite.",
        )
        store = ActivationStore(folder, self.rolling.shards(window))
        store.verify(self.folder)
        return self.shuffled(store, window)

    def free(self, step: int) -> None:
        """Free the windows that end at or before a step from which training can go on.

        The last one there is is not: it may be needed again.
        """
        self.saved = step
        written = written_shards(self.store.folder)
        for window, end in enumerate(self.ends[:-1]):
            is_last = written.isdisjoint(self.rolling.shards(window + 1))
            if end <= step and window not in self.gone and not is_last:
                free_window(self.store.folder, self.rolling, window)
                self.gone.add(window)

    def to_measure(self) -> ActivationStore:
        """All that is there now, with all that is kept; waits until everything was written."""
        await_window(self.store.folder, None, self.limit)
        return ActivationStore(self.store.folder)
