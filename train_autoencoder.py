"""Train a sparse autoencoder on saved activations.

Reads data/activations (save_activations.py). Writes data/autoencoder: autoencoder.keras,
settings.json, metrics.json, training_log.csv, training_curves.png. Killed and started again, it
goes on from its last backup.

    python train_autoencoder.py --n-latents 16384 --k 32
"""

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Literal

from utils import artifacts
from utils.artifacts import (
    RunRecord,
    chosen_once,
    open_stage,
    read_json,
    require_disk_space,
    write_json,
)
from utils.backend import torch_device, use_backend
from utils.settings import Settings, read_settings, require, require_positive, run
from utils.terminal import in_bytes, in_rate

# --- data
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder to write to
HELD_OUT = 0.05  # share of the contexts, by document, kept out of training to measure on
N_HELD_OUT_TOKENS: int | None = 1_000_000  # most of these; None: the last contexts, HELD_OUT of all

# --- autoencoder
KIND = "topk"  # l1 (the paper's), topk, batch_topk, matryoshka, jumprelu, gated
N_LATENTS = 65_536  # size of the dictionary; 8 to 64 times d_model
DECODER_NORM: float | None = None  # of its rows at the start, where it is not held; None: 0.1
UNIT_DECODER: bool | None = None  # hold its rows at norm 1; None: by kind, l1 and gated do not
INPUT_NORMALIZER: Literal["centered", "scalar", "none"] = (
    "centered"  # E‖x‖² = d_model about the mean; scalar: not about it (paper)
)

# --- topk, batch_topk, matryoshka
K = 64  # active latents per token; fewer are easier to read, more reconstruct better
AUXK_COEFFICIENT = 1 / 32  # weight of the loss that revives dead latents; 0 turns it off
SELECTION_DTYPE: Literal["auto", "bfloat16", "float32"] = (
    "auto"  # of the product that chooses latents; auto: the faster
)
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # matryoshka: shares of the latents, rising to 1

# --- l1, gated, jumprelu
SPARSITY_COEFFICIENT = 2.0  # λ, the price of activity; 2, 5 and 10 in the paper (l1), mostly 5
SPARSITY_WARMUP: float | None = None  # share of the steps in which λ rises; None: 0.05; jumprelu 1
BANDWIDTH = 2.0  # jumprelu: width of the ramp that stands for the step in the gradient
TANH_SCALE = 1.0  # jumprelu: c, how soon an active latent costs the full λ
PREACTIVATION_COEFFICIENT = 3e-6  # jumprelu: λ_P, pulls up latents that never fire

# --- training
N_PASSES = 3.0  # passes over the activations; more than one only where data is scarce
BATCH_SIZE = 4_096  # tokens per step
LEARNING_RATE: float | None = None  # peak; None: by kind and size, see README
LEARNING_RATE_WARMUP = 0.0  # share of the steps over which it rises
LEARNING_RATE_DECAY = 0.2  # share of the steps, at the end, over which it falls to 0
LEARNING_RATE_SHAPE: Literal["linear", "cosine"] = "linear"  # of the fall; linear: the paper's
GRADIENT_CLIP_NORM: float | None = 1.0  # largest norm of the gradient; None: no clipping
MOMENTS_DTYPE: Literal["float32", "bfloat16"] = (
    "float32"  # of Adam's two moments; bfloat16 takes half their memory (torch)
)
DEAD_AFTER = 10_000_000  # a latent is dead that was silent for so many training tokens
POOL_GIB: float | None = None  # GiB shuffled together, held twice; None: 0.5, on a GPU up to 4
SEED = 0  # of the starting weights and of the order of the data

# --- scaling laws; a sweep instead of one training, see utils/autoencoder/scaling_laws.py
SWEEP_LATENTS: tuple[int, ...] = ()  # sizes of the dictionary, rising; as 576 1152 2304 4608
SWEEP_STEPS: tuple[int, ...] = ()  # numbers of steps, rising; as 64 128 256 512
SWEEP_LEARNING_RATES: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors, at the best sizes

