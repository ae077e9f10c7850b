"""Training: from settings to a compiled autoencoder, and the call that fits it to activations.

The loss is the kind's (`loss_terms` in `utils.autoencoder.kinds`); Keras' `fit` calls it through
`SparseAutoencoder.compute_loss`.
"""

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import keras
import numpy as np

from utils.activations.batches import POOLS, ShuffledBatches
from utils.activations.following import FollowedBatches, open_first_window
from utils.activations.store import ActivationStore, Contexts
from utils.artifacts import (
    BACKUP_FILE,
    LOG_FILE,
    choices,
    chosen_once,
    reading,
    require_disk_space,
)
from utils.autoencoder.autoencoder import LONGEST_IDLE, SparseAutoencoder
from utils.autoencoder.callbacks import (
    Backup,
    Progress,
    RoundCallbacks,
    Rounds,
    StopOnNaN,
    TensorBoard,
    TrainingLog,
)
from utils.autoencoder.devices import n_shares
from utils.autoencoder.fidelity import Fidelity, measure_fidelity
from utils.autoencoder.kinds import KINDS, find_kind
from utils.autoencoder.optimizer import Adam, Schedule
from utils.autoencoder.sparse import card_lacks_bfloat16, fastest_dtype
from utils.backend import Tensor, ran_out_of_memory, torch_device
from utils.settings import InputError, TimeLimit, as_dict, require

LEAST_VARIANCE = 1e-6  # share of E‖x‖² that is no rounding of a mean in float32
MOST_MEASURED = 2**30  # latents of rows that are computed at once while measuring
BACKUP_BYTES = 25  # at most, of each weight of W_dec: W_enc, W_dec and their two moments


