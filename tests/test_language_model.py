"""Loading a language model: whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LAYER
from safetensors.torch import load_file, save_file

from utils.language_model import load_language_model
from utils.settings import InputError


@pytest.fixture
def changed_model(tiny_model, tmp_path):
    """Save the tiny model with other weights and other entries of its config.json."""

    def change(weights=lambda weights: weights, **config) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        path = folder / "model.safetensors"
        save_file(weights(load_file(path)), path, {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return change


def without(*parts):
    return lambda weights: {k: v for k, v in weights.items() if not any(p in k for p in parts)}


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
FAULTS = {
    "a block": (without(".layers.2."), r"model\.layers\.2\.input_layernorm\.weight is missing"),
    "the unembedding": (without("lm_head"), r"lm_head\.weight is missing"),
    "a norm": (without(NORM), r"model\.norm\.weight is missing"),
    "half a norm": (lambda w: w | {NORM: torch.ones(31)}, r"norm\.weight is \(31,\), not \(32,\)"),
    "a bias too many": (lambda w: w | {QUERY: torch.ones(32)}, r"q_proj\.bias is not of Llama"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_lacks_weights_is_refused(changed_model, fault):
    change, says = FAULTS[fault]
    with pytest.raises(InputError, match=says):
        load_language_model(str(changed_model(change)), LAYER, "float32")


def test_many_missing_weights_are_counted(changed_model):
    with pytest.raises(InputError, match=r"; and 17 more\. Download"):
        load_language_model(
            str(changed_model(without(".layers.1.", ".layers.2.", ".layers.3."))), LAYER
        )


def test_a_tied_unembedding_need_not_be_saved_but_the_embedding_must(changed_model):
    folder = changed_model(without("lm_head"), tie_word_embeddings=True)
    model = load_language_model(str(folder), LAYER, "float32").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    path = folder / "model.safetensors"
    save_file(without("embed_tokens")(load_file(path)), path, {"format": "pt"})
    with pytest.raises(InputError, match="is missing"):
        load_language_model(str(folder), LAYER, "float32")


def test_weights_that_the_model_has_no_place_for_are_left_out(changed_model, tiny_model):
    extra = {"value_head.weight": torch.ones(1, 32), "vision.norm.weight": torch.ones(32)}
    folder = changed_model(lambda weights: weights | extra)
    model, same = (
        load_language_model(str(f), LAYER, "float32").model for f in (folder, tiny_model)
    )
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, same(tokens).logits)


def test_a_tokenizer_that_is_missing_or_another_models_is_refused(changed_model):
    def smaller(weights):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        return weights | {name: weights[name][:100].clone() for name in names}

    folder = changed_model(smaller, vocab_size=100)
    with pytest.raises(InputError, match=r"has 320 tokens, and the model embeds 100\. Save"):
        load_language_model(str(folder), LAYER, "float32")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_language_model(str(folder), LAYER, "float32")
