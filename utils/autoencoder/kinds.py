"""The kinds of sparse autoencoder, a class each: its equations, its options, its loss.

To add one, subclass `SparseAutoencoder` or a kind that is near, say what differs, and decorate it
with ``@kind("name")``. The arguments of its constructor are its options: each is a constant of
train_autoencoder.py by the same name. The terms of its loss have names, which the class declares.
Frameworks compile or record a step: what changes from step to step must be a tensor, as
``self.step`` is, no number of Python's, and none that is read from a tensor.
"""

import difflib
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from utils.autoencoder.autoencoder import SparseAutoencoder, n_rows, of_some, squared_error
from utils.autoencoder.sparse import (
    ChosenLatents,
    constant,
    exact_top_latents,
    exact_values,
    top_latents,
)
from utils.backend import Tensor
from utils.settings import InputError

KINDS: dict[str, type[SparseAutoencoder]] = {}


def kind(name: str) -> Callable[[type], type]:
    """Register a class under the name that ``KIND`` selects, and with Keras for saving."""

    def register(cls):
        KINDS[name] = cls
        return keras.saving.register_keras_serializable("scaling_monosemanticity", name)(cls)

    return register


def find_kind(name: str) -> type[SparseAutoencoder]:
    """The class of a kind; an unknown name is an `InputError` that suggests the nearest."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"KIND must be one of {', '.join(KINDS)}; it is {name!r}.{hint}")
    return KINDS[name]


class DenseAutoencoder(SparseAutoencoder):
    """Kinds whose latents all take part in training; their sparsity has a price λ.

    Args:
        sparsity_coefficient: λ.
        sparsity_warmup: Steps over which λ rises linearly from 0.
    """

    loss_names = ("reconstruction", "sparsity")
    arrays_of_latents = 4.0

    def __init__(self, sparsity_coefficient: float = 2.0, sparsity_warmup: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.sparsity_coefficient, self.sparsity_warmup = sparsity_coefficient, sparsity_warmup

    def encode(self, activations, features=None):
        return self.latents(self.pre_activations(self.normalise(activations), features), features)

    def latents(self, pre_activations, features=None):
        """f of pre-activations, both (batch, n_latents), or of some latents alone."""
        raise NotImplementedError

    def forward_pass(self, x):
        pre_activations = self.pre_activations(x)
        latents = self.latents(pre_activations)
        active = latents > 0
        return {
            "pre_activations": pre_activations,
            "latents": latents,
            "reconstruction": ops.matmul(latents, self.W_dec) + self.b_dec,
            "l0": ops.mean(ops.sum(ops.cast(active, "float32"), axis=-1)),
            "active": ops.any(active, axis=0),
        }

    def coefficient(self):
        """λ at the present step."""
        progress = ops.cast(self.step, "float32") / max(1, self.sparsity_warmup)
        share = ops.minimum(progress, constant(1.0)) if self.sparsity_warmup else 1.0
        return self.sparsity_coefficient * share


@kind("l1")
class L1Autoencoder(DenseAutoencoder):
    """The paper's.

        f = ReLU(W_enc x + b_enc)
        loss = mean ‖x − x̂‖² + λ Σ_i f_i ‖W_dec,i‖

    The decoder is not constrained: the penalty carries its norms. λ is 2, 5 and 10 in the paper's
    reference table, and rises over 5% of training.

    Reference: "Scaling Monosemanticity", Sparse Autoencoders; "Update on how we train SAEs".
    """

    def latents(self, pre_activations, features=None):
        return ops.relu(pre_activations)

    def loss_terms(self, x, passed):
        penalty = ops.mean(ops.matmul(passed["latents"], self.decoder_norms()))
        return {**super().loss_terms(x, passed), "sparsity": self.coefficient() * penalty}


@kind("gated")
class GatedAutoencoder(DenseAutoencoder):
    """Whether a latent is active is learnt apart from how active it is.

        π = W_enc x + b_enc,   m = exp(r_mag) W_enc x + b_mag
        f = 1[π > 0] · ReLU(m)
        loss = mean ‖x − x̂‖² + λ Σ_i ReLU(π_i) ‖W_dec,i‖ + mean ‖x − x̂(ReLU(π))‖²

    The last term, the auxiliary loss, trains π as latents of their own, through a decoder that it
    leaves alone, as the penalty leaves the norms.

    Reference: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
    autoencoders", 3.2; norms in the penalty instead of unit rows, as in the April 2024 update.
    """

    loss_names = ("reconstruction", "sparsity", "auxiliary")
    arrays_of_latents = 7.25

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.r_mag = self.add_weight((self.n_latents,), "zeros", name="r_mag")
        self.b_mag = self.add_weight((self.n_latents,), "zeros", name="b_mag")

    def initialize(self, *args, **kwargs):
        super().initialize(*args, **kwargs)
        self.b_mag.assign(self.b_enc + 0.0)  # a copy: JAX updates both in place

    def latents(self, pre_activations, features=None):
        weights = (self.r_mag, self.b_enc, self.b_mag)
        r_mag, b_enc, b_mag = (of_some(weight, features) for weight in weights)
        magnitude = ops.exp(r_mag) * (pre_activations - b_enc) + b_mag
        return ops.where(pre_activations > 0, ops.relu(magnitude), ops.zeros(()))

    def loss_terms(self, x, passed):
        gates = ops.relu(passed["pre_activations"])
        W_dec, b_dec = ops.stop_gradient(self.W_dec), ops.stop_gradient(self.b_dec)
        penalty = ops.mean(ops.matmul(gates, ops.norm(W_dec, axis=1)))
        return {
            **super().loss_terms(x, passed),
            "sparsity": self.coefficient() * penalty,
            "auxiliary": squared_error(x, ops.matmul(gates, W_dec) + b_dec),
        }


@kind("jumprelu")
class JumpReLUAutoencoder(DenseAutoencoder):
    """Each latent has a threshold of its own, below which it is silent.

        π = W_enc x + b_enc,   θ = exp(t)
        f = π · 1[π > θ]
        loss = mean ‖x − x̂‖² + λ Σ_i tanh(c f_i ‖W_dec,i‖) + λ_P Σ_i ReLU(θ_i − π_i) ‖W_dec,i‖

    The step 1[π > θ] is differentiated, by π and by θ, as a ramp as wide as ``bandwidth``, so that
    thresholds move. λ rises over all of training. The last term pulls up what never fires. Unlike
    the reference's, rows have norm 1: the error at an equal L0 was 3% less (1,152 latents).

    Args:
        bandwidth: ε, width of the ramp that stands for the step in the gradient.
        tanh_scale: c; about the inverse of the activation from which a latent costs a full λ, so
            that it must suit the size of activations. It is 4 in the reference.
        preactivation_coefficient: λ_P.

    Reference: "Dictionary learning optimization techniques" (Circuits Updates, January 2025);
    Rajamanoharan et al. 2024, "Jumping ahead".
    """

    default_sparsity_warmup, default_unit_decoder = 1.0, True
    loss_names = ("reconstruction", "sparsity", "preactivation")
    arrays_of_latents = 9.0

    def __init__(
        self,
        bandwidth: float = 2.0,
        tanh_scale: float = 1.0,
        preactivation_coefficient: float = 3e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.bandwidth, self.tanh_scale = bandwidth, tanh_scale
        self.preactivation_coefficient = preactivation_coefficient
        start = keras.initializers.Constant(float(np.log(0.1)))
        self.log_threshold = self.add_weight((self.n_latents,), start, name="log_threshold")

    def threshold(self):
        """θ, shape (n_latents,)."""
        return ops.exp(self.log_threshold)

    def latents(self, pre_activations, features=None):
        above = pre_activations - of_some(self.threshold(), features)
        ramp = ops.hard_sigmoid(6 * above / self.bandwidth)  # of above / bandwidth + 1/2
        step = ops.cast(above > 0, "float32")
        return ops.relu(pre_activations) * (ramp + ops.stop_gradient(step - ramp))

    def loss_terms(self, x, passed):
        norms = self.decoder_norms()
        cost = ops.sum(ops.tanh(self.tanh_scale * passed["latents"] * norms), axis=-1)
        below = ops.matmul(ops.relu(self.threshold() - passed["pre_activations"]), norms)
        return {
            **super().loss_terms(x, passed),
            "sparsity": self.coefficient() * ops.mean(cost),
            "preactivation": self.preactivation_coefficient * ops.mean(below),
        }


@kind("topk")
class TopKAutoencoder(SparseAutoencoder):
    """The k largest pre-activations of a row are its latents; dead ones learn from the error.

        f = ReLU(TopK(W_enc x + b_enc))
        loss = mean ‖x − x̂‖² + α mean ‖e − ê‖²,  e = x − x̂

    ê is e reconstructed from dead latents only (AuxK). Only choosing the k needs the dense product,
    which is not differentiated: the gradients of the chosen pre-activations come from their encoder
    rows, and they are decoded from their decoder rows (`utils.autoencoder.sparse`).

    Args:
        k: Latents active for a row.
        auxk_coefficient: α; 0 turns AuxK off.
        selection_dtype: Precision of that product, and so of pre-activations, in training. All
            else is float32, in TF32 on a GPU (`utils.backend.quick_products`). After training
            latents are chosen in float32.

    Reference: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", 2.3 and A.2.
    """

    default_unit_decoder = True
    loss_names, training_aids = ("reconstruction", "auxiliary"), ("auxiliary",)

    @staticmethod
    def default_learning_rate(n_latents: int, n_steps: int) -> float:
        """2e-3 for 4,096 latents and 10,000 steps, by n_latents^(−1/2) and n_steps^(−1/4).

        The first exponent is that of Gao et al. 2024, A.3; the second joins what was best for 270
        steps on the embedded model (README) to their 2e-4 for 16,384 latents and many steps.
        """
        return 2e-3 * (4_096 / n_latents) ** 0.5 * (10_000 / n_steps) ** 0.25

    def __init__(
        self,
        k: int = 32,
        auxk_coefficient: float = 1 / 32,
        selection_dtype: str = "float32",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.k, self.auxk_coefficient = k, auxk_coefficient
        self.selection_dtype = selection_dtype

    def top_latents(self, x):
        """The k largest pre-activations of each row and whose they are, both (batch, k)."""
        return exact_top_latents(x, self.W_enc, self.b_enc, self.k)

    def encode_chosen(self, activations: Tensor) -> tuple[ChosenLatents, Tensor]:
        """The k latents of each row of raw activations, and their values, not negative."""
        values, indices = self.top_latents(self.normalise(activations))
        chosen = ChosenLatents(indices, self.n_latents)
        return chosen, ops.relu(chosen.of(values))

    def encode(self, activations, features=None):
        if features is None:
            chosen, values = self.encode_chosen(activations)
            return chosen.dense(values)
        # Only a positive pre-activation can be a latent; most rows of most features have none.
        x = self.normalise(activations)
        values = ops.relu(self.pre_activations(x, features))
        return ops.cond(
            ops.any(values > 0), lambda: self._among_largest(x, features), lambda: values
        )

    def _among_largest(self, x, features):
        values, indices = self.top_latents(x)
        is_chosen = indices[:, None] == ops.cast(features, "int32")[:, None]  # (batch, features, k)
        return ops.sum(ops.where(is_chosen, ops.relu(values)[:, None], 0.0), axis=-1)

    def call(self, activations, training=False):
        if training:
            return super().call(activations, training=True)
        return self._decode_chosen(*self.encode_chosen(activations), activations)

    def active_latents(self, activations):
        chosen, values = self.encode_chosen(activations)
        return *chosen.positive(values), self._decode_chosen(chosen, values, activations)

    def reconstruct_and_count(self, activations):
        chosen, values = self.encode_chosen(activations)
        n_active = ops.sum(ops.cast(ops.reshape(values, (-1, self.k)) > 0, "int32"), axis=-1)
        return self._decode_chosen(chosen, values, activations), n_active

    def _decode_chosen(self, chosen: ChosenLatents, values: Tensor, activations: Tensor) -> Tensor:
        return self.denormalise(chosen.sum(values, self.W_dec) + self.b_dec, activations)

    def choose(self, x: Tensor) -> tuple[ChosenLatents, Tensor]:
        """The latents that a batch uses while training, and their pre-activations."""
        values, indices = top_latents(x, self.W_enc, self.b_enc, self.k, self.selection_dtype)
        chosen = ChosenLatents(indices, self.n_latents)
        return chosen, chosen.of(values)

    def forward_pass(self, x):
        chosen, pre_activations = self.choose(x)
        biases = chosen.take(self.b_enc)
        products = chosen.dot(x, self.W_enc, known=pre_activations - ops.stop_gradient(biases))
        values = ops.relu(products + biases)
        n_active = ops.sum(ops.cast(values > 0, "float32"))
        return {
            **self.reconstruct(chosen, values),
            "l0": n_active / n_rows(x),
            "active": chosen.is_active(values),
        }

    def reconstruct(self, chosen: ChosenLatents, values: Tensor) -> dict[str, Tensor]:
        """What `loss_terms` needs, from the values of the chosen latents."""
        return {"reconstruction": chosen.sum(values, self.W_dec) + self.b_dec}

    def loss_terms(self, x, passed):
        auxiliary = ops.zeros(())
        if self.auxk_coefficient:
            error = ops.stop_gradient(x - passed["reconstruction"])
            auxiliary = self.auxk_coefficient * self.auxk_loss(x, error)
        return {**super().loss_terms(x, passed), "auxiliary": auxiliary}


@kind("batch_topk")
class BatchTopKAutoencoder(TopKAutoencoder):
    """A batch shares k latents a row: easy rows use fewer, hard ones more.

        f = ReLU(π · 1[π among the k · batch largest of the batch]),   π = W_enc x + b_enc
        after training: f = π · 1[π > θ]

    θ is a running mean of the smallest π that was chosen. A row uses at most 4 k.

    Reference: Bussmann et al. 2024, "BatchTopK sparse autoencoders".
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.threshold = self.add_weight((), "zeros", trainable=False, name="threshold")

    def encode(self, activations, features=None):
        pre_activations = self.pre_activations(self.normalise(activations), features)
        return ops.where(pre_activations > self.threshold, ops.relu(pre_activations), 0.0)

    def call(self, activations, training=False):
        return SparseAutoencoder.call(self, activations, training)

    def active_latents(self, activations):
        return SparseAutoencoder.active_latents(self, activations)

    def reconstruct_and_count(self, activations):
        return SparseAutoencoder.reconstruct_and_count(self, activations)

    def choose(self, x):
        width = min(4 * self.k, self.n_latents)
        values, indices = top_latents(x, self.W_enc, self.b_enc, width, self.selection_dtype)
        if self.selection_dtype != "float32":  # too many would be equal at the edge
            values = exact_values(x, indices, self.W_enc, self.b_enc)
        smallest = self._smallest_chosen(values)
        # A mean of all steps at first, then of the last twenty or so.
        weight = 1 / ops.minimum(ops.cast(self.step, "float32") + 1, constant(20.0))
        self.threshold.assign(self.threshold + weight * (smallest - self.threshold))
        n_chosen = ops.shape(indices)[0] * self.k
        chosen = ChosenLatents(indices, self.n_latents, values >= smallest, n_chosen)
        return chosen, chosen.of(values)

    def _smallest_chosen(self, values):
        """The k · batch-th largest of the candidates (batch, width); at least 0."""
        batch, width = ops.shape(values)
        ascending = ops.sort(ops.reshape(values, (-1,)))
        return ops.relu(ascending[(width - self.k) * batch])


