"""How alike the contexts of a feature are: by their meaning, or by their words.

A sentence model (a small encoder, the mean of its last states) compares by meaning. Without one,
TF-IDF compares by words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from utils import embedded
from utils.language_model import pick_device
from utils.settings import InputError, hub_token

BATCH = 64  # texts embedded together
LONGEST = 64  # tokens of a text that a sentence model reads
BEFORE, AFTER = 16, 8  # tokens around a peak that are compared

Embedder = Callable[[Sequence[str]], Any]  # texts to a matrix of unit rows, dense or sparse


def open_embedder(name: str | None) -> Embedder:
    """The sentence model of that name (a hub name, a folder, ``"embedded"``); TF-IDF for None.

    Raises:
        InputError: There is no such model.
    """
    if name is None:
        return TfidfVectorizer(sublinear_tf=True).fit_transform
    source = str(embedded.sentence_folder()) if name == "embedded" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, token=hub_token())
        model = AutoModel.from_pretrained(source, token=hub_token(), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"SENTENCE_MODEL {name} cannot be loaded: {error}") from None
    model = model.eval().to(pick_device())
    return lambda texts: embed(model, tokenizer, texts)


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts, shape (texts, d): the mean of the last states over their tokens."""
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(texts), BATCH), "embedding contexts", unit="batch"):
        places = by_length[start : start + BATCH]
        inputs = tokenizer(
            [texts[i] for i in places],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        ).to(model.device)
        states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors[places] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
    return vectors


def compare_contexts(
    embed: Embedder,
    source: pd.DataFrame,
    held: pd.DataFrame,
    quiet: pd.DataFrame,
    active: np.ndarray,
    other: dict[int, int],
) -> pd.DataFrame:
    """Are held-out contexts of a feature more like those of its highest examples than others are?

    Args:
        embed: Of `open_embedder`.
        source: A feature's highest examples: ``feature, pieces, peak``.
        held: Others of it, to be told from ``quiet``, texts drawn at random.
        active: Which features are active in each of these, (texts, n_latents), bool.
        other: A feature for each, whose highest examples show what chance gives.

    Returns:
        By feature, ``likeness`` and ``random_likeness``: the share of pairs of a context of its own
        and a random one that cosine to the mean of the highest orders right; 0.5 is chance.
    """
    texts = pd.concat([source, held, quiet])
    vectors = embed([_near(*row) for row in zip(texts["pieces"], texts["peak"], strict=True)])
    of_source, of_held = source["feature"].to_numpy(), held["feature"].to_numpy()
    first_held, first_quiet = len(source), len(source) + len(held)
    means = {
        feature: np.asarray(vectors[np.flatnonzero(of_source == feature)].mean(axis=0)).ravel()
        for feature in other
    }
    rows = {}
    for feature in other:
        own = first_held + np.flatnonzero(of_held == feature)
        silent = first_quiet + np.flatnonzero(~active[:, feature])
        truth = np.r_[np.ones(len(own)), np.zeros(len(silent))]
        compared = vectors[np.r_[own, silent]]
        rows[feature] = [
            roc_auc_score(truth, compared @ means[of]) for of in (feature, other[feature])
        ]
    names = ["likeness", "random_likeness"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names)


def _near(pieces: Sequence[str], peak: int) -> str:
    return "".join(pieces[max(0, peak - BEFORE) : peak + AFTER])
