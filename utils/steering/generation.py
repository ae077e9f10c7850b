"""Prompts as tokens, and texts that continue them: at once, or seen while they are written.

A change of the model is open only while the model runs, never while a reader looks at what a stream
has so far. Texts that are written at the same time, in turns, therefore do not reach one another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import DynamicCache

from utils.language_model import LanguageModel
from utils.settings import require


def prompt_tokens(
    language_model: LanguageModel, prompt: str | list[dict[str, str]], chat: bool = False
) -> torch.Tensor:
    """Token ids of a prompt, shape (1, context), begun with BOS as the activations' contexts were.

    Without it the first word would take BOS's place as the attention sink, and be an outlier.

    Args:
        chat: Make the prompt a user's message, and let the model reply as an assistant. Then the
            prompt may also be a conversation, messages with a ``role`` and their ``content``.

    Raises:
        InputError: The model has no chat template.
    """
    tokenizer = language_model.tokenizer
    if chat:
        require(
            bool(tokenizer.chat_template),
            f"CHAT and CHAT_TEMPLATE need a model with a chat template; {language_model.name} has "
            "none. Leave them out, or use an instruction-tuned model.",
        )
        is_text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if is_text else prompt
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokens[:1] != [language_model.bos]:
        tokens = [language_model.bos, *tokens]
    return torch.tensor([tokens], device=language_model.device)


def require_room(language_model: LanguageModel, length: int, max_new_tokens: int) -> None:
    """Refuse a prompt of ``length`` tokens that does not leave room for the new ones."""
    context = language_model.model.config.get_text_config().max_position_embeddings
    require(
        length + max_new_tokens <= context,
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
    """Continue prompts, all at once, until the model ends a text or ``max_new_tokens`` are there.

    Args:
        language_model: May be `steered` meanwhile.
        prompts: Of `prompt_tokens`, of any lengths; the shorter are padded on the left.
        max_new_tokens: Greater than 0.
        use_cache: Keep keys and values; without, each token runs the whole text again.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from the model's whole
            distribution at that temperature.
        seed: Of the drawing.

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
        # A model's own settings (LLaMA's: temperature 0.6, top_p 0.9) must not mix in.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generated = model.generate(
        tokens,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        repetition_penalty=1.0,
        pad_token_id=language_model.bos,
        **sampling,
    )[:, length:]
    end = model.generation_config.eos_token_id
    ended = torch.isin(generated, torch.tensor([] if end is None else end, device=device)).int()
    is_text = ended.cumsum(dim=1) - ended == 0
    return [row[kept] for row, kept in zip(generated, is_text, strict=True)]


def generate(
    language_model: LanguageModel, prompt: str, max_new_tokens: int, chat: bool = False, **how
) -> str:
    """The text that continues a prompt, or replies to it; see `prompt_tokens`, `generate_tokens`.

    Returns:
        The continuation, without the prompt.
    """
    prompts = [prompt_tokens(language_model, prompt, chat)]
    (tokens,) = generate_tokens(language_model, prompts, max_new_tokens, **how)
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
        change: Opens what changes the model; called for each token.
        max_new_tokens: Greater than 0.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from the model's whole
            distribution. All rows share the draws, so that equal rows stay equal and the others
            differ by what changes them, not by chance.
        seed: Of the drawing.

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
    cache, fed = DynamicCache(config=model.config), tokens
    written = [[] for _ in tokens]
    for _ in range(max_new_tokens):
        with change(), torch.inference_mode():
            logits = model(fed, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        chosen = choose(logits, temperature, draws)
        for text, token in zip(written, chosen.tolist(), strict=True):
            if not ends.intersection(text):
                text.append(token)
        # A character of several tokens is shown once it is whole.
        yield [decode(language_model, text).rstrip("�") for text in written]
        if all(ends.intersection(text) for text in written):
            return
        fed = chosen[:, None]


def choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> torch.Tensor:
    """A token a row: the likeliest, or one drawn by the Gumbel-max trick with noise for all rows.

    Args:
        logits: Shape (batch, vocabulary).

    Returns:
        Shape (batch,).
    """
    if temperature > 0:
        noise = torch.empty_like(logits[0]).exponential_(generator=draws)
        logits = logits / temperature - noise.log()
    return logits.argmax(dim=-1)
