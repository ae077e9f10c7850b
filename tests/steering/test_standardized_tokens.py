"""Autoencoders that standardise each token by itself: equations written out, units of features."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hand_set import array
from keras import ops
from tiny_llama import LAYER, N_LATENTS, PROMPT, tiny_autoencoder, tiny_language_model

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.saved import load_autoencoder, save_autoencoder
from utils.influence.attribution import ablate, attribute, by_feature
from utils.influence.export import steering_vector
from utils.influence.texts import Writer
from utils.language_model import residual_at
from utils.settings import InputError
from utils.steering.clamps import Clamp, change_by, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens


def standardized(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row by its own mean and unbiased deviation; and these, (batch, 1)."""
    mean = activations.mean(axis=-1, keepdims=True)
    deviation = activations.std(axis=-1, keepdims=True, ddof=1)
    return (activations - mean) / (deviation + 1e-5), mean, deviation


def with_option(plain: SparseAutoencoder) -> SparseAutoencoder:
    """The same weights, for activations that are standardised first."""
    made = type(plain).from_config({**plain.get_config(), "standardize_tokens": True})
    made.set_weights(plain.get_weights())
    return made


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(60, 32)) * draw.uniform(0.1, 40, (60, 1)) + draw.normal(size=(60, 1))
    return rows.astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, rows) -> tuple[SparseAutoencoder, SparseAutoencoder]:
    """An autoencoder for standardised rows, and the one that standardises them itself."""
    plain = tiny_autoencoder(request.param, torch.from_numpy(standardized(rows)[0]))
    return plain, with_option(plain)


def test_it_does_to_raw_rows_what_the_plain_one_does_to_standardised_ones(pair, rows):
    plain, made = pair
    x, mean, deviation = standardized(rows)
    latents = array(plain.encode(x))
    assert (latents > 0).any() and (latents == 0).any()
    np.testing.assert_allclose(array(made.encode(rows)), latents, rtol=1e-4, atol=1e-5)
    expected = array(plain(x)) * deviation + mean
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(array(made(rows)), expected, **close)
    np.testing.assert_allclose(array(made.decode(latents, rows)), expected, **close)
    np.testing.assert_allclose(made.encode_active(rows)[3], expected, **close)
    reconstruction, n_active = made.reconstruct_and_count(rows)
    np.testing.assert_allclose(array(reconstruction), expected, **close)
    assert array(n_active).tolist() == (latents > 0).sum(axis=1).tolist()


def test_it_is_saved_and_is_no_setting_of_training(pair, rows, tmp_path):
    plain, made = pair
    save_autoencoder(made, tmp_path / "autoencoder.keras")
    loaded = load_autoencoder(tmp_path / "autoencoder.keras")
    assert loaded.standardize_tokens and not plain.standardize_tokens
    assert np.array_equal(array(loaded(rows)), array(made(rows)))
    assert "standardize_tokens" not in made.options()
    config = plain.get_config()
    del config["standardize_tokens"]  # as earlier versions saved it
    assert not type(plain).from_config(config).standardize_tokens


# ------------------------------------------------------------------------- in a language model


@pytest.fixture(scope="module")
def tokens():
    return prompt_tokens(tiny_language_model(), PROMPT)


@pytest.fixture(scope="module", params=["topk", "l1"])
def model(request, tokens):
    language_model = tiny_language_model()
    residual = residual_at(language_model, tokens, LAYER)
    x = torch.from_numpy(standardized(residual.numpy())[0])
    autoencoder = tiny_autoencoder(request.param, x)
    norms = np.linspace(0.5, 2, N_LATENTS, dtype=np.float32)[:, None]
    autoencoder.W_dec.assign(autoencoder.W_dec * norms)
    return FeatureModel(language_model, LAYER, with_option(autoencoder), math.inf)


def moved(model: FeatureModel, residual: torch.Tensor, feature: int, latent) -> torch.Tensor:
    """By how much the raw reconstruction changes if a latent has another value, as decoding says.

    The rows' own means and deviations are those before the change.
    """
    latents = ops.convert_to_tensor(model.autoencoder.encode(residual)).detach()
    changed = latents.clone()
    changed[:, feature] = latent
    decode = model.autoencoder.decode
    return (decode(changed, residual) - decode(latents, residual)).detach()


def test_the_reconstruction_is_the_sum_of_activations_along_directions(model, tokens):
    residual = model.residual(tokens)
    _, mean, deviation = map(torch.from_numpy, standardized(residual.numpy()))
    torch.testing.assert_close(model.token_scale(residual), deviation, rtol=1e-5, atol=1e-6)
    b_dec, center = (ops.convert_to_tensor(w).detach() for w in
                     (model.autoencoder.b_dec, model.autoencoder.center))  # fmt: skip
    summed = model.encode(residual) @ model.directions(torch.arange(N_LATENTS))
    expected = deviation * (summed + b_dec / model.scale + center) + mean
    torch.testing.assert_close(model.reconstruct(residual), expected, rtol=1e-4, atol=1e-4)


def test_a_clamp_changes_the_stream_as_decoding_says(model, tokens):
    residual = model.residual(tokens)[0]
    activations = model.encode(residual)
    feature = int(activations.sum(dim=0).argmax())
    norm = float(model.norms[feature])
    clamp = Clamp(feature, 2.0, 3.0)  # to an activation of 6, which is a latent of 6 / norm
    expected = moved(model, residual, feature, 6 / norm)
    assert expected.norm(dim=1).min() > 0.1
    found = change_by(model, [clamp])(residual)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # With no need to encode, too: an addition.
    found = change_by(model, [Clamp(feature, 2.0, 3.0, "add")])(residual)
    direction = model.directions(torch.tensor([feature]))
    expected = 6 * direction * model.token_scale(residual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attribution_takes_the_deviation_as_constant(model, tokens):
    result = attribute(model, tokens, (7, 20))
    residual = model.residual(tokens)[0]
    for place in result.places.itertuples():
        # What the feature adds at its place, in raw units, times the gradient there.
        part = -moved(model, residual, place.feature, 0.0)[place.position]
        expected = float(part @ result.gradient[place.position])
        assert place.attribution == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert result.places.position.min() > 0  # not BOS
    features = by_feature(result).feature.to_numpy()[:6]
    effects = ablate(model, result, features)
    for feature, effect in zip(features, effects, strict=True):
        with steered(model, [Clamp(int(feature), 0.0, 1.0)]), torch.no_grad():
            logits = model.language_model.model(tokens, use_cache=False).logits[0, -1]
        left = float(logits[7] - logits[20])
        assert effect == pytest.approx(result.difference - left, abs=1e-4)


def test_other_vectors_are_as_long_as_the_clamp_at_each_token(model, tokens):
    residual = model.residual(tokens).expand(2, -1, -1)
    features = pd.DataFrame({"max_activation": [3.0] * N_LATENTS})
    catalogue = SimpleNamespace(features=features)
    writer = Writer(model, catalogue, SimpleNamespace(seed=0))
    random = writer.change_by_method("random", 5, [1.0, 2.0])(residual)
    added = [[Clamp(5, strength, 3.0, "add")] for strength in (1.0, 2.0)]
    clamp = change_by(model, added)(residual)
    torch.testing.assert_close(random.norm(dim=-1), clamp.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert random.norm(dim=-1)[0].std() > 0.01  # tokens differ


def test_one_vector_for_all_tokens_is_refused(model):
    with pytest.raises(InputError, match="SAVE_VECTOR needs a change that is the same at every"):
        steering_vector(model, [Clamp(0, 1.0, 1.0)])
