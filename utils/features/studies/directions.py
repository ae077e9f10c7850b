"""Are features special directions? The rise in loss when they are ablated and doubled.

Where a feature is active, its part f_i · W_dec,i of the residual stream is taken away (× 0) or
added once more (× 2). For comparison the stream is moved, at the same positions and by the same
length, along a direction drawn at random, or drawn with the covariance of the activations. If the
model computes with features, its predictions change more with the feature's own direction.

Reference: "Update on how we train SAEs" (Circuits Updates, April 2024); "Scaling Monosemanticity".
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils import plots
from utils.activations.store import ActivationStore, ContextBatch, Contexts, spread
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.sampling import draw_features, mean_and_interval, p_positive
from utils.features.studies.cross_entropy import logits_together
from utils.language_model import load_language_model
from utils.settings import Json
from utils.steering.feature_model import FeatureModel

DIRECTIONS = ("feature", "covariance", "random")
FACTORS = {"ablated": -1.0, "doubled": 1.0}  # times the feature's part, added to the stream
N_FEATURES = 50
N_CONTEXTS = 64  # held out, to look for places where a feature is active


def draw_directions(
    activations: np.ndarray, n: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions drawn with the covariance of raw activations, and ones drawn evenly.

    A random mixture of centred rows has their covariance. Both results are of shape (n, d_model).
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
    model: FeatureModel, store: ActivationStore, contexts: Contexts, features: np.ndarray, seed: int
) -> pd.DataFrame:
    """The rise in loss when the stream moves along features, or as far along other directions.

    Args:
        model: With a language model in float32.
        contexts: Best held out of training; each feature is changed where it is most active.

    Returns:
        A row a feature, direction (`DIRECTIONS`) and change (`FACTORS`): ``feature, context,
        direction, change``; ``n``, the positions of the context at which the feature is active; a
        position of these, ``rise`` of the context's summed loss, and ``kl``, the divergence of its
        predictions from the untouched ones, both in nats.
    """
    device = model.language_model.device
    numbers = torch.as_tensor(np.array(features), device=device)
    store_batch = ContextBatch(store, contexts)
    tokens = torch.from_numpy(store_batch.tokens).long().to(device)
    lengths = torch.zeros(*tokens.shape, len(features), device=device)  # of a feature's part, raw
    rows = torch.from_numpy(store_batch.rows).to(device)
    together = logits_together(model.language_model)
    parts = [
        model.encode(batch, numbers) * model.token_scale(batch) for batch in rows.split(together)
    ]
    lengths[torch.from_numpy(store_batch.kept).to(device)] = torch.cat(parts) / model.scale
    drawn = draw_directions(store_batch.rows, len(features), seed)
    units = [torch.nn.functional.normalize(model.directions(numbers))]
    units += [directions.to(device) for directions in drawn]
    changes = torch.stack([factor * unit for unit in units for factor in FACTORS.values()])
    variants = [(name, change) for name in DIRECTIONS for change in FACTORS]
    table = []
    for i, feature in enumerate(tqdm(features, "changing features", unit="feature")):
        row = int(lengths[..., i].sum(dim=1).argmax())
        length = lengths[row, :, i]
        n = int((length > 0).sum())
        if not n:
            continue
        change = changes[:, i, None] * length[:, None]  # (variants, context_length, d_model)
        effects = zip(variants, *_measure(model, tokens[row], change, together), strict=True)
        for (direction, name), rise, kl in effects:
            table.append((feature, contexts[row], direction, name, n, rise / n, kl / n))
    columns = ["feature", "context", "direction", "change", "n", "rise", "kl"]
    return pd.DataFrame(table, columns=columns)


def _measure(
    model: FeatureModel, tokens: torch.Tensor, change: torch.Tensor, together: int
) -> tuple[list[float], list[float]]:
    """The rise in loss, and the divergence from the untouched predictions, summed over a context.

    ``change``, (changes, context, d_model), is added to the stream, ``together`` positions at a
    time. Two lists, in nats, an entry a change.
    """
    rises, divergences, untouched = [], [], None
    counted = tokens[1:] != model.language_model.bos
    change = torch.cat([torch.zeros_like(change[:1]), change])
    for batch in change.split(max(1, together // len(tokens))):
        # One context goes in; adding the changes makes one of each.
        with model.replaced(lambda residual, batch=batch: residual + batch.to(residual)):
            outputs = model.language_model.model(tokens[None], use_cache=False)
        for logits in outputs.logits[:, :-1]:
            predicted = logits[counted].float().log_softmax(dim=-1)
            untouched = predicted if untouched is None else untouched
            gains = (untouched - predicted).gather(1, tokens[1:][counted, None])
            kl = torch.nn.functional.kl_div(predicted, untouched, reduction="sum", log_target=True)
            rises.append(math.fsum(gains.flatten().tolist()))
            divergences.append(float(kl))
    return rises[1:], divergences[1:]


def summarise(table: pd.DataFrame, seed: int) -> list[dict[str, Json]]:
    """Means by direction and change, with 95% intervals over features (bootstrap).

    Returns:
        For each change and direction ``change, direction, n_features``; mean and interval of
        ``rise`` and of ``kl``, three numbers each; ``larger``, the share of features whose own
        direction has a larger kl than this one; and ``p`` of these differences (`p_positive`).
    """
    grouped = table.set_index(["change", "direction", "feature"]).unstack("feature")
    n = table["feature"].nunique()
    rows = []
    for change, direction in itertools.product(FACTORS, DIRECTIONS) if n else ():
        row = {"change": change, "direction": direction, "n_features": n}
        for measure in ("rise", "kl"):
            values = grouped[measure].loc[change, direction].to_numpy()
            row[measure] = mean_and_interval(values, seed)
        more = grouped["kl"].loc[change, "feature"].to_numpy() - values
        rows.append(row | {"larger": float((more > 0).mean()), "p": p_positive(more)})
    return rows


def study(analysis: Analysis) -> Findings:
    """The rise in loss for `N_FEATURES` features drawn among those active often enough."""
    store, seed = analysis.store, analysis.settings.seed
    contexts = spread(analysis.held_out, N_CONTEXTS)
    n_tokens = len(contexts) * store.context_length
    frequency = analysis.features["frequency"].to_numpy()
    features = draw_features(frequency, n_tokens, N_FEATURES, seed)
    # In bfloat16, rounding alone would change every later token's loss by more than the rise.
    exact = load_language_model(store.model_name, store.layer, "float32")
    model = FeatureModel(exact, store.layer, analysis.autoencoder, store.outlier_norm)
    table = measure_directions(model, store, contexts, features, seed)
    summary = summarise(table, seed)
    return Findings(summary, in_words(summary), {"directions": table})


def in_words(summary: list[dict[str, Json]]) -> str:
    """The effect of ablating, as a sentence."""
    ablated = {row["direction"]: row for row in summary if row["change"] == "ablated"}
    if not ablated:
        return ""
    feature, other = ablated["feature"], ablated["covariance"]
    return (
        f"Special directions: ablating a feature changes predictions by {feature['kl'][0]:.3f} "
        f"nats (KL) where it is active, as large a change elsewhere by {other['kl'][0]:.3f}; more "
        f"for {other['larger']:.0%} of {feature['n_features']} features (p = {other['p']:.0e})."
    )


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """What changes when the stream moves along features, and as far along other directions."""
    table = pd.DataFrame(catalogue.summary["directions"]).set_index(["direction", "change"])
    path = catalogue.folder / "directions.png"
    title = "What ablating and doubling a feature changes, beside like changes elsewhere"
    title += f" (n = {table.n_features.iloc[0]} features)"
    names = {
        "feature": "the feature's own",
        "covariance": "drawn with the\ncovariance of activations",
        "random": "drawn at random",
    }
    panels = (("kl", "Divergence from the untouched predictions (KL)"), ("rise", "Rise in loss"))
    changes = ((-0.19, "ablated", "× 0", plots.BLUE), (0.19, "doubled", "× 2", plots.ORANGE))
    with plots.picture(path, title, (10, 3.6), ncols=2, sharey=True) as (figure, grid):
        for axes, (measure, heading) in zip(grid, panels, strict=True):
            for offset, change, factor, colour in changes:
                group = table[measure].xs(change, level="change")[list(names)]
                mean, low, high = np.array(group.tolist()).T
                style = {"xerr": [mean - low, high - mean], "capsize": 3, "ecolor": plots.GREY}
                style |= {"color": colour, "label": f"{change} ({factor}), 95% interval"}
                axes.barh(np.arange(len(names)) + offset, mean, 0.36, **style)
            axes.axvline(0, color=plots.GREY, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.set(title=heading, xlabel="nats for each position moved")
            axes.locator_params(axis="x", nbins=6)
        grid[0].set_yticks(range(len(names)), names.values())
        grid[0].invert_yaxis()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return {"Does the model mind a feature's change more?": path}
