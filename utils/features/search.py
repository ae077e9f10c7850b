"""Searching a finished analysis for features: by words, by likeness, by what is active on prompts.

Words and likeness need the tables alone. Prompts are run through the language model up to the
layer, so that torch, model and autoencoder are loaded then, and only then.

Reference: "Scaling Monosemanticity", Searching for Features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.features.catalogue import N_NEIGHBOURS, Catalogue
from utils.settings import require


def search(settings: Any) -> tuple[Catalogue, pd.DataFrame]:
    """What the settings of analyze_features.py ask for.

    Returns:
        The catalogue, and a row a feature found, its columns and ``match``, best first.
    """
    catalogue = Catalogue(settings.analysis_dir)
    if settings.search is not None:
        return catalogue, catalogue.search(settings.search, settings.n_found)
    if settings.search_like is not None:
        return catalogue, find_like(catalogue, settings.search_like, settings.n_found)
    path = catalogue.autoencoder_path(settings.autoencoder_dir)
    prompts = [*settings.search_prompt, *settings.search_not]
    pooled = pool_prompts(catalogue, path, prompts, settings.search_token)
    n_positive = len(settings.search_prompt)
    choose = by_classifier if settings.search_classifier else by_presence
    match = choose(pooled[:n_positive], pooled[n_positive:])
    found = catalogue.features.assign(match=match)
    return catalogue, found[found["match"] > 0].nlargest(settings.n_found, "match")


def find_like(catalogue: Catalogue, feature: int, n: int) -> pd.DataFrame:
    """The features whose decoder rows are nearest to a feature's; ``match`` is the cosine."""
    features = catalogue.features
    require(
        feature in features.index and not features["dead"][feature],
        f"SEARCH_LIKE must be a living feature from 0 to {len(features) - 1}; it is {feature}.",
    )
    require(
        n <= N_NEIGHBOURS,
        f"N_FOUND must be at most {N_NEIGHBOURS} with SEARCH_LIKE: so many are kept; it is {n}.",
    )
    row = features.loc[feature]
    return features.loc[row["neighbours"][:n]].assign(match=row["neighbour_cosines"][:n])


def by_presence(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Mean over the positive prompts of what is active in all of these and in no negative one.

    Args:
        positive, negative: Activations, shape (prompts, n_latents).

    Returns:
        Shape (n_latents,), 0 for all other features.
    """
    wanted = (positive > 0).all(axis=0) & ~(negative > 0).any(axis=0)
    return positive.mean(axis=0) * wanted


def by_classifier(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Weights of a sparse linear classifier that tells positive prompts from negative ones.

    Activations count as shares of a feature's largest here, or frequent ones would win by size.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([positive, negative])
    rows = rows / np.maximum(rows.max(axis=0), 1e-9)
    is_positive = np.arange(len(rows)) < len(positive)
    classifier = LogisticRegression(l1_ratio=1, solver="liblinear", C=10.0, random_state=0)
    return classifier.fit(rows, is_positive).coef_[0]


def pool_prompts(
    catalogue: Catalogue, path: Path, prompts: Sequence[str], token: str | None
) -> np.ndarray:
    """How active every feature is on prompts: its mean over them, or at one token.

    Args:
        path: Of the autoencoder.
        token: The last token of each prompt whose text this is, spaces aside; None for the mean.

    Returns:
        Activations, shape (prompts, n_latents).

    Raises:
        InputError: A prompt has no such token.
    """
    from utils.backend import use_backend

    use_backend("torch")
    import torch

    from utils.autoencoder.saved import load_autoencoder
    from utils.language_model import learnt_positions, load_language_model, residual_at
    from utils.steering.clamps import encode, prompt_tokens
    from utils.steering.evaluation import as_torch

    summary = catalogue.summary
    layer, outlier_norm = summary["layer"], summary["outlier_norm"]
    language_model = load_language_model(summary["model_name"], layer, summary["dtype"])
    autoencoder = load_autoencoder(path)
    norms = as_torch(autoencoder.decoder_norms()).cpu()
    pooled = []
    for prompt in prompts:
        tokens = prompt_tokens(language_model, prompt)
        residual = residual_at(language_model, tokens, layer)[0]
        kept = learnt_positions(language_model, tokens[0], residual, outlier_norm).cpu()
        if token is not None:
            pieces = [language_model.tokenizer.decode([number]) for number in tokens[0]]
            at = [i for i, piece in enumerate(pieces) if piece.strip() == token.strip()]
            require(
                bool(at) and bool(kept[at[-1]]),
                "SEARCH_TOKEN must be a token of each prompt, and neither BOS nor a norm outlier; "
                f"{token!r} is not among {pieces[1:]}.",
            )
            kept = kept & (torch.arange(len(kept)) == at[-1])
        latents = encode(autoencoder, residual[kept]).cpu() * norms
        pooled.append(latents.mean(dim=0).numpy())
    return np.nan_to_num(np.stack(pooled))
