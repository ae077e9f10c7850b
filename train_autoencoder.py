"""Train a sparse autoencoder on saved activations.

Reads data/activations (save_activations.py). Writes data/autoencoder: autoencoder.keras,
settings.json, metrics.json, training_log.csv, training_curves.png. Killed and started again, it
goes on from its last backup.

    python train_autoencoder.py --n-latents 16384 --k 32
"""

import sys

from utils.artifacts import open_stage, read_json, require_disk_space, write_json
from utils.backend import use_backend
from utils.settings import as_dict, read_settings, require, require_positive, run

# --- data
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder to write to
HELD_OUT = 0.05  # share of the contexts, at the end, kept out of training to measure on

# --- autoencoder
KIND = "topk"  # l1 (the paper's) or topk
N_LATENTS = 65_536  # size of the dictionary; 8 to 64 times d_model
K = 64  # topk: active latents per token; fewer are easier to read, more reconstruct better
AUXK_COEFFICIENT = 1 / 32  # topk: weight of the loss that revives dead latents; 0 turns it off
L1_COEFFICIENT = 5.0  # l1: λ, the price of activity; the paper compares 2, 5 and 10
L1_WARMUP = 0.05  # l1: share of the steps over which λ rises from 0
DECODER_NORM: float | None = None  # norm of decoder rows at the start; None: 0.1 (l1), 1 (topk)

# --- training
N_PASSES = 3.0  # passes over the activations; more than one only where data is scarce
BATCH_SIZE = 4_096  # tokens per step
LEARNING_RATE: float | None = None  # peak; None: 5e-5 (l1), 1e-3 · √(4,096 / N_LATENTS) (topk)
LEARNING_RATE_WARMUP = 0.0  # share of the steps over which it rises
LEARNING_RATE_DECAY = 0.2  # share of the steps, at the end, over which it falls to 0
GRADIENT_CLIP_NORM: float | None = 1.0  # largest norm of the gradient; None: no clipping
DEAD_AFTER = 10_000_000  # a latent is dead that was silent for so many training tokens
SEED = 0  # of the starting weights and of the order of the data

# --- running
BACKEND = "auto"  # tensorflow, jax, torch; auto: one that sees an accelerator, else the fastest
LOG_EVERY = 100  # steps between lines of the log
BACKUP_EVERY = 50  # log lines between backups; one takes 25 bytes for each weight of W_dec
OVERWRITE = False  # delete an earlier run in AUTOENCODER_DIR that had other settings

NOT_RECORDED = ("activations_dir", "autoencoder_dir", "backup_every", "overwrite")
N_VALIDATION_TOKENS = 8_192
OUTPUTS = ("*.keras", "metrics.json", "training_log.csv", "training_curves.png")


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Check the settings, and open the activations.
    check(settings)
    backend = use_backend(settings.backend)
    from utils import training
    from utils.activations import ActivationStore
    from utils.batches import ShuffledBatches
    from utils.fidelity import measure_fidelity
    from utils.plots import plot_training_curves

    training.find_kind(settings.kind)
    store = ActivationStore(settings.activations_dir)
    recorded = {"script": "train_autoencoder.py"}
    recorded |= {**as_dict(settings, leave_out=NOT_RECORDED), "activations": store.fingerprint}

    with open_stage(settings.autoencoder_dir, recorded, OUTPUTS, settings.overwrite) as folder:
        if (folder / "metrics.json").exists():
            (folder / "backup.keras").unlink(missing_ok=True)  # a kill at the very end left it
            print(f"{folder} is finished.\n{describe(read_json(folder / 'metrics.json'))}")
            return
        store.verify()

        # 2. Split the contexts, and cut the training into rounds.
        training_contexts, held_out_contexts = store.split(settings.held_out)
        batches = ShuffledBatches(store, training_contexts, settings.batch_size, settings.seed)
        rounds = training.Rounds.cut(batches.n_steps(settings.n_passes), settings.log_every)
        print(plan(settings, store, rounds, backend))

        # 3. Build the autoencoder, starting from the data's scale and mean.
        # A backup holds weights and two moments; the last one goes when the next is whole.
        require_disk_space(folder, 50 * store.d_model * settings.n_latents)
        autoencoder = training.build(settings, store, rounds.total_steps)

        # 4. Train, going on from a backup if there is one.
        n_validation = max(1, N_VALIDATION_TOKENS // store.context_length)
        autoencoder = training.train(
            autoencoder,
            batches.from_step,
            store.kept_rows(held_out_contexts[:n_validation]).astype("float32"),
            rounds,
            settings.batch_size,
            folder,
            settings.backup_every,
        )

        # 5. Measure on tokens held out, and save.
        fidelity = measure_fidelity(
            autoencoder, store.batches(held_out_contexts, settings.batch_size)
        )
        training.save_autoencoder(autoencoder, folder / "autoencoder.keras")
        log = training.read_log(folder / "training_log.csv")
        plot_training_curves(log, folder / "training_curves.png")
        metrics = training.metrics(autoencoder, fidelity, log, store, backend)
        write_json(folder / "metrics.json", metrics)
        (folder / "backup.keras").unlink(missing_ok=True)
        print(describe(metrics))


def check(settings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    require_positive(
        settings, "n_latents", "k", "l1_coefficient", "decoder_norm", "n_passes", "batch_size",
        "learning_rate", "gradient_clip_norm", "dead_after", "log_every", "backup_every",
    )  # fmt: skip
    require(
        settings.kind == "l1" or settings.k <= settings.n_latents,
        f"K must be at most N_LATENTS, {settings.n_latents:,}; it is {settings.k:,}.",
    )
    require(
        0 < settings.held_out < 1, f"HELD_OUT must be between 0 and 1; it is {settings.held_out}."
    )
    for name in ("l1_warmup", "learning_rate_warmup", "learning_rate_decay"):
        share = getattr(settings, name)
        require(0 <= share <= 1, f"{name.upper()} must be a share from 0 to 1; it is {share}.")
    for name in ("auxk_coefficient", "seed"):
        value = getattr(settings, name)
        require(value >= 0, f"{name.upper()} must not be negative; it is {value}.")


def plan(settings, store, rounds, backend: str) -> str:
    """What is about to be done, in words."""
    tokens = rounds.total_steps * settings.batch_size
    idle = (
        "\nDEAD_AFTER is more tokens than this: none can count as dead, and none is revived."
        if settings.dead_after >= tokens
        else ""
    )
    return (
        f"Training {settings.kind} with {settings.n_latents:,} latents of width {store.d_model} "
        f"on {backend}: {rounds.total_steps:,} steps of {settings.batch_size:,} tokens, "
        f"{tokens / 1e6:,.1f} M in all.{idle}"
    )


def describe(metrics: dict) -> str:
    """The result in words."""
    return (
        f"On {metrics['n_held_out_tokens']:,} held-out tokens: variance explained "
        f"{1 - metrics['fvu']:.3f} (FVU {metrics['fvu']:.3f}), L0 {metrics['l0']:.1f}. "
        f"Dead latents {metrics['dead_fraction']:.2%}. Trained on {metrics['n_tokens']:,} tokens "
        f"at {metrics['tokens_per_second']:,.0f} tokens/s."
    )


if __name__ == "__main__":
    run(main)
