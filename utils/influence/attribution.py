"""Which features lead a model to its next token: attribution by gradient, and exact ablation.

With ΔL the difference of two tokens' logits after a prompt, x the residual stream at the layer and
f_i the latents, in raw units, so that both are logits:

    attribution of feature i    Σ over positions of f_i · (W_dec,i · ∇_x ΔL)
    effect of its ablation      ΔL − ΔL with f_i = 0 at every position, the error term kept

Where an imported autoencoder standardises each token, a row is multiplied by the token's deviation,
which is taken as a constant: features are not credited with what they add to the deviation itself.

Attribution takes one forward and one backward pass for all features together, ablation a forward
pass for each.

Reference: "Scaling Monosemanticity", Features as Computational Intermediates.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils import plots
from utils.activations.store import ActivationStore, Contexts
from utils.features.sampling import draw_again, interval
from utils.language_model import LanguageModel
from utils.settings import Json, require
from utils.steering.feature_model import FeatureModel
from utils.terminal import one_line

N_SHOWN = 5  # features drawn at a token
N_POSITIONS = 30  # tokens of a prompt that are drawn
ABLATION_BATCH = 32  # features


class Attribution(NamedTuple):
    """The result of `attribute`.

    Attributes:
        difference: ΔL, in logits.
        places: A row for each active feature at each position: ``position, feature, activation``,
            f_i ‖W_dec,i‖, and ``attribution``, in logits.
        gradient: ∇_x ΔL of the raw residual stream, shape (context, d_model).
        tokens: The prompt, shape (1, context).
        pair: Ids of the two tokens.
    """

    difference: float
    places: pd.DataFrame
    gradient: torch.Tensor
    tokens: torch.Tensor
    pair: tuple[int, int]


def token_pair(language_model: LanguageModel, words: tuple[str, ...]) -> tuple[int, int] | None:
    """The ids of two tokens; None if no words are given.

    Raises:
        InputError: There are not two words, or one is not a single token.
    """
    if not words:
        return None
    require(len(words) == 2, f"PAIR must be two tokens, or none; it is {len(words)}: {words}.")
    pair = []
    for word in words:
        tokens = language_model.tokenizer(word, add_special_tokens=False)["input_ids"]
        token_texts = [language_model.tokenizer.decode([token]) for token in tokens]
        require(
            len(tokens) == 1,
            f"PAIR must be of single tokens; {word!r} is {len(tokens)}: {token_texts}. "
            "A word within a text begins with a space, as in ' France'.",
        )
        pair += tokens
    require(pair[0] != pair[1], f"PAIR must be two different tokens; it is {words}.")
    return tuple(pair)


def attribute(
    model: FeatureModel, tokens: torch.Tensor, pair: tuple[int, int] | None
) -> Attribution:
    """Attribute the difference of two logits after a prompt to features and positions.

    BOS and norm outliers are left out, as in training.

    Args:
        model: In float32: the effects are too small for the precision of bfloat16.
        tokens: The prompt, shape (1, context).
        pair: Ids of the two tokens; None: the two likeliest.
    """
    streams = []

    def record(residual):
        streams.append(residual.detach().requires_grad_())
        return streams[0]

    with model.replaced(record), torch.enable_grad():
        run = model.language_model.model
        logits = run(tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        pair = tuple(logits.topk(2).indices.tolist()) if pair is None else pair
        difference = logits[pair[0]] - logits[pair[1]]
        (gradient,) = torch.autograd.grad(difference, streams[0])
    residual, gradient = streams[0].detach()[0], gradient[0]
    activations = model.encode(residual)
    activations *= model.trained_positions(tokens[0], residual)[:, None]
    position, feature = activations.nonzero(as_tuple=True)
    value = activations[position, feature]
    scaled = gradient * model.token_scale(residual)
    slope = (model.directions(feature) * scaled[position]).sum(dim=1)
    columns = {"position": position, "feature": feature}
    columns |= {"activation": value, "attribution": value * slope}
    places = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    return Attribution(difference.item(), places, gradient, tokens, pair)


def by_feature(attribution: Attribution) -> pd.DataFrame:
    """The largest ``activation`` and summed ``attribution`` of each feature; largest first."""
    columns = {"activation": "max", "attribution": "sum"}
    features = attribution.places.groupby("feature").agg(columns)
    return features.sort_values("attribution", key=abs, ascending=False).reset_index()


@torch.no_grad()
def ablate(model: FeatureModel, attribution: Attribution, features: np.ndarray) -> np.ndarray:
    """By how much ΔL falls without each feature, in logits, shape (len(features),)."""
    if not len(features):
        return np.zeros(0)
    tokens, effects = attribution.tokens, []
    latents = torch.tensor(np.array(features), device=model.language_model.device)
    for batch in latents.split(ABLATION_BATCH):

        def remove(residual, batch=batch):
            activations = model.encode(residual[0], batch).T  # (features, context)
            activations *= model.trained_positions(tokens[0], residual[0])
            activations = activations[..., None] * model.token_scale(residual[0])
            return residual - activations * model.directions(batch)[:, None]

        with model.replaced(remove):
            logits = model.language_model.model(
                tokens.expand(len(batch), -1), use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        first, second = attribution.pair
        effects.append(attribution.difference - (logits[:, first] - logits[:, second]))
    return torch.cat(effects).cpu().numpy()


def compare_with_ablation(
    model: FeatureModel,
    store: ActivationStore,
    contexts: Contexts,
    n_tokens: int,
    n_features: int,
    seed: int,
) -> pd.DataFrame:
    """Attribution, activation and ablation of active features on the beginnings of contexts.

    Args:
        contexts: Preferably held out of training; the first ``n_tokens`` of each are a prompt.
        n_features: Drawn at random from the features active on each prompt.

    Returns:
        A row a prompt and feature: ``prompt, feature, activation, attribution, ablation``.
    """
    tables = []
    device = model.language_model.device
    for context in tqdm(contexts, desc="ablating", unit="prompt"):
        tokens = store.read("tokens", [context])[:, :n_tokens]
        attribution = attribute(model, torch.from_numpy(tokens).long().to(device), None)
        table = by_feature(attribution)
        order = np.random.default_rng([seed, context]).permutation(len(table))
        drawn = table.iloc[np.sort(order[:n_features])]
        effects = ablate(model, attribution, drawn["feature"].to_numpy())
        tables.append(drawn.assign(prompt=context, ablation=effects))
    return pd.concat(tables, ignore_index=True)


def correlations(table: pd.DataFrame, seed: int, n_draws: int = 1_000) -> dict[str, Json]:
    """Pearson correlation of ``attribution``, and of ``activation``, with the effect of ablation.

    Each is three numbers: its value and the ends of its 95% interval, by a bootstrap over prompts.
    """
    prompts = [group for _, group in table.groupby("prompt")]
    draws = draw_again(len(prompts), seed, n_draws)
    resampled = [pd.concat([prompts[i] for i in draw]).corr()["ablation"] for draw in draws]
    summary = {"n_features": len(table), "n_prompts": len(prompts)}
    for name in ("attribution", "activation"):
        ends = interval([correlation[name] for correlation in resampled])
        summary[name] = [float(table.corr()["ablation"][name]), *ends]
    return summary


def show_attribution(pair: Sequence[str], difference: float, top: pd.DataFrame, prompt: str) -> str:
    """A line for each row of ``top``: ``feature, label, activation, attribution, ablation``.

    Args:
        pair: Texts of the two tokens; ``difference`` is that of their logits.
    """
    first, second = (repr(one_line(word)) for word in pair)
    lines = [
        f"Prompt: {one_line(prompt)}",
        f"The logit of {first} is {abs(difference):.2f} {'below' if difference < 0 else 'above'} "
        f"that of {second}. What adds to the first:",
        "",
        "feature  attribution  ablation  activation  label",
    ]
    for row in top.itertuples():
        lines.append(
            f"{row.feature:7d}  {row.attribution:11.3f}  {row.ablation:8.3f}  "
            f"{row.activation:10.2f}  {one_line(str(row.label))}"
        )
    return "\n".join(lines)


def show_correlations(summary: dict[str, Json]) -> str:
    """The result of `correlations` in words, with 95% intervals."""
    lines = [
        f"\nCorrelation with the effect of ablation, over {summary['n_features']:,} active "
        f"features of {summary['n_prompts']} held-out prompts:"
    ]
    for name in ("attribution", "activation"):
        value, low, high = summary[name]
        lines.append(f"  {name:12s} {value:5.2f}  ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


def plot_attribution(
    attribution: Attribution, words: list[str], labels: pd.Series, path: Path
) -> None:
    """Draw the features that contribute most to the difference of logits, at each prompt token.

    Args:
        words: Texts of the two tokens compared, then of the prompt's tokens.
        labels: By feature.
    """
    first, second, *prompt = (repr(word)[1:-1] for word in words)
    title = f"What makes “{first.strip()}” likelier than “{second.strip()}”: "
    title += f"{attribution.difference:.2f} logits"
    places = attribution.places.sort_values("attribution", key=abs, ascending=False)
    total = places["attribution"].abs().groupby(places["position"]).sum()
    total = total.reindex(range(len(prompt)), fill_value=0.0)
    positions = sorted(total.nlargest(N_POSITIONS).index)
    note = f"At each token its {N_SHOWN} largest; named are the two largest"
    if len(prompt) > N_POSITIONS:
        note += f"; of {len(prompt)} tokens the {N_POSITIONS} that count most"
    height = 1.2 + 0.34 * len(positions)
    with plots.picture(path, title, (9, height)) as (_, axes):
        for row, token in enumerate(positions):
            largest = places[places.position == token].head(N_SHOWN)
            ends = {True: 0.0, False: 0.0}
            for value in largest.attribution:
                colour = plots.ORANGE if value > 0 else plots.BLUE
                axes.barh(row, value, 0.7, ends[value > 0], color=colour, edgecolor="white")
                ends[value > 0] += value
            named = largest.feature.head(2)
            short = [textwrap.shorten(labels[name], 20, placeholder=" …") for name in named]
            names = [f"{name} “{label}”" for name, label in zip(named, short, strict=True)]
            style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
            axes.text(1.02, row, "; ".join(names).replace("$", r"\$"), color=plots.GREY, **style)
        axes.axvline(0, color=plots.GREY, linewidth=0.8)
        shown = [prompt[token].replace("$", r"\$") for token in positions]
        axes.set_yticks(range(len(shown)), shown)
        axes.set(xlabel="attribution (logits); orange adds, blue takes away", title=note)
        axes.set_ylim(len(positions) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
