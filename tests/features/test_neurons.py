"""Neurons: captured as the model computes them, correlations as NumPy has them, planted copies."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import tiny_language_model

from utils.features.neurons import neurons_of
from utils.features.sampling import draw_features
from utils.features.studies.neurons import Correlations, summarise
from utils.language_model import residual_at


def test_correlations_are_those_of_numpy():
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(200, 3)), 5 + draw.normal(size=(200, 4))
    left[:, 0] = right[:, 2] + 0.1 * left[:, 0]
    right[:, 3] = 7  # does not vary
    found = Correlations(3, 4, torch.device("cpu"))
    for rows in np.split(np.arange(200), [37, 120]):
        found.add(*(torch.from_numpy(values[rows]).float() for values in (left, right)))
    expected = np.corrcoef(left.T, right[:, :3].T)[:3, 3:]
    np.testing.assert_allclose(found.pearson()[:, :3], expected, atol=1e-4)
    assert (found.pearson()[:, 3] == 0).all() and found.pearson()[0].argmax() == 2


def test_neurons_are_what_the_last_product_takes_in():
    model = tiny_language_model()
    tokens = torch.tensor([[0, 5, 9, 12], [0, 7, 7, 3]])
    inside = []
    handle = model.blocks[1].post_attention_layernorm.register_forward_hook(
        lambda _module, _inputs, output: inside.append(output)
    )
    with neurons_of(model, 2) as found:
        for _ in range(2):  # what a second pass finds replaces the first
            residual_at(model, tokens, 1)
    handle.remove()
    assert len(found) == 2 and found[0].shape == (2, 4, 64)
    mlp = model.blocks[1].mlp
    expected = mlp.act_fn(mlp.gate_proj(inside[-1])) * mlp.up_proj(inside[-1])
    torch.testing.assert_close(found[1], expected)
    assert not model.blocks[0].mlp.down_proj._forward_pre_hooks


def test_rare_features_are_not_drawn():
    frequency = np.array([0.0, 0.1, 0.0299, 0.03, 0.5])
    assert draw_features(frequency, 1_000, 10, seed=0).tolist() == [1, 3, 4]
    assert len(draw_features(frequency, 1_000, 2, seed=0)) == 2


def test_summary():
    table = pd.DataFrame({"correlation": [0.1, 0.3, 0.31, 0.9]})
    assert summarise(table) == {"n_features": 4, "median": pytest.approx(0.305), "at_most": 0.5}