# --- running
BACKEND: Literal["auto", "tensorflow", "jax", "torch"] = "auto"  # auto: the fastest on this machine
DISTRIBUTION: Literal["data", "model"] | None = None  # over devices (jax): of batches, of latents
LOG_EVERY = 100  # steps between lines of the log
TENSORBOARD = False  # also log to AUTOENCODER_DIR for TensorBoard (pip install tensorboard)
BACKUP_EVERY = 50  # log lines between backups; 25 bytes for each weight of W_dec
OVERWRITE = False  # delete an earlier run in AUTOENCODER_DIR that had other settings

# --- not settings
# A sweep may be widened by more latents and learning rates.
NOT_RECORDED = (
    "activations_dir", "autoencoder_dir", "distribution", "backup_every", "tensorboard",
    "overwrite", "sweep_latents", "sweep_learning_rates",
)  # fmt: skip
N_VALIDATION_TOKENS = 8_192
OUTPUTS = (
    "*.keras", "*.tfevents.*", artifacts.METRICS_FILE, artifacts.LOG_FILE, "training_curves.png",
    "scaling_laws.*",
)  # fmt: skip


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Check the settings, and open the activations.
    check(settings)
    backend = use_backend(settings.backend, huge_pages=True)
    from utils.activations.store import ActivationStore, spread
    from utils.autoencoder import scaling_laws, sweep, training
    from utils.autoencoder.callbacks import Rounds, read_log
    from utils.autoencoder.devices import use_devices
    from utils.autoencoder.fidelity import measure_fidelity
    from utils.autoencoder.saved import metrics_of, save_autoencoder
    from utils.autoencoder.training_curves import plot_training_curves

    training.check_options(settings, sys.modules[__name__])
    sweep.check(settings, sys.modules[__name__])
    sizes = settings.sweep_latents or (settings.n_latents,)
    use_devices(settings.distribution, settings.batch_size, sizes)
    store = ActivationStore(settings.activations_dir)
    record = RunRecord.of(settings, NOT_RECORDED, activations=store.fingerprint)

    with open_stage(settings.autoencoder_dir, record, OUTPUTS, settings.overwrite) as folder:
        if is_finished(folder):
            return
        settings = as_begun(settings, folder, store)
        store.verify(folder)
        if settings.sweep_latents:
            print(scaling_laws.describe(scaling_laws.measure_laws(settings, store, folder)))
            return

        # 2. Split the contexts, and cut the training into rounds.
        split = store.split(settings.held_out, settings.n_held_out_tokens)
        batches = training.shuffled(settings, store, split.training)
        rounds = Rounds.cut(batches.n_steps(settings.n_passes), settings.log_every)
        validated = spread(split.held_out, max(1, N_VALIDATION_TOKENS // store.context_length))
        rows = store.kept_rows(validated).astype("float32")
        data = training.TrainingData(batches.from_step, rows, settings.batch_size)
        print(plan(settings, store, batches, rounds, backend))

        # 3. Build the autoencoder on the data's scale and mean, or take the backup's.
        # Two backups must fit, for the last one goes when the next is whole.
        require_disk_space(folder, 2 * training.BACKUP_BYTES * store.d_model * settings.n_latents)
        autoencoder = training.begin(settings, store, rounds.total_steps, folder)

        # 4. Train.
        autoencoder = training.train(
            autoencoder, data, rounds, folder, settings.backup_every, settings.tensorboard
        )

        # 5. Measure on tokens held out, and save.
        together = training.measured_together(settings.batch_size, settings.n_latents)
        held_out = store.batches(split.held_out, together)
        fidelity = measure_fidelity(autoencoder, (store.kept_rows(b.contexts) for b in held_out))
        save_autoencoder(autoencoder, folder / artifacts.AUTOENCODER_FILE)
        log = read_log(folder / artifacts.LOG_FILE)
        plot_training_curves(log, folder / "training_curves.png")
        metrics = metrics_of(autoencoder, fidelity, log, store, backend) | {"split": split.rule}
        write_json(folder / artifacts.METRICS_FILE, metrics)
        (folder / artifacts.BACKUP_FILE).unlink(missing_ok=True)
        print(describe(metrics))


def as_begun(settings: Settings, folder: Path, store) -> Settings:
    """The settings, with what an earlier version did where the folder was begun by one.

    A pool left to the machine is the one that the run began with, on whatever machine that was.

    Raises:
        InputError: The pool does not fit into memory.
    """
    from utils.activations.batches import default_pool_gib, require_pools_fit

    recorded, added = read_json(folder / artifacts.SETTINGS_FILE), artifacts.ADDED[settings.script]
    earlier = {name: value for name, value in added.items() if name not in recorded}
    settings = dataclasses.replace(settings, **earlier)
    if settings.pool_gib is None:
        pool_gib = chosen_once(folder, "pool_gib", lambda: default_pool_gib(torch_device()))
        settings = dataclasses.replace(settings, pool_gib=pool_gib)
    require_pools_fit(settings.pool_gib, store, torch_device())
    return settings


def check(settings: Settings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    require_positive(
        settings, "n_held_out_tokens", "n_latents", "k", "decoder_norm", "bandwidth", "tanh_scale",
        "n_passes", "batch_size", "learning_rate", "gradient_clip_norm", "dead_after", "pool_gib",
        "log_every", "backup_every",
    )  # fmt: skip
    for name in ("sparsity_coefficient", "preactivation_coefficient", "auxk_coefficient", "seed"):
        value = getattr(settings, name)
        require(value is None or value >= 0, f"{name.upper()} must not be negative; it is {value}.")
    for name in ("sparsity_warmup", "learning_rate_warmup", "learning_rate_decay"):
        share = getattr(settings, name)
        require(
            share is None or 0 <= share <= 1,
            f"{name.upper()} must be a share from 0 to 1; it is {share}.",
        )
    require(
        0 < settings.held_out < 1, f"HELD_OUT must be between 0 and 1; it is {settings.held_out}."
    )
    require(
        not settings.tensorboard or importlib.util.find_spec("tensorboard") is not None,
        "TENSORBOARD needs a package that is not installed: pip install tensorboard.",
    )
    prefixes = settings.prefixes
    require(
        all(0 < a < b for a, b in itertools.pairwise(prefixes)) and prefixes[-1:] == (1,),
        f"PREFIXES must be shares that rise to 1; they are {prefixes}.",
    )


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished training, whose result is then printed."""
    if not (folder / artifacts.METRICS_FILE).exists():
        return False
    metrics_path = folder / artifacts.METRICS_FILE
    metrics = read_json(metrics_path, "Delete it to finish the training again.")
    remedy = f"Delete {metrics_path} too, and run the same command to train it again."
    with artifacts.reading(folder / artifacts.AUTOENCODER_FILE, remedy):
        pass
    (folder / artifacts.BACKUP_FILE).unlink(missing_ok=True)  # a kill at the very end left it
    print(f"{folder} is finished.\n{describe(metrics)}")
    return True


def plan(settings, store, batches, rounds, backend: str) -> str:
    """What is about to be done, in words.

    Raises:
        InputError: Memory does not hold it.
    """
    from utils.autoencoder.memory import require_memory

    memory = require_memory(settings, store.d_model, batches.pool_bytes)
    tokens = rounds.total_steps * settings.batch_size
    idle = (
        "\nDEAD_AFTER is more than that: no latent can count as dead, and none is revived."
        if settings.dead_after >= tokens
        else ""
    )
    return (
        f"Training {settings.kind} with {settings.n_latents:,} latents of width {store.d_model} "
        f"on {backend}: {rounds.total_steps:,} steps of {settings.batch_size:,} tokens, "
        f"{tokens:,} in all.{idle}{memory}"
    )


def describe(metrics: dict) -> str:
    """The result in words."""
    memory = in_bytes(1e9 * metrics["peak_memory_gb"])
    if metrics["peak_accelerator_memory_gb"]:
        memory += f", of the accelerator {in_bytes(1e9 * metrics['peak_accelerator_memory_gb'])}"
    return (
        f"On {metrics['n_held_out_tokens']:,} held-out tokens: variance explained "
        f"{1 - metrics['fvu']:.3f} (FVU {metrics['fvu']:.3f}), L0 {metrics['l0']:.1f}. "
        f"Dead latents {metrics['dead_fraction']:.2%}. Trained on {metrics['n_tokens']:,} tokens "
        f"at {in_rate(metrics['tokens_per_second'])}; peak memory {memory}."
    )


if __name__ == "__main__":
    run(main)
