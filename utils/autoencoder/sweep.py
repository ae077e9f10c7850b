"""A sweep: many sizes, numbers of steps and learning rates, trained side by side.

Reference: "Scaling Monosemanticity", Scaling Laws.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import time
import types
from pathlib import Path
from typing import NamedTuple, Protocol

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.activations.store import ActivationStore, spread
from utils.artifacts import reading, replacing, require_disk_space, write_csv
from utils.autoencoder import training
from utils.autoencoder.autoencoder import SparseAutoencoder, metric_name
from utils.autoencoder.devices import n_shares
from utils.autoencoder.fidelity import measure_fidelity
from utils.autoencoder.kinds import find_kind
from utils.backend import torch_device
from utils.settings import TimeIsUp, TimeLimit, require

BACKUP_SECONDS = 300
N_MEASURED_TOKENS = 16_384  # held-out tokens that every run is measured on
TABLE_FILE = "scaling_laws.csv"
NOT_OF_A_SWEEP = ("N_LATENTS", "N_PASSES", "LOG_EVERY", "BACKUP_EVERY", "TENSORBOARD")


class SweepSettings(training.TrainingSettings, Protocol):
    """The settings of train_autoencoder.py that a sweep is made by."""

    batch_size: int
    held_out: float
    n_held_out_tokens: int | None
    sweep_latents: tuple[int, ...]
    sweep_steps: tuple[int, ...]
    sweep_learning_rates: tuple[float, ...]
    max_hours: float | None


class Run(NamedTuple):
    """A training of the sweep."""

    n_latents: int
    steps: int
    learning_rate: float


@dataclasses.dataclass
class Live:
    """A run that is being trained: where it is, and how long its steps took in this process."""

    autoencoder: SparseAutoencoder
    step: int
    n_timed: int = 0
    seconds: float = 0.0


def check(settings: SweepSettings, defaults: types.ModuleType) -> None:
    """Refuse a sweep that cannot be made, before anything is read.

    Args:
        settings: What the script was started with.
        defaults: The script's module: what differs from its constants was given.
    """
    for name in ("sweep_latents", "sweep_steps", "sweep_learning_rates"):
        values = getattr(settings, name)
        require(
            all(0 < a < b for a, b in itertools.pairwise((*values, math.inf))),
            f"{name.upper()} must be positive and rise; it is {values}. Leave out what repeats.",
        )
    require(
        bool(settings.sweep_latents) == bool(settings.sweep_steps),
        "SWEEP_LATENTS and SWEEP_STEPS must be given together; they are "
        f"{settings.sweep_latents} and {settings.sweep_steps}. Give both, or neither.",
    )
    given = [
        name
        for name in NOT_OF_A_SWEEP
        if getattr(settings, name.lower()) != getattr(defaults, name)
    ]
    require(
        not (settings.sweep_latents and given),
        f"{', '.join(given)} is not of a sweep, which has sizes and steps of its own and logs "
        "and backs up by itself. Leave it out.",
    )
    takes_k = "k" in find_kind(settings.kind).options()
    require(
        not (takes_k and settings.sweep_latents) or settings.k <= settings.sweep_latents[0],
        f"SWEEP_LATENTS must be at least K, {settings.k}; the smallest is "
        f"{min(settings.sweep_latents, default=0)}. Leave it out, or lower K.",
    )


class Sweep:
    """Trains runs side by side on the same batches, each of which is read once.

    Runs of one size and learning rate are the same until the learning rate of the shorter one
    begins to fall. So only the longest, the trunk, is trained from the start, and each shorter one
    is a copy of it from there on: weights, moments, counters. What rises at the start of training,
    λ and the learning rate, rises in all runs over its share of the shortest run's steps.

    Live runs are in memory together: a trunk for each size and learning rate, and its copies. They
    are backed up every few minutes, copies before trunks, so that a trunk's backup is never past a
    copy that is yet to be made. Runs that are in the table are not trained again.

    Args:
        settings: Of train_autoencoder.py.
        store: The activations.
        folder: Where the table and the backups go.
        backup_seconds: Time between backups.
    """

    def __init__(
        self,
        settings: SweepSettings,
        store: ActivationStore,
        folder: Path,
        backup_seconds: float = BACKUP_SECONDS,
    ):
        self.settings, self.store, self.folder = settings, store, folder
        self.backup_seconds, self._backed_up = backup_seconds, time.monotonic()
        self.limit = TimeLimit(settings.max_hours)
        split = store.split(settings.held_out, settings.n_held_out_tokens)
        self.batches = training.shuffled(settings, store, split.training)
        self.batches.n_steps(1)  # refuses a batch larger than the data
        held_out = spread(split.held_out, max(1, N_MEASURED_TOKENS // store.context_length))
        batches = (batch.rows for batch in store.batches(held_out, settings.batch_size))
        even = (rows[: len(rows) // n_shares() * n_shares()] for rows in batches)
        self.held_out = [rows for rows in even if len(rows)]
        self.finished: dict[Run, dict] = {}
        self.live: dict[Run, Live] = {}
        if (folder / TABLE_FILE).exists():
            with reading(folder / TABLE_FILE, "Delete it to train these runs again.") as path:
                table = pd.read_csv(path, converters={"learning_rate": float})
            self.finished = {_run_of(row): row for row in table.to_dict("records")}

    def table(self) -> pd.DataFrame:
        """All finished runs, a row each, as in scaling_laws.csv."""
        return pd.DataFrame(self.finished.values()).sort_values(list(Run._fields))

    def main_rate(self) -> float | None:
        """The learning rate that most runs so far have: that of the grid. None without any."""
        rates = collections.Counter(run.learning_rate for run in self.finished)
        return rates.most_common(1)[0][0] if rates else None

    def train(self, runs: list[Run], name: str) -> None:
        """Train those of ``runs`` that are not finished; ``name`` is on the progress bar."""
        left = sorted(set(runs) - set(self.finished))
        if not left:
            return
        trunks = {(run.n_latents, run.learning_rate): run for run in left}  # the longest is last
        weights = self.store.d_model * sum(n for n, _ in trunks)
        size = 3 * training.BACKUP_BYTES * weights
        require_disk_space(self.folder, size, ("sweep-*.keras",))
        self.live = {run: self._restore(run) for run in left if self._backup(run).exists()}
        for trunk in trunks.values():
            if trunk not in self.live:
                self.live[trunk] = Live(self._build(trunk), 0)
        step = min(live.step for live in self.live.values())
        batches = self.batches.from_step(step)
        with contextlib.closing(batches), self._bar(left, set(trunks.values()), name) as bar:
            while True:
                for run in left:
                    trunk = trunks[run.n_latents, run.learning_rate]
                    if run != trunk and self.fall_begins(run) == step:
                        self._branch(trunk, run)
                self._finish(step)
                if not self.live:
                    break
                is_last = not self.limit.allows_another()
                if is_last or time.monotonic() - self._backed_up > self.backup_seconds:
                    self._back_up(set(trunks.values()))
                if is_last:
                    raise TimeIsUp(f"{len(self.finished)} runs are finished, others backed up.")
                bar.update(self._train_step(next(batches), step))
                step += 1
        self.train(runs, name)  # what a widened sweep asks of a trunk whose backup was past it

    def fall_begins(self, run: Run) -> int:
        """The step up to which a run is the same as a longer one."""
        return math.floor((1 - self.settings.learning_rate_decay) * run.steps)

    def _bar(self, left: list[Run], trunks: set[Run], name: str) -> tqdm:
        """A bar over the steps that are made, so those of a copy only from where it begins."""
        first = {run: 0 if run in trunks else self.fall_begins(run) for run in left}
        return tqdm(
            total=sum(run.steps - first[run] for run in left),
            initial=sum(live.step - first[run] for run, live in self.live.items()),
            desc=name,
            unit="step",
        )

    def _build(self, run: Run) -> SparseAutoencoder:
        shortest = min(self.settings.sweep_steps)
        settings = dataclasses.replace(
            self.settings, n_latents=run.n_latents, learning_rate=run.learning_rate
        )
        autoencoder = training.build(settings, self.store, shortest)
        rise = settings.learning_rate_warmup * shortest / run.steps
        settings = dataclasses.replace(settings, learning_rate_warmup=rise)
        optimizer = training.optimizer(settings, type(autoencoder), run.steps)
        autoencoder.compile(optimizer=optimizer)
        optimizer.build(autoencoder.trainable_variables)
        return _not_recorded(autoencoder)

    def _branch(self, trunk: Run, run: Run) -> None:
        """Make a run live as a copy of its trunk, unless a backup has it."""
        if run in self.live or run in self.finished:
            return
        source, copy = self.live[trunk], self._build(run)
        copy.set_weights(_values(source.autoencoder.weights))
        moments = _values(source.autoencoder.optimizer.variables)
        for variable, value in zip(copy.optimizer.variables, moments, strict=True):
            variable.assign(value)
        self.live[run] = Live(copy, source.step, source.n_timed, source.seconds)

    def _train_step(self, batch: np.ndarray, step: int) -> int:
        """Give a batch to each live run that is at its step; how many those were."""
        n_trained = 0
        for live in self.live.values():
            if live.step == step:  # one whose backup is newer waits
                begun = time.perf_counter()
                live.autoencoder.look_for_dead()
                live.autoencoder.train_on_batch(batch)
                live.seconds += time.perf_counter() - begun
                live.n_timed += 1
                live.step += 1
                n_trained += 1
        return n_trained

    def _finish(self, step: int) -> None:
        """Measure the runs that end at a step, and write them to the table."""
        for run in [run for run in self.live if run.steps == step]:
            self.finished[run] = self._measure(run, self.live.pop(run))
            write_csv(self.folder / TABLE_FILE, self.table())
            self._backup(run).unlink(missing_ok=True)

    def _measure(self, run: Run, live: Live) -> dict[str, float]:
        """A row of the table; ``seconds`` is what the run takes by itself, at its mean step."""
        autoencoder = live.autoencoder
        fidelity = measure_fidelity(autoencoder, self.held_out)
        dead = float(np.mean(keras.ops.convert_to_numpy(autoencoder.dead())))
        tokens = run.steps * self.settings.batch_size
        compute = run.n_latents * tokens
        return {
            **run._asdict(),
            "tokens": tokens,
            "compute": compute,
            "flops": 12 * self.store.d_model * compute,
            "loss": held_out_loss(autoencoder, self.held_out),
            "fvu": fidelity.fvu,
            "l0": fidelity.l0,
            "dead_fraction": dead,
            "seconds": round(run.steps * live.seconds / max(1, live.n_timed), 2),
        }

    # ---- backups

    def _backup(self, run: Run) -> Path:
        return self.folder / f"sweep-{run.n_latents}-{run.steps}-{run.learning_rate!r}.keras"

    def _back_up(self, trunks: set[Run]) -> None:
        for run in sorted(self.live, key=trunks.__contains__):
            with replacing(self._backup(run)) as partial:
                self.live[run].autoencoder.save(partial)
        self._backed_up = time.monotonic()

    def remove_backups(self) -> None:
        """Delete what a kill left between a run's line in the table and the end of its backup."""
        for path in self.folder.glob("sweep-*.keras"):
            path.unlink()

    def _restore(self, run: Run) -> Live:
        with reading(self._backup(run), "Delete it to train this run from the start.") as path:
            autoencoder = _not_recorded(keras.saving.load_model(path))
        return Live(autoencoder, int(autoencoder.step))


