"""Computes with autoencoders on the backend that is named, for test_backends.py.

    python -m tests.on_backend jax FOLDER compute load

FOLDER/store holds activations; what is computed goes to FOLDER/jax: shuffled batches, the products
of chosen latents, the gradients of a step, and trained autoencoders. "load" loads every autoencoder
below FOLDER, whichever backend saved it.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.activations.store import ActivationStore
from utils.backend import use_backend

N_LATENTS, N_DEAD = 64, 24
N_STEPS, STEPS_PER_ROUND = 50, 5
LOADED = ["--batch-size", "256", "--pool-gib", "0.0001"]  # 1,677 rows of width 16
WITH_PRICE = ["--sparsity-coefficient", "0.3", "--learning-rate", "0.002"]
WITH_K = ["--k", "4", "--selection-dtype", "float32", "--dead-after", "1_000_000"]
WITH_K += ["--learning-rate", "0.0005"]
TRAINED = {
    "l1": [*WITH_PRICE, "--sparsity-warmup", "0.5"],
    "gated": [*WITH_PRICE, "--sparsity-warmup", "0.5"],
    "jumprelu": [*WITH_PRICE, "--preactivation-coefficient", "0.01"],
    "topk": [*WITH_K, "--unit-decoder", "False", "--decoder-norm", "1"],
    "batch_topk": WITH_K,
    "matryoshka": WITH_K,
}
STEP_KINDS = ("topk", "batch_topk", "matryoshka")


def main(backend: str, folder: Path, *steps: str) -> None:
    use_backend(backend)
    output = folder / backend
    output.mkdir(exist_ok=True)
    store = ActivationStore(folder / "store")
    if "compute" in steps:
        save_batches(store, output)
        save_products(output)
        save_gradients(output)
        for kind in TRAINED:
            train_and_save(kind, store, output)
    if "load" in steps:
        load_all(folder, store.kept_rows(range(8)).astype(np.float32), output)


# ---------------------------------------------------------------------------- training and loading


def train_and_save(kind: str, store: ActivationStore, output: Path) -> None:
    """Train as train_autoencoder.py does, with a line of the log every few steps."""
    import train_autoencoder
    from utils.autoencoder import training
    from utils.autoencoder.callbacks import Rounds
    from utils.autoencoder.saved import save_autoencoder
    from utils.settings import read_settings

    flags = ["--kind", kind, "--n-latents", str(N_LATENTS), *LOADED, *TRAINED[kind]]
    settings = read_settings(train_autoencoder, flags)
    batches = training.shuffled(settings, store, range(store.n_contexts))
    (output / kind).mkdir()
    autoencoder = training.build(settings, store, N_STEPS)
    # Dead ones too small to be chosen in so few steps: none is dead on one backend and not on
    # another for a difference in the last bit.
    dead = np.arange(N_LATENTS) < N_DEAD
    small = np.where(dead, 0.001, 1).astype(np.float32)
    autoencoder.W_enc.assign(autoencoder.W_enc * small[:, None])
    autoencoder.b_enc.assign(autoencoder.b_enc * small)
    autoencoder.idle_tokens.assign(np.where(dead, settings.dead_after, 0))
    held_out = store.kept_rows(range(8))
    data = training.TrainingData(batches.from_step, held_out, settings.batch_size)
    rounds = Rounds(N_STEPS // STEPS_PER_ROUND, STEPS_PER_ROUND)
    autoencoder = training.train(autoencoder, data, rounds, output / kind, backup_every=10**6)
    save_autoencoder(autoencoder, output / kind / "autoencoder.keras")


def save_batches(store: ActivationStore, output: Path) -> None:
    """The last batches of a training, and whether the backend reads them where they lie."""
    import train_autoencoder
    from utils.autoencoder import training
    from utils.settings import read_settings

    settings = read_settings(train_autoencoder, LOADED)
    batches = training.shuffled(settings, store, range(store.n_contexts))
    drawn = list(itertools.islice(batches.from_step(N_STEPS - 9), 9))
    in_place = [lies_there(batch) for batch in drawn]
    np.savez(output / "batches.npz", rows=np.stack([*map(np.asarray, drawn)]), in_place=in_place)


def lies_there(batch) -> bool:
    """Whether the backend takes a batch without a copy."""
    import keras

    if keras.backend.backend() == "torch":
        return keras.ops.convert_to_tensor(batch).data_ptr() == batch.data_ptr()
    if keras.backend.backend() == "jax":
        import jax

        return jax.device_put(batch).unsafe_buffer_pointer() == batch.ctypes.data
    return False


def stand_in_for_store(rows: np.ndarray) -> SimpleNamespace:
    """What `training.build` asks of a store, for rows (n_rows, d_model)."""
    scale = float(np.sqrt(rows.shape[1] / np.square(rows).sum(axis=1).mean()))
    return SimpleNamespace(d_model=rows.shape[1], scale=scale, mean=rows.mean(axis=0))


def load_all(folder: Path, activations: np.ndarray, output: Path) -> None:
    """Latents and reconstruction by every saved autoencoder, as FOLDER/BACKEND/of-SAVER-KIND."""
    from keras import ops

    from utils.autoencoder.saved import load_autoencoder

    for path in folder.glob("*/*/autoencoder.keras"):
        autoencoder = load_autoencoder(path)
        row, latent, values, reconstruction = autoencoder.encode_active(activations)
        active = np.zeros((len(activations), N_LATENTS), np.float32)
        active[row, latent] = values
        np.savez(
            output / f"of-{path.parts[-3]}-{path.parts[-2]}.npz",
            latents=ops.convert_to_numpy(autoencoder.encode(activations)),
            reconstruction=ops.convert_to_numpy(autoencoder(activations)),
            active=active,
            reconstruction_of_active=reconstruction,
        )


# ------------------------------------------------------------------------------- chosen latents


def product_inputs() -> dict[str, np.ndarray]:
    """Batch 7, d_model 5, 3 indices a row, 11 latents of which some are not used."""
    draw = np.random.default_rng(0)
    indices = np.stack([draw.permutation(9)[:3] for _ in range(7)]).astype(np.int32)
    kept = draw.random((7, 3)) < 0.6
    kept[2] = False
    shapes = {
        "queries": (7, 5),
        "rows": (11, 5),
        "biases": (11,),
        "values": (7, 3),
        "by_choice": (7, 3),
        "by_row": (7, 5),
    }
    normal = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"indices": indices, "kept": kept, **normal}


def save_products(output: Path) -> None:
    """Values of the products and gradients of `sum(value * weights)`, with and without `kept`.

    Values are (batch, m) here, zero where nothing is chosen.
    """
    from utils.autoencoder import sparse

    given = product_inputs()
    for name, kept, gathered in (
        ("all", None, sparse.GATHERED),
        ("kept", given["kept"], sparse.GATHERED),
        ("parts", given["kept"], 7 * 5 * 2),  # two latents of each row at once, then one
    ):
        sparse.GATHERED = gathered
        np.savez(output / f"products-{name}.npz", **products(given, kept))
    sparse.GATHERED = 2**26


def products(given: dict[str, np.ndarray], kept: np.ndarray | None) -> dict[str, np.ndarray]:
    from keras import ops

    from utils.autoencoder.sparse import ChosenLatents

    mask = np.ones((7, 3), bool) if kept is None else kept
    on_torch = ops.convert_to_tensor(given["values"]).__class__.__module__.startswith("torch")

    def ragged(values):  # as PyTorch's has them
        return ops.convert_to_tensor(values)[ops.convert_to_tensor(mask)] if on_torch else values

    def padded(values):
        if not on_torch:
            return np.asarray(values)
        full = np.zeros(mask.shape, np.float32)
        full[mask] = values
        return full

    def chosen():
        indices = ops.convert_to_tensor(given["indices"])
        return ChosenLatents(indices, 11, None if kept is None else ops.convert_to_tensor(kept))

    by_choice, by_row = given["by_choice"], given["by_row"]
    computed = {}
    for name, product, arguments, weights in (
        ("dot", lambda q, r: chosen().dot(q, r), ("queries", "rows"), ragged(by_choice)),
        ("take", lambda b: chosen().take(b), ("biases",), ragged(by_choice)),
        ("sum", lambda v, r: chosen().sum(ragged(v), r), ("values", "rows"), by_row),
    ):
        value, gradients = differentiate(product, [given[a] for a in arguments], weights)
        computed[name] = padded(value) if name != "sum" else value
        computed |= {f"{name}_by_{a}": g for a, g in zip(arguments, gradients, strict=True)}
    values = ragged(given["values"] * mask)
    row, latent, positive = chosen().positive(ops.convert_to_tensor(values))
    dense = chosen().dense(ops.convert_to_tensor(values))
    active = chosen().is_active(ops.convert_to_tensor(values))
    names = ("row", "latent", "positive")
    computed |= dict(zip(names, map(ops.convert_to_numpy, (row, latent, positive)), strict=True))
    return computed | {"dense": ops.convert_to_numpy(dense), "active": ops.convert_to_numpy(active)}


def differentiate(function, arguments, weights):
    """The value, and the gradients of `sum(value * weights)` by the arguments, as NumPy arrays."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        value = function(*map(jax.numpy.asarray, arguments))
        gradients = jax.grad(lambda *a: (function(*a) * weights).sum(), range(len(arguments)))
        return np.asarray(value), [np.asarray(g) for g in gradients(*arguments)]
    if backend == "torch":
        import torch

        arguments = [torch.tensor(argument, requires_grad=True) for argument in arguments]
        value = function(*arguments)
        (value * torch.as_tensor(weights)).sum().backward()
        return value.detach().numpy(), [argument.grad.to_dense().numpy() for argument in arguments]
    import tensorflow as tf

    arguments = [tf.constant(argument) for argument in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(*arguments)
        total = tf.reduce_sum(value * weights)
    gradients = tape.gradient(total, arguments)
    return value.numpy(), [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


# -------------------------------------------------------------------------- gradients of one step


def step_inputs() -> dict[str, np.ndarray]:
    """Weights of 32 latents of width 8, of which 6 are dead, and a batch of 12."""
    draw = np.random.default_rng(1)
    W_dec = draw.normal(size=(32, 8))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    W_enc = W_dec + 0.2 * draw.normal(size=(32, 8))
    drawn = {"W_enc": W_enc, "W_dec": W_dec, "x": 2 * draw.normal(size=(12, 8))}
    drawn |= {"b_enc": 0.3 * draw.normal(size=32), "b_dec": 0.3 * draw.normal(size=8)}
    idle = np.where(np.arange(32) % 5 == 2, 100 + np.arange(32), 0).astype(np.int32)
    return {"idle_tokens": idle} | {n: v.astype(np.float32) for n, v in drawn.items()}


def save_gradients(output: Path) -> None:
    from utils.autoencoder.kinds import KINDS

    given = step_inputs()
    for kind in STEP_KINDS:
        options = {"prefixes": (0.25, 1.0)} if kind == "matryoshka" else {}
        made = KINDS[kind](d_model=8, n_latents=32, k=3, dead_after=100, **options)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "idle_tokens"):
            getattr(made, name).assign(given[name])
        np.savez(output / f"gradients-{kind}.npz", **loss_and_gradients(made, given["x"]))


def loss_and_gradients(autoencoder, x: np.ndarray) -> dict[str, np.ndarray]:
    """The loss of normalised x, ``loss``, and its gradient by each weight, as NumPy arrays."""
    import keras
    from keras import ops

    def loss():
        tensor = ops.convert_to_tensor(x)
        return sum(autoencoder.loss_terms(tensor, autoencoder.forward_pass(tensor)).values())

    weights = autoencoder.trainable_variables
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(list(zip(weights, values, strict=True))):
                return loss()

        value, gradients = jax.value_and_grad(stateless)([w.value for w in weights])
    elif backend == "torch":
        autoencoder.zero_grad()
        value = loss()
        value.backward()
        gradients = [w.value.grad for w in weights]
        gradients = [
            ops.zeros(w.shape) if g is None else g.to_dense()
            for w, g in zip(weights, gradients, strict=True)
        ]
    else:
        import tensorflow as tf

        @tf.function  # as in `fit`
        def value_and_gradients():
            with tf.GradientTape() as tape:
                value = loss()
            gradients = tape.gradient(value, [w.value for w in weights])
            return value, [tf.convert_to_tensor(gradient) for gradient in gradients]

        value, gradients = value_and_gradients()
    named = {w.name: ops.convert_to_numpy(g) for w, g in zip(weights, gradients, strict=True)}
    return {"loss": ops.convert_to_numpy(value), **named}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