class TrainingSettings(Protocol):
    """The settings of train_autoencoder.py that an autoencoder is built and trained by.

    The options of a kind are read besides, by their names.
    """

    kind: str
    n_latents: int
    k: int
    decoder_norm: float | None
    unit_decoder: bool | None
    input_normalizer: str
    selection_dtype: str
    sparsity_warmup: float | None
    learning_rate: float | None
    learning_rate_warmup: float
    learning_rate_decay: float
    learning_rate_shape: str
    gradient_clip_norm: float | None
    batch_size: int
    activations_dir: str
    pool_gib: float
    moments_dtype: str
    seed: int
    n_passes: float
    log_every: int
    max_hours: float | None
    follow: bool
    held_out: float
    n_held_out_tokens: int | None


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What is trained on, and what is measured on meanwhile.

    Args:
        batches_from: From a step to the batches that follow, each (batch_size, d_model), raw.
        held_out: Raw activations that ``val_fvu`` is measured on, shape (rows, d_model).
        batch_size: Rows a batch.
        followed: Where these are of a folder that is written meanwhile.
    """

    batches_from: Callable[[int], Iterator[Tensor]]
    held_out: np.ndarray
    batch_size: int
    followed: FollowedBatches | None = None

    def validation(self, n_latents: int) -> tuple[np.ndarray, int]:
        """The held-out rows, cut to batches of one size, and that size.

        Batches are equal, for Keras averages their metrics, and such as devices can share.

        Raises:
            InputError: Too little is held out.
        """
        most = measured_together(self.batch_size, n_latents)
        n_batches = math.ceil(len(self.held_out) / most)
        size = len(self.held_out) // n_batches // n_shares() * n_shares()
        require(
            size > 0,
            f"HELD_OUT must leave a token for each of {n_shares()} devices; it leaves "
            f"{len(self.held_out)}.",
        )
        return self.held_out[: n_batches * size], size


def shuffled(
    settings: TrainingSettings, store: ActivationStore, contexts: Contexts
) -> ShuffledBatches:
    """Batches of the activations of contexts, on the device that trains where PyTorch does."""
    return ShuffledBatches(
        store, contexts, settings.batch_size, settings.seed, settings.pool_gib, torch_device()
    )


def open_store(settings: TrainingSettings) -> ActivationStore:
    """The activations to train on, or the first window of those that are still being written.

    Raises:
        InputError: They are of bounded size, and FOLLOW is off, or the other way round.
    """
    if settings.follow:
        return open_first_window(settings.activations_dir, TimeLimit(settings.max_hours))
    store = ActivationStore(settings.activations_dir)
    require(
        store.rolling is None,
        f"FOLLOW must be on for {store.folder}, which was saved with MAX_DISK_GB. Pass --follow.",
    )
    return store


def batches_of(
    settings: TrainingSettings, store: ActivationStore, contexts: Contexts, folder: Path
) -> ShuffledBatches | FollowedBatches:
    """Batches of the training contexts, or with FOLLOW of those of one window after another."""
    if settings.follow:
        return followed(settings, store, folder)
    return shuffled(settings, store, contexts)


def followed(settings: TrainingSettings, store: ActivationStore, folder: Path) -> FollowedBatches:
    """Batches of one window after another; ``store`` has the first, or what is kept of it."""

    def of_window(store: ActivationStore, window: int) -> ShuffledBatches:
        training = store.split(settings.held_out, settings.n_held_out_tokens).training
        seed = int(np.random.SeedSequence([settings.seed, window]).generate_state(1)[0])
        return shuffled(dataclasses.replace(settings, seed=seed), store, training)

    is_new = "rows_a_shard" not in choices(folder)
    is_counted_through = chosen_once(folder, "is_counted_through", lambda: is_new)
    # With those held out, which are all in a few shards, such as the first.
    rows = chosen_once(folder, "rows_a_shard", lambda: store.n_tokens / len(store.shards))
    pool_bytes = POOLS * int(settings.pool_gib * 2**30)
    limit = TimeLimit(settings.max_hours)
    batches = FollowedBatches(
        store, folder, settings.batch_size, rows, pool_bytes, of_window, limit, is_counted_through
    )
    batches.claim()
    return batches


def cut_into_rounds(
    settings: TrainingSettings, batches: ShuffledBatches | FollowedBatches
) -> Rounds:
    """The rounds of a training.

    Raises:
        InputError: With FOLLOW a round is longer than a window: its shards would be needed for
            longer than there is room for them.
    """
    limit = batches.limit if settings.follow else TimeLimit(settings.max_hours)
    rounds = Rounds.cut(batches.n_steps(settings.n_passes), settings.log_every, limit)
    if settings.follow:
        shortest = min(map(int, np.diff([0, *batches.ends])))
        require(
            rounds.steps <= shortest,
            f"LOG_EVERY must be at most the steps of a window, {shortest:,}, with FOLLOW; rounds "
            f"have {rounds.steps:,}. Lower it, or save with a larger MAX_DISK_GB.",
        )
    return rounds


def check_options(settings: TrainingSettings, defaults: types.ModuleType) -> None:
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
    require(
        settings.selection_dtype != "bfloat16" or not card_lacks_bfloat16(),
        "SELECTION_DTYPE bfloat16 needs a graphics card that computes in it, and this one does "
        "not. Leave it at auto.",
    )
    require(
        settings.dead_after <= LONGEST_IDLE,
        f"DEAD_AFTER must be at most {LONGEST_IDLE:,} tokens, which are counted no further; it is "
        f"{settings.dead_after:,}.",
    )


def require_constants(settings: TrainingSettings) -> None:
    """Refuse a kind with an option that train_autoencoder.py has no constant for."""
    names = {*as_dict(settings), "d_model"}
    for option in find_kind(settings.kind).options():
        require(
            option in names,
            f"KIND {settings.kind!r} has the option {option}, for which train_autoencoder.py has "
            "no constant. Add one there, with a comment at the end of its line: "
            f"{option.upper()} = ...  # what it is",
        )


def build(
    settings: TrainingSettings, store: ActivationStore, total_steps: int
) -> SparseAutoencoder:
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
    variance = 1 / store.scale**2 - squared_mean / store.d_model
    require(
        variance * store.scale**2 > LEAST_VARIANCE,
        "Activations must vary; these are all but the same at every position. "
        "Choose another INPUT_NORMALIZER, or another layer.",
    )
    return variance**-0.5, store.mean


def begin(
    settings: TrainingSettings, store: ActivationStore, total_steps: int, folder: Path
) -> SparseAutoencoder:
    """The autoencoder to train: the folder's backup, or a new one, which `build` makes.

    Raises:
        InputError: The disk has no room for two backups: the last one goes when the next is whole.
    """
    size = BACKUP_BYTES * store.d_model * settings.n_latents
    require_disk_space(folder, 2 * size, (BACKUP_FILE,))
    return restore_backup(folder) or build(settings, store, total_steps)


def optimizer(settings: TrainingSettings, cls: type[SparseAutoencoder], total_steps: int) -> Adam:
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
        moments_dtype=settings.moments_dtype,
    )


def train(
    autoencoder: SparseAutoencoder,
    data: TrainingData,
    rounds: Rounds,
    folder: Path,
    backup_every: int,
    tensorboard: bool = False,
) -> SparseAutoencoder:
    """Fit a compiled autoencoder, going on from the step it is at.

    Args:
        autoencoder: Compiled and initialised, or a backup's.
        data: What to train and to measure on.
        rounds: How long to train.
        folder: Where ``backup.keras`` and ``training_log.csv`` go.
        backup_every: Rounds between backups.
        tensorboard: Write the metrics for TensorBoard too, into the folder.

    Raises:
        InputError: Too little is held out; the loss is no longer a number; or memory ran out.
    """
    first_round = int(autoencoder.step) // rounds.steps
    held_out, size = data.validation(autoencoder.n_latents)
    callbacks = [
        Progress(rounds, data.batch_size),
        StopOnNaN(),
        TrainingLog(folder / LOG_FILE, rounds, data.batch_size),
        *([TensorBoard(folder, rounds)] if tensorboard else []),
        Backup(folder, backup_every, rounds, data.followed),
    ]
    batches = data.batches_from(first_round * rounds.steps)
    recordings = _recordings(autoencoder, held_out[:size])
    with contextlib.closing(batches), out_of_memory_told(), recordings, _as_it_was() as watched:
        autoencoder.fit(
            ((batch,) for batch in watched(batches)),
            initial_epoch=first_round,
            epochs=rounds.n_rounds,
            steps_per_epoch=rounds.steps,
            validation_data=(held_out,),
            shuffle=False,
            validation_batch_size=size,
            callbacks=RoundCallbacks(
                callbacks, add_history=True, model=autoencoder, epochs=rounds.n_rounds
            ),
            verbose=0,
        )
    return autoencoder


@contextlib.contextmanager
def _recordings(autoencoder: SparseAutoencoder, held_out: np.ndarray) -> Iterator[None]:
    """While open, steps may be recorded on a card that has room for measuring too."""
    if torch_device() == "cuda":
        from utils.autoencoder.recorded import most_taken

        autoencoder.evaluate(held_out, batch_size=len(held_out), verbose=0)
        autoencoder.recorder.besides = most_taken()
    try:
        yield
    finally:
        if torch_device():
            autoencoder.recorder.clear()


@contextlib.contextmanager
def _as_it_was() -> Iterator[Callable[[Iterator[Tensor]], Iterator[Tensor]]]:
    """Yield a wrapper of batches; what they raise leaves as it is, which TensorFlow would wrap."""
    raised: list[Exception] = []

    def watched(batches: Iterator[Tensor]) -> Iterator[Tensor]:
        try:
            yield from batches
        except Exception as error:
            raised.append(error)
            raise

    try:
        yield watched
    except Exception:
        if raised:
            raise raised[0] from None
        raise


def measure(
    autoencoder: SparseAutoencoder, store: ActivationStore, contexts: Contexts, batch_size: int
) -> Fidelity:
    """The fidelity of an autoencoder on the activations of contexts; outliers and BOS left out."""
    together = measured_together(batch_size, autoencoder.n_latents)
    batches = store.batches(contexts, together)
    return measure_fidelity(autoencoder, (store.kept_rows(batch.contexts) for batch in batches))


def measured_together(batch_size: int, n_latents: int) -> int:
    """Rows to measure at once: fewer than a batch where the latents of one would fill memory."""
    return min(batch_size, max(n_shares(), MOST_MEASURED // n_latents))


@contextlib.contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Say what to do about an error of a framework that means that memory ran out.

    Raises:
        InputError: It did.
    """
    try:
        yield
    except Exception as error:  # of a class of the framework's own
        if not ran_out_of_memory(error):
            raise
        raise InputError(
            "Memory ran out while training. The last backup stays: once others have left the "
            "device, the same command goes on from it. Or train anew into another folder, with a "
            "lower BATCH_SIZE or N_LATENTS, or MOMENTS_DTYPE bfloat16 (torch); what FOLLOW has "
            "freed must be saved anew before."
        ) from error


def restore_backup(folder: Path) -> SparseAutoencoder | None:
    """The autoencoder, its optimiser and counters as last backed up, or None."""
    path = folder / BACKUP_FILE
    if not path.exists():
        return None
    with reading(path, "Delete it to train from the start."):
        autoencoder = keras.saving.load_model(path)
    print(f"Going on from step {int(autoencoder.step):,}.")
    return autoencoder
