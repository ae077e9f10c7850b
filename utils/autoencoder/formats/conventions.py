"""Conventions in which tools differ, each as a change of our weights.

As read, x = scale · (a − center) of activations a, π = W_enc x + b_enc, x̂ = b_dec + f W_dec and
â = x̂ / scale + center. Every function takes the weights by name, as NumPy arrays, and the store of
activations, and returns the weights that are others by its convention; none if it does not apply.
"""

from collections.abc import Callable, Iterator

import numpy as np

from utils.activations.store import ActivationStore

Weights = dict[str, np.ndarray]
Change = Callable[[Weights, ActivationStore], Weights]


def centred(weights: Weights, store: ActivationStore) -> Weights:
    """center = E a, the mean of the activations; as read it is 0."""
    return {} if weights["center"].any() else {"center": store.mean}


def not_centred(weights: Weights, store: ActivationStore) -> Weights:
    """center = 0."""
    return {"center": np.zeros_like(store.mean)} if weights["center"].any() else {}


def scaled(weights: Weights, store: ActivationStore) -> Weights:
    """scale = √(d_model / E‖a − center‖²), which tools also compute as √d_model / E‖a − center‖."""
    center = weights["center"].astype(np.float64)
    square = store.d_model / store.scale**2 - 2 * center @ store.mean + center @ center
    return {"scale": np.float32(np.sqrt(store.d_model / square))}


def not_scaled(weights: Weights, store: ActivationStore) -> Weights:
    """scale = 1."""
    return {"scale": np.float32(1)}


def b_dec_subtracted(weights: Weights, store: ActivationStore) -> Weights:
    """π = W_enc (x − b_dec) + b_enc, which is another b_enc: b_enc − W_enc b_dec."""
    return _shifted(weights, -(weights["W_enc"] @ weights["b_dec"]))


def b_dec_not_subtracted(weights: Weights, store: ActivationStore) -> Weights:
    """Had b_dec been subtracted when read: b_enc + W_enc b_dec."""
    return _shifted(weights, weights["W_enc"] @ weights["b_dec"])


def _shifted(weights: Weights, by: np.ndarray) -> Weights:
    """The biases of the encoder when W_enc x is so much more."""
    shifted = {"b_enc": weights["b_enc"] + by}
    if "b_mag" in weights:  # gated
        shifted["b_mag"] = weights["b_mag"] + np.exp(weights["r_mag"]) * by
    return shifted


def transposed(weights: Weights, store: ActivationStore) -> Weights:
    """x̂ = b_dec + f W_decᵀ, where W_dec is square, so that its shape does not tell."""
    n_latents, d_model = weights["W_dec"].shape
    return {"W_dec": weights["W_dec"].T.copy()} if n_latents == d_model else {}


def threshold_scaled(weights: Weights, store: ActivationStore) -> Weights:
    """θ · scale: the threshold was of π of unscaled activations."""
    return _threshold_times(weights, _scale_of(weights, store))


def threshold_unscaled(weights: Weights, store: ActivationStore) -> Weights:
    """θ / scale: the threshold was of π of scaled activations, and π is of unscaled ones."""
    return _threshold_times(weights, 1 / _scale_of(weights, store))


def threshold_of_feature_activations(weights: Weights, store: ActivationStore) -> Weights:
    """θ_i / ‖W_dec,i‖: the threshold was of π_i ‖W_dec,i‖; for thresholds of each latent."""
    return _threshold_times(weights, 1 / _norms(weights)) if "log_threshold" in weights else {}


def threshold_of_unit_rows(weights: Weights, store: ActivationStore) -> Weights:
    """θ_i · ‖W_dec,i‖: the threshold was of π_i / ‖W_dec,i‖; for thresholds of each latent."""
    return _threshold_times(weights, _norms(weights)) if "log_threshold" in weights else {}


def _norms(weights: Weights) -> np.ndarray:
    return np.maximum(np.linalg.norm(weights["W_dec"], axis=1), np.finfo(np.float32).tiny)


def _scale_of(weights: Weights, store: ActivationStore) -> float:
    """The scale as read; where that is 1, the one that activations would have."""
    scale = float(weights["scale"])
    return scale if scale != 1 else float(scaled(weights, store)["scale"])


def _threshold_times(weights: Weights, factor: float | np.ndarray) -> Weights:
    if "log_threshold" in weights:
        return {"log_threshold": weights["log_threshold"] + np.log(factor)}
    return {"threshold": weights["threshold"] * factor} if "threshold" in weights else {}


# Each in words, as in "as if b_dec is subtracted from the input".
CONVENTIONS: dict[str, Change] = {
    "the mean of the activations is subtracted from them": centred,
    "no mean is subtracted from the activations": not_centred,
    "activations are scaled to E‖x‖² = d_model": scaled,
    "activations are not scaled": not_scaled,
    "b_dec is subtracted from the input": b_dec_subtracted,
    "b_dec is not subtracted from the input": b_dec_not_subtracted,
    "W_dec is transposed": transposed,
    "thresholds are those of unscaled activations": threshold_scaled,
    "thresholds are those of scaled activations": threshold_unscaled,
    "thresholds are those of latents times their decoder norms": threshold_of_feature_activations,
    "thresholds are those of latents over their decoder norms": threshold_of_unit_rows,
}


def changes(
    weights: Weights, store: ActivationStore, beside: str | None = None
) -> Iterator[tuple[str, Weights]]:
    """Every convention in words, with the weights that it changes by more than a hundredth.

    With one to change ``beside`` it, pairs of the two.
    """
    for convention in CONVENTIONS:
        names = [name for name in CONVENTIONS if name in (convention, beside)]
        changed: Weights = {}
        for name in names:
            new, before = CONVENTIONS[name](weights | changed, store), weights | changed
            if all(np.allclose(new[which], before[which], rtol=0.01) for which in new):
                break
            changed |= new
        else:
            if convention != beside:
                yield " and ".join(names), changed