@kind("matryoshka")
class MatryoshkaAutoencoder(BatchTopKAutoencoder):
    """BatchTopK whose first latents must do without the later ones, so that they stay general.

        x̂_p = b_dec + Σ_{i < p} f_i W_dec,i
        loss = mean over prefixes p of mean ‖x − x̂_p‖² + α mean ‖e − ê‖²

    Args:
        prefixes: Shares of the latents, rising, the last of them 1.

    Reference: Bussmann et al. 2025, "Learning multi-level features with matryoshka sparse
    autoencoders".
    """

    def __init__(self, prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), **kwargs):
        super().__init__(**kwargs)
        self.prefixes = tuple(prefixes)

    def reconstruct(self, chosen, values):
        reconstruction, prefixes, start = self.b_dec, [], 0
        for share in self.prefixes:
            end = round(share * self.n_latents)
            is_new = ops.cast((chosen.latent >= start) & (chosen.latent < end), "float32")
            reconstruction = reconstruction + chosen.sum(values * is_new, self.W_dec)
            prefixes.append(reconstruction)
            start = end
        return {"reconstruction": reconstruction, "prefixes": prefixes}

    def loss_terms(self, x, passed):
        errors = [squared_error(x, reconstruction) for reconstruction in passed["prefixes"]]
        return {**super().loss_terms(x, passed), "reconstruction": sum(errors) / len(errors)}
