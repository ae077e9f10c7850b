"""A random LLaMA of four blocks: with a tokenizer of bytes and pairs in the hub's layout, for whole
runs; with one of whole words, w2 to w299, in memory, for functions."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.kinds import KINDS
from utils.language_model import LanguageModel

LAYER = 1
D_MODEL = 32
N_LATENTS = 64
CONTEXT = 64
WORDS = 300
PROMPT = "w10 w20 w30 w40 w50"


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, context: int, d_model: int = D_MODEL, seed: int = 0
) -> LlamaForCausalLM:
    """The model for a tokenizer; ``context`` is the longest text it takes."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # the usual 0.02 leaves so small a model all but constant
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save_tiny_llama(
    folder: Path, texts: Iterable[str], seed: int = 0, d_model: int = D_MODEL
) -> Path:
    """Save the model with a byte-pair tokenizer trained on texts, in the hub's layout."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")
    tiny_llama(tokenizer, 256, d_model, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_language_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model with a tokenizer of whole words."""
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="w2"
    )
    model = tiny_llama(tokenizer, CONTEXT).to(dtype).eval().requires_grad_(False)
    return LanguageModel("tiny", None, model, tokenizer)


def tiny_autoencoder(kind: str, residual: torch.Tensor) -> SparseAutoencoder:
    """A random autoencoder for a residual stream of the model, (..., d_model)."""
    options = {"k": 8} if "k" in KINDS[kind].options() else {}
    autoencoder = KINDS[kind](d_model=D_MODEL, n_latents=N_LATENTS, **options)
    rows = residual.reshape(-1, D_MODEL).float()
    mean = rows.mean(0)
    scale = float(math.sqrt(D_MODEL) / (rows - mean).norm(dim=-1).square().mean().sqrt())
    autoencoder.initialize(scale, mean.numpy(), mean.numpy(), decoder_norm=0.5, seed=1)
    return autoencoder
