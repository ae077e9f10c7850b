"""Training in rounds, and what happens at the end of each: backup, log, progress, TensorBoard."""

import csv
import dataclasses
import math
import time
from pathlib import Path

import keras
import pandas as pd
from tqdm import tqdm

from utils import artifacts
from utils.activations.following import FollowedBatches
from utils.autoencoder.autoencoder import metric_name
from utils.settings import TimeIsUp, TimeLimit, require


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Training cut into rounds of equal length; a round is what Keras calls an epoch.

    Metrics are logged and a backup may be made at the end of a round, so a round is far shorter
    than a pass over the data.
    """

    n_rounds: int
    steps: int
    limit: TimeLimit = dataclasses.field(default_factory=lambda: TimeLimit(None), compare=False)

    @classmethod
    def cut(cls, total_steps: int, log_every: int, limit: TimeLimit | None = None) -> "Rounds":
        """At least ``log_every`` steps a round, all alike; less than a step a round is dropped."""
        n_rounds = max(1, total_steps // log_every)
        return cls(n_rounds, total_steps // n_rounds, limit or TimeLimit(None))

    @property
    def total_steps(self) -> int:
        return self.n_rounds * self.steps


class RoundCallbacks(keras.callbacks.CallbackList):
    """Callbacks that are given metrics at the end of a round only.

    Keras hands out those of each step, as numbers: the host would wait for each step to end.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self.callbacks[0].model.look_for_dead()
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch)


class Backup(keras.callbacks.Callback):
    """Saves weights, optimiser and counters every few rounds, in one atomically replaced file.

    Not after the last, which ends with the finished autoencoder. Where the limit does not allow
    another round, training ends with a backup and `TimeIsUp`.

    Args:
        followed: Where the data is written meanwhile. A backup is made too at the end of a round in
            which a window of it ends, and after every backup the windows before it are freed.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        rounds: Rounds,
        followed: FollowedBatches | None = None,
    ):
        super().__init__()
        self.path, self.every, self.rounds = folder / artifacts.BACKUP_FILE, every, rounds
        self.followed = followed
        self.ending = {-(-end // rounds.steps) for end in followed.ends} if followed else ()

    def on_epoch_end(self, epoch, logs=None):
        done, wanted = epoch + 1, self.rounds.n_rounds
        if done == wanted:
            return
        is_last = not self.rounds.limit.allows_another()
        if is_last or done % self.every == 0 or done in self.ending:
            with artifacts.replacing(self.path) as partial:
                self.model.save(partial)
            if self.followed:
                self.followed.free(done * self.rounds.steps)
        if is_last:
            steps = self.rounds.steps
            raise TimeIsUp(f"{done * steps:,} of {wanted * steps:,} steps are made and saved.")


class StopOnNaN(keras.callbacks.Callback):
    """Ends training when the loss is not a finite number, before anything of it is saved."""

    def on_epoch_end(self, epoch, logs=None):
        terms = [f"{name} {logs[metric_name(name)]:.4g}" for name in self.model.loss_names]
        require(
            math.isfinite(logs["loss"]),
            f"The loss is {logs['loss']} in round {epoch + 1} ({', '.join(terms)}). Lower "
            "LEARNING_RATE or GRADIENT_CLIP_NORM, and train anew with --overwrite or into another "
            "folder; what FOLLOW has freed must be saved anew before.",
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
        with artifacts.replacing(self.path, is_whole=False) as partial:
            kept.to_csv(partial, index=False)

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_test_begin(self, logs=None):
        int(self.model.step)  # waits for the steps that a card has still to do
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
        with artifacts.writing(self.path), open(self.path, "a", newline="") as file:
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
