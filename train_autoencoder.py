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
    write_json,
)
from utils.autoencoder.several import jobs_of, train_several
from utils.backend import torch_device, use_backend
from utils.settings import (
    Settings,
    as_dict,
    read_settings,
    require,
    require_positive,
    run,
)
from utils.terminal import in_bytes, in_rate

# --- data
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder to write to
HELD_OUT = 0.05  # share of the contexts, by document, kept out of training to measure on
N_HELD_OUT_TOKENS: int | None = 1_000_000  # most of these; None: the last contexts, HELD_OUT of all

# --- autoencoder
KIND = "topk"  # l1 (the paper's), topk, batch_topk, matryoshka, jumprelu, gated
N_LATENTS: int | tuple[int, ...] = 65_536  # size of the dictionary; several: a folder each
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
FOLLOW = False  # train while save_activations.py writes, window by window (its MAX_DISK_GB)
POOL_GIB: float | None = None  # GiB shuffled together, held twice; None: 0.5, on a GPU up to 4
SEED = 0  # of the starting weights and of the order of the data

# --- scaling laws; a sweep instead of one training, see utils/autoencoder/scaling_laws.py
SWEEP_LATENTS: tuple[int, ...] = ()  # sizes of the dictionary, rising; as 576 1152 2304 4608
SWEEP_STEPS: tuple[int, ...] = ()  # numbers of steps, rising; as 64 128 256 512
SWEEP_LEARNING_RATES: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors, at the best sizes

# --- instead of training: take another tool's autoencoder, see utils/autoencoder/formats/
IMPORT_FROM: str | None = None  # folder or hub name, as EleutherAI/sae-llama-3.1-8b-32x
HOOKPOINT: str | None = None  # which of its autoencoders, as layers.15; None: its only one
ACCEPT_MISMATCH = False  # take one of another model, or that the check on load refuses

# --- afterwards: for other tools, see utils/autoencoder/formats/; of a finished training too
EXPORT: tuple[Literal["saelens", "sparsify"], ...] = ()  # tools to write files for
EXPORT_DIR = "data/export"  # a folder in it for each tool; earlier files there are replaced
PUSH_TO_HUB: str | None = None  # repository of the Hugging Face Hub to upload to, owner/name
DRY_RUN = True  # only list what PUSH_TO_HUB would upload
PRIVATE = True  # make that repository private

# --- running
BACKEND: Literal["auto", "tensorflow", "jax", "torch"] = "auto"  # auto: the fastest on this machine
DISTRIBUTION: Literal["data", "model"] | None = None  # over devices (jax): of batches, of latents
LOG_EVERY = 100  # steps between lines of the log
TENSORBOARD = False  # also log to AUTOENCODER_DIR for TensorBoard (pip install tensorboard)
BACKUP_EVERY = 50  # log lines between backups; 25 bytes for each weight of W_dec
MAX_HOURS: float | None = None  # stop in time, with status 75; the same command goes on
OVERWRITE = False  # delete an earlier run in AUTOENCODER_DIR that had other settings

# --- not settings
# A sweep may be widened by more latents and learning rates.
NOT_RECORDED = (
    "activations_dir", "autoencoder_dir", "distribution", "backup_every", "tensorboard",
    "max_hours", "overwrite", "sweep_latents", "sweep_learning_rates", "accept_mismatch", "export",
    "export_dir", "push_to_hub", "dry_run", "private",
)  # fmt: skip
OF_AN_IMPORT = ("import_from", "hookpoint", "held_out", "n_held_out_tokens")  # recorded, of one
N_VALIDATION_TOKENS = 8_192
OUTPUTS = (
    "*.keras", "*.tfevents.*", artifacts.METRICS_FILE, artifacts.LOG_FILE, "training_curves.png",
    "scaling_laws.*", "hub",
)  # fmt: skip


def main() -> None:
    settings = read_settings(sys.modules[__name__])
    if jobs := jobs_of(settings):
        return train_several(settings, jobs)

    # 1. Check the settings, and open the activations.
    check(settings)
    backend = begin_backend(settings)
    from utils.autoencoder import scaling_laws, sweep, training
    from utils.autoencoder.callbacks import read_log
    from utils.autoencoder.devices import use_devices
    from utils.autoencoder.saved import metrics_of, save_autoencoder
    from utils.autoencoder.training_curves import plot_training_curves

    training.check_options(settings, sys.modules[__name__])
    sweep.check(settings, sys.modules[__name__])
    sizes = settings.sweep_latents or (settings.n_latents,)
    use_devices(settings.distribution, settings.batch_size, sizes)
    store = training.open_store(settings)
    check_export(settings, store)
    record = RunRecord.of(settings, not_recorded(settings), activations=store.fingerprint)

    with open_stage(settings.autoencoder_dir, record, OUTPUTS, settings.overwrite) as folder:
        take_import(settings, store, folder, backend)
        if is_finished(folder, settings):
            export(settings, store, folder)
            return
        settings = as_begun(settings, folder, store)
        store.verify(folder)
        if settings.sweep_latents:
            print(scaling_laws.describe(scaling_laws.measure_laws(settings, store, folder)))
            return

        # 2. Split the contexts, and cut the training into rounds.
        split = store.split(settings.held_out, settings.n_held_out_tokens)
        batches = training.batches_of(settings, store, split.training, folder)
        rounds = training.cut_into_rounds(settings, batches)
        data = training_data(settings, store, batches, split.held_out)
        print(plan(settings, store, batches, rounds, backend))

        # 3. Build the autoencoder on the data's scale and mean, or take the backup's.
        autoencoder = training.begin(settings, store, rounds.total_steps, folder)

        # 4. Train.
        autoencoder = training.train(
            autoencoder, data, rounds, folder, settings.backup_every, settings.tensorboard
        )

        # 5. Measure on tokens held out, and save.
        store = batches.to_measure()
        held_out = store.split(settings.held_out, settings.n_held_out_tokens).held_out
        fidelity = training.measure(autoencoder, store, held_out, settings.batch_size)
        save_autoencoder(autoencoder, folder / artifacts.AUTOENCODER_FILE)
        log = read_log(folder / artifacts.LOG_FILE)
        plot_training_curves(log, folder / "training_curves.png")
        metrics = metrics_of(autoencoder, fidelity, log, store, backend) | {"split": split.rule}
        write_json(folder / artifacts.METRICS_FILE, metrics)
        clean_up(folder, settings)
        print(describe(metrics))
        export(settings, store, folder)


