"""Output scores: does a feature write what it reads?

A feature may be active at a word and yet not lead the model to write it. Every living feature is
clamped to its maximum, alone, after neutral prompts:

    output score = log P(its tokens next | clamped) − log P(its tokens next | untouched)

in nats, a mean over the prompts. Its tokens are those that its highest examples peak at. The same
clamp with another feature's tokens says what a change of this size does to any tokens.

Reference: Arad, Mueller and Belinkov 2025, SAEs Are Good for Steering – If You Select the Right
Features, whose score looks at the rank of tokens that the decoder row promotes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from utils import plots
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.language_model import LanguageModel
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens

PROMPTS = ("In my experience,", "I think that")
CAPTION = "Does a feature write what it reads?"
N_TOGETHER = 128  # features clamped at once, each in a text of its own


@torch.inference_mode()
def next_tokens(language_model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the next token, shape (batch, vocabulary), float32."""
    logits = language_model.model(tokens, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float().log_softmax(dim=-1)


def of_any(log_probabilities: torch.Tensor, tokens: Sequence[int]) -> float:
    """The log probability of any of some tokens, of those of all, (vocabulary,)."""
    return float(log_probabilities[list(tokens)].logsumexp(dim=0))


def output_scores(
    model: FeatureModel,
    maxima: np.ndarray,
    wanted: dict[int, Sequence[int]],
    others: dict[int, Sequence[int]],
) -> pd.DataFrame:
    """The output score of features, and the same of another's tokens, means over `PROMPTS`.

    Args:
        maxima: The largest reported activation of every latent, shape (n_latents,).
        wanted: Tokens of each feature to be scored.
        others: Other tokens for each of them.

    Returns:
        A row a feature: ``feature, score, others``, in nats.
    """
    features = list(wanted)
    scores = np.zeros((2, len(features)))
    with tqdm(total=len(PROMPTS) * len(features), desc="output scores", unit="feature") as bar:
        for prompt in PROMPTS:
            tokens = prompt_tokens(model.language_model, prompt)
            (untouched,) = next_tokens(model.language_model, tokens)
            for start in range(0, len(features), N_TOGETHER):
                some = features[start : start + N_TOGETHER]
                clamps = [[Clamp(feature, 1.0, float(maxima[feature]))] for feature in some]
                with steered(model, clamps):
                    clamped = next_tokens(model.language_model, tokens.expand(len(some), -1))
                for row, tokens_of in zip(scores, (wanted, others), strict=True):
                    for number, feature in enumerate(some):
                        wished = tokens_of[feature]
                        rise = of_any(clamped[number], wished) - of_any(untouched, wished)
                        row[start + number] += rise / len(PROMPTS)
                bar.update(len(some))
    return pd.DataFrame({"feature": features, "score": scores[0], "others": scores[1]})


def of_another(wanted: dict[int, Sequence[int]], seed: int) -> dict[int, Sequence[int]]:
    """For each feature what is of another, drawn at random; every feature's is used once."""
    order = np.random.default_rng(seed).permutation(list(wanted)).tolist()
    return {feature: wanted[order[place - 1]] for place, feature in enumerate(order)}


def study(analysis: Analysis) -> Findings:
    """The output score of every living feature."""
    features, seed = analysis.features, analysis.settings.seed
    texts = analysis.token_texts
    numbers = pd.Series(range(len(texts))).groupby(texts).agg(list)
    alive = features.index[~features["dead"]]
    wanted = {
        feature: [number for token in features["peak_tokens"][feature] for number in numbers[token]]
        for feature in alive
    }
    table = output_scores(
        analysis.model, features["max_activation"].to_numpy(), wanted, of_another(wanted, seed)
    )
    column = table.set_index("feature")["score"].reindex(range(len(features))).to_numpy()
    summary = summarise(table)
    return Findings(summary, in_words(summary), {"outputs": table}, {"output_score": column})


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """Scores, and how they compare with those of others' tokens.

    Returns:
        ``n_features``; ``mean`` and ``others_mean``, in nats; ``p`` of Wilcoxon's signed ranks.
        Nothing if there is no feature.
    """
    if table.empty:
        return {}
    differences = table["score"] - table["others"]
    test = stats.wilcoxon(differences, alternative="greater") if differences.any() else None
    return {
        "n_features": len(table),
        "mean": float(table["score"].mean()),
        "others_mean": float(table["others"].mean()),
        "p": float(test.pvalue) if test else 1.0,
    }


def in_words(summary: dict[str, float]) -> str:
    """The result of `summarise` as a sentence."""
    if not summary:
        return ""
    peaks, others = np.exp([summary["mean"], summary["others_mean"]])
    return (
        f"Outputs: a feature clamped to its maximum makes the tokens it peaks at {peaks:.2f} times "
        f"as likely as the next, another's {others:.2f} times (n = {summary['n_features']:,}, "
        f"p = {summary['p']:.1g})."
    )


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The picture of a finished study, by its caption."""
    plot_outputs(catalogue.table("outputs"), catalogue.folder / "outputs.png")
    return {CAPTION: catalogue.folder / "outputs.png"}


def plot_outputs(table: pd.DataFrame, path: Path) -> None:
    """How much likelier features make their own tokens, and another's.

    Args:
        table: Of `output_scores`.
    """
    times = np.exp(table.score.mean())
    title = f"Clamped, features make the tokens they peak at {times:.1f} times as likely"
    title += f" (n = {len(table):,} features)"
    bins = np.linspace(-3, 5, 81)
    with plots.picture(path, title, (7.5, 3.9)) as (_, axes):
        for scores, label, colour in (
            (table.score, "its own tokens", plots.ORANGE),
            (table.others, "another feature's", plots.GREY),
        ):
            shares = np.full(len(scores), 100 / max(1, len(scores)))
            shown = f"{label}: {scores.mean():+.2f} nats"
            within = scores.clip(bins[0], bins[-1])
            axes.hist(within, bins, weights=shares, color=colour, alpha=0.55, label=shown)
            axes.axvline(scores.mean(), color=colour, linewidth=1.5)
        axes.set(xlim=(bins[0], bins[-1]), ylabel="% of features")
        axes.set(xlabel="output score: rise in the log probability that one comes next, nats")
        axes.legend(loc="upper right")
