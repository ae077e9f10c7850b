"""Trains, saves and loads autoencoders on the backend that is named, for test_autoencoder.py.

    python -m tests.on_backend jax FOLDER train load

FOLDER holds batches.npy (steps, batch, d_model); what is computed goes to FOLDER/jax. "load" loads
every autoencoder found below FOLDER, whichever backend saved it.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.backend import use_backend

KINDS = {
    "l1": ["--l1-coefficient", "0.3", "--l1-warmup", "0.5", "--learning-rate", "0.002"],
    "topk": ["--k", "4", "--dead-after", "1_000_000", "--learning-rate", "0.0005"],
}
N_LATENTS, N_DEAD = 64, 24


def main(backend: str, folder: Path, *steps: str) -> None:
    use_backend(backend)
    own = folder / backend
    own.mkdir(exist_ok=True)
    batches = np.load(folder / "batches.npy")
    if "train" in steps:
        save_products(own)
        for kind in KINDS:
            train_and_save(kind, batches, own)
    if "load" in steps:
        load_all(folder, batches[0], own)


def train_and_save(kind: str, batches: np.ndarray, own: Path) -> None:
    """Train as train_autoencoder.py does, with a line of the log for each step."""
    import train_autoencoder
    from utils import training
    from utils.settings import read_settings

    flags = ["--kind", kind, "--n-latents", str(N_LATENTS), *KINDS[kind]]
    settings = read_settings(train_autoencoder, flags)
    rows = batches.reshape(-1, batches.shape[-1])
    scale = float(np.sqrt(rows.shape[1] / np.square(rows).sum(axis=1).mean()))
    store = SimpleNamespace(d_model=rows.shape[1], scale=scale, mean=rows.mean(axis=0))
    (own / kind).mkdir()
    autoencoder = training.build(settings, store, len(batches))
    # Dead ones too small to be chosen in so few steps: none is dead on one backend and not on
    # another for a difference in the last bit.
    dead = np.arange(N_LATENTS) < N_DEAD
    small = np.where(dead, 0.001, 1).astype(np.float32)
    autoencoder.W_enc.assign(autoencoder.W_enc * small[:, None])
    autoencoder.b_enc.assign(autoencoder.b_enc * small)
    autoencoder.idle_tokens.assign(np.where(dead, settings.dead_after, 0))
    autoencoder = training.train(
        autoencoder,
        lambda step: iter(batches[step:]),
        batches[0],
        training.Rounds(len(batches), 1),
        batches.shape[1],
        own / kind,
        backup_every=10**6,
    )
    training.save_autoencoder(autoencoder, own / kind / "autoencoder.keras")


def load_all(folder: Path, activations: np.ndarray, own: Path) -> None:
    """Latents and reconstruction by every saved autoencoder, as FOLDER/BACKEND/of-SAVER-KIND."""
    from keras import ops

    from utils.autoencoder import load_autoencoder

    for path in folder.glob("*/*/autoencoder.keras"):
        autoencoder = load_autoencoder(path)
        np.savez(
            own / f"of-{path.parts[-3]}-{path.parts[-2]}.npz",
            latents=ops.convert_to_numpy(autoencoder.encode(activations)),
            reconstruction=ops.convert_to_numpy(autoencoder(activations)),
        )


def save_products(own: Path) -> None:
    """Values and gradients of the sparse products; `sum(value * weights)` is differentiated."""
    from utils.sparse import gathered_dot, weighted_rows

    given = product_inputs()
    for name, product, arguments in (
        ("gathered_dot", gathered_dot, ("queries", "rows")),
        ("weighted_rows", weighted_rows, ("values", "rows")),
    ):
        weights = given[f"weights_of_{name}"]
        value, gradients = differentiate(
            product, [given[argument] for argument in arguments], given["indices"], weights
        )
        np.savez(own / f"{name}.npz", value, *gradients)


def product_inputs() -> dict[str, np.ndarray]:
    """Inputs of the products: batch 7, d_model 5, k 3, 11 latents of which some are not used."""
    draw = np.random.default_rng(0)
    indices = np.stack([draw.permutation(9)[:3] for _ in range(7)]).astype(np.int32)
    shapes = {
        "queries": (7, 5),
        "rows": (11, 5),
        "values": (7, 3),
        "weights_of_gathered_dot": (7, 3),
        "weights_of_weighted_rows": (7, 5),
    }
    normal = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"indices": indices, **normal}


def differentiate(product, arguments, indices, weights):
    """The value, and the gradients by both arguments, by the backend's own differentiation."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        value = product(*arguments, indices)
        gradients = jax.grad(lambda a, b: (product(a, b, indices) * weights).sum(), (0, 1))
        return np.asarray(value), [np.asarray(g) for g in gradients(*arguments)]
    if backend == "torch":
        import torch

        arguments = [torch.tensor(argument, requires_grad=True) for argument in arguments]
        value = product(*arguments, torch.tensor(indices))
        (value * torch.tensor(weights)).sum().backward()
        return value.detach().numpy(), [argument.grad.numpy() for argument in arguments]
    import tensorflow as tf

    arguments = [tf.Variable(argument) for argument in arguments]
    with tf.GradientTape() as tape:
        value = product(*(argument.value() for argument in arguments), tf.constant(indices))
        total = tf.reduce_sum(value * weights)
    gradients = tape.gradient(total, arguments)
    return value.numpy(), [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
