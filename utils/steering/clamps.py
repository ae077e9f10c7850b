"""Steering: change features inside what an autoencoder reconstructs, and let the model go on.

With x = x̂ + error and a_i = f_i ‖W_dec,i‖ the activation of feature i as it is reported, a change
of a_i is made within x̂ and keeps the error, so that

    x' = x + Σ_i (a'_i − a_i) W_dec,i / ‖W_dec,i‖

    clamp   a'_i = c · max_i         the paper's; c = 0 is the same as ablate
    add     a'_i = a_i + c · max_i
    scale   a'_i = c · a_i
    ablate  a'_i = 0

in normalised units; residual streams here are raw, so the sum is divided by the autoencoder's
``scale``. max_i is the feature's maximum over the dataset.

Shapes: residual (batch, context, d_model) or any other leading axes; latents (..., n_latents).
Reference: "Scaling Monosemanticity", Influence on Behavior and Methodological Details.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from keras import ops

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.language_model import (
    LanguageModel,
    learnt_positions,
    replaced_residual,
    watched_tokens,
)
from utils.settings import require
from utils.steering.evaluation import as_torch

INTERVENTIONS = ("clamp", "add", "scale", "ablate")
PLACES = ("everywhere", "generated")


@dataclasses.dataclass(frozen=True)
class Clamp:
    """What a feature's activation is changed to; a clamp, unless ``how`` says otherwise.

    Attributes:
        feature: Number of the latent.
        strength: c. Multiples of ``maximum``: 0 ablates the feature, a negative one reverses it.
            The useful range is −10 to 10. To scale, multiples of the present activation; of no
            matter to ablate.
        maximum: The feature's largest reported activation over the dataset, f_i ‖W_dec,i‖.
        how: One of `INTERVENTIONS`.
    """

    feature: int
    strength: float
    maximum: float
    how: str = "clamp"

    def line(self) -> tuple[float, float]:
        """Offset and slope: the activation a changes by offset + slope · a."""
        target = self.strength * self.maximum
        lines = {"clamp": (target, -1.0), "add": (target, 0.0), "ablate": (0.0, -1.0)}
        return lines.get(self.how, (0.0, self.strength - 1.0))


@torch.no_grad()
def encode(
    autoencoder: SparseAutoencoder, residual: torch.Tensor, features: torch.Tensor | None = None
) -> torch.Tensor:
    """Latents of raw residual streams (..., d_model), float32, shape (..., n_latents).

    Given ``features``, of these alone, (..., len(features)), which is cheaper.
    """
    rows = residual.float().reshape(-1, residual.shape[-1])
    latents = as_torch(autoencoder.encode(rows, features))
    return latents.reshape(*residual.shape[:-1], latents.shape[-1]).to(residual.device)


def change_by(
    autoencoder: SparseAutoencoder,
    clamps: Sequence[Clamp] | Sequence[Sequence[Clamp]],
    device: torch.device | str = "cpu",
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What clamps add to a raw residual stream (..., d_model): a function to the same shape.

    Every clamp is measured on the residual as it was given, so clamps do not depend on their order
    and the change of several is the sum of their changes.

    Args:
        clamps: Of all texts, or of each row of a batch its own, (batch, context, d_model).
        device: Of the residual stream.

    Raises:
        InputError: A feature is out of range or clamped twice, a strength is not finite, or an
            intervention is unknown.
    """
    of_all = not clamps or isinstance(clamps[0], Clamp)
    rows = [clamps] if of_all else clamps
    for row in rows:
        _check(row, autoencoder.n_latents)
    features = sorted({clamp.feature for row in rows for clamp in row})
    lines = torch.zeros(2, len(rows), 1, len(features))
    for number, row in enumerate(rows):
        for clamp in row:
            lines[:, number, 0, features.index(clamp.feature)] = torch.tensor(clamp.line())
    offset, slope = (lines[:, 0, 0] if of_all else lines).to(device)
    chosen = torch.tensor(features, dtype=torch.long, device=device)
    directions = as_torch(ops.take(autoencoder.W_dec, chosen, axis=0)).to(device)
    norms = directions.norm(dim=-1)
    steps = directions / norms[:, None] / as_torch(autoencoder.scale).to(device)
    present_matters = bool((slope != 0).any())

    def change(residual: torch.Tensor) -> torch.Tensor:
        change = offset
        if present_matters:
            change = offset + slope * norms * encode(autoencoder, residual, chosen)
        return (change @ steps).expand(residual.shape)

    return change


