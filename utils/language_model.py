"""The language model: loading it, and reading and changing its residual stream.

"Layer L" is the output of decoder block L, counted from 0.
Shapes: tokens (batch, context), residual (batch, context, d_model).
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils import characters, embedded
from utils.settings import InputError, hub_token, require

N_NAMED = 10  # wrong weights that an error lists


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode on one device."""

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self.model.get_decoder().layers

    @property
    def d_model(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def bos(self) -> int:
        """The token every context begins with: BOS, or EOS for a tokenizer without one."""
        return separator_token(self.tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def separator_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """BOS, which begins every context and every document; EOS where a tokenizer has no BOS."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(token is not None, "The tokenizer must have a BOS or EOS token to separate documents.")
    return token


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token of the vocabulary, as it is in the middle of a text.

    Each is decoded behind another token, because some tokenizers strip the space before the first.
    A part of a character is as in `utils.characters`; BOS, which is no text, a line break.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    clean = {"clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], **clean)
    texts = [text[len(tokenizer.decode([anchor], **clean)) :] for text in texts]
    for number, text in enumerate(texts):
        if "\ufffd" in text:
            escaped = characters.escaped_text(tokenizer.convert_ids_to_tokens(number))
            texts[number] = text if escaped is None else escaped
    texts[separator_token(tokenizer)] = "\n"
    return texts


def read_config(name: str, layer: int) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: A hub name, a folder in the hub's layout, or ``"embedded"``.

    Raises:
        InputError: No access to the model, or ``layer`` is out of range.
    """
    try:
        config = AutoConfig.from_pretrained(_source(name), token=hub_token())
    except (OSError, ValueError) as error:
        raise _access_error(name, error) from None
    n_layers = config.get_text_config().num_hidden_layers
    require(
        0 <= layer < n_layers,
        f"LAYER must be between 0 and {n_layers - 1} for {name}; it is {layer}.",
    )
    return config


def load_language_model(name: str, layer: int, dtype: str = "auto") -> LanguageModel:
    """Load a model and its tokenizer; for ``dtype`` see `resolve_dtype`.

    Raises:
        InputError: As for `read_config`; or the checkpoint does not hold the model's weights, or
            the tokenizer is not the model's.
    """
    config = read_config(name, layer)
    device = pick_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(name), token=hub_token())
        model, loading = AutoModelForCausalLM.from_pretrained(
            _source(name),
            dtype=resolve_dtype(dtype, device),
            token=hub_token(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the missing ones
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _access_error(name, error) from None
    require(
        hasattr(model.get_decoder(), "layers"),
        f"MODEL_NAME must be a decoder whose blocks are its layers, as LLaMA's are; {name} is a "
        f"{type(model).__name__}.",
    )
    _require_all_weights(name, model, loading)
    _require_own_tokenizer(name, model, tokenizer)
    model.requires_grad_(False)
    # A model's own settings (LLaMA's: temperature 0.6, top_p 0.9) must not mix into what is asked.
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in ends}
    )
    # Given a slice, such as the last position of a batch, PyTorch would copy the unembedding for
    # each text.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: (inputs[0].contiguous(),)
    )
    revision = getattr(config, "_commit_hash", None)
    return LanguageModel(name, revision, model.eval().to(device), tokenizer)


def _require_all_weights(name: str, model: PreTrainedModel, loading: dict[str, Iterable]) -> None:
    """Refuse weights that transformers would draw at random, or leave out of a layer it has."""
    wrong = [f"{weight} is missing" for weight in sorted(loading["missing_keys"])]
    for weight, shape, needed in loading["mismatched_keys"]:
        wrong.append(f"{weight} is {tuple(shape)}, not {tuple(needed)}")
    modules = dict(model.named_modules())
    for weight in sorted(loading["unexpected_keys"]):
        module = modules.get(weight.rpartition(".")[0])
        if module is not None and any(True for _ in module.parameters(recurse=False)):
            wrong.append(f"{weight} is not of {type(model).__name__} as config.json describes it")
    n_more = len(wrong) - N_NAMED
    require(
        not wrong,
        f"The checkpoint of {name} must hold exactly the weights of its model; "
        f"{'; '.join(wrong[:N_NAMED])}{f'; and {n_more} more' if n_more > 0 else ''}. Download or "
        "save the model again, with the config.json that belongs to it.",
    )


