"""Are features special directions? What the loss rises by when they are ablated and doubled.

Where a feature is active, its part f_i · W_dec,i of the residual stream is taken away (× 0) or
added once more (× 2). Beside it, at the same positions and by the same length, the stream is moved
along a direction drawn at random, or drawn with the covariance of the activations. If features are
what the model computes with, it minds their change more than a change elsewhere.

Reference: "Update on how we train SAEs" (Circuits Updates, April 2024); "Scaling Monosemanticity".
"""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from keras import ops
from scipy import stats
from tqdm import tqdm

from utils.activations.store import ActivationStore, spread
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features.analysis import Analysis, Findings
from utils.features.bootstrap import mean_and_interval
from utils.features.studies.neurons import draw_features
from utils.language_model import LanguageModel, load_language_model, replaced_residual
from utils.steering.clamps import encode
from utils.steering.evaluation import as_torch

DIRECTIONS = ("feature", "covariance", "random")
FACTORS = {"ablated": -1.0, "doubled": 1.0}  # times the feature's part, added to the stream
N_FEATURES = 50
N_CONTEXTS = 64  # held out, to look for places where a feature is active
TOKENS_TOGETHER = 1_024  # each takes a row of logits over the whole vocabulary


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
        language_model: The model whose residual stream the autoencoder was trained on, in float32.
        contexts: Where to look for the features, best held out.
        features: Numbers of features.
        seed: Of the directions drawn.

    Returns:
        A row a feature, direction (`DIRECTIONS`) and change (`FACTORS`): ``feature, context,
        direction, change``; ``n``, the positions at which the feature is active in that context,
        the one where it is most active; for each of these positions ``rise``, by how much the
        summed loss of the context grew, and ``kl``, by how much its predictions diverged from the
        untouched ones, both in nats.
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
    table = []
    for i, feature in enumerate(tqdm(features, "changing features", unit="feature")):
        at = int(latents[..., i].sum(dim=1).argmax())
        length = latents[at, :, i] * sizes[i]  # of the change, at each position
        n = int((length > 0).sum())
        if not n:
            continue
        change = changes[:, i, None] * length[:, None]  # (variants, context_length, d_model)
        rises, divergences = _what_changes(language_model, layer, tokens[at], change)
        for (direction, name), rise, kl in zip(variants, rises, divergences, strict=True):
            table.append((feature, contexts[at], direction, name, n, rise / n, kl / n))
    columns = ["feature", "context", "direction", "change", "n", "rise", "kl"]
    return pd.DataFrame(table, columns=columns)


def _what_changes(
    language_model: LanguageModel, layer: int, tokens: torch.Tensor, change: torch.Tensor
) -> tuple[list[float], list[float]]:
    """The rise in loss, and the divergence from the untouched predictions, summed over a context.

    Args:
        tokens: Shape (context,).
        change: What is added to the residual stream, shape (changes, context, d_model).

    Returns:
        Two lists, in nats, an entry a change.
    """
    rises, divergences, untouched = [], [], None
    counted = tokens[1:] != language_model.bos
    change = torch.cat([torch.zeros_like(change[:1]), change])
    for some in change.split(max(1, TOKENS_TOGETHER // len(tokens))):
        # One context goes in; where the changes are added it becomes one for each of them.
        with replaced_residual(
            language_model.blocks[layer], lambda residual, some=some: residual + some.to(residual)
        ):
            every = language_model.model(tokens[None], use_cache=False).logits[:, :-1]
        for logits in every:
            found = logits[counted].float().log_softmax(dim=-1)
            untouched = found if untouched is None else untouched
            gains = (untouched - found).gather(1, tokens[1:][counted, None])
            kl = torch.nn.functional.kl_div(found, untouched, reduction="sum", log_target=True)
            rises.append(math.fsum(gains.flatten().tolist()))
            divergences.append(float(kl))
    return rises[1:], divergences[1:]


def summarise(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Means by direction and change, with 95% intervals.

    Returns:
        For each change and direction ``change, direction, n_features``; of ``rise`` and of ``kl``
        the mean and the interval over features drawn again (bootstrap), three numbers;
        ``larger``, the share of features whose own direction has a larger kl than this one; and
        ``p``, how likely such differences are by chance (Wilcoxon's signed ranks, one-sided).
    """
    grouped = table.set_index(["change", "direction", "feature"]).unstack("feature")
    n = table["feature"].nunique()
    found = []
    for change, direction in itertools.product(FACTORS, DIRECTIONS) if n else ():
        row = {"change": change, "direction": direction, "n_features": n}
        for measure in ("rise", "kl"):
            values = grouped[measure].loc[change, direction].to_numpy()
            row[measure] = mean_and_interval(values, seed)
        more = grouped["kl"].loc[change, "feature"].to_numpy() - values
        differs = direction != "feature" and more.any()
        p = stats.wilcoxon(more, alternative="greater").pvalue if differs else 1.0
        found.append(row | {"larger": float((more > 0).mean()), "p": float(p)})
    return found


def study(analysis: Analysis) -> Findings:
    """The rise in loss for `N_FEATURES` features drawn among those active often enough."""
    store, seed = analysis.store, analysis.settings.seed
    contexts = spread(analysis.held_out, N_CONTEXTS)
    n_tokens = len(contexts) * store.context_length
    frequency = analysis.features["frequency"].to_numpy()
    features = draw_features(frequency, n_tokens, N_FEATURES, seed)
    # In bfloat16 every later token's loss would change by more than the rise that is sought.
    exact = load_language_model(store.model_name, store.layer, "float32")
    table = measure_directions(exact, analysis.autoencoder, store, contexts, features, seed)
    found = summarise(table, seed)
    return Findings(found, in_words(found), {"directions": table})


def in_words(found: list[dict[str, Any]]) -> str:
    """What ablating did, as a sentence."""
    ablated = {row["direction"]: row for row in found if row["change"] == "ablated"}
    if not ablated:
        return ""
    own, other = ablated["feature"], ablated["covariance"]
    return (
        f"Special directions: ablating a feature changes predictions by {own['kl'][0]:.3f} nats "
        f"(KL) where it is active, as large a change elsewhere by {other['kl'][0]:.3f}; more for "
        f"{other['larger']:.0%} of {own['n_features']} features (p = {other['p']:.0e})."
    )
