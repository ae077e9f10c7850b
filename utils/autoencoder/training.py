"""Training: an autoencoder built from settings, callbacks for `fit`, and the call that trains."""

import csv
import dataclasses
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.activations.store import ActivationStore
from utils.artifacts import replacing
from utils.autoencoder.autoencoder import SparseAutoencoder, metric_name
from utils.autoencoder.devices import n_shares
from utils.autoencoder.fidelity import Fidelity
from utils.autoencoder.kinds import KINDS, find_kind
from utils.autoencoder.optimizer import Adam, Schedule
from utils.autoencoder.sparse import fastest_dtype
from utils.backend import peak_memory
from utils.settings import InputError, as_dict, require

BACKUP_BYTES = 25  # of each weight of W_dec: W_enc, W_dec and their two moments, float32


def check_options(settings: Any, defaults: Any) -> None:
    """Refuse an option that was given although the kind has no such option.

    Args:
        settings: What the script was started with.
        defaults: The script's module: what differs from its constants was given.

    Raises:
        InputError: The kind is unknown, or has no such option, or one that is no constant of the
            script, or fewer latents than K; or DECODER_NORM is given for rows that are held at
            norm 1.
    """
    cls = find_kind(settings.kind)
    require_constants(settings)
    options = cls.options()
    for option in sorted({name for kind in KINDS.values() for name in kind.options()}):
        value = getattr(settings, option, None)
        if option in options or value == getattr(defaults, option.upper(), None):
            continue
        having = [name for name, kind in KINDS.items() if option in kind.options()]
        raise InputError(
            f"{option.upper()} is an option of {', '.join(having)}; KIND is {settings.kind!r}, and "
            f"{option.upper()} {value}. Leave it out, or choose another kind."
        )
    is_unit = cls.default_unit_decoder if settings.unit_decoder is None else settings.unit_decoder
    require(
        not is_unit or settings.decoder_norm == defaults.DECODER_NORM,
        "DECODER_NORM is for rows that are not held at norm 1, as here they are (UNIT_DECODER); it "
        f"is {settings.decoder_norm}. Leave it out.",
    )
    require(
        "k" not in options or settings.k <= settings.n_latents,
        f"K must be at most N_LATENTS, {settings.n_latents:,}; it is {settings.k:,}.",
    )


def require_constants(settings: Any) -> None:
    """Refuse a kind with an option that train_autoencoder.py has no constant for."""
    names = {*as_dict(settings), "d_model"}
    for option in find_kind(settings.kind).options():
        require(
            option in names,
            f"KIND {settings.kind!r} has the option {option}, for which train_autoencoder.py has "
            "no constant. Add one there, with a comment at the end of its line: "
            f"{option.upper()} = ...  # what it is",
        )


def build(settings: Any, store: ActivationStore, total_steps: int) -> SparseAutoencoder:
    """The autoencoder that some settings ask for, initialised on the data and compiled.

    A kind's constructor says which options it has; they are taken by name from the settings, and
    those that are None are left to the kind.

    Raises:
        InputError: The kind is unknown, or has an option that is no setting.
    """
    cls = find_kind(settings.kind)
    require_constants(settings)
    given = {**as_dict(settings), "d_model": store.d_model}
    share = settings.sparsity_warmup
    share = cls.default_sparsity_warmup if share is None else share
    given["sparsity_warmup"] = int(share * total_steps)
    if settings.selection_dtype == "auto":
        given["selection_dtype"] = fastest_dtype()
    if settings.unit_decoder is None:
        given["unit_decoder"] = cls.default_unit_decoder
    options = {name: given[name] for name in cls.options()}
    autoencoder = cls(**{name: value for name, value in options.items() if value is not None})
    autoencoder.initialize(
        *input_normalizer(settings.input_normalizer, store),
        store.mean,
        1.0 if autoencoder.unit_decoder else settings.decoder_norm or cls.default_decoder_norm,
        settings.seed,
    )
    autoencoder.compile(optimizer=optimizer(settings, cls, total_steps))
    return autoencoder


def input_normalizer(name: str, store: ActivationStore) -> tuple[float, np.ndarray]:
    """The scalar and the center of x = scale · (activations − center).

    Args:
        name: ``"centered"``: about the mean, E‖x‖² = d_model; ``"scalar"``: the same, not about the
            mean, as in the paper; ``"none"``: x = activations.
    """
    nothing = np.zeros_like(store.mean)
    if name == "none":
        return 1.0, nothing
    if name == "scalar":
        return store.scale, nothing
    squared_mean = float(np.square(store.mean, dtype=np.float64).sum())
    return (1 / store.scale**2 - squared_mean / store.d_model) ** -0.5, store.mean


