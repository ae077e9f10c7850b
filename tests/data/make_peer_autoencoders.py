"""Make peers.tar.xz: small autoencoders that other libraries trained, with what they give.

    python tests/data/make_peer_autoencoders.py PEERS_PYTHON    # takes two minutes

PEERS_PYTHON is the Python of an environment with tests/benchmarks/peers-requirements.txt. The
activations are those of the tests' tiny run (tests/conftest.py), of which each autoencoder has 96
latents. A folder of the archive is one autoencoder, as its library saves it, with

    rows.npy             activations (200, 32) of the run
    latents.npy          (200, 96), what the library's own encode gives for them
    reconstruction.npy   (200, 32), and its decode for these
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

D_MODEL, N_LATENTS, K, STEPS, BATCH = 32, 96, 4, 1_500, 256
ARCHIVE = Path(__file__).with_name("peers.tar.xz")


# ---------------------------------------------------------------- in this project's environment


def make(peers_python: str) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    from conftest import Flags, command, make_texts, save_tiny_model

    from utils.activations.store import ActivationStore

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        records = ({"text": text, "meta": {"pile_set_name": of}} for text, of in make_texts())
        text = work / "tiny.jsonl"
        text.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = Flags(work, save_tiny_model(work / "tiny"), text)
        subprocess.run(command("save_activations", *flags.save_activations), check=True)
        store = ActivationStore(work / "activations")
        rows = store.kept_rows(range(store.n_contexts)).astype(np.float32)
        np.save(work / "all.npy", rows[np.random.default_rng(0).permutation(len(rows))])
        subprocess.run([peers_python, __file__, "--train", work], check=True)
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            archive.add(work / "peers", "peers", filter=anonymous)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 1e6:.2f} MB")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


# ---------------------------------------------------------------- in the peers' environment


def batches(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield rows[torch.randint(len(rows), (BATCH,), generator=draw)]


def train_all(work: Path) -> None:
    torch.set_num_threads(1)
    rows = torch.from_numpy(np.load(work / "all.npy"))
    kept, rows = rows[:200], rows[200:]
    makers = {f"saelens-{kind}": saelens for kind in ("topk", "jumprelu", "gated")}
    makers |= {f"dictionary_learning-{kind}": dictionary_learning for kind in
               ("batch_topk", "matryoshka")}  # fmt: skip
    makers["sparsify-topk"] = sparsify
    for name, make_one in makers.items():
        torch.manual_seed(0)
        folder = work / "peers" / name
        folder.mkdir(parents=True)
        encode, decode = make_one(name.partition("-")[2], rows, folder)
        with torch.no_grad():
            latents = encode(kept)
            reconstruction = decode(latents)
        fvu = (kept - reconstruction).square().sum() / (kept - kept.mean(0)).square().sum()
        print(f"{name}: FVU {fvu:.3f}, L0 {(latents > 0).sum(1).float().mean():.1f}")
        arrays = {"rows": kept, "latents": latents, "reconstruction": reconstruction}
        for array, values in arrays.items():
            np.save(folder / f"{array}.npy", values.detach().numpy())


def saelens(kind: str, rows: torch.Tensor, folder: Path):
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    name, settings = {
        "topk": ("TopK", {"k": K}),
        "jumprelu": (
            "JumpReLU",
            {
                "l0_coefficient": 40.0, "l0_warm_up_steps": STEPS, "jumprelu_bandwidth": 2.0,
                "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_init_threshold": 0.1,
                "pre_act_loss_coefficient": 3e-6, "jumprelu_tanh_scale": 4.0,
            },
        ),
        "gated": ("Gated", {"l1_coefficient": 25.0, "l1_warm_up_steps": STEPS // 20}),
    }[kind]  # fmt: skip
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D_MODEL, d_sae=N_LATENTS, **settings
    )
    config.metadata.model_name, config.metadata.hook_name = "tiny", "blocks.1.hook_resid_post"
    config.metadata.context_size, config.metadata.prepend_bos = 32, True
    training = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-4,
        lr_decay_steps=STEPS // 5,
        feature_sampling_window=STEPS // 10,  # over which it counts the L0 that it states
        save_final_checkpoint=False,
        n_checkpoints=0,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    trained = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trained = sae_lens.SAETrainer(training, trained, data_provider=batches(rows)).fit()
    trained.save_inference_model(folder)
    saved = sae_lens.SAE.load_from_disk(folder)
    return saved.encode, saved.decode


def dictionary_learning(kind: str, rows: torch.Tensor, folder: Path):
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    cls, settings = {
        "batch_topk": (BatchTopKTrainer, {}),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {"group_fractions": [1 / 8, 3 / 8, 1 / 2]}),
    }[kind]
    trainer = cls(
        steps=STEPS, activation_dim=D_MODEL, dict_size=N_LATENTS, k=K, layer=1, lm_name="tiny",
        lr=3e-3, warmup_steps=50, decay_start=STEPS * 4 // 5, threshold_beta=0.98,
        threshold_start_step=50, seed=0, device="cpu", submodule_name="resid_post_layer_1",
        **settings,
    )  # fmt: skip
    for step, batch in zip(range(STEPS), batches(rows), strict=False):
        trainer.update(step, batch)
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    config = {"trainer": trainer.config, "buffer": {"d_submodule": D_MODEL, "io": "out"}}
    config["buffer"]["ctx_len"] = 32
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    saved = type(trainer.ae).from_pretrained(folder / "ae.pt")
    return saved.encode, saved.decode


def sparsify(kind: str, rows: torch.Tensor, folder: Path):
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which needs a graphics card
    with mock.patch("torch.cuda.is_bf16_supported", return_value=False):
        from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=N_LATENTS, k=K))
    coder.b_dec.data = rows.mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    for _, batch in zip(range(STEPS), batches(rows), strict=False):
        coder.set_decoder_norm_to_unit_norm()
        coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    coder.save_to_disk(folder / "layers.1")
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "ctx_len": 32}))
    saved = SparseCoder.load_from_disk(folder / "layers.1")

    def encode(rows: torch.Tensor) -> torch.Tensor:
        values, indices, _ = saved.encode(rows)
        return torch.zeros(len(rows), N_LATENTS).scatter(1, indices, values)

    return encode, lambda latents: saved.decode(*latents.topk(K))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers_python", nargs="?")
    parser.add_argument("--train", type=Path, help="the second half, run by PEERS_PYTHON")
    options = parser.parse_args()
    if options.train:
        train_all(options.train)
    else:
        make(options.peers_python)
