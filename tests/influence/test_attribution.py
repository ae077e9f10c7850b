"""Attribution and ablation, on a random LLaMA of four blocks and random autoencoders."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from keras import ops
from pictures import drawn, share_of
from tiny_llama import LAYER, PROMPT, tiny_autoencoder, tiny_language_model

from utils.influence import attribution
from utils.influence.attribution import ablate, attribute, by_feature, correlations, token_pair
from utils.language_model import residual_at
from utils.plots import ORANGE
from utils.settings import InputError
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens


@pytest.fixture(scope="module")
def language_model():
    return tiny_language_model(torch.float64)


@pytest.fixture(scope="module")
def tokens(language_model):
    return prompt_tokens(language_model, PROMPT)


@pytest.fixture(scope="module", params=["topk", "l1"])
def model(request, language_model, tokens):
    autoencoder = tiny_autoencoder(request.param, residual_at(language_model, tokens, LAYER))
    return FeatureModel(language_model, LAYER, autoencoder, math.inf)


def difference(model, tokens, pair, change=0.0) -> float:
    """ΔL, with something added to the residual stream at the layer."""

    with model.replaced(lambda residual: residual + change), torch.no_grad():
        logits = model.language_model.model(tokens, use_cache=False).logits[0, -1]
    return float(logits[pair[0]] - logits[pair[1]])


def test_the_pair_is_the_likeliest_two_if_none_is_given(model, tokens):
    result = attribute(model, tokens, None)
    logits = model.language_model.model(tokens).logits[0, -1]
    assert result.pair == tuple(logits.argsort(descending=True)[:2].tolist())
    assert result.difference > 0
    assert result.difference == pytest.approx(difference(model, tokens, result.pair))


def test_the_gradient_is_that_of_finite_differences(model, tokens):
    result = attribute(model, tokens, (7, 20))
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(result.gradient.shape, generator=draw, dtype=torch.float64)
        step = 1e-3 * direction  # the norms compute in float32
        up = difference(model, tokens, result.pair, step)
        down = difference(model, tokens, result.pair, -step)
        expected = float((result.gradient * direction).sum())
        assert (up - down) / 2e-3 == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_attributions_are_activations_times_the_gradient_along_their_rows(model, tokens):
    result = attribute(model, tokens, (7, 20))
    residual = model.residual(tokens)[0].float()
    latents = ops.convert_to_tensor(model.autoencoder.encode(residual)).detach().double()
    latents[0] = 0  # BOS
    W_dec = ops.convert_to_tensor(model.autoencoder.W_dec).detach().double()
    expected = latents * (result.gradient @ W_dec.T) / float(model.autoencoder.scale)
    dense = np.zeros(expected.shape)
    dense[result.places.position, result.places.feature] = result.places.attribution
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-6)
    summed = by_feature(result).set_index("feature").attribution
    np.testing.assert_allclose(summed, expected.sum(0)[summed.index], rtol=1e-4, atol=1e-6)


def test_attribution_is_one_pass_forward_and_one_back(model, tokens, monkeypatch):
    forward, backward = [], []
    handle = model.language_model.model.register_forward_hook(lambda *_: forward.append(1))
    once = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: backward.append(1) or once(*args))
    result = attribute(model, tokens, None)
    handle.remove()
    assert len(by_feature(result)) > 1  # of all features together
    assert (len(forward), len(backward)) == (1, 1)


def test_ablation_is_a_clamp_at_0(model, tokens):
    result = attribute(model, tokens, (7, 20))
    features = by_feature(result).feature.to_numpy()[:40]  # more than are ablated together
    effects = ablate(model, result, features)
    for feature, effect in list(zip(features, effects, strict=True))[::13]:
        with steered(model, [Clamp(int(feature), 0.0, 1.0)]):
            left = difference(model, tokens, result.pair)
        assert effect == pytest.approx(result.difference - left, abs=1e-5)


def test_positions_of_outlying_norm_are_left_alone(model, tokens):
    norms = model.residual(tokens)[0].norm(dim=-1)
    limit = float(norms.sort().values[-2:].mean())
    strict = FeatureModel(model.language_model, LAYER, model.autoencoder, limit)
    everywhere, within = (attribute(each, tokens, (7, 20)) for each in (model, strict))
    outlier = int(norms.argmax())
    assert outlier in set(everywhere.places.position) - set(within.places.position)
    only_there = sorted(set(everywhere.places.feature) - set(within.places.feature))
    effects = ablate(strict, within, np.array(only_there, int))
    assert len(effects) == len(only_there) and effects == pytest.approx(0, abs=1e-9)


def test_correlations_known_answer():
    table = pd.DataFrame({"prompt": [0, 0, 1, 1], "ablation": [1.0, 2.0, 3.0, 4.0]})
    table["attribution"], table["activation"] = 2 * table.ablation, -table.ablation
    result = correlations(table, seed=0, n_draws=20)
    assert (result["n_features"], result["n_prompts"]) == (4, 2)
    assert result["attribution"] == pytest.approx([1, 1, 1])
    assert result["activation"] == pytest.approx([-1, -1, -1])


def test_pairs_of_tokens(language_model):
    assert token_pair(language_model, ()) is None
    assert token_pair(language_model, ("w7", "w30")) == (7, 30)
    with pytest.raises(InputError, match="single tokens; 'w7 w8' is 2: \\['w7', 'w8'\\]"):
        token_pair(language_model, ("w7 w8", "w9"))
    with pytest.raises(InputError, match="two tokens, or none; it is 1"):
        token_pair(language_model, ("w7",))


def test_attribution_of_a_long_prompt_shows_the_tokens_that_count(tmp_path):
    def shown(n: int, strong: int | None):
        values = np.where(np.arange(n) == strong, 2.0, 0.001)
        places = pd.DataFrame({"position": range(n), "feature": range(n), "attribution": values})
        result = SimpleNamespace(difference=1.0, places=places)
        labels = pd.Series([f"label {i}" for i in range(n)])
        words = ["a", "b", *(f"w{i}" for i in range(n))]
        attribution.plot_attribution(result, words, labels, tmp_path / "attribution.png")
        return drawn(tmp_path / "attribution.png")

    long, short = shown(200, 150), shown(attribution.N_POSITIONS, None)
    assert len(long) <= 1.05 * len(short)
    orange = [share_of(picture, ORANGE) for picture in (long, shown(200, None))]
    assert orange[0] > 0.002 and orange[0] < orange[1]  # one bar, not thirty of equal length
