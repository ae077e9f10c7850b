"""Searching a finished analysis for features: by words, by similarity, by activity on prompts.

Words and similarity need only the tables. Prompts run through the language model up to the layer;
torch, model and autoencoder are loaded for them alone.

Reference: "Scaling Monosemanticity", Searching for Features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from utils.features.catalogue import N_NEIGHBOURS, Catalogue
from utils.settings import require
from utils.terminal import mark_peak, one_line


class SearchSettings(Protocol):
    """The settings of analyze_features.py that a search reads."""

    analysis_dir: str
    autoencoder_dir: str
    search: str | None
    search_like: int | None
    search_prompt: tuple[str, ...]
    search_not: tuple[str, ...]
    search_token: str | None
    search_classifier: bool
    n_found: int


def search(settings: SearchSettings) -> tuple[Catalogue, pd.DataFrame]:
    """The catalogue, and its features that match the settings, with ``match``, best first."""
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
    features = catalogue.features.assign(match=match)
    return catalogue, features[features["match"] > 0].nlargest(settings.n_found, "match")


def find_like(catalogue: Catalogue, feature: int, n: int) -> pd.DataFrame:
    """The features whose decoder rows are nearest to a feature's; ``match`` is the cosine."""
    features = catalogue.features
    require(
        feature in features.index and not features["dead"][feature],
        f"SEARCH_LIKE must be a living feature from 0 to {len(features) - 1}; it is {feature}.",
    )
    row = features.loc[feature]
    require(
        n <= N_NEIGHBOURS,
        f"N_FOUND must be at most {N_NEIGHBOURS} with SEARCH_LIKE: so many are kept; it is {n}.",
    )
    return features.loc[row["neighbours"][:n]].assign(match=row["neighbour_cosines"][:n])