def optimizer(settings: Any, cls: type[SparseAutoencoder], total_steps: int) -> Adam:
    """Adam(0.9, 0.999) with the schedule and clipping that settings ask for."""
    peak = settings.learning_rate or cls.default_learning_rate(settings.n_latents, total_steps)
    return Adam(
        Schedule(
            peak,
            total_steps,
            settings.learning_rate_warmup,
            settings.learning_rate_decay,
            settings.learning_rate_shape,
        ),
        global_clipnorm=settings.gradient_clip_norm,
    )


def metrics(
    autoencoder: SparseAutoencoder,
    fidelity: Fidelity,
    log: pd.DataFrame,
    store: ActivationStore,
    backend: str,
) -> dict[str, Any]:
    """What `metrics.json` says of a finished training."""
    last = log.iloc[-1]
    return {
        "fvu": fidelity.fvu,
        "l0": fidelity.l0,
        "cosine": fidelity.cosine,
        "dead_fraction": float(keras.ops.mean(keras.ops.cast(autoencoder.dead(), "float32"))),
        "dead_after": autoencoder.dead_after,
        "n_held_out_tokens": fidelity.n_rows,
        "n_tokens": int(last["tokens"]),
        "n_steps": int(last["step"]),
        "seconds": float(last["seconds"]),
        "tokens_per_second": float(last["tokens"] / last["seconds"]),
        "backend": backend,
        **peak_memory(),
        "model_name": store.model_name,
        "revision": store.revision,
        "layer": store.layer,
        "d_model": store.d_model,
        "n_latents": autoencoder.n_latents,
    }


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Training cut into rounds of equal length; a round is what Keras calls an epoch.

    Metrics are logged and a backup may be made at the end of a round, so a round is far shorter
    than a pass over the data.
    """

    n_rounds: int
    steps: int

    @classmethod
    def cut(cls, total_steps: int, log_every: int) -> "Rounds":
        """At least ``log_every`` steps a round, all alike; less than a step a round is dropped."""
        n_rounds = max(1, total_steps // log_every)
        return cls(n_rounds, total_steps // n_rounds)

    @property
    def total_steps(self) -> int:
        return self.n_rounds * self.steps


def train(
    autoencoder: SparseAutoencoder,
    batches_from: Callable[[int], Iterator[np.ndarray]],
    held_out: np.ndarray,
    rounds: Rounds,
    batch_size: int,
    folder: Path,
    backup_every: int,
    tensorboard: bool = False,
) -> SparseAutoencoder:
    """Fit a compiled autoencoder, going on from the folder's backup if there is one.

    Args:
        autoencoder: Compiled and initialised; replaced by the backup's where there is one.
        batches_from: From a step to the batches that follow, each (batch_size, d_model), raw.
        held_out: Raw activations that `val_fvu` is measured on, shape (rows, d_model).
        rounds: How long to train.
        batch_size: Rows a batch.
        folder: Where ``backup.keras`` and ``training_log.csv`` go.
        backup_every: Rounds between backups.
        tensorboard: Write the metrics for TensorBoard too, into the folder.

    Raises:
        InputError: Too little is held out; or the loss is no longer a number.
    """
    autoencoder = restore_backup(folder) or autoencoder
    first_round = int(autoencoder.step) // rounds.steps
    # Equal batches, for Keras averages their metrics, and such as devices can share.
    n_batches = math.ceil(len(held_out) / batch_size)
    size = len(held_out) // n_batches // n_shares() * n_shares()
    require(
        size > 0,
        f"HELD_OUT must leave a token for each of {n_shares()} devices; it leaves {len(held_out)}.",
    )
    if first_round < rounds.n_rounds:
        autoencoder.fit(
            ((batch,) for batch in batches_from(first_round * rounds.steps)),
            initial_epoch=first_round,
            epochs=rounds.n_rounds,
            steps_per_epoch=rounds.steps,
            validation_data=(held_out[: n_batches * size],),
            shuffle=False,
            validation_batch_size=size,
            callbacks=[
                Progress(rounds, batch_size),
                StopOnNaN(),
                TrainingLog(folder / "training_log.csv", rounds, batch_size),
                *([TensorBoard(folder, rounds)] if tensorboard else []),
                Backup(folder, backup_every, rounds),
            ],
            verbose=0,
        )
    return autoencoder


def restore_backup(folder: Path) -> SparseAutoencoder | None:
    """The autoencoder, its optimiser and counters as last backed up, or None."""
    path = folder / "backup.keras"
    if not path.exists():
        return None
    try:
        autoencoder = keras.saving.load_model(path)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read ({error}). Delete it to train from the start."
        ) from error
    print(f"Going on from step {int(autoencoder.step):,}.")
    return autoencoder


class Backup(keras.callbacks.Callback):
    """Saves weights, optimiser and counters every few rounds, in one atomically replaced file.

    Not after the last, which ends with the finished autoencoder.
    """

    def __init__(self, folder: Path, every: int, rounds: Rounds):
        super().__init__()
        self.path, self.every, self.rounds = folder / "backup.keras", every, rounds

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0 and epoch + 1 < self.rounds.n_rounds:
            with replacing(self.path) as partial:
                self.model.save(partial)


class StopOnNaN(keras.callbacks.Callback):
    """Ends training when the loss is not a finite number, before anything of it is saved."""

    def on_epoch_end(self, epoch, logs=None):
        terms = [f"{name} {logs[metric_name(name)]:.4g}" for name in self.model.loss_names]
        require(
            math.isfinite(logs["loss"]),
            f"The loss is {logs['loss']} in round {epoch + 1} ({', '.join(terms)}). Lower "
            "LEARNING_RATE or GRADIENT_CLIP_NORM, and train anew with --overwrite or into another "
            "folder.",
        )


class Progress(keras.callbacks.Callback):
    """A bar over all tokens of the training, with tokens/s and the metrics of the last round."""

    def __init__(self, rounds: Rounds, batch_size: int):
        super().__init__()
        self.rounds, self.batch_size = rounds, batch_size

    def on_train_begin(self, logs=None):
        self.bar = tqdm(
            total=self.rounds.total_steps * self.batch_size,
            initial=int(self.model.step) * self.batch_size,
            desc="training",
            unit="tok",
            unit_scale=True,
        )

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update(self.batch_size)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.set_postfix_str(
            f"variance explained {1 - logs['val_fvu']:.3f}, L0 {logs['l0']:.1f}, "
            f"dead {logs['dead_fraction']:.1%}"
        )

    def on_train_end(self, logs=None):
        self.bar.close()


class TrainingLog(keras.callbacks.Callback):
    """Appends a line of metrics to a CSV file after each round; ``seconds`` are of training steps.

    Columns are ``step, tokens``, each metric of the autoencoder (``loss``, ``loss_reconstruction``
    and so on), ``learning_rate, val_fvu, seconds``. Lines after the round that training goes on
    from are dropped, a torn one too, so that the file reads as if training had never been
    interrupted. Lines that early versions wrote are empty where these had no such column.
    """

    def __init__(self, path: Path, rounds: Rounds, batch_size: int):
        super().__init__()
        self.path, self.rounds, self.batch_size = path, rounds, batch_size

    def on_train_begin(self, logs=None):
        metrics = [metric.name for metric in self.model.metrics]
        self.columns = ["step", "tokens", *metrics, "learning_rate", "val_fvu", "seconds"]
        written = read_log(self.path) if self.path.exists() else pd.DataFrame()
        first_round = int(self.model.step) // self.rounds.steps
        kept = written[:first_round].reindex(columns=self.columns)
        self.seconds = float(kept["seconds"].iloc[-1]) if len(kept) else 0.0
        with replacing(self.path) as partial:
            kept.to_csv(partial, index=False)

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.seconds += time.perf_counter() - self.begun  # training alone, not measuring

    def on_epoch_end(self, epoch, logs=None):
        step = (epoch + 1) * self.rounds.steps
        line = {
            **logs,
            "step": step,
            "tokens": step * self.batch_size,
            "learning_rate": float(self.model.optimizer.learning_rate),
            "seconds": round(self.seconds, 2),
        }
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(line)


class TensorBoard(keras.callbacks.Callback):
    """Writes the metrics of each round for TensorBoard: ``tensorboard --logdir FOLDER``.

    Keras' own callback of that name needs TensorFlow in the process, whatever the backend.
    """

    def __init__(self, folder: Path, rounds: Rounds):
        super().__init__()
        from tensorboard.summary import Writer

        self.writer, self.rounds = Writer(str(folder)), rounds

    def on_epoch_end(self, epoch, logs=None):
        names = [*(metric.name for metric in self.model.metrics), "val_loss", "val_fvu"]
        scalars = {name: logs[name] for name in names}
        scalars["learning_rate"] = float(self.model.optimizer.learning_rate)
        for name, value in scalars.items():
            self.writer.add_scalar(name, float(value), (epoch + 1) * self.rounds.steps)

    def on_train_end(self, logs=None):
        self.writer.close()


def read_log(path: Path) -> pd.DataFrame:
    """The training log, one row a round, columns as `TrainingLog` writes them."""
    return pd.read_csv(path)
