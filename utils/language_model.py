"""The language model: loading it, and reading and changing its residual stream.

"Layer L" is the output of decoder block L, counted from 0.
Shapes: tokens (batch, context), residual (batch, context, d_model).
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Cache,
    FineGrainedFP8Config,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput
from transformers.utils.quantization_config import QuantizationConfigMixin

from utils import characters, embedded
from utils.backend import cpu_computes_bfloat16
from utils.settings import FULL, InputError, disk_error, hub_token, require

# What transformers raises, besides others, over a model's files.
WRONG_FILES = (OSError, ValueError, TypeError, AttributeError, LookupError, StrictDataclassError)
N_NAMED = 10  # wrong weights that an error lists
UNPACKED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}  # quantised, and plain once loaded


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode on one device."""

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return decoder_blocks(self.model)

    def block_name(self, layer: int) -> str | None:
        """What a block is called as a module of the causal model, such as ``model.layers.15``.

        Other tools find it by that. None for the language part of a multimodal model.
        """
        return _block_name(self.model, layer)

    @property
    def d_model(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def longest_text(self) -> int | None:
        """The most tokens of a text; None if the model names no limit."""
        return longest_text(self.model.config)

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


def beginning_in_words(tokenizer: PreTrainedTokenizerBase) -> str:
    """What every context and document begins with, as a sentence."""
    token = tokenizer.convert_ids_to_tokens(separator_token(tokenizer))
    kind = "BOS" if tokenizer.bos_token_id is not None else "EOS, for the tokenizer has no BOS"
    return f"Contexts and documents begin with {token!r}, {kind}."


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


def longest_text(config: PreTrainedConfig) -> int | None:
    """The most tokens of a text, if the model's configuration gives a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, in order: the one list of as many modules as the model has layers.

    Raises:
        InputError: The model has no such list, or several.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # The decoder first: another part of a multimodal model may have as many layers.
    for part in (model.get_decoder(), model):
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        inner = {id(m) for one in lists for m in one.modules() if m is not one}
        outermost = [one for one in lists if id(one) not in inner]
        if len(outermost) == 1:
            return outermost[0]
    raise InputError(
        "MODEL_NAME must be a decoder with one list of blocks, one for each of its layers; "
        f"{type(model).__name__} has {len(outermost)} lists of {n_layers} modules. Take a model of "
        "another architecture; the README lists some that work."
    )


def read_config(name: str, layer: int) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: A hub name, a folder in the hub's layout, or ``"embedded"``.

    Raises:
        InputError: No access to the model; it is no causal language model with a list of blocks, or
            its weights are quantised; or ``layer`` is out of range.
    """
    if not Path(_source(name)).exists():
        look_for_hub()
    with _loading(name):
        config = AutoConfig.from_pretrained(_source(name), **_hub_options())
        _unpacking(name, config)
        with torch.device("meta"):
            blocks = decoder_blocks(_model_class(name, config).from_config(config))
    require(
        0 <= layer < len(blocks),
        f"LAYER must be between 0 and {len(blocks) - 1} for {name}; it is {layer}.",
    )
    return config


def block_name(name: str, layer: int) -> str:
    """`LanguageModel.block_name` of a model whose weights are not loaded.

    Raises:
        InputError: As for `read_config`; or there is none.
    """
    config = read_config(name, layer)
    with torch.device("meta"):
        found = _block_name(_model_class(name, config).from_config(config), layer)
    require(
        found is not None,
        f"Other tools load {name} as a causal language model, and it is a {config.model_type}, "
        "which has more parts. An autoencoder of it cannot be exported.",
    )
    return found


def _block_name(model: PreTrainedModel, layer: int) -> str | None:
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    block = decoder_blocks(model)[layer]
    return next(name for name, module in model.named_modules() if module is block)


def _model_class(name: str, config: PreTrainedConfig) -> type:
    """What makes the model; a multimodal one is used for its language part."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    require(
        type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING,
        f"MODEL_NAME must be a causal language model; {name} is a {config.model_type}.",
    )
    return AutoModelForMultimodalLM


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises `InputError` if it cannot be loaded."""
    with _loading(name):
        return AutoTokenizer.from_pretrained(_source(name), **_hub_options())


def load_language_model(name: str, layer: int, dtype: str = "auto") -> LanguageModel:
    """Load a model and its tokenizer; for ``dtype`` see `resolve_dtype`.

    Raises:
        InputError: As for `read_config`; or the checkpoint does not hold the model's weights, or
            the tokenizer is not the model's, or what block ``layer`` gives is no residual stream.
    """
    config = read_config(name, layer)
    device = pick_device()
    tokenizer = load_tokenizer(name)
    with _loading(name):
        model, loading = _model_class(name, config).from_pretrained(
            _source(name),
            dtype=resolve_dtype(dtype, device),
            **_hub_options(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the missing ones
            **_unpacking(name, config),
        )
    _require_all_weights(name, model, loading)
    _require_own_tokenizer(name, model, tokenizer)
    model.requires_grad_(False)
    # A model's own settings (LLaMA's: temperature 0.6, top_p 0.9) must not mix into what is asked.
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in ends}
    )
    revision = getattr(config, "_commit_hash", None)
    language_model = LanguageModel(name, revision, model.eval().to(device), tokenizer)
    _require_residual_stream(language_model, layer)
    # Given a slice, such as the last position of a batch, PyTorch would copy the unembedding for
    # each text.
    read_out(language_model)[-1].register_forward_pre_hook(
        lambda _module, inputs: (inputs[0].contiguous(),)
    )
    return language_model


