"""Are features special directions? What the loss rises by when they are ablated and doubled.

Where a feature is active, its part f_i · W_dec,i of the residual stream is taken away (× 0) or
added once more (× 2). Beside it, at the same positions and by the same length, the stream is moved
along a direction drawn at random, or drawn with the covariance of the activations. If features are
what the model computes with, it minds their change more than a change elsewhere.

Reference: "Update on how we train SAEs" (Circuits Updates, April 2024); "Scaling Monosemanticity".
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from keras import ops
from tqdm import tqdm

from utils.activations import ActivationStore
from utils.analysis import Analysis, Findings
from utils.autoencoder import SparseAutoencoder
from utils.evaluation import as_torch
from utils.language_model import LanguageModel, replaced_residual
from utils.neurons import draw_features
from utils.steering import encode

DIRECTIONS = ("feature", "covariance", "random")
FACTORS = {"ablated": -1.0, "doubled": 1.0}  # times the feature's part, added to the stream
N_FEATURES = 50
N_CONTEXTS = 64  # held out, to look for places where a feature is active
TOKENS_TOGETHER = 1_024  # each takes a row of logits over the whole vocabulary
N_DRAWS = 1_000  # of the features, for intervals


def draw_directions(
    activations: np.ndarray, n: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions drawn with the covariance of activations, and ones drawn evenly.

    Args:
        activations: Raw, shape (rows, d_model).
        n: How many of each.
        seed: Of the drawing.

    Returns:
        Two tensors, both (n, d_model). A random mixture of centred rows has their covariance.
    """
    draw = np.random.default_rng(seed)
    centred = activations - activations.mean(axis=0)
    mixed = draw.standard_normal((n, len(centred))) @ centred
    even = draw.standard_normal((n, centred.shape[1]))
    return tuple(
        torch.nn.functional.normalize(torch.from_numpy(rows).float()) for rows in (mixed, even)
    )


@torch.inference_mode()
def measure_directions(
    language_model: LanguageModel,
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    features: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """The rise in loss when features, and directions beside them, are changed alike.

    Args:
        language_model: The model whose residual stream the autoencoder was trained on.
        contexts: Where to look for the features, best held out.
        features: Numbers of features.
        seed: Of the directions and contexts drawn.

    Returns:
        A row a feature, direction (`DIRECTIONS`) and change (`FACTORS`): ``feature, context,
        direction, change``; ``n``, the positions at which the feature is active in that context,
        drawn among those that have it; ``rise``, by how much the summed loss of the context grew,
        in nats, for each of these positions.
    """
    device, layer = language_model.device, store.layer
    tokens = torch.from_numpy(np.stack([store["tokens"][c] for c in contexts])).long().to(device)
    kept = torch.from_numpy(np.stack([store["kept"][c] for c in contexts])).to(device)
    chosen = torch.as_tensor(np.array(features), device=device)
    stored = torch.from_numpy(np.stack([store["activations"][c] for c in contexts])).to(device)
    latents = torch.stack([encode(autoencoder, own)[:, chosen] for own in stored])
    latents = latents * kept[..., None]  # (contexts, context_length, features)
    rows = as_torch(ops.take(autoencoder.W_dec, chosen, axis=0)).to(device)
    sizes = rows.norm(dim=1) / as_torch(autoencoder.scale).to(device)
    drawn = draw_directions(store.kept_rows(contexts).astype(np.float32), len(chosen), seed)
    units = [torch.nn.functional.normalize(rows), *(each.to(device) for each in drawn)]
    changes = torch.stack([factor * unit for unit in units for factor in FACTORS.values()])
    variants = [(name, change) for name in DIRECTIONS for change in FACTORS]
    draw, table = np.random.default_rng(seed), []
    for i, feature in enumerate(tqdm(features, "changing features", unit="feature")):
        found = latents[..., i].any(dim=1).nonzero()[:, 0].tolist()
        if not found:
            continue
        at = draw.choice(found)
        length = latents[at, :, i] * sizes[i]  # of the change, at each position
        change = changes[:, i, None] * length[:, None]  # (variants, context_length, d_model)
        change = torch.cat([torch.zeros_like(change[:1]), change])
        untouched, *losses = _summed_losses(language_model, layer, tokens[at], change)
        n = int((length > 0).sum())
        for (direction, name), loss in zip(variants, losses, strict=True):
            rise = (loss - untouched) / n
            table.append((feature, contexts[at], direction, name, n, rise))
    columns = ["feature", "context", "direction", "change", "n", "rise"]
    return pd.DataFrame(table, columns=columns)


def _summed_losses(
    language_model: LanguageModel, layer: int, tokens: torch.Tensor, change: torch.Tensor
) -> list[float]:
    """The loss of all next tokens of one context, in nats, under each of several changes.

    Args:
        tokens: Shape (context,).
        change: What is added to the residual stream, shape (changes, context, d_model).
    """
    losses = []
    for some in change.split(max(1, TOKENS_TOGETHER // len(tokens))):
        # One context goes in; where the changes are added it becomes one for each of them.
        with replaced_residual(
            language_model.blocks[layer], lambda residual, some=some: residual + some.to(residual)
        ):
            every = language_model.model(tokens[None], use_cache=False).logits[:, :-1]
        for logits in every:
            found = torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="none")
            losses.append(float(found[tokens[1:] != language_model.bos].double().sum()))
    return losses


def summarise(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Mean rise by direction and change, a feature counting once, with 95% intervals.

    Returns:
        For each change and direction ``change, direction, n_features, mean, low, high``, the
        interval over features drawn again (bootstrap), and ``larger``, the share of features whose
        own direction raises the loss more than this one.
    """
    means = table.groupby(["change", "direction", "feature"])["rise"].mean().unstack("feature")
    n = means.shape[1]
    draws = np.random.default_rng(seed).integers(0, max(1, n), (N_DRAWS, n))
    found = []
    for change in FACTORS if n else ():
        own = means.loc[change, "feature"].to_numpy()
        for direction in DIRECTIONS:
            rises = means.loc[change, direction].to_numpy()
            low, high = np.percentile(rises[draws].mean(axis=1), [2.5, 97.5])
            row = {"change": change, "direction": direction, "n_features": n}
            row |= {"mean": float(rises.mean()), "low": float(low), "high": float(high)}
            found.append(row | {"larger": float((own > rises).mean())})
    return found


def study(analysis: Analysis) -> Findings:
    """The rise in loss for `N_FEATURES` features drawn among those active often enough."""
    store, seed = analysis.store, analysis.settings.seed
    contexts = analysis.held_out[:N_CONTEXTS]
    n_tokens = len(contexts) * store.context_length
    frequency = analysis.features["frequency"].to_numpy()
    features = draw_features(frequency, n_tokens, N_FEATURES, seed)
    table = measure_directions(
        analysis.language_model, analysis.autoencoder, store, contexts, features, seed
    )
    return Findings(summarise(table, seed), {"directions": table})
