"""Sparse autoencoders as Keras models, one class a kind, in backend-neutral `keras.ops`.

Shapes, here and in the modules above: ``batch`` rows, ``d_model`` width of the residual stream,
``n_latents`` size of the dictionary, ``k`` latents active for a row. `activations` are raw
(batch, d_model); x = scale · activations is what the equations speak of. Row i of ``W_enc`` and of
``W_dec``, both (n_latents, d_model), belongs to latent i, so that gathering a latent is contiguous.

To add a kind: subclass `SparseAutoencoder`, write ``encode`` (its latents), ``forward_pass`` (one
differentiable pass) and ``loss_terms`` (its loss), and decorate it with ``@kind("name")``.
"""

import difflib
import inspect
import zipfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from utils.activations import ActivationStore
from utils.artifacts import fingerprint, missing_stage, read_json
from utils.settings import InputError, require
from utils.sparse import gathered_dot, take_rows, weighted_rows

KINDS: dict[str, type["SparseAutoencoder"]] = {}


def kind(name: str) -> Callable[[type], type]:
    """Register a class under the name that ``KIND`` selects, and with Keras for saving."""

    def register(cls):
        KINDS[name] = cls
        return keras.saving.register_keras_serializable("scaling_monosemanticity", name)(cls)

    return register


