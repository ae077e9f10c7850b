"""A language model with an autoencoder in it, against its equations written out."""

import numpy as np
import pytest
import torch
from keras import ops
from tiny_llama import LAYER, N_LATENTS, PROMPT, tiny_autoencoder, tiny_language_model

from utils.autoencoder.kinds import KINDS
from utils.language_model import residual_at
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens


@pytest.fixture(scope="module")
def tokens():
    return prompt_tokens(tiny_language_model(), PROMPT)


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tokens):
    language_model = tiny_language_model()
    autoencoder = tiny_autoencoder(request.param, residual_at(language_model, tokens, LAYER))
    norms = np.linspace(0.5, 2, N_LATENTS, dtype=np.float32)[:, None]  # so that they matter
    autoencoder.W_dec.assign(autoencoder.W_dec * norms)
    return FeatureModel(language_model, LAYER, autoencoder, 1e9)


def weights(model: FeatureModel, *names: str) -> list[torch.Tensor]:
    return [
        ops.convert_to_tensor(getattr(model.autoencoder, name)).detach().double() for name in names
    ]


def test_activations_are_latents_times_the_norms_of_their_rows(model, tokens):
    residual = model.residual(tokens)[0]
    latents = ops.convert_to_tensor(model.autoencoder.encode(residual)).detach()
    (W_dec,) = weights(model, "W_dec")
    expected = (latents.double() * W_dec.norm(dim=1)).float()
    assert (expected > 0).any() and (expected == 0).any()
    torch.testing.assert_close(model.encode(residual), expected)
    subset = torch.tensor([5, 0, 63])
    alone = model.encode(residual[None], subset)
    torch.testing.assert_close(alone, expected[None, :, subset], rtol=1e-5, atol=1e-6)
    row, feature, activation, _ = model.active(residual.numpy())
    dense = torch.zeros_like(expected)
    dense[row, feature] = torch.from_numpy(activation)
    torch.testing.assert_close(dense, expected)


def test_the_reconstruction_is_the_sum_of_activations_along_directions(model, tokens):
    residual = model.residual(tokens)
    b_dec, scale, center = weights(model, "b_dec", "scale", "center")
    directions = model.directions(torch.arange(N_LATENTS)).double()
    (W_dec,) = weights(model, "W_dec")
    torch.testing.assert_close(directions, W_dec / W_dec.norm(dim=1, keepdim=True) / scale,
                               rtol=1e-6, atol=1e-8)  # fmt: skip
    expected = model.encode(residual).double() @ directions + b_dec / scale + center
    reconstruction = model.reconstruct(residual)
    torch.testing.assert_close(reconstruction, expected.float(), rtol=1e-4, atol=1e-5)
    assert (residual - reconstruction).norm() < (residual - residual.mean()).norm()
    *_, of_rows = model.active(residual[0].numpy())
    np.testing.assert_allclose(of_rows, reconstruction[0], rtol=1e-4, atol=1e-5)


def test_positions_that_count_are_neither_bos_nor_outliers(model, tokens):
    twice = torch.cat([tokens, tokens], dim=1)
    residual = model.residual(twice)
    norms = residual.norm(dim=-1)
    limit = float(norms.median())
    strict = FeatureModel(model.language_model, LAYER, model.autoencoder, limit)
    is_bos = twice == model.language_model.bos
    assert is_bos.sum() == 2
    assert torch.equal(model.trained_positions(twice, residual), ~is_bos)
    assert torch.equal(strict.trained_positions(twice, residual), ~is_bos & (norms <= limit))


def test_the_stream_is_that_of_the_layer_and_is_replaced_there(model, tokens):
    run = model.language_model.model
    states = run(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.residual(tokens), states[LAYER + 1])
    with model.replaced(torch.zeros_like):
        assert not model.residual(tokens).any()
    torch.testing.assert_close(model.residual(tokens), states[LAYER + 1])
