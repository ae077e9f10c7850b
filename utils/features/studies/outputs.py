"""Output scores: does a feature write what it reads?

A feature may be active at a word and yet not lead the model to write it. Every living feature is
clamped to its maximum, alone, after neutral prompts:

    output score = log P(its tokens next | clamped) − log P(its tokens next | untouched)

in nats, a mean over the prompts. Its tokens are those that its highest examples peak at. The same
clamp with another feature's tokens shows the effect of such a change on any tokens.

Reference: Arad, Mueller and Belinkov 2025, SAEs Are Good for Steering – If You Select the Right
Features, whose score looks at the rank of tokens that the decoder row promotes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils import plots
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.sampling import another_of, p_positive
from utils.language_model import LanguageModel
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens

PROMPTS = ("In my experience,", "I think that")
N_TOGETHER = 128  # features clamped at once, each in a text of its own


@torch.inference_mode()
def next_tokens(language_model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the next token, shape (batch, vocabulary), float32."""
    logits = language_model.model(tokens, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float().log_softmax(dim=-1)


def log_probability_of(tokens: Sequence[int], log_probabilities: torch.Tensor) -> float:
    """The log probability that any of ``tokens`` comes next, from those of all, (vocabulary,)."""
    return float(log_probabilities[list(tokens)].logsumexp(dim=0))


def output_scores(
    model: FeatureModel,
    maxima: np.ndarray,
    peak_tokens: dict[int, Sequence[int]],
    other_tokens: dict[int, Sequence[int]],
) -> pd.DataFrame:
    """The output score of features, and the same for another's tokens, means over `PROMPTS`.

    Args:
        maxima: The largest feature activation of every latent, shape (n_latents,).
        peak_tokens: Of each feature to be scored.
        other_tokens: Of another feature, for each of them.

    Returns:
        A row a feature: ``feature, score, others``, in nats.
    """
    features = list(peak_tokens)
    scores = np.zeros((2, len(features)))
    with tqdm(total=len(PROMPTS) * len(features), desc="output scores", unit="feature") as bar:
        for prompt in PROMPTS:
            tokens = prompt_tokens(model.language_model, prompt)
            (untouched,) = next_tokens(model.language_model, tokens)
            for start in range(0, len(features), N_TOGETHER):
                batch = features[start : start + N_TOGETHER]
                clamps = [[Clamp(feature, 1.0, float(maxima[feature]))] for feature in batch]
                with steered(model, clamps):
                    clamped = next_tokens(model.language_model, tokens.expand(len(batch), -1))
                for row, tokens_of in zip(scores, (peak_tokens, other_tokens), strict=True):
                    for i, feature in enumerate(batch):
                        before = log_probability_of(tokens_of[feature], untouched)
                        after = log_probability_of(tokens_of[feature], clamped[i])
                        row[start + i] += (after - before) / len(PROMPTS)
                bar.update(len(batch))
    return pd.DataFrame({"feature": features, "score": scores[0], "others": scores[1]})


def study(analysis: Analysis) -> Findings:
    """The output score of every living feature."""
    features, texts = analysis.features, analysis.token_texts
    numbers: dict[str, list[int]] = {}  # several tokens may read alike
    for number, text in enumerate(texts):
        if number != analysis.language_model.bos:
            numbers.setdefault(text, []).append(number)
    peak_texts = features.loc[~features["dead"], "peak_tokens"]
    tokens = {
        feature: [number for peak in peaks for number in tokens_of(peak, numbers)]
        for feature, peaks in peak_texts.items()
    }
    tokens = {feature: ids for feature, ids in tokens.items() if ids}
    pairs = another_of(list(tokens), analysis.settings.seed)
    other_tokens = {feature: tokens[other] for feature, other in pairs.items()}
    maxima = features["max_activation"].to_numpy()
    table = output_scores(analysis.model, maxima, tokens, other_tokens)
    column = table.set_index("feature")["score"].reindex(range(len(features))).to_numpy()
    summary = summarise(table)
    return Findings(summary, in_words(summary), {"outputs": table}, {"output_score": column})


def tokens_of(text: str, numbers: dict[str, list[int]]) -> list[int]:
    """Tokens that read as a text, or as the most of its first, split, character.

    Args:
        numbers: The tokens of each text, parts of characters as in `utils.characters`.
    """
    parts = text.encode().decode("ascii", "surrogateescape")
    beginnings = (parts[:end] for end in range(len(parts), 0, -1))
    return numbers.get(text) or next((numbers[p] for p in beginnings if p in numbers), [])


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """``n_features``; the scores' ``mean`` and ``others_mean``, nats; ``p`` that these differ."""
    if table.empty:
        return {}
    return {
        "n_features": len(table),
        "mean": float(table["score"].mean()),
        "others_mean": float(table["others"].mean()),
        "p": p_positive(table["score"] - table["others"]),
    }


def in_words(summary: dict[str, float]) -> str:
    """The result of `summarise` as a sentence."""
    if not summary:
        return ""
    peaks, another = np.exp([summary["mean"], summary["others_mean"]])
    return (
        f"Outputs: a feature clamped to its maximum makes the tokens it peaks at {peaks:.2f} times "
        f"as likely as the next, another feature's {another:.2f} times "
        f"(n = {summary['n_features']:,}, p = {summary['p']:.1g})."
    )


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """How much likelier features make the tokens they peak at, and another feature's."""
    table, path = catalogue.table("outputs"), catalogue.folder / "outputs.png"
    times = np.exp(table.score.mean())
    title = f"Clamped, features make the tokens they peak at {times:.1f} times as likely"
    title += f" (n = {len(table):,} features)"
    scores = {"its own tokens": table.score, "another feature's": table.others}
    groups = {f"{name}: {values.mean():+.2f} nats": values for name, values in scores.items()}
    bins = np.linspace(-3, 5, 81)
    with plots.picture(path, title, (7.5, 3.9)) as (_, axes):
        plots.compare(axes, groups, bins)
        axes.set(xlim=(bins[0], bins[-1]), ylabel="% of features")
        axes.set(xlabel="output score: rise in the log probability that one comes next, nats")
        axes.legend(loc="upper right")
    return {"Does a feature write what it reads?": path}
