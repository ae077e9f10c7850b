"""Loading a language model: whole or not at all."""

import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import LAYER
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from utils.activations.corpus import Corpus
from utils.language_model import beginning_in_words, load_language_model, read_config
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


# ---------------------------------------------------------------------------------- quantised


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "awq", "compressed-tensors", None])
def test_quantised_weights_are_refused_without_looking_at_them(changed_model, kind):
    named = {"quant_method": kind} if kind else {"load_in_8bit": True}
    folder = changed_model(quantization_config=named)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"quantised by {kind or 'bitsandbytes'}. Take the check"):
        load_language_model(str(folder), LAYER, "float32")


def test_fp8_weights_are_unpacked(changed_model):
    """Each matrix of a block is stored in 8 bits, with one scale for up to 128 × 128 numbers."""
    expected = {}

    def pack(weights):
        for name in [name for name in weights if "_proj" in name]:
            scale = weights[name].abs().max() / 400
            packed = (weights[name] / scale).to(torch.float8_e4m3fn)
            expected[name] = packed.float() * scale
            weights |= {name: packed, f"{name}_scale_inv": scale.reshape(1, 1)}
        return weights

    kind = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = changed_model(pack, quantization_config=kind)
    loaded = load_language_model(str(folder), LAYER, "float32").model.state_dict()
    assert len(expected) == 28
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight)


# ------------------------------------------------------------------------------------ refusals


FOLDERS = {
    "no config.json": (None, r"not a model folder in the hub's layout: it has no config\.json"),
    "no JSON": ("{", r"Cannot load the model .* valid JSON"),
    "no model known": ({"model_type": "new"}, "Cannot load the model .*`new`"),
    "a width of no number": (
        {"hidden_size": "x"},
        "Cannot load the model .*hidden_s",
    ),
    "code of its own": (
        {"model_type": "new", "auto_map": {"AutoConfig": "new.NewConfig"}},
        "whose code is in transformers",
    ),
    "a missing package": ({"model_type": "gemma3n"}, "package that is not installed: .*timm"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_what_is_wrong_with_a_folder_is_said(changed_model, fault):
    content, says = FOLDERS[fault]
    folder = changed_model(**(content if isinstance(content, dict) else {}))
    if content is None:
        (folder / "config.json").unlink()
    elif isinstance(content, str):
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"(?s){says}"):
        read_config(str(folder), LAYER)


def test_without_a_network_it_is_said_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    name, begun = "nobody/nothing-of-this-name", time.perf_counter()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"the hub, http://127\.0\.0\.1:9, cannot be reached"):
        read_config(name, LAYER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="could not be read from the hub"):
        Corpus(name, None, "train", "text").check()
    assert time.perf_counter() - begun < 10


def test_a_bos_that_the_model_does_not_embed_is_refused(changed_model):
    folder = changed_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"has 321 tokens, and the model embeds 320\. Save"):
        load_language_model(str(folder), LAYER, "float32")


def test_what_contexts_begin_with_is_said(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert beginning_in_words(tokenizer) == "Contexts and documents begin with '<bos>', BOS."
    tokenizer.bos_token = None
    says = "Contexts and documents begin with '<eos>', EOS, for the tokenizer has no BOS."
    assert beginning_in_words(tokenizer) == says
