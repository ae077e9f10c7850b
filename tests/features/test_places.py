"""Promoted tokens of a LLaMA; tests/test_architectures.py has those of other models."""

import numpy as np
import pytest
import torch
from tiny_llama import D_MODEL, WORDS, tiny_language_model

from utils.features.studies.places import promoted_tokens

N_FEATURES = 50
TEXTS = ["<s>", "</s>", *(f"w{i}" for i in range(2, WORDS))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lists_of_a_llama_are_those_of_its_norm_weight(dtype):
    model = tiny_language_model(dtype)
    norm, unembedding = model.model.model.norm.weight, model.model.lm_head.weight
    norm += torch.randn_like(norm)  # far from the one it begins with
    directions = np.random.default_rng(0).normal(size=(N_FEATURES, D_MODEL)).astype(np.float32)
    read = (unembedding.float() * norm.float()).numpy()
    logits = (directions - directions.mean(axis=0)) @ read.T
    order = np.argsort(-logits / logits.std(axis=0))
    table = promoted_tokens(model, directions, TEXTS)
    assert table["promoted_tokens"].tolist() == [[TEXTS[i] for i in row[:10]] for row in order]
    assert table["suppressed_tokens"].tolist() == [
        [TEXTS[i] for i in row[:-11:-1]] for row in order
    ]
    values = np.sort(logits / logits.std(axis=0))
    for column, expected in (("promoted", values[:, :-11:-1]), ("suppressed", values[:, :10])):
        found = np.array(table[f"{column}_values"].tolist())
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert not model.model.model.norm._forward_hooks
