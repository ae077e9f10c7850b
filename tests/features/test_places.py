"""Promoted tokens: those whose logits rise if the residual stream is moved, in any architecture."""

import numpy as np
import pytest
import torch
from tiny_llama import D_MODEL, WORDS, tiny_language_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from utils.features.neurons import neurons_of
from utils.features.studies.places import promoted_tokens
from utils.language_model import LanguageModel, replaced_output, residual_at
from utils.settings import InputError

N_FEATURES = 50
TEXTS = ["<s>", "</s>", *(f"w{i}" for i in range(2, WORDS))]
NAMES = {
    "gemma": "norm", "gemma2": "norm", "gpt_neox": "final_layer_norm", "opt": "final_layer_norm",
    "phi": "final_layernorm", "olmo": "norm", "cohere": "norm", "llama": "norm",
}  # fmt: skip


def random_model(kind: str, **options) -> LanguageModel:
    """A random model of an architecture, whose norm is far from the one it begins with."""
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 64} if kind == "opt" else {"head_dim": 8}
    config = CONFIG_MAPPING[kind](
        vocab_size=WORDS, hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3, **sizes, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    norm = getattr(model.get_decoder(), NAMES.get(kind, "norm"), None)
    for parameter in norm.parameters() if norm else ():
        parameter += torch.randn_like(parameter)
    return LanguageModel(kind, None, model, tiny_language_model().tokenizer)


def moved_logits(model: LanguageModel, directions: torch.Tensor, token: int) -> torch.Tensor:
    """The change of the logits if a little of each direction is added after the last block."""
    tokens = torch.tensor([[token]]).expand(len(directions), -1)

    def logits(change):
        with replaced_output(model.blocks[-1], lambda residual: residual + change[:, None]):
            return model.model(tokens, use_cache=False).logits[:, 0].double()

    return logits(0.02 * directions) - logits(-0.02 * directions)


@pytest.mark.parametrize("kind", NAMES)
def test_promoted_tokens_are_those_that_moving_the_residual_stream_raises(kind):
    model, token = random_model(kind), 7
    residual = residual_at(model, torch.tensor([[token]]), 2)[0, 0].double()
    # A move along the residual stream itself, or along (1, ..., 1), changes the norm's division.
    apart = torch.linalg.qr(torch.stack([residual, torch.ones(D_MODEL).double()], dim=1)).Q
    directions = torch.randn(N_FEATURES, D_MODEL, dtype=torch.double)
    directions = (directions - directions @ apart @ apart.T).float()
    changes = moved_logits(model, directions, token)
    scores = (changes - changes.mean(dim=0)) / changes.std(dim=0)
    table = promoted_tokens(model, directions.numpy(), TEXTS)
    for column, sign in (("promoted_tokens", 1), ("suppressed_tokens", -1)):
        expected = [[TEXTS[i] for i in row] for row in (sign * scores).topk(10).indices]
        assert np.mean(np.array(table[column].tolist()) == np.array(expected)) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lists_of_a_llama_are_those_of_its_norm_weight(dtype):
    model = random_model("llama")
    model.model.to(dtype)
    directions = np.random.default_rng(0).normal(size=(N_FEATURES, D_MODEL)).astype(np.float32)
    norm, unembedding = model.model.model.norm.weight, model.model.lm_head.weight
    read = (unembedding.float() * norm.float()).numpy()
    logits = (directions - directions.mean(axis=0)) @ read.T
    order = np.argsort(-logits / logits.std(axis=0))
    table = promoted_tokens(model, directions, TEXTS)
    assert table["promoted_tokens"].tolist() == [[TEXTS[i] for i in row[:10]] for row in order]
    assert table["suppressed_tokens"].tolist() == [
        [TEXTS[i] for i in row[:-11:-1]] for row in order
    ]
    assert not model.model.model.norm._forward_hooks


@pytest.mark.parametrize(("kind", "name"), [("opt", "fc2"), ("gpt_neox", "mlp.dense_4h_to_h")])
def test_neurons_are_found_by_what_they_are_not_by_a_name(kind, name):
    model, inputs = random_model(kind), []
    last = model.blocks[1].get_submodule(name)
    last.register_forward_pre_hook(lambda _module, values: inputs.append(values[0]))
    with neurons_of(model, 2) as neurons:
        residual_at(model, torch.tensor([[0, 5, 9]]), 1)
    assert len(neurons) == 2 and torch.equal(neurons[1], inputs[0])


def test_a_mixture_of_experts_has_no_such_neurons():
    model = random_model("mixtral", num_local_experts=4)
    with pytest.raises(InputError, match="one MLP"), neurons_of(model, 1):
        pass
