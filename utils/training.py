"""Training: the schedule of the learning rate, callbacks for `fit`, and the call that trains."""

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

from utils.activations import ActivationStore
from utils.artifacts import replacing
from utils.autoencoder import SparseAutoencoder, find_kind
from utils.fidelity import Fidelity
from utils.settings import InputError, as_dict

LOG_FIELDS = (
    "step", "tokens", "loss", "fvu", "l0", "dead_fraction", "learning_rate", "val_fvu", "seconds",
)  # fmt: skip


@keras.saving.register_keras_serializable("scaling_monosemanticity")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise, a constant learning rate, and a linear fall to zero at the end of training.

    Args:
        peak: The learning rate in the middle.
        total_steps: Steps of the whole training.
        warmup_share: Share of the steps that rise; 0 in the paper.
        decay_share: Share of the steps that fall; 0.2 in the paper.

    Reference: "Update on how we train SAEs", April 2024.
    """

    def __init__(self, peak, total_steps, warmup_share=0.0, decay_share=0.2):
        self.peak, self.total_steps = peak, total_steps
        self.warmup_share, self.decay_share = warmup_share, decay_share

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rise = (step + 1) / max(1.0, self.warmup_share * self.total_steps)
        fall = (self.total_steps - step) / max(1.0, self.decay_share * self.total_steps)
        return self.peak * keras.ops.clip(keras.ops.minimum(rise, fall), 0.0, 1.0)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_share": self.warmup_share,
            "decay_share": self.decay_share,
        }


def build(settings: Any, store: ActivationStore, total_steps: int) -> SparseAutoencoder:
    """The autoencoder that some settings ask for, initialised on the data and compiled.

    A kind's constructor says which options it has; they are taken by name from the settings.
    """
    cls = find_kind(settings.kind)
    options = {
        **as_dict(settings),
        "d_model": store.d_model,
        "sparsity_warmup": int(settings.l1_warmup * total_steps),
    }
    autoencoder = cls(**{name: options[name] for name in cls.options()})
    autoencoder.initialize(
        store.scale,
        store.mean,
        settings.decoder_norm or cls.default_decoder_norm,
        settings.seed,
    )
    learning_rate = settings.learning_rate or cls.default_learning_rate(settings.n_latents)
    autoencoder.compile(
        optimizer=keras.optimizers.Adam(
            LinearDecay(
                learning_rate,
                total_steps,
                settings.learning_rate_warmup,
                settings.learning_rate_decay,
            ),
            global_clipnorm=settings.gradient_clip_norm,
        )
    )
    return autoencoder


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
        """About ``log_every`` steps a round, all alike; at most a round's rest is dropped."""
        n_rounds = max(1, round(total_steps / log_every))
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

    Raises:
        InputError: The loss is no longer a number.
    """
    autoencoder = restore_backup(folder) or autoencoder
    first_round = int(autoencoder.step) // rounds.steps
    log = TrainingLog(folder / "training_log.csv", first_round, rounds, batch_size)
    if first_round < rounds.n_rounds:
        autoencoder.fit(
            ((batch,) for batch in batches_from(first_round * rounds.steps)),
            initial_epoch=first_round,
            epochs=rounds.n_rounds,
            steps_per_epoch=rounds.steps,
            validation_data=(held_out,),
            shuffle=False,
            validation_batch_size=batch_size,
            callbacks=[
                Progress(rounds, batch_size),
                StopOnNaN(),
                log,
                Backup(folder, backup_every),
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
    """Saves weights, optimiser and counters every few rounds, in one atomically replaced file."""

    def __init__(self, folder: Path, every: int):
        super().__init__()
        self.path, self.every = folder / "backup.keras", every

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            with replacing(self.path) as partial:
                self.model.save(partial)


def save_autoencoder(autoencoder: SparseAutoencoder, path: Path) -> None:
    """Write the weights and configuration as one ``.keras`` file, atomically.

    A copy is saved, for Keras writes the optimiser of a compiled model too, twice its size.
    """
    copy = type(autoencoder).from_config(autoencoder.get_config())
    copy.set_weights(autoencoder.get_weights())
    with replacing(path) as partial:
        copy.save(partial)


class StopOnNaN(keras.callbacks.Callback):
    """Ends training when the loss is not a finite number, before anything of it is saved."""

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"The loss is {logs['loss']} in round {epoch + 1}. Lower LEARNING_RATE or "
                "GRADIENT_CLIP_NORM, and train anew with --overwrite or into another folder."
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
    """Appends a line of metrics to a CSV file after each round.

    Lines after the round that training goes on from are dropped, a torn one too, so that the file
    reads as if training had never been interrupted.
    """

    def __init__(self, path: Path, first_round: int, rounds: Rounds, batch_size: int):
        super().__init__()
        self.path, self.rounds, self.batch_size = path, rounds, batch_size
        kept = read_log(path)[:first_round] if path.exists() else pd.DataFrame(columns=LOG_FIELDS)
        self.seconds = float(kept["seconds"].iloc[-1]) if len(kept) else 0.0
        with replacing(path) as partial:
            kept.to_csv(partial, index=False)

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.perf_counter() - self.begun
        step = (epoch + 1) * self.rounds.steps
        line = {
            "step": step,
            "tokens": step * self.batch_size,
            "learning_rate": float(self.model.optimizer.learning_rate),
            "seconds": round(self.seconds, 2),
            **{name: logs[name] for name in ("loss", "fvu", "l0", "dead_fraction", "val_fvu")},
        }
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, LOG_FIELDS).writerow(line)


def read_log(path: Path) -> pd.DataFrame:
    """The training log, one row a round, columns `LOG_FIELDS`."""
    return pd.read_csv(path, names=LOG_FIELDS, skiprows=1)
