"""Output scores: a feature that writes its token, and one that the model does not read."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import D_MODEL, tiny_language_model

from utils.autoencoder.kinds import L1Autoencoder
from utils.features.sampling import another_of
from utils.features.studies import outputs
from utils.language_model import residual_at
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens

LAYER, OUTLIER = 3, 1e6  # the last block: what is changed there goes straight to the unembedding
WRITTEN, OTHER = 40, 50  # tokens
MAXIMA = np.array([6.0, 6.0], np.float32)


@pytest.fixture(scope="module")
def made():
    """Feature 0 writes a token, feature 1 the first dimension, which the unembedding ignores."""
    model = tiny_language_model()
    model.model.lm_head.weight[:, 0] = 0
    written = model.model.lm_head.weight[WRITTEN]
    autoencoder = L1Autoencoder(d_model=D_MODEL, n_latents=2)
    autoencoder.W_dec.assign(torch.stack([5 * written / written.norm(), torch.eye(D_MODEL)[0]]))
    autoencoder.W_enc.assign(torch.eye(D_MODEL)[:2])
    autoencoder.scale.assign(0.5)
    return FeatureModel(model, LAYER, autoencoder, OUTLIER)


def score(made):
    wanted = {0: [WRITTEN, OTHER], 1: [OTHER]}
    others = {0: [OTHER], 1: [WRITTEN]}
    return outputs.output_scores(made, MAXIMA, wanted, others)


def test_the_score_is_the_rise_in_probability(made):
    model = made.language_model
    expected = np.zeros(2)
    for prompt in outputs.PROMPTS:
        tokens = prompt_tokens(model, prompt)
        residual = residual_at(model, tokens, LAYER)[0, -1]
        latent = torch.relu(residual[0] * 0.5) * 5  # as it is reported
        step = model.model.lm_head.weight[WRITTEN]
        step = step / step.norm() * (MAXIMA[0] - latent) / 0.5
        with torch.no_grad():
            before, after = (
                model.model.lm_head(model.model.model.norm(x)).softmax(-1)
                for x in (residual, residual + step)
            )
        own = (after[[WRITTEN, OTHER]].sum() / before[[WRITTEN, OTHER]].sum()).log()
        expected += np.array([own, (after[OTHER] / before[OTHER]).log()]) / 2
    found = score(made)
    assert found["feature"].tolist() == [0, 1]
    np.testing.assert_allclose(found[["score", "others"]].iloc[0], expected, rtol=1e-3)
    assert expected[0] > 1 > 0.5 > expected[1]
    # What the unembedding does not read writes nothing; it weighs in the norm alone.
    assert found[["score", "others"]].iloc[1].abs().max() < 1


def test_features_are_scored_alone_however_many_at_once(made, monkeypatch):
    together = score(made)
    monkeypatch.setattr(outputs, "N_TOGETHER", 1)
    pd.testing.assert_frame_equal(score(made), together, atol=1e-6)


def test_no_feature_is_compared_with_itself():
    features = [2, 3, 5, 7]
    drawn = [another_of(features, seed) for seed in range(3)]
    for pairs in drawn:
        assert sorted(pairs) == sorted(pairs.values()) == features
        assert all(feature != other for feature, other in pairs.items())
    assert drawn[0] != drawn[1] or drawn[1] != drawn[2]


def test_summary():
    table = pd.DataFrame({"score": [0.0, 1.0, 3.0, 9.0], "others": [0.0, 2.0, 0.0, 0.0]})
    found = outputs.summarise(table)
    assert found.pop("p") == pytest.approx(0.25)  # exact: of ranks 1, 2, 3 the first is against
    assert found == {"n_features": 4, "mean": 3.25, "others_mean": 0.5}
    assert "25.79 times as likely" in outputs.in_words(outputs.summarise(table))
    assert outputs.summarise(table[:0]) == {} and outputs.in_words({}) == ""
    nothing = pd.DataFrame({"score": [0.0], "others": [0.0]})
    assert outputs.summarise(nothing)["p"] == 1


def test_an_analysis_has_a_score_for_every_living_feature(tiny_run):
    features = pd.read_parquet(tiny_run.folder / "analysis" / "features.parquet")
    assert (features["output_score"].isna() == features["dead"]).all()
    assert features["output_score"].abs().max() > 0
    assert (tiny_run.folder / "analysis" / "outputs.png").exists()
