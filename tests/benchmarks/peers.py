"""Train one autoencoder with another library, on this project's batches, and measure it.

Runs in the peers' environment (peers-requirements.txt), one process a run:

    .venv-peers/bin/python -m tests.benchmarks.peers --peer saelens --kind topk --n-latents 4608 \
        --steps 275 --learning-rate 3e-4 --output result.json

What is the same for all: the batches and their order, their scale (E‖x‖² = d_model, so that a
peer's own normalisation is off), the held-out tokens and the measures. What is the peer's own: its
initialisation, loss, optimiser, schedule, clipping and decoder normalisation, as its defaults and
documentation have them, but for the lengths that they count in steps or tokens:

- Warm-ups and averaging windows are meant for runs of some 30,000 steps. They are the same share
  of a run here (`scaled`): left as they are, a short run would end within the warm-up, and the
  threshold of a BatchTopK autoencoder would never be set.
- A latent is dead, for AuxK too, after `DEAD_AFTER` tokens rather than 10,000,000.

A step is timed by itself: batches are read beforehand, and the first steps are left out.
"""

import argparse
import importlib.metadata
import resource
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from utils.activations.batches import ShuffledBatches
from utils.activations.store import ActivationStore, Contexts
from utils.artifacts import write_json

USUAL_STEPS = 30_000
DEAD_AFTER = 500_000
HELD_OUT = 0.05
N_HELD_OUT_TOKENS = 1_000_000
N_SAVED_CONTEXTS = 64
EVALUATION_BATCH = 2_048
NOT_RECORDED = ("activations", "output", "reconstruction", "directions")


def scaled(n: float, steps: int) -> int:
    """What ``n`` steps of a usual run are in one of ``steps``."""
    return max(1, round(n * steps / USUAL_STEPS))