def _check(clamps: Sequence[Clamp], n_latents: int) -> None:
    features = [clamp.feature for clamp in clamps]
    for clamp in clamps:
        feature = clamp.feature
        require(
            0 <= feature < n_latents,
            f"FEATURE must be between 0 and {n_latents - 1}; it is {feature}.",
        )
        require(
            features.count(feature) == 1,
            f"A feature can be clamped once; {feature} is clamped {features.count(feature)} times.",
        )
        require(math.isfinite(clamp.strength), f"STRENGTH must be finite; it is {clamp.strength}.")
        check_change(clamp.how)


def check_change(how: str, where: str | Sequence[int] = "everywhere") -> None:
    """Refuse what is none of `INTERVENTIONS`, and neither a name of `PLACES` nor positions."""
    require(
        how in INTERVENTIONS,
        f"INTERVENTION must be one of {', '.join(INTERVENTIONS)}; it is {how!r}.",
    )
    require(
        where in PLACES if isinstance(where, str) else len(where) > 0 and min(where) > 0,
        f"WHERE must be {' or '.join(PLACES)}, or positions from 1 on, for BOS, at 0, is never "
        f"changed; it is {where!r}.",
    )


@contextlib.contextmanager
def changed(
    language_model: LanguageModel,
    layer: int,
    change: Callable[[torch.Tensor], torch.Tensor],
    outlier_norm: float,
    where: str | Sequence[int] = "everywhere",
) -> Iterator[None]:
    """While open, ``change`` of it is added to the output of block ``layer``.

    BOS, wherever it is, and positions whose raw norm is above ``outlier_norm`` (a few others, 10 to
    100 times the rest) are left alone: they were kept out of training, so the latents there mean
    nothing, and the model uses these positions as attention sinks, whose content is not about the
    text.

    A position's change depends on that position alone, so batches work, padded or not, and so does
    a KV cache: with and without it the model says the same. Computed in float32, returned in the
    model's dtype.

    Args:
        language_model: The model to change.
        layer: The block, counted from 0.
        change: Of a raw residual stream in float32, to the same shape.
        outlier_norm: That of the activations; ``math.inf`` changes all positions but BOS.
        where: ``"everywhere"``; ``"generated"``, from the first generated token on: what comes
            after the first pass while this is open, which is the prompt's; or positions.

    Raises:
        InputError: ``where`` is neither; while running, a change takes the residual stream out of
            the range of the model's dtype.
    """
    check_change(INTERVENTIONS[0], where)
    ends = []  # the last position of each prompt

    def replace(residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        activations = residual.float()
        chosen = learnt_positions(language_model, fed[0], activations, outlier_norm)
        if where == "generated":
            ends[:] = ends or [positions[:, -1:]]
            chosen &= positions > ends[0]
        elif where != "everywhere":
            chosen &= torch.isin(positions, torch.tensor(where, device=positions.device))
        if not chosen.any():
            return None
        chosen = chosen[..., None]
        changed = (activations + change(activations)).to(residual.dtype)
        require(
            bool((changed.isfinite() | ~chosen).all()),
            f"STRENGTH must keep the residual stream finite in {residual.dtype}; it does not. "
            "−10 to 10 is the useful range.",
        )
        return torch.where(chosen, changed, residual)

    block = language_model.blocks[layer]
    with watched_tokens(language_model) as fed, replaced_residual(block, replace, True):
        yield


def steered(
    language_model: LanguageModel,
    layer: int,
    autoencoder: SparseAutoencoder,
    clamps: Sequence[Clamp] | Sequence[Sequence[Clamp]],
    outlier_norm: float,
    where: str | Sequence[int] = "everywhere",
) -> contextlib.AbstractContextManager[None]:
    """While open, the output of block ``layer`` has ``clamps`` applied; see `changed`.

    Args:
        autoencoder: Of the residual stream after this block, on the torch backend of Keras.
        clamps: Of different features; for all texts, or for each row of a batch its own.

    Raises:
        InputError: As for `change_by` and `changed`.
    """
    change = change_by(autoencoder, clamps, language_model.device)
    return changed(language_model, layer, change, outlier_norm, where)


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