def _not_recorded(autoencoder: SparseAutoencoder) -> SparseAutoencoder:
    """One of many that are live at once: recordings of each would take the memory of copies."""
    autoencoder.run_eagerly = torch_device() is not None
    return autoencoder


def _run_of(row: dict) -> Run:
    return Run(int(row["n_latents"]), int(row["steps"]), float(row["learning_rate"]))


def _values(variables) -> list[np.ndarray]:
    """Copies, for a backend may write over an array that is not shared."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def held_out_loss(autoencoder: SparseAutoencoder, batches: list[np.ndarray]) -> float:
    """The objective on raw activations (batch, d_model), for a token and a dimension of d_model.

    The squared error is normalised: to reconstruct nothing costs 1, unless INPUT_NORMALIZER is
    none. Terms that are there to train and say nothing of quality (``training_aids``: AuxK) are
    left out. Steps of length 0 are made, for the loss as it is while training; the autoencoder's
    optimiser is lost.
    """
    sgd = keras.optimizers.SGD(0.0)
    autoencoder.compile(optimizer=sgd, run_eagerly=autoencoder.run_eagerly)
    names = [name for name in autoencoder.loss_names if name not in autoencoder.training_aids]
    losses = []
    for batch in batches:
        metrics = autoencoder.train_on_batch(batch, return_dict=True)
        losses.append(sum(metrics[metric_name(name)] for name in names))
    return (
        float(np.average(losses, weights=[len(batch) for batch in batches])) / autoencoder.d_model
    )