def _require_own_tokenizer(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse an empty tokenizer, which transformers makes where there is none, or another model's.

    Tokens added beyond the vocabulary, as for padding, may be more than the model has.
    """
    require(
        bool(tokenizer("a", add_special_tokens=False)["input_ids"]),
        f"{name} must have a tokenizer; its folder holds none. Save the model's beside it.",
    )
    n_tokens = model.get_input_embeddings().num_embeddings
    require(
        tokenizer.vocab_size <= n_tokens,
        f"The tokenizer of {name} must be its own: it has {tokenizer.vocab_size:,} tokens, and the "
        f"model embeds {n_tokens:,}. Save the model's tokenizer beside it.",
    )


def _source(name: str) -> str:
    return str(embedded.model_folder()) if name == "embedded" else name


def _access_error(name: str, error: Exception) -> InputError:
    if Path(name).exists():
        return InputError(f"{name} is not a model folder in the hub's layout: {error}")
    reason = str(error).strip().splitlines()[0]
    return InputError(
        f"Cannot load the model {name}: {reason}\n"
        f"If it is gated, accept its licence at https://huggingface.co/{name}, make a token at "
        "https://huggingface.co/settings/tokens and put HF_TOKEN=... into .env "
        f"(a token is {'set' if hub_token() else 'not set'} now).\n"
        "Without a token or a network: --model-name embedded --dataset embedded."
    )


def pick_device() -> torch.device:
    """The accelerator of this process (of this local rank under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def tokens_together(device: torch.device, bytes_per_token: int, elsewhere: int) -> int:
    """Tokens to run at once: what half of a GPU's free memory holds; else ``elsewhere``."""
    if device.type != "cuda":
        return elsewhere
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(1, free // 2 // bytes_per_token)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; ``"auto"`` is bfloat16 if the device computes in it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated, several times slower than float32.
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.bfloat16


def final_norm(language_model: LanguageModel) -> nn.Module:
    """What the residual stream passes between the last block and the unembedding, in float32.

    The modules that the decoder calls there, whatever their names: a norm, and in some models a
    projection.
    """
    called, blocks = [], language_model.blocks
    others = [part for part in language_model.model.get_decoder().children() if part is not blocks]
    handles = [blocks[-1].register_forward_hook(lambda *_: called.clear())]
    handles += [part.register_forward_hook(lambda part, *_: called.append(part)) for part in others]
    try:
        bos = torch.tensor([[language_model.bos]], device=language_model.device)
        language_model.model(bos, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return copy.deepcopy(nn.Sequential(*called)).float()


class _Stopped(Exception):
    """Ends a forward pass at a block."""


@contextlib.contextmanager
def replaced_output(
    block: nn.Module, replace: Callable[..., torch.Tensor | None], with_positions: bool = False
) -> Iterator[None]:
    """While open, pass the output of ``block`` through ``replace``; ``None`` leaves it unchanged.

    ``with_positions`` passes the positions too, (batch or 1, context), counted from 0 in each text
    without its padding.
    """

    def hook(_module, _inputs, options, output):
        residual = output[0] if isinstance(output, tuple) else output
        positions = (options["position_ids"],) if with_positions else ()
        changed = replace(residual, *positions)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def watched_tokens(language_model: LanguageModel) -> Iterator[list[torch.Tensor]]:
    """While open, the list's one entry is the tokens of the current pass, (batch, context)."""
    tokens = []

    def watch(_module, inputs, options):
        tokens[:] = [options["input_ids"] if "input_ids" in options else inputs[0]]

    handle = language_model.model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


@torch.inference_mode()
def residual_at(language_model: LanguageModel, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after block ``layer``; the blocks above it are not run.

    From tokens (batch, context), without padding, to (batch, context, d_model), in the model's
    dtype and on its device.
    """
    captured = []

    def capture_and_stop(residual):
        captured.append(residual)
        raise _Stopped

    block = language_model.blocks[layer]
    with replaced_output(block, capture_and_stop), contextlib.suppress(_Stopped):
        language_model.model(tokens.to(language_model.device), use_cache=False, logits_to_keep=1)
    return captured[0]