# What is of other tools is imported where it is asked for: it loads PyTorch.


def take_import(settings: Settings, store, folder: Path, backend: str) -> None:
    """Make the folder's autoencoder from another tool's, if ``IMPORT_FROM`` names one."""
    if settings.import_from is None:
        return
    from utils.autoencoder.formats.importing import import_autoencoder

    import_autoencoder(settings, store, folder, backend)


def check_export(settings: Settings, store) -> None:
    """Refuse, before anything is trained, an export that would fail when it is."""
    if settings.export or settings.push_to_hub is not None:
        from utils.autoencoder.formats import exporting

        exporting.check(settings, store)


def export(settings: Settings, store, folder: Path) -> None:
    """Write the finished autoencoder of a folder for the tools in ``EXPORT``."""
    if settings.export or settings.push_to_hub is not None:
        from utils.autoencoder.formats import exporting

        exporting.export(settings, store, folder)


def begin_backend(settings: Settings) -> str:
    """Choose the framework; returns its name."""
    if settings.import_from or settings.export or settings.push_to_hub:
        import utils.language_model  # noqa: F401  it crashes if it is imported after TensorFlow

    return use_backend(settings.backend, keep_memory=True, huge_pages=True)


def training_data(settings: Settings, store, batches, held_out):
    """The batches to train on, and some activations of contexts held out to measure meanwhile."""
    from utils.activations.store import spread
    from utils.autoencoder.training import TrainingData

    contexts = spread(held_out, max(1, N_VALIDATION_TOKENS // store.context_length))
    rows = store.kept_rows(contexts).astype("float32")
    followed = batches if settings.follow else None
    return TrainingData(batches.from_step, rows, settings.batch_size, followed)


def not_recorded(settings: Settings) -> tuple[str, ...]:
    """The settings that the outputs do not depend on; of an import, all that are of training."""
    if settings.import_from is None:
        return NOT_RECORDED
    return tuple(name for name in as_dict(settings) if name not in OF_AN_IMPORT)


def clean_up(folder: Path, settings: Settings) -> None:
    """Remove what only an unfinished training needs."""
    (folder / artifacts.BACKUP_FILE).unlink(missing_ok=True)
    if settings.follow:
        from utils.activations.following import free_all

        free_all(settings.activations_dir)


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
        "log_every", "backup_every", "max_hours",
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
        not (settings.follow and settings.sweep_latents),
        "SWEEP_LATENTS trains often on the same activations, which FOLLOW frees. Leave one out.",
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
    check_import(settings)


def check_import(settings: Settings) -> None:
    """Refuse settings of training, those that differ from the constants, where there is none."""
    require(
        settings.import_from is not None or settings.hookpoint is None,
        f"HOOKPOINT is for IMPORT_FROM, which is not given; it is {settings.hookpoint}. Leave it "
        "out, or give both.",
    )
    of_either = {*NOT_RECORDED, *OF_AN_IMPORT, "backend", "batch_size"}
    foreign = [
        name.upper()
        for name, value in as_dict(settings).items()
        if name not in of_either and value != as_dict(type(settings)())[name]
    ]
    require(
        settings.import_from is None or not foreign,
        f"{', '.join(foreign)} is of training, and with IMPORT_FROM nothing is trained. Leave it "
        "out.",
    )


def is_finished(folder: Path, settings: Settings) -> bool:
    """Whether a folder holds a finished training, whose result is then printed."""
    if not (folder / artifacts.METRICS_FILE).exists():
        return False
    metrics_path = folder / artifacts.METRICS_FILE
    metrics = read_json(metrics_path, "Delete it to finish the training again.")
    remedy = f"Delete {metrics_path} too, and run the same command to train it again."
    with artifacts.reading(folder / artifacts.AUTOENCODER_FILE, remedy):
        pass
    clean_up(folder, settings)  # a kill at the very end left it
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
    if "imported" in metrics:
        made = f"Imported, {metrics['kind']} with {metrics['n_latents']:,} latents"
    else:
        rate = in_rate(metrics["tokens_per_second"])
        made = f"Trained on {metrics['n_tokens']:,} tokens at {rate}"
    return (
        f"On {metrics['n_held_out_tokens']:,} held-out tokens: variance explained "
        f"{1 - metrics['fvu']:.3f} (FVU {metrics['fvu']:.3f}), L0 {metrics['l0']:.1f}. "
        f"Dead latents {metrics['dead_fraction']:.2%}. {made}; peak memory {memory}."
    )


if __name__ == "__main__":
    run(main)