@torch.inference_mode()
def _require_residual_stream(language_model: LanguageModel, layer: int) -> None:
    """Refuse a model that is not causal, or whose block ``layer`` does not give a residual stream.

    Both are tried on two texts that differ in their last token alone.
    """
    bos = language_model.bos
    tokens = torch.tensor([[bos, bos, 1], [bos, bos, 2]], device=language_model.device)
    fault = f"MODEL_NAME must be a decoder of text; {language_model.name} is not: "
    try:
        residual = residual_at(language_model, tokens, layer)
        outputs = language_model.model(tokens, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{fault}it does not run on tokens alone ({error}).") from error
    shape = (*tokens.shape, language_model.d_model)
    require(
        isinstance(residual, torch.Tensor) and residual.shape == shape,
        f"{fault}block {layer} gives no stream of {language_model.d_model} numbers a token.",
    )
    earlier = residual[:, :-1].float()
    is_changed = (earlier[0] - earlier[1]).norm() > 0.05 * earlier[0].norm()  # beyond rounding
    require(
        not is_changed,
        f"{fault}a token changes what the model makes of those before it.",
    )
    require(bool(cache_of(outputs)), f"{fault}it has no cache to go on from with the next token.")


def look_for_hub() -> None:
    """Where the hub cannot be reached, have its client say so at once, not try for a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # of whichever HTTP library the hub's client is made with
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _unpacking(name: str, config: PreTrainedConfig) -> dict[str, QuantizationConfigMixin]:
    """The option that has quantised weights unpacked while they are loaded; refuses some kinds."""
    parts = (config, config.get_text_config())  # of a multimodal model the second, too
    packed = next(filter(None, (getattr(p, "quantization_config", None) for p in parts)), None)
    if packed is None:
        return {}
    kind = packed.get("quant_method", "bitsandbytes")  # which early ones did not name
    require(
        kind in UNPACKED,
        f"MODEL_NAME must have weights that are not quantised, or {' or '.join(UNPACKED)}; those "
        f"of {name} are quantised by {kind}. Take the checkpoint that it was made from.",
    )
    return {"quantization_config": UNPACKED[kind](dequantize=True)}


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
    n_tokens, n_used = model.get_input_embeddings().num_embeddings, separator_token(tokenizer) + 1
    n_used = max(n_used, tokenizer.vocab_size)
    require(
        n_used <= n_tokens,
        f"The tokenizer of {name} must be its own: it has {n_used:,} tokens, and the model embeds "
        f"{n_tokens:,}. Save the model's tokenizer beside it.",
    )


def _hub_options() -> dict[str, str | bool | None]:
    return {"token": hub_token(), "trust_remote_code": False}  # None would ask on the terminal


def _source(name: str) -> str:
    return str(embedded.model_folder()) if name == "embedded" else name


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises over a model into an `InputError` that says what to do."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (ImportError, RuntimeError, SafetensorError, *WRONG_FILES) as error:
        if (refusal := disk_error(error)) is not None and refusal.errno in FULL:
            raise
        raise InputError(_access_error(name, error)) from error


def _access_error(name: str, error: Exception) -> str:
    reason = str(error).strip()
    if isinstance(error, ImportError):
        return f"The model {name} needs a package that is not installed: {reason}"
    if "trust_remote_code" in reason:
        return (
            f"MODEL_NAME must be a model whose code is in transformers; that of {name} is in its "
            "own repository, and is not run. Take another model."
        )
    if Path(_source(name)).exists():
        if (Path(_source(name)) / "config.json").exists():
            return f"Cannot load the model {name}: {reason}"
        return (
            f"{name} is not a model folder in the hub's layout: it has no config.json. Name the "
            "folder that save_pretrained wrote, or that the hub shows as a model's files."
        )
    if not isinstance(error, OSError):  # it was found, and something in it is wrong
        return f"Cannot load the model {name}: {reason}"
    remedy = "Without a token or a network: --model-name embedded --dataset embedded."
    return f"{hub_error(name, error)}\n{remedy}"


def hub_error(name: str, error: Exception) -> str:
    """Why a repository of the hub could not be read, and what to do about it."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return (
            f"{name} is no folder here, and not among what was downloaded before; the hub, "
            f"{huggingface_hub.constants.ENDPOINT}, cannot be reached. Connect to it, or name a "
            f"folder.\n({reason})"
        )
    return (
        f"Cannot load {name}: {reason}\n"
        f"If it is gated, accept its licence at {huggingface_hub.constants.ENDPOINT}/{name}, make "
        f"a token at {huggingface_hub.constants.ENDPOINT}/settings/tokens and put HF_TOKEN=... "
        f"into .env (a token is {'set' if hub_token() else 'not set'} now)."
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
        return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    return torch.bfloat16


@torch.inference_mode()
def read_out(language_model: LanguageModel) -> nn.Sequential:
    """What the residual stream passes after the last block: the final norm, and the unembedding.

    The modules that the model calls there, in order, whatever their names; in some models with a
    projection between the two. The last is the unembedding, a matrix.

    Raises:
        InputError: The last module called is no matrix.
    """
    called, blocks = [], language_model.blocks
    handles = [blocks[-1].register_forward_hook(lambda *_: called.clear())]
    for part in _parts_around(language_model.model, blocks):
        handles.append(part.register_forward_hook(lambda part, *_: called.append(part)))
    try:
        bos = torch.tensor([[language_model.bos]], device=language_model.device)
        language_model.model(bos, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    require(
        bool(called) and getattr(called[-1], "weight", torch.empty(0)).ndim == 2,
        f"MODEL_NAME must make its logits by a matrix, its unembedding; {language_model.name} does "
        "not.",
    )
    return nn.Sequential(*called)


def _parts_around(module: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The outermost modules within a module that are not the blocks and do not contain them."""
    for part in module.children():
        if any(inner is blocks for inner in part.modules()):
            if part is not blocks:
                yield from _parts_around(part, blocks)
        else:
            yield part


def cache_of(outputs: ModelOutput) -> dict[str, Cache]:
    """The KV cache that a pass gave, or a cache of states, as the option of the next pass."""
    return {name: value for name, value in outputs.items() if isinstance(value, Cache)}


class _Stopped(Exception):
    """Ends a forward pass at a block."""


@contextlib.contextmanager
def replaced_output(
    block: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """While open, pass the output of ``block`` through ``replace``; ``None`` keeps it as it is."""

    def hook(_module, _inputs, output):
        residual = output[0] if isinstance(output, tuple) else output
        changed = replace(residual)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Pass(NamedTuple):
    """What a forward pass runs on.

    Attributes:
        tokens: Shape (batch, context), without what a KV cache holds.
        positions: Theirs in each text without its padding, counted from 0, (batch or 1, context).
    """

    tokens: torch.Tensor
    positions: torch.Tensor


@contextlib.contextmanager
def watched_passes(language_model: LanguageModel) -> Iterator[list[Pass]]:
    """While open, the list's one entry is the current pass."""
    passes: list[Pass] = []

    def watch(_module, inputs, options):
        tokens = options["input_ids"] if "input_ids" in options else inputs[0]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if options.get("attention_mask") is not None:
            positions = options["attention_mask"].cumsum(dim=1)[:, -tokens.shape[1] :] - 1
        elif caches := [value for value in options.values() if isinstance(value, Cache)]:
            done = passes[0].positions[:, -1:] + 1 if passes else _tokens_in(caches[0])
            positions = positions + done
        passes[:] = [Pass(tokens, positions)]

    handle = language_model.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def _tokens_in(cache: Cache) -> int:
    """Tokens that a cache has seen; 0 where it only holds states, which do not tell."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0


def residual_at(language_model: LanguageModel, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after block ``layer``; the blocks above it are not run.

    From tokens (batch, context), without padding, to (batch, context, d_model), in the model's
    dtype and on its device.
    """
    (residual,) = residuals_at(language_model, tokens, (layer,))
    return residual


@torch.inference_mode()
def residuals_at(
    language_model: LanguageModel, tokens: torch.Tensor, layers: Collection[int]
) -> list[torch.Tensor]:
    """As `residual_at`, after each of some blocks; those above the deepest are not run."""
    captured = {}

    def capture(layer, residual):
        if layer == max(layers):
            captured[layer] = residual
            raise _Stopped
        captured[layer] = residual.clone()  # the next block may work in its memory

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            replace = functools.partial(capture, layer)
            hooks.enter_context(replaced_output(language_model.blocks[layer], replace))
        with contextlib.suppress(_Stopped):
            language_model.model(tokens.to(language_model.device), use_cache=False)
    return [captured[layer] for layer in layers]