class SAELens:
    """SAETrainer of sae-lens, with the recipes of its docs/training_saes.md.

    Learning rate constant, then falling over the last fifth. L1 and gated: λ rises over 5% of the
    steps. JumpReLU: the tanh penalty, which rises over all steps, and the pre-activation loss; the
    step penalty is, as the documentation says, for billions of tokens.
    """

    package = "sae-lens"

    def __init__(self, options: argparse.Namespace, d_model: int):
        import sae_lens
        from sae_lens.config import SAETrainerConfig

        steps, n = options.steps, options.n_latents
        common = {"d_in": d_model, "d_sae": n}
        batch_topk = {"k": options.k, "topk_threshold_lr": 1 / scaled(1_000, steps)}
        penalty = {
            "l1_coefficient": options.sparsity_coefficient,
            "l1_warm_up_steps": steps // 20,
        }
        jumprelu = {
            "l0_coefficient": options.sparsity_coefficient,
            "l0_warm_up_steps": steps,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "pre_act_loss_coefficient": 3e-6,
            "jumprelu_tanh_scale": options.tanh_scale,
        }
        name, settings = {
            "topk": ("TopK", {"k": options.k}),
            "batch_topk": ("BatchTopK", batch_topk),
            "matryoshka": (
                "MatryoshkaBatchTopK",
                {**batch_topk, "matryoshka_widths": [n // 4, n // 2, n]},
            ),
            "jumprelu": ("JumpReLU", jumprelu),
            "gated": ("Gated", penalty),
            "l1": ("Standard", penalty),
        }[options.kind]
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**common, **settings)
        self.trainer = sae_lens.SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * options.batch_size,
                train_batch_size_samples=options.batch_size,
                lr=options.learning_rate,
                lr_end=options.learning_rate / 10,  # used by other schedules, required by all
                lr_decay_steps=steps // 5,
                dead_feature_window=options.dead_after // options.batch_size,
                autocast=options.autocast,
            ),
            getattr(sae_lens, f"{name}TrainingSAE")(config),
            data_provider=iter(()),
        )
        self.batch_size = options.batch_size

    def update(self, step: int, x: torch.Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def finish(self) -> None:
        """Turn into the library's own inference form: BatchTopK becomes JumpReLU."""
        from sae_lens import SAE

        with tempfile.TemporaryDirectory() as folder:
            self.trainer.sae.save_inference_model(folder)
            self.inference = SAE.load_from_disk(folder)

    def encode_decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.inference.encode(x)
        return (latents != 0).sum(1), self.inference.decode(latents)

    def idle_tokens(self) -> torch.Tensor:
        return self.trainer.n_forward_passes_since_fired * self.batch_size


class DictionaryLearning:
    """Trainers of dictionary-learning; learning rate falling over the last fifth, as its demo."""

    package = "dictionary-learning"

    def __init__(self, options: argparse.Namespace, d_model: int):
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        fractions = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
        trainer, settings = {
            "topk": (TopKTrainer, {}),
            "batch_topk": (BatchTopKTrainer, {}),
            "matryoshka": (MatryoshkaBatchTopKTrainer, {"group_fractions": fractions}),
        }[options.kind]
        thousand = scaled(1_000, options.steps)
        self.trainer = trainer(
            steps=options.steps,
            activation_dim=d_model,
            dict_size=options.n_latents,
            k=options.k,
            layer=0,
            lm_name="",
            lr=options.learning_rate,
            warmup_steps=thousand,
            decay_start=int(0.8 * options.steps),
            threshold_beta=1 - 1 / thousand,
            threshold_start_step=thousand,
            seed=0,
            device="cpu",
            **settings,
        )
        self.trainer.dead_feature_threshold = options.dead_after
        self.autocast = options.autocast

    def update(self, step: int, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            self.trainer.update(step, x)

    def finish(self) -> None:
        """Nothing: the trained dictionary encodes with its threshold where it has one."""

    def encode_decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reconstruction, latents = self.trainer.ae(x, output_features=True)
        return (latents != 0).sum(1), reconstruction

    def idle_tokens(self) -> torch.Tensor:
        return self.trainer.num_tokens_since_fired


class Sparsify:
    """SparseCoder of eai-sparsify, and of its Trainer, which wants a language model, the step."""

    package = "eai-sparsify"
    auxk_alpha = 1 / 32

    def __init__(self, options: argparse.Namespace, d_model: int):
        with mock.patch("torch.cuda.is_bf16_supported", return_value=False):
            from sparsify import SparseCoder, SparseCoderConfig

        torch.set_float32_matmul_precision("high")
        config = SparseCoderConfig(num_latents=options.n_latents, k=options.k)
        self.coder = SparseCoder(d_model, config)
        self.idle = torch.zeros(options.n_latents, dtype=torch.long)
        self.autocast, self.dead_after = options.autocast, options.dead_after
        self.schedule = None
        if options.optimizer == "adam":
            from transformers import get_linear_schedule_with_warmup

            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=options.learning_rate)
            self.schedule = get_linear_schedule_with_warmup(
                self.optimizer, scaled(1_000, options.steps), options.steps
            )
        else:
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            signs = SignSGD(self.coder.parameters(), lr=options.learning_rate)
            self.optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
            self.optimizer.train()

    def update(self, step: int, x: torch.Tensor) -> None:
        if step == 0:
            self.coder.b_dec.data = x.mean(0)
        self.coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.coder(x, dead_mask=self.idle > self.dead_after)
        (out.fvu + self.auxk_alpha * out.auxk_loss).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule:
            self.schedule.step()
        self.idle += len(x)
        self.idle[out.latent_indices[out.latent_acts > 0]] = 0

    def finish(self) -> None:
        """Take the averaged weights of the schedule-free optimiser."""
        if not self.schedule:
            self.optimizer.eval()

    def encode_decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices, _ = self.coder.encode(x)
        return (values > 0).sum(1), self.coder.decode(values, indices)

    def idle_tokens(self) -> torch.Tensor:
        return self.idle


PEERS = {"saelens": SAELens, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    store = ActivationStore(options.activations)
    training, held_out, _ = store.split(HELD_OUT, N_HELD_OUT_TOKENS)
    batches = read_batches(store, training, options)
    peer = PEERS[options.peer](options, store.d_model)
    seconds = [seconds_of(peer, step, batch) for step, batch in enumerate(batches)]
    timed = seconds[options.untimed :]
    result = {
        **{name: value for name, value in vars(options).items() if name not in NOT_RECORDED},
        "version": importlib.metadata.version(peer.package),
        "torch": torch.__version__,
        "n_tokens": len(batches) * options.batch_size,
        "tokens_per_second": len(timed) * options.batch_size / sum(timed),
        "median_step_seconds": statistics.median(timed),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if options.steps * options.batch_size >= options.dead_after:
        result["dead_fraction"] = float((peer.idle_tokens() >= options.dead_after).float().mean())
    if not options.speed_only:
        peer.finish()
        result |= measure(peer, store, held_out)
    if options.reconstruction:
        save_reconstruction(peer, store, held_out, Path(options.reconstruction))
    if options.directions:
        np.save(options.directions, peer.inference.W_dec.detach().numpy())
    write_json(Path(options.output), result)


def parse() -> argparse.Namespace:
    """The options; a result holds them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("topk", "batch_topk", "matryoshka", "jumprelu", "gated", "l1")
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--kind", choices=kinds, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--n-latents", type=int, required=True)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sparsity-coefficient", type=float, default=5.0, help="λ of a penalty")
    parser.add_argument("--tanh-scale", type=float, default=4.0, help="of jumprelu's penalty")
    parser.add_argument("--dead-after", type=int, default=DEAD_AFTER, help="tokens")
    parser.add_argument("--optimizer", choices=("adam", "signum"), default="adam")
    parser.add_argument("--batch-size", type=int, default=2_048)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--untimed", type=int, default=3, help="first steps, not timed")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 under torch.autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed-only", action="store_true", help="measure nothing on held-out")
    parser.add_argument("--activations", default="data/demo/activations")
    parser.add_argument("--output", required=True, help=".json to write")
    parser.add_argument("--reconstruction", help=".npy to write, of the first held-out contexts")
    parser.add_argument("--directions", help=".npy to write, the decoder rows; SAELens alone")
    return parser.parse_args()


def read_batches(
    store: ActivationStore, contexts: Contexts, options: argparse.Namespace
) -> list[torch.Tensor]:
    """The batches of a whole run, scaled, in memory."""
    source = ShuffledBatches(store, contexts, options.batch_size, seed=0).from_step(0)
    batches = [
        torch.from_numpy(next(source).astype(np.float32) * store.scale)
        for _ in range(options.steps)
    ]
    source.close()
    return batches


def seconds_of(peer, step: int, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    peer.update(step, batch)
    return time.perf_counter() - start


@torch.no_grad()
def reconstruct(peer, store: ActivationStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of active latents (batch,) and raw reconstruction (batch, d_model) of raw rows."""
    n_active, reconstruction = peer.encode_decode(torch.from_numpy(rows * store.scale))
    return n_active.numpy(), reconstruction.float().numpy() / store.scale


def measure(peer, store: ActivationStore, held_out: Contexts) -> dict[str, float]:
    """FVU, as in `utils.autoencoder.fidelity`, and L0 over the kept rows of some contexts."""
    n_rows = n_active = error = squares = 0.0
    total = np.zeros(store.d_model)
    for batch in store.batches(held_out, EVALUATION_BATCH):
        active, reconstruction = reconstruct(peer, store, batch.rows)
        rows = batch.rows.astype(np.float64)
        n_rows += len(rows)
        n_active += float(active.sum())
        error += float(np.square(rows - reconstruction).sum())
        squares += float(np.square(rows).sum())
        total += rows.sum(axis=0)
    return {
        "fvu": error / (squares - float(total @ total) / n_rows),
        "l0": n_active / n_rows,
        "n_held_out_tokens": int(n_rows),
    }


def save_reconstruction(peer, store: ActivationStore, held_out: Contexts, path: Path) -> None:
    """Write the raw reconstruction of contexts, (contexts, context_length, d_model) float32."""
    contexts = store.read("activations", held_out[:N_SAVED_CONTEXTS]).astype(np.float32)
    np.save(path, np.stack([reconstruct(peer, store, context)[1] for context in contexts]))


if __name__ == "__main__":
    main()