def by_presence(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Mean over the positive prompts, if active in all of these and in no negative one, else 0.

    Args:
        positive, negative: Feature activations, shape (prompts, n_latents).
    """
    wanted = (positive > 0).all(axis=0) & ~(negative > 0).any(axis=0)
    return positive.mean(axis=0) * wanted


def by_classifier(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Weights of a sparse linear classifier that tells positive prompts from negative ones.

    Each feature's activations are divided by their largest, or strong features would win by size.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([positive, negative])
    largest = rows.max(axis=0)
    rows = rows / np.where(largest > 0, largest, 1)
    is_positive = np.arange(len(rows)) < len(positive)
    classifier = LogisticRegression(l1_ratio=1, solver="liblinear", C=10.0, random_state=0)
    return classifier.fit(rows, is_positive).coef_[0]


def pool_prompts(
    catalogue: Catalogue, path: Path, prompts: Sequence[str], token: str | None
) -> np.ndarray:
    """Feature activations (prompts, n_latents): means over each prompt, or those at one token.

    Args:
        path: Of the autoencoder.
        token: Text of the token, spaces aside, of which the last is taken; None for the mean.

    Raises:
        InputError: A prompt has no such token.
    """
    from utils.backend import use_backend

    use_backend("torch")
    import torch

    from utils.steering.feature_model import FeatureModel
    from utils.steering.generation import prompt_tokens

    model = FeatureModel.load(catalogue.summary, path)
    pooled = []
    for prompt in prompts:
        tokens = prompt_tokens(model.language_model, prompt)
        residual = model.residual(tokens)[0]
        counted = model.trained_positions(tokens[0], residual).cpu()
        if token is not None:
            texts = catalogue.prompt_texts(model.language_model, tokens[0])
            matches = [i for i, text in enumerate(texts) if text.strip() == token.strip()]
            require(
                bool(matches) and bool(counted[matches[-1]]),
                "SEARCH_TOKEN must be a token of each prompt, and neither BOS nor a norm outlier; "
                f"{token!r} is not among {texts[1:]}.",
            )
            counted = counted & (torch.arange(len(counted)) == matches[-1])
        pooled.append(model.encode(residual[counted]).cpu().mean(dim=0).numpy())
    return np.nan_to_num(np.stack(pooled))


# ---------------------------------------------------------------------------------------- choosing


def choose_features(
    catalogue: Catalogue, named: Sequence[int | str], n_proposals: int, width: int
) -> list[int]:
    """The features that FEATURE names; prints them, or all candidates if it names a word or none.

    A number is a feature's if the dictionary has as many, else a word, as is all in quotes.

    Raises:
        InputError: One is out of range or dead, or no feature goes by a word.
    """
    chosen = []
    for wanted in named or (None,):
        if isinstance(wanted, int) and wanted >= catalogue.summary["n_latents"]:
            wanted = str(wanted)
        if isinstance(wanted, int):
            check_feature(catalogue, wanted)
            candidates = [wanted]
        elif wanted is None:
            candidates = catalogue.propose(n_proposals)["feature"].tolist()
        else:
            words = wanted.strip("\"'")
            candidates = catalogue.search(words, n_proposals)["feature"].tolist()
        require(
            len(candidates) > 0,
            f"FEATURE must be from 0 to {catalogue.summary['n_latents'] - 1}, or a word that some "
            f"feature goes by; it is {wanted!r}, and none was found. Try a number or another word.",
        )
        for feature in candidates:
            print(show_feature(catalogue, feature, width) + "\n")
        if not isinstance(wanted, int):
            source = "proposed" if wanted is None else f"found for {wanted!r}"
            print(
                f"Feature {candidates[0]} is taken, the first of {len(candidates)} {source}. To "
                "choose another: --feature NUMBER, or a word to find one by.\n"
            )
        chosen.append(candidates[0])
    return list(dict.fromkeys(chosen))


def check_feature(catalogue: Catalogue, feature: int) -> None:
    """Refuse a feature that is out of range or dead."""
    n_latents = catalogue.summary["n_latents"]
    n_dead = int(catalogue.features["dead"].sum())
    rule = f"FEATURE must be from 0 to {n_latents - 1}, and not one of the {n_dead} dead ones;"
    remedy = "Leave --feature out for proposals, or give a word to find one by."
    require(0 <= feature < n_latents, f"{rule} it is {feature}. {remedy}")
    dead = bool(catalogue.features.loc[feature, "dead"])
    require(not dead, f"{rule} {feature} was active on no token of the analysis. {remedy}")


# ----------------------------------------------------------------------------------------- showing


def show_feature(catalogue: Catalogue, feature: int, width: int, n_examples: int = 3) -> str:
    """A feature's label, frequency and top examples, as lines of at most ``width`` characters."""
    row = catalogue.features.loc[feature]
    examples = catalogue.examples_of([feature])
    top = examples[examples["bucket"] == 0]
    lines = [
        f"Feature {feature}: {one_line(str(row['label']))}",
        f"  active on {100 * row['frequency']:.2g}% of tokens, at most {row['max_activation']:.3g}",
    ]
    for example in top.sort_values("rank").head(n_examples).itertuples():
        text = mark_peak(list(example.token_texts), int(example.peak), width - 10)
        lines.append(f"{example.activation:8.3g}  {text}")
    return "\n".join(lines)


def in_words(row: Mapping) -> str:
    """A sentence on a row of the table of features: its meaning, and how often it fires."""
    about = row.get("explanation") or row["label"]
    words = f"feature {row['feature']}, {one_line(str(about))}, "
    words += f"fires on {100 * row['frequency']:.2g}% of tokens"
    score = row.get("explanation_score")
    return words + (f" (explanation score {score:.2f})" if score and score == score else "")


def show_matches(catalogue: Catalogue, matches: pd.DataFrame, width: int) -> str:
    """The features of a `search`, two lines each: a description, and the top example."""
    examples = catalogue.examples_of(matches["feature"].tolist())
    top = examples[(examples["bucket"] == 0) & (examples["rank"] == 0)].set_index("feature")
    lines = []
    for row in matches.itertuples():
        lines.append(
            f"{row.match:6.2f}  feature {row.feature}, {one_line(str(row.label))}: on "
            f"{100 * row.frequency:.2g}% of tokens, {100 * row.top_subset_share:.0f}% of it in "
            f"{row.top_subset}"
        )
        if row.feature in top.index:
            example = top.loc[row.feature]
            text = mark_peak(list(example.token_texts), int(example.peak), width - 8)
            lines.append(" " * 8 + text)
    if not lines:
        return "No feature was found."
    return "\n".join(
        [" match  feature, its label, where it is active, and its top example", *lines]
    )
