"""Steering: clamp features inside what an autoencoder reconstructs, and let the model go on.

With x = x̂ + error, a clamp sets latent i of x̂ and keeps the error, so that

    x' = x + Σ_i (t_i − f_i) W_dec,i,   t_i = c_i · max_i / ‖W_dec,i‖

in normalised units; residual streams here are raw, so the sum is divided by the autoencoder's
``scale``. A feature's activation is reported as f_i ‖W_dec,i‖, and max_i is its maximum over the
dataset, which is why t_i, a latent, is that maximum over the decoder row's norm.

Shapes: residual (batch, context, d_model) or any other leading axes; latents (..., n_latents).
Reference: "Scaling Monosemanticity", Influence on Behavior and Methodological Details.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from keras import ops

from utils.autoencoder import SparseAutoencoder
from utils.evaluation import as_torch
from utils.language_model import LanguageModel, replaced_residual
from utils.settings import require


@dataclasses.dataclass(frozen=True)
class Clamp:
    """A feature held at a multiple of its maximum.

    Attributes:
        feature: Number of the latent.
        strength: Multiples of ``maximum``: 0 ablates the feature, a negative one reverses it. The
            useful range is −10 to 10.
        maximum: The feature's largest reported activation over the dataset, f_i ‖W_dec,i‖.
    """

    feature: int
    strength: float
    maximum: float


@torch.no_grad()
def encode(autoencoder: SparseAutoencoder, residual: torch.Tensor) -> torch.Tensor:
    """Latents of raw residual streams (..., d_model), float32, shape (..., n_latents)."""
    rows = residual.float().reshape(-1, residual.shape[-1])
    latents = as_torch(autoencoder.encode(rows))
    return latents.reshape(*residual.shape[:-1], -1).to(residual.device)


@torch.no_grad()
def clamp_change(
    autoencoder: SparseAutoencoder, residual: torch.Tensor, clamps: Sequence[Clamp]
) -> torch.Tensor:
    """What clamps add to a raw residual stream (..., d_model); the same shape, float32.

    Every clamp is measured on the residual as it was given, so clamps do not depend on their order
    and the change of several is the sum of their changes.
    """
    features = torch.tensor([c.feature for c in clamps], dtype=torch.long, device=residual.device)
    reported = torch.tensor([c.strength * c.maximum for c in clamps])
    directions = as_torch(ops.take(autoencoder.W_dec, features, axis=0)).to(residual.device)
    targets = reported.to(directions) / directions.norm(dim=-1)  # (clamps,)
    present = encode(autoencoder, residual)[..., features]  # (..., clamps)
    return (targets - present) @ directions / as_torch(autoencoder.scale).to(residual.device)


@contextlib.contextmanager
def steered(
    language_model: LanguageModel,
    layer: int,
    autoencoder: SparseAutoencoder,
    clamps: Sequence[Clamp],
    outlier_norm: float,
) -> Iterator[None]:
    """While open, the output of block ``layer`` has ``clamps`` applied at every position.

    Positions whose raw norm is above ``outlier_norm`` (BOS and a few others, 10 to 100 times the
    rest) are left alone: they were kept out of training, so the latents there mean nothing, and
    the model uses these positions as attention sinks, whose content is not about the text.

    A position's change depends on that position alone, so batches work, and so does a KV cache:
    with and without it the model says the same. Computed in float32, returned in the model's dtype.

    Args:
        language_model: The model whose residual stream the autoencoder was trained on.
        layer: The block, counted from 0.
        autoencoder: On the torch backend of Keras.
        clamps: Of different features.
        outlier_norm: That of the activations; ``math.inf`` clamps everywhere.

    Raises:
        InputError: A feature is out of range or clamped twice; while running, a strength takes the
            residual stream out of the range of the model's dtype.
    """
    _check(clamps, autoencoder.n_latents)

    def replace(residual: torch.Tensor) -> torch.Tensor:
        activations = residual.float()
        outliers = activations.norm(dim=-1, keepdim=True) > outlier_norm
        change = clamp_change(autoencoder, activations, clamps)
        changed = torch.where(outliers, activations, activations + change).to(residual.dtype)
        require(
            bool(changed.isfinite().all()),
            f"STRENGTH must keep the residual stream finite in {residual.dtype}; it does not at "
            f"{', '.join(f'{clamp.strength:g}' for clamp in clamps)}. −10 to 10 is the useful "
            "range.",
        )
        return changed

    with replaced_residual(language_model.blocks[layer], replace):
        yield


def _check(clamps: Sequence[Clamp], n_latents: int) -> None:
    features = [clamp.feature for clamp in clamps]
    for feature in features:
        require(
            0 <= feature < n_latents,
            f"FEATURE must be between 0 and {n_latents - 1}; it is {feature}.",
        )
        require(
            features.count(feature) == 1,
            f"A feature can be clamped once; {feature} is clamped {features.count(feature)} times.",
        )


def prompt_tokens(language_model: LanguageModel, prompt: str) -> torch.Tensor:
    """Token ids of a prompt, shape (1, context), begun with BOS as the activations' contexts were.

    Without it the first word would take BOS's place as the attention sink, and be an outlier.
    """
    tokens = language_model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokens[:1] != [language_model.bos]:
        tokens = [language_model.bos, *tokens]
    return torch.tensor([tokens], device=language_model.device)


def generate(
    language_model: LanguageModel,
    prompt: str,
    max_new_tokens: int,
    use_cache: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue a prompt until the model ends its text or ``max_new_tokens`` are there.

    Args:
        language_model: May be `steered` meanwhile.
        prompt: Plain text; no chat template is put around it.
        max_new_tokens: Greater than 0.
        use_cache: Keep keys and values; without, each token runs the whole text again.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from the model's whole
            distribution at that temperature.
        seed: Of the drawing.

    Returns:
        The continuation, without the prompt.

    Raises:
        InputError: Prompt and new tokens do not fit into the model's context.
    """
    model, tokenizer = language_model.model, language_model.tokenizer
    tokens = prompt_tokens(language_model, prompt)
    context = model.config.get_text_config().max_position_embeddings
    require(
        tokens.shape[1] + max_new_tokens <= context,
        f"PROMPT must leave room for MAX_NEW_TOKENS in the model's context of {context} tokens; "
        f"it has {tokens.shape[1]} and {max_new_tokens} are asked for. Shorten either.",
    )
    sampling = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        # A model's own settings (LLaMA's: temperature 0.6, top_p 0.9) must not mix in.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        repetition_penalty=1.0,
        pad_token_id=language_model.bos,  # for batches, which this is not; None would warn
        **sampling,
    )
    return tokenizer.decode(
        generated[0, tokens.shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
