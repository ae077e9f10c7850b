"""Texts that are seen while they are written, several at once, and stopped at any token.

A change of the model is open only while the model runs, never while a reader looks at what is there
so far. Texts that are written at the same time, in turns, therefore do not reach one another.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from transformers import DynamicCache

from utils.language_model import LanguageModel
from utils.steering.clamps import decode, require_room


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