def find_kind(name: str) -> type["SparseAutoencoder"]:
    """The class of a kind; an unknown name is an `InputError` that suggests the nearest."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"KIND must be one of {', '.join(KINDS)}; it is {name!r}.{hint}")
    return KINDS[name]


class SparseAutoencoder(keras.Model):
    """What all kinds share: weights, scaling, decoding, the count of dead latents, training.

        x = scale · activations
        x̂ = b_dec + Σ_i f_i W_dec,i

    Args:
        d_model: Width of the residual stream.
        n_latents: Size of the dictionary.
        dead_after: A latent is dead that was not active for this many training tokens.

    Reference: "Scaling Monosemanticity", Sparse Autoencoders; "Update on how we train SAEs"
    (Circuits Updates, April 2024).
    """

    default_decoder_norm = 0.1

    @staticmethod
    def default_learning_rate(n_latents: int) -> float:
        """The paper's, for any size."""
        return 5e-5

    def __init__(self, d_model: int, n_latents: int, dead_after: int = 10_000_000, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.n_latents, self.dead_after = d_model, n_latents, dead_after
        rows = (n_latents, d_model)
        self.W_enc = self.add_weight(rows, "zeros", name="W_enc")
        self.b_enc = self.add_weight((n_latents,), "zeros", name="b_enc")
        self.W_dec = self.add_weight(rows, "zeros", name="W_dec")
        self.b_dec = self.add_weight((d_model,), "zeros", name="b_dec")
        self.scale = self.add_weight((), "ones", trainable=False, name="scale")
        self.step = self.add_weight((), "zeros", dtype="int32", trainable=False, name="step")
        self.idle_tokens = self.add_weight(
            (n_latents,), "zeros", dtype="int32", trainable=False, name="idle_tokens"
        )
        self._trackers = {
            name: keras.metrics.Mean(name=name) for name in ("loss", "fvu", "l0", "dead_fraction")
        }
        self.built = True

    def initialize(self, scale: float, mean: np.ndarray, decoder_norm: float, seed: int) -> None:
        """Set the starting weights, the same on every backend.

        Decoder rows get random directions of one norm and encoder rows start as their copies, as in
        the April 2024 update. b_dec starts at the data's mean and b_enc at −W_enc · b_dec, so that
        the encoder sees centred data from the first step, which saves the steps to get there.

        Args:
            scale: Scalar that makes E‖x‖² = d_model.
            mean: Mean of the raw activations, shape (d_model,).
            decoder_norm: Norm of the decoder rows; 0.05 to 1.
            seed: Seed of the directions.
        """
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((self.n_latents, self.d_model), dtype=np.float32)
        rows *= decoder_norm / np.linalg.norm(rows, axis=1, keepdims=True)
        self.scale.assign(scale)
        self.W_enc.assign(rows)
        self.W_dec.assign(rows)
        self.b_dec.assign(scale * mean)
        self.b_enc.assign(-rows @ (scale * mean))

    # ---- inference

    def normalise(self, activations):
        """x = scale · activations, float32, shape (batch, d_model)."""
        return ops.convert_to_tensor(activations, "float32") * self.scale

    def pre_activations(self, x):
        """W_enc x + b_enc, shape (batch, n_latents)."""
        return ops.matmul(x, ops.transpose(self.W_enc)) + self.b_enc

    def encode(self, activations):
        """Latents f of raw activations, dense, shape (batch, n_latents)."""
        raise NotImplementedError

    def decode(self, latents):
        """Raw reconstruction of dense latents, shape (batch, d_model)."""
        return (ops.matmul(latents, self.W_dec) + self.b_dec) / self.scale

    def decoder_norms(self):
        """‖W_dec,i‖, shape (n_latents,): a feature's activation is f_i times this."""
        return ops.norm(self.W_dec, axis=1)

    def directions(self) -> np.ndarray:
        """The decoder rows as a NumPy array, shape (n_latents, d_model)."""
        return ops.convert_to_numpy(self.W_dec)

    def encode_active(self, activations):
        """The active latents of raw activations, as NumPy arrays.

        Returns:
            row, latent number and value of each active latent, three arrays of one length in order
            of row; and the raw reconstruction, shape (batch, d_model).
        """
        latents = self.encode(activations)
        reconstruction = ops.convert_to_numpy(self.decode(latents))
        latents = ops.convert_to_numpy(latents)
        row, feature = np.nonzero(latents)
        return row, feature, latents[row, feature], reconstruction

    def call(self, activations, training=False):
        """Raw reconstruction, shape (batch, d_model); while training, what `loss_terms` needs."""
        if training:
            return self.forward_pass(self.normalise(activations))
        return self.decode(self.encode(activations))

    # ---- training

    def forward_pass(self, x) -> dict:
        """One differentiable pass over normalised x (batch, d_model).

        Returns:
            ``reconstruction`` (batch, d_model), normalised; ``l0``, the mean number of active
            latents; ``active`` (n_latents,), whether a latent was active in the batch; and what
            else the kind's `loss_terms` uses.
        """
        raise NotImplementedError

    def loss_terms(self, x, passed: dict):
        """The loss of a batch, from x and what `forward_pass` returned."""
        raise NotImplementedError

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Loss and metrics of a batch; called by Keras in `fit` and `evaluate`."""
        normalised = self.normalise(x)
        passed = y_pred if training else self.forward_pass(normalised)
        loss = self.loss_terms(normalised, passed)
        if training:
            self.step.assign_add(1)
            idle = ops.minimum(self.idle_tokens + ops.shape(x)[0], 2**30)
            self.idle_tokens.assign(ops.where(passed["active"], 0, idle))
        error = ops.sum(ops.square(normalised - passed["reconstruction"]))
        variance = ops.sum(ops.square(normalised - ops.mean(normalised, axis=0)))
        values = {
            "loss": loss,
            "fvu": error / variance,
            "l0": passed["l0"],
            "dead_fraction": ops.mean(ops.cast(self.dead(), "float32")),
        }
        for name, value in values.items():
            self._trackers[name].update_state(value)
        return loss

    def dead(self):
        """Which latents were not active for ``dead_after`` training tokens, bool (n_latents,)."""
        return self.idle_tokens >= self.dead_after

    @property
    def metrics(self):
        return list(self._trackers.values())

    @classmethod
    def options(cls) -> list[str]:
        """Names of the constructor's arguments, the kind's own first."""
        return [
            name
            for base in cls.__mro__[: cls.__mro__.index(SparseAutoencoder) + 1]
            for name in inspect.signature(base.__init__).parameters
            if name not in ("self", "kwargs")
        ]

    def get_config(self):
        return {**super().get_config(), **{name: getattr(self, name) for name in self.options()}}


def squared_error(x, reconstruction):
    """Mean over the batch of ‖x − x̂‖², summed over d_model."""
    return ops.mean(ops.sum(ops.square(x - reconstruction), axis=-1))


@kind("l1")
class L1Autoencoder(SparseAutoencoder):
    """The paper's autoencoder.

        f = ReLU(W_enc x + b_enc)
        loss = mean ‖x − x̂‖² + λ Σ_i f_i ‖W_dec,i‖

    λ rises linearly from 0 over the first ``sparsity_warmup`` steps. The decoder is not
    constrained: the penalty carries its norms.

    Args:
        l1_coefficient: λ; 2, 5 and 10 in the paper's reference table.
        sparsity_warmup: Steps until λ is reached; 5% of training in the paper.

    Reference: "Scaling Monosemanticity", Sparse Autoencoders; "Update on how we train SAEs".
    """

    def __init__(self, l1_coefficient: float = 5.0, sparsity_warmup: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.l1_coefficient, self.sparsity_warmup = l1_coefficient, sparsity_warmup

    def encode(self, activations):
        return ops.relu(self.pre_activations(self.normalise(activations)))

    def forward_pass(self, x):
        latents = ops.relu(self.pre_activations(x))
        active = ops.cast(latents > 0, "float32")
        return {
            "latents": latents,
            "reconstruction": ops.matmul(latents, self.W_dec) + self.b_dec,
            "l0": ops.mean(ops.sum(active, axis=-1)),
            "active": ops.any(latents > 0, axis=0),
        }

    def loss_terms(self, x, passed):
        penalty = ops.mean(ops.matmul(passed["latents"], self.decoder_norms()))
        return squared_error(x, passed["reconstruction"]) + self.coefficient() * penalty

    def coefficient(self):
        """λ at the present step."""
        progress = ops.cast(self.step, "float32") / max(1, self.sparsity_warmup)
        return self.l1_coefficient * ops.minimum(1.0, progress if self.sparsity_warmup else 1.0)


@kind("topk")
class TopKAutoencoder(SparseAutoencoder):
    """The k largest pre-activations of a row are its latents; dead ones learn from the error.

        f = ReLU(TopK(W_enc x + b_enc))
        loss = mean ‖x − x̂‖² + α mean ‖e − ê‖²,  e = x − x̂

    ê is e reconstructed from dead latents only (AuxK), without b_dec: e has no mean left to add.
    Of the dead, the 4 · k_aux that were idle longest are candidates, and the k_aux = d_model / 2
    largest of a row are used: that bounds its cost however many are dead.

    Only choosing the k needs the dense product. It is made under ``stop_gradient``; the chosen
    pre-activations are then computed again from their encoder rows and decoded from their decoder
    rows (`utils.sparse`), so that no gradient of shape (batch, n_latents) exists on any backend.

    Args:
        k: Latents active for a row.
        auxk_coefficient: α; 0 turns AuxK off.

    Reference: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", 2.3 and A.2.
    """

    default_decoder_norm = 1.0

    @staticmethod
    def default_learning_rate(n_latents: int) -> float:
        """Falls with the root of the number of latents (Gao et al. 2024, A.3), from 1e-3 at 4,096.

        Theirs is 2e-4 at 16,384 for batches of 131,072 tokens.
        """
        return 1e-3 * (4_096 / n_latents) ** 0.5

    def __init__(self, k: int = 32, auxk_coefficient: float = 1 / 32, **kwargs):
        super().__init__(**kwargs)
        self.k, self.auxk_coefficient = k, auxk_coefficient

    def encode_sparse(self, activations):
        """The k latents of each row: values (batch, k), not negative, and indices (batch, k)."""
        return self._select(self.normalise(activations))

    def encode(self, activations):
        values, indices = self.encode_sparse(activations)
        rows = ops.broadcast_to(ops.arange(ops.shape(values)[0])[:, None], ops.shape(indices))
        places = ops.stack([rows, ops.cast(indices, rows.dtype)], axis=-1)
        return ops.scatter(
            ops.reshape(places, (-1, 2)),
            ops.reshape(values, (-1,)),
            (ops.shape(values)[0], self.n_latents),
        )

    def encode_active(self, activations):
        values, indices = self.encode_sparse(activations)
        reconstruction = ops.convert_to_numpy(self.decode_sparse(values, indices))
        values, indices = ops.convert_to_numpy(values), ops.convert_to_numpy(indices)
        row, column = np.nonzero(values)
        return row, indices[row, column], values[row, column], reconstruction

    def decode_sparse(self, values, indices):
        """Raw reconstruction of latents given by value and index, shape (batch, d_model)."""
        return (weighted_rows(values, self.W_dec, indices) + self.b_dec) / self.scale

    def call(self, activations, training=False):
        if training:
            return self.forward_pass(self.normalise(activations))
        return self.decode_sparse(*self.encode_sparse(activations))

    def _select(self, x):
        values, indices = ops.top_k(self.pre_activations(x), self.k, sorted=False)
        return ops.relu(values), indices

    def forward_pass(self, x):
        _, indices = self._select(ops.stop_gradient(x))
        indices = ops.stop_gradient(indices)
        pre_activations = gathered_dot(x, self.W_enc, indices) + take_rows(self.b_enc, indices)
        values = ops.relu(pre_activations)
        uses = ops.segment_sum(
            ops.cast(ops.reshape(values, (-1,)) > 0, "int32"),
            ops.reshape(indices, (-1,)),
            num_segments=self.n_latents,
        )
        return {
            "reconstruction": weighted_rows(values, self.W_dec, indices) + self.b_dec,
            "l0": ops.mean(ops.sum(ops.cast(values > 0, "float32"), axis=-1)),
            "active": uses > 0,
        }

    def loss_terms(self, x, passed):
        loss = squared_error(x, passed["reconstruction"])
        if not self.auxk_coefficient:
            return loss
        error = ops.stop_gradient(x - passed["reconstruction"])
        auxiliary = ops.cond(
            ops.any(self.dead()), lambda: self._auxk_loss(x, error), lambda: ops.zeros(())
        )
        return loss + self.auxk_coefficient * auxiliary

    def _auxk_loss(self, x, error):
        """‖e − ê‖² from the latents that have been idle longest, those of them that are dead."""
        auxk = min(self.d_model // 2, self.n_latents)
        candidates = min(4 * auxk, self.n_latents)
        # As a tensor, for JAX takes no Keras variable within a traced condition.
        idle, rows = ops.top_k(ops.convert_to_tensor(self.idle_tokens), candidates)
        pre_activations = ops.matmul(x, ops.transpose(take_rows(self.W_enc, rows)))
        pre_activations = pre_activations + take_rows(self.b_enc, rows)
        pre_activations = ops.where(idle >= self.dead_after, ops.relu(pre_activations), 0.0)
        weakest = ops.min(ops.top_k(pre_activations, auxk)[0], axis=-1, keepdims=True)
        latents = ops.where(pre_activations >= weakest, pre_activations, 0.0)
        return squared_error(error, ops.matmul(latents, take_rows(self.W_dec, rows)))


def load_autoencoder(path: Path) -> SparseAutoencoder:
    """Load a saved autoencoder, ready to encode and decode, on whatever backend is in use."""
    try:
        return keras.saving.load_model(path, compile=False)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read ({error}). Delete {path.parent} and train it again."
        ) from error


def open_autoencoder(folder: str | Path, store: ActivationStore) -> tuple[SparseAutoencoder, dict]:
    """The autoencoder of a finished training, and its metrics with its settings and fingerprint.

    Raises:
        InputError: There is none, it is unfinished, or it was trained on other activations.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise missing_stage(folder, "finished autoencoder", "train_autoencoder.py")
    metrics = read_json(folder / "metrics.json")
    for name in ("model_name", "layer", "d_model"):
        found, wanted = metrics[name], getattr(store, name)
        require(
            found == wanted,
            f"The autoencoder in {folder} was trained with {name} {found!r}, and the activations "
            f"in {store.folder} have {wanted!r}. Name folders that belong together.",
        )
    settings = read_json(folder / "settings.json")
    require(
        settings["activations"] == store.fingerprint,
        f"The autoencoder in {folder} was trained on other activations than those now in "
        f"{store.folder}. Train it again with --overwrite, or name the folder it was trained on.",
    )
    path = folder / "autoencoder.keras"
    return load_autoencoder(path), {**settings, **metrics, "fingerprint": fingerprint(path)}
