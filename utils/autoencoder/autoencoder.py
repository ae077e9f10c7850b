"""What every kind of sparse autoencoder shares, as a Keras model in backend-neutral `keras.ops`.

Shapes, here and in the modules above: ``batch`` rows, ``d_model`` width of the residual stream,
``n_latents`` size of the dictionary, ``k`` latents active for a row. `activations` are raw
(batch, d_model); x = scale · (activations − center) is what the equations speak of. Row i of
``W_enc`` and of ``W_dec``, both (n_latents, d_model), belongs to latent i, so that gathering a
latent is contiguous.
"""

import inspect

import keras
import numpy as np
from keras import ops

from utils.autoencoder.devices import per_device
from utils.autoencoder.optimizer import UnitRows
from utils.autoencoder.sparse import constant, pre_activations, take_rows, values_at
from utils.backend import Tensor, quick_products
from utils.settings import require

if keras.backend.backend() == "torch":
    import torch

    from utils.autoencoder.recorded import Recorder

LONGEST_IDLE = 2**30  # tokens without firing that are counted; int32 ends at 2**31
LEAST_STD = 1e-5  # added to the deviation that a token is divided by


class SparseAutoencoder(keras.Model):
    """Weights, scaling, decoding, the count of dead latents, training.

        x = scale · (activations − center)
        x̂ = b_dec + Σ_i f_i W_dec,i

    With ``standardize_tokens``, μ and σ being the mean and the deviation (unbiased) of a token's
    own d_model numbers,

        x = scale · ((activations − μ) / (σ + 1e-5) − center)
        raw reconstruction = σ · (x̂ / scale + center) + μ

    A kind says what the latents f are (``encode``), how they are differentiated (``forward_pass``)
    and what they are trained for (``loss_terms``, whose names are declared in ``loss_names``).

    Args:
        d_model: Width of the residual stream.
        n_latents: Size of the dictionary.
        dead_after: A latent is dead that was not active for this many training tokens.
        unit_decoder: Hold the decoder rows at norm 1, and remove the part of their gradient that
            would change it (Bricken et al. 2023, "Towards Monosemanticity", Autoencoder Training).
        standardize_tokens: See above. Some other tools' autoencoders do; none is trained so here.

    Reference: "Scaling Monosemanticity", Sparse Autoencoders; "Update on how we train SAEs"
    (Circuits Updates, April 2024).
    """

    loss_names: tuple[str, ...] = ("reconstruction",)  # of `loss_terms`; each is a metric
    training_aids: tuple[str, ...] = ()  # those of them that say nothing of quality
    auxk_coefficient = 0.0  # of the kinds that have AuxK
    arrays_of_width = 5.0  # (batch, d_model), that a training step holds at once on PyTorch
    arrays_of_latents = 0.0  # (batch, n_latents) likewise
    not_trained = ("standardize_tokens",)  # arguments that only imported autoencoders set

    default_decoder_norm = 0.1
    default_unit_decoder = False
    default_sparsity_warmup = 0.05

    @staticmethod
    def default_learning_rate(n_latents: int, n_steps: int) -> float:
        """The paper's 5e-5 for 200,000 steps; more for fewer, so that 275 steps take 1.6e-2."""
        return 5e-5 * (200_000 / n_steps) ** 0.875

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        dead_after: int = 10_000_000,
        unit_decoder: bool = False,
        standardize_tokens: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.d_model, self.n_latents = d_model, n_latents
        self.standardize_tokens = standardize_tokens
        self.dead_after, self.unit_decoder = dead_after, unit_decoder
        rows = (n_latents, d_model)
        unit = UnitRows() if unit_decoder else None
        self.W_enc = self.add_weight(rows, "zeros", name="W_enc")
        self.b_enc = self.add_weight((n_latents,), "zeros", name="b_enc")
        self.W_dec = self.add_weight(rows, "zeros", name="W_dec", constraint=unit)
        self.b_dec = self.add_weight((d_model,), "zeros", name="b_dec")
        self.scale = self.add_weight((), "ones", trainable=False, name="scale")
        self.center = self.add_weight((d_model,), "zeros", trainable=False, name="center")
        self.step = self.add_weight((), "zeros", dtype="int32", trainable=False, name="step")
        self.idle_tokens = self.add_weight(
            (n_latents,), "zeros", dtype="int32", trainable=False, name="idle_tokens"
        )
        terms = map(metric_name, self.loss_names)
        self._trackers = {
            name: Mean(name=name) for name in ("loss", *terms, "fvu", "l0", "dead_fraction")
        }
        self.tokens_until_dead = 0
        if keras.backend.backend() == "torch":
            self.recorder = Recorder()
        self.built = True

    def initialize(
        self, scale: float, center: np.ndarray, mean: np.ndarray, decoder_norm: float, seed: int
    ) -> None:
        """Set the starting weights, the same on every backend.

        Decoder rows get random directions of one norm and encoder rows start as their copies, as in
        the April 2024 update. b_dec starts at the mean of x and b_enc at −W_enc · b_dec, so that
        no latent begins with an advantage, which saves the steps to lose it.

        Args:
            scale: Scalar that x is multiplied by.
            center: What is subtracted from raw activations before, shape (d_model,).
            mean: Mean of the raw activations, shape (d_model,).
            decoder_norm: Norm of the decoder rows; 0.05 to 1.
            seed: Seed of the directions.
        """
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((self.n_latents, self.d_model), dtype=np.float32)
        rows *= decoder_norm / np.linalg.norm(rows, axis=1, keepdims=True)
        self.scale.assign(scale)
        self.center.assign(center)
        self.W_enc.assign(rows)
        self.W_dec.assign(rows)
        self.b_dec.assign(scale * (mean - center))
        self.b_enc.assign(-rows @ (scale * (mean - center)))

    # ---- inference

    def normalise(self, activations):
        """x of raw activations, float32, shape (batch, d_model)."""
        activations = ops.convert_to_tensor(activations, "float32")
        if self.standardize_tokens:
            mean, deviation = token_moments(activations)
            activations = (activations - mean) / (deviation + LEAST_STD)
        return (activations - self.center) * self.scale

    def denormalise(self, x, activations=None):
        """Raw activations of x, shape (batch, d_model).

        With ``standardize_tokens``, the ``activations`` say each token's mean and deviation.
        """
        raw = x / self.scale + self.center
        if self.standardize_tokens:
            mean, deviation = token_moments(activations)
            raw = raw * deviation + mean
        return raw

    def pre_activations(self, x, features=None):
        """W_enc x + b_enc, shape (batch, n_latents), or (batch, len(features)) of some alone."""
        return pre_activations(x, of_some(self.W_enc, features), of_some(self.b_enc, features))

    def encode(self, activations, features=None):
        """Latents f of raw activations, dense, shape (batch, n_latents).

        Given ``features``, numbers of latents, the values of these alone, (batch, len(features)),
        without computing the others where the kind does not need them.
        """
        raise NotImplementedError

    def decode(self, latents, activations=None):
        """Raw reconstruction of dense latents, shape (batch, d_model).

        With ``standardize_tokens`` it needs the raw ``activations`` that they are of.
        """
        return self.denormalise(ops.matmul(latents, self.W_dec) + self.b_dec, activations)

    def decoder_norms(self):
        """‖W_dec,i‖, shape (n_latents,): a feature's activation is f_i times this."""
        return ops.norm(self.W_dec, axis=1)

    def directions(self) -> np.ndarray:
        """The decoder rows as a NumPy array, shape (n_latents, d_model)."""
        return ops.convert_to_numpy(self.W_dec)

    def active_latents(self, activations):
        """The active latents of raw activations, as tensors of the backend, or NumPy arrays.

        Returns:
            row, latent number and value of each active latent, three of one length in order of row;
            and the raw reconstruction, shape (batch, d_model).
        """
        latents = self.encode(activations)
        places = tuple(ops.nonzero(latents))
        return *places, values_at(latents, places), self.decode(latents, activations)

    def encode_active(self, activations):
        """`active_latents` as NumPy arrays."""
        return tuple(map(ops.convert_to_numpy, self.active_latents(activations)))

    def reconstruct_and_count(self, activations):
        """The raw reconstruction (batch, d_model), and how many latents a row uses, (batch,)."""
        latents = self.encode(activations)
        n_active = ops.sum(ops.cast(latents > 0, "int32"), axis=-1)
        return self.decode(latents, activations), n_active

    def call(self, activations, training=False):
        """Raw reconstruction, shape (batch, d_model); while training, what `loss_terms` needs."""
        if training:
            return self.forward_pass(self.normalise(activations))
        return self.decode(self.encode(activations), activations)

    # ---- training

    def forward_pass(self, x: Tensor) -> dict[str, Tensor]:
        """One differentiable pass over normalised x (batch, d_model), only made while training.

        Returns:
            ``reconstruction`` (batch, d_model), normalised; ``l0``, the mean number of active
            latents; ``active`` (n_latents,), whether a latent was active in the batch; and what
            else the kind's `loss_terms` uses.
        """
        raise NotImplementedError

    def loss_terms(self, x: Tensor, passed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms that add up to the loss of a batch, by the names in ``loss_names``.

        Args:
            x: Normalised, shape (batch, d_model).
            passed: What `forward_pass` returned.

        Returns:
            Scalars, each with its coefficient.
        """
        return {"reconstruction": squared_error(x, passed["reconstruction"])}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Loss and metrics of a batch; called by Keras in `fit` and `evaluate`.

        While evaluating, the loss is the squared error of the reconstruction, made as it will be
        after training, and FVU is the only other metric.

        Raises:
            InputError: The terms of the loss are not those that the kind declares.
        """
        x = self.normalise(x)
        reconstruction = y_pred["reconstruction"] if training else self.normalise(y_pred)
        error = squared_error(x, reconstruction)
        terms = self._declared(self.loss_terms(x, y_pred)) if training else {}
        loss = sum(terms.values()) if training else error
        variance = squared_error(x, ops.mean(x, axis=0))
        values = {**terms, "loss": loss, "fvu": error / variance}
        if training:
            self.step.assign(ops.convert_to_tensor(self.step) + 1)
            idle = ops.convert_to_tensor(self.idle_tokens) + ops.shape(x)[0]
            idle = ops.minimum(idle, constant(LONGEST_IDLE, "int32"))
            self.idle_tokens.assign(ops.where(y_pred["active"], ops.zeros_like(idle), idle))
            values["l0"] = y_pred["l0"]
            values["dead_fraction"] = ops.mean(ops.cast(self.dead(), "float32"))
        for name, value in values.items():
            self._trackers[name].update_state(value)
        return loss

    def _declared(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms of the loss by the names of their metrics."""
        require(
            set(terms) == set(self.loss_names),
            f"{type(self).__name__}.loss_terms returned {', '.join(terms)}, and its loss_names are "
            f"{', '.join(self.loss_names)}. Name the same terms in both.",
        )
        return {metric_name(name): term for name, term in terms.items()}

    def dead(self):
        """Which latents were not active for ``dead_after`` training tokens, bool (n_latents,)."""
        return ops.convert_to_tensor(self.idle_tokens) >= self.dead_after

    def look_for_dead(self) -> None:
        """On PyTorch, ask how soon a latent can be dead: steps until then need not ask."""
        if keras.backend.backend() == "torch":
            self.tokens_until_dead = self.dead_after - int(ops.max(self.idle_tokens))

    @property
    def may_revive(self) -> bool:
        """Whether AuxK is computed in the next step, on PyTorch: a latent may be dead."""
        return bool(self.auxk_coefficient) and self.tokens_until_dead <= 0

    def auxk_loss(self, x, error):
        """‖e − ê‖² for the error e (batch, d_model): dead latents learn what the others miss.

        ê is made from dead latents only, without b_dec, for e has no mean left to add. Of the dead,
        the 4 · k_aux that were idle longest are candidates, and the k_aux = d_model / 2 largest of
        a row are used: that bounds the cost however many are dead. On PyTorch it is 0 without an
        ``auxk_coefficient``.

        Reference: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", A.2.
        """
        if keras.backend.backend() != "torch":
            any_dead = ops.any(self.dead())
            return ops.cond(any_dead, lambda: self._auxk_loss(x, error), lambda: ops.zeros(()))
        if not self.may_revive:
            return ops.zeros(())
        return ops.where(ops.any(self.dead()), self._auxk_loss(x, error), ops.zeros(()))

    def _auxk_loss(self, x, error):
        auxk = min(self.d_model // 2, self.n_latents)
        candidates = min(4 * auxk, self.n_latents)
        # As a tensor, for JAX takes no Keras variable within a traced condition.
        idle, rows = ops.top_k(ops.convert_to_tensor(self.idle_tokens), candidates)
        values = pre_activations(x, take_rows(self.W_enc, rows), take_rows(self.b_enc, rows))
        values = ops.relu(values) * ops.cast(idle >= self.dead_after, "float32")
        largest = per_device(
            lambda share: ops.top_k(share, auxk, sorted=False)[0],
            ("batch",),
            ops.stop_gradient(values),
        )
        weakest = ops.min(largest, axis=-1, keepdims=True)
        latents = ops.where(values >= weakest, values, ops.zeros_like(values))
        return squared_error(error, ops.matmul(latents, take_rows(self.W_dec, rows)))

    if keras.backend.backend() == "torch":

        def train_step(self, data):
            """Keras' step, but that nothing in it waits for the device.

            On a graphics card all but the optimiser's part is recorded and replayed, unless the
            model was compiled with ``run_eagerly``; the next step then overwrites the metrics.
            """
            x, *_ = keras.utils.unpack_x_y_sample_weight(data)
            x = ops.convert_to_tensor(x)
            if self.step.value.is_cuda and not self.run_eagerly:
                gradients, metrics = self.recorder.run(self._gradients, x, self.may_revive)
            else:
                gradients, metrics = self._gradients(x)
            self.optimizer.apply(gradients, self.trainable_weights)
            self.tokens_until_dead -= len(x)
            return metrics

        def _gradients(self, activations):
            """The gradient of each trained weight, and the metrics with this batch."""
            weights = [weight.value for weight in self.trainable_weights]
            with quick_products():
                # What the pass returned is not kept, and goes on the way back.
                loss = self.compute_loss(x=activations, y_pred=self(activations, training=True))
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            return gradients, self.get_metrics_result()

    @property
    def metrics(self):
        return list(self._trackers.values())

    @classmethod
    def options(cls) -> list[str]:
        """Names of the constructor's arguments that training sets, the kind's own first."""
        return [
            name
            for base in cls.__mro__[: cls.__mro__.index(SparseAutoencoder) + 1]
            for name in inspect.signature(base.__init__).parameters
            if name not in ("self", "kwargs", *cls.not_trained)
        ]

    def get_config(self):
        names = (*self.options(), *self.not_trained)
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


class Mean(keras.metrics.Mean):
    """Keras' mean, of scalars; with the name of its class, by which it is found in a backup."""

    def update_state(self, value):
        self.total.assign(ops.convert_to_tensor(self.total) + value)
        self.count.assign(ops.convert_to_tensor(self.count) + 1)


def metric_name(term: str) -> str:
    """What a term of the loss is called among the metrics, and in training_log.csv."""
    return f"loss_{term}"


def token_moments(activations):
    """The mean and the unbiased deviation of each token's d_model numbers, both (batch, 1)."""
    activations = ops.convert_to_tensor(activations, "float32")
    mean = ops.mean(activations, axis=-1, keepdims=True)
    squares = ops.sum(ops.square(activations - mean), axis=-1, keepdims=True)
    return mean, ops.sqrt(squares / (activations.shape[-1] - 1))


def of_some(weights, features):
    """The rows of some latents, by number; all rows for None."""
    return weights if features is None else ops.take(weights, features, axis=0)


def squared_error(x, reconstruction):
    """Mean over the batch of ‖x − x̂‖², summed over d_model."""
    error = ops.reshape(x - reconstruction, (-1,))
    return ops.vdot(error, error) / n_rows(x)  # stores no squares


def n_rows(x):
    """Rows of a batch, as a number or, while TensorFlow does not know it, a scalar float32."""
    n = ops.shape(x)[0]
    return n if isinstance(n, int) else ops.cast(n, "float32")
