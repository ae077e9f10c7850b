"""Which features lead a model to its next token: attribution by gradient, and exact ablation.

With ΔL the difference of two tokens' logits after a prompt, x the residual stream at the layer and
f_i the latents,

    attribution of feature i    Σ over positions of f_i · (W_dec,i · ∇_x ΔL)
    its effect by ablation      ΔL − ΔL with f_i = 0 at every position, the error term kept

in raw units, so that both are logits. The first costs one pass forward and one back for all
features together, the second a pass forward for each.

Reference: "Scaling Monosemanticity", Features as Computational Intermediates.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from keras import ops
from tqdm import tqdm

from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features.bootstrap import draw_again, interval
from utils.language_model import LanguageModel, learnt_positions, replaced_residual
from utils.settings import require
from utils.steering.clamps import encode
from utils.steering.evaluation import as_torch

N_TOGETHER = 32  # features ablated in one batch


class Attribution(NamedTuple):
    """What `attribute` found.

    Attributes:
        difference: ΔL, in logits.
        places: A row a feature and position at which it is active: ``position, feature,
            activation``, f_i ‖W_dec,i‖, and ``attribution``, in logits.
        gradient: ∇_x ΔL of the raw residual stream, shape (context, d_model).
        tokens: The prompt's, shape (1, context).
        pair: The two tokens' numbers.
    """

    difference: float
    places: pd.DataFrame
    gradient: torch.Tensor
    tokens: torch.Tensor
    pair: tuple[int, int]


def token_pair(language_model: LanguageModel, words: tuple[str, ...]) -> tuple[int, int] | None:
    """The numbers of two tokens; None if no words are given.

    Raises:
        InputError: There are not two words, or one is not a single token.
    """
    if not words:
        return None
    require(len(words) == 2, f"PAIR must be two tokens, or none; it is {len(words)}: {words}.")
    numbers = []
    for word in words:
        tokens = language_model.tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces = [language_model.tokenizer.decode([token]) for token in tokens]
        require(
            len(tokens) == 1,
            f"PAIR must be of single tokens; {word!r} is {len(tokens)}: {pieces}. "
            "A word within a text begins with a space, as in ' France'.",
        )
        numbers += tokens
    require(numbers[0] != numbers[1], f"PAIR must be two different tokens; it is {words}.")
    return tuple(numbers)


def attribute(
    language_model: LanguageModel,
    layer: int,
    autoencoder: SparseAutoencoder,
    tokens: torch.Tensor,
    pair: tuple[int, int] | None,
    outlier_norm: float,
) -> Attribution:
    """Attribute the difference of two logits after a prompt to features and positions.

    Args:
        language_model: In float32, for effects are small beside the precision of bfloat16.
        layer: The block whose output the autoencoder is of.
        tokens: Of the prompt, shape (1, context).
        pair: Numbers of the two tokens; None: the likeliest and the second.
        outlier_norm: BOS and positions of a larger raw norm are left out, as they were of training.
    """
    kept = []

    def watch(residual):
        kept.append(residual.detach().requires_grad_())
        return kept[0]

    with replaced_residual(language_model.blocks[layer], watch), torch.enable_grad():
        logits = language_model.model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        pair = tuple(logits.topk(2).indices.tolist()) if pair is None else pair
        difference = logits[pair[0]] - logits[pair[1]]
        (gradient,) = torch.autograd.grad(difference, kept[0])
    residual, gradient = kept[0].detach()[0], gradient[0]
    latents = encode(autoencoder, residual)
    latents *= learnt_positions(language_model, tokens[0], residual, outlier_norm)[:, None]
    position, feature = latents.nonzero(as_tuple=True)
    value = latents[position, feature]
    rows = as_torch(ops.take(autoencoder.W_dec, feature, axis=0)).to(value.device)
    along = (rows * gradient[position]).sum(dim=1) / as_torch(autoencoder.scale).to(value.device)
    columns = {
        "position": position,
        "feature": feature,
        "activation": value * rows.norm(dim=1),
        "attribution": value * along,
    }
    places = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    return Attribution(difference.item(), places, gradient, tokens, pair)


def of_features(found: Attribution) -> pd.DataFrame:
    """Per feature ``activation``, its largest, and ``attribution``, its sum; largest first."""
    both = {"activation": ("activation", "max"), "attribution": ("attribution", "sum")}
    features = found.places.groupby("feature").agg(**both)
    return features.sort_values("attribution", key=abs, ascending=False).reset_index()


@torch.no_grad()
def ablate(
    language_model: LanguageModel,
    layer: int,
    autoencoder: SparseAutoencoder,
    found: Attribution,
    features: np.ndarray,
    outlier_norm: float,
) -> np.ndarray:
    """The effect of each feature on ΔL: by how much it falls without that feature.

    Returns:
        Logits, shape (len(features),).
    """
    if not len(features):
        return np.zeros(0)
    effects = []
    for some in torch.tensor(np.array(features), device=language_model.device).split(N_TOGETHER):

        def remove(residual, some=some):
            present = encode(autoencoder, residual[0], some).T  # (features, context)
            present *= learnt_positions(language_model, found.tokens[0], residual[0], outlier_norm)
            rows = as_torch(ops.take(autoencoder.W_dec, some, axis=0)).to(residual.device)
            change = present[..., None] * rows[:, None]
            return residual - change / as_torch(autoencoder.scale).to(residual.device)

        with replaced_residual(language_model.blocks[layer], remove):
            logits = language_model.model(
                found.tokens.expand(len(some), -1), use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        first, second = found.pair
        effects.append(found.difference - (logits[:, first] - logits[:, second]))
    return torch.cat(effects).cpu().numpy()


def correlate(
    language_model: LanguageModel,
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    n_tokens: int,
    n_features: int,
    seed: int,
) -> pd.DataFrame:
    """Attribution, activation and ablation of features drawn from those active on some prompts.

    Args:
        contexts: Contexts of the store whose beginnings are the prompts, best those held out.
        n_tokens: Length of a prompt.
        n_features: Drawn for each prompt, of all alike.
        seed: Of the drawing.

    Returns:
        A row a prompt and feature: ``prompt, feature, activation, attribution, ablation``.
    """
    tables = []
    model = language_model, store.layer, autoencoder
    for context in tqdm(contexts, desc="ablating", unit="prompt"):
        tokens = np.array(store["tokens"][context][:n_tokens], dtype=np.int64)[None]
        tokens = torch.from_numpy(tokens).to(language_model.device)
        found = attribute(*model, tokens, None, store.outlier_norm)
        table = of_features(found)
        order = np.random.default_rng([seed, context]).permutation(len(table))
        drawn = table.iloc[np.sort(order[:n_features])]
        effects = ablate(*model, found, drawn["feature"].to_numpy(), store.outlier_norm)
        tables.append(drawn.assign(prompt=context, ablation=effects))
    return pd.concat(tables, ignore_index=True)


def correlations(table: pd.DataFrame, seed: int, n_draws: int = 1_000) -> dict[str, Any]:
    """Pearson correlation of attribution, and of activation, with ablation.

    Returns:
        For each of the two its value and 95% interval, over prompts drawn again (bootstrap), three
        numbers; ``n_features`` and ``n_prompts``.
    """
    prompts = [group for _, group in table.groupby("prompt")]
    draws = draw_again(len(prompts), seed, n_draws)
    names = ("attribution", "activation")
    again = [pd.concat([prompts[i] for i in draw]).corr()["ablation"] for draw in draws]
    found = {"n_features": len(table), "n_prompts": len(prompts)}
    for name in names:
        ends = interval([corr[name] for corr in again])
        found[name] = [float(table.corr()["ablation"][name]), *ends]
    return found
