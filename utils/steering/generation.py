"""Prompts as tokens, and texts that continue them, written at once or streamed.

A stream changes the model only while the model runs, not while it yields. Several streams that take
turns therefore do not affect one another.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerBase

from utils.language_model import LanguageModel, cache_of
from utils.settings import require


def prompt_tokens(
    language_model: LanguageModel, prompt: str | list[dict[str, str]], chat: bool = False
) -> torch.Tensor:
    """Token ids of a prompt, shape (1, context), beginning with BOS like the contexts in training.

    Without BOS the first word would become the attention sink, and an outlier. A prompt, or a
    message, that spells a control token such as BOS is text, as it is in training.

    Args:
        prompt: A text; with ``chat`` also a conversation, messages with ``role`` and ``content``.
        chat: Put the prompt into the model's chat template, so that the model replies to it.

    Raises:
        InputError: The model has no chat template, or the prompt is not Unicode.
    """
    tokenizer = language_model.tokenizer
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    require(not re.search("[\ud800-\udfff]", "".join(texts)), "A prompt must be UTF-8; it is not.")
    if chat:
        require(
            bool(tokenizer.chat_template),
            f"CHAT and CHAT_TEMPLATE need a model with a chat template; {language_model.name} has "
            "none. Leave them out, or use an instruction-tuned model.",
        )
        is_text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if is_text else prompt
        tokens = _chat_tokens(tokenizer, messages)
    else:
        tokens = _text_tokens(tokenizer, prompt)
    if tokens[:1] != [language_model.bos]:
        tokens = [language_model.bos, *tokens]
    return torch.tensor([tokens], device=language_model.device)


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """A conversation in the chat template, in which only the template's control tokens are ones."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z."
    contents = "".join(message["content"] for message in messages)
    # A character that no message has, between those that would spell a control token.
    apart = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in contents)
    messages = [
        message
        | {"content": re.sub(control, lambda found: apart.join(found[0]), message["content"])}
        for message in messages
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if apart not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = []
    for number, part in enumerate(re.split(f"({control})", text)):  # texts and control tokens
        if number % 2:
            tokens.append(tokenizer.convert_tokens_to_ids(part))
        else:
            tokens += _text_tokens(tokenizer, part.replace(apart, ""))
    return tokens


def require_room(language_model: LanguageModel, length: int, max_new_tokens: int) -> None:
    """Refuse a prompt of ``length`` tokens that does not leave room for the new ones."""
    context = language_model.longest_text
    require(
        context is None or length + max_new_tokens <= context,
        f"PROMPT must leave room for MAX_NEW_TOKENS in the model's context of {context} tokens; "
        f"it has {length} and {max_new_tokens} are asked for. Shorten either.",
    )


def generate_tokens(
    language_model: LanguageModel,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    use_cache: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Continue prompts in one batch, until the model ends a text or for ``max_new_tokens``.

    Args:
        prompts: See `prompt_tokens`; shorter ones are padded on the left.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from the model's whole
            distribution at that temperature.

    Returns:
        The continuations without their prompts, with the token that ended them.

    Raises:
        InputError: Prompt and new tokens do not fit into the model's context.
    """
    model, device = language_model.model, language_model.device
    length = max(prompt.shape[1] for prompt in prompts)
    require_room(language_model, length, max_new_tokens)
    tokens = torch.full((len(prompts), length), language_model.bos, device=device)
    attention_mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - prompt.shape[1] :] = prompt
        attention_mask[row, length - prompt.shape[1] :] = 1
    sampling = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generated = model.generate(
        tokens,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        pad_token_id=language_model.bos,
        **sampling,
    )[:, length:]
    end = model.generation_config.eos_token_id
    ended = torch.isin(generated, torch.tensor([] if end is None else end, device=device)).int()
    is_text = ended.cumsum(dim=1) - ended == 0
    return [row[kept] for row, kept in zip(generated, is_text, strict=True)]


def generate(
    language_model: LanguageModel, prompt: str, max_new_tokens: int, chat: bool = False, **options
) -> str:
    """The continuation of a prompt, or the reply; see `prompt_tokens`, `generate_tokens`."""
    prompts = [prompt_tokens(language_model, prompt, chat)]
    (tokens,) = generate_tokens(language_model, prompts, max_new_tokens, **options)
    return decode(language_model, tokens)


def decode(language_model: LanguageModel, tokens: torch.Tensor) -> str:
    """The text of tokens, without special ones."""
    return language_model.tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def stream(
    language_model: LanguageModel,
    tokens: torch.Tensor,
    change: Callable[[], AbstractContextManager],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Continue texts a token at a time, each until the model ends it.

    Args:
        tokens: Token ids of the prompts, shape (batch, context), without padding.
        change: Gives a context in which the model is changed; entered anew for each token.
        temperature: As for `generate_tokens`. All rows share the random numbers, so that rows
            differ only by the change of the model, not by chance.

    Yields:
        The continuations so far, a text a row.

    Raises:
        InputError: Prompt and new tokens do not fit into the model's context.
    """
    model = language_model.model
    require_room(language_model, tokens.shape[1], max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    draws = torch.Generator(language_model.device).manual_seed(seed)
    cache = {}
    written = [[] for _ in tokens]
    for _ in range(max_new_tokens):
        with change(), torch.inference_mode():
            outputs = model(tokens, use_cache=True, logits_to_keep=1, **cache)
        cache = cache_of(outputs)
        tokens = choose(outputs.logits[:, -1].float(), temperature, draws)[:, None]
        for text, (token,) in zip(written, tokens.tolist(), strict=True):
            if not ends.intersection(text):
                text.append(token)
        # The end of a text may be an incomplete character; it is shown once it is complete.
        yield [decode(language_model, text).rstrip("�") for text in written]
        if all(ends.intersection(text) for text in written):
            return


def choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> torch.Tensor:
    """The likeliest token of each row, or one drawn by the Gumbel-max trick with shared noise.

    From shape (batch, vocabulary) to (batch,).
    """
    if temperature > 0:
        noise = torch.empty_like(logits[0]).exponential_(generator=draws)
        logits = logits / temperature - noise.log()
    return logits.argmax(dim=-1)
